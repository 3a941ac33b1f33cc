//! What the owner of a channel may do itself, in place of a call to the channel.
#![expect(unsafe_code, reason = "copies between a disk's memory and the guest's")]

use crate::io::{Io, Op, Status};
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
    /// Does `io` if it can; `None` leaves it to the channel.
    ///
    /// # Safety
    /// The channel that gave this is open, and as for [`crate::Channel::submit`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn run(&self, io: &Io) -> Option<Status> {
        if !matches!(io.op, Op::Read | Op::Write) {
            return None;
        }
        match *self {
            Self::None => None,
            Self::Nothing => Some(Status::Ok),
            Self::Memory { base, size, stores } => {
                if io.len > AT_ONCE || io.offset > size || io.len > size - io.offset {
                    return None;
                }
                let at = base.wrapping_add(io.offset as usize);
                let len = io.len as usize;
                // SAFETY: the caller vouches for the segments.
                let segments = unsafe { io.segments() };
                let whole = if io.op == Op::Read {
                    // SAFETY: `at..at + len` lies within the disk, which no segment does.
                    unsafe { memory::scatter(segments, 0, at, len) }
                } else {
                    // SAFETY: as for the read.
                    unsafe { memory::gather(segments, 0, at, len, stores) }
                };
                Some(if whole { Status::Ok } else { Status::IoError })
            }
        }
    }
}
