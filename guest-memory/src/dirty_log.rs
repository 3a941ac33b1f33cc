//! The dirty log of a live migration: a bitmap, shared with the front end, of the guest pages that
//! the target has written ("Migration" in the vhost-user specification).
#![expect(unsafe_code, reason = "the bitmap is shared with the front end")]

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::address_space::usize_of;
use crate::shared_file::{self, SharedFile};
use crate::unmapper::Unmapper;
use closer::ForeignFd;

/// Bytes of guest memory for each bit. The specification sets this number, independent of the
/// guest's page size.
const PAGE_BYTES: u64 = 4096;

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog(SharedFile);

impl DirtyLog {
    /// Maps the log of a SET_LOG_BASE message: `size` bytes at `offset` of the file.
    ///
    /// # Errors
    /// The file or the range is invalid.
    pub fn map(
        fd: &ForeignFd,
        offset: u64,
        size: u64,
        unmapper: &Unmapper,
    ) -> Result<Self, shared_file::Error> {
        SharedFile::map(fd, offset, size, unmapper).map(Self)
    }

    /// Marks the pages of `len` bytes at `gpa`. Call it after writing them. Pages beyond the end of
    /// the log are ignored: the front end has made the log too short.
    pub fn mark(&self, gpa: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|last| gpa.checked_add(last)) else { return };
        let pages = self.0.size_bytes().saturating_mul(8);
        let end = (last / PAGE_BYTES + 1).min(pages);
        let page = gpa / PAGE_BYTES;
        if end.saturating_sub(page) >= 2 * u64::from(u64::BITS) {
            self.mark_many(page, end);
        } else {
            self.mark_bytes(page, end);
        }
    }

    /// Marks the pages `page..end`, with one store per byte of the log.
    fn mark_bytes(&self, mut page: u64, end: u64) {
        while page < end {
            let (at, first) = (page / 8, page % 8);
            let count = (end - page).min(8 - first);
            self.mark_byte(at, (0xff_u8 >> (8 - count)) << first);
            page += count;
        }
    }

    /// Marks many pages, with one store per word of the log. A request may be a GiB long, and a
    /// reset marks all of a guest's memory. Returns the number of words.
    #[cold]
    fn mark_many(&self, page: u64, end: u64) -> u64 {
        let bits = u64::from(u64::BITS);
        // The log may begin at any offset in its file, so its first word may be unaligned.
        let at = self.0.host().wrapping_add(usize_of(page / 8));
        let first = (page / 8 + at.align_offset(size_of::<AtomicU64>()) as u64) * 8;
        let first = if first < page { first + bits } else { first };
        let words = (end - first) / bits;
        self.mark_bytes(page, first);
        for word in 0..words {
            let at = self.0.host().wrapping_add(usize_of(first / 8 + 8 * word));
            let at: *const AtomicU64 = at.cast();
            // SAFETY: eight bytes of the mapped log, at an aligned address.
            let word = unsafe { &*at };
            // SeqCst: as in `mark_byte`. The store sets all bits, so it loses no other bits.
            word.store(u64::MAX, Ordering::SeqCst);
        }
        self.mark_bytes(first + words * bits, end);
        words
    }

    /// Sets bits in byte `at` of the log. `at` is less than the log's size.
    fn mark_byte(&self, at: u64, bits: u8) {
        let at: *const AtomicU8 = self.0.host().wrapping_add(usize_of(at)).cast();
        // SAFETY: the caller guarantees that `at` is in the log, which is mapped.
        let byte = unsafe { &*at };
        // SeqCst: the front end clears bits with an exchange and then reads the page. If its
        // exchange comes first, this operation sets the bits again. If this operation comes first,
        // the front end sees what was written. A load that skips bits already set would break this:
        // the load could be ordered before the write of the page.
        byte.fetch_or(bits, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memfd;

    #[test]
    fn pages_are_marked_and_none_beyond_the_log() {
        let unmapper = Unmapper::start().unwrap();
        let log = DirtyLog::map(&ForeignFd::alone(memfd(4096)), 8, 4, &unmapper).unwrap();
        let byte = |n: usize| {
            // SAFETY: a byte of the mapped page that contains the log.
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

    #[test]
    fn many_pages_are_marked_by_words() {
        const BYTES: u64 = 128;
        let unmapper = Unmapper::start().unwrap();
        for offset in 0..9 {
            for (page, end) in [(0, 1024), (0, 128), (1, 129), (7, 200), (8, 700), (63, 1024)] {
                let file = ForeignFd::alone(memfd(4096));
                let log = DirtyLog::map(&file, offset, BYTES, &unmapper).unwrap();
                log.mark(page * PAGE_BYTES + 5, (end - page - 1) * PAGE_BYTES);
                for n in 0..4096 - offset {
                    // SAFETY: a byte of the mapped page that contains the log or its first part.
                    let byte = unsafe { log.0.host().wrapping_add(usize_of(n)).read_volatile() };
                    let expected = (0..8).filter(|bit| (page..end).contains(&(8 * n + bit)));
                    let expected = expected.fold(0, |byte, bit| byte | 1 << bit);
                    assert_eq!(byte, expected, "offset {offset}, {page}..{end}: byte {n}");
                }
            }
        }
    }

    /// Bounds the cost of a reset of a guest with 63 GiB: some 260,000 stores, a millisecond.
    #[test]
    fn all_memory_of_a_large_guest_is_marked_in_few_steps() {
        let (unmapper, pages) = (Unmapper::start().unwrap(), (63 << 30) / PAGE_BYTES);
        let file = ForeignFd::alone(memfd(pages / 8 + 8));
        let log = DirtyLog::map(&file, 3, pages / 8, &unmapper).unwrap();
        let words = log.mark_many(0, pages);
        assert!(words <= pages / 64 && pages - words * 64 < 128, "{words} words");
        // SAFETY: the last byte of the log.
        let last = unsafe { log.0.host().wrapping_add(usize_of(pages / 8 - 1)).read_volatile() };
        assert_eq!(last, 0xff);
    }
}
