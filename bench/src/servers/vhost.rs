//! Our `vhost` and SPDK's, which are started and told what to do in the same words.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Disk, Error, Kind, Process, Result, Rpc, Server, Spec, setpriv};

/// What SPDK is given instead of hugepages where none are free; ours manages by itself.
const SPDK_WITHOUT_HUGEPAGES: [&str; 3] = ["--no-huge", "-s", "1024"];

pub(super) fn start(spec: &Spec, core: usize, disks: &[Disk], dir: TempDir) -> Result<Server> {
    let mut command = setpriv(&spec.program);
    command.args(["-m", &format!("{:#x}", 1_u64 << core), "-u", "--disable-cpumask-locks"]);
    command.arg("-S").arg(dir.path()).arg("-r").arg(dir.path().join("rpc.sock"));
    if spec.kind == Kind::Spdk && free_hugepages() == 0 {
        command.args(SPDK_WITHOUT_HUGEPAGES);
    }
    command.args(&spec.args).envs(spec.env.iter().map(|(name, value)| (name, value)));
    let mut process = Process::start(&spec.name, command, dir.path().join("log"))?;
    let socket = dir.path().join("rpc.sock");
    process.wait_until("RPC socket", || Rpc::connect(&socket).is_ok())?;
    let (workers, drivers) = (Vec::new(), Vec::new());
    let mut server = Server { spec: spec.clone(), process, workers, drivers, dir };
    server.workers = reactors(&server)?;
    for disk in disks {
        match disk {
            Disk::Null | Disk::Malloc => server.bdev(disk.name(), disk.name())?,
            Disk::Aio(path) | Disk::Uring(path) | Disk::Block(path) => {
                let params = json!({"name": disk.name(), "filename": path, "block_size": 512});
                // A build of SPDK without liburing has the other alone.
                if matches!(disk, Disk::Aio(_))
                    || server.call("bdev_uring_create", params.clone()).is_err()
                {
                    server.call("bdev_aio_create", params)?;
                }
                let shown = server.call("bdev_get_bdevs", json!({"name": disk.name()}))?;
                server.drivers.push((disk.name(), driver(&shown[0]["driver_specific"])));
            }
        }
        server.controller(disk.name(), disk.name())?;
    }
    Ok(server)
}

/// Ids of the reactors' threads.
fn reactors(server: &Server) -> Result<Vec<u32>> {
    let method = "framework_get_reactors";
    let answer = server.call(method, Value::Null)?;
    let reactors = answer["reactors"].as_array().into_iter().flatten();
    let tids: Option<Vec<u32>> = reactors.map(|r| r["tid"].as_u64()?.try_into().ok()).collect();
    let nonsense = || Error::Nonsense { method: method.into(), answer: answer.to_string() };
    tids.filter(|tids| !tids.is_empty()).ok_or_else(nonsense)
}

/// The bdev module, and what it says of how it reaches the disk.
fn driver(specific: &Value) -> String {
    let Some((module, about)) = specific.as_object().and_then(|modules| modules.iter().next())
    else {
        return "unknown".into();
    };
    let said = ["engine", "direct", "nowait"].into_iter().filter_map(|name| {
        let value = about.get(name)?;
        Some(format!(", {name} {}", value.as_str().map_or(value.to_string(), str::to_owned)))
    });
    format!("bdev_{module}{}", said.collect::<String>())
}

fn free_hugepages() -> u64 {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok().and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_named_with_what_it_says_of_itself() {
        let ours = json!({"aio": {"filename": "/x", "engine": "io_uring", "direct": true}});
        assert_eq!(driver(&ours), "bdev_aio, engine io_uring, direct true");
        assert_eq!(driver(&json!({"uring": {"filename": "/x"}})), "bdev_uring");
        assert_eq!(driver(&json!({})), "unknown");
    }
}
