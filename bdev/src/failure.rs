//! The reason of a failed I/O, passed from a channel on a reactor to the log and the counters.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::io::{Io, OPS, Op, Tag};

/// An I/O that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The counter in SPDK's `io_error` that counts it.
    pub kind: FailureKind,
    /// The operation.
    pub op: Op,
    /// The offset on the device in bytes, if known.
    pub offset: Option<u64>,
    /// The length in bytes.
    pub len: u64,
    /// The system's errno. 0: the transfer was partial, and the system gave no reason.
    pub errno: i32,
}

impl Io {
    /// Returns the [`Failure`] of this I/O, for the log and the counters.
    #[must_use]
    pub fn failed(&self, kind: FailureKind, errno: i32) -> Failure {
        Failure { kind, op: self.op, offset: Some(self.offset), len: self.len, errno }
    }
}

/// SPDK's kinds of failure in `io_error`, as far as they can occur here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// `failed`.
    Failed,
    /// `aio_error`: the system returned an error for an I/O of a [`crate::Flavour::Aio`] disk.
    Aio,
}

/// How many values [`FailureKind`] has.
pub const FAILURE_KINDS: usize = 2;

/// A channel's failures by tag, for [`crate::Channel::failure`], until the owner takes them.
#[derive(Debug)]
pub(crate) struct Failures(Box<[Option<Failure>]>);

impl Failures {
    /// Makes room for tags below `depth`.
    pub(crate) fn new(depth: u16) -> Self {
        Self(vec![None; depth.into()].into_boxed_slice())
    }

    /// Records the reason for which an I/O fails.
    #[cold]
    pub(crate) fn note(&mut self, io: &Io, errno: i32) {
        if let Some(failure) = self.0.get_mut(usize::from(io.tag.0)) {
            *failure = Some(io.failed(FailureKind::Failed, errno));
        }
    }

    /// Takes the reason of a failed I/O. Only the first call for a tag returns it.
    pub(crate) fn take(&mut self, tag: Tag) -> Option<Failure> {
        self.0.get_mut(usize::from(tag.0))?.take()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, offset, len, errno, .. } = self;
        f.write_str(match op {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Unmap => "unmap",
            Op::WriteZeroes => "write-zeroes",
        })?;
        if *op != Op::Flush {
            write!(f, " of {len} bytes")?;
            if let Some(offset) = offset {
                write!(f, " at offset {offset}")?;
            }
        }
        match errno {
            0 => f.write_str(": partial transfer"),
            errno => write!(f, ": {}", io::Error::from_raw_os_error(*errno)),
        }
    }
}

/// A slot for one failure, with one writer and one reader. The writer never waits. A failure that
/// finds the slot full is only counted, so the reader gets the first failure since its last read.
#[derive(Debug, Default)]
pub(crate) struct FirstFailure {
    taken: AtomicBool,
    /// Operation, kind and errno.
    what: AtomicU64,
    offset: AtomicU64,
    len: AtomicU64,
}

/// The value of [`FirstFailure`]'s offset for an I/O without a known offset. No device is that
/// large.
const NOWHERE: u64 = u64::MAX;

const OP_OF: [Op; OPS] = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];

impl FirstFailure {
    /// Stores a failure if the slot is free. Only the one writer may call it.
    pub(crate) fn leave(&self, failure: &Failure) {
        // Acquire: the reader has read the previous failure before we overwrite it.
        if self.taken.load(Ordering::Acquire) {
            return;
        }
        let Failure { kind, op, offset, len, errno } = *failure;
        let what = op as u64 | (kind as u64) << 8 | u64::from(errno as u32) << 32;
        self.what.store(what, Ordering::Relaxed);
        self.offset.store(offset.unwrap_or(NOWHERE), Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Release: a reader that sees this sees the whole failure.
        self.taken.store(true, Ordering::Release);
    }

    /// Takes the failure and frees the slot. Only the one reader may call it.
    pub(crate) fn take(&self) -> Option<Failure> {
        // Acquire: sees what the writer stored before its Release.
        if !self.taken.load(Ordering::Acquire) {
            return None;
        }
        let what = self.what.load(Ordering::Relaxed);
        let failure = Failure {
            kind: if what >> 8 & 1 == 0 { FailureKind::Failed } else { FailureKind::Aio },
            op: OP_OF[(what & 0xff) as usize],
            offset: Some(self.offset.load(Ordering::Relaxed)).filter(|&offset| offset != NOWHERE),
            len: self.len.load(Ordering::Relaxed),
            errno: (what >> 32) as i32,
        };
        // Release: the writer overwrites only after we have read.
        self.taken.store(false, Ordering::Release);
        Some(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(op: Op, kind: FailureKind, errno: i32) -> Failure {
        Failure { kind, op, offset: Some(1 << 40), len: 4096, errno }
    }

    #[test]
    fn the_first_one_is_kept_until_it_is_taken() {
        let place = FirstFailure::default();
        assert_eq!(place.take(), None);
        for op in OP_OF {
            for kind in [FailureKind::Failed, FailureKind::Aio] {
                for errno in [0, libc::EIO, 4095] {
                    place.leave(&failure(op, kind, errno));
                    place.leave(&failure(Op::Read, FailureKind::Failed, 1));
                    assert_eq!(place.take(), Some(failure(op, kind, errno)));
                    assert_eq!(place.take(), None);
                }
            }
        }
    }

    #[test]
    fn the_text_has_operation_offset_and_reason() {
        let text = |op, errno| failure(op, FailureKind::Aio, errno).to_string();
        assert_eq!(
            text(Op::Write, libc::ENOSPC),
            "write of 4096 bytes at offset 1099511627776: No space left on device (os error 28)"
        );
        assert_eq!(text(Op::Flush, libc::EIO), "flush: Input/output error (os error 5)");
        let somewhere =
            Failure { offset: None, ..failure(Op::Unmap, FailureKind::Failed, libc::EIO) };
        let place = FirstFailure::default();
        place.leave(&somewhere);
        let text_of = place.take().unwrap().to_string();
        assert_eq!(text_of, "unmap of 4096 bytes: Input/output error (os error 5)");
        assert!(text(Op::Read, 0).ends_with(": partial transfer"));
    }
}
