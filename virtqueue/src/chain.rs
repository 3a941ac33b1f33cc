//! Chains: the buffers of a chain as pieces of memory that this process can access, and their
//! totals. Only the device interprets their contents.
#![expect(unsafe_code, reason = "copies out of guest memory")]

use std::ptr::NonNull;

use guest_memory::{Near, Segment, usize_of};
use vm_memory::{Bytes, VolatileSlice};

use crate::cache;
use crate::desc::Buffer;
use crate::ring::Chained;

/// Maximum number of segments in a chain whose driver respects `seg_max`: 126 of data, a header, a
/// status, and spare ones for buffers that extend across memory regions.
pub const SEGMENTS_MAX: usize = 136;

/// Maximum number of segments in any chain: 1,024 of data, because Windows' driver ignores
/// `seg_max` (SPDK issues 2330 and 3432), a header, a status, and spare ones.
pub const LONG_SEGMENTS_MAX: usize = 1034;

/// The memory of a chain. The fields are in the order of their use, because the cache holds only
/// the first lines of many chains.
#[repr(C)]
#[derive(Debug)]
pub struct Chain {
    totals: Totals,
    /// The segments of a chain that has more of them than `segments` has room for.
    long: Option<LongSegments>,
    /// Readable segments, then writable ones, `totals.count` in all. The rest is left from earlier
    /// chains.
    segments: [Segment; SEGMENTS_MAX],
}

/// Room for the segments of a long chain. A queue has a few of these and lends them to its
/// requests.
pub type LongSegments = Box<[Segment; LONG_SEGMENTS_MAX]>;

/// A [`LongSegments`] of empty segments.
#[must_use]
pub fn long_segments() -> LongSegments {
    Box::new([EMPTY; LONG_SEGMENTS_MAX])
}

/// Cold and out of line: keeps the common path short.
#[cold]
#[inline(never)]
fn long_part(long: &LongSegments) -> &[Segment] {
    &long[..]
}

/// As [`long_part`].
#[cold]
#[inline(never)]
fn long_part_mut(long: &mut LongSegments) -> &mut [Segment] {
    &mut long[..]
}

const EMPTY: Segment = Segment::new(std::ptr::null_mut(), 0);

// SAFETY: `last_writable` is an address in guest memory, as the segments are. Only an access
// through it is unsafe.
unsafe impl Send for Chain {}

/// Totals of a chain.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// The last writable byte. `None` if the chain has none, or if the walk did not reach its end.
    pub last_writable: Option<NonNull<u8>>,
    /// Bytes of the readable buffers.
    pub readable_bytes: u64,
    /// Bytes of all buffers.
    pub bytes: u64,
    /// Number of segments. In a malformed chain, this also counts segments that did not fit, and
    /// buffers outside guest memory.
    pub count: usize,
    /// Number of readable segments.
    pub readable: usize,
    /// The chain has a readable buffer after a writable one, an empty buffer, a buffer outside
    /// guest memory, too many segments, or no end.
    pub malformed: bool,
}

impl Totals {
    /// Bytes of the writable buffers.
    #[inline]
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.bytes - self.readable_bytes
    }

    /// Adds a buffer, as one segment if it is in one memory region. Returns whether it fitted.
    #[inline(always)]
    fn push<const N: usize>(
        &mut self,
        segments: &mut [Segment; N],
        near: &mut Near<'_>,
        buffer: Buffer,
    ) -> bool {
        let len = u64::from(buffer.len);
        match near.translate(buffer.gpa) {
            // The buffer is not empty and is inside the region.
            Some((host, room)) if len.wrapping_sub(1) < room => {
                self.push_piece(segments, host, len, buffer.write)
            }
            // By value: the totals stay in registers, and the buffer is not stored.
            _ => {
                let Buffer { gpa, write, .. } = buffer;
                *self = self.push_pieces(segments, near, gpa, len, write);
                self.count <= N
            }
        }
    }

    #[inline(always)]
    fn push_piece<const N: usize>(
        &mut self,
        segments: &mut [Segment; N],
        host: *mut u8,
        len: u64,
        write: bool,
    ) -> bool {
        let room = segments.get_mut(self.count);
        self.count += 1;
        self.bytes += len;
        if write {
            self.last_writable = NonNull::new(host.wrapping_add(usize_of(len) - 1));
        } else {
            // Section 2.7.4.2: readable buffers come before writable ones.
            self.malformed |= self.last_writable.is_some();
            self.readable_bytes = self.bytes;
            self.readable = self.count;
        }
        let fits = room.is_some();
        if let Some(segment) = room {
            *segment = Segment::new(host, usize_of(len));
        }
        fits
    }

    /// Adds a buffer that extends into another region, is outside guest memory, or is empty. No
    /// driver uses empty buffers, and a chain with one is malformed. Its last writable byte is that
    /// of the other buffers.
    #[cold]
    fn push_pieces<const N: usize>(
        mut self,
        segments: &mut [Segment; N],
        near: &mut Near<'_>,
        mut gpa: u64,
        mut left: u64,
        write: bool,
    ) -> Self {
        if left == 0 {
            // Counted, because reading it took time.
            self.count += 1;
            self.malformed = true;
        }
        while left > 0 {
            // One segment for the rest of a chain that is too long, because a buffer may extend
            // across many small regions.
            let found = if self.count > LONG_SEGMENTS_MAX { None } else { near.translate(gpa) };
            let Some((host, room)) = found else {
                self.count += 1;
                self.malformed = true;
                // The chain's last byte is not known.
                self.last_writable = None;
                return self;
            };
            let len = left.min(room);
            self.push_piece(segments, host, len, write);
            left -= len;
            gpa = gpa.wrapping_add(len);
        }
        self
    }
}

impl Default for Chain {
    fn default() -> Self {
        let segments = [EMPTY; SEGMENTS_MAX];
        Self { totals: Totals::default(), segments, long: None }
    }
}

impl Chain {
    /// `count` of the segments, beginning with segment `first`.
    #[inline]
    #[must_use]
    pub fn data(&self, first: usize, count: usize) -> &[Segment] {
        &self.segments()[first..first + count]
    }

    #[inline]
    fn segments(&self) -> &[Segment] {
        match &self.long {
            None => &self.segments,
            Some(long) => long_part(long),
        }
    }

    /// Collects a chain. Replaces the previous one.
    // A separate function, so that the totals stay in registers.
    #[inline(never)]
    pub fn collect<C: Chained>(&mut self, near: &mut Near<'_>, chain: C) -> C::Taken {
        debug_assert!(self.long.is_none(), "the previous request has returned its LongSegments");
        collect_into(&mut self.segments, &mut self.totals, near, &chain, false)
    }

    /// Returns whether the chain may have more segments than fit. If so, collect it with
    /// [`Chain::collect_long`].
    #[inline]
    #[must_use]
    pub fn overflown(&self) -> bool {
        self.totals.count > SEGMENTS_MAX && self.long.is_none()
    }

    /// Collects a chain again, with room for more segments. Replaces the result of the first walk.
    #[cold]
    pub fn collect_long<C: Chained>(
        &mut self,
        near: &mut Near<'_>,
        chain: C,
        mut long: LongSegments,
    ) -> C::Taken {
        let taken = collect_into(&mut long, &mut self.totals, near, &chain, true);
        self.long = Some(long);
        taken
    }

    /// Returns whether the chain holds a [`LongSegments`].
    #[inline]
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.long.is_some()
    }

    /// Removes and returns the [`LongSegments`].
    #[must_use]
    pub fn take_long(&mut self) -> Option<LongSegments> {
        self.long.take()
    }

    /// Calls `visit` with address and length of each piece of guest memory that the device may have
    /// written: the first `most` writable bytes, and the last one.
    pub fn written(&self, most: u64, mut visit: impl FnMut(*mut u8, u64)) {
        let mut left = if self.totals.malformed { 0 } else { most };
        if left > 0 {
            for segment in &self.segments()[self.totals.readable..self.totals.count] {
                let len = left.min(segment.len() as u64);
                visit(segment.base(), len);
                left -= len;
                if left == 0 {
                    break;
                }
            }
        }
        if let Some(last) = self.totals.last_writable {
            visit(last.as_ptr(), 1);
        }
    }

    /// Number of segments; see [`Totals::count`].
    #[inline]
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.totals.count
    }

    /// Bytes of all buffers.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.totals.bytes
    }

    /// The first readable byte. Requests have their header there.
    #[inline]
    #[must_use]
    pub fn first_readable(&self) -> Option<*mut u8> {
        (self.totals.readable > 0).then(|| self.segments[0].base())
    }

    /// The first byte of the readable part, if that part is one segment of `len` bytes.
    #[inline]
    #[must_use]
    pub fn lone_readable(&self, len: usize) -> Option<*mut u8> {
        let segment = self.segments[0];
        (self.totals.readable == 1 && segment.len() == len).then(|| segment.base())
    }

    /// Bytes of the writable buffers.
    #[inline]
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.totals.writable_bytes()
    }

    /// Returns whether the chain has a last writable byte.
    #[inline]
    #[must_use]
    pub fn has_last_byte(&self) -> bool {
        self.totals.last_writable.is_some()
    }

    /// Prefetches the line of the first readable byte, and the line of the last writable byte for
    /// writing: header and status of most requests. With Linux and most other drivers, both are in
    /// one line.
    #[inline]
    pub fn prefetch(&self) {
        if let Some(last) = self.totals.last_writable {
            let last = last.as_ptr();
            cache::prefetch_write(last);
            if let Some(first) = self.first_readable()
                && (first as usize ^ last as usize) >= cache::LINE
            {
                cache::prefetch_read(first);
            }
        }
    }

    /// Writes the last writable byte, if there is one.
    #[inline]
    pub fn write_last_byte(&self, value: u8) {
        if let Some(at) = self.totals.last_writable {
            // SAFETY: a byte of guest memory that `push` has translated. The request's owner keeps
            // the memory mapped until the request has completed.
            unsafe { at.write_volatile(value) };
        }
    }

    /// The totals and the segments, for a device that parses the request.
    #[inline(always)]
    pub fn parts(&mut self) -> Parts<'_> {
        let Self { totals, segments, long } = self;
        let segments = match long {
            None => &mut segments[..],
            Some(long) => long_part_mut(long),
        };
        Parts { totals, segments }
    }
}

/// A chain's totals and segments.
#[derive(Debug)]
pub struct Parts<'c> {
    /// The totals.
    pub totals: &'c mut Totals,
    /// Readable segments, then writable ones, [`Totals::count`] in all. The rest is left from
    /// earlier chains.
    pub segments: &'c mut [Segment],
}

impl Parts<'_> {
    /// Removes `N` bytes from the front of the segments that begin with segment `first`. Returns
    /// the bytes, and the number of the segment that the rest begins with.
    ///
    /// # Panics
    /// The segments have fewer than `N` bytes.
    pub fn take_front<const N: usize>(&mut self, mut first: usize) -> ([u8; N], usize) {
        let mut bytes = [0; N];
        let mut got = 0;
        while got < N {
            let segment = &mut self.segments[first];
            let n = segment.len().min(N - got);
            // SAFETY: `n` bytes of a segment, which is guest memory that stays mapped while its
            // chain is in use.
            let piece: VolatileSlice<'_> = unsafe { VolatileSlice::new(segment.base(), n) };
            piece.read_slice(&mut bytes[got..got + n], 0).expect("both have `n` bytes");
            got += n;
            if n == segment.len() {
                first += 1;
            } else {
                *segment = Segment::new(segment.base().wrapping_add(n), segment.len() - n);
            }
        }
        (bytes, first)
    }

    /// Removes the last byte from the writable segments. There must be at least one. Returns the
    /// number of the first writable segment, and the number of writable segments.
    #[inline]
    #[must_use]
    pub fn take_last_byte(&mut self) -> (usize, usize) {
        let last = &mut self.segments[self.totals.count - 1];
        *last = Segment::new(last.base(), last.len() - 1);
        if last.is_empty() {
            self.totals.count -= 1;
        }
        (self.totals.readable, self.totals.count - self.totals.readable)
    }
}

/// Collects a chain into `segments`. Buffers that do not fit are visited only if `to_its_end`, to
/// find the last writable byte and the end of the chain.
#[inline(always)]
fn collect_into<const N: usize, C: Chained>(
    segments: &mut [Segment; N],
    to: &mut Totals,
    near: &mut Near<'_>,
    chain: &C,
    to_its_end: bool,
) -> C::Taken {
    // A local value stays in registers.
    let mut totals = Totals::default();
    let (whole, taken) =
        chain.walk(near, |near, buffer| totals.push(segments, near, buffer) || to_its_end);
    if !whole {
        // The chain's last byte is not known.
        totals.last_writable = None;
    }
    let malformed = totals.malformed || !whole || totals.count > N;
    *to = Totals { malformed, ..totals };
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::testing::{flat, pages};
    use guest_memory::{Nearest, SLOTS_MAX};

    impl Chained for &[Buffer] {
        type Taken = ();

        fn walk(
            &self,
            near: &mut Near<'_>,
            mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
        ) -> (bool, ()) {
            (self.iter().all(|&buffer| visit(near, buffer)), ())
        }
    }

    #[test]
    fn buffers_outside_guest_memory_are_counted() {
        let memory = flat(0x1000);
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let buffers = [Buffer { gpa: 0x1000, len: 16, write: false }; 5];
        let mut chain = Chain::default();
        chain.collect(&mut near, &buffers[..]);
        assert_eq!(chain.pieces(), 5);
        chain.written(u64::MAX, |_, _| panic!("no memory was written"));
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_is_refused() {
        let memory = flat(0x1000);
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let of = |writes: [bool; 3]| writes.map(|write| Buffer { gpa: 0, len: 16, write });
        let mut chain = Chain::default();
        chain.collect(&mut near, &of([false, false, true])[..]);
        assert!(!chain.totals.malformed);
        assert_eq!((chain.bytes(), chain.totals.writable_bytes()), (48, 16));
        chain.collect(&mut near, &of([false, true, false])[..]);
        assert!(chain.totals.malformed);
    }

    /// A buffer may cover all regions of a guest that has many small ones, and a chain may have as
    /// many buffers as there are descriptors.
    #[test]
    fn a_chain_that_is_too_long_has_at_most_one_segment_per_buffer() {
        let memory = pages(SLOTS_MAX);
        let len = 4096 * u32::try_from(memory.regions()).unwrap();
        let buffers = vec![Buffer { gpa: 0, len, write: false }; 65536];
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let mut chain = Chain::default();
        chain.collect(&mut near, &buffers[..]);
        assert!(chain.overflown());
        assert!(chain.pieces() <= SEGMENTS_MAX + memory.regions(), "the walk stops before the end");
        chain.collect_long(&mut near, &buffers[..], long_segments());
        assert!(chain.totals.malformed);
        assert!(chain.pieces() <= LONG_SEGMENTS_MAX + buffers.len(), "{}", chain.pieces());
    }
}
