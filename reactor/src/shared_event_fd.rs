//! An eventfd that another process shares. It cannot block the thread that signals it.
#![expect(unsafe_code, reason = "system calls on eventfds, and an io_uring with one user")]

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::event_fd::add_one;

/// An eventfd that another process shares. It cannot block the thread that signals it, if io_uring
/// is available.
///
/// A write to an eventfd waits while its counter is full, unless the fd is non-blocking. That flag
/// is shared with the other process, which can clear it at any time and fill the counter. Therefore
/// the kernel adds the one: the eventfd is registered with an io_uring of its own, and a no-op
/// operation completes there. That costs about 0.2 us more than a write and never waits. If
/// io_uring is not available, the signal is a write to an fd that is made non-blocking once, so the
/// other process can make it wait.
pub struct SharedEventFd<F>(Signal<F>);

enum Signal<F> {
    Kernel(Box<UnsafeCell<IoUring>>),
    Write(F),
}

impl<F> fmt::Debug for SharedEventFd<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Signal::Kernel(_) => "Kernel",
            Signal::Write(_) => "Write",
        })
    }
}

// SAFETY: only `signal` uses the cell, and it has one caller at a time.
unsafe impl<F: Sync> Sync for SharedEventFd<F> {}

impl<F: AsFd> SharedEventFd<F> {
    /// Takes an eventfd. Makes system calls that may wait.
    pub fn new(fd: F) -> Self {
        let restricted = || {
            let ring = IoUring::builder().setup_r_disabled().build(1)?;
            ring.submitter().register_eventfd(fd.as_fd().as_raw_fd())?;
            restrict(&ring)?;
            Ok(ring)
        };
        // The ring's registration holds the eventfd. The fd itself is not needed any more.
        let registered = restricted().or_else(|_: io::Error| {
            let ring = IoUring::<squeue::Entry, cqueue::Entry>::builder().build(1)?;
            ring.submitter().register_eventfd(fd.as_fd().as_raw_fd())?;
            io::Result::Ok(ring)
        });
        Self(match registered {
            Ok(ring) => Signal::Kernel(Box::new(UnsafeCell::new(ring))),
            Err(_) => {
                // Cannot fail on an eventfd.
                let _ = set_nonblocking(fd.as_fd());
                Signal::Write(fd)
            }
        })
    }

    /// Adds one to the counter. Returns false if the kernel cannot do that now; the caller then has
    /// to call this again.
    ///
    /// # Safety
    /// No other call for the same value is in progress.
    #[must_use]
    #[inline]
    pub unsafe fn signal(&self) -> bool {
        let ring = match &self.0 {
            Signal::Kernel(ring) => ring,
            Signal::Write(fd) => {
                add_one(fd.as_fd());
                return true;
            }
        };
        // SAFETY: this is the only caller.
        let ring = unsafe { &mut *ring.get() };
        // SAFETY: the operation accesses no memory. If it does not fit, another one is already
        // waiting.
        let _ = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
        let submitted = ring.submit().is_ok();
        ring.completion().for_each(drop);
        submitted
    }
}

/// Makes the kernel refuse all other operations from now on: seccomp does not see what a thread
/// submits to an io_uring. Kernels before 5.10 do not support this.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut only_nop = [Restriction::sqe_op(opcode::Nop::CODE)];
    ring.submitter().register_restrictions(&mut only_nop)?;
    ring.submitter().register_enable_rings()
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the fd is open, and eventfds have this flag.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, OwnedFd};

    use super::*;

    fn eventfd() -> OwnedFd {
        // SAFETY: a plain system call. The fd is blocking, as a hostile process would make it.
        let fd = unsafe { libc::eventfd(0, 0) };
        // SAFETY: the fd was just created.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    fn write(fd: &OwnedFd, value: u64) {
        // SAFETY: the buffer has eight bytes.
        assert_eq!(unsafe { libc::write(fd.as_raw_fd(), (&raw const value).cast(), 8) }, 8);
    }

    fn read(fd: &OwnedFd) -> u64 {
        let mut value = 0_u64;
        // SAFETY: the buffer has eight bytes.
        assert_eq!(unsafe { libc::read(fd.as_raw_fd(), (&raw mut value).cast(), 8) }, 8);
        value
    }

    #[test]
    fn the_io_uring_refuses_other_operations() {
        let Signal::Kernel(mut ring) = SharedEventFd::new(eventfd()).0 else { return };
        let ring = ring.get_mut();
        let here = io_uring::types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build();
        // SAFETY: the path is a constant.
        unsafe { ring.submission().push(&open) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
        ring.submitter().unregister_eventfd().unwrap_err();
    }

    /// Ends only if signalling does not block on the full, blocking eventfd.
    #[test]
    fn a_full_counter_does_not_block() {
        let theirs = eventfd();
        let shared = SharedEventFd::new(theirs.try_clone().unwrap());
        if !matches!(shared.0, Signal::Kernel(_)) {
            // The limitation of the fallback is documented.
            return test_report::skipped("io-uring", "cannot register an eventfd with a ring");
        }
        write(&theirs, u64::MAX - 1);
        for _ in 0..3 {
            // SAFETY: this is the only caller.
            assert!(unsafe { shared.signal() });
        }
        read(&theirs);
        // SAFETY: this is the only caller.
        assert!(unsafe { shared.signal() });
        assert_eq!(read(&theirs), 1);
    }
}
