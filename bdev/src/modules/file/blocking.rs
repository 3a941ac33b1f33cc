//! One I/O on a file, done by a thread that may wait.
#![expect(unsafe_code, reason = "hands a guest's memory to the kernel")]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::backing::Alignment;
use crate::io::{Io, Op, Segment};
use crate::memory::{self, Stores};

/// Bytes of a piece that goes through a worker's own buffer.
const BOUNCE: usize = 64 << 10;

/// Alignment of that buffer: enough for every device (kernel: at most a page).
pub(super) const BOUNCE_ALIGN: usize = 4096;

/// The kernel takes no more segments at once (`UIO_MAXIOV`).
const SEGMENTS_MAX: u32 = 1024;

/// The kernel transfers no more at once (`MAX_RW_COUNT`), so that more would come back short.
const TRANSFER_MAX: u64 = 0x7fff_f000;

/// Bytes that are discarded or zeroed by one system call: a file system may lock the file for as
/// long as it takes.
const RANGE_MAX: u64 = 1 << 30;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; BOUNCE_ALIGN]);

/// Zeroes to write where the file system cannot make any itself.
static ZEROES: [Page; BOUNCE / BOUNCE_ALIGN] = [const { Page([0; BOUNCE_ALIGN]) }; _];

/// How an I/O ended that a worker did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// All of it was done.
    Ok,
    /// It failed with this errno, or was done in part: 0.
    Failed(i32),
    /// The file system or device has no such operation.
    Unsupported,
}

/// A buffer for what cannot go to or from the guest's memory directly; made when first needed.
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
    /// The file system can zero a range, as far as is known.
    pub(super) zeroes_ranges: AtomicBool,
}

/// Whether the kernel can take a read or write as it is.
///
/// # Safety
/// The segments are alive.
#[inline]
pub(super) unsafe fn goes_whole(io: &Io, direct: Option<Alignment>) -> bool {
    if io.iovecs().1 > SEGMENTS_MAX || io.len > TRANSFER_MAX {
        return false;
    }
    let Some(Alignment { memory, length }) = direct else { return true };
    // SAFETY: the caller vouches for it.
    let segments = unsafe { io.segments() };
    let odd = |s: &Segment| s.base() as usize & (memory - 1) | s.len() & (length - 1);
    segments.iter().all(|segment| odd(segment) == 0)
}

impl Slow {
    /// Does an I/O. Between two pieces it looks whether its data is still wanted.
    ///
    /// # Safety
    /// As [`crate::Channel::submit`] where it answers `Queued`; the fd is open.
    pub(super) unsafe fn perform(
        &self,
        io: &Io,
        bounce: &mut Bounce,
        abandoned: &AtomicBool,
    ) -> Ended {
        // Relaxed: what is begun before this is seen is as good as with the kernel.
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
                // SAFETY: the caller vouches for the segments.
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
            // SAFETY: the caller vouches for fd and segments.
            result_of(|| unsafe { libc::preadv(fd, iovecs, count, at) })
        } else {
            // SAFETY: as above.
            result_of(|| unsafe { libc::pwritev(fd, iovecs, count, at) })
        };
        complete(done, io.len)
    }

    /// A read or write through the worker's own buffer.
    ///
    /// # Safety
    /// As for `perform`.
    unsafe fn bounced(&self, io: &Io, bounce: &mut Bounce, wanted: &impl Fn() -> bool) -> Ended {
        let (buffer, fd) = (bounce.start(), self.fd);
        in_pieces(io, BOUNCE as u64, wanted, |done, len| {
            let (at, len) = ((io.offset + done) as i64, len as usize);
            // SAFETY: the caller vouches for the segments.
            let segments = unsafe { io.segments() };
            if io.op == Op::Write {
                // SAFETY: the buffer is larger than a piece, and this thread's own.
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

    /// Punches holes or zeroes, by `mode`.
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
        // Relaxed: whoever does not see it yet finds it out by itself.
        if self.zeroes_ranges.load(Ordering::Relaxed) {
            match self.ranges(io, libc::FALLOC_FL_ZERO_RANGE, wanted) {
                Ended::Unsupported => self.zeroes_ranges.store(false, Ordering::Relaxed),
                ended => return ended,
            }
        }
        let (fd, zeroes) = (self.fd, ZEROES.as_ptr().cast());
        in_pieces(io, BOUNCE as u64, wanted, |done, len| {
            let at = (io.offset + done) as i64;
            // SAFETY: a piece of the zeroes, to a file that is open.
            complete(result_of(|| unsafe { libc::pwrite(fd, zeroes, len as usize, at) }), len)
        })
    }
}

/// Does an I/O in pieces of at most `most` bytes, up to the first that does not end well. `piece`
/// gets the bytes that are done and those of the piece.
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

/// The result of a system call, repeated where a signal interrupted it.
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

/// A short transfer is an error.
fn complete(done: Result<u64, i32>, len: u64) -> Ended {
    match done {
        Ok(done) if done == len => Ended::Ok,
        Ok(_) => Ended::Failed(0),
        Err(errno) => Ended::Failed(errno),
    }
}
