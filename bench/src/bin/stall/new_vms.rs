//! New VMs: a VM that connects and disconnects repeatedly, and an operator who calls RPCs. They
//! wait for threads other than the reactors.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bench::servers::{Rpc, Server};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request};
use serde_json::json;

/// Their controller.
pub(crate) const NAME: &str = "new-vm";
/// The pause between two new VMs.
const PAUSE: Duration = Duration::from_millis(10);

/// The longest times.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    /// From connection to the answer to GET_VRING_BASE, with one request in between.
    pub(crate) life: Duration,
    /// `vhost_get_controllers` for one controller.
    pub(crate) rpc: Duration,
}

/// Runs `during`, with new VMs at the same time if there is a server for them.
pub(crate) fn beside(
    server: Option<&Server>,
    during: impl FnOnce() -> Result<()>,
) -> Result<Option<Waits>> {
    let Some(server) = server else { return during().map(|()| None) };
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let new_vms = scope.spawn(|| come(server, &ended));
        let result = during();
        ended.store(true, Ordering::Relaxed);
        let waits = new_vms.join().map_err(|_| anyhow!("the new VMs have panicked"))?;
        result.and(waits).map(Some)
    })
}

fn come(server: &Server, ended: &AtomicBool) -> Result<Waits> {
    let socket = server.socket(NAME);
    let mut waits = Waits::default();
    while !ended.load(Ordering::Relaxed) {
        waits.life = waits.life.max(live(&socket)?);
        let start = Instant::now();
        let params = json!({"name": NAME});
        Rpc::connect(&server.rpc_socket())?.call("vhost_get_controllers", params)?;
        waits.rpc = waits.rpc.max(start.elapsed());
        std::thread::sleep(PAUSE);
    }
    Ok(waits)
}

fn live(socket: &Path) -> Result<Duration> {
    let ram = GuestRam::new(&[4 << 20])?;
    let buffer = ram.alloc(4096, 4096)?;
    let start = Instant::now();
    let mut front_end = FrontEnd::connect(socket, ram, Options::default())?;
    let mut queue = front_end.start_new(1, QueueOptions::default())?.remove(0);
    queue.run(&Request::read(0, &[buffer]))?;
    front_end.disconnect()?;
    Ok(start.elapsed())
}
