//! A file of memory, as a front end hands it over.
#![expect(unsafe_code, reason = "a system call")]
#![expect(clippy::unwrap_used, reason = "a test that cannot make its memory fails")]

use std::os::fd::{FromRawFd, OwnedFd};

/// A memfd of `len` bytes, which may be sealed.
pub(crate) fn memfd(len: u64) -> OwnedFd {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a plain system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the fd was just made.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).unwrap();
    file.into()
}
