//! Accesses memory that may not be mapped: a defect that unmaps it is reported and does not crash
//! the test.
#![expect(unsafe_code, reason = "system calls")]

use std::os::fd::AsRawFd;

/// Returns whether a shared, writable mapping of this memfd exists anywhere. Tries to seal it,
/// which the kernel refuses while there is one. Once the result is false, it stays false.
pub(crate) fn is_mapped(memfd: &impl AsRawFd) -> bool {
    // SAFETY: a plain system call on an open fd.
    let result = unsafe { libc::fcntl(memfd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    result != 0
}

/// Reads `len` bytes at `from`. Returns `None` if they are not all mapped.
pub(crate) fn read(from: *mut u8, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: from.cast(), iov_len: len };
    // SAFETY: the kernel checks both ranges, and the destination is valid.
    let n = unsafe { libc::process_vm_readv(pid(), &raw const local, 1, &raw const remote, 1, 0) };
    (n == len as isize).then_some(bytes)
}

/// Writes `bytes` to `to`. Returns `None` if that is not all mapped.
pub(crate) fn write(to: *mut u8, bytes: &[u8]) -> Option<()> {
    let len = bytes.len();
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: to.cast(), iov_len: len };
    // SAFETY: the kernel checks both ranges, and the destination is a guest's memory.
    let n = unsafe { libc::process_vm_writev(pid(), &raw const local, 1, &raw const remote, 1, 0) };
    (n == len as isize).then_some(())
}

fn pid() -> libc::pid_t {
    std::process::id().cast_signed()
}
