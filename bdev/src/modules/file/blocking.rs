//! Does one I/O on a file, on a thread that may block.
#![expect(unsafe_code, reason = "hands a guest's memory to the kernel")]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_memory::usize_of;

use super::backing::Alignment;
use crate::io::{Io, Op, Segment};
use crate::line::Ended;
use crate::memory::{self, Stores};

/// Bytes of a piece that goes through a worker's bounce buffer.
const BOUNCE: usize = 64 << 10;

/// Alignment of that buffer: sufficient for every device (in the kernel: at most a page).
pub(super) const BOUNCE_ALIGN: usize = 4096;

/// The most segments that the kernel accepts in one call (`UIO_MAXIOV`).
const SEGMENTS_MAX: u32 = 1024;

/// The most bytes that the kernel transfers in one call (`MAX_RW_COUNT`). A longer transfer would
/// be short.
const TRANSFER_MAX: u64 = 0x7fff_f000;

/// The most bytes that one system call discards or zeroes: a file system may lock the file during
/// the call.
const RANGE_MAX: u64 = 1 << 30;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; BOUNCE_ALIGN]);

/// Zeroes to write if the file system cannot zero a range.
static ZEROES: [Page; BOUNCE / BOUNCE_ALIGN] = [const { Page([0; BOUNCE_ALIGN]) }; _];

/// A buffer for transfers that direct I/O cannot do in the guest's memory. Allocated when first
/// needed.
#[derive(Default)]
pub(super) struct Bounce(Box<[Page]>);

impl Bounce {
    fn start(&mut self) -> *mut u8 {
        if self.0.is_empty() {
            self.0 = vec![Page([0; BOUNCE_ALIGN]); BOUNCE / BOUNCE_ALIGN].into_boxed_slice();
        }
        self.0.as_mut_ptr().cast()
    }
}

/// A file as the workers use it.
pub(super) struct Slow {
    pub(super) fd: RawFd,
    pub(super) direct: Option<Alignment>,
    /// Whether the file system can zero a range, as far as is known.
    pub(super) zeroes_ranges: AtomicBool,
}

/// Returns whether the kernel can take a read or write as it is.
///
/// # Safety
/// The segments are valid.
#[inline]
pub(super) unsafe fn goes_whole(io: &Io, direct: Option<Alignment>) -> bool {
    if io.iovecs().1 > SEGMENTS_MAX || io.len > TRANSFER_MAX {
        return false;
    }
    let Some(Alignment { memory, length }) = direct else { return true };
    // SAFETY: the caller guarantees that the segments are valid.
    let segments = unsafe { io.segments() };
    let odd = |s: &Segment| s.base() as usize & (memory - 1) | s.len() & (length - 1);
    segments.iter().all(|segment| odd(segment) == 0)
}

impl Slow {
    /// Does an I/O. Checks between two pieces whether its data is still wanted.
    ///
    /// # Safety
    /// As for [`crate::Channel::submit`] when it returns `Queued`; the fd is open.
    pub(super) unsafe fn perform(
        &self,
        io: &Io,
        bounce: &mut Bounce,
        abandoned: &AtomicBool,
    ) -> Ended {
        // Relaxed suffices: an I/O that begins before this is seen counts as in the kernel already.
        let wanted = || !abandoned.load(Ordering::Relaxed);
        if !wanted() {
            return Ended::Failed(libc::ECANCELED);
        }
        match io.op {
            Op::Flush => {
                // SAFETY: the fd is open.
                let done = result_of(|| unsafe { libc::fdatasync(self.fd) } as isize);
                complete(done, 0)
            }
            Op::Unmap => self.ranges(io, libc::FALLOC_FL_PUNCH_HOLE, &wanted),
            Op::WriteZeroes => self.write_zeroes(io, &wanted),
            Op::Read | Op::Write => {
                // SAFETY: the caller guarantees that the segments are valid.
                if unsafe { goes_whole(io, self.direct) } {
                    // SAFETY: as above.
                    unsafe { self.transfer(io) }
                } else {
                    // SAFETY: as above.
                    unsafe { self.bounced(io, bounce, &wanted) }
                }
            }
        }
    }

    /// # Safety
    /// As for `perform`.
    unsafe fn transfer(&self, io: &Io) -> Ended {
        let ((iovecs, count), at) = (io.iovecs(), io.offset as i64);
        let (fd, count) = (self.fd, count as i32);
        let done = if io.op == Op::Read {
            // SAFETY: the caller guarantees that the fd and the segments are valid.
            result_of(|| unsafe { libc::preadv(fd, iovecs, count, at) })
        } else {
            // SAFETY: as above.
            result_of(|| unsafe { libc::pwritev(fd, iovecs, count, at) })
        };
        complete(done, io.len)
    }

    /// Does a read or write through the worker's bounce buffer.
    ///
    /// # Safety
    /// As for `perform`.
    unsafe fn bounced(&self, io: &Io, bounce: &mut Bounce, wanted: &impl Fn() -> bool) -> Ended {
        let (buffer, fd) = (bounce.start(), self.fd);
        in_pieces(io, BOUNCE as u64, wanted, |done, len| {
            let (at, len) = ((io.offset + done) as i64, usize_of(len));
            // SAFETY: the caller guarantees that the segments are valid.
            let segments = unsafe { io.segments() };
            if io.op == Op::Write {
                // SAFETY: the buffer is at least as large as a piece, and only this thread uses it.
                unsafe { memory::gather(segments, done, buffer, len, Stores::Cached) };
                // SAFETY: as above.
                let result = result_of(|| unsafe { libc::pwrite(fd, buffer.cast(), len, at) });
                return complete(result, len as u64);
            }
            // SAFETY: as above.
            let result = result_of(|| unsafe { libc::pread(fd, buffer.cast(), len, at) });
            let ended = complete(result, len as u64);
            if ended == Ended::Ok && wanted() {
                // SAFETY: as above.
                unsafe { memory::scatter(segments, done, buffer, len) };
            }
            ended
        })
    }

    /// Punches holes or zeroes ranges, according to `mode`.
    fn ranges(&self, io: &Io, mode: i32, wanted: &impl Fn() -> bool) -> Ended {
        let (fd, mode) = (self.fd, mode | libc::FALLOC_FL_KEEP_SIZE);
        in_pieces(io, RANGE_MAX, wanted, |done, len| {
            let at = (io.offset + done) as i64;
            // SAFETY: the fd is open.
            match result_of(|| unsafe { libc::fallocate(fd, mode, at, len as i64) } as isize) {
                Ok(_) => Ended::Ok,
                Err(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV) => {
                    Ended::Unsupported
                }
                Err(errno) => Ended::Failed(errno),
            }
        })
    }

    fn write_zeroes(&self, io: &Io, wanted: &impl Fn() -> bool) -> Ended {
        if io.may_unmap && self.ranges(io, libc::FALLOC_FL_PUNCH_HOLE, wanted) == Ended::Ok {
            return Ended::Ok;
        }
        // Relaxed suffices: a thread that does not see the change yet finds it out itself.
        if self.zeroes_ranges.load(Ordering::Relaxed) {
            match self.ranges(io, libc::FALLOC_FL_ZERO_RANGE, wanted) {
                Ended::Unsupported => self.zeroes_ranges.store(false, Ordering::Relaxed),
                ended => return ended,
            }
        }
        let (fd, zeroes) = (self.fd, ZEROES.as_ptr().cast());
        in_pieces(io, BOUNCE as u64, wanted, |done, len| {
            let (at, count) = ((io.offset + done) as i64, usize_of(len));
            // SAFETY: writes a part of the zeroes to a file that is open.
            complete(result_of(|| unsafe { libc::pwrite(fd, zeroes, count, at) }), len)
        })
    }
}

/// Does an I/O in pieces of at most `most` bytes, up to the first one that fails. `piece` gets the
/// number of bytes done and the length of the piece.
fn in_pieces(
    io: &Io,
    most: u64,
    wanted: &impl Fn() -> bool,
    mut piece: impl FnMut(u64, u64) -> Ended,
) -> Ended {
    let mut done = 0;
    while done < io.len {
        if !wanted() {
            return Ended::Failed(libc::ECANCELED);
        }
        let len = (io.len - done).min(most);
        match piece(done, len) {
            Ended::Ok => done += len,
            ended => return ended,
        }
    }
    Ended::Ok
}

/// Returns the result of a system call, which is repeated if a signal interrupted it.
fn result_of(call: impl Fn() -> isize) -> Result<u64, i32> {
    loop {
        if let Ok(result) = u64::try_from(call()) {
            return Ok(result);
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return Err(errno);
        }
    }
}

/// Treats a short transfer as an error.
fn complete(done: Result<u64, i32>, len: u64) -> Ended {
    match done {
        Ok(done) if done == len => Ended::Ok,
        Ok(_) => Ended::Failed(0),
        Err(errno) => Ended::Failed(errno),
    }
}
