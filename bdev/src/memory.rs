//! Copies between a device's memory and the segments of an I/O. No other code accesses either.
//!
//! A guest changes its memory while it is being copied, and two channels may write the same blocks
//! of a memory disk at the same time. Neither memory is ever a slice here, so no `&` or `&mut`
//! promises that the bytes do not change: they are copied through raw pointers, by `memcpy`. A race
//! can only mix old and new bytes in the range that is written concurrently. A disk guarantees no
//! more for overlapping requests that are outstanding together: no order, and no content of the
//! range that they share. No decision depends on a value that is read here.
#![expect(unsafe_code, reason = "copies through addresses in a guest's memory")]

use std::ptr;

use guest_memory::usize_of;

use crate::io::Segment;

/// Copies `len` bytes at `from` into the segments, `skip` bytes in. Returns whether the segments
/// were long enough; if not, the bytes that fit have been copied.
///
/// # Safety
/// `from..from + len` is readable, the segments are writable, and they do not overlap.
#[inline]
pub unsafe fn scatter(segments: &[Segment], skip: u64, from: *const u8, len: usize) -> bool {
    for_each_piece(segments, skip, len, |at, done, n| {
        // SAFETY: the caller guarantees both ranges; `done + n <= len`, and `at..at + n` lies
        // within one segment.
        unsafe { ptr::copy_nonoverlapping(from.wrapping_add(done), at, n) }
    })
}

/// The way in which bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Normal stores: cache lines are fetched, changed, and stay in the cache.
    Cached,
    /// Non-temporal stores of whole lines, which bypass the cache and avoid fetching lines that are
    /// about to be overwritten. For targets that are larger than the cache.
    Streamed,
}

/// A target of at least this size is not expected to be in the cache: one core's share of the
/// third-level cache is smaller in current processors, and in most of them the whole cache is.
const STREAMED_FROM: u64 = 32 << 20;

impl Stores {
    /// Returns the best way for copies to random places in `size` bytes.
    #[must_use]
    pub fn for_target_of(size: u64) -> Self {
        if size >= STREAMED_FROM { Self::Streamed } else { Self::Cached }
    }
}

/// Copies `len` bytes from the segments, `skip` bytes in, to `to`. Returns whether the segments
/// were long enough; if not, the available bytes have been copied.
///
/// # Safety
/// `to..to + len` is writable, the segments are readable, and they do not overlap.
#[inline]
pub unsafe fn gather(
    segments: &[Segment],
    skip: u64,
    to: *mut u8,
    len: usize,
    stores: Stores,
) -> bool {
    let whole = for_each_piece(segments, skip, len, |at, done, n| {
        let to = to.wrapping_add(done);
        if stores == Stores::Streamed && n.is_multiple_of(LINE) && to.align_offset(LINE) == 0 {
            // SAFETY: as in `scatter`, in the other direction; whole, aligned lines.
            unsafe { stream(at.cast_const(), to, n) }
        } else {
            // SAFETY: as in `scatter`, in the other direction.
            unsafe { ptr::copy_nonoverlapping(at.cast_const(), to, n) }
        }
    });
    if stores == Stores::Streamed {
        streamed();
    }
    whole
}

/// Bytes in a cache line.
const LINE: usize = 64;

/// Copies whole lines with non-temporal stores. [`streamed`] orders them with later stores.
///
/// # Safety
/// As [`ptr::copy_nonoverlapping`]; `to` is aligned to a line and `len` a multiple of one.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    use core::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for line in (0..len).step_by(LINE) {
        let (from, to) = (from.wrapping_add(line), to.wrapping_add(line));
        // Load a whole line before storing any of it, so that the line is written in one piece.
        let words: [__m128i; 4] = std::array::from_fn(|i| {
            // SAFETY: 16 bytes within the caller's `len`.
            unsafe { _mm_loadu_si128(from.cast::<__m128i>().wrapping_add(i)) }
        });
        for (i, word) in words.into_iter().enumerate() {
            // SAFETY: as above; `to` is aligned.
            unsafe { _mm_stream_si128(to.cast::<__m128i>().wrapping_add(i), word) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller guarantees that both ranges are valid.
    unsafe { ptr::copy_nonoverlapping(from, to, len) }
}

/// Lines that are fetched together: one sector, the smallest copy.
const SECTOR_LINES: usize = 8;
/// The most sectors that are prefetched. A copy waits for its first lines; then the processor
/// detects the pattern and prefetches the rest itself. More would delay the copy under way.
const AHEAD_SECTORS: usize = 4;

/// Prefetches the beginning of the `len` bytes at `at` into the L2 cache, which allows more
/// outstanding fetches than L1. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8, len: u64) {
    #[cfg(target_arch = "x86_64")]
    for sector in 0..(usize_of(len) / (SECTOR_LINES * LINE)).min(AHEAD_SECTORS) {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        for line in 0..SECTOR_LINES {
            let at = at.wrapping_add((sector * SECTOR_LINES + line) * LINE);
            // SAFETY: a hint, which has no effect for an invalid address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}

/// Orders streamed stores before all later stores: a reader that sees a later store also sees the
/// streamed ones.
#[inline]
fn streamed() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence has no precondition.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// Fills `to..to + len` with zeroes.
///
/// # Safety
/// The range is writable.
#[inline]
pub unsafe fn zero(to: *mut u8, len: usize) {
    // SAFETY: the caller guarantees that the range is writable.
    unsafe { ptr::write_bytes(to, 0, len) }
}

/// Fills `len` bytes of the segments, from byte `skip` on, with zeroes. Returns whether the segments
/// were long enough.
///
/// # Safety
/// The segments are writable.
pub unsafe fn clear(segments: &[Segment], skip: u64, len: usize) -> bool {
    for_each_piece(segments, skip, len, |at, _, n| {
        // SAFETY: the piece lies within a segment, which the caller guarantees to be valid.
        unsafe { zero(at, n) }
    })
}

/// Flips the bits of `mask` in byte `at` of the segments, if they are long enough.
///
/// # Safety
/// The segments are readable and writable.
pub unsafe fn flip(segments: &[Segment], at: u64, mask: u8) {
    for_each_piece(segments, at, 1, |byte, _, _| {
        // SAFETY: the byte lies within a segment, which the caller guarantees to be valid.
        let value = unsafe { byte.read_volatile() };
        // SAFETY: as above.
        unsafe { byte.write_volatile(value ^ mask) }
    });
}

/// Calls `piece(address, bytes done before, length)` for each contiguous part of the `len` bytes
/// from byte `skip` of the segments. Returns whether the segments were long enough.
#[inline]
fn for_each_piece(
    segments: &[Segment],
    mut skip: u64,
    len: usize,
    mut piece: impl FnMut(*mut u8, usize, usize),
) -> bool {
    let mut done = 0;
    for segment in segments {
        if done == len {
            break;
        }
        let size = segment.len();
        if skip >= size as u64 {
            skip -= size as u64;
            continue;
        }
        let start = usize_of(skip);
        let n = (size - start).min(len - done);
        piece(segment.base().wrapping_add(start), done, n);
        done += n;
        skip = 0;
    }
    done == len
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(memory: &mut [u8], lens: &[usize]) -> Vec<Segment> {
        let mut base = memory.as_mut_ptr();
        lens.iter()
            .map(|&len| {
                let segment = Segment::new(base, len);
                base = base.wrapping_add(len);
                segment
            })
            .collect()
    }

    #[test]
    fn every_window_of_odd_segments_is_copied_both_ways() {
        let source: Vec<u8> = (1..=40).collect();
        for skip in 0..=40 {
            for len in 0..=40 - skip {
                let mut memory = [0; 40];
                let list = segments(&mut memory, &[1, 0, 7, 3, 29]);
                // SAFETY: both ranges are 40 bytes of separate arrays.
                assert!(unsafe { scatter(&list, skip as u64, source.as_ptr(), len) });
                let mut back = vec![0; len];
                // SAFETY: as above.
                assert!(unsafe {
                    gather(&list, skip as u64, back.as_mut_ptr(), len, Stores::Cached)
                });
                assert_eq!(back, source[..len]);
                assert_eq!(memory[skip..skip + len], source[..len]);
                assert!(memory[..skip].iter().chain(&memory[skip + len..]).all(|&b| b == 0));
            }
        }
    }

    #[test]
    fn streamed_copies_copy_all_bytes() {
        #[repr(align(64))]
        struct Aligned([u8; 512]);
        let mut memory: [u8; 600] = std::array::from_fn(|i| i.to_le_bytes()[0]);
        let list = segments(&mut memory, &[64, 1, 200, 335]);
        for (skip, to, len) in [(0, 0, 512), (0, 64, 128), (1, 0, 256), (65, 3, 64), (0, 0, 63)] {
            let mut target = Aligned([0xee; 512]);
            let at = target.0.as_mut_ptr().wrapping_add(to);
            // SAFETY: within both arrays.
            assert!(unsafe { gather(&list, skip, at, len, Stores::Streamed) });
            let expected: Vec<u8> = (0..512)
                .map(|i| {
                    if (to..to + len).contains(&i) { memory[usize_of(skip) + i - to] } else { 0xee }
                })
                .collect();
            assert_eq!(target.0[..], expected[..], "{skip} {to} {len}");
        }
    }

    #[test]
    fn too_short_segments_are_detected() {
        let mut memory = [0; 8];
        let list = segments(&mut memory, &[3, 5]);
        let source = [9; 16];
        // SAFETY: reads 8 bytes of 16; the copy stops at the end of the segments.
        assert!(!unsafe { scatter(&list, 0, source.as_ptr(), 9) });
        // SAFETY: as above.
        assert!(!unsafe { scatter(&list, 8, source.as_ptr(), 1) });
        // SAFETY: 8 bytes of `memory`.
        unsafe { flip(&list, 4, 1) };
        // SAFETY: the offset is past the end, so no byte is accessed.
        unsafe { flip(&list, 8, 1) };
        assert_eq!(memory, [9, 9, 9, 9, 8, 9, 9, 9]);
    }
}
