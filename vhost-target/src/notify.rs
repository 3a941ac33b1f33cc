//! Telling a guest that requests have completed, on an fd that a front end handed over.
#![expect(unsafe_code, reason = "system calls on eventfds and sockets")]

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue};

use closer::{Error, ForeignFd};
use reactor::add_one;

/// The eventfd by which a guest is told of completions, in a form that cannot block its user.
///
/// A write to an eventfd waits while its counter is full, unless the fd is non-blocking; but that
/// flag is shared with the front end, which can clear it at any time and fill the counter. So the
/// kernel is made to add the one: the eventfd is registered with an io_uring of its own, and an
/// operation that does nothing completes there. That costs about 0.2 us more than a write and
/// never waits. Where io_uring is not to be had, it is a write to a non-blocking fd after all.
///
/// The io_uring is made when a queue gets the fd ([`CallFd::arm`]): a front end may send fds for
/// rings that it never starts, and only started rings are limited in number.
#[derive(Debug)]
pub struct CallFd {
    /// Until it is armed.
    fd: Mutex<Option<ForeignFd>>,
    call: OnceLock<Call>,
}

enum Call {
    Kernel(Box<UnsafeCell<IoUring>>),
    Write(ForeignFd),
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel(_) => "Kernel",
            Self::Write(_) => "Write",
        })
    }
}

// SAFETY: the cell is only entered in `CallFd::signal`, whose callers are one at a time.
unsafe impl Sync for Call {}

impl CallFd {
    /// Takes an fd from a front end.
    ///
    /// # Errors
    /// It is no eventfd.
    pub fn from_front_end(fd: ForeignFd) -> Result<Self, Error> {
        fd.check_eventfd()?;
        Ok(Self { fd: Mutex::new(Some(fd)), call: OnceLock::new() })
    }

    /// Makes what [`signal`](Self::signal) needs. Called again, it does nothing.
    pub fn arm(&self) {
        let fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(fd) = fd {
            let _ = self.call.set(Call::new(fd));
        }
    }

    /// Tells the guest. `false` if the system could not right now and it is to be tried again.
    ///
    /// # Safety
    /// No other call for the same value is under way. (A queue's owner is the one caller.)
    #[must_use]
    pub unsafe fn signal(&self) -> bool {
        let ring = match self.call.get() {
            Some(Call::Kernel(ring)) => ring,
            Some(Call::Write(fd)) => {
                add_one(fd.as_fd());
                return true;
            }
            None => return false,
        };
        // SAFETY: the caller is the only one.
        let ring = unsafe { &mut *ring.get() };
        // SAFETY: the operation names no memory. If it does not fit, one is waiting already.
        let _ = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
        let submitted = ring.submit().is_ok();
        ring.completion().for_each(drop);
        submitted
    }
}

impl Call {
    fn new(fd: ForeignFd) -> Self {
        let restricted = || {
            let ring = IoUring::builder().setup_r_disabled().build(1)?;
            ring.submitter().register_eventfd(fd.as_fd().as_raw_fd())?;
            restrict(&ring)?;
            Ok(ring)
        };
        // The ring's registration holds the eventfd; the fd itself is not needed any more.
        let registered = restricted().or_else(|_: io::Error| {
            let ring = IoUring::<squeue::Entry, cqueue::Entry>::builder().build(1)?;
            ring.submitter().register_eventfd(fd.as_fd().as_raw_fd())?;
            io::Result::Ok(ring)
        });
        match registered {
            Ok(ring) => Self::Kernel(Box::new(UnsafeCell::new(ring))),
            Err(_) => {
                // An eventfd refuses that never.
                let _ = set_nonblocking(fd.as_fd());
                Self::Write(fd)
            }
        }
    }
}

/// Has the kernel refuse all operations but the one from now on: seccomp does not see what a thread
/// submits to an io_uring. Kernels before 5.10 cannot.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut only_nop = [Restriction::sqe_op(opcode::Nop::CODE)];
    ring.submitter().register_restrictions(&mut only_nop)?;
    ring.submitter().register_enable_rings()
}

/// A guest's kick, which wakes a reactor that sleeps. Never read: see `reactor::bell`. A polled queue
/// does not need it; it is kept open for the guest.
#[derive(Debug)]
pub struct KickFd(ForeignFd);

impl KickFd {
    /// Takes an fd from a front end.
    ///
    /// # Errors
    /// It is no eventfd.
    pub fn from_front_end(fd: ForeignFd) -> Result<Self, Error> {
        fd.check_eventfd()?;
        Ok(Self(fd))
    }
}

impl AsFd for KickFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an open fd; the flag is one that eventfds have.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A front end's socket for messages that we begin (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub struct BackendChannel(ForeignFd);

impl BackendChannel {
    /// Takes an fd from a front end and checks that it is a socket.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_front_end(fd: ForeignFd) -> Result<Self, Error> {
        fd.check_unix_socket()?;
        Ok(Self(fd))
    }

    /// Sends a message if there is room for it; `false` if there is not now. If the front end has
    /// closed its end, nothing is sent, and the result is `true`.
    pub fn send_nowait(&self, message: &[u8]) -> bool {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: bytes of ours to an fd that we own.
        let sent = unsafe { libc::send(self.0.as_fd().as_raw_fd(), buffer, len, flags) };
        sent >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};

    fn eventfd() -> OwnedFd {
        // SAFETY: a plain system call; blocking, as a hostile front end makes it.
        let fd = unsafe { libc::eventfd(0, 0) };
        // SAFETY: just made.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    fn write(fd: &OwnedFd, value: u64) {
        // SAFETY: eight bytes of ours.
        assert_eq!(unsafe { libc::write(fd.as_raw_fd(), (&raw const value).cast(), 8) }, 8);
    }

    fn read(fd: &OwnedFd) -> u64 {
        let mut value = 0_u64;
        // SAFETY: eight bytes of ours.
        assert_eq!(unsafe { libc::read(fd.as_raw_fd(), (&raw mut value).cast(), 8) }, 8);
        value
    }

    #[test]
    fn a_channel_that_is_full_says_so() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;

        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::from_front_end(ForeignFd::alone(theirs.into())).unwrap();
        while channel.send_nowait(&[7; 4096]) {}
        (&ours).read_exact(&mut [0; 1 << 16]).unwrap();
        assert!(channel.send_nowait(&[7; 4096]), "there is room again");
        drop(ours);
        assert!(channel.send_nowait(&[7]), "nobody is left who could be told");
    }

    #[test]
    fn an_fd_that_no_ring_uses_costs_no_io_uring() {
        let call = CallFd::from_front_end(ForeignFd::alone(eventfd())).unwrap();
        // SAFETY: the only caller.
        assert!(!unsafe { call.signal() }, "not armed: to be tried again");
        assert!(call.call.get().is_none());
        call.arm();
        // SAFETY: the only caller.
        assert!(unsafe { call.signal() });
    }

    #[test]
    fn every_signal_counts() {
        let theirs = eventfd();
        let call = CallFd::from_front_end(ForeignFd::alone(theirs.try_clone().unwrap())).unwrap();
        call.arm();
        for _ in 0..1000 {
            // SAFETY: the only caller.
            assert!(unsafe { call.signal() });
        }
        assert_eq!(read(&theirs), 1000);
    }

    #[test]
    fn the_ring_does_nothing_else() {
        let call = CallFd::from_front_end(ForeignFd::alone(eventfd())).unwrap();
        call.arm();
        let Some(Call::Kernel(mut ring)) = call.call.into_inner() else { return };
        let ring = ring.get_mut();
        let here = io_uring::types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build();
        // SAFETY: the path is a constant.
        unsafe { ring.submission().push(&open) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
        ring.submitter().unregister_eventfd().unwrap_err();
    }

    /// Ends by itself only if signalling does not block on the full, blocking eventfd.
    #[test]
    fn a_full_counter_blocks_nobody() {
        let theirs = eventfd();
        let call = CallFd::from_front_end(ForeignFd::alone(theirs.try_clone().unwrap())).unwrap();
        call.arm();
        if !matches!(call.call.get(), Some(Call::Kernel(_))) {
            // The fallback's drawback is documented.
            return test_report::skipped("io-uring", "cannot register an eventfd with a ring");
        }
        write(&theirs, u64::MAX - 1);
        for _ in 0..3 {
            // SAFETY: the only caller.
            assert!(unsafe { call.signal() });
        }
        read(&theirs);
        // SAFETY: the only caller.
        assert!(unsafe { call.signal() });
        assert_eq!(read(&theirs), 1);
    }
}
