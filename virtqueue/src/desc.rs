//! Descriptors, descriptor tables, and the buffers that descriptors describe.
#![expect(unsafe_code, reason = "descriptors are shared with the guest")]

use std::sync::atomic::{AtomicU64, Ordering};

use guest_memory::Near;
use vm_memory::VolatileSlice;

/// Maximum size of a ring, the limit of virtio (sections 2.7 and 2.8.10.1).
pub const RING_SIZE_MAX: u16 = 1 << 15;

/// Maximum number of descriptors in an indirect table, for a ring of any size. A driver must not
/// make a table longer than the ring (section 2.7.5.3.1), but some drivers do. The limit allows a
/// header, a status and 1,024 pieces of data.
pub(crate) const INDIRECT_MAX: u32 = 1026;

/// Maximum number of ring descriptors in a chain, for a ring of any size. It is several times what
/// any driver uses, and low enough that reading all of them does not delay neighbours noticeably.
pub(crate) const CHAIN_MAX: u16 = 4096;

pub(crate) const DESC_F_NEXT: u16 = 1;
pub(crate) const DESC_F_WRITE: u16 = 2;
pub(crate) const DESC_F_INDIRECT: u16 = 4;
/// Size of a descriptor in bytes, in either layout.
pub(crate) const DESC_BYTES: usize = 16;

/// A descriptor as the guest wrote it. In memory, a split ring's descriptor has `flags` before
/// `tag`, and a packed ring's has `tag` before `flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// VIRTQ_DESC_F_*.
    pub flags: u16,
    /// Split: the index of the next descriptor. Packed: the buffer id.
    pub tag: u16,
}

impl Desc {
    /// Decodes a split ring's descriptor from its two little-endian words.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "splits a word into its fields")]
    pub(crate) fn split((addr, rest): (u64, u64)) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            tag: (rest >> 48) as u16,
        }
    }

    /// Decodes a packed ring's descriptor from its two little-endian words.
    #[inline]
    pub(crate) fn packed(words: (u64, u64)) -> Self {
        let split = Self::split(words);
        Self { flags: split.tag, tag: split.flags, ..split }
    }
}

/// A descriptor table in guest memory. The memory stays mapped while the table is used.
pub(crate) struct Table {
    pub(crate) desc: *const AtomicU64,
    /// Number of descriptors.
    pub(crate) len: u32,
    pub(crate) indirect: bool,
}

impl Table {
    /// Opens the indirect table (sections 2.7.5.3 and 2.8.7) that `desc`, a descriptor of `self`,
    /// points to. The chain ends with that table.
    #[inline]
    pub(crate) fn open(&self, near: &mut Near<'_>, desc: Desc) -> Result<Self, ChainError> {
        if self.indirect || desc.flags & DESC_F_NEXT != 0 {
            return Err(ChainError::NestedIndirect);
        }
        let bytes = desc.len as usize;
        #[expect(clippy::cast_possible_truncation, reason = "`DESC_BYTES` is 16")]
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

    /// Reads the two words of a descriptor.
    ///
    /// # Safety
    /// The index is less than the table's length.
    #[inline]
    pub(crate) unsafe fn read(&self, index: u32) -> (u64, u64) {
        let at = self.desc.wrapping_add(2 * index as usize);
        if !at.is_aligned() {
            // SAFETY: the caller guarantees that the index is less than the table's length.
            return unsafe { Self::read_unaligned(at.cast_mut().cast()) };
        }
        // SAFETY: the table has `len` descriptors, and this one is aligned for its words.
        let first = unsafe { &*at };
        // SAFETY: as above: a descriptor has two words.
        let second = unsafe { &*at.wrapping_add(1) };
        (first.load(Ordering::Relaxed), second.load(Ordering::Relaxed))
    }

    /// Reads an unaligned descriptor. No driver creates one, but an indirect table may have any
    /// address (section 2.7.5.3).
    ///
    /// # Safety
    /// `at` is the address of a descriptor in guest memory.
    #[cold]
    unsafe fn read_unaligned(at: *mut u8) -> (u64, u64) {
        let mut words = [0; 2];
        // SAFETY: the caller guarantees that `at` is the address of a descriptor.
        let slice: VolatileSlice<'_> = unsafe { VolatileSlice::new(at, DESC_BYTES) };
        slice.copy_to(&mut words[..]);
        (words[0], words[1])
    }
}

/// One buffer of a chain. Its address is not checked against guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes. May be zero.
    pub len: u32,
    /// Whether the device may write the buffer. Otherwise, it may only read it.
    pub write: bool,
}

/// The defect of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is out of range.
    Index,
    /// The chain has more descriptors than the table, or more than the limit.
    Loop,
    /// The visitor stopped the walk.
    Stopped,
    /// An indirect table is inside another one, or does not end its chain.
    NestedIndirect,
    /// The length of an indirect table is zero, not a multiple of a descriptor's size, or too
    /// large.
    IndirectLength,
    /// An indirect table is not in guest memory.
    Address,
}
