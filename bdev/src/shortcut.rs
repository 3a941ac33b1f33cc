//! What the owner of a channel may do itself, in place of a call to the channel.
#![expect(unsafe_code, reason = "copies between a disk's memory and the guest's")]

use crate::geometry::within;
use crate::io::{Io, Op};
use crate::memory::{self, Stores};

/// A channel's I/O that is so short that the call to the channel would be a good part of it. The
/// answer of [`crate::Channel::shortcut`]; good for as long as the channel is open.
#[derive(Clone, Copy, Debug, Default)]
pub enum Shortcut {
    /// None: everything goes through the channel.
    #[default]
    None,
    /// Reads and writes succeed and move nothing.
    Nothing,
    /// Reads and writes are copies from and to this memory.
    Memory {
        /// The disk's first byte.
        base: *mut u8,
        /// The disk's size in bytes.
        size: u64,
        /// How a write is stored.
        stores: Stores,
    },
}

// SAFETY: an address, only followed under the contract of `Shortcut::run`.
unsafe impl Send for Shortcut {}

/// How much is copied in one go, so that one request of gigabytes does not hold the reactor.
/// About 0.1 ms of work.
pub(crate) const AT_ONCE: u64 = 1 << 20;

impl Shortcut {
    /// Whether reads are copies that it pays to prepare: see [`Shortcut::expect_read`].
    #[inline]
    #[must_use]
    pub fn copies(&self) -> bool {
        matches!(self, Self::Memory { .. })
    }

    /// Has the processor fetch the beginning of what a read of `len` bytes at `offset` will copy. Wrong
    /// numbers cost time and do nothing else.
    #[inline(always)]
    pub fn expect_read(&self, offset: u64, len: u64) {
        if let Self::Memory { base, size, .. } = *self
            // Only ever a place in the disk: a guest has no say about the rest of memory.
            && offset < size
        {
            memory::prefetch(base.wrapping_add(offset as usize), len);
        }
    }

    /// Does `io` and says so, or leaves it to the channel, failures included.
    ///
    /// # Safety
    /// The channel that gave this is open, and as for [`crate::Channel::submit`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn run(&self, io: &Io) -> bool {
        if !matches!(io.op, Op::Read | Op::Write) {
            return false;
        }
        match *self {
            Self::None => false,
            Self::Nothing => true,
            Self::Memory { base, size, stores } => {
                let at = base.wrapping_add(io.offset as usize);
                io.len <= AT_ONCE
                    && within(io, size)
                    // SAFETY: the range lies within the disk, and the caller vouches for the rest.
                    && unsafe { copy(io, 0, at, io.len as usize, stores) }
            }
        }
    }
}

/// Does `len` bytes of a read or a write, `skip` bytes into it, from or to `device`. Says whether
/// the segments were long enough.
///
/// # Safety
/// `device..device + len` is a disk's, and as for [`crate::Channel::submit`].
#[inline(always)]
pub(crate) unsafe fn copy(io: &Io, skip: u64, device: *mut u8, len: usize, stores: Stores) -> bool {
    // SAFETY: the caller vouches for the segments.
    let segments = unsafe { io.segments() };
    if io.op == Op::Read {
        // SAFETY: `device..device + len` is a disk's, which no segment is.
        unsafe { memory::scatter(segments, skip, device, len) }
    } else {
        // SAFETY: as for the read.
        unsafe { memory::gather(segments, skip, device, len, stores) }
    }
}
