//! `qemu-storage-daemon`, with its disks on one iothread.

use std::path::Path;

use tempfile::TempDir;

use super::{Disk, MEMORY_DISK_BYTES, Process, QUEUES_MAX, Result, Server, Spec, setpriv};

/// The iothread's id.
const IOTHREAD: &str = "worker";
/// It polls for good, as the others do: by default it goes to sleep after 32 µs without work.
const POLL: &str = "poll-max-ns=1000000000";

/// It does not tell which of its threads the iothread is, so the whole process is kept on `core`:
/// its other threads have nothing to do once it serves.
pub(super) fn start(spec: &Spec, core: usize, disks: &[Disk], dir: TempDir) -> Result<Server> {
    let mut command = setpriv("taskset".as_ref());
    command.args(["-c", &core.to_string()]).arg(&spec.program);
    command.args(["--object", &format!("iothread,id={IOTHREAD},{POLL}")]);
    for disk in disks {
        command.args(["--blockdev", &blockdev(disk)]);
        command.args(["--export", &export(disk.name(), &dir.path().join(disk.name()))]);
    }
    command.args(&spec.args).envs(spec.env.iter().map(|(name, value)| (name, value)));
    let mut process = Process::start(&spec.name, command, dir.path().join("log"))?;
    let sockets: Vec<_> = disks.iter().map(|disk| dir.path().join(disk.name())).collect();
    process.wait_until("sockets", || sockets.iter().all(|socket| socket.exists()))?;
    let workers = process.threads()?;
    let driver = |disk: &Disk| Some((disk.name(), format!("{}, cache.direct=on", engine(disk)?)));
    let drivers = disks.iter().filter_map(driver).collect();
    Ok(Server { spec: spec.clone(), process, workers, drivers, dir })
}

/// The driver of a disk on a file or device, and how it does I/O.
fn engine(disk: &Disk) -> Option<&'static str> {
    match disk {
        Disk::Null | Disk::Malloc => None,
        Disk::Aio(_) => Some("driver=file,aio=native"),
        Disk::Uring(_) => Some("driver=file,aio=io_uring"),
        Disk::Block(_) => Some("driver=host_device,aio=io_uring"),
    }
}

fn blockdev(disk: &Disk) -> String {
    let name = disk.name();
    let (Some(engine), Some(path)) = (engine(disk), disk.path()) else {
        let zeroes = if *disk == Disk::Malloc { "on" } else { "off" };
        let size = MEMORY_DISK_BYTES;
        return format!("driver=null-co,node-name={name},size={size},read-zeroes={zeroes}");
    };
    // Other servers have the file open too.
    format!("{engine},node-name={name},cache.direct=on,locking=off,filename={}", escaped(path))
}

fn export(name: &str, socket: &Path) -> String {
    format!(
        "type=vhost-user-blk,id={name},node-name={name},writable=on,num-queues={QUEUES_MAX},\
         iothread={IOTHREAD},addr.type=unix,addr.path={}",
        escaped(socket)
    )
}

/// A path as a value in QEMU's option lists, in which a comma is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_ends_no_option() {
        assert_eq!(escaped("/a,b".as_ref()), "/a,,b");
        let file = blockdev(&Disk::Uring("/x,y".into()));
        assert!(file.ends_with("filename=/x,,y"), "{file}");
    }

    #[test]
    fn a_disk_is_served_through_what_it_is_named_after() {
        let of = |disk: Disk| blockdev(&disk);
        assert!(of(Disk::Aio("/x".into())).starts_with("driver=file,aio=native,"));
        assert!(of(Disk::Uring("/x".into())).starts_with("driver=file,aio=io_uring,"));
        assert!(of(Disk::Block("/x".into())).starts_with("driver=host_device,aio=io_uring,"));
    }

    #[test]
    fn a_malloc_disk_fills_buffers_and_a_null_disk_does_not() {
        assert!(blockdev(&Disk::Malloc).ends_with("read-zeroes=on"));
        assert!(blockdev(&Disk::Null).ends_with("read-zeroes=off"));
    }
}
