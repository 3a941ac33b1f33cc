//! A seeded simulation of the target: stepped reactors, front ends, an operator, disks and faults.
//! The seed decides which controllers have a block device, and which have an entropy device.
//!
//! Everything happens in one thread, in an order that the seed determines, except for the freeing
//! of memory and channels, which the target's own threads do. `simulation/disk.rs` (disks) and
//! `simulation/transport.rs` (sockets) list their faults. Front ends also lose their connection,
//! die, send messages before a pending reply, send invalid messages, and reconnect. They switch the
//! dirty log and the write cache while requests are in flight, and set up memory as a whole or in
//! slots. Controllers are deleted by force while I/O hangs, and their machines continue with the
//! same rings on other controllers.
//!
//! `SIM_SEED=n` replays one seed, `SIM_SEEDS=n` runs n seeds, `SIM_FIRST=n` starts at seed n.

#[path = "../../virtqueue/tests/packed_ring/driver.rs"]
mod driver;
mod entropy;

mod simulation {
    pub(crate) mod backend;
    pub(crate) mod connection;
    pub(crate) mod dirty;
    pub(crate) mod disk;
    pub(crate) mod fetched;
    pub(crate) mod front;
    pub(crate) mod message;
    pub(crate) mod operator;
    pub(crate) mod plan;
    pub(crate) mod probe;
    pub(crate) mod request;
    pub(crate) mod rng;
    pub(crate) mod settle;
    pub(crate) mod switch;
    pub(crate) mod trace;
    pub(crate) mod transport;
    pub(crate) mod vm;
    pub(crate) mod world;
}

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use simulation::world::{Counts, World};

const STEPS: usize = 300;
const SEEDS: u64 = 1_800;
/// The number of kinds of events that are counted, all of which the default number of seeds
/// reaches.
const KINDS: usize = 35;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn no_request_is_lost_and_no_resource_is_left() {
    if let Some(seed) = number("SIM_SEED") {
        World::new(seed, true).run(STEPS);
        return;
    }
    let first = number("SIM_FIRST").unwrap_or(0);
    let end = first + number("SIM_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(first);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let counts = thread::scope(|scope| {
        let worker = || {
            let stop_others = OnFailure(&next, end);
            let mut counts = Counts::new();
            loop {
                let seed = stop_others.0.fetch_add(1, Ordering::Relaxed);
                if seed >= end {
                    return counts;
                }
                for (what, n) in World::new(seed, false).run(STEPS) {
                    *counts.entry(what).or_default() += n;
                }
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut sum = Counts::new();
        for worker in workers {
            for (what, n) in worker.join().expect("a simulation failed") {
                *sum.entry(what).or_default() += n;
            }
        }
        sum
    });
    eprintln!("{counts:#?}");
    assert!(end - first < SEEDS || counts.len() >= KINDS, "a kind of event was never reached");
}

/// If a simulation fails, the other threads start no further one.
struct OnFailure<'a>(&'a AtomicU64, u64);

impl Drop for OnFailure<'_> {
    fn drop(&mut self) {
        self.0.fetch_max(self.1, Ordering::Relaxed);
    }
}
