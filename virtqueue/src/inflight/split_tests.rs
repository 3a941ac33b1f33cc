//! Tests of in-flight tracking for split queues.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small areas, and random numbers")]

use std::sync::Arc;

use super::*;
use crate::inflight::tests::{Rng, World, area, corrupt_area, fill, kill_everywhere};
use crate::inflight::{Area, Tracker, crash};

/// A guest with a split ring. Its requests are numbered in the order of the available ring.
struct Guest {
    area: Arc<Area>,
    size: u16,
    /// The used index of the ring when the area was created.
    base: u16,
    /// Heads in the order in which they were made available.
    avail: Vec<u16>,
    /// Number of requests of the whole test.
    total: usize,
    used_ring: Vec<u16>,
    used_idx: u16,
    /// The used index up to which the guest has taken completed requests.
    seen: u16,
    free: Vec<u16>,
    /// The request of each head.
    request: Vec<Option<usize>>,
    done: Vec<bool>,
}

/// The state of a process that serves the guest.
struct Process {
    tracker: Tracker,
    last_avail: u16,
    used: u16,
    inflight: Vec<u16>,
}

impl Guest {
    fn new(area: &Arc<Area>, size: u16, base: u16, total: usize) -> Self {
        fill(area, |_| 0);
        Self {
            area: Arc::clone(area),
            size,
            base,
            avail: vec![],
            total,
            used_ring: vec![0; size.into()],
            used_idx: base,
            seen: base,
            free: (0..size).collect(),
            request: vec![None; size.into()],
            done: vec![false; total],
        }
    }

    fn put(&mut self, process: &mut Process, head: u16) {
        crash::store();
        self.used_ring[usize::from(process.used % self.size)] = head;
        process.tracker.put(head);
        process.used = process.used.wrapping_add(1);
    }

    fn publish(&mut self, process: &mut Process) {
        process.tracker.publishing(process.used);
        crash::store();
        while self.used_idx != process.used {
            let head = self.used_ring[usize::from(self.used_idx % self.size)];
            let request = self.request[usize::from(head)].expect("completed, but not in flight");
            assert!(!std::mem::replace(&mut self.done[request], true), "{request} twice");
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        process.tracker.published(process.used);
    }
}

impl World for Guest {
    type Process = Process;

    fn begin(&mut self) -> Process {
        let (tracker, recovery) = Tracker::split(&self.area, 1, self.size, self.used_idx).unwrap();
        assert_eq!((recovery.damage, recovery.used), (None, self.used_idx));
        let fetched = usize::from(recovery.last_avail.wrapping_sub(self.base));
        let expected: Vec<usize> = (0..fetched).filter(|&n| !self.done[n]).collect();
        let resubmitted =
            recovery.resubmissions.iter().map(|&head| self.request[usize::from(head)].unwrap());
        assert_eq!(resubmitted.collect::<Vec<_>>(), expected);
        assert!((fetched..self.avail.len()).all(|n| !self.done[n]));
        let Recovery { used, last_avail, resubmissions, .. } = recovery;
        Process { tracker, last_avail, used, inflight: resubmissions }
    }

    fn visit(&mut self, process: &mut Process, rng: &mut Rng) {
        for _ in 0..rng.below(4).min(process.inflight.len()) {
            let which = rng.below(process.inflight.len());
            let head = process.inflight.remove(which);
            self.put(process, head);
        }
        for _ in 0..rng.below(5) {
            let position = usize::from(process.last_avail.wrapping_sub(self.base));
            let Some(&head) = self.avail.get(position) else { break };
            process.last_avail = process.last_avail.wrapping_add(1);
            process.tracker.fetched(head);
            if rng.below(4) == 0 {
                self.put(process, head);
            } else {
                process.inflight.push(head);
            }
        }
        if process.used != self.used_idx {
            self.publish(process);
        }
    }

    fn drive(&mut self, rng: &mut Rng) {
        while self.seen != self.used_idx && rng.below(4) > 0 {
            let head = self.used_ring[usize::from(self.seen % self.size)];
            self.request[usize::from(head)] = None;
            self.free.push(head);
            self.seen = self.seen.wrapping_add(1);
        }
        while !self.free.is_empty() && self.avail.len() < self.total && rng.below(4) > 0 {
            let which = rng.below(self.free.len());
            let head = self.free.remove(which);
            self.request[usize::from(head)] = Some(self.avail.len());
            self.avail.push(head);
        }
    }

    fn finished(&self) -> bool {
        self.done.iter().all(|&done| done)
    }
}

#[test]
fn a_process_may_be_killed_at_any_store() {
    for (size, entries) in [(8, 8), (1, 1), (16, 32), (4, 5), (32, 32)] {
        let area = area(2, entries, false);
        kill_everywhere(|rng| {
            let base = 0_u16.wrapping_sub(rng.below(40) as u16);
            Guest::new(&area, size, base, 60)
        });
    }
}

#[test]
fn the_layout_is_that_of_rte_vhost() {
    // offsetof and sizeof of rte_vhost_inflight_info_split and rte_vhost_inflight_desc_split.
    assert_eq!([FEATURES, VERSION_AT, DESC_NUM, LAST_BATCH_HEAD, USED_IDX], [0, 8, 10, 12, 14]);
    assert_eq!([INFLIGHT, NEXT, COUNTER, ENTRY_BYTES, HEAD_BYTES], [0, 6, 8, 16, 16]);
    // get_pervq_shm_size_split
    let part = |size| crate::inflight::region_bytes(size, false);
    assert_eq!([1, 2, 3, 4, 128, 1024].map(part), [64, 64, 64, 128, 2112, 16448]);
}

#[test]
fn an_uninitialised_area_begins_at_the_rings_used_index() {
    let area = area(1, 4, false);
    let (mut tracker, recovery) = Tracker::split(&area, 0, 4, 1000).unwrap();
    assert_eq!(
        recovery,
        Recovery { used: 1000, last_avail: 1000, resubmissions: vec![], damage: None }
    );
    tracker.fetched(0);
    let (_, recovery) = Tracker::split(&area, 0, 4, 1000).unwrap();
    assert_eq!((recovery.last_avail, recovery.resubmissions), (1001, vec![0]));
}

#[test]
fn an_area_initialised_by_rte_vhost_loses_no_request() {
    // Version 1, index 0 no matter what the ring's index is, request 0 in flight.
    let area = area(1, 4, false);
    fill(&area, |word| [0, 1, 1].get(word).copied().unwrap_or(0));
    let (_, recovery) = Tracker::split(&area, 0, 4, 3).unwrap();
    assert_eq!((recovery.last_avail, recovery.resubmissions), (4, vec![0]));
    assert_eq!(recovery.damage, Some(Damage::LastBatch(3)));
    fill(&area, |word| [0, 1, 1].get(word).copied().unwrap_or(0));
    let (_, recovery) = Tracker::split(&area, 0, 4, 1000).unwrap();
    assert_eq!((recovery.last_avail, recovery.resubmissions), (1001, vec![0]));
}

#[test]
fn requests_published_by_rte_vhost_are_not_resubmitted() {
    // rte_vhost has batches of one request: `last_inflight_io` is its head, and `next` is not set.
    let area = area(1, 4, false);
    let (mut tracker, _) = Tracker::split(&area, 0, 4, 65535).unwrap();
    for head in [3, 1, 2] {
        tracker.fetched(head);
    }
    let region = area.region(0, 4, false).unwrap();
    region.store_u16(LAST_BATCH_HEAD, 1);
    let (_, recovery) = Tracker::split(&area, 0, 4, 0).unwrap();
    let expected = Recovery { used: 0, last_avail: 2, resubmissions: vec![3, 2], damage: None };
    assert_eq!(recovery, expected);
}

#[test]
fn damage_is_reported() {
    let area = area(1, 4, false);
    let (mut tracker, _) = Tracker::split(&area, 0, 4, 0).unwrap();
    tracker.fetched(1);
    tracker.fetched(3);
    let (_, recovery) = Tracker::split(&area, 0, 2, 0).unwrap();
    assert_eq!((recovery.resubmissions, recovery.damage), (vec![1], Some(Damage::Outside(3))));
    area.region(0, 4, false).unwrap().store_u16(VERSION_AT, 7);
    let (_, recovery) = Tracker::split(&area, 0, 4, 5).unwrap();
    assert_eq!((recovery.resubmissions, recovery.damage), (vec![], Some(Damage::Version(7))));
    let (_, recovery) = Tracker::split(&area, 0, 4, 5).unwrap();
    assert_eq!(recovery.damage, None);
}

#[test]
fn corrupt_areas_do_no_harm() {
    let area = area(2, 11, false);
    let mut rng = Rng::new(7);
    for _ in 0..10_000 {
        corrupt_area(&area, false, &mut rng);
        let size = 1 + rng.below(11) as u16;
        let used = rng.below(12) as u16;
        let (mut tracker, recovery) = Tracker::split(&area, 1, size, used).unwrap();
        assert!(recovery.resubmissions.iter().all(|&head| head < size));
        assert_eq!(recovery.last_avail, used + recovery.resubmissions.len() as u16);
        corrupt_area(&area, false, &mut rng);
        for _ in 0..40 {
            tracker.fetched(rng.next() as u16 >> rng.below(16));
            tracker.put(rng.next() as u16 >> rng.below(16));
            assert!(!tracker.descs(0, |_| ()));
            assert!(tracker.fetched_packed(std::iter::empty()).is_none());
        }
        tracker.publishing(1);
        tracker.published(1);
    }
}
