//! A VM that comes and goes, and an operator that asks, beside everything else: neither may be kept
//! waiting by others.

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

/// Its controller, and its disk.
pub(crate) const NAME: &str = "newcomer";

/// Between two of them, for others to have the cores.
const PAUSE: Duration = Duration::from_millis(2);

/// What they have seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) lives: u64,
    /// The longest life of a VM, from connection to GET_VRING_BASE, in beats.
    pub(crate) life_beats: u64,
    /// The longest time that an RPC took, in beats.
    pub(crate) rpc_beats: u64,
}

impl Seen {
    /// The more of each.
    pub(crate) fn add(&mut self, other: Self) {
        self.lives += other.lives;
        self.life_beats = self.life_beats.max(other.life_beats);
        self.rpc_beats = self.rpc_beats.max(other.rpc_beats);
    }
}

/// One after the other, for as long as this lives.
pub(crate) struct Newcomers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

impl Newcomers {
    /// Makes what they need.
    pub(crate) fn prepare(server: &Server) -> Result<()> {
        server.bdev("malloc", NAME)?;
        server.controller(NAME, NAME)?;
        Ok(())
    }

    /// Has the first one come.
    pub(crate) fn start(server: &Server, beats: &Arc<Beats>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, beats) = (stop.clone(), beats.clone());
        let (socket, rpc) = (server.socket(NAME), server.rpc_socket());
        let come = move || come(&socket, &rpc, &beats, &stopped);
        let thread = std::thread::Builder::new().name("newcomers".into()).spawn(come)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits until the last one has gone.
    pub(crate) fn end(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("it is ended once"))?;
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

/// What each VM does.
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
