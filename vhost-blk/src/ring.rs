//! Split virtqueues (virtio 1.2, section 2.7): fetching chains, returning them, and suppressing
//! or wanting notifications.
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use qsbr::handshake::{full_fence, say_then_look};
use vm_memory::VolatileSlice;

use crate::cache;
use crate::memory::{GuestMemory, Near};

/// Largest ring that is accepted; SPDK's limit.
pub const RING_SIZE_MAX: u16 = 1024;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Bytes of a descriptor.
const DESC_BYTES: usize = 16;

/// With EVENT_IDX a guest kicks when it passes `avail_event`. A polling device keeps that this far
/// ahead and moves it before the guest can get there.
const AVAIL_EVENT_AHEAD: u16 = 1 << 15;

/// A descriptor as the guest wrote it.
#[derive(Clone, Copy, Debug)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    /// From its two words, little-endian.
    #[inline]
    fn new(addr: u64, rest: u64) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// Where a ring's parts are, guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring, written by the driver.
    pub avail: u64,
    /// Used ring, written by us.
    pub used: u64,
}

/// Why a ring cannot be used, or is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// the size is zero, no power of two, or above [`RING_SIZE_MAX`]
    #[error("ring size {0} is not a power of two up to {RING_SIZE_MAX}")]
    Size(u32),
    /// a part is not aligned as section 2.7 demands
    #[error("ring address {0:#x} is not aligned")]
    Alignment(u64),
    /// a part does not lie in one memory region
    #[error("ring address {0:#x} is not in guest memory")]
    Address(u64),
    /// the available index ran ahead by more than the ring's size
    #[error("available index jumped from {from} to {to}")]
    AvailIndex {
        /// What we had seen.
        from: u16,
        /// What the guest says.
        to: u16,
    },
}

/// A split ring in our mapping of the guest's memory.
///
/// The guest writes there whenever it likes, so each field is an atomic, loaded once where it is
/// used. Positions are masked and indices checked before they become addresses.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    event_idx: bool,
    /// `size` descriptors of two words each.
    desc: *const AtomicU64,
    /// Flags, index, `size` heads, and the event index.
    avail: *const AtomicU16,
    /// The same as halves: flags, index, `size` elements of two words each, and the event index.
    used: *const AtomicU16,
}

// SAFETY: addresses in guest memory, which is only accessed as atomics; who may do so is settled by
// the queue's single owner.
unsafe impl Send for SplitRing {}
// SAFETY: as above.
unsafe impl Sync for SplitRing {}

impl SplitRing {
    /// Checks the ring's parts and finds them in `memory`.
    ///
    /// # Errors
    /// A size or an address that does not do.
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
        let n = usize::from(size);
        let part = |gpa: u64, align: u64, len: usize| {
            if !gpa.is_multiple_of(align) {
                return Err(RingError::Alignment(gpa));
            }
            let host = memory.range(gpa, len).ok_or(RingError::Address(gpa))?;
            if !(host as u64).is_multiple_of(align) {
                return Err(RingError::Alignment(gpa));
            }
            Ok(host)
        };
        Ok(Self {
            size,
            event_idx,
            desc: part(addrs.desc, 16, DESC_BYTES * n)?.cast(),
            // Flags and index before the entries, an event word after them.
            avail: part(addrs.avail, 2, 4 + 2 * n + 2)?.cast(),
            used: part(addrs.used, 4, 4 + 8 * n + 2)?.cast(),
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// A position in the ring's arrays.
    #[inline]
    fn at(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// A half-word of the available ring: 0 flags, 1 index, 2.. heads, `2 + size` the event index.
    #[inline]
    fn avail_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: `new` found so many half-words at this aligned address, in memory that outlives
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

    /// Where the driver's index is: for a reactor that looks at many rings in turn.
    #[inline]
    #[must_use]
    pub fn avail_idx_cell(&self) -> &AtomicU16 {
        self.avail_word(1)
    }

    /// The driver's index: how many chains it has made available, modulo 2^16.
    #[inline]
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        // Acquire: the entries and descriptors that it counts are read after it.
        u16::from_le(self.avail_idx_cell().load(Ordering::Acquire))
    }

    /// How many chains wait beyond `seen`.
    ///
    /// # Errors
    /// More than the ring has room for.
    #[inline]
    pub fn pending(&self, seen: u16) -> Result<u16, RingError> {
        let to = self.avail_idx();
        let pending = to.wrapping_sub(seen);
        if pending > self.size {
            return Err(RingError::AvailIndex { from: seen, to });
        }
        Ok(pending)
    }

    /// The head of the chain at position `index` of the available ring; may be out of range.
    #[inline]
    #[must_use]
    pub fn head(&self, index: u16) -> u16 {
        u16::from_le(self.avail_word(2 + self.at(index)).load(Ordering::Relaxed))
    }

    /// Has the processor fetch the descriptor of `head`, which may be out of range.
    #[inline]
    pub fn prefetch_desc(&self, head: u16) {
        cache::prefetch_read(self.desc.wrapping_add(2 * self.at(head)).cast());
    }

    /// Has the processor fetch the used element at `index` for writing, unless it lies where the
    /// driver looks at the used index, and taking it away would only send it to and fro.
    #[inline]
    pub fn prefetch_used(&self, index: u16) {
        let at = self.used.wrapping_add(2 + 4 * self.at(index));
        if (at as usize ^ self.used as usize) >= cache::LINE {
            cache::prefetch_write(at.cast());
        }
    }

    /// What we last told the driver.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Relaxed))
    }

    /// Puts a chain into position `index` of the used ring; seen by the driver once published.
    #[inline]
    pub fn put_used(&self, index: u16, head: u16, len: u32) {
        let elem = self.used.wrapping_add(2 + 4 * self.at(index)).cast::<AtomicU32>();
        // SAFETY: the position is masked; `new` found all elements there, aligned to four bytes.
        let id_cell = unsafe { &*elem };
        // SAFETY: as above: an element has two words.
        let len_cell = unsafe { &*elem.wrapping_add(1) };
        id_cell.store(u32::from(head).to_le(), Ordering::Relaxed);
        len_cell.store(len.to_le(), Ordering::Relaxed);
    }

    /// Tells the driver about all chains put before `index`.
    #[inline]
    pub fn publish_used(&self, index: u16) {
        // Release: the elements and the data are seen before the index.
        self.used_word(1).store(index.to_le(), Ordering::Release);
    }

    /// Whether the driver wants a notification for chains `old..new` (section 2.7.7.2).
    #[inline]
    #[must_use]
    pub fn wants_call(&self, old: u16, new: u16) -> bool {
        // The index was published before the driver's wish is read. If the driver's store of its
        // wish comes first, we see it; if ours comes first, the driver, which looks at the index
        // after storing its wish, sees that.
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

    /// Asks the driver not to kick, as the ring is polled. `seen` is our position; called again
    /// whenever [`SplitRing::kick_suppression_is_due`].
    pub fn suppress_kicks(&self, seen: u16) {
        if self.event_idx {
            let event = seen.wrapping_add(AVAIL_EVENT_AHEAD).to_le();
            self.used_word(2 + 4 * usize::from(self.size)).store(event, Ordering::Relaxed);
        }
        self.used_word(0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver to kick for the next chain after `seen`, and says whether one has been made
    /// available meanwhile, for which no kick may come: then it has to be taken first.
    #[must_use]
    pub fn want_kicks(&self, seen: u16) -> bool {
        let say = || {
            if self.event_idx {
                let event = self.used_word(2 + 4 * usize::from(self.size));
                event.store(seen.to_le(), Ordering::Relaxed);
            }
            self.used_word(0).store(0, Ordering::Relaxed);
        };
        say_then_look(say, || self.avail_idx() != seen)
    }

    /// Whether moving from `old` to `new` needs [`SplitRing::suppress_kicks`] again.
    #[inline]
    #[must_use]
    pub fn kick_suppression_is_due(&self, old: u16, new: u16) -> bool {
        const STEP: u16 = AVAIL_EVENT_AHEAD / 4;
        self.event_idx && old / STEP != new / STEP
    }

    /// Walks the chain at `head`, calling `visit` with each buffer in order.
    ///
    /// Each descriptor is read once. The walk ends after as many descriptors as the table has, so
    /// a loop in the chain is an error and not a trap.
    ///
    /// # Errors
    /// The chain is malformed; `visit` has seen the part before the defect.
    #[inline]
    pub fn walk(
        &self,
        near: &mut Near<'_>,
        head: u16,
        mut visit: impl FnMut(&mut Near<'_>, Buffer),
    ) -> Result<(), ChainError> {
        let mut table = Table { desc: self.desc, len: self.size.into(), indirect: false };
        let mut index = u32::from(head);
        let mut left = table.len;
        loop {
            if index >= table.len {
                return Err(ChainError::Index);
            }
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            // SAFETY: the index was just checked.
            let desc = unsafe { table.read(index) };
            if desc.flags & DESC_F_INDIRECT != 0 {
                table = self.indirect(near, &table, desc)?;
                (index, left) = (0, table.len);
                continue;
            }
            if desc.len == 0 {
                return Err(ChainError::Empty);
            }
            let write = desc.flags & DESC_F_WRITE != 0;
            visit(near, Buffer { gpa: desc.addr, len: desc.len, write });
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next.into();
        }
    }

    /// Opens an indirect table (section 2.7.5.3), which ends the chain that it is in.
    #[inline]
    fn indirect(&self, near: &mut Near<'_>, from: &Table, desc: Desc) -> Result<Table, ChainError> {
        if from.indirect || desc.flags & DESC_F_NEXT != 0 {
            return Err(ChainError::NestedIndirect);
        }
        let bytes = desc.len as usize;
        let len = desc.len / DESC_BYTES as u32;
        // A table longer than the ring is allowed by no driver (section 2.7.5.3.1).
        if len == 0 || !bytes.is_multiple_of(DESC_BYTES) || len > u32::from(self.size) {
            return Err(ChainError::IndirectLength);
        }
        let (host, room) = near.translate(desc.addr).ok_or(ChainError::Address)?;
        if (bytes as u64) > room {
            return Err(ChainError::Address);
        }
        Ok(Table { desc: host.cast(), len, indirect: true })
    }
}

/// Whether a ring of `size` at `addrs` does, in `memory`.
///
/// # Errors
/// A size or an address that does not do.
pub fn check(memory: &GuestMemory, size: u16, addrs: RingAddrs) -> Result<(), RingError> {
    // SAFETY: the ring is dropped at once, while `memory` is borrowed.
    unsafe { SplitRing::new(memory, size, addrs, false) }.map(drop)
}

/// The descriptor table that a walk is in, in guest memory that is mapped for as long as the walk.
struct Table {
    desc: *const AtomicU64,
    len: u32,
    indirect: bool,
}

impl Table {
    /// # Safety
    /// The index is below the table's length.
    #[inline]
    unsafe fn read(&self, index: u32) -> Desc {
        let at = self.desc.wrapping_add(2 * index as usize);
        if !at.is_aligned() {
            // SAFETY: the caller says so.
            return unsafe { Self::read_odd(at.cast_mut().cast()) };
        }
        // SAFETY: the table has `len` descriptors; this one is aligned to its words.
        let first = unsafe { &*at };
        // SAFETY: as above: a descriptor has two words.
        let second = unsafe { &*at.wrapping_add(1) };
        Desc::new(first.load(Ordering::Relaxed), second.load(Ordering::Relaxed))
    }

    /// No driver does so, but an indirect table may lie anywhere (section 2.7.5.3).
    ///
    /// # Safety
    /// `at` is a descriptor in guest memory.
    #[cold]
    unsafe fn read_odd(at: *mut u8) -> Desc {
        let mut words = [0; 2];
        // SAFETY: the caller says so.
        let slice: VolatileSlice<'_> = unsafe { VolatileSlice::new(at, DESC_BYTES) };
        slice.copy_to(&mut words[..]);
        Desc::new(words[0], words[1])
    }
}

/// One buffer of a chain. Not checked against guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes, not zero.
    pub len: u32,
    /// Whether it is ours to write (and not to read).
    pub write: bool,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is out of range.
    Index,
    /// More descriptors than the table has.
    Loop,
    /// A buffer of no bytes.
    Empty,
    /// An indirect table within another, or one that does not end its chain.
    NestedIndirect,
    /// An indirect table that is empty, no multiple of a descriptor, or longer than the ring.
    IndirectLength,
    /// An indirect table that is not in guest memory.
    Address,
}

#[cfg(test)]
mod tests;
