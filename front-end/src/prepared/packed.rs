//! The driver's side of a packed ring (virtio 1.2, 2.8).

use crate::descriptor::{Descriptor, INDIRECT};
use crate::packed::{PackedDriver, PackedFields, descriptor};
use crate::prepared::Virtqueue;
use crate::prepared::blk::Blk;
use crate::prepared::form::Form;
use crate::prepared::slots::{PACKED_FLAGS_AT, Slots, set_data_kind};
use crate::ring::{Ring, RingLayout};

/// A packed ring. The descriptors of each slot's request are made once, and copied to the next free
/// place of the ring.
///
/// It lies in the memory of a split [`Ring`], whose three parts are all large enough for the
/// descriptors, the driver's events and the device's events.
#[derive(Debug)]
pub struct Packed<'a, F = Blk> {
    ring: PackedFields<'a>,
    driver: PackedDriver,
    slots: &'a Slots<F>,
    /// Each slot's descriptors as two words. The flags are without those of the position.
    made: Vec<[u64; 2]>,
    /// The number of descriptors of one request in the ring.
    parts: u16,
    /// Descriptors since the last kick, and descriptors that the device holds.
    unkicked: u16,
    held: u16,
}

impl<'a, F: Form> Packed<'a, F> {
    /// Makes the requests of `slots` reads. `event_idx`: VIRTIO_RING_F_EVENT_IDX is negotiated.
    pub fn new(ring: &'a Ring, slots: &'a Slots<F>, event_idx: bool) -> Self {
        let parts = if slots.is_indirect() { 1 } else { slots.parts() };
        assert!(
            slots.count() * parts <= usize::from(ring.size()),
            "the requests do not fit in the ring"
        );
        let mut packed = Self {
            ring: ring.packed(),
            driver: PackedDriver::new(event_idx),
            slots,
            made: vec![[0; 2]; slots.count() * parts],
            parts: parts.try_into().expect("at most the size of the ring"),
            unkicked: 0,
            held: 0,
        };
        for slot in 0..slots.count() {
            match slots.lay_table(slot, RingLayout::Packed, false) {
                Some(table) => {
                    let table = Descriptor { flags: INDIRECT, ..table };
                    packed.made[slot] = Self::make(slot, table);
                }
                None => packed.set_kind(slot, false),
            }
        }
        packed.refuse_calls();
        packed
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the ring has at least as many descriptors as slots"
    )]
    fn make(slot: usize, part: Descriptor) -> [u64; 2] {
        descriptor(part.addr, part.len, slot as u16, part.flags)
    }
}

impl<F: Form> Virtqueue for Packed<'_, F> {
    type Form = F;

    #[inline]
    fn take(&mut self, slots: &mut [u16]) -> usize {
        // Local copies stay in registers.
        let (ring, mut driver, parts) = (self.ring, self.driver, self.parts);
        let mut count = 0;
        for slot in slots {
            let Some(rest) = driver.given_back(&ring) else { break };
            *slot = ((rest >> 32) & 0xffff) as u16;
            driver.take(&ring, parts);
            count += 1;
        }
        self.driver = driver;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most one for each slot, whose number is a `u16`"
        )]
        let returned = self.parts * count as u16;
        self.held = self.held.saturating_sub(returned);
        count
    }

    fn has_completion(&self) -> bool {
        self.driver.given_back(&self.ring).is_some()
    }

    fn set_kind(&mut self, slot: usize, write: bool) {
        if let Some(table) = self.slots.table(slot) {
            if F::ANSWER_FIRST {
                // The answer has another place in the table.
                self.slots.lay_table(slot, RingLayout::Packed, write);
                return;
            }
            return set_data_kind(table, PACKED_FLAGS_AT, write);
        }
        let parts = usize::from(self.parts);
        let made = &mut self.made[slot * parts..][..parts];
        for (made, part) in made.iter_mut().zip(self.slots.descriptors(slot, write)) {
            *made = Self::make(slot, part);
        }
    }

    #[inline]
    fn give(&mut self, slots: &[u16]) {
        let mut batch = self.driver.begin();
        let parts = usize::from(self.parts);
        for slot in slots {
            for made in &self.made[usize::from(*slot) * parts..][..parts] {
                self.driver.put(&self.ring, &mut batch, *made);
            }
        }
        self.driver.publish(&self.ring, batch);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most one for each slot, whose number is a `u16`"
        )]
        let added = self.parts * slots.len() as u16;
        self.unkicked += added;
        self.held += added;
    }

    #[inline]
    fn take_kick(&mut self) -> bool {
        // The device has seen the descriptors that it has returned, so they need no kick.
        self.unkicked = self.unkicked.min(self.held);
        let wanted = self.driver.wants_kick(&self.ring, self.unkicked);
        if wanted {
            self.unkicked = 0;
        }
        wanted
    }

    fn ask_for_call(&mut self) {
        self.driver.ask_for_call(&self.ring);
    }

    fn refuse_calls(&mut self) {
        self.driver.refuse_calls(&self.ring);
    }

    fn base(&self) -> u16 {
        self.driver.base()
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "sizes of small rings")]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use super::*;
    use crate::descriptor::NEXT;
    use crate::guest::GuestRam;
    use crate::packed::{AVAILABLE, EVENTS_AT, EVENTS_OFF, EVENTS_ON, Position, USED};
    use crate::prepared::Scsi;

    const SCSI: Scsi = Scsi { lun: [0; 8], block_bytes: 512 };

    /// A device that follows the specification, with its own state.
    struct Device {
        ram: Arc<GuestRam>,
        addrs: [u64; 3],
        size: u16,
        available: Position,
        used: Position,
        /// For each request taken: its buffer id, its descriptors in the ring, and its descriptors
        /// in total.
        held: VecDeque<(u16, u16, Vec<Descriptor>)>,
    }

    /// Returns `position` advanced by `n`, in a ring of `size`.
    fn further(position: Position, n: u16, size: u16) -> Position {
        let sum = position.at + n;
        Position { at: sum % size, wrap: position.wrap ^ (sum / size % 2 == 1) }
    }

    impl Device {
        fn new(ring: &Ring) -> Self {
            Self {
                ram: ring.ram().clone(),
                addrs: ring.addrs(),
                size: ring.size(),
                available: Position::FIRST,
                used: Position::FIRST,
                held: VecDeque::new(),
            }
        }

        fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
            let mut bytes = [0; N];
            self.ram.read(gpa, &mut bytes).unwrap();
            bytes
        }

        /// Reads a descriptor. `next` holds the buffer id.
        fn descriptor(&self, gpa: u64) -> Descriptor {
            let bytes: [u8; 16] = self.read(gpa);
            let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            Descriptor {
                addr: u64::from_le_bytes(*bytes.first_chunk().unwrap()),
                len: u32::from_le_bytes(*bytes[8..].first_chunk().unwrap()),
                next: word(12),
                flags: word(14),
            }
        }

        /// Takes the available requests. Returns their number.
        fn poll(&mut self) -> usize {
            let before = self.held.len();
            loop {
                let mut chain = Vec::new();
                let mut at = self.available;
                loop {
                    let part = self.descriptor(self.addrs[0] + 16 * u64::from(at.at));
                    let available = (part.flags & AVAILABLE != 0) == at.wrap
                        && (part.flags & USED != 0) != at.wrap;
                    if chain.is_empty() && !available {
                        return self.held.len() - before;
                    }
                    assert!(available, "the whole chain is available when its head is");
                    at = further(at, 1, self.size);
                    chain.push(Descriptor { flags: part.flags & !(AVAILABLE | USED), ..part });
                    if part.flags & NEXT == 0 {
                        break;
                    }
                }
                self.available = at;
                let (id, in_ring) = (chain.last().unwrap().next, chain.len() as u16);
                if chain[0].flags == INDIRECT {
                    let parts = u64::from(chain[0].len / 16);
                    chain = (0..parts).map(|i| self.table_entry(chain[0].addr, i, parts)).collect();
                }
                chain.iter_mut().for_each(|part| part.next = 0);
                self.held.push_back((id, in_ring, chain));
            }
        }

        /// Reads an entry of a table of `parts`. Entries follow one another, without a NEXT flag.
        fn table_entry(&self, table: u64, i: u64, parts: u64) -> Descriptor {
            let mut part = self.descriptor(table + 16 * i);
            assert_eq!(part.flags & !crate::descriptor::WRITE, 0);
            part.flags |= if i + 1 < parts { NEXT } else { 0 };
            part
        }

        /// Returns the `n`th request that it holds, with a status byte.
        fn complete(&mut self, n: usize, status: u8) {
            let (id, in_ring, chain) = self.held.remove(n).unwrap();
            self.ram.write(chain.last().unwrap().addr, &[status]).unwrap();
            let at = self.addrs[0] + 16 * u64::from(self.used.at);
            let flags = if self.used.wrap { AVAILABLE | USED } else { 0 };
            self.ram.write(at + 8, &1_u32.to_le_bytes()).unwrap();
            self.ram.write(at + 12, &id.to_le_bytes()).unwrap();
            self.ram.write(at + 14, &flags.to_le_bytes()).unwrap();
            self.used = further(self.used, in_ring, self.size);
        }

        /// Sets which kicks it wants.
        fn want(&self, flags: u16, at: Position) {
            let event = at.at | u16::from(at.wrap) << 15;
            self.ram.write(self.addrs[2], &event.to_le_bytes()).unwrap();
            self.ram.write(self.addrs[2] + 2, &flags.to_le_bytes()).unwrap();
        }
    }

    fn next<F: Form>(packed: &mut Packed<'_, F>) -> Option<usize> {
        let mut slots = [0; 1];
        (packed.take(&mut slots) == 1).then_some(slots[0].into())
    }

    fn memory_of<F: Form>(form: F, size: u16, depth: usize, indirect: bool) -> (Ring, Slots<F>) {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let ring = Ring::new(&ram, 0, size).unwrap();
        let slots = Slots::with(form, &ram, depth, (4096, 4096), indirect).unwrap();
        (ring, slots)
    }

    fn memory(size: u16, depth: usize, indirect: bool) -> (Ring, Slots) {
        memory_of(Blk, size, depth, indirect)
    }

    /// Runs thousands of requests through a ring whose size is not a multiple of a chain's length.
    /// They return out of order.
    fn wraps_around<F: Form>(form: F, size: u16, depth: usize, indirect: bool) {
        let (ring, slots) = memory_of(form, size, depth, indirect);
        let mut device = Device::new(&ring);
        let mut packed = Packed::new(&ring, &slots, false);
        let mut free: Vec<_> = (0..depth as u16).collect();
        let mut pick = 1_usize;
        for round in 0..5000 {
            let given = free.len();
            for slot in free.iter().map(|slot| usize::from(*slot)) {
                packed.set_kind(slot, (round + slot) % 3 == 0);
            }
            packed.give(&free);
            free.clear();
            assert_eq!(device.poll(), given);
            for (id, _, chain) in device.held.iter().rev().take(given) {
                let slot = usize::from(*id);
                let write = (round + slot) % 3 == 0;
                assert_eq!(chain, &slots.descriptors(slot, write).collect::<Vec<_>>());
            }
            pick = (pick * 7 + 3) % 1009;
            for i in 0..=pick % depth {
                let at = (pick + i) % device.held.len();
                let slot = usize::from(device.held[at].0);
                assert_eq!(next(&mut packed), None);
                device.complete(at, 2);
                assert_eq!(next(&mut packed), Some(slot));
                free.push(slot as u16);
            }
            assert_eq!(next(&mut packed), None);
            let wrap = u16::from(device.used.wrap) << 15;
            assert_eq!(packed.base(), device.used.at | wrap);
        }
    }

    #[test]
    fn chains_wrap_around() {
        wraps_around(Blk, 16, 5, false);
        wraps_around(Blk, 8, 2, false);
        wraps_around(Blk, 4, 1, false);
        wraps_around(SCSI, 16, 5, false);
    }

    #[test]
    fn tables_wrap_around() {
        wraps_around(Blk, 8, 8, true);
        wraps_around(Blk, 1, 1, true);
        wraps_around(SCSI, 8, 8, true);
    }

    #[test]
    fn kicks_follow_the_flags_of_the_device() {
        let (ring, slots) = memory(16, 4, false);
        let mut packed = Packed::new(&ring, &slots, false);
        let mut device = Device::new(&ring);
        assert!(!packed.take_kick(), "no request is published");
        packed.give(&[0]);
        assert!(packed.take_kick());
        assert!(!packed.take_kick(), "no new request");
        device.want(EVENTS_OFF, Position::FIRST);
        packed.give(&[1]);
        assert!(!packed.take_kick());
        device.want(EVENTS_ON, Position::FIRST);
        assert!(packed.take_kick(), "the device wants kicks now");
        device.poll();
        device.want(EVENTS_OFF, Position::FIRST);
        packed.give(&[2]);
        device.poll();
        (0..3).for_each(|_| device.complete(0, 0));
        assert_eq!((0..3).filter_map(|_| next(&mut packed)).count(), 3);
        device.want(EVENTS_ON, Position::FIRST);
        assert!(!packed.take_kick(), "the request has returned without a kick");
    }

    #[test]
    fn kicks_at_a_position_are_sent_when_it_is_passed_in_the_right_round() {
        let (ring, slots) = memory(8, 2, false);
        let mut packed = Packed::new(&ring, &slots, true);
        let mut device = Device::new(&ring);
        for round in 0..1000 {
            // The device asks for a kick at the request after the next one.
            device.want(EVENTS_AT, further(device.available, 3, 8));
            for (slot, wanted) in [(0, false), (1, true)] {
                packed.give(&[slot]);
                assert_eq!(packed.take_kick(), wanted, "round {round}, slot {slot}");
            }
            assert_eq!(device.poll(), 2);
            (0..2).for_each(|_| device.complete(0, 0));
            assert_eq!((next(&mut packed), next(&mut packed)), (Some(0), Some(1)));
        }
    }

    #[test]
    fn calls_are_requested_and_disabled() {
        let (ring, slots) = memory(8, 2, false);
        let mut packed = Packed::new(&ring, &slots, false);
        let device = Device::new(&ring);
        let flags = || u16::from_le_bytes(device.read(device.addrs[1] + 2));
        assert_eq!(flags(), EVENTS_OFF);
        packed.ask_for_call();
        assert_eq!(flags(), EVENTS_ON);
        packed.refuse_calls();
        assert_eq!(flags(), EVENTS_OFF);
    }
}
