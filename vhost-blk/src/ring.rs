//! Virtqueues: fetching chains, returning them, and suppressing or wanting notifications.
//!
//! [`split`] and [`packed`] are the two layouts (virtio 1.2, sections 2.7 and 2.8); what a queue's
//! owner needs of either is the trait [`Ring`].
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

pub mod packed;
pub mod split;

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::dirty_log::DirtyLog;
use crate::memory::{GuestMemory, Near};

pub use packed::{KeptChain, PackedChain, PackedRing};
pub use split::{SplitChain, SplitRing};

/// Largest ring that is accepted: the most that virtio has (sections 2.7 and 2.8.10.1).
pub const RING_SIZE_MAX: u16 = 1 << 15;

/// Descriptors that an indirect table may have, whatever the ring's size is. No driver may make it
/// longer than the ring (section 2.7.5.3.1), but some do: header, status and 1,024 pieces of data
/// are accepted.
const INDIRECT_MAX: u32 = 1026;

/// Descriptors of the ring that a chain may have, in a ring of any size: several times what any driver
/// makes, and few enough that reading them all costs neighbours nothing that they notice.
pub(crate) const CHAIN_MAX: u16 = 4096;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
/// Bytes of a descriptor, in either layout.
const DESC_BYTES: usize = 16;

/// A virtqueue as its owner uses it, whichever layout it has.
///
/// A *position* is where a ring stands. Split: a free-running index. Packed: the index of a
/// descriptor in the lower 15 bits, and the wrap counter in the highest. Only [`Ring::advance`]
/// computes with positions.
pub trait Ring {
    /// The position `by` places further: split, so many chains; packed, so many descriptors.
    fn advance(&self, position: u16, by: u16) -> u16;

    /// How many chains wait at `position`, at least. Split: all that do. Packed: 0 or 1, as only a
    /// chain's end tells where the next one begins.
    ///
    /// # Errors
    /// Split: more than the ring has room for.
    fn pending(&self, position: u16) -> Result<u16, RingError>;

    /// What changes when the next chain is made available at `position`, and whether one is already.
    fn look(&self, position: u16) -> Look;

    /// Has the processor fetch what the next chains will be read from, for one that likely begins
    /// at descriptor `head` (split) and in any case is at `position`.
    fn prefetch_avail(&self, position: u16, head: u16);

    /// Has the processor fetch the place of the used ring at `position` for writing.
    fn prefetch_used(&self, position: u16);

    /// Puts a chain into the used ring at `position`, to be seen by the driver once everything from
    /// `from` on is published. `id` is the head (split) or the buffer id (packed).
    fn put_used(&self, from: u16, position: u16, id: u16, len: u32);

    /// Tells the driver about all that was put from `from` up to `to`, which is something.
    fn publish_used(&self, from: u16, to: u16);

    /// Marks what [`Ring::publish_used`] and its puts have written.
    fn log_used(&self, log: &DirtyLog, from: u16, to: u16);

    /// Marks what [`Ring::suppress_kicks`] and [`Ring::want_kicks`] write.
    fn log_events(&self, log: &DirtyLog);

    /// Whether the driver wants a notification for what was published from `old` up to `new`.
    fn wants_call(&self, old: u16, new: u16) -> bool;

    /// Asks the driver not to kick, as the ring is polled. `position` is ours; called again whenever
    /// [`Ring::kick_suppression_is_due`].
    fn suppress_kicks(&self, position: u16);

    /// Asks the driver to kick for the next chain at `position`, and says whether one has been made
    /// available meanwhile, for which no kick may come: then it has to be taken first.
    fn want_kicks(&self, position: u16) -> bool;

    /// Whether moving from `old` to `new` needs [`Ring::suppress_kicks`] again.
    fn kick_suppression_is_due(&self, old: u16, new: u16) -> bool;
}

/// A chain of buffers that can be walked.
pub trait Chained {
    /// What else there is to know of it afterwards.
    type Taken;

    /// Calls `visit` with each buffer in order, until it says that it wants no more. Each descriptor is
    /// read once, and there is an end to them whatever the guest does. Says whether all of the chain
    /// was seen and is well-formed; if not, `visit` has seen the part before the defect.
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken);
}

/// What to look at until the next visit of a ring: see [`Ring::look`].
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// A word in the ring's memory.
    pub cell: *const AtomicU16,
    /// What it is as long as there is nothing, as it is in memory.
    pub seen: u16,
    /// There is something already.
    pub due: bool,
}

/// A ring of either layout.
#[derive(Debug)]
pub enum AnyRing {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

impl AnyRing {
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
        layout: Layout,
    ) -> Result<Self, RingError> {
        let event_idx = layout.event_idx;
        if layout.packed {
            // SAFETY: the caller says so.
            unsafe { PackedRing::new(memory, size, addrs, event_idx) }.map(Self::Packed)
        } else {
            // SAFETY: the caller says so.
            unsafe { SplitRing::new(memory, size, addrs, event_idx) }.map(Self::Split)
        }
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.size(),
            Self::Packed(ring) => ring.size(),
        }
    }

    /// For where a call costs nothing that matters.
    pub(crate) fn as_dyn(&self) -> &dyn Ring {
        match self {
            Self::Split(ring) => ring,
            Self::Packed(ring) => ring,
        }
    }
}

/// What was negotiated about rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
}

/// The host address of a part of a ring, given by guest-physical address and length. The
/// guest-physical and the host address have to be multiples of `align`.
fn part(memory: &GuestMemory, (gpa, len): (u64, usize), align: u64) -> Result<*mut u8, RingError> {
    if !gpa.is_multiple_of(align) {
        return Err(RingError::Alignment(gpa));
    }
    let host = memory.range(gpa, len).ok_or(RingError::Address(gpa))?;
    if !(host as u64).is_multiple_of(align) {
        return Err(RingError::Alignment(gpa));
    }
    Ok(host)
}

/// A descriptor as the guest wrote it. Split: `tag` is the next descriptor's index and `flags` come
/// before it. Packed: `tag` is the buffer id, and `flags` come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// VIRTQ_DESC_F_*.
    pub flags: u16,
    /// Split: next. Packed: buffer id.
    pub tag: u16,
}

impl Desc {
    /// A split ring's, from its two words, little-endian.
    #[inline]
    fn split((addr, rest): (u64, u64)) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            tag: (rest >> 48) as u16,
        }
    }

    /// A packed ring's, from its two words, little-endian.
    #[inline]
    fn packed(words: (u64, u64)) -> Self {
        let split = Self::split(words);
        Self { flags: split.tag, tag: split.flags, ..split }
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
    /// a packed ring's buffer id is not below its size, or a chain has no end or a far one
    #[error("chain at {0:#x} has no end, a far one, or a bad buffer id")]
    Chain(u16),
    /// the available index ran ahead by more than the ring's size
    #[error("available index jumped from {from} to {to}")]
    AvailIndex {
        /// What we had seen.
        from: u16,
        /// What the guest says.
        to: u16,
    },
}

/// Guest-physical addresses and lengths of the parts of a ring: descriptors, what the driver writes,
/// what the device writes.
pub(crate) fn parts(size: u16, addrs: RingAddrs, packed: bool) -> [(u64, usize); 3] {
    if packed { PackedRing::parts(size, addrs) } else { SplitRing::parts(size, addrs) }
}

/// Whether a ring of `size` at `addrs` does, in `memory`.
///
/// # Errors
/// A size or an address that does not do.
pub fn check(
    memory: &GuestMemory,
    size: u16,
    addrs: RingAddrs,
    layout: Layout,
) -> Result<(), RingError> {
    // SAFETY: the ring is dropped at once, while `memory` is borrowed.
    unsafe { AnyRing::new(memory, size, addrs, layout) }.map(drop)
}

/// A descriptor table in guest memory that is mapped for as long as it is used.
struct Table {
    desc: *const AtomicU64,
    len: u32,
    indirect: bool,
}

impl Table {
    /// Opens the indirect table (sections 2.7.5.3 and 2.8.7) that `desc` of `self` names, which ends
    /// the chain that it is in.
    #[inline]
    fn open(&self, near: &mut Near<'_>, desc: Desc) -> Result<Self, ChainError> {
        if self.indirect || desc.flags & DESC_F_NEXT != 0 {
            return Err(ChainError::NestedIndirect);
        }
        let bytes = desc.len as usize;
        let len = desc.len / DESC_BYTES as u32;
        if len == 0 || !bytes.is_multiple_of(DESC_BYTES) || len > INDIRECT_MAX {
            return Err(ChainError::IndirectLength);
        }
        let (host, room) = near.translate(desc.addr).ok_or(ChainError::Address)?;
        if (bytes as u64) > room {
            return Err(ChainError::Address);
        }
        Ok(Self { desc: host.cast(), len, indirect: true })
    }

    /// The two words of a descriptor.
    ///
    /// # Safety
    /// The index is below the table's length.
    #[inline]
    unsafe fn read(&self, index: u32) -> (u64, u64) {
        let at = self.desc.wrapping_add(2 * index as usize);
        if !at.is_aligned() {
            // SAFETY: the caller says so.
            return unsafe { Self::read_odd(at.cast_mut().cast()) };
        }
        // SAFETY: the table has `len` descriptors; this one is aligned to its words.
        let first = unsafe { &*at };
        // SAFETY: as above: a descriptor has two words.
        let second = unsafe { &*at.wrapping_add(1) };
        (first.load(Ordering::Relaxed), second.load(Ordering::Relaxed))
    }

    /// No driver does so, but an indirect table may lie anywhere (section 2.7.5.3).
    ///
    /// # Safety
    /// `at` is a descriptor in guest memory.
    #[cold]
    unsafe fn read_odd(at: *mut u8) -> (u64, u64) {
        let mut words = [0; 2];
        // SAFETY: the caller says so.
        let slice: VolatileSlice<'_> = unsafe { VolatileSlice::new(at, DESC_BYTES) };
        slice.copy_to(&mut words[..]);
        (words[0], words[1])
    }
}

/// One buffer of a chain. Not checked against guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes; may be zero.
    pub len: u32,
    /// Whether it is ours to write (and not to read).
    pub write: bool,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is out of range.
    Index,
    /// More descriptors than the table has, or than a chain may have.
    Loop,
    /// Whoever looked at it wanted no more.
    Left,
    /// An indirect table within another, or one that does not end its chain.
    NestedIndirect,
    /// An indirect table that is empty, no multiple of a descriptor, or too long.
    IndirectLength,
    /// An indirect table that is not in guest memory.
    Address,
}
