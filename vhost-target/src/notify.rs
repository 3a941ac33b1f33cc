//! Notifies a guest that requests have completed, through an fd from a front end.
#![expect(unsafe_code, reason = "system calls on eventfds and sockets")]

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue};

use closer::{Error, ForeignFd};
use reactor::add_one;

/// The eventfd that notifies a guest of completions, in a form that cannot block its user.
///
/// A write to an eventfd waits while its counter is full, unless the fd is non-blocking. That flag
/// is shared with the front end, which can clear it at any time and fill the counter. Therefore the
/// kernel adds the one: the eventfd is registered with an io_uring of its own, and a no-op
/// operation completes there. That costs about 0.2 us more than a write and never waits. If
/// io_uring is not available, the signal is a write to a non-blocking fd.
///
/// The io_uring is created when a queue gets the fd ([`CallFd::arm`]): a front end may send fds for
/// rings that it never starts, and only the number of started rings is limited.
#[derive(Debug)]
pub struct CallFd {
    /// `Some` until it is armed.
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

// SAFETY: only `CallFd::signal` uses the cell, and it has one caller at a time.
unsafe impl Sync for Call {}

impl CallFd {
    /// Takes an fd from a front end.
    ///
    /// # Errors
    /// The fd is not an eventfd.
    pub fn from_front_end(fd: ForeignFd) -> Result<Self, Error> {
        fd.check_eventfd()?;
        Ok(Self { fd: Mutex::new(Some(fd)), call: OnceLock::new() })
    }

    /// Creates what [`signal`](Self::signal) needs. A second call has no effect.
    pub fn arm(&self) {
        let fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(fd) = fd {
            let _ = self.call.set(Call::new(fd));
        }
    }

    /// Notifies the guest. Returns false if the system cannot do that now and the caller has to
    /// retry.
    ///
    /// # Safety
    /// No other call for the same value is in progress. (A queue's owner is the only caller.)
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

impl Call {
    fn new(fd: ForeignFd) -> Self {
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
        match registered {
            Ok(ring) => Self::Kernel(Box::new(UnsafeCell::new(ring))),
            Err(_) => {
                // Cannot fail on an eventfd.
                let _ = set_nonblocking(fd.as_fd());
                Self::Write(fd)
            }
        }
    }
}

/// Makes the kernel refuse all other operations from now on: seccomp does not see what a thread
/// submits to an io_uring. Kernels before 5.10 do not support this.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut only_nop = [Restriction::sqe_op(opcode::Nop::CODE)];
    ring.submitter().register_restrictions(&mut only_nop)?;
    ring.submitter().register_enable_rings()
}

/// The eventfd of a guest's kick, which wakes a sleeping reactor. It is never read: see
/// `reactor::WakeSource`. A polled queue does not need it. It is kept open for the guest.
#[derive(Debug)]
pub struct KickFd(ForeignFd);

impl KickFd {
    /// Takes an fd from a front end.
    ///
    /// # Errors
    /// The fd is not an eventfd.
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
    // SAFETY: the fd is open, and eventfds have this flag.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A front end's socket for messages that the target starts (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub struct BackendChannel(ForeignFd);

impl BackendChannel {
    /// Takes an fd from a front end and checks that it is a socket.
    ///
    /// # Errors
    /// The fd is not a Unix socket.
    pub fn from_front_end(fd: ForeignFd) -> Result<Self, Error> {
        fd.check_unix_socket()?;
        Ok(Self(fd))
    }

    /// Sends a message if there is room for it. Returns false if there is no room now. If the front
    /// end has closed its end, nothing is sent and the result is true.
    pub fn send_nowait(&self, message: &[u8]) -> bool {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: the buffer is valid, and this value owns the fd.
        let sent = unsafe { libc::send(self.0.as_fd().as_raw_fd(), buffer, len, flags) };
        sent >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};

    fn eventfd() -> OwnedFd {
        // SAFETY: a plain system call. The fd is blocking, as a hostile front end would make it.
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
    fn sending_on_a_full_channel_returns_false() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;

        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::from_front_end(ForeignFd::alone(theirs.into())).unwrap();
        while channel.send_nowait(&[7; 4096]) {}
        (&ours).read_exact(&mut [0; 1 << 16]).unwrap();
        assert!(channel.send_nowait(&[7; 4096]), "there is room again");
        drop(ours);
        assert!(channel.send_nowait(&[7]), "the front end has closed its end");
    }

    #[test]
    fn an_fd_that_is_not_armed_has_no_io_uring() {
        let call = CallFd::from_front_end(ForeignFd::alone(eventfd())).unwrap();
        // SAFETY: this is the only caller.
        assert!(!unsafe { call.signal() }, "not armed: the caller has to retry");
        assert!(call.call.get().is_none());
        call.arm();
        // SAFETY: this is the only caller.
        assert!(unsafe { call.signal() });
    }

    #[test]
    fn every_signal_counts() {
        let theirs = eventfd();
        let call = CallFd::from_front_end(ForeignFd::alone(theirs.try_clone().unwrap())).unwrap();
        call.arm();
        for _ in 0..1000 {
            // SAFETY: this is the only caller.
            assert!(unsafe { call.signal() });
        }
        assert_eq!(read(&theirs), 1000);
    }

    #[test]
    fn the_io_uring_refuses_other_operations() {
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

    /// Ends only if signalling does not block on the full, blocking eventfd.
    #[test]
    fn a_full_counter_does_not_block() {
        let theirs = eventfd();
        let call = CallFd::from_front_end(ForeignFd::alone(theirs.try_clone().unwrap())).unwrap();
        call.arm();
        if !matches!(call.call.get(), Some(Call::Kernel(_))) {
            // The limitation of the fallback is documented.
            return test_report::skipped("io-uring", "cannot register an eventfd with a ring");
        }
        write(&theirs, u64::MAX - 1);
        for _ in 0..3 {
            // SAFETY: this is the only caller.
            assert!(unsafe { call.signal() });
        }
        read(&theirs);
        // SAFETY: this is the only caller.
        assert!(unsafe { call.signal() });
        assert_eq!(read(&theirs), 1);
    }
}
