//! Tests of split rings: what a guest may write there, and how the device handles it.

use super::*;
use crate::any_ring::check;
use crate::desc::INDIRECT_MAX;
use crate::ring::Layout;
use guest_memory::Nearest;
use guest_memory::testing::flat;
use vm_memory::{ByteValued, VolatileMemory};

const SIZE: u16 = 8;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLE: u64 = 0x3000;
const ADDRS: RingAddrs = RingAddrs { desc: DESC, avail: AVAIL, used: USED };

/// A ring, and the guest's access to it.
struct Guest {
    memory: std::sync::Arc<GuestMemory>,
    ring: SplitRing,
}

impl Guest {
    fn new(event_idx: bool) -> Self {
        Self::of_size(SIZE, ADDRS, event_idx)
    }

    fn of_size(size: u16, addrs: RingAddrs, event_idx: bool) -> Self {
        let memory = flat(0x10_0000);
        // SAFETY: `Self` keeps the memory with the ring.
        let ring = unsafe { SplitRing::new(&memory, size, addrs, event_idx) }.unwrap();
        Self { memory, ring }
    }

    fn put<T: ByteValued>(&self, gpa: u64, value: T) {
        let slice = self.memory.slice(gpa, size_of::<T>()).unwrap();
        slice.get_ref::<T>(0).unwrap().store(value);
    }

    fn desc(&self, table: u64, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * index;
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn walk(&self, head: u16) -> (Vec<Buffer>, Result<(), ChainError>) {
        let mut buffers = vec![];
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { self.memory.near(Nearest::default()) };
        let result = self.ring.walk(&mut near, head, |_, buffer| {
            buffers.push(buffer);
            true
        });
        (buffers, result)
    }
}

#[test]
fn a_chain_is_walked_in_order() {
    let guest = Guest::new(false);
    guest.desc(DESC, 3, 0x4000, 16, DESC_F_NEXT, 1);
    guest.desc(DESC, 1, 0x5000, 512, DESC_F_NEXT | DESC_F_WRITE, 7);
    guest.desc(DESC, 7, 0x6000, 1, DESC_F_WRITE, 0);
    let (buffers, result) = guest.walk(3);
    assert_eq!(result, Ok(()));
    let seen: Vec<_> = buffers.iter().map(|b| (b.gpa, b.len, b.write)).collect();
    assert_eq!(seen, [(0x4000, 16, false), (0x5000, 512, true), (0x6000, 1, true)]);
}

#[test]
fn an_indirect_table_may_be_unaligned() {
    let guest = Guest::new(false);
    guest.desc(DESC, 0, TABLE + 3, 32, DESC_F_INDIRECT, 0);
    guest.desc(TABLE + 3, 0, 0x4000, 16, DESC_F_NEXT, 1);
    guest.desc(TABLE + 3, 1, 0x5000, 1, DESC_F_WRITE, 0);
    let (buffers, result) = guest.walk(0);
    assert_eq!(result, Ok(()));
    let seen: Vec<_> = buffers.iter().map(|b| (b.gpa, b.len, b.write)).collect();
    assert_eq!(seen, [(0x4000, 16, false), (0x5000, 1, true)]);
}

#[test]
fn a_loop_ends_after_as_many_descriptors_as_the_table_has() {
    let guest = Guest::new(false);
    guest.desc(DESC, 0, 0x4000, 16, DESC_F_NEXT, 1);
    guest.desc(DESC, 1, 0x4000, 16, DESC_F_NEXT, 0);
    let (buffers, result) = guest.walk(0);
    assert_eq!((buffers.len(), result), (usize::from(SIZE), Err(ChainError::Loop)));
}

#[test]
fn descriptor_indices_out_of_range_are_refused() {
    let guest = Guest::new(false);
    guest.desc(DESC, 0, 0x4000, 16, DESC_F_NEXT, SIZE);
    assert_eq!(guest.walk(0).1, Err(ChainError::Index));
    assert_eq!(guest.walk(SIZE).1, Err(ChainError::Index));
    assert_eq!(guest.walk(u16::MAX).1, Err(ChainError::Index));
}

#[test]
fn indirect_tables() {
    let guest = Guest::new(false);
    guest.desc(TABLE, 0, 0x4000, 16, DESC_F_NEXT, 1);
    guest.desc(TABLE, 1, 0x5000, 1, DESC_F_WRITE, 0);
    guest.desc(DESC, 0, TABLE, 32, DESC_F_INDIRECT, 0);
    let (buffers, result) = guest.walk(0);
    assert_eq!((buffers.len(), result), (2, Ok(())));

    let refused = |addr: u64, len: u32, flags: u16| {
        guest.desc(DESC, 0, addr, len, flags, 1);
        guest.walk(0).1.unwrap_err()
    };
    assert_eq!(refused(TABLE, 0, DESC_F_INDIRECT), ChainError::IndirectLength);
    assert_eq!(refused(TABLE, 15, DESC_F_INDIRECT), ChainError::IndirectLength);
    assert_eq!(refused(TABLE, 33, DESC_F_INDIRECT), ChainError::IndirectLength);
    let long = 16 * (INDIRECT_MAX + 1);
    assert_eq!(refused(TABLE, long, DESC_F_INDIRECT), ChainError::IndirectLength);
    assert_eq!(refused(0xf_fff8, 16, DESC_F_INDIRECT), ChainError::Address);
    assert_eq!(refused(u64::MAX - 7, 16, DESC_F_INDIRECT), ChainError::Address);
    assert_eq!(refused(TABLE, 32, DESC_F_INDIRECT | DESC_F_NEXT), ChainError::NestedIndirect);
    guest.desc(TABLE, 0, TABLE, 16, DESC_F_INDIRECT, 0);
    assert_eq!(refused(TABLE, 32, DESC_F_INDIRECT), ChainError::NestedIndirect);
    // A loop inside the table ends after as many descriptors as the table has.
    guest.desc(TABLE, 0, 0x4000, 16, DESC_F_NEXT, 0);
    assert_eq!(refused(TABLE, 32, DESC_F_INDIRECT), ChainError::Loop);
}

#[test]
fn the_length_of_a_chain_is_limited_in_the_largest_ring() {
    let addrs = RingAddrs { desc: 0, avail: 0x8_0000, used: 0xa_0000 };
    let guest = Guest::of_size(RING_SIZE_MAX, addrs, false);
    for n in 0..CHAIN_MAX {
        guest.desc(0, n.into(), 0, 16, if n + 1 < CHAIN_MAX { DESC_F_NEXT } else { 0 }, n + 1);
    }
    let (buffers, result) = guest.walk(0);
    assert_eq!((buffers.len(), result), (CHAIN_MAX.into(), Ok(())));
    guest.desc(0, u64::from(CHAIN_MAX) - 1, 0, 16, DESC_F_NEXT, CHAIN_MAX);
    guest.desc(0, CHAIN_MAX.into(), 0, 16, 0, 0);
    let (buffers, result) = guest.walk(0);
    assert_eq!((buffers.len(), result), (CHAIN_MAX.into(), Err(ChainError::Loop)));
}

#[test]
fn a_walk_ends_when_the_visitor_stops_it() {
    let guest = Guest::new(false);
    guest.desc(DESC, 0, 0x4000, 16, DESC_F_NEXT, 1);
    guest.desc(DESC, 1, 0x5000, 16, 0, 0);
    // SAFETY: the default is valid for every memory.
    let mut near = unsafe { guest.memory.near(Nearest::default()) };
    let mut seen = 0;
    let result = guest.ring.walk(&mut near, 0, |_, _| {
        seen += 1;
        false
    });
    assert_eq!((result, seen), (Err(ChainError::Stopped), 1));
}

#[test]
fn an_indirect_table_may_have_any_address() {
    let guest = Guest::new(false);
    guest.desc(TABLE + 1, 0, 0x4000, 16, 0, 0);
    guest.desc(DESC, 0, TABLE + 1, 16, DESC_F_INDIRECT, 0);
    assert_eq!(guest.walk(0).1, Ok(()));
}

#[test]
fn the_available_index_may_not_be_ahead_by_more_than_the_ring() {
    let guest = Guest::new(false);
    guest.put::<u16>(AVAIL + 2, 3);
    assert_eq!(guest.ring.pending(u16::MAX), Ok(4), "indices wrap");
    guest.put::<u16>(AVAIL + 2, SIZE);
    assert_eq!(guest.ring.pending(0), Ok(SIZE));
    guest.put::<u16>(AVAIL + 2, SIZE + 1);
    assert_eq!(guest.ring.pending(0), Err(RingError::AvailIndex { from: 0, to: SIZE + 1 }));
}

#[test]
fn the_driver_sees_used_elements_after_publication() {
    let guest = Guest::new(false);
    guest.ring.put_used(SIZE + 2, SIZE + 2, 5, 513);
    assert_eq!(guest.ring.used_idx(), 0);
    guest.ring.publish_used(SIZE + 2, SIZE + 3);
    assert_eq!(guest.ring.used_idx(), SIZE + 3);
    let elem = guest.memory.slice(USED + 4 + 8 * 2, 8).unwrap();
    assert_eq!(elem.get_ref::<u32>(0).unwrap().load(), 5);
    assert_eq!(elem.get_ref::<u32>(4).unwrap().load(), 513);
}

#[test]
fn calls_are_made_when_the_driver_wants_them() {
    let flags = Guest::new(false);
    assert!(flags.ring.wants_call(0, 1));
    flags.put::<u16>(AVAIL, AVAIL_F_NO_INTERRUPT);
    assert!(!flags.ring.wants_call(0, 1));

    let event = Guest::new(true);
    let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
    event.put::<u16>(AVAIL, AVAIL_F_NO_INTERRUPT); // Ignored with EVENT_IDX.
    event.put::<u16>(used_event, 4);
    assert!(!event.ring.wants_call(0, 4), "the event index was not passed yet");
    assert!(event.ring.wants_call(4, 5));
    assert!(event.ring.wants_call(0, 8));
    assert!(!event.ring.wants_call(5, 8), "the event index was passed before");
    event.put::<u16>(used_event, u16::MAX);
    assert!(event.ring.wants_call(u16::MAX, 1), "indices wrap");
}

#[test]
fn kicks_stay_suppressed_when_indices_wrap() {
    let guest = Guest::new(true);
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    let wants_kick = |old: u16, new: u16| {
        let event: u16 =
            guest.memory.slice(avail_event, 2).unwrap().get_ref::<u16>(0).unwrap().load();
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    };
    guest.ring.suppress_kicks(0);
    let mut seen = 0_u16;
    for _ in 0..3 * 65536 / 3 {
        // The driver makes up to a full ring of chains available, then the device follows.
        assert!(!wants_kick(seen, seen.wrapping_add(SIZE)));
        let next = seen.wrapping_add(3);
        if guest.ring.kick_suppression_is_due(seen, next) {
            guest.ring.suppress_kicks(next);
        }
        seen = next;
    }
}

#[test]
fn rings_are_checked_before_use() {
    let memory = flat(0x3000);
    let check = |size, desc, avail, used| {
        check(&memory, size, RingAddrs { desc, avail, used }, Layout::default())
    };
    assert_eq!(check(8, DESC, AVAIL, USED), Ok(()));
    for size in [0, 3, 24, u16::MAX] {
        assert_eq!(check(size, DESC, AVAIL, USED), Err(RingError::Size(size.into())));
    }
    assert_eq!(check(8, 8, AVAIL, USED), Err(RingError::Alignment(8)));
    assert_eq!(check(8, DESC, AVAIL + 1, USED), Err(RingError::Alignment(AVAIL + 1)));
    assert_eq!(check(8, DESC, AVAIL, USED + 2), Err(RingError::Alignment(USED + 2)));
    assert_eq!(check(8, 0x2ff0, AVAIL, USED), Err(RingError::Address(0x2ff0)));
    // The event index after the used ring counts too: 4 + 8 * 8 + 2 bytes.
    assert_eq!(check(8, DESC, AVAIL, 0x3000 - 68), Err(RingError::Address(0x3000 - 68)));
    assert_eq!(check(8, u64::MAX - 15, AVAIL, USED), Err(RingError::Address(u64::MAX - 15)));
}
