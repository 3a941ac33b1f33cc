//! I/O that the owner of a channel may do itself, instead of calling the channel.
#![expect(unsafe_code, reason = "copies between a disk's memory and the guest's")]

use guest_memory::usize_of;

use crate::geometry::within;
use crate::io::{Io, Op};
use crate::memory::{self, Stores};

/// The way in which a channel's owner can do I/O that is as short as the call to the channel would
/// be. [`crate::Channel::shortcut`] returns it; valid as long as the channel is open.
#[derive(Clone, Copy, Debug, Default)]
pub enum Shortcut {
    /// No shortcut: all I/O goes through the channel.
    #[default]
    None,
    /// Reads and writes succeed and transfer no data.
    Nothing,
    /// Reads and writes copy from and to this memory.
    Memory {
        /// The disk's first byte.
        base: *mut u8,
        /// The disk's size in bytes.
        size: u64,
        /// The way in which writes are stored.
        stores: Stores,
    },
}

// SAFETY: the address is only followed under the contract of `Shortcut::run`.
unsafe impl Send for Shortcut {}

/// The most bytes that are copied at once, so that a request of gigabytes does not delay the
/// reactor. Takes about 0.1 ms.
pub(crate) const AT_ONCE: u64 = 1 << 20;

impl Shortcut {
    /// Returns whether reads are copies that [`Shortcut::expect_read`] makes faster.
    #[inline]
    #[must_use]
    pub fn copies(&self) -> bool {
        matches!(self, Self::Memory { .. })
    }

    /// Prefetches the beginning of the data that a read of `len` bytes at `offset` will copy. Wrong
    /// values cost time and have no other effect.
    #[inline(always)]
    pub fn expect_read(&self, offset: u64, len: u64) {
        if let Self::Memory { base, size, .. } = *self
            // Prefetch only addresses inside the disk: a guest must not choose any other address.
            && offset < size
        {
            memory::prefetch(base.wrapping_add(usize_of(offset)), len);
        }
    }

    /// Does `io` and returns true, or returns false and leaves it, also if it would fail, to the
    /// channel.
    ///
    /// # Safety
    /// The channel that returned this shortcut is open; otherwise as for
    /// [`crate::Channel::submit`].
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
                let at = base.wrapping_add(usize_of(io.offset));
                io.len <= AT_ONCE
                    && within(io, size)
                    // SAFETY: the range lies within the disk, and the caller guarantees the rest.
                    && unsafe { copy(io, 0, at, usize_of(io.len), stores) }
            }
        }
    }
}

/// Does `len` bytes of a read or a write, from `skip` bytes into it, between the segments and
/// `device`. Returns whether the segments were long enough.
///
/// # Safety
/// `device..device + len` is memory of a disk; otherwise as for [`crate::Channel::submit`].
#[inline(always)]
pub(crate) unsafe fn copy(io: &Io, skip: u64, device: *mut u8, len: usize, stores: Stores) -> bool {
    // SAFETY: the caller guarantees that the segments are valid.
    let segments = unsafe { io.segments() };
    if io.op == Op::Read {
        // SAFETY: `device..device + len` is memory of a disk, which no segment overlaps.
        unsafe { memory::scatter(segments, skip, device, len) }
    } else {
        // SAFETY: as for the read.
        unsafe { memory::gather(segments, skip, device, len, stores) }
    }
}
