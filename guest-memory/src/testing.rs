//! Guest memory for tests, in memfds, as front ends send them.
#![expect(unsafe_code, reason = "a system call")]
#![expect(clippy::unwrap_used, reason = "a test fails if it cannot create its memory")]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use closer::ForeignFd;

use crate::{GuestMemory, RegionSpec, Unmapper};

/// A memfd of `len` bytes, as a front end would send it. It may be sealed.
#[must_use]
pub fn memfd(len: u64) -> OwnedFd {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the fd is new, and this is its only owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file.into()
}

/// One region of `len` bytes at guest-physical 0, user address 0x7000_0000.
#[must_use]
pub fn flat(len: u64) -> Arc<GuestMemory> {
    flat_at(len, 0x7000_0000)
}

/// One region of `len` bytes at guest-physical 0, and at `user_addr` in the front end's address
/// space.
#[must_use]
pub fn flat_at(len: u64, user_addr: u64) -> Arc<GuestMemory> {
    let spec = RegionSpec { gpa: 0, size: len, user_addr, offset: 0 };
    let unmapper = Unmapper::start().unwrap();
    Arc::new(GuestMemory::map(vec![(spec, ForeignFd::alone(memfd(len)))], None, &unmapper).unwrap())
}

/// `count` adjacent regions of one page each.
#[must_use]
pub fn pages(count: usize) -> GuestMemory {
    let unmapper = Unmapper::start().unwrap();
    let fd = ForeignFd::alone(memfd(0x1000));
    let add = |before: Option<GuestMemory>, n: usize| {
        let gpa = 0x1000 * n as u64;
        let spec = RegionSpec { gpa, size: 0x1000, user_addr: 0x7000_0000 + gpa, offset: 0 };
        Some(GuestMemory::with_region(before.as_ref(), spec, &fd, &unmapper).unwrap())
    };
    (0..count).fold(None, add).unwrap()
}
