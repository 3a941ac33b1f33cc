//! How whole, aligned reads and writes reach the kernel without waiting.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::os::fd::BorrowedFd;

use crate::io::{Io, Segment, Tag};

/// The kernel interface for a file disk's reads and writes. I/O that may block goes to the disk's
/// worker threads with each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Linux AIO: `io_submit`; completions are read from a ring that the kernel fills. A process
    /// that ends, however it ends, waits for its I/O.
    Aio,
    /// An io_uring. What a process has submitted may end after the process.
    IoUring,
    /// The worker threads do all I/O: the file is not open with `O_DIRECT`, does not support
    /// `RWF_NOWAIT`, or the system allows neither of the others.
    Threads,
}

impl Engine {
    /// Itself, and then the other one that submits to the kernel.
    pub(super) fn and_other(self) -> &'static [Self] {
        match self {
            Self::Aio => &[Self::Aio, Self::IoUring],
            Self::IoUring => &[Self::IoUring, Self::Aio],
            Self::Threads => &[],
        }
    }

    /// As `bdev_get_bdevs` shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aio => "aio",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// A queue of reads and writes in the kernel, all with `RWF_NOWAIT`: what would wait comes back with
/// `EAGAIN`, what the file system cannot do without waiting with `EOPNOTSUPP`.
///
/// No method waits for I/O, locks or allocates. What the kernel makes of `RWF_NOWAIT` is up to the file
/// system and the block layer: on ext4, for example, a write that changes the file's times takes part
/// in a transaction of the journal.
pub(super) trait Submitter: Send {
    /// Whether reads, and writes, can be tried without waiting.
    fn nowait(&self) -> (bool, bool);

    /// Queues a read or write of at most `UIO_MAXIOV` segments.
    ///
    /// # Safety
    /// As [`crate::Channel::submit`] where it answers `Queued`. At most the depth that the engine
    /// was opened with is outstanding, with distinct tags below it.
    unsafe fn push(&mut self, io: &Io);

    /// Hands over what was queued. What the kernel does not take is offered again next time.
    fn kick(&mut self);

    /// Whether something is left that the kernel has not taken.
    fn is_behind(&self) -> bool;

    /// Looks for completions, which [`next`](Self::next) then gives.
    fn refresh(&mut self);

    /// A completion: bytes transferred, or an errno below 0.
    fn next(&mut self) -> Option<(Tag, i32)>;

    /// Becomes readable with each completion, besides the worker threads' eventfd.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether the owner may sleep, as [`crate::Channel::set_wakes`] says it.
    fn set_wakes(&mut self, _wakes: bool) {}

    /// Whether a completion may come that wakes nobody.
    fn is_quiet(&self) -> bool {
        false
    }
}

/// The range of memory that the segments are together, if they are one: the kernel has less to do
/// for a range than for a list.
#[inline]
pub(super) fn joined(segments: &[Segment]) -> Option<Segment> {
    let (first, rest) = segments.split_first()?;
    let mut len = first.len();
    for segment in rest {
        if first.base().wrapping_add(len) != segment.base() {
            return None;
        }
        len += segment.len();
    }
    Some(Segment::new(first.base(), len))
}

/// The engine of a file whose every I/O goes to the worker threads.
pub(super) struct NoEngine;

impl Submitter for NoEngine {
    fn nowait(&self) -> (bool, bool) {
        (false, false)
    }

    unsafe fn push(&mut self, _io: &Io) {
        unreachable!("there is nothing that may be tried without waiting");
    }

    fn kick(&mut self) {}

    fn is_behind(&self) -> bool {
        false
    }

    fn refresh(&mut self) {}

    fn next(&mut self) -> Option<(Tag, i32)> {
        None
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
