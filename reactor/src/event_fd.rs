//! An eventfd.
#![expect(unsafe_code, reason = "system calls on eventfds")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd of this process, non-blocking.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one.
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

    /// Adds one to the counter. Never waits: if the counter is full, nothing is added, and the fd is
    /// readable anyway.
    #[inline]
    pub fn signal(&self) {
        add_one(self.0.as_fd());
    }

    /// Reads the counter and resets it; 0 if nothing was added.
    pub fn take(&self) -> u64 {
        let mut count = 0_u64;
        // SAFETY: eight bytes of ours from an fd that we own.
        let got = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        if got == 8 { count } else { 0 }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Adds one to the counter of an eventfd. Waits if the counter is full and the fd is blocking.
#[inline]
pub fn add_one(fd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: eight bytes of ours to an open fd.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}
