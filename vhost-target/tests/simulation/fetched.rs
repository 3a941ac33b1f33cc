//! Checks of requests that reach a disk: of which ring, under which memory, and after which I/O.

use super::connection::{Front, KeptView, Pending, Served};
use super::request::{Kind, Progress};
use super::vm::{self, RINGS};
use super::world::World;

impl World {
    /// Checks a request that has reached a disk.
    pub(crate) fn check_fetched(&mut self, id: u64) {
        let (vm, ring) =
            *self.requests.get(&id).unwrap_or_else(|| panic!("request {id} was completed already"));
        // Resubmitted requests are done, even if the connection has ended meanwhile.
        let again = self.request(id).again;
        let ends = |f: &Front| {
            let ring = &f.rings[ring];
            again && f.vm == vm && (ring.served == Served::Yes || ring.kept.is_some())
        };
        let front = self.fronts.iter().rposition(|f| f.serves(vm, ring) || ends(f));
        let front = front.unwrap_or_else(|| panic!("request {id} was fetched from a stopped ring"));
        let stops = self.fronts[front].pending == Some(Pending::Base(ring));
        assert!(!stops || again, "request {id} was fetched after the stop");
        self.check_gate(front, vm, ring);
        let state = &mut self.fronts[front].rings[ring];
        if !again {
            // The ring that was reset fetches no new request.
            (state.drains, state.kept) = (false, None);
        }
        let kept = state.kept.clone();
        let KeptView { memory, writes_through } = kept.unwrap_or_else(|| self.fronts[front].view());
        self.count("I/O fetched");
        let request = self.request(id);
        assert_eq!(request.progress, Progress::Offered, "request {id} was fetched twice");
        request.table = memory.iter().filter_map(vm::table_of).max();
        request.durable = writes_through && matches!(request.kind, Kind::Write | Kind::Zeroes);
        request.progress = Progress::Flying(front);
        let there = request.has_data_in(&memory);
        assert!(there, "request {id} was fetched although its data is not in memory");
    }

    /// A ring is served: no I/O that it had to wait for may be in flight.
    fn check_gate(&self, front: usize, vm: usize, ring: usize) {
        let Front { controller, ref rings, .. } = self.fronts[front];
        let disk = |controller: usize| self.controllers[controller].disk;
        for &before in &rings[ring].behind {
            let of = self.fronts[before].controller;
            let rings = (0..RINGS).filter(|n| self.flies(before, *n));
            for other in rings {
                let same_ring = self.fronts[before].vm == vm && other == ring;
                assert!(
                    of != controller && disk(of) != disk(controller) && !same_ring,
                    "front {front}, ring {ring} was served before ring {other} of front {before}"
                );
            }
        }
    }

    /// Returns whether I/O of a connection's ring is in flight.
    pub(crate) fn flies(&self, front: usize, ring: usize) -> bool {
        let mut known = self.vms[self.fronts[front].vm].outstanding(ring);
        let mut lost = self.lost.values();
        known.any(|r| r.progress.is_flying_for(front))
            || lost.any(|lost| lost.front == front && lost.ring == ring)
    }

    /// Checks the flush after a request, which has reached a disk.
    pub(crate) fn check_flush(&mut self, id: u64) {
        let progress = self.request(id).progress;
        let due = matches!(progress, Progress::Written(_));
        assert!(due, "request {id} was flushed before its write: {progress:?}");
        self.count("writes flushed");
    }

    /// Returns a request that a connection has in flight.
    pub(crate) fn flying_of(&self, front: usize) -> Option<u64> {
        let vm = &self.vms[self.fronts[front].vm];
        let mut all = (0..RINGS).flat_map(|ring| vm.outstanding(ring));
        all.find(|r| r.progress.is_flying_for(front)).map(|r| r.id)
    }
}
