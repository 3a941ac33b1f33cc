//! The VMs that must notice nothing: each checks every block that it reads.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bench::servers::Server;
use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};

/// How many there are.
pub(crate) const NEIGHBOURS: usize = 2;
/// Queues of each.
pub(crate) const QUEUES: usize = 2;
/// Theirs after each completion. Without one they take all there is of two cores, and the kernel's own
/// threads, to which a file's I/O is left, have been seen to wait for a minute then.
const PAUSE: Duration = Duration::from_micros(100);
/// What each has to complete to count as going on.
const GOES_ON: u64 = 50;

/// The name of a neighbour's controller, and of its disk.
pub(crate) fn name(n: usize) -> String {
    format!("neighbour.{n}")
}

/// All of them.
pub(crate) struct Neighbours {
    vms: Vec<(FrontEnd, Load)>,
}

/// What they have seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) completed: u64,
    /// The longest that a request took, in beats.
    pub(crate) wait_beats: u64,
}

impl Neighbours {
    /// Starts a verifying load on a new disk for each.
    pub(crate) fn start(server: &Server, seed: u64, beats: &Arc<AtomicU64>) -> Result<Self> {
        let start = |n| -> Result<_> {
            server.bdev("malloc", &name(n))?;
            let socket = server.controller(&name(n), &name(n))?;
            let ram = GuestRam::new(&[16 << 20])?;
            let mut front_end = FrontEnd::connect(&socket, ram, Options::default())?;
            let queues = front_end.start_any(QUEUES, QueueOptions::default())?;
            let (seed, beats) = (seed ^ n as u64, Some(beats.clone()));
            let options =
                LoadOptions { depth: 2, pause: PAUSE, seed, beats, ..LoadOptions::default() };
            Ok((front_end, Load::start(queues, options)?))
        };
        Ok(Self { vms: (0..NEIGHBOURS).map(start).collect::<Result<_>>()? })
    }

    /// Waits until each has completed some more.
    pub(crate) fn go_on(&self) -> Result<()> {
        for (_, load) in &self.vms {
            load.wait_for(GOES_ON)?;
        }
        Ok(())
    }

    /// Ends them. An error if one of them has noticed something.
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
            seen.wait_beats = seen.wait_beats.max(summary.longest_wait_beats);
            front_end.disconnect()?;
        }
        Ok(seen)
    }
}
