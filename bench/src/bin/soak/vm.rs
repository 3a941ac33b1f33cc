//! A VM whose disk may hang and whose controller may be deleted.

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
/// Bytes of the dirty log: more than one bit for each page of the memory.
const LOG_BYTES: u64 = 4096;
/// Limit on the time that the server takes to answer a message.
const LIMIT: Duration = Duration::from_secs(30);

/// A front end and its load.
pub(crate) struct Vm {
    front_end: FrontEnd,
    load: Load,
    ram: Arc<GuestRam>,
    /// The dirty log, while it is enabled.
    log: Option<File>,
}

impl Vm {
    /// Connects, and starts a random number of queues with a random load.
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
            // Most loads end before the next operation, so that other threads have the cores.
            limit: Some(rng.u64(10..2000)),
            ..LoadOptions::default()
        };
        let load = Load::start(queues, options)?;
        Ok(Self { front_end, load, ram, log: None })
    }

    /// Closes the connection, as a VM does that is killed.
    pub(crate) fn kill(self) -> Result<()> {
        self.front_end.kill();
        self.load.abandon()?;
        Ok(())
    }

    /// Stops the queues and disconnects, as a VM does that is shut down. All requests must have
    /// completed without errors.
    pub(crate) fn stop(self) -> Result<()> {
        let Self { front_end, load, .. } = self;
        let (summary, _) = load.stop()?;
        if let Some(problem) = summary.first_problem {
            bail!("{} requests of a VM failed; the first: {problem}", summary.errors);
        }
        let lost = summary.outstanding;
        ensure!(lost == 0, "{lost} requests of a VM did not complete");
        front_end.disconnect()?;
        Ok(())
    }

    /// Enables or disables the dirty log, as a migration does.
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

    /// Sends the same memory table again.
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
