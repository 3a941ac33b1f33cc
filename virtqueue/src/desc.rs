//! Descriptors: one of them as the guest wrote it, tables of them, and what they describe.
#![expect(unsafe_code, reason = "descriptors are shared with the guest")]

use std::sync::atomic::{AtomicU64, Ordering};

use guest_memory::Near;
use vm_memory::VolatileSlice;

/// Largest ring that is accepted: the most that virtio has (sections 2.7 and 2.8.10.1).
pub const RING_SIZE_MAX: u16 = 1 << 15;

/// Descriptors that an indirect table may have, whatever the ring's size is. No driver may make it
/// longer than the ring (section 2.7.5.3.1), but some do: header, status and 1,024 pieces of data
/// are accepted.
pub(crate) const INDIRECT_MAX: u32 = 1026;

/// Descriptors of the ring that a chain may have, in a ring of any size: several times what any driver
/// makes, and few enough that reading them all costs neighbours nothing that they notice.
pub(crate) const CHAIN_MAX: u16 = 4096;

pub(crate) const DESC_F_NEXT: u16 = 1;
pub(crate) const DESC_F_WRITE: u16 = 2;
pub(crate) const DESC_F_INDIRECT: u16 = 4;
/// Bytes of a descriptor, in either layout.
pub(crate) const DESC_BYTES: usize = 16;

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
    pub(crate) fn split((addr, rest): (u64, u64)) -> Self {
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
    pub(crate) fn packed(words: (u64, u64)) -> Self {
        let split = Self::split(words);
        Self { flags: split.tag, tag: split.flags, ..split }
    }
}

/// A descriptor table in guest memory that is mapped for as long as it is used.
pub(crate) struct Table {
    pub(crate) desc: *const AtomicU64,
    /// Number of descriptors.
    pub(crate) len: u32,
    pub(crate) indirect: bool,
}

impl Table {
    /// Opens the indirect table (sections 2.7.5.3 and 2.8.7) that `desc` of `self` names, which ends
    /// the chain that it is in.
    #[inline]
    pub(crate) fn open(&self, near: &mut Near<'_>, desc: Desc) -> Result<Self, ChainError> {
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
    pub(crate) unsafe fn read(&self, index: u32) -> (u64, u64) {
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
