//! Split virtqueues (virtio 1.2, section 2.7).
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use guest_memory::{DirtyLog, GuestMemory, Near};
use qsbr::handshake::{full_fence, store_then_load};

use crate::cache;
use crate::desc::{
    Buffer, CHAIN_MAX, ChainError, DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc,
    RING_SIZE_MAX, Table,
};
use crate::ring::{Chained, Ring, RingAddrs, RingError, RingHint, part};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// With EVENT_IDX, a guest kicks when it passes `avail_event`. A polling device keeps `avail_event`
/// this far ahead, and moves it before the guest can reach it.
const AVAIL_EVENT_AHEAD: u16 = 1 << 15;

/// A split ring in guest memory, as this process maps it.
///
/// The guest may write there at any time, so each field is an atomic, and is loaded once for each
/// use. Positions are masked and indices are checked before they become addresses.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    event_idx: bool,
    /// `size` descriptors of two words each.
    desc: *const AtomicU64,
    /// Flags, index, `size` heads, and the event index.
    avail: *const AtomicU16,
    /// An array of half-words: flags, index, `size` elements of two words each, and the event
    /// index.
    used: *const AtomicU16,
    /// Guest-physical address of the used ring.
    used_gpa: u64,
}

// SAFETY: addresses in guest memory, which is only accessed as atomics. The queue's single owner
// determines who accesses it.
unsafe impl Send for SplitRing {}
// SAFETY: as above.
unsafe impl Sync for SplitRing {}

impl SplitRing {
    /// Validates the ring's addresses against `memory`, and creates the ring.
    ///
    /// # Errors
    /// The size or an address is invalid.
    ///
    /// # Safety
    /// `memory` outlives the ring.
    pub unsafe fn new(
        memory: &GuestMemory,
        size: u16,
        addrs: RingAddrs,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::Size(size.into()));
        }
        let [desc, avail, used] = Self::parts(size, addrs);
        Ok(Self {
            size,
            event_idx,
            desc: part(memory, desc, 16)?.cast(),
            avail: part(memory, avail, 2)?.cast(),
            used: part(memory, used, 4)?.cast(),
            used_gpa: addrs.used,
        })
    }

    /// Addresses and lengths of the ring's parts.
    pub(crate) fn parts(size: u16, addrs: RingAddrs) -> [(u64, usize); 3] {
        let n = usize::from(size);
        // Flags and index come before the entries, and the event index after them.
        let (avail, used) = ((addrs.avail, 4 + 2 * n + 2), (addrs.used, 4 + 8 * n + 2));
        [(addrs.desc, DESC_BYTES * n), avail, used]
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The index of a position in the ring's arrays.
    #[inline]
    fn at(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// A half-word of the available ring: 0 flags, 1 index, 2.. heads, `2 + size` the event index.
    #[inline]
    fn avail_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: `new` found that many half-words at this aligned address, in memory that outlives
        // the ring.
        unsafe { &*self.avail.wrapping_add(word) }
    }

    /// A half-word of the used ring: 0 flags, 1 index, `2 + 4 * size` the event index.
    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + 4 * usize::from(self.size));
        // SAFETY: as for `avail_word`.
        unsafe { &*self.used.wrapping_add(word) }
    }

    /// The cell of the driver's available index, for a reactor that polls many rings.
    #[inline]
    #[must_use]
    pub fn avail_idx_cell(&self) -> &AtomicU16 {
        self.avail_word(1)
    }

    /// The driver's available index: the number of chains that it has made available, modulo 2^16.
    #[inline]
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        // Acquire: the entries and descriptors that the index counts are read after it.
        u16::from_le(self.avail_idx_cell().load(Ordering::Acquire))
    }

    /// The head of the chain at position `index` of the available ring. It may be out of range.
    #[inline]
    #[must_use]
    pub fn head(&self, index: u16) -> u16 {
        u16::from_le(self.avail_word(2 + self.at(index)).load(Ordering::Relaxed))
    }

    /// Prefetches the descriptor of `head`, which may be out of range.
    #[inline]
    pub fn prefetch_desc(&self, head: u16) {
        cache::prefetch_read(self.desc.wrapping_add(2 * self.at(head)).cast());
    }

    /// The used index that was published last.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Relaxed))
    }

    /// Walks the chain at `head`. Calls `visit` with each buffer in order, until `visit` returns
    /// false.
    ///
    /// Each descriptor is read once. The walk ends after as many descriptors as the table has, or
    /// as a chain may have. A loop in the chain is therefore an error, and never an endless walk.
    ///
    /// # Errors
    /// The chain is malformed; `visit` has seen the part before the defect.
    #[inline]
    pub fn walk(
        &self,
        near: &mut Near<'_>,
        head: u16,
        mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> Result<(), ChainError> {
        let mut table = Table { desc: self.desc, len: self.size.into(), indirect: false };
        let mut index = u32::from(head);
        let mut left = table.len.min(CHAIN_MAX.into());
        loop {
            if index >= table.len {
                return Err(ChainError::Index);
            }
            // SAFETY: the index was just checked.
            let desc = Desc::split(unsafe { table.read(index) });
            if desc.flags & DESC_F_INDIRECT != 0 {
                table = table.open(near, desc)?;
                (index, left) = (0, table.len);
                continue;
            }
            let write = desc.flags & DESC_F_WRITE != 0;
            if !visit(near, Buffer { gpa: desc.addr, len: desc.len, write }) {
                return Err(ChainError::Stopped);
            }
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            // Not below zero, because the table has at least one descriptor.
            left -= 1;
            if left == 0 {
                return Err(ChainError::Loop);
            }
            index = desc.tag.into();
        }
    }
}

/// The chain at a head of the available ring.
#[derive(Clone, Copy, Debug)]
pub struct SplitChain<'r> {
    /// The ring.
    pub ring: &'r SplitRing,
    /// The index of the first descriptor. It may be out of range.
    pub head: u16,
}

impl Chained for SplitChain<'_> {
    type Taken = ();

    #[inline(always)]
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken) {
        (self.ring.walk(near, self.head, visit).is_ok(), ())
    }
}

impl Ring for SplitRing {
    #[inline]
    fn advance(&self, position: u16, by: u16) -> u16 {
        position.wrapping_add(by)
    }

    #[inline]
    fn pending(&self, position: u16) -> Result<u16, RingError> {
        let to = self.avail_idx();
        let pending = to.wrapping_sub(position);
        if pending > self.size {
            return Err(RingError::AvailIndex { from: position, to });
        }
        Ok(pending)
    }

    #[inline]
    fn hint(&self, position: u16) -> RingHint {
        RingHint { cell: self.avail_word(1), seen: position.to_le(), due: false }
    }

    #[inline]
    fn prefetch_avail(&self, _position: u16, head: u16) {
        self.prefetch_desc(head);
    }

    /// Prefetches nothing in the line of the used index: the driver polls that line, and taking it
    /// away early would only move it back and forth.
    #[inline]
    fn prefetch_used(&self, position: u16) {
        let at = self.used.wrapping_add(2 + 4 * self.at(position));
        if (at as usize ^ self.used as usize) >= cache::LINE {
            cache::prefetch_write(at.cast());
        }
    }

    #[inline]
    fn put_used(&self, _from: u16, position: u16, head: u16, len: u32) {
        let elem = self.used.wrapping_add(2 + 4 * self.at(position)).cast::<AtomicU32>();
        // SAFETY: the position is masked, and `new` found all elements there, aligned to four
        // bytes.
        let id_cell = unsafe { &*elem };
        // SAFETY: as above; an element has two words.
        let len_cell = unsafe { &*elem.wrapping_add(1) };
        id_cell.store(u32::from(head).to_le(), Ordering::Relaxed);
        len_cell.store(len.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn publish_used(&self, _from: u16, to: u16) {
        // Release: the driver sees the elements and the data before the index.
        self.used_word(1).store(to.to_le(), Ordering::Release);
    }

    fn log_used(&self, log: &DirtyLog, from: u16, to: u16) {
        let first = self.at(from);
        let count = usize::from(to.wrapping_sub(from));
        let before_end = count.min(usize::from(self.size) - first);
        let elements = |at: usize, count: usize| {
            log.mark(self.used_gpa + 4 + 8 * at as u64, 8 * count as u64);
        };
        elements(first, before_end);
        elements(0, count - before_end);
        log.mark(self.used_gpa, 4);
    }

    fn log_events(&self, log: &DirtyLog) {
        log.mark(self.used_gpa, 2);
        log.mark(self.used_gpa + 4 + 8 * u64::from(self.size), 2);
    }

    /// Virtio 1.2, section 2.7.7.2.
    #[inline]
    fn wants_call(&self, old: u16, new: u16) -> bool {
        // The fence orders the publication of the index before the load of the driver's event index
        // or flags. If the driver's store of these comes first, the device sees it. If the
        // publication comes first, the driver sees it, because it loads the used index after its
        // store.
        full_fence();
        if self.event_idx {
            let event = self.avail_word(2 + usize::from(self.size));
            let event = u16::from_le(event.load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.avail_word(0).load(Ordering::Relaxed));
            flags & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    fn suppress_kicks(&self, position: u16) {
        if self.event_idx {
            let event = position.wrapping_add(AVAIL_EVENT_AHEAD).to_le();
            self.used_word(2 + 4 * usize::from(self.size)).store(event, Ordering::Relaxed);
        }
        self.used_word(0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
    }

    fn want_kicks(&self, position: u16) -> bool {
        let store = || {
            if self.event_idx {
                let event = self.used_word(2 + 4 * usize::from(self.size));
                event.store(position.to_le(), Ordering::Relaxed);
            }
            self.used_word(0).store(0, Ordering::Relaxed);
        };
        store_then_load(store, || self.avail_idx() != position)
    }

    #[inline]
    fn kick_suppression_is_due(&self, old: u16, new: u16) -> bool {
        const STEP: u16 = AVAIL_EVENT_AHEAD / 4;
        self.event_idx && old / STEP != new / STEP
    }
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
