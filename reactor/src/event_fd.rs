//! Eventfds.
#![expect(unsafe_code, reason = "system calls on eventfds")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A non-blocking eventfd of this process.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Creates an eventfd.
    ///
    /// # Errors
    /// The process has no fd left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the fd is new, and this is its only owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one to the counter. Never blocks: if the counter is full, nothing is added, and the fd
    /// is readable anyway.
    #[inline]
    pub fn signal(&self) {
        add_one(self.0.as_fd());
    }

    /// Reads the counter and resets it. Returns 0 if nothing was added.
    pub fn take(&self) -> u64 {
        let mut count = 0_u64;
        // SAFETY: reads eight bytes into a local variable, from an fd that `self` owns.
        let got = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        if got == 8 { count } else { 0 }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Adds one to the counter of an eventfd. Blocks if the counter is full and the fd is blocking.
#[inline]
pub fn add_one(fd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: writes eight bytes of a local variable to an open fd.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}
