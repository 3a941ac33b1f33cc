//! Telling a guest that requests have completed, on an fd that a front end handed over.
#![expect(unsafe_code, reason = "system calls on eventfds")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd of a front end: its call or its kick.
///
/// Whatever else a front end passes instead is refused: a write to it could block the reactor.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

/// Why an fd was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// something else than an eventfd
    #[error("the call or kick fd is not an eventfd")]
    NotEventFd,
    /// something else than a socket
    #[error("the backend channel is not a socket")]
    NotSocket,
    /// the system refused
    #[error("eventfd: {0}")]
    System(#[from] io::Error),
}

impl EventFd {
    /// Takes an fd from a front end, checks what it is, and makes it non-blocking.
    ///
    /// # Errors
    /// It is no eventfd.
    pub fn from_front_end(fd: OwnedFd) -> Result<Self, Error> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(Error::NotEventFd);
        }
        let event = Self(fd);
        event.set_nonblocking()?;
        Ok(event)
    }

    /// A new one, non-blocking, for our own use.
    ///
    /// # Errors
    /// Out of fds.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the fd was just made and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        // SAFETY: an fd that we own; the flag is one that eventfds have.
        let result = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Adds one. Does not wait: where the counter is full, the reader has not read what it was
    /// told before and one more would tell it nothing.
    #[inline]
    pub fn signal(&self) {
        let one = 1_u64;
        // SAFETY: eight bytes of ours to an fd that we own.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Takes what was added; 0 if nothing was.
    pub fn take(&self) -> u64 {
        let mut count = 0_u64;
        // SAFETY: eight bytes of ours from an fd that we own.
        let got = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        if got == 8 { count } else { 0 }
    }

    /// Waits until something was added, without taking it.
    pub fn wait(&self) {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd of ours. An interrupted wait is a short one.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A front end's socket for messages that we begin (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub struct BackendChannel(OwnedFd);

impl BackendChannel {
    /// Takes an fd from a front end and checks that it is a socket.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_front_end(fd: OwnedFd) -> Result<Self, Error> {
        let file = std::fs::File::from(fd);
        if !std::os::unix::fs::FileTypeExt::is_socket(&file.metadata()?.file_type()) {
            return Err(Error::NotSocket);
        }
        Ok(Self(file.into()))
    }

    /// Sends a message if there is room for it; a front end that does not read misses it.
    pub fn send_nowait(&self, message: &[u8]) {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: bytes of ours to an fd that we own.
        unsafe { libc::send(self.0.as_raw_fd(), buffer, len, flags) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eventfds_pass() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(EventFd::from_front_end(reader.into()).is_err());
        assert!(EventFd::from_front_end(writer.into()).is_err());
        let event = EventFd::new().unwrap();
        assert!(EventFd::from_front_end(event.0).is_ok());
    }

    #[test]
    fn a_full_counter_does_not_block() {
        // SAFETY: a plain system call; blocking, as a careless front end makes it.
        let fd = unsafe { libc::eventfd(0, 0) };
        // SAFETY: just made.
        let event = EventFd::from_front_end(unsafe { OwnedFd::from_raw_fd(fd) }).unwrap();
        let full = u64::MAX - 1;
        // SAFETY: eight bytes of ours.
        assert_eq!(unsafe { libc::write(fd, (&raw const full).cast(), 8) }, 8);
        event.signal();
        assert_eq!(event.take(), full);
        assert_eq!(event.take(), 0);
    }
}
