//! The driver's side of a split ring (virtio 1.2, 2.7).

use crate::descriptor::{Descriptor, INDIRECT};
use crate::prepared::Virtqueue;
use crate::prepared::blk::Blk;
use crate::prepared::form::Form;
use crate::prepared::slots::{SPLIT_FLAGS_AT, Slots, set_data_kind};
use crate::ring::{Ring, RingLayout};
use crate::split::{SplitDriver, SplitFields};

/// After this many completions, calls are disabled again: with EVENT_IDX the device calls when an
/// index comes round again, after 65,536.
const REFUSAL_AGE: u16 = 1 << 14;

/// Returns the distance between the chains of two slots: a power of two, so that numbers can be
/// shifted.
pub fn stride<F: Form>(slots: &Slots<F>) -> usize {
    if slots.is_indirect() { 1 } else { slots.parts().next_power_of_two() }
}

/// A split ring in which the chain of slot `n` always begins at descriptor `n` times the stride.
#[derive(Debug)]
pub struct Split<'a, F = Blk> {
    ring: SplitFields<'a>,
    driver: SplitDriver,
    slots: &'a Slots<F>,
    shift: u32,
    /// The index up to which the device was kicked.
    kicked: u16,
    /// The used index at which the driver has disabled calls last.
    refused: u16,
}

impl<'a, F: Form> Split<'a, F> {
    /// Lays out the requests of `slots` as reads. `event_idx`: VIRTIO_RING_F_EVENT_IDX is
    /// negotiated.
    pub fn new(ring: &'a Ring, slots: &'a Slots<F>, event_idx: bool) -> Self {
        let stride = stride(slots);
        assert!(
            slots.count() * stride <= usize::from(ring.size()),
            "the slots' descriptors do not fit in the ring"
        );
        let mut split = Self {
            ring: ring.split(),
            driver: SplitDriver::new(event_idx),
            slots,
            shift: stride.trailing_zeros(),
            kicked: 0,
            refused: 0,
        };
        (0..slots.count()).for_each(|slot| split.lay(slot, false));
        split.refuse_calls();
        split
    }

    /// Lays out the descriptors of a request.
    fn lay(&self, slot: usize, write: bool) {
        let fits = "`new` has compared the slots with the size of the ring";
        let head = u16::try_from(slot << self.shift).expect(fits);
        if let Some(table) = self.slots.lay_table(slot, RingLayout::Split, write) {
            return self.ring.set_descriptor(head, Descriptor { flags: INDIRECT, ..table });
        }
        let parts = u16::try_from(self.slots.parts()).expect(fits);
        for (i, mut part) in (0..).zip(self.slots.descriptors(slot, write)) {
            part.next = if i + 1 < parts { head + i + 1 } else { 0 };
            self.ring.set_descriptor(head + i, part);
        }
    }

    #[cold]
    fn refuse_again(&mut self) {
        self.refused = self.driver.taken;
        self.ring.set_used_event(self.refused.wrapping_sub(1));
    }
}

impl<F: Form> Virtqueue for Split<'_, F> {
    type Form = F;

    #[inline]
    fn take(&mut self, slots: &mut [u16]) -> usize {
        let (first, count) = self.driver.take(&self.ring, slots.len());
        let mut index = first;
        for slot in &mut slots[..count] {
            let id = self.ring.used_id(index);
            // An id that is not the head of a slot becomes a slot number that does not exist.
            *slot = u16::try_from(id.rotate_right(self.shift)).unwrap_or(u16::MAX);
            index = index.wrapping_add(1);
        }
        count
    }

    #[inline]
    fn has_completion(&self) -> bool {
        self.driver.has_completion(&self.ring)
    }

    #[inline]
    fn set_kind(&mut self, slot: usize, write: bool) {
        if F::ANSWER_FIRST {
            // The answer has another place among the descriptors.
            return self.lay(slot, write);
        }
        let first = slot << self.shift;
        let words = match self.slots.table(slot) {
            Some(table) => table,
            None => self.ring.descriptors(first, self.slots.parts()),
        };
        set_data_kind(words, SPLIT_FLAGS_AT, write);
    }

    #[inline]
    fn give(&mut self, slots: &[u16]) {
        self.driver.publish(&self.ring, slots.iter().map(|slot| slot << self.shift));
        if self.driver.taken.wrapping_sub(self.refused) > REFUSAL_AGE {
            self.refuse_again();
        }
    }

    #[inline]
    fn take_kick(&mut self) -> bool {
        // The device has seen the requests that it has returned, so they need no kick. Without
        // this, for a device that never wants a kick, `kicked` would stay behind until the indices
        // have wrapped around.
        let SplitDriver { next, taken, .. } = self.driver;
        let in_flight = next.wrapping_sub(taken);
        let unkicked = next.wrapping_sub(self.kicked).min(in_flight);
        let wanted = self.driver.wants_kick(&self.ring, unkicked);
        self.kicked = if wanted { next } else { next.wrapping_sub(unkicked) };
        wanted
    }

    fn ask_for_call(&mut self) {
        self.driver.ask_for_call(&self.ring);
    }

    fn refuse_calls(&mut self) {
        self.driver.refuse_calls(&self.ring);
        self.refused = self.driver.taken;
    }

    /// Like QEMU, returns the index that the device has published, whether or not it was taken.
    fn base(&self) -> u16 {
        self.ring.used_index()
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "positions wrap at 2^16")]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::guest::GuestRam;
    use crate::prepared::Scsi;
    use crate::split::need_event;

    /// A ring of 8 descriptors for two requests. The test is the device.
    fn parts(indirect: bool) -> (Arc<GuestRam>, Ring, Slots) {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let ring = Ring::new(&ram, 0, 8).unwrap();
        let slots = Slots::new(&ram, 2, 4096, 4096, indirect).unwrap();
        (ram, ring, slots)
    }

    /// Returns `id` to the driver in the element before used index `index`.
    fn give_back(ring: &Ring, index: u16, id: u32) {
        let used = ring.addrs()[2];
        let element = used + 4 + u64::from(index.wrapping_sub(1) % 8) * 8;
        ring.ram().write(element, &id.to_le_bytes()).unwrap();
        ring.ram().write(used + 2, &index.to_le_bytes()).unwrap();
    }

    fn next(split: &mut Split<'_>) -> Option<usize> {
        let mut slots = [0; 1];
        (split.take(&mut slots) == 1).then_some(slots[0].into())
    }

    fn chain(ring: &Ring, head: u16) -> Vec<Descriptor> {
        let mut chain = vec![ring.descriptor(head)];
        while chain.last().unwrap().flags & crate::descriptor::NEXT != 0 {
            chain.push(ring.descriptor(chain.last().unwrap().next));
        }
        chain.iter_mut().for_each(|part| part.next = 0);
        chain
    }

    #[test]
    fn each_chain_has_the_descriptors_of_its_slot() {
        let (_ram, ring, slots) = parts(false);
        let mut split = Split::new(&ring, &slots, false);
        split.set_kind(1, true);
        assert_eq!(chain(&ring, 0), slots.descriptors(0, false).collect::<Vec<_>>());
        assert_eq!(chain(&ring, 4), slots.descriptors(1, true).collect::<Vec<_>>());
        split.set_kind(1, false);
        assert_eq!(chain(&ring, 4), slots.descriptors(1, false).collect::<Vec<_>>());
        let (_ram, ring, slots) = parts(true);
        Split::new(&ring, &slots, false);
        let table = slots.lay_table(1, RingLayout::Split, false).unwrap();
        assert_eq!(chain(&ring, 1), [Descriptor { flags: INDIRECT, ..table }]);
    }

    #[test]
    fn the_descriptors_of_a_scsi_command_are_in_the_order_of_its_kind() {
        let (ram, ring, _) = parts(false);
        let form = Scsi { lun: [0; 8], block_bytes: 512 };
        for indirect in [false, true] {
            let slots = Slots::with(form, &ram, 2, (4096, 4096), indirect).unwrap();
            let mut split = Split::new(&ring, &slots, false);
            for write in [false, true, false] {
                let expected: Vec<_> = slots.descriptors(1, write).collect();
                split.set_kind(1, write);
                let Some(table) = slots.table(1) else {
                    assert_eq!(chain(&ring, 4), expected);
                    continue;
                };
                let (table, _) = table.as_chunks::<2>();
                let in_table = table.iter().map(|words| {
                    let words = words.each_ref().map(|word| word.load(Ordering::Relaxed));
                    Descriptor { next: 0, ..Descriptor::from_split(words) }
                });
                assert!(in_table.eq(expected), "indirect");
            }
        }
    }

    #[test]
    fn requests_wrap_around_many_times_and_return_as_their_slots() {
        let (ram, ring, slots) = parts(false);
        let mut split = Split::new(&ring, &slots, false);
        let available = ring.addrs()[1];
        for round in 0..100_000_u32 {
            let (slot, index) = ((round % 2) as usize, round as u16);
            split.give(&[slot as u16]);
            assert_eq!(ring.available_index(), index.wrapping_add(1));
            let mut head = [0; 2];
            ram.read(available + 4 + u64::from(index % 8) * 2, &mut head).unwrap();
            assert_eq!(u16::from_le_bytes(head), 4 * slot as u16);
            assert!(!split.has_completion());
            give_back(&ring, index.wrapping_add(1), u32::from(u16::from_le_bytes(head)));
            assert_eq!(split.base(), index.wrapping_add(1));
            assert_eq!(next(&mut split), Some(slot));
        }
    }

    #[test]
    fn a_batch_is_taken_and_given_as_far_as_it_fits() {
        let (_ram, ring, slots) = parts(false);
        let mut split = Split::new(&ring, &slots, false);
        split.give(&[1, 0]);
        assert_eq!(ring.available_index(), 2);
        give_back(&ring, 1, 4);
        give_back(&ring, 2, 0);
        let mut taken = [9; 3];
        assert_eq!((split.take(&mut taken[..1]), taken[0], split.has_completion()), (1, 1, true));
        assert_eq!((split.take(&mut taken), taken[0], split.has_completion()), (1, 0, false));
        assert_eq!((split.take(&mut taken), taken), (0, [0, 9, 9]));
    }

    #[test]
    fn an_id_that_is_not_a_head_is_not_a_slot() {
        let (_ram, ring, slots) = parts(false);
        let mut split = Split::new(&ring, &slots, false);
        for (index, id) in [(1, 5), (2, 6), (3, 8), (4, u32::MAX), (5, 1 << 16)] {
            give_back(&ring, index, id);
            assert!(next(&mut split).unwrap() >= slots.count(), "{id}");
        }
    }

    #[test]
    fn kicks_follow_the_flag_and_its_changes() {
        let (ram, ring, slots) = parts(false);
        let used = ring.addrs()[2];
        let mut split = Split::new(&ring, &slots, false);
        assert!(!split.take_kick(), "no request is published");
        split.give(&[0]);
        assert!(split.take_kick());
        assert!(!split.take_kick(), "no new request");
        ram.write(used, &[1, 0]).unwrap();
        split.give(&[1]);
        assert!(!split.take_kick(), "the device wants no kicks");
        ram.write(used, &[0, 0]).unwrap();
        assert!(split.take_kick(), "the device wants kicks now");
        give_back(&ring, 1, 0);
        give_back(&ring, 2, 4);
        ram.write(used, &[1, 0]).unwrap();
        assert_eq!((next(&mut split), next(&mut split)), (Some(0), Some(1)));
        split.give(&[0]);
        assert!(!split.take_kick());
        give_back(&ring, 3, 0);
        assert_eq!(next(&mut split), Some(0));
        ram.write(used, &[0, 0]).unwrap();
        assert!(!split.take_kick(), "the request has returned without a kick");
    }

    #[test]
    fn with_event_idx_kicks_follow_the_index_even_after_a_long_time_without() {
        let (ram, ring, slots) = parts(false);
        let event_at = ring.addrs()[2] + 4 + 64;
        let mut split = Split::new(&ring, &slots, true);
        for round in 0..70_000_u32 {
            ram.write(event_at, &(round as u16).wrapping_add(0x8000).to_le_bytes()).unwrap();
            split.give(&[0]);
            assert!(!split.take_kick(), "round {round}");
            give_back(&ring, (round as u16).wrapping_add(1), 0);
            assert_eq!(next(&mut split), Some(0));
        }
        let next = 70_000_u32 as u16;
        split.give(&[0]);
        ram.write(event_at, &next.to_le_bytes()).unwrap();
        assert!(split.take_kick());
        split.give(&[1]);
        assert!(!split.take_kick(), "the device named the request before");
        ram.write(event_at, &next.wrapping_add(1).to_le_bytes()).unwrap();
        assert!(split.take_kick());
    }

    #[test]
    fn calls_stay_disabled_and_are_requested_by_index() {
        let (ram, ring, slots) = parts(false);
        let mut split = Split::new(&ring, &slots, true);
        let used_event = || {
            let mut bytes = [0; 2];
            ram.read(ring.addrs()[1] + 4 + 16, &mut bytes).unwrap();
            u16::from_le_bytes(bytes)
        };
        for index in 1..=200_000_u32 {
            split.give(&[0]);
            let index = index as u16;
            assert!(!need_event(used_event(), index, index.wrapping_sub(1)), "a call at {index}");
            give_back(&ring, index, 0);
            next(&mut split).unwrap();
        }
        let taken = 200_000_u32 as u16;
        split.ask_for_call();
        assert!(need_event(used_event(), taken.wrapping_add(1), taken));
        split.refuse_calls();
        assert!(!need_event(used_event(), taken.wrapping_add(1), taken));
    }
}
