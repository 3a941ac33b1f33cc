//! A ring without a reactor: requests taken off it, understood, and given back.
#![expect(unsafe_code, reason = "a ring in memory that is kept mapped beside it")]

use std::hint::black_box;
use std::sync::Arc;

use front_end::GuestRam;
use guest_memory::{GuestMemory, Near, Nearest};
use vhost_blk::config::Disk;
use vhost_blk::request::{Limits, STATUS_OK, parse};
use virtqueue::chain::Chain;
use virtqueue::{AnyRing, PackedChain, PackedRing, Ring, SplitChain, SplitRing};

use super::disks;
use super::guest::{Driver, Form, Kind, map};

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

/// A chain, its head or buffer id, and the places that it has taken.
#[derive(Default)]
struct Taken {
    chain: Chain,
    id: u16,
    span: u16,
}

/// A ring, both sides of it.
pub(crate) struct Rings {
    driver: Driver,
    kind: Kind,
    /// In `memory`.
    ring: AnyRing,
    memory: Arc<GuestMemory>,
    nearest: Nearest,
    limits: Limits,
    chains: Vec<Taken>,
    /// Position in both rings.
    at: u16,
}

impl Rings {
    pub(crate) fn new(kind: Kind, form: Form) -> Self {
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let driver = Driver::new(&ram, 0, form);
        let memory = map(&ram);
        let (size, addrs) = driver.addrs();
        // SAFETY: both are in `Self`, and the ring is used in its methods only.
        let ring = unsafe { AnyRing::new(&memory, size, addrs, form.layout()) }.unwrap();
        let limits = Disk::new(disks::null(), false).limits();
        let chains = (0..ROUND).map(|_| Taken::default()).collect();
        Self {
            driver,
            kind,
            ring,
            memory,
            nearest: Nearest::default(),
            limits,
            chains,
            at: form.base(),
        }
    }

    /// Makes [`ROUND`] requests and does the three steps for them, the one of interest with
    /// `watch`.
    pub(crate) fn round(&mut self, watched: Step, watch: impl FnOnce(&mut dyn FnMut())) {
        self.driver.submit(self.kind, ROUND);
        let mut watch = Some(watch);
        for step in STEPS {
            if step == Step::Push {
                self.chains.iter().for_each(|taken| taken.chain.write_last_byte(STATUS_OK));
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
        // SAFETY: this memory's own, from the time before.
        let mut near = unsafe { self.memory.near(self.nearest) };
        match &self.ring {
            AnyRing::Split(ring) => pop_split(ring, self.at, &mut self.chains, &mut near),
            AnyRing::Packed(ring) => pop_packed(ring, self.at, &mut self.chains, &mut near),
        }
        self.nearest = near.nearest();
    }

    fn parse(&mut self) {
        for taken in &mut self.chains {
            let _ = black_box(parse(&mut taken.chain, &self.limits));
        }
    }

    fn push(&mut self) {
        self.at = match &self.ring {
            AnyRing::Split(ring) => push(ring, self.at, &self.chains),
            AnyRing::Packed(ring) => push(ring, self.at, &self.chains),
        };
    }
}

fn pop_split(ring: &SplitRing, from: u16, chains: &mut [Taken], near: &mut Near<'_>) {
    #[expect(clippy::cast_possible_truncation, reason = "a round fits in the ring")]
    let round = ROUND as u16;
    assert_eq!(ring.pending(from), Ok(round));
    for (taken, at) in chains.iter_mut().zip((0..).map(|n| from.wrapping_add(n))) {
        (taken.id, taken.span) = (ring.head(at), 1);
        taken.chain.collect(near, SplitChain { ring, head: taken.id });
    }
}

fn pop_packed(ring: &PackedRing, from: u16, chains: &mut [Taken], near: &mut Near<'_>) {
    let mut position = from;
    for taken in chains {
        assert_eq!(ring.pending(position), Ok(1));
        let chain = PackedChain { ring, position, room: ring.room(from, position) };
        let walked = taken.chain.collect(near, chain).unwrap();
        (taken.id, taken.span) = (walked.id, walked.span);
        position = ring.advance(position, walked.span);
    }
}

/// Answers with the position after it.
fn push(ring: &impl Ring, from: u16, chains: &[Taken]) -> u16 {
    let mut at = from;
    for taken in chains {
        ring.put_used(from, at, taken.id, 1);
        at = ring.advance(at, taken.span);
    }
    ring.publish_used(from, at);
    at
}
