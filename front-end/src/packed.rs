//! The driver's side of a packed ring (virtio 1.2, 2.8), for any kind of request.
//!
//! `PackedFields` is the ring's memory, and `PackedDriver` the driver's state beside it. The user
//! of both decides what the descriptors refer to, and which buffer ids are free.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU64};

use crate::guest::Window;
use crate::split::{need_event, put};
use crate::words::words;

/// Descriptor flags: the wrap counter of the side that wrote the descriptor last.
pub(crate) const AVAILABLE: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;
/// Event flags: always, never, or at the position that stands beside them.
pub(crate) const EVENTS_ON: u16 = 0;
pub(crate) const EVENTS_OFF: u16 = 1;
pub(crate) const EVENTS_AT: u16 = 2;
/// The first position of both sides in SET_VRING_BASE's format: index 0, wrap counter 1.
pub const FIRST_BASE: u16 = 1 << 15;

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) at: u16,
    pub(crate) wrap: bool,
}

impl Position {
    pub(crate) const FIRST: Self = Self { at: 0, wrap: true };

    /// Advances by `n`, which is at most `size`.
    #[inline]
    pub(crate) fn advance(&mut self, n: u16, size: u16) {
        self.at += n;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// Returns whether flags show that the device has used the descriptor here.
    #[inline]
    pub(crate) fn is_used(self, flags: u16) -> bool {
        (flags & AVAILABLE != 0) == self.wrap && (flags & USED != 0) == self.wrap
    }

    /// Returns the position in the format of SET_VRING_BASE and of event suppression.
    fn base(self) -> u16 {
        self.at | if self.wrap { FIRST_BASE } else { 0 }
    }
}

/// A packed ring in guest memory. The other side may write it at any time.
///
/// It lies in the memory of a split [`crate::ring::Ring`], whose three parts are all large enough
/// for the descriptors, the driver's events and the device's events.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedFields<'a> {
    /// Two words for each descriptor.
    descriptors: &'a [AtomicU64],
    /// A position, and flags.
    ours: &'a [AtomicU16],
    theirs: &'a [AtomicU16],
    size: u16,
}

impl<'a> PackedFields<'a> {
    /// Makes a ring of `size` descriptors in these windows.
    pub(crate) fn new([descriptors, ours, theirs]: [&'a Window; 3], size: u16) -> Self {
        Self { descriptors: words(descriptors), ours: words(ours), theirs: words(theirs), size }
    }

    /// Returns the second word of the descriptor at `position`: length, buffer id and flags.
    #[inline]
    fn rest(&self, position: Position) -> &AtomicU64 {
        &self.descriptors[2 * usize::from(position.at) + 1]
    }
}

/// Descriptors that are written and not published yet.
#[derive(Debug)]
pub(crate) struct Batch {
    first: Position,
    /// The second word of the first descriptor; 0 if there is none.
    first_rest: u64,
}

/// The driver's positions in one packed ring.
///
/// No method has a fence between publishing and reading what the other side wants. The caller has a
/// fence, or reads again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedDriver {
    event_idx: bool,
    /// The position of the next descriptor to write.
    next: Position,
    /// The position of the next request that the device returns.
    used: Position,
}

impl PackedDriver {
    /// Makes a driver of an empty ring. `event_idx`: VIRTIO_RING_F_EVENT_IDX is negotiated.
    pub(crate) fn new(event_idx: bool) -> Self {
        Self { event_idx, next: Position::FIRST, used: Position::FIRST }
    }

    /// Begins to write descriptors.
    #[inline]
    pub(crate) fn begin(&self) -> Batch {
        Batch { first: self.next, first_rest: 0 }
    }

    /// Writes the next descriptor: its two words, without the flags that depend on the position.
    #[inline]
    pub(crate) fn put(
        &mut self,
        ring: &PackedFields<'_>,
        batch: &mut Batch,
        [addr, rest]: [u64; 2],
    ) {
        let state = if self.next.wrap { AVAILABLE } else { USED };
        let rest = rest | u64::from(state) << 48;
        ring.descriptors[2 * usize::from(self.next.at)].store(addr, Relaxed);
        // The device waits for the first descriptor's flags, and reads no other descriptor before.
        if batch.first_rest == 0 {
            batch.first_rest = rest;
        } else {
            ring.rest(self.next).store(rest, Relaxed);
        }
        self.next.advance(1, ring.size);
    }

    /// Makes the descriptors of `batch`, at least one, available to the device, with all data that
    /// was written before.
    #[inline]
    pub(crate) fn publish(&self, ring: &PackedFields<'_>, batch: Batch) {
        // Release: a device that sees these flags sees the headers and all other descriptors.
        ring.rest(batch.first).store(batch.first_rest, Release);
    }

    /// Returns the next request that the device has used: length and buffer id in the lower 48
    /// bits. The data that the device wrote before is visible.
    #[inline]
    pub(crate) fn given_back(&self, ring: &PackedFields<'_>) -> Option<u64> {
        // Acquire: pairs with the device's store of the flags, which follows all its other writes.
        let rest = ring.rest(self.used).load(Acquire);
        self.used.is_used((rest >> 48) as u16).then_some(rest)
    }

    /// Takes the request that the device has used, which has `parts` descriptors in the ring.
    #[inline]
    pub(crate) fn take(&mut self, ring: &PackedFields<'_>, parts: u16) {
        self.used.advance(parts, ring.size);
    }

    /// Returns whether the device wants a kick for the last `unkicked` published descriptors.
    #[inline]
    pub(crate) fn wants_kick(&self, ring: &PackedFields<'_>, unkicked: u16) -> bool {
        let [named, flags] = [0, 1].map(|i: usize| ring.theirs[i].load(Relaxed));
        unkicked > 0
            && match flags & 3 {
                EVENTS_OFF => false,
                EVENTS_AT if self.event_idx => {
                    let mut event = named & !FIRST_BASE;
                    if (named & FIRST_BASE != 0) != self.next.wrap {
                        // The event's position is one round behind.
                        event = event.wrapping_sub(ring.size);
                    }
                    need_event(event, self.next.at, self.next.at.wrapping_sub(unkicked))
                }
                _ => true,
            }
    }

    /// Asks the device for a call at the next completion.
    pub(crate) fn ask_for_call(&self, ring: &PackedFields<'_>) {
        ring.ours[0].store(self.used.base(), Relaxed);
        let flags = if self.event_idx { EVENTS_AT } else { EVENTS_ON };
        // Release: a device that sees these flags sees the position that they refer to.
        ring.ours[1].store(flags, Release);
    }

    /// Tells the device that it need not call.
    pub(crate) fn refuse_calls(&self, ring: &PackedFields<'_>) {
        ring.ours[1].store(EVENTS_OFF, Relaxed);
    }

    /// Returns how far the driver has taken used descriptors: the position, with its wrap counter
    /// above.
    pub(crate) fn base(&self) -> u16 {
        self.used.base()
    }
}

/// Returns the two words of a descriptor. The flags are without those of the position.
#[inline]
pub(crate) fn descriptor(addr: u64, len: u32, id: u16, flags: u16) -> [u64; 2] {
    [addr, u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48]
}

/// Writes entry `index` of an indirect table. Entries follow one another, without a NEXT flag.
pub(crate) fn put_entry(table: &[AtomicU64], index: usize, addr: u64, len: u32, flags: u16) {
    put(table, index, descriptor(addr, len, 0, flags));
}
