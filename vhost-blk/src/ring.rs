//! Split virtqueues (virtio 1.2, section 2.7): fetching chains, returning them, and suppressing
//! or wanting notifications.
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

use std::sync::atomic::{AtomicU16, Ordering, fence};

use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use crate::memory::GuestMemory;

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
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

// SAFETY: four integers without padding: any bytes are a value, and any value is bytes.
unsafe impl ByteValued for Desc {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct UsedElem {
    id: u32,
    len: u32,
}

// SAFETY: two integers without padding.
unsafe impl ByteValued for UsedElem {}

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
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    event_idx: bool,
    desc: VolatileSlice<'static>,
    avail: VolatileSlice<'static>,
    used: VolatileSlice<'static>,
}

// SAFETY: volatile slices are addresses; the memory they name is only accessed as volatile or
// atomic, and who may do so is settled by the queue's single owner.
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
            // SAFETY: `len` bytes of guest memory, which the caller promises stay mapped.
            Ok(unsafe { VolatileSlice::new(host, len) })
        };
        Ok(Self {
            size,
            event_idx,
            desc: part(addrs.desc, 16, DESC_BYTES * n)?,
            // Flags and index before the entries, an event word after them.
            avail: part(addrs.avail, 2, 4 + 2 * n + 2)?,
            used: part(addrs.used, 4, 4 + 8 * n + 2)?,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn word<'a>(part: &'a VolatileSlice<'static>, offset: usize) -> &'a AtomicU16 {
        // `new` checked the part's alignment, and offsets are even.
        part.get_atomic_ref::<AtomicU16>(offset).expect("offsets lie inside what `new` measured")
    }

    /// The driver's index: how many chains it has made available, modulo 2^16.
    #[inline]
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        // Acquire: the entries and descriptors that it counts are read after it.
        u16::from_le(Self::word(&self.avail, 2).load(Ordering::Acquire))
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
        let at = usize::from(index & (self.size - 1));
        u16::from_le(Self::word(&self.avail, 4 + 2 * at).load(Ordering::Relaxed))
    }

    /// What we last told the driver.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(Self::word(&self.used, 2).load(Ordering::Relaxed))
    }

    /// Puts a chain into position `index` of the used ring; seen by the driver once published.
    #[inline]
    pub fn put_used(&self, index: u16, head: u16, len: u32) {
        let at = usize::from(index & (self.size - 1));
        let elem = UsedElem { id: u32::from(head).to_le(), len: len.to_le() };
        let slot = self.used.get_ref::<UsedElem>(4 + 8 * at);
        slot.expect("positions lie inside what `new` measured").store(elem);
    }

    /// Tells the driver about all chains put before `index`.
    #[inline]
    pub fn publish_used(&self, index: u16) {
        // Release: the elements and the data are seen before the index.
        Self::word(&self.used, 2).store(index.to_le(), Ordering::Release);
    }

    /// Whether the driver wants a notification for chains `old..new` (section 2.7.7.2).
    #[inline]
    #[must_use]
    pub fn wants_call(&self, old: u16, new: u16) -> bool {
        // SeqCst: the index was published before the driver's wish is read. If the driver's store
        // of its wish comes first, we see it; if ours comes first, the driver, which looks at the
        // index after storing its wish, sees that.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = Self::word(&self.avail, 4 + 2 * usize::from(self.size));
            let event = u16::from_le(event.load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(Self::word(&self.avail, 0).load(Ordering::Relaxed));
            flags & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to kick, as the ring is polled. `seen` is our position; called again
    /// whenever [`SplitRing::kick_suppression_is_due`].
    pub fn suppress_kicks(&self, seen: u16) {
        if self.event_idx {
            let event = Self::word(&self.used, 4 + 8 * usize::from(self.size));
            event.store(seen.wrapping_add(AVAIL_EVENT_AHEAD).to_le(), Ordering::Relaxed);
        }
        Self::word(&self.used, 0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
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
        memory: &GuestMemory,
        head: u16,
        mut visit: impl FnMut(Buffer),
    ) -> Result<(), ChainError> {
        let mut table = Table { slice: self.desc, len: self.size.into(), indirect: false };
        let mut index = u32::from(head);
        let mut left = table.len;
        loop {
            if index >= table.len {
                return Err(ChainError::Index);
            }
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let desc = table.read(index);
            if desc.flags & DESC_F_INDIRECT != 0 {
                table = self.indirect(memory, &table, desc)?;
                (index, left) = (0, table.len);
                continue;
            }
            if desc.len == 0 {
                return Err(ChainError::Empty);
            }
            let write = desc.flags & DESC_F_WRITE != 0;
            visit(Buffer { gpa: desc.addr, len: desc.len, write });
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next.into();
        }
    }

    /// Opens an indirect table (section 2.7.5.3), which ends the chain that it is in.
    fn indirect(
        &self,
        memory: &GuestMemory,
        from: &Table,
        desc: Desc,
    ) -> Result<Table, ChainError> {
        if from.indirect || desc.flags & DESC_F_NEXT != 0 {
            return Err(ChainError::NestedIndirect);
        }
        let bytes = desc.len as usize;
        let len = desc.len / DESC_BYTES as u32;
        // A table longer than the ring is allowed by no driver (section 2.7.5.3.1).
        if len == 0 || !bytes.is_multiple_of(DESC_BYTES) || len > u32::from(self.size) {
            return Err(ChainError::IndirectLength);
        }
        let host = memory.range(desc.addr, bytes).ok_or(ChainError::Address)?;
        // SAFETY: `bytes` of guest memory; used in this walk only, within `memory`'s borrow.
        let slice = unsafe { VolatileSlice::new(host, bytes) };
        Ok(Table { slice, len, indirect: true })
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

/// The descriptor table that a walk is in.
struct Table {
    slice: VolatileSlice<'static>,
    len: u32,
    indirect: bool,
}

impl Table {
    #[inline]
    fn read(&self, index: u32) -> Desc {
        let desc = self.slice.get_ref::<Desc>(index as usize * DESC_BYTES);
        let desc = desc.expect("the index is below the table's length").load();
        Desc {
            addr: u64::from_le(desc.addr),
            len: u32::from_le(desc.len),
            flags: u16::from_le(desc.flags),
            next: u16::from_le(desc.next),
        }
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
