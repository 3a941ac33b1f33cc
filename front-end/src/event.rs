//! Eventfds: kicks and calls.
#![expect(unsafe_code, reason = "vmm-sys-util's EventFd, which the vhost crate wants, has no AsFd")]

use std::os::fd::{AsRawFd, BorrowedFd};

pub use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

use crate::error::{Error, Result};

/// Makes a non-blocking eventfd.
///
/// # Errors
/// The eventfd cannot be created.
pub fn event_fd() -> Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("cannot make an eventfd"))
}

/// Borrows the fd of `event`, to wait on it or to send it.
#[must_use]
pub fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the fd is open for as long as the EventFd that owns it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
