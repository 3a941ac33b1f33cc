//! The segments of a part of an I/O.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::mem::MaybeUninit;

use crate::io::{Io, Op, Segment, Tag};

/// The largest number of segments of a part: an I/O has at most 1,034.
const SEGMENTS: usize = 1040;

/// Memory for the segments of parts of I/Os, in slots: for a channel that passes an I/O on in parts.
///
/// A slot's memory is touched only if a part begins or ends inside a segment of its I/O.
pub struct Cuts {
    segments: Box<[MaybeUninit<Segment>]>,
}

impl Cuts {
    /// Makes this many slots.
    #[must_use]
    pub fn new(slots: u16) -> Self {
        Self { segments: Box::new_uninit_slice(usize::from(slots) * SEGMENTS) }
    }

    /// Returns an I/O with this tag for the `len` bytes of `io` that begin at `at`. Its place on the
    /// bdev is `offset`. It uses the slot until it has ended. `None`: the range is not within `io`, or the
    /// slot does not exist.
    ///
    /// # Safety
    /// The segments of `io` are valid. The caller uses the result as long as they are and the slot
    /// is not used for another part.
    pub unsafe fn part(
        &mut self,
        slot: u16,
        io: &Io,
        at: u64,
        len: u64,
        tag: Tag,
        offset: u64,
    ) -> Option<Io> {
        if !matches!(io.op, Op::Read | Op::Write) {
            let part = Io::plain(io.op, tag, offset, len).unmapping(io.may_unmap);
            return Some(part);
        }
        // SAFETY: by the caller's promise.
        let segments = unsafe { io.segments() };
        let (first, skipped) = find(segments, at)?;
        let (last, used) = find_end(segments, first, skipped as u64 + len)?;
        let segments = segments.get(first..=last)?;
        let whole = skipped == 0 && segments.last().is_some_and(|end| end.len() == used);
        if whole {
            return Some(Io::rw(io.op, tag, offset, len, segments));
        }
        let from = usize::from(slot) * SEGMENTS;
        let room = self.segments.get_mut(from..from + SEGMENTS)?.get_mut(..segments.len())?;
        for (n, (place, segment)) in room.iter_mut().zip(segments).enumerate() {
            let start = if n == 0 { skipped } else { 0 };
            let end = if n == last - first { used } else { segment.len() };
            let base = segment.base().wrapping_add(start);
            place.write(Segment::new(base, end.checked_sub(start)?));
        }
        // SAFETY: the loop has written all of them.
        let written = unsafe { std::slice::from_raw_parts(room.as_ptr().cast(), room.len()) };
        Some(Io::rw(io.op, tag, offset, len, written))
    }
}

/// Returns the segment with the byte `at`, and the number of bytes before it in the segment.
fn find(segments: &[Segment], at: u64) -> Option<(usize, usize)> {
    let mut left = at;
    for (n, segment) in segments.iter().enumerate() {
        let len = segment.len() as u64;
        if left < len {
            return Some((n, usize::try_from(left).ok()?));
        }
        left -= len;
    }
    None
}

/// Returns the segment with the last of the `len` bytes from the beginning of segment `first`, and
/// the number of the bytes that are in it.
fn find_end(segments: &[Segment], first: usize, len: u64) -> Option<(usize, usize)> {
    let (n, before) = find(segments.get(first..)?, len.checked_sub(1)?)?;
    Some((first + n, before + 1))
}

#[cfg(test)]
mod tests {
    use guest_memory::usize_of;

    use super::*;

    /// Compares all parts of an I/O with bytes `0..` in segments of these lengths.
    fn check(lens: &[usize], parts: &[(u64, u64)]) {
        let total: usize = lens.iter().sum();
        let mut bytes: Vec<u8> = (0..=250).cycle().take(total).collect();
        let mut at = 0;
        let segments: Vec<Segment> = lens
            .iter()
            .map(|len| {
                let segment = Segment::new(bytes[at..].as_mut_ptr(), *len);
                at += len;
                segment
            })
            .collect();
        let io = Io::rw(Op::Write, Tag(3), 0, total as u64, &segments);
        let mut cuts = Cuts::new(2);
        for (at, len) in parts {
            // SAFETY: the segments live until the end of this function; slot 1 is used once at a
            // time.
            let part = unsafe { cuts.part(1, &io, *at, *len, Tag(9), 512) }.unwrap();
            assert_eq!((part.tag, part.offset, part.len), (Tag(9), 512, *len));
            // SAFETY: as above.
            let got: Vec<u8> = unsafe { part.segments() }
                .iter()
                // SAFETY: the segments point into `bytes`, which nothing else uses now.
                .flat_map(|s| unsafe { std::slice::from_raw_parts(s.base(), s.len()) }.to_vec())
                .collect();
            let (at, len) = (usize_of(*at), usize_of(*len));
            assert_eq!(got, bytes[at..at + len], "{at}+{len} of {lens:?}");
        }
    }

    #[test]
    fn a_part_has_its_bytes_whatever_the_segments() {
        let parts = [(0, 4096), (0, 512), (512, 512), (3584, 512), (1024, 3072), (4095, 1), (7, 9)];
        check(&[4096], &parts);
        check(&[512; 8], &parts);
        check(&[1, 511, 3, 0, 509, 3072], &parts);
        check(&[4; 1024], &parts);
    }

    #[test]
    fn a_range_past_the_end_and_an_unknown_slot_are_refused() {
        let mut bytes = [0; 8];
        let segments = [Segment::new(bytes.as_mut_ptr(), 8)];
        let io = Io::rw(Op::Read, Tag(0), 0, 8, &segments);
        let mut cuts = Cuts::new(1);
        for (slot, at, len) in [(0, 8, 1), (0, 1, 8), (0, 0, 0), (1, 1, 2), (0, u64::MAX, 2)] {
            // SAFETY: the segments live until the end of this function.
            let part = unsafe { cuts.part(slot, &io, at, len, Tag(0), 0) };
            assert!(part.is_none(), "{slot} {at}+{len}");
        }
    }
}
