//! The dirty log of a live migration: a bitmap, shared with the front end, of the pages of guest
//! memory that were written ("Migration" in the vhost-user specification).
#![expect(unsafe_code, reason = "the bitmap is shared with the front end")]

use std::sync::atomic::{AtomicU8, Ordering};

use crate::reclaim::Unmapper;
use crate::shared_file::{self, SharedFile};
use closer::ForeignFd;

/// Bytes of guest memory to a bit; the specification's number, whatever pages the guest has.
const PAGE_BYTES: u64 = 4096;

/// A dirty log, mapped.
#[derive(Debug)]
pub struct DirtyLog(SharedFile);

impl DirtyLog {
    /// Maps the log that SET_LOG_BASE names: `size` bytes at `offset` of the file.
    ///
    /// # Errors
    /// The file does not do.
    pub fn map(
        fd: &ForeignFd,
        offset: u64,
        size: u64,
        unmapper: &Unmapper,
    ) -> Result<Self, shared_file::Error> {
        SharedFile::map(fd, offset, size, unmapper).map(Self)
    }

    /// Marks the pages of `len` bytes at `gpa`, after they were written. Pages beyond the log are
    /// the front end's own omission.
    pub fn mark(&self, gpa: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|last| gpa.checked_add(last)) else { return };
        let pages = self.0.size_bytes().saturating_mul(8);
        let end = (last / PAGE_BYTES + 1).min(pages);
        let mut page = gpa / PAGE_BYTES;
        while page < end {
            // Those of one byte together: a request may be of a GiB.
            let (at, first) = (page / 8, page % 8);
            let count = (end - page).min(8 - first);
            self.mark_byte(at, (0xff_u8 >> (8 - count)) << first);
            page += count;
        }
    }

    /// Sets bits of the log's byte `at`, which is below its size.
    fn mark_byte(&self, at: u64, bits: u8) {
        let at: *const AtomicU8 = self.0.host().wrapping_add(at as usize).cast();
        // SAFETY: the caller says so, and the log is mapped.
        let byte = unsafe { &*at };
        // SeqCst: the front end takes bits away by exchange and then reads the page. If its exchange
        // comes first, the bits are there again; if ours comes first, it sees what was written. To
        // look first whether they are there would let the write be overtaken by the look.
        byte.fetch_or(bits, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::memfd;

    #[test]
    fn pages_are_marked_and_none_beyond_the_log() {
        let unmapper = Unmapper::start().unwrap();
        let log = DirtyLog::map(&ForeignFd::alone(memfd(4096)), 8, 4, &unmapper).unwrap();
        let byte = |n: usize| {
            // SAFETY: bytes of the mapped page that the log lies in.
            unsafe { log.0.host().wrapping_add(n).read_volatile() }
        };
        log.mark(PAGE_BYTES - 1, 2);
        log.mark(9 * PAGE_BYTES, 1);
        log.mark(31 * PAGE_BYTES, 5 * PAGE_BYTES);
        log.mark(40 * PAGE_BYTES, 1);
        log.mark(u64::MAX, 9);
        log.mark(0, 0);
        assert_eq!([byte(0), byte(1), byte(2), byte(3), byte(4)], [3, 2, 0, 0x80, 0]);
        log.mark(6 * PAGE_BYTES, 12 * PAGE_BYTES);
        assert_eq!([byte(0), byte(1), byte(2), byte(3), byte(4)], [0xc3, 0xff, 3, 0x80, 0]);
    }
}
