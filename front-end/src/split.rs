//! The driver's side of a split ring (virtio 1.2, 2.7), for any kind of request.
//!
//! `SplitFields` is the ring's memory, and `SplitDriver` the driver's state beside it. The user of
//! both decides what the descriptors refer to, and which chains are free.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crate::descriptor::{Descriptor, Used};
use crate::guest::Window;
use crate::words::words;

/// A split ring in guest memory, field by field. The other side may write it at any time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SplitFields<'a> {
    /// Two words for each descriptor.
    descriptors: &'a [AtomicU64],
    /// Flags, index, an element for each descriptor, `used_event`.
    available: &'a [AtomicU16],
    /// Flags, index, four 16-bit values for each descriptor, `avail_event`.
    used: &'a [AtomicU16],
    /// The same memory as `used`, for its elements: id and length, from the second word on.
    elements: &'a [AtomicU32],
    mask: u16,
}

impl<'a> SplitFields<'a> {
    /// Makes a ring of `size` descriptors in these windows: descriptors, available ring, used ring.
    pub(crate) fn new([descriptors, available, used]: [&'a Window; 3], size: u16) -> Self {
        Self {
            descriptors: words(descriptors),
            available: words(available),
            used: words(used),
            elements: words(used),
            mask: size - 1,
        }
    }

    /// Returns the words of `count` descriptors from `first` on, two for each.
    #[inline]
    pub(crate) fn descriptors(&self, first: usize, count: usize) -> &'a [AtomicU64] {
        &self.descriptors[2 * first..][..2 * count]
    }

    /// Reads descriptor `index`.
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        let at = 2 * usize::from(index);
        Descriptor::from_split([at, at + 1].map(|word| self.descriptors[word].load(Relaxed)))
    }

    /// Writes descriptor `index`.
    #[inline]
    pub(crate) fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        put(self.descriptors, index.into(), descriptor.split());
    }

    /// Sets the available ring's flags. 1: the driver wants no calls.
    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.available[0].store(flags, Relaxed);
    }

    /// Returns the available ring's index, which only the driver writes.
    pub(crate) fn available_index(&self) -> u16 {
        self.available[1].load(Relaxed)
    }

    /// Publishes the available ring up to `index`, with all data that was written before.
    #[inline]
    pub(crate) fn set_available_index(&self, index: u16) {
        // Release: a device that loads this index sees elements, headers and descriptors.
        self.available[1].store(index, Release);
    }

    /// Writes the element of the available ring at position `index` (modulo the size).
    #[inline]
    pub(crate) fn set_available_element(&self, index: u16, head: u16) {
        self.available[2 + usize::from(index & self.mask)].store(head, Relaxed);
    }

    /// With EVENT_IDX: sets the used index after which the driver wants a call.
    pub(crate) fn set_used_event(&self, index: u16) {
        self.available[2 + self.size()].store(index, Relaxed);
    }

    /// Returns the used ring's flags. 1: the device wants no kicks.
    #[inline]
    pub(crate) fn used_flags(&self) -> u16 {
        self.used[0].load(Relaxed)
    }

    /// Returns the used ring's index. All data that the device wrote before is visible.
    #[inline]
    pub(crate) fn used_index(&self) -> u16 {
        // Acquire: pairs with the device's store, which follows its writes of data, status and
        // element.
        self.used[1].load(Acquire)
    }

    /// Returns the id in the element of the used ring at position `index` (modulo the size).
    #[inline]
    pub(crate) fn used_id(&self, index: u16) -> u32 {
        self.elements[1 + 2 * usize::from(index & self.mask)].load(Relaxed)
    }

    /// Returns the element of the used ring at position `index` (modulo the size).
    pub(crate) fn used_element(&self, index: u16) -> Used {
        let len = self.elements[2 + 2 * usize::from(index & self.mask)].load(Relaxed);
        Used { id: self.used_id(index), len }
    }

    /// With EVENT_IDX: returns the available index after which the device wants a kick.
    #[inline]
    pub(crate) fn available_event(&self) -> u16 {
        self.used[2 + 4 * self.size()].load(Relaxed)
    }

    #[inline]
    fn size(&self) -> usize {
        usize::from(self.mask) + 1
    }
}

/// The driver's indices of one split ring.
///
/// No method has a fence between publishing and reading what the other side wants. The caller has a
/// fence, or reads again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SplitDriver {
    event_idx: bool,
    /// The position of the next chain in the available ring.
    pub(crate) next: u16,
    /// The position up to which the used ring was read.
    pub(crate) taken: u16,
}

impl SplitDriver {
    /// Makes a driver of an empty ring. `event_idx`: VIRTIO_RING_F_EVENT_IDX is negotiated.
    pub(crate) fn new(event_idx: bool) -> Self {
        Self { event_idx, ..Self::default() }
    }

    /// Makes the chains that begin at `heads` available to the device, with all data that was
    /// written before.
    #[inline]
    pub(crate) fn publish(&mut self, ring: &SplitFields<'_>, heads: impl Iterator<Item = u16>) {
        let mut next = self.next;
        for head in heads {
            ring.set_available_element(next, head);
            next = next.wrapping_add(1);
        }
        self.next = next;
        ring.set_available_index(next);
    }

    /// Takes at most `most` used requests. Returns the first position in the used ring, and the
    /// number of positions. The data that the device wrote before is visible.
    #[inline]
    pub(crate) fn take(&mut self, ring: &SplitFields<'_>, most: usize) -> (u16, usize) {
        let first = self.taken;
        let count = usize::from(ring.used_index().wrapping_sub(first)).min(most);
        #[expect(clippy::cast_possible_truncation, reason = "at most a difference of two `u16`")]
        let taken = count as u16;
        self.taken = first.wrapping_add(taken);
        (first, count)
    }

    /// Returns whether the device has used a request that was not taken.
    #[inline]
    pub(crate) fn has_completion(&self, ring: &SplitFields<'_>) -> bool {
        self.taken != ring.used_index()
    }

    /// Returns whether the device wants a kick for the last `unkicked` published chains.
    #[inline]
    pub(crate) fn wants_kick(&self, ring: &SplitFields<'_>, unkicked: u16) -> bool {
        if self.event_idx {
            need_event(ring.available_event(), self.next, self.next.wrapping_sub(unkicked))
        } else {
            unkicked > 0 && ring.used_flags() & 1 == 0
        }
    }

    /// Asks the device for a call at the next completion.
    pub(crate) fn ask_for_call(&self, ring: &SplitFields<'_>) {
        ring.set_available_flags(0);
        ring.set_used_event(self.taken);
    }

    /// Tells the device that it need not call. With EVENT_IDX this holds for the next 65,535
    /// completions.
    pub(crate) fn refuse_calls(&self, ring: &SplitFields<'_>) {
        ring.set_available_flags(u16::from(!self.event_idx));
        ring.set_used_event(self.taken.wrapping_sub(1));
    }
}

/// Writes the two words of descriptor `index` of a table.
#[inline]
pub(crate) fn put(table: &[AtomicU64], index: usize, [addr, rest]: [u64; 2]) {
    table[2 * index].store(addr, Relaxed);
    table[2 * index + 1].store(rest, Relaxed);
}

/// Returns whether the other side, which has named `event`, wants a notification for the step from
/// `old` to `new` (virtio 1.2, 2.7.10).
#[inline]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_modulo_65536() {
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(need_event(0, 1, 0xfffe));
        assert!(!need_event(1, 1, 0xfffe));
        assert!(!need_event(0xfffd, 1, 0xfffe));
    }
}
