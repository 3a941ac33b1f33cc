//! The interface to the kernel for whole, aligned reads and writes that do not wait.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::os::fd::BorrowedFd;

use crate::io::{Io, Segment, Tag};

/// The kernel interface for a file disk's reads and writes. With each of them, I/O that may block
/// goes to the disk's worker threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Linux AIO: `io_submit`; completions are read from a ring that the kernel fills. The end of a
    /// process, for any reason, waits for its I/O.
    Aio,
    /// An io_uring. I/O that a process has submitted may end after the process.
    IoUring,
    /// Worker threads do all I/O: the file is not open with `O_DIRECT`, it does not support
    /// `RWF_NOWAIT`, or the system allows neither of the other engines.
    Threads,
}

impl Engine {
    /// Returns this engine, followed by the other one that submits to the kernel.
    pub(super) fn and_other(self) -> &'static [Self] {
        match self {
            Self::Aio => &[Self::Aio, Self::IoUring],
            Self::IoUring => &[Self::IoUring, Self::Aio],
            Self::Threads => &[],
        }
    }

    /// The name that `bdev_get_bdevs` shows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aio => "aio",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// A queue of reads and writes in the kernel, all with `RWF_NOWAIT`. I/O that would wait fails with
/// `EAGAIN`, and I/O that the file system cannot do without waiting with `EOPNOTSUPP`.
///
/// No method waits for I/O, locks or allocates. The effect of `RWF_NOWAIT` depends on the file
/// system and the block layer: on ext4, for example, a write that changes the file's times takes
/// part in a transaction of the journal.
pub(super) trait Submitter: Send {
    /// Returns whether reads, and whether writes, can be tried without waiting.
    fn nowait(&self) -> (bool, bool);

    /// Queues a read or write of at most `UIO_MAXIOV` segments.
    ///
    /// # Safety
    /// As for [`crate::Channel::submit`] when it returns `Queued`. At most `depth` I/Os are
    /// outstanding, with distinct tags below `depth`, the value that the engine was opened with.
    unsafe fn push(&mut self, io: &Io);

    /// Submits the queued I/Os. The next call resubmits I/O that the kernel does not take.
    fn kick(&mut self);

    /// Returns whether the kernel has not taken all submitted I/O.
    fn is_behind(&self) -> bool;

    /// Looks for completions, which [`next`](Self::next) then returns.
    fn refresh(&mut self);

    /// Returns a completion: the bytes transferred, or a negative errno.
    fn next(&mut self) -> Option<(Tag, i32)>;

    /// Becomes readable with each completion, in addition to the worker threads' eventfd.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Sets whether the owner may sleep: see [`crate::Channel::set_wakes`].
    fn set_wakes(&mut self, _wakes: bool) {}

    /// Returns whether a completion may come without a wake-up.
    fn is_quiet(&self) -> bool {
        false
    }
}

/// Returns the range of memory that the segments form, if they are contiguous: a range costs the
/// kernel less than a list.
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
        unreachable!("`nowait` excludes all I/O, so none is pushed");
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
