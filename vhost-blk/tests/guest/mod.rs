//! A guest's memory for tests: a memfd, as a front end hands it over.
#![expect(unsafe_code, reason = "a system call")]
#![expect(clippy::unwrap_used, reason = "a test that cannot make its memory fails")]

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use vhost_blk::memory::{GuestMemory, RegionSpec};
use vhost_blk::reclaim::Unmapper;

/// One region of `len` bytes at guest-physical 0, and at `user_addr` in the front end.
pub(crate) fn memory(len: u64, user_addr: u64) -> Arc<GuestMemory> {
    // SAFETY: a plain system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: the fd was just made.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    std::fs::File::from(fd.try_clone().unwrap()).set_len(len).unwrap();
    let spec = RegionSpec { gpa: 0, size: len, user_addr, offset: 0 };
    let unmapper = Unmapper::start().unwrap();
    Arc::new(GuestMemory::map(vec![(spec, fd)], None, &unmapper).unwrap())
}
