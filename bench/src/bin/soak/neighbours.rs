//! The neighbours: VMs that the operations must not affect. They verify every block that they read.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bench::servers::Server;
use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};

/// Number of neighbours.
pub(crate) const NEIGHBOURS: usize = 2;
/// Queues of a neighbour.
pub(crate) const QUEUES: usize = 2;
/// The pause after each completion. Without it, neighbours use two cores completely, and the
/// kernel's threads for file I/O did not run for up to a minute.
const PAUSE: Duration = Duration::from_micros(100);
/// Requests that each neighbour must complete to prove that it makes progress.
const GOES_ON: u64 = 50;

/// The name of a neighbour's controller, and of its disk.
pub(crate) fn name(n: usize) -> String {
    format!("neighbour.{n}")
}

/// All neighbours.
pub(crate) struct Neighbours {
    vms: Vec<(FrontEnd, Load)>,
}

/// Their measurements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) completed: u64,
    /// The longest request, in heartbeats.
    pub(crate) wait_heartbeats: u64,
}

impl Neighbours {
    /// Starts a neighbour with a verifying load on each of the new disks.
    pub(crate) fn start(server: &Server, seed: u64, heartbeats: &Arc<AtomicU64>) -> Result<Self> {
        let start = |n| -> Result<_> {
            server.bdev("malloc", &name(n))?;
            let socket = server.controller(&name(n), &name(n))?;
            let ram = GuestRam::new(&[16 << 20])?;
            let mut front_end = FrontEnd::connect(&socket, ram, Options::default())?;
            let queues = front_end.start_any(QUEUES, QueueOptions::default())?;
            let (seed, heartbeats) = (seed ^ n as u64, Some(heartbeats.clone()));
            let options =
                LoadOptions { depth: 2, pause: PAUSE, seed, heartbeats, ..LoadOptions::default() };
            Ok((front_end, Load::start(queues, options)?))
        };
        Ok(Self { vms: (0..NEIGHBOURS).map(start).collect::<Result<_>>()? })
    }

    /// Waits until each neighbour has completed [`GOES_ON`] more requests.
    pub(crate) fn go_on(&self) -> Result<()> {
        for (_, load) in &self.vms {
            load.wait_for(GOES_ON)?;
        }
        Ok(())
    }

    /// Ends the neighbours. Returns an error if a request failed or read wrong data.
    pub(crate) fn end(self) -> Result<Seen> {
        let mut seen = Seen::default();
        for (n, (front_end, load)) in self.vms.into_iter().enumerate() {
            let (summary, _) = load.stop()?;
            let (name, errors, mismatches) = (name(n), summary.errors, summary.mismatches);
            if let Some(problem) = summary.first_problem {
                bail!("{name}: {errors} errors, {mismatches} mismatches: {problem}");
            }
            ensure!(summary.outstanding == 0, "{name}: {} requests lost", summary.outstanding);
            seen.completed += summary.completed;
            seen.wait_heartbeats = seen.wait_heartbeats.max(summary.longest_wait_heartbeats);
            front_end.disconnect()?;
        }
        Ok(seen)
    }
}
