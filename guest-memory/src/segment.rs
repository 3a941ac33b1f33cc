//! A piece of memory as the kernel's `struct iovec`.
#![expect(unsafe_code, reason = "sends an address between threads")]

use std::fmt;

/// A piece of memory that an I/O reads or writes, laid out as the kernel's `struct iovec`.
///
/// It usually is guest memory, which the guest may change at any time. The memory is only passed to
/// the kernel or copied through raw pointers, and never becomes a slice.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Segment(libc::iovec);

impl Segment {
    /// A segment of `len` bytes at `base`.
    #[must_use]
    pub const fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Address of the first byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the segment has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.base(), self.len())
    }
}

// SAFETY: a segment is an address and a length. Only an access through the address is unsafe, and
// the code that accesses it justifies that.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}
