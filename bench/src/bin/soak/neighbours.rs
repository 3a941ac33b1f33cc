//! The VMs that must notice nothing: each checks every block that it reads.

use std::time::Duration;

use anyhow::{Result, ensure};
use bench::servers::Server;
use bench::{FrontEnd, GuestRam, Load, LoadOptions, Options, QueueOptions};

/// How many there are.
pub(crate) const NEIGHBOURS: usize = 2;
/// Queues of each.
pub(crate) const QUEUES: usize = 2;
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
    pub(crate) longest_gap: Duration,
}

impl Neighbours {
    /// Starts a verifying load on a new disk for each.
    pub(crate) fn start(server: &Server, seed: u64) -> Result<Self> {
        let start = |n| -> Result<_> {
            server.bdev("malloc", &name(n))?;
            let socket = server.controller(&name(n), &name(n))?;
            let ram = GuestRam::new(&[16 << 20])?;
            let mut front_end = FrontEnd::connect(&socket, ram, Options::default())?;
            let queues = front_end.start_any(QUEUES, QueueOptions::default())?;
            let options = LoadOptions { depth: 2, seed: seed ^ n as u64, ..LoadOptions::default() };
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
    pub(crate) fn end(self, gap_max: Duration) -> Result<Seen> {
        let mut seen = Seen::default();
        for (n, (front_end, load)) in self.vms.into_iter().enumerate() {
            let (summary, _) = load.stop()?;
            let name = name(n);
            if let Some(problem) = summary.first_problem {
                anyhow::bail!(
                    "{name}: {} errors, {} mismatches: {problem}",
                    summary.errors,
                    summary.mismatches
                );
            }
            ensure!(summary.outstanding == 0, "{name}: {} requests lost", summary.outstanding);
            let gap = summary.longest_gap;
            ensure!(gap <= gap_max, "{name}: nothing completed for {gap:?}, bound {gap_max:?}");
            seen.completed += summary.completed;
            seen.longest_gap = seen.longest_gap.max(gap);
            front_end.disconnect()?;
        }
        Ok(seen)
    }
}
