//! Creates and deletes controllers repeatedly.

use anyhow::{Context, Result};
use bench::publish::progress;
use bench::servers::{Interrupt, Rpc, Server};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request};
use serde_json::json;

use crate::footprint::{Footprint, come_back};

/// Rounds before the memory in use is recorded.
const WARM_UP: u64 = 1000;
/// In every round of this number, a VM reads once, and the delete is forced.
const VM: u64 = 16;
const NAME: &str = "round";

/// Creates and deletes a controller `rounds` times.
pub(crate) fn run(server: &Server, rounds: u64, interrupt: &Interrupt) -> Result<String> {
    server.bdev("null", "null")?;
    let start = Footprint::of(server.process.pid())?;
    let mut before = start;
    let mut rpc = Rpc::connect(&server.rpc_socket())?;
    for done in 1..=rounds {
        interrupt.check()?;
        round(server, &mut rpc, done % VM == 0).with_context(|| format!("round {done}"))?;
        if done % WARM_UP == 0 {
            let now = Footprint::of(server.process.pid())?;
            progress(&format!("{done} rounds: {now}"));
            if done == WARM_UP {
                before = start.with_rss_of(&now);
            }
        }
    }
    drop(rpc);
    let (now, _) = come_back(server, &before)?;
    Ok(format!(
        "{rounds} rounds of create and delete, {} with a VM\n\
         at the start {start}; after {WARM_UP} rounds {} MiB; at the end {now}",
        rounds / VM,
        before.rss_mib()
    ))
}

fn round(server: &Server, rpc: &mut Rpc, with_vm: bool) -> Result<()> {
    let params = json!({"ctrlr": NAME, "dev_name": "null"});
    rpc.call("vhost_create_blk_controller", params)?;
    let vm = with_vm.then(|| vm(server)).transpose()?;
    rpc.call("vhost_delete_controller", json!({"ctrlr": NAME, "force": with_vm}))?;
    drop(vm);
    Ok(())
}

/// A VM that has read a block.
fn vm(server: &Server) -> Result<FrontEnd> {
    let ram = GuestRam::new(&[4 << 20])?;
    let mut front_end = FrontEnd::connect(&server.socket(NAME), ram.clone(), Options::default())?;
    let mut queue = front_end.start_new(1, QueueOptions::default())?.remove(0);
    let buffer = ram.alloc(4096, 4096)?;
    queue.run(&Request::read(0, &[buffer]))?;
    Ok(front_end)
}
