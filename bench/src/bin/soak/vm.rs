//! A VM in small, whose disk may hang and whose controller may go.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bench::{Load, LoadOptions};
use fastrand::Rng;
use front_end::features::{DRIVER_FEATURES, RING_PACKED};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};

const RAM_BYTES: u64 = 8 << 20;
/// More than one bit for each page of that.
const LOG_BYTES: u64 = 4096;
/// How long the server may take to answer a message.
const LIMIT: Duration = Duration::from_secs(30);

/// A front end and its load.
pub(crate) struct Vm {
    front_end: FrontEnd,
    load: Load,
    ram: Arc<GuestRam>,
    /// Where the server logs what it writes.
    log: Option<File>,
}

impl Vm {
    /// Connects, and starts some queues with some load on them.
    pub(crate) fn start(socket: &Path, rng: &mut Rng) -> bench::Result<Self> {
        let ram = GuestRam::new(&[RAM_BYTES])?;
        let packed = if rng.bool() { RING_PACKED } else { 0 };
        let features = DRIVER_FEATURES | packed;
        let inflight = rng.bool();
        let options = Options { features, inflight, limit: LIMIT, ..Options::default() };
        let mut front_end = FrontEnd::connect(socket, ram.clone(), options)?;
        let queues = front_end.start_any(rng.usize(1..=3), QueueOptions::default())?;
        let options = LoadOptions {
            depth: rng.usize(1..=8),
            verify: false,
            seed: rng.u64(..),
            // Most are idle when something happens to them, and leave the cores to others.
            limit: Some(rng.u64(10..2000)),
            ..LoadOptions::default()
        };
        let load = Load::start(queues, options)?;
        Ok(Self { front_end, load, ram, log: None })
    }

    /// Ends as a VM that is killed does.
    pub(crate) fn kill(self) -> Result<()> {
        self.front_end.kill();
        self.load.abandon()?;
        Ok(())
    }

    /// Ends as a VM that is shut down does. Its requests must have come back, without errors.
    pub(crate) fn stop(self) -> Result<()> {
        let Self { front_end, load, .. } = self;
        let (summary, _) = load.stop()?;
        if let Some(problem) = summary.first_problem {
            bail!("a VM has {} errors: {problem}", summary.errors);
        }
        ensure!(summary.outstanding == 0, "{} requests of a VM are lost", summary.outstanding);
        front_end.disconnect()?;
        Ok(())
    }

    /// Begins to migrate, or gives it up.
    pub(crate) fn toggle_log(&mut self) -> Result<()> {
        if self.log.take().is_some() {
            self.front_end.stop_log()?;
        } else {
            let log = memfd(LOG_BYTES)?;
            self.front_end.start_log(&log, LOG_BYTES)?;
            self.log = Some(log);
        }
        Ok(())
    }

    /// Gives the server the same memory again.
    pub(crate) fn repeat_table(&mut self) -> Result<()> {
        Ok(self.front_end.set_memory_table(&self.ram.table())?)
    }
}

/// An anonymous file of `len` bytes.
pub(crate) fn memfd(len: u64) -> Result<File> {
    let fd = rustix::fs::memfd_create("soak", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, len)?;
    Ok(fd.into())
}
