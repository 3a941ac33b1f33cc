//! Why an I/O failed, on its way from a channel on a reactor to the operator.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::io::{OPS, Op};

/// An I/O that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What SPDK counts it as.
    pub kind: FailureKind,
    /// What it was to do.
    pub op: Op,
    /// Where on the device, in bytes, if that is known.
    pub offset: Option<u64>,
    /// Length in bytes.
    pub len: u64,
    /// What the system said, positive; 0 if it did a part of the I/O and did not say why.
    pub errno: i32,
}

/// The kinds of failures that SPDK tells apart in `io_error` and that occur here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// `failed`.
    Failed,
    /// `aio_error`: the system's answer to an I/O of a [`crate::Flavour::Aio`] disk.
    Aio,
}

/// How many values [`FailureKind`] has.
pub const FAILURE_KINDS: usize = 2;

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
            0 => f.write_str(": only a part was transferred"),
            errno => write!(f, ": {}", io::Error::from_raw_os_error(*errno)),
        }
    }
}

/// A place for one failure, from one writer to one reader. The writer never waits: what finds the
/// place taken is only counted, so that the reader gets the first failure since the last time.
#[derive(Debug, Default)]
pub(crate) struct FirstFailure {
    taken: AtomicBool,
    /// Operation, kind and errno.
    what: AtomicU64,
    offset: AtomicU64,
    len: AtomicU64,
}

/// In a [`FirstFailure`]: no offset. No device is so large.
const NOWHERE: u64 = u64::MAX;

const OP_OF: [Op; OPS] = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];

impl FirstFailure {
    /// Leaves a failure, if the place is free. For the one writer.
    pub(crate) fn leave(&self, failure: &Failure) {
        // Acquire: the reader has read what was here before we write.
        if self.taken.load(Ordering::Acquire) {
            return;
        }
        let Failure { kind, op, offset, len, errno } = *failure;
        let what = op as u64 | (kind as u64) << 8 | u64::from(errno as u32) << 32;
        self.what.store(what, Ordering::Relaxed);
        self.offset.store(offset.unwrap_or(NOWHERE), Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        // Release: who sees this sees all of the failure.
        self.taken.store(true, Ordering::Release);
    }

    /// Takes the failure and frees the place. For the one reader.
    pub(crate) fn take(&self) -> Option<Failure> {
        // Acquire: as the writer has left it.
        if !self.taken.load(Ordering::Acquire) {
            return None;
        }
        let what = self.what.load(Ordering::Relaxed);
        let failure = Failure {
            kind: if what >> 8 & 1 == 0 { FailureKind::Failed } else { FailureKind::Aio },
            op: OP_OF[what as usize & 0xff],
            offset: Some(self.offset.load(Ordering::Relaxed)).filter(|&offset| offset != NOWHERE),
            len: self.len.load(Ordering::Relaxed),
            errno: (what >> 32) as i32,
        };
        // Release: the writer comes after our reading.
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
    fn it_says_what_where_and_why() {
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
        assert!(text(Op::Read, 0).ends_with(": only a part was transferred"));
    }
}
