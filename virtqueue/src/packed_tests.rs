//! Tests of packed rings: what a guest may write there, and how the device handles it.
#![expect(clippy::cast_possible_truncation, reason = "positions of small rings")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::inflight::Area;
use closer::ForeignFd;
use guest_memory::testing::{flat, memfd};
use guest_memory::{Nearest, Unmapper};
use vm_memory::{ByteValued, VolatileMemory};

const SIZE: u16 = 5;
const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x5000;
const DEVICE: u64 = 0x6000;
const TABLE: u64 = 0x7000;
const ADDRS: RingAddrs = RingAddrs { desc: DESC, avail: DRIVER, used: DEVICE };
/// Flags of an available descriptor in a round whose wrap counter is 1.
const AVAIL: u16 = DESC_F_AVAIL;

/// A ring, and the guest's access to it.
struct Guest {
    memory: std::sync::Arc<GuestMemory>,
    ring: PackedRing,
}

impl Guest {
    fn new(event_idx: bool) -> Self {
        Self::of_size(SIZE, event_idx)
    }

    fn of_size(size: u16, event_idx: bool) -> Self {
        Self::at(0x10000, size, ADDRS, event_idx)
    }

    /// A guest with the largest ring, from address 0 on.
    fn large() -> Self {
        let addrs = RingAddrs { desc: 0, avail: 0x8_0000, used: 0x8_1000 };
        Self::at(0x10_0000, RING_SIZE_MAX, addrs, false)
    }

    fn at(bytes: u64, size: u16, addrs: RingAddrs, event_idx: bool) -> Self {
        let memory = flat(bytes);
        // SAFETY: `Self` keeps the memory with the ring.
        let ring = unsafe { PackedRing::new(&memory, size, addrs, event_idx) }.unwrap();
        Self { memory, ring }
    }

    fn put<T: ByteValued>(&self, gpa: u64, value: T) {
        let slice = self.memory.slice(gpa, size_of::<T>()).unwrap();
        slice.get_ref::<T>(0).unwrap().store(value);
    }

    fn get<T: ByteValued>(&self, gpa: u64) -> T {
        self.memory.slice(gpa, size_of::<T>()).unwrap().get_ref::<T>(0).unwrap().load()
    }

    fn desc(&self, table: u64, index: u64, addr: u64, len: u32, id: u16, flags: u16) {
        let at = table + 16 * index;
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, id);
        self.put(at + 14, flags);
    }

    fn flags(&self, index: u16) -> u16 {
        self.get(DESC + 16 * u64::from(index) + 14)
    }

    /// The used descriptor that the driver sees at `position`: its buffer id and length.
    fn seen(&self, position: u16) -> Option<(u16, u32)> {
        let at = DESC + 16 * u64::from(position & !WRAP);
        let flags: u16 = self.get(at + 14);
        let wrap = position & WRAP != 0;
        let used = (flags & DESC_F_AVAIL != 0) == wrap && (flags & DESC_F_USED != 0) == wrap;
        used.then(|| {
            let len = self.get::<u32>(at + 8);
            assert_eq!(flags & DESC_F_WRITE != 0, len > 0, "WRITE is set if the length is valid");
            (self.get(at + 12), len)
        })
    }

    fn walk(&self, position: u16) -> (Vec<Buffer>, Result<Taken, RingError>) {
        self.walk_in(position, self.ring.size())
    }

    fn walk_in(&self, position: u16, room: u16) -> (Vec<Buffer>, Result<Taken, RingError>) {
        let mut buffers = vec![];
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { self.memory.near(Nearest::default()) };
        let result = self.ring.walk(&mut near, position, room, |_, buffer| {
            buffers.push(buffer);
            true
        });
        (buffers, result)
    }

    fn events(&self, position: u16, flags: u16) {
        self.put(DRIVER, position);
        self.put(DRIVER + 2, flags);
    }
}

fn as_tuples(buffers: &[Buffer]) -> Vec<(u64, u32, bool)> {
    buffers.iter().map(|b| (b.gpa, b.len, b.write)).collect()
}

/// The position `n` descriptors after the first one, computed by division.
fn nth(n: u32, size: u16) -> u16 {
    let size = u32::from(size);
    (n % size) as u16 | if (n / size).is_multiple_of(2) { WRAP } else { 0 }
}

#[test]
fn positions_wrap() {
    for size in [1, 2, 3, 5, 300, RING_SIZE_MAX] {
        let (desc, driver, device) = (std::ptr::null(), std::ptr::null(), std::ptr::null());
        let ring = PackedRing { size, event_idx: false, desc, driver, device, addrs: ADDRS };
        let rounds = u32::from(size) * 2;
        for n in (0..rounds).step_by(1 + usize::from(size) / 100) {
            assert!(ring.valid(nth(n, size)));
            for by in (0..=size).step_by(1 + usize::from(size) / 100) {
                let to = ring.advance(nth(n, size), by);
                assert_eq!(to, nth(n + u32::from(by), size), "{n} + {by} of {size}");
                assert_eq!(ring.distance(nth(n, size), to), u32::from(by));
            }
        }
        assert_eq!(ring.valid(size & !WRAP), size == RING_SIZE_MAX);
    }
}

#[test]
fn a_descriptor_is_available_only_with_its_wrap_counter() {
    let guest = Guest::new(false);
    for (position, available) in [(2 | WRAP, DESC_F_AVAIL), (2, DESC_F_USED)] {
        for state in [0, DESC_F_AVAIL, DESC_F_USED, DESC_F_STATE] {
            let flags = state | DESC_F_WRITE;
            guest.desc(DESC, 2, 0x8000, 1, 0, flags);
            let due = state == available;
            assert_eq!(guest.ring.pending(position), Ok(due.into()));
            let hint = guest.ring.hint(position);
            assert_eq!((hint.due, hint.seen), (due, flags.to_le()));
            // SAFETY: a cell in the ring's memory, which `guest` keeps.
            let cell = unsafe { &*hint.cell };
            guest.desc(DESC, 2, 0, 0, 0, !flags);
            assert_eq!(
                cell.load(Ordering::Relaxed),
                !hint.seen,
                "any change of the flags changes the cell"
            );
        }
    }
}

#[test]
fn a_chain_is_walked_in_order_and_past_the_end_of_the_ring() {
    let guest = Guest::new(false);
    guest.desc(DESC, 3, 0x8000, 16, 77, AVAIL | DESC_F_NEXT);
    guest.desc(DESC, 4, 0x9000, 512, 99, AVAIL | DESC_F_NEXT | DESC_F_WRITE);
    guest.desc(DESC, 0, 0xa000, 1, 4, DESC_F_USED | DESC_F_WRITE);
    let (buffers, result) = guest.walk(3 | WRAP);
    assert_eq!(result, Ok(Taken { id: 4, span: 3, defect: None }));
    let seen = [(0x8000, 16, false), (0x9000, 512, true), (0xa000, 1, true)];
    assert_eq!(as_tuples(&buffers), seen);
    assert_eq!(guest.ring.advance(3 | WRAP, 3), 1);
    let desc = Desc { addr: 0xa000, len: 1, flags: DESC_F_USED | DESC_F_WRITE, tag: 4 };
    assert_eq!(guest.ring.desc(0), desc);
}

#[test]
fn an_indirect_table_is_read_in_order() {
    let guest = Guest::new(false);
    for table in [TABLE, TABLE + 3] {
        // In a table, ids and all flags but WRITE are ignored.
        guest.desc(table, 0, 0x8000, 16, 9, DESC_F_INDIRECT);
        guest.desc(table, 1, 0x9000, 512, u16::MAX, DESC_F_WRITE | DESC_F_NEXT);
        guest.desc(table, 2, 0xa000, 1, 0, !DESC_F_NEXT);
        let desc = Desc { addr: table, len: 48, flags: AVAIL | DESC_F_INDIRECT, tag: 3 };
        guest.desc(DESC, 1, desc.addr, desc.len, desc.tag, desc.flags);
        let (buffers, result) = guest.walk(1 | WRAP);
        assert_eq!(result, Ok(Taken { id: 3, span: 1, defect: None }));
        let seen = [(0x8000, 16, false), (0x9000, 512, true), (0xa000, 1, true)];
        assert_eq!(as_tuples(&buffers), seen);

        let mut again = vec![];
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { guest.memory.near(Nearest::default()) };
        let result = guest.ring.walk_kept(&mut near, desc, |_, buffer| {
            again.push(buffer);
            true
        });
        assert_eq!((result, again), (Ok(()), buffers));
    }
}

#[test]
fn a_chain_without_an_end_makes_the_ring_unusable() {
    for size in [1, SIZE] {
        let guest = Guest::of_size(size, false);
        for index in 0..size.into() {
            guest.desc(DESC, index, 0x8000, 16, 0, AVAIL | DESC_F_NEXT);
        }
        let (buffers, result) = guest.walk(WRAP);
        assert_eq!(buffers.len(), usize::from(size));
        assert_eq!(result, Err(RingError::Chain(WRAP)));
        // A chain of all the ring's descriptors is valid if the last one ends it.
        let last = u64::from(size) - 1;
        guest.desc(DESC, last, 0x8000, 16, size - 1, AVAIL);
        assert_eq!(guest.walk(WRAP).1, Ok(Taken { id: size - 1, span: size, defect: None }));
    }
}

/// Descriptors in flight cannot be available at the same time.
#[test]
fn a_chain_has_at_most_as_many_descriptors_as_the_driver_owns() {
    let guest = Guest::new(false);
    assert_eq!(guest.ring.room(3 | WRAP, 3 | WRAP), SIZE);
    assert_eq!(guest.ring.room(3 | WRAP, 0), SIZE - 2);
    assert_eq!(guest.ring.room(3 | WRAP, 3), 0);
    assert_eq!(guest.ring.room(3 | WRAP, 4), 0, "out of range");
    for index in 0..3 {
        guest.desc(DESC, index, 0x8000, 16, 1, AVAIL | if index < 2 { DESC_F_NEXT } else { 0 });
    }
    assert_eq!(guest.walk_in(WRAP, 3).1, Ok(Taken { id: 1, span: 3, defect: None }));
    for room in 0..3 {
        let (buffers, result) = guest.walk_in(WRAP, room);
        assert_eq!((buffers.len(), result), (room.into(), Err(RingError::Chain(WRAP))));
    }
}

#[test]
fn the_length_of_a_chain_is_limited_in_the_largest_ring() {
    let guest = Guest::large();
    for n in 0..CHAIN_MAX {
        let next = if n + 1 < CHAIN_MAX { DESC_F_NEXT } else { 0 };
        guest.desc(0, n.into(), 0, 16, 7, AVAIL | next);
    }
    let (buffers, result) = guest.walk(WRAP);
    let taken = Taken { id: 7, span: CHAIN_MAX, defect: None };
    assert_eq!((buffers.len(), result), (CHAIN_MAX.into(), Ok(taken)));
    guest.desc(0, u64::from(CHAIN_MAX) - 1, 0, 16, 7, AVAIL | DESC_F_NEXT);
    guest.desc(0, CHAIN_MAX.into(), 0, 16, 7, AVAIL);
    let (buffers, result) = guest.walk(WRAP);
    assert_eq!((buffers.len(), result), (CHAIN_MAX.into(), Err(RingError::Chain(WRAP))));
    // The search for the end of a malformed chain has the same limit.
    guest.desc(0, 1, 0, 0, 7, AVAIL | DESC_F_NEXT);
    assert_eq!(guest.walk(WRAP).1, Err(RingError::Chain(WRAP)));
}

#[test]
fn a_walk_ends_when_the_visitor_stops_it() {
    let guest = Guest::new(false);
    guest.desc(DESC, 0, 0x8000, 16, 1, AVAIL | DESC_F_NEXT);
    guest.desc(DESC, 1, 0x8000, 16, 1, AVAIL);
    // SAFETY: the default is valid for every memory.
    let mut near = unsafe { guest.memory.near(Nearest::default()) };
    let mut seen = 0;
    let result = guest.ring.walk(&mut near, WRAP, SIZE, |_, _| {
        seen += 1;
        false
    });
    assert_eq!((result.unwrap().defect, seen), (Some(ChainError::Stopped), 1));
}

#[test]
fn an_invalid_buffer_id_makes_the_ring_unusable() {
    let guest = Guest::new(false);
    for id in [SIZE, SIZE | WRAP, u16::MAX] {
        guest.desc(DESC, 0, 0x8000, 16, 0, AVAIL | DESC_F_NEXT);
        guest.desc(DESC, 1, 0x8000, 16, id, AVAIL);
        assert_eq!(guest.walk(WRAP).1, Err(RingError::Chain(WRAP)));
    }
}

#[test]
fn the_end_and_the_id_of_a_malformed_chain_are_found() {
    let guest = Guest::new(false);
    let defect = |addr: u64, len: u32, flags: u16| {
        guest.desc(DESC, 0, 0x8000, 16, 77, AVAIL | DESC_F_NEXT);
        guest.desc(DESC, 1, addr, len, 77, AVAIL | DESC_F_NEXT | flags);
        guest.desc(DESC, 2, 0x9000, 0, 1, AVAIL);
        let (buffers, result) = guest.walk(WRAP);
        assert_eq!(as_tuples(&buffers), [(0x8000, 16, false)]);
        let taken = result.unwrap();
        assert_eq!((taken.id, taken.span), (1, 3));
        taken.defect
    };
    assert_eq!(defect(TABLE, 16, DESC_F_INDIRECT), Some(ChainError::NestedIndirect));
    let defect = |addr: u64, len: u32| {
        guest.desc(DESC, 0, addr, len, 1, AVAIL | DESC_F_INDIRECT);
        let (buffers, result) = guest.walk(WRAP);
        let taken = result.unwrap();
        assert_eq!((taken.id, taken.span), (1, 1));
        (buffers.len(), taken.defect)
    };
    for len in [0, 15, 17, 16 * (crate::desc::INDIRECT_MAX + 1)] {
        assert_eq!(defect(TABLE, len), (0, Some(ChainError::IndirectLength)));
    }
    assert_eq!(defect(0xfff8, 16), (0, Some(ChainError::Address)));
    assert_eq!(defect(u64::MAX - 7, 16), (0, Some(ChainError::Address)));
}

/// Completes chains of two descriptors in batches, through many rounds. The driver sees a batch
/// when it is published, and not before.
#[test]
fn the_driver_sees_a_batch_after_publication() {
    let guest = Guest::new(false);
    let mut at = 0;
    for round in 0..100_u32 {
        let from = nth(at, SIZE);
        // The driver has made the whole ring available.
        for n in at..at + u32::from(SIZE) {
            let position = nth(n, SIZE);
            let flags = available(position) | DESC_F_INDIRECT;
            guest.desc(DESC, (position & !WRAP).into(), 0x8000, 16, 0, flags);
        }
        let second = nth(at + 2, SIZE);
        guest.ring.put_used(from, from, 3, round % 2);
        guest.ring.put_used(from, second, 1, 513);
        assert_eq!(guest.seen(from), None);
        assert_eq!(guest.ring.pending(from), Ok(1), "unchanged for the driver");
        guest.ring.publish_used(from, nth(at + 4, SIZE));
        assert_eq!(guest.seen(from), Some((3, round % 2)));
        assert_eq!(guest.seen(second), Some((1, 513)));
        assert_eq!(guest.seen(nth(at + 1, SIZE)), None);
        let first: u16 = from & !WRAP;
        assert_eq!(
            guest.get::<u64>(DESC + 16 * u64::from(first)),
            0x8000,
            "the address is unchanged"
        );
        at += 4;
    }
}

#[test]
fn calls_are_made_when_the_driver_wants_them() {
    for event_idx in [false, true] {
        let guest = Guest::new(event_idx);
        assert!(guest.ring.wants_call(WRAP, 1 | WRAP));
        guest.events(WRAP, EVENTS_DISABLE);
        assert!(!guest.ring.wants_call(WRAP, 1 | WRAP));
        guest.events(WRAP, EVENTS_DISABLE | 0xfffc);
        assert!(!guest.ring.wants_call(WRAP, 1 | WRAP), "reserved bits are ignored");
        guest.events(3 | WRAP, EVENTS_DESC);
        assert_eq!(guest.ring.wants_call(WRAP, 1 | WRAP), !event_idx);
        guest.events(3 | WRAP, 3);
        assert!(guest.ring.wants_call(WRAP, 1 | WRAP));
    }
}

/// Compares with counting: a call is due if a descriptor from `old` up to `new` is at the event's
/// position.
#[test]
fn calls_are_due_when_the_event_descriptor_was_used() {
    for size in 1..=5_u16 {
        let guest = Guest::of_size(size, true);
        for old in 0..2 * u32::from(size) {
            for count in 0..=u32::from(size) {
                for event in 0..2 * u32::from(size) {
                    let event = nth(event, size);
                    guest.events(event, EVENTS_DESC);
                    let due = (old..old + count).any(|n| nth(n, size) == event);
                    let call = guest.ring.wants_call(nth(old, size), nth(old + count, size));
                    assert_eq!(call, due, "{old} + {count} of {size}, event {event:#x}");
                }
            }
        }
    }
}

/// For any position, from a front end or a driver, nothing outside the ring's parts is accessed.
#[test]
fn positions_out_of_range_access_nothing_outside_the_ring() {
    let guest = Guest::of_size(3, true);
    let canary = 0x0123_4567_89ab_cdef_u64;
    let outside = (0..0x10000_u64).step_by(8).filter(|gpa| {
        let inside = |part: u64, len: u64| (part..part + len).contains(gpa);
        !inside(DESC, 48) && !inside(DRIVER, 4) && !inside(DEVICE, 4)
    });
    outside.clone().for_each(|gpa| guest.put(gpa, canary));
    for position in 0..=u16::MAX {
        guest.events(position, EVENTS_DESC);
        let _ = guest.ring.wants_call(WRAP, 2 | WRAP);
        assert_eq!(guest.ring.valid(position), position & !WRAP < 3);
        if guest.ring.valid(position) {
            continue;
        }
        for other in [0, position, u16::MAX] {
            let _ = guest.ring.wants_call(position, other);
            let _ = guest.ring.wants_call(other, position);
            let _ = guest.ring.advance(position, other);
            guest.ring.put_used(position, other, 1, 1);
            guest.ring.publish_used(position, other);
            guest.ring.take_back(position, other);
            guest.ring.take_back(other, position);
            let _ = guest.ring.room(position, other);
            let _ = guest.ring.room(other, position);
        }
        let _ = guest.ring.pending(position);
        let _ = guest.walk(position);
        guest.ring.prefetch_avail(position, position);
        guest.ring.prefetch_used(position);
        guest.ring.suppress_kicks(position);
        let _ = guest.ring.want_kicks(position);
        // SAFETY: the cell is in the ring's memory, even for a position out of range.
        let _ = unsafe { &*guest.ring.hint(position).cell }.load(Ordering::Relaxed);
    }
    assert!(outside.clone().all(|gpa| guest.get::<u64>(gpa) == canary));
}

#[test]
fn kicks_are_requested_at_a_position_and_suppressed() {
    for event_idx in [false, true] {
        let guest = Guest::new(event_idx);
        let device_events = || (guest.get::<u16>(DEVICE), guest.get::<u16>(DEVICE + 2));
        guest.ring.suppress_kicks(WRAP);
        assert_eq!(device_events().1, EVENTS_DISABLE);
        assert!(!guest.ring.want_kicks(2 | WRAP));
        if event_idx {
            assert_eq!(device_events(), (2 | WRAP, EVENTS_DESC));
        } else {
            assert_eq!(device_events().1, EVENTS_ENABLE);
        }
        guest.desc(DESC, 2, 0x8000, 1, 0, AVAIL);
        assert!(guest.ring.want_kicks(2 | WRAP), "the chain came before the request for a kick");
        guest.ring.suppress_kicks(2 | WRAP);
        assert_eq!(device_events().1, EVENTS_DISABLE);
        assert!(!guest.ring.kick_suppression_is_due(WRAP, 4));
    }
}

/// The pages that `mark` marks in a log of 16 pages.
fn logged(mark: impl Fn(&DirtyLog)) -> Vec<usize> {
    let file = File::from(memfd(4096));
    let unmapper = Unmapper::start().unwrap();
    let fd = ForeignFd::alone(file.try_clone().unwrap().into());
    let log = DirtyLog::map(&fd, 0, 2, &unmapper).unwrap();
    mark(&log);
    let mut bits = [0; 2];
    file.read_exact_at(&mut bits, 0).unwrap();
    (0..16).filter(|page| bits[page / 8] & 1 << (page % 8) != 0).collect()
}

#[test]
fn pages_of_used_descriptors_are_logged() {
    // The descriptors are at 0x1000 to 0x3580.
    let guest = Guest::of_size(600, false);
    let of = |from: u16, to: u16| logged(|log| guest.ring.log_used(log, from, to));
    assert_eq!(of(0, 1), [1]);
    assert_eq!(of(300 | WRAP, 310 | WRAP), [2]);
    assert_eq!(of(255, 257), [1, 2]);
    assert_eq!(of(520 | WRAP, 599 | WRAP), [3]);
    assert_eq!(of(520 | WRAP, 0), [3], "up to the end of the ring");
    assert_eq!(of(520 | WRAP, 1), [1, 3], "past the end of the ring");
    assert_eq!(of(520, 1 | WRAP), [1, 3]);
    assert_eq!(of(300, 300 | WRAP), [1, 2, 3], "all descriptors");
    assert_eq!(of(0, 0), [0_usize; 0]);
    assert_eq!(logged(|log| guest.ring.log_events(log)), [6]);
}

#[test]
fn chains_put_but_not_published_by_an_earlier_process_become_available_again() {
    let guest = Guest::new(false);
    let (from, to) = (3 | WRAP, 1);
    for index in 0..SIZE {
        guest.desc(DESC, index.into(), 0x8000, 16, 2, DESC_F_WRITE);
    }
    for position in [from, 4 | WRAP, 0] {
        guest.ring.put_used(from, position, 1, 1);
    }
    guest.put(DESC + 16 * 4 + 14, used(4 | WRAP) | DESC_F_NEXT);
    guest.ring.take_back(from, to);
    assert_eq!(guest.flags(3), available(WRAP) | DESC_F_WRITE);
    assert_eq!(guest.flags(4), available(WRAP) | DESC_F_NEXT);
    assert_eq!(guest.flags(0), available(0) | DESC_F_WRITE);
    assert_eq!([guest.flags(1), guest.flags(2)], [DESC_F_WRITE; 2], "not owned by the device");
    assert_eq!(guest.get::<u32>(DESC + 16 * 3 + 8), 1, "the length is unchanged");
    let before: Vec<_> = (0..SIZE).map(|index| guest.flags(index)).collect();
    guest.ring.take_back(2 | WRAP, 2 | WRAP);
    assert_eq!(before, (0..SIZE).map(|index| guest.flags(index)).collect::<Vec<_>>());
    guest.ring.take_back(2, 2 | WRAP);
    let all: Vec<_> = (0..SIZE).map(|index| guest.flags(index) & DESC_F_STATE).collect();
    assert_eq!(all, [AVAIL, AVAIL, DESC_F_USED, DESC_F_USED, DESC_F_USED]);
}

#[test]
fn rings_are_checked_before_use() {
    let memory = flat(0x3000);
    let check = |size, desc, avail, used| {
        let addrs = RingAddrs { desc, avail, used };
        // SAFETY: the memory outlives the ring.
        unsafe { PackedRing::new(&memory, size, addrs, false) }.map(|ring| ring.size())
    };
    assert_eq!(check(1, 0, 0x1000, 0x2000), Ok(1));
    assert_eq!(check(3, 0x2fd0, 0x1ffc, 0x2004), Ok(3), "to the last byte");
    for size in [0, RING_SIZE_MAX + 1, u16::MAX] {
        assert_eq!(check(size, 0, 0x1000, 0x2000), Err(RingError::Size(size.into())));
    }
    assert_eq!(check(8, 8, 0x1000, 0x2000), Err(RingError::Alignment(8)));
    assert_eq!(check(8, 0, 0x1002, 0x2000), Err(RingError::Alignment(0x1002)));
    assert_eq!(check(8, 0, 0x1000, 0x2002), Err(RingError::Alignment(0x2002)));
    assert_eq!(check(4, 0x2fd0, 0x1000, 0x2000), Err(RingError::Address(0x2fd0)));
    assert_eq!(check(4, 0, 0x3000, 0x2000), Err(RingError::Address(0x3000)));
    assert_eq!(check(4, 0, 0x1000, 0x3000), Err(RingError::Address(0x3000)));
    let most = check(RING_SIZE_MAX, 0, 0x1000, 0x2000);
    assert_eq!(most, Err(RingError::Address(0)), "the descriptors take 512 KiB");
}

/// If each descriptor of the ring could be a table, a visit would read a million buffers.
#[test]
fn a_kept_chain_ends_with_its_first_table() {
    const N: u16 = 512;
    let guest = Guest::of_size(N, false);
    for n in 0..N {
        guest.desc(TABLE, n.into(), 0, 16, 0, 0);
    }
    let (spec, fd) = Area::create(1, N, true).unwrap();
    let unmapper = Unmapper::start().unwrap();
    let area = Area::map(spec, &ForeignFd::alone(fd), &unmapper).unwrap();
    let area = std::sync::Arc::new(area);
    let (mut tracker, _) = Tracker::packed(&area, 0, N, WRAP, |_| 0).unwrap();
    let len = u32::from(N) * 16;
    let desc = Desc { addr: TABLE, len, flags: DESC_F_INDIRECT, tag: 0 };
    let entry = tracker.fetched_packed((0..N).map(|_| desc)).unwrap();
    // SAFETY: the default is valid for every memory.
    let mut near = unsafe { guest.memory.near(Nearest::default()) };
    let mut buffers = 0_u32;
    let chain = KeptChain { ring: &guest.ring, tracker: &tracker, entry };
    let (whole, taken) = chain.walk(&mut near, |_, _| {
        buffers += 1;
        true
    });
    assert_eq!((whole, taken, buffers), (false, Some((0, N)), N.into()));
}

/// The length of a chain in an in-flight area comes from the front end.
#[test]
fn the_length_of_a_kept_chain_is_limited_in_the_largest_ring() {
    let guest = Guest::large();
    let (spec, fd) = Area::create(1, RING_SIZE_MAX, true).unwrap();
    let unmapper = Unmapper::start().unwrap();
    let area = Area::map(spec, &ForeignFd::alone(fd), &unmapper).unwrap();
    let area = std::sync::Arc::new(area);
    let (mut tracker, _) = Tracker::packed(&area, 0, RING_SIZE_MAX, WRAP, |_| 0).unwrap();
    // SAFETY: the default is valid for every memory.
    let mut near = unsafe { guest.memory.near(Nearest::default()) };
    for (count, known) in [(CHAIN_MAX, true), (CHAIN_MAX + 1, false)] {
        let desc = Desc { addr: 0, len: 16, flags: 0, tag: 3 };
        let entry = tracker.fetched_packed((0..count).map(|_| desc)).unwrap();
        let chain = KeptChain { ring: &guest.ring, tracker: &tracker, entry };
        let (_, taken) = chain.walk(&mut near, |_, _| true);
        assert_eq!(taken, known.then_some((3, count)));
    }
}
