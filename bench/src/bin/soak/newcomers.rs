//! Newcomers: a VM that connects and disconnects repeatedly, and an operator that calls RPCs. Other
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

use crate::beats::Beats;

/// The name of the controller and of its disk.
pub(crate) const NAME: &str = "newcomer";

/// The pause between two newcomers, in which other threads have the cores.
const PAUSE: Duration = Duration::from_millis(2);

/// The measurements of newcomers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Number of sessions.
    pub(crate) lives: u64,
    /// The longest session of a VM, from connection to GET_VRING_BASE, in beats.
    pub(crate) life_beats: u64,
    /// The longest RPC, in beats.
    pub(crate) rpc_beats: u64,
}

impl Seen {
    /// Adds other measurements.
    pub(crate) fn add(&mut self, other: Self) {
        self.lives += other.lives;
        self.life_beats = self.life_beats.max(other.life_beats);
        self.rpc_beats = self.rpc_beats.max(other.rpc_beats);
    }
}

/// Runs newcomers, one after the other, until it is dropped.
pub(crate) struct Newcomers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

impl Newcomers {
    /// Creates the disk and the controller.
    pub(crate) fn prepare(server: &Server) -> Result<()> {
        server.bdev("malloc", NAME)?;
        server.controller(NAME, NAME)?;
        Ok(())
    }

    /// Starts the thread.
    pub(crate) fn start(server: &Server, beats: &Arc<Beats>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, beats) = (stop.clone(), beats.clone());
        let (socket, rpc) = (server.socket(NAME), server.rpc_socket());
        let come = move || come(&socket, &rpc, &beats, &stopped);
        let thread = std::thread::Builder::new().name("newcomers".into()).spawn(come)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits until the last newcomer has disconnected.
    pub(crate) fn end(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("the thread has been joined"))?;
        thread.join().map_err(|_| anyhow!("the newcomers' thread has panicked"))?
    }
}

impl Drop for Newcomers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn come(socket: &Path, rpc: &Path, beats: &Beats, stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        let start = beats.now();
        live(socket)?;
        let gone = beats.now();
        Rpc::connect(rpc)?.call("vhost_get_controllers", json!({"name": NAME}))?;
        let (life_beats, rpc_beats) = (gone - start, beats.now() - gone);
        seen.add(Seen { lives: 1, life_beats, rpc_beats });
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
    ensure!(done.status == STATUS_OK, "a newcomer's read has status {}", done.status);
    front_end.disconnect()?;
    Ok(())
}
