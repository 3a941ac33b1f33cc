//! Notifies a guest that requests have completed, through an fd from a front end.
#![expect(unsafe_code, reason = "system calls on eventfds and sockets")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use closer::{Error, ForeignFd};
use reactor::SharedEventFd;

/// The eventfd that notifies a guest of completions. The front end cannot block the thread that
/// signals it: see [`SharedEventFd`].
///
/// The [`SharedEventFd`] is created when a queue gets the fd ([`CallFd::arm`]): a front end may
/// send fds for rings that it never starts, and only the number of started rings is limited.
#[derive(Debug)]
pub struct CallFd {
    /// `Some` until it is armed.
    fd: Mutex<Option<ForeignFd>>,
    call: OnceLock<SharedEventFd<ForeignFd>>,
}

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
            let _ = self.call.set(SharedEventFd::new(fd));
        }
    }

    /// Notifies the guest. Returns false if the system cannot do that now and the caller has to
    /// retry.
    ///
    /// # Safety
    /// No other call for the same value is in progress. (A queue's owner is the only caller.)
    #[must_use]
    pub unsafe fn signal(&self) -> bool {
        // SAFETY: by the caller's promise.
        self.call.get().is_some_and(|call| unsafe { call.signal() })
    }
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
}
