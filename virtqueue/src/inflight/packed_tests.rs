//! Tests of in-flight tracking for packed queues.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small areas, and random numbers")]

use std::sync::Arc;

use super::*;
use crate::inflight::tests::{Rng, World, area, corrupt_area, fill, kill_everywhere};
use crate::inflight::{Area, Tracker, crash};

const DESC_F_NEXT: u16 = 1;

/// A request of the guest, in the order in which requests were made available.
#[derive(Clone)]
struct Request {
    id: u16,
    descs: Vec<Desc>,
    /// Number of descriptors made available before its first descriptor.
    at: usize,
    done: bool,
}

/// A guest with a packed ring. A place is the number of descriptors made available before it.
struct Guest {
    area: Arc<Area>,
    size: usize,
    ring: Vec<Desc>,
    requests: Vec<Request>,
    total: usize,
    /// The place of the next chain to make available, and of the next used descriptor.
    avail: usize,
    used: usize,
    free: Vec<u16>,
    /// The request of each buffer id.
    request: Vec<Option<usize>>,
    span_max: usize,
}

/// The state of a process that serves the guest.
struct Process {
    tracker: Tracker,
    last_avail: usize,
    used: usize,
    published: usize,
    /// Entries with their buffer ids and lengths.
    inflight: Vec<(u16, u16, usize)>,
}

impl Guest {
    fn new(area: &Arc<Area>, size: usize, begin: usize, total: usize, span_max: usize) -> Self {
        fill(area, |_| 0);
        let none = Desc { addr: 0, len: 0, flags: 0, tag: 0 };
        let mut guest = Self {
            area: Arc::clone(area),
            size,
            ring: vec![none; size],
            requests: vec![],
            total,
            avail: begin,
            used: begin,
            free: (0..size as u16).collect(),
            request: vec![None; size],
            span_max,
        };
        // The used descriptors of earlier rounds.
        for at in begin.saturating_sub(size)..begin {
            guest.ring[at % size].flags = guest.flags(at, true);
        }
        guest
    }

    /// The position of a place.
    fn position(&self, at: usize) -> u16 {
        (at % self.size) as u16 | if (at / self.size).is_multiple_of(2) { WRAP } else { 0 }
    }

    /// The ownership flags of an available or a used descriptor at a place.
    fn flags(&self, at: usize, used: bool) -> u16 {
        let wrap = self.position(at) & WRAP != 0;
        let flag = |on, flag| if on { flag } else { 0 };
        flag(wrap, DESC_F_AVAIL) | flag(wrap == used, DESC_F_USED)
    }

    /// The guest takes completed requests.
    fn observe(&mut self) {
        const BITS: u16 = DESC_F_AVAIL | DESC_F_USED;
        loop {
            let desc = self.ring[self.used % self.size];
            if self.used == self.avail || desc.flags & BITS != self.flags(self.used, true) {
                return;
            }
            let request = self.request[usize::from(desc.tag)].take();
            let request = &mut self.requests[request.expect("completed, but not in flight")];
            assert!(!std::mem::replace(&mut request.done, true));
            self.used += request.descs.len();
            self.free.push(desc.tag);
        }
    }

    fn put(&mut self, process: &mut Process, (entry, id, span): (u16, u16, usize)) {
        let at = process.used;
        crash::store();
        self.ring[at % self.size].tag = id;
        if at != process.published {
            crash::store();
            self.ring[at % self.size].flags = self.flags(at, true);
        }
        process.tracker.put(entry);
        process.used += span;
    }

    fn publish(&mut self, process: &mut Process) {
        let used = self.position(process.used);
        process.tracker.publishing(used);
        crash::store();
        self.ring[process.published % self.size].flags = self.flags(process.published, true);
        process.tracker.published(used);
        process.published = process.used;
    }

    fn take_back(&mut self, from: usize, to: usize) {
        for at in from..to {
            let flags = self.flags(at, false);
            if self.ring[at % self.size].flags != flags {
                crash::store();
                self.ring[at % self.size].flags = flags;
            }
        }
    }
}

impl World for Guest {
    type Process = Process;

    fn begin(&mut self) -> Process {
        self.observe();
        let base = self.position(self.requests.first().map_or(self.avail, |request| request.at));
        let flags = |at: u16| self.ring[usize::from(at & !WRAP)].flags;
        let (tracker, recovery) =
            Tracker::packed(&self.area, 1, self.size as u16, base, flags).unwrap();
        assert_eq!((recovery.damage, recovery.used), (None, self.position(self.used)));
        let mut last_avail = self.used;
        let (mut inflight, mut resubmitted) = (vec![], vec![]);
        for &entry in &recovery.resubmissions {
            let mut descs = vec![];
            assert!(tracker.descs(entry, |desc| descs.push(desc)));
            let id = descs[0].tag;
            let request = self.request[usize::from(id)].expect("in flight");
            assert_eq!(descs, self.requests[request].descs);
            last_avail += descs.len();
            resubmitted.push(request);
            inflight.push((entry, id, descs.len()));
        }
        assert_eq!(recovery.last_avail, self.position(last_avail));
        let open = |fetched: bool| {
            let requests = self.requests.iter().enumerate();
            requests
                .filter(move |(_, request)| !request.done && (request.at < last_avail) == fetched)
        };
        assert_eq!(resubmitted, open(true).map(|(n, _)| n).collect::<Vec<_>>());
        let ahead: usize = open(false).map(|(_, request)| request.descs.len()).sum();
        assert_eq!(last_avail + ahead, self.avail, "a request is lost");
        self.take_back(self.used, last_avail);
        let used = self.used;
        Process { tracker, last_avail, used, published: used, inflight }
    }

    fn visit(&mut self, process: &mut Process, rng: &mut Rng) {
        for _ in 0..rng.below(4).min(process.inflight.len()) {
            let which = rng.below(process.inflight.len());
            let request = process.inflight.remove(which);
            self.put(process, request);
        }
        for _ in 0..rng.below(5) {
            let at = process.last_avail;
            if !is_available(self.ring[at % self.size].flags, self.position(at)) {
                break;
            }
            let mut descs = vec![];
            loop {
                let desc = self.ring[(at + descs.len()) % self.size];
                descs.push(desc);
                if desc.flags & DESC_F_NEXT == 0 {
                    break;
                }
            }
            process.last_avail += descs.len();
            let entry = process.tracker.fetched_packed(descs.iter().copied()).unwrap();
            let request = (entry, descs[0].tag, descs.len());
            if rng.below(4) == 0 {
                self.put(process, request);
            } else {
                process.inflight.push(request);
            }
        }
        if process.used != process.published {
            self.publish(process);
        }
    }

    fn drive(&mut self, rng: &mut Rng) {
        self.observe();
        while self.requests.len() < self.total && rng.below(4) > 0 {
            let span = 1 + rng.below(self.span_max);
            if self.avail + span > self.used + self.size {
                break;
            }
            let which = rng.below(self.free.len());
            let id = self.free.remove(which);
            let at = self.avail;
            let (mut descs, size) = (vec![], self.size);
            for n in 0..span {
                let next = if n + 1 < span { DESC_F_NEXT } else { 0 };
                let flags = self.flags(at + n, false) | next;
                let desc = Desc { addr: rng.next(), len: rng.next() as u32, flags, tag: id };
                self.ring[(at + n) % size] = desc;
                descs.push(desc);
            }
            self.avail += span;
            self.request[usize::from(id)] = Some(self.requests.len());
            self.requests.push(Request { id, descs, at, done: false });
            assert_eq!(self.requests[self.request[usize::from(id)].unwrap()].id, id);
        }
    }

    fn finished(&self) -> bool {
        self.requests.len() == self.total && self.requests.iter().all(|request| request.done)
    }
}

#[test]
fn a_process_may_be_killed_at_any_store() {
    for (size, entries, span_max) in
        [(8, 8, 1), (7, 7, 3), (1, 1, 1), (5, 5, 5), (13, 32, 4), (2, 2, 2)]
    {
        let area = area(2, entries, true);
        kill_everywhere(|rng| {
            let begin = rng.below(2 * size);
            Guest::new(&area, size, begin, 40, span_max)
        });
    }
}

#[test]
fn the_layout_is_that_of_rte_vhost() {
    // offsetof and sizeof of rte_vhost_inflight_info_packed and rte_vhost_inflight_desc_packed.
    assert_eq!([FEATURES, VERSION_AT, DESC_NUM, HEAD_BYTES], [0, 8, 10, 32]);
    let area = area(1, 4, true);
    fill(&area, |_| 0);
    let region = area.region(0, 4, true).unwrap();
    region.store_u32(FREE_HEADS, heads(0x1234, 0x5678));
    assert_eq!((region.load_u16(12), region.load_u16(14)), (0x1234, 0x5678));
    region.store_u64(POSITIONS, positions(0x8001, 0x0002));
    assert_eq!((region.load_u16(16), region.load_u16(18)), (1, 2));
    assert_eq!((region.load_u8(20), region.load_u8(21)), (1, 0));
    assert_eq!(from_positions(region.load_u64(POSITIONS)), (0x8001, 0x0002));

    assert_eq!([INFLIGHT, NEXT, LAST, NUM, COUNTER, ID, ADDR], [0, 2, 4, 6, 8, 16, 24]);
    assert_eq!(ENTRY_BYTES, 32);
    let (mut tracker, _) = Tracker::packed(&area, 0, 4, WRAP, |_| 0).unwrap();
    let desc = |tag| Desc { addr: 0x1122_3344_5566_7788, len: 0x99aa_bbcc, flags: 0xddee, tag };
    assert_eq!(tracker.fetched_packed([desc(5), desc(6)].into_iter()), Some(0));
    let entry = |n: usize| 32 + 32 * n;
    let head = [0, 2, 4, 6].map(|field| region.load_u16(entry(0) + field));
    assert_eq!(head.map(u16::to_ne_bytes)[0], [1, 0]);
    assert_eq!(head[1..], [1, 1, 2]);
    for n in [0, 1] {
        assert_eq!(region.load_u16(entry(n) + 16), 5 + n as u16);
        assert_eq!(region.load_u16(entry(n) + 18), 0xddee);
        assert_eq!(region.load_u32(entry(n) + 20), 0x99aa_bbcc);
        assert_eq!(region.load_u64(entry(n) + 24), 0x1122_3344_5566_7788);
    }
    // get_pervq_shm_size_packed
    let part = |size| crate::inflight::region_bytes(size, true);
    assert_eq!([1, 2, 3, 128, 1024].map(part), [64, 128, 128, 4160, 32832]);
}

#[test]
fn an_uninitialised_area_begins_at_the_front_ends_position() {
    let area = area(1, 5, true);
    let (mut tracker, recovery) = Tracker::packed(&area, 0, 5, 3, |_| 0).unwrap();
    assert_eq!(recovery, Recovery { used: 3, last_avail: 3, resubmissions: vec![], damage: None });
    let desc = Desc { addr: 0, len: 1, flags: 0, tag: 0 };
    assert_eq!(tracker.fetched_packed([desc; 3].into_iter()), Some(0));
    // From then on, the position comes from the area.
    let (_, recovery) = Tracker::packed(&area, 0, 5, 0, |_| 0).unwrap();
    let expected = Recovery { used: 3, last_avail: 1 | WRAP, resubmissions: vec![0], damage: None };
    assert_eq!(recovery, expected);
}

#[test]
fn a_fetch_beyond_the_number_of_entries_fails() {
    let area = area(1, 4, true);
    let (mut tracker, _) = Tracker::packed(&area, 0, 4, WRAP, |_| 0).unwrap();
    let desc = Desc { addr: 0, len: 1, flags: 0, tag: 0 };
    assert_eq!(tracker.fetched_packed(std::iter::empty()), None);
    assert_eq!(tracker.fetched_packed([desc; 3].into_iter()), Some(0));
    assert_eq!(tracker.fetched_packed([desc; 2].into_iter()), None);
    assert_eq!(tracker.fetched_packed([desc; 1].into_iter()), Some(3));
    assert_eq!(tracker.fetched_packed([desc; 1].into_iter()), None);
}

#[test]
fn damage_is_reported() {
    let area = area(1, 4, true);
    let region = area.region(0, 4, true).unwrap();
    let desc = Desc { addr: 0, len: 1, flags: 0, tag: 0 };
    let again = |corrupt: &dyn Fn()| {
        let (mut tracker, recovery) = Tracker::packed(&area, 0, 4, WRAP, |_| 0).unwrap();
        assert_eq!(recovery.damage, None);
        tracker.fetched_packed([desc; 2].into_iter()).unwrap();
        corrupt();
        let (_, recovery) = Tracker::packed(&area, 0, 4, WRAP, |_| 0).unwrap();
        assert_eq!((recovery.used, recovery.last_avail), (WRAP, WRAP));
        assert!(recovery.resubmissions.is_empty());
        recovery.damage
    };
    assert_eq!(again(&|| region.store_u16(VERSION_AT, 2)), Some(Damage::Version(2)));
    assert_eq!(again(&|| region.store_u16(POSITIONS, 4)), Some(Damage::Position(4 | WRAP)));
    for num in [0, 5] {
        assert_eq!(again(&|| region.store_u16(at(0, NUM), num)), Some(Damage::Chain(0)));
    }
    for next in [0, 4] {
        assert_eq!(again(&|| region.store_u16(at(0, NEXT), next)), Some(Damage::Chain(0)));
    }
}

#[test]
fn corrupt_areas_do_no_harm() {
    let area = area(2, 11, true);
    let mut rng = Rng::new(8);
    for _ in 0..10_000 {
        corrupt_area(&area, true, &mut rng);
        let size = 1 + rng.below(11) as u16;
        let flags = rng.next() as u16;
        let base = rng.below(size.into()) as u16;
        let (mut tracker, recovery) = Tracker::packed(&area, 1, size, base, |_| flags).unwrap();
        for position in [recovery.used, recovery.last_avail] {
            assert!(position & !WRAP < size);
        }
        let mut descriptors = 0;
        for &entry in &recovery.resubmissions {
            assert!(tracker.descs(entry, |_| descriptors += 1));
        }
        assert!(descriptors <= size);
        let desc = Desc { addr: 1, len: 2, flags: 3, tag: 4 };
        for _ in 0..3 {
            corrupt_area(&area, true, &mut rng);
            for _ in 0..20 {
                let descs = std::iter::repeat_n(desc, rng.below(30));
                if let Some(entry) = tracker.fetched_packed(descs) {
                    tracker.put(entry);
                }
                let entry = rng.next() as u16 >> rng.below(16);
                tracker.put(entry);
                let mut steps = 0;
                let _ = tracker.descs(entry, |_| steps += 1);
                assert!(steps <= 11);
                tracker.fetched(entry);
            }
            tracker.publishing(rng.next() as u16);
            corrupt_area(&area, true, &mut rng);
            tracker.published(rng.next() as u16);
        }
    }
}
