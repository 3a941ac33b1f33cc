//! New VMs: a VM that connects and disconnects repeatedly, and an operator that calls RPCs. Other
//! clients must not delay them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use bench::servers::{Rpc, Server};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::json;

use crate::heartbeats::Heartbeats;

/// The name of the controller and of its disk.
pub(crate) const NAME: &str = "new-vm";

/// The pause between two new VMs, in which other threads have the cores.
const PAUSE: Duration = Duration::from_millis(2);

/// The measurements of new VMs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Number of sessions.
    pub(crate) lives: u64,
    /// The longest session of a VM, from connection to GET_VRING_BASE, in heartbeats.
    pub(crate) life_heartbeats: u64,
    /// The longest RPC, in heartbeats.
    pub(crate) rpc_heartbeats: u64,
}

impl Seen {
    /// Adds other measurements.
    pub(crate) fn add(&mut self, other: Self) {
        self.lives += other.lives;
        self.life_heartbeats = self.life_heartbeats.max(other.life_heartbeats);
        self.rpc_heartbeats = self.rpc_heartbeats.max(other.rpc_heartbeats);
    }
}

/// Runs new VMs, one after the other, until it is dropped.
pub(crate) struct NewVms {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

impl NewVms {
    /// Creates the disk and the controller.
    pub(crate) fn prepare(server: &Server) -> Result<()> {
        server.bdev("malloc", NAME)?;
        server.controller(NAME, NAME)?;
        Ok(())
    }

    /// Starts the thread.
    pub(crate) fn start(server: &Server, heartbeats: &Arc<Heartbeats>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, heartbeats) = (stop.clone(), heartbeats.clone());
        let (socket, rpc) = (server.socket(NAME), server.rpc_socket());
        let come = move || come(&socket, &rpc, &heartbeats, &stopped);
        let thread = std::thread::Builder::new().name("new-vms".into()).spawn(come)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits until the last new VM has disconnected.
    pub(crate) fn end(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("the thread has been joined"))?;
        thread.join().map_err(|_| anyhow!("the new VMs' thread has panicked"))?
    }
}

impl Drop for NewVms {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn come(socket: &Path, rpc: &Path, heartbeats: &Heartbeats, stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        let start = heartbeats.now();
        live(socket)?;
        let gone = heartbeats.now();
        Rpc::connect(rpc)?.call("vhost_get_controllers", json!({"name": NAME}))?;
        let (life_heartbeats, rpc_heartbeats) = (gone - start, heartbeats.now() - gone);
        seen.add(Seen { lives: 1, life_heartbeats, rpc_heartbeats });
        std::thread::sleep(PAUSE);
    }
    Ok(seen)
}

/// One session of a VM, with one read.
fn live(socket: &Path) -> Result<()> {
    let ram = GuestRam::new(&[4 << 20])?;
    let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default())?;
    let mut queue = front_end.start_new(1, QueueOptions::default())?.remove(0);
    let buffer = ram.alloc(4096, 4096)?;
    let done = queue.run(&Request::read(0, &[buffer]))?;
    ensure!(done.status == STATUS_OK, "a new VM's read has status {}", done.status);
    front_end.disconnect()?;
    Ok(())
}
