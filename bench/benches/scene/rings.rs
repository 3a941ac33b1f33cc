//! A ring without a reactor: requests taken off it, understood, and given back.
#![expect(unsafe_code, reason = "a ring in memory that is kept mapped beside it")]

use std::hint::black_box;
use std::sync::Arc;

use bench::GuestRam;
use vhost_blk::config::Disk;
use vhost_blk::memory::{GuestMemory, Nearest};
use vhost_blk::request::{Chain, Limits, STATUS_OK};
use vhost_blk::ring::{Ring, SplitChain, SplitRing};

use super::disks;
use super::guest::{Driver, Kind, map};

/// Requests in a round; a reactor takes as many in a visit.
pub(crate) const ROUND: u64 = 32;

/// A step of a round.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Takes the heads off the available ring, walks the chains, and finds their memory.
    Pop,
    /// Makes requests of the chains.
    Parse,
    /// Puts the chains into the used ring and publishes it.
    Push,
}

/// The three steps in their order.
const STEPS: [Step; 3] = [Step::Pop, Step::Parse, Step::Push];

/// A ring, both sides of it.
pub(crate) struct Rings {
    driver: Driver,
    kind: Kind,
    /// In `memory`.
    ring: SplitRing,
    memory: Arc<GuestMemory>,
    nearest: Nearest,
    limits: Limits,
    chains: Vec<(u16, Chain)>,
    /// Position in both rings.
    at: u16,
}

impl Rings {
    pub(crate) fn new(kind: Kind, indirect: bool) -> Self {
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let driver = Driver::new(&ram, 0, indirect);
        let memory = map(&ram);
        let (size, addrs) = driver.addrs();
        // SAFETY: both are in `Self`, and the ring is used in its methods only.
        let ring = unsafe { SplitRing::new(&memory, size, addrs, false) }.unwrap();
        let limits = Disk { bdev: disks::null(), read_only: false }.limits();
        let chains = (0..ROUND).map(|_| (0, Chain::default())).collect();
        Self { driver, kind, ring, memory, nearest: Nearest::default(), limits, chains, at: 0 }
    }

    /// Makes [`ROUND`] requests and does the three steps for them, the one of interest with
    /// `watch`.
    pub(crate) fn round(&mut self, watched: Step, watch: impl FnOnce(&mut dyn FnMut())) {
        self.driver.submit(self.kind, ROUND);
        let mut watch = Some(watch);
        for step in STEPS {
            if step == Step::Push {
                self.chains.iter().for_each(|(_, chain)| chain.write_status(STATUS_OK));
            }
            let mut act = || match step {
                Step::Pop => self.pop(),
                Step::Parse => self.parse(),
                Step::Push => self.push(),
            };
            match watch.take_if(|_| step == watched) {
                Some(watch) => watch(&mut act),
                None => act(),
            }
        }
        assert_eq!(self.driver.take_back(), ROUND);
    }

    fn pop(&mut self) {
        assert_eq!(self.ring.pending(self.at), Ok(ROUND as u16));
        let positions = (0..).map(|n| self.at.wrapping_add(n));
        // SAFETY: this memory's own, from the time before.
        let mut near = unsafe { self.memory.near(self.nearest) };
        for ((head, chain), at) in self.chains.iter_mut().zip(positions) {
            *head = self.ring.head(at);
            chain.collect(&mut near, SplitChain { ring: &self.ring, head: *head });
        }
        self.nearest = near.nearest();
    }

    fn parse(&mut self) {
        for (_, chain) in &mut self.chains {
            let _ = black_box(chain.parse(&self.limits));
        }
    }

    fn push(&mut self) {
        let from = self.at;
        for (head, _) in &self.chains {
            self.ring.put_used(from, self.at, *head, 1);
            self.at = self.at.wrapping_add(1);
        }
        self.ring.publish_used(from, self.at);
    }
}
