//! virtio-blk requests (virtio 1.2, section 5.2.6): from a descriptor chain to an I/O or an answer.
//!
//! Any layout is taken: the first 16 readable bytes are the header, the last writable byte is the
//! status, the rest is data. A request that cannot be served gets a status as long as it has a
//! place for one.
#![expect(unsafe_code, reason = "copies headers out of guest memory")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use bdev::{Op, Segment};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::cache;
use crate::memory::Near;
use crate::ring::{Buffer, Chained};

/// Memory pieces in a request as drivers make it that heed `seg_max`: 126 of data, header and status,
/// and some more for buffers that cross from one memory region into the next.
pub const SEGMENTS_MAX: usize = 136;

/// Memory pieces in the longest request that is taken: 1,024 of data, for Windows' driver, which
/// heeds no `seg_max` (SPDK issues 2330 and 3432), and the same besides.
pub const LONG_SEGMENTS_MAX: usize = 1034;

/// Ranges of a discard or write-zeroes request.
pub const RANGES_MAX: usize = 16;

/// The unit of `sector` and of every length in a request, in bytes, whatever the block size is.
pub const SECTOR_BYTES: u64 = 512;

/// It went well.
pub const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
/// The device failed, or the request makes no sense.
pub const STATUS_IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// The device has no such request.
pub const STATUS_UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Sectors of the largest read or write, a GiB. No driver makes one that is nearly so large; what a
/// request names costs time, which is the neighbours' too.
pub const DATA_SECTORS_MAX: u64 = (1 << 30) / SECTOR_BYTES;

const HEADER_BYTES: usize = 16;
/// Bytes of a discard or write-zeroes segment.
const RANGE_BYTES: usize = 16;
/// Obsolete barrier bit, which SPDK masks off too.
const TYPE_BARRIER: u32 = 1 << 31;

/// What a request may do on its disk.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Block size in sectors: ranges are multiples of it.
    pub block_sectors: u64,
    /// What the device can do; `read_only` if the controller or the device is.
    pub features: bdev::Features,
    /// The disk's name, padded with spaces, for GET_ID.
    pub id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// What came out of a chain. The I/O's memory is what [`Chain::data`] says of `first` and `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To be submitted. Ranges are in bytes.
    Io {
        /// What to do.
        op: Op,
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The first data segment.
        first: usize,
        /// How many there are.
        count: usize,
    },
    /// Answered already: the status byte, and the bytes written before it.
    Answer(u8, u32),
    /// It has no place for a status: returned with nothing written.
    NoStatus,
}

/// A chain's memory, readable pieces first. In the order in which it is used, as all but the first
/// lines of many chains would not fit into a cache.
#[repr(C)]
#[derive(Debug)]
pub struct Chain {
    sums: Sums,
    /// The segments of a chain that has more of them than `segments` has room for.
    long: Option<LongSegments>,
    /// Readable pieces, then writable ones, `sums.count` in all. What follows is of other chains.
    segments: [Segment; SEGMENTS_MAX],
    ranges: Ranges,
}

/// The ranges of a discard or write-zeroes.
#[derive(Debug, Default)]
struct Ranges {
    /// Bytes of the disk that are still to be done: offset and length, the next one last.
    left: ArrayVec<(u64, u64), RANGES_MAX>,
    /// Of a write-zeroes: all of its ranges have the unmap flag, and the disk unmaps.
    may_unmap: bool,
}

/// Room for the pieces of a long chain. A queue has a few, and lends them.
pub type LongSegments = Box<[Segment; LONG_SEGMENTS_MAX]>;

/// A [`LongSegments`] that names no memory.
#[must_use]
pub fn long_segments() -> LongSegments {
    Box::new([NOWHERE; LONG_SEGMENTS_MAX])
}

/// A call, for the compiler to see that it is seldom.
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

const NOWHERE: Segment = Segment::new(std::ptr::null_mut(), 0);

// SAFETY: the pointer is an address in guest memory, as the segments are.
unsafe impl Send for Chain {}

/// What is known of a chain besides its segments.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// Where the status goes: the last writable byte.
    status: Option<NonNull<u8>>,
    readable_bytes: u64,
    /// Readable and writable.
    bytes: u64,
    /// How many segments there are. Of a malformed chain, those included that there was no room for,
    /// and what leads nowhere.
    count: usize,
    /// How many of the segments are readable.
    readable: usize,
    malformed: bool,
}

impl Sums {
    /// Of a chain that is well-formed.
    #[inline]
    fn writable_bytes(&self) -> u64 {
        self.bytes - self.readable_bytes
    }

    /// Adds a buffer, as one segment if it lies in one region of memory. Says whether there was room
    /// for it.
    #[inline(always)]
    fn push<const N: usize>(
        &mut self,
        segments: &mut [Segment; N],
        near: &mut Near<'_>,
        buffer: Buffer,
    ) -> bool {
        let len = u64::from(buffer.len);
        match near.translate(buffer.gpa) {
            // Not empty, and within the region.
            Some((host, room)) if len.wrapping_sub(1) < room => {
                self.push_piece(segments, host, len, buffer.write)
            }
            // All by value, so that the sums can stay in registers and the buffer need not be stored.
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
            self.status = NonNull::new(host.wrapping_add(len as usize - 1));
        } else {
            // Section 2.7.4.2: readable buffers come before writable ones.
            self.malformed |= self.status.is_some();
            self.readable_bytes = self.bytes;
            self.readable = self.count;
        }
        let fits = room.is_some();
        if let Some(segment) = room {
            *segment = Segment::new(host, len as usize);
        }
        fits
    }

    /// A buffer that crosses into another region, leaves memory, or is empty. No driver makes empty
    /// ones; a chain with one is refused, with the status byte where it would be without that
    /// buffer.
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
            // Counted nevertheless: it took time.
            self.count += 1;
            self.malformed = true;
        }
        while left > 0 {
            // The rest of what is too long anyway is one piece: regions may be many and small.
            let found = if self.count > LONG_SEGMENTS_MAX { None } else { near.translate(gpa) };
            let Some((host, room)) = found else {
                // Counted, too.
                self.count += 1;
                self.malformed = true;
                // Whatever byte we know of is not the chain's last.
                self.status = None;
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
        let segments = [NOWHERE; SEGMENTS_MAX];
        Self { sums: Sums::default(), segments, long: None, ranges: Ranges::default() }
    }
}

impl Chain {
    /// The segments of a request's data: see [`Request::Io`].
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

    /// Collects a chain, in place of what was here before.
    // A function of its own, in which what is known of the chain has the registers to itself.
    #[inline(never)]
    pub fn collect<C: Chained>(&mut self, near: &mut Near<'_>, chain: C) -> C::Taken {
        debug_assert!(self.long.is_none(), "given back with the request before");
        collect_into(&mut self.segments, &mut self.sums, near, &chain, false)
    }

    /// Whether the chain may have more pieces than there was room for: then [`Chain::collect_long`].
    #[inline]
    #[must_use]
    pub fn overflown(&self) -> bool {
        self.sums.count > SEGMENTS_MAX && self.long.is_none()
    }

    /// Collects a chain once more, into more room. What the first walk has read counts no more.
    #[cold]
    pub fn collect_long<C: Chained>(
        &mut self,
        near: &mut Near<'_>,
        chain: C,
        mut long: LongSegments,
    ) -> C::Taken {
        let taken = collect_into(&mut long, &mut self.sums, near, &chain, true);
        self.long = Some(long);
        taken
    }

    /// Whether it has room of its own.
    #[inline]
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.long.is_some()
    }

    /// Takes the room for a long chain back.
    #[must_use]
    pub fn take_long(&mut self) -> Option<LongSegments> {
        self.long.take()
    }

    /// The next range of a discard or write-zeroes, in bytes of the disk.
    #[must_use]
    pub fn next_range(&mut self) -> Option<(u64, u64)> {
        self.ranges.left.pop()
    }

    /// Whether a write-zeroes may give up the space of its ranges.
    #[must_use]
    pub fn may_unmap(&self) -> bool {
        self.ranges.may_unmap
    }

    /// Whether [`Chain::next_range`] has one.
    #[inline]
    #[must_use]
    pub fn has_ranges(&self) -> bool {
        !self.ranges.left.is_empty()
    }

    /// Calls `visit` with each piece of guest memory that the request may have written, which is
    /// `most` bytes of data and the status: address and length.
    pub fn written(&self, most: u64, mut visit: impl FnMut(*mut u8, u64)) {
        let mut left = if self.sums.malformed { 0 } else { most };
        if left > 0 {
            for segment in &self.segments()[self.sums.readable..self.sums.count] {
                let len = left.min(segment.len() as u64);
                visit(segment.base(), len);
                left -= len;
                if left == 0 {
                    break;
                }
            }
        }
        if let Some(status) = self.sums.status {
            visit(status.as_ptr(), 1);
        }
    }

    /// How many pieces of memory the walk met.
    #[inline]
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.sums.count
    }

    /// Bytes of its buffers.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.sums.bytes
    }

    /// Where the header begins, if the chain has one.
    #[inline]
    #[must_use]
    pub fn header(&self) -> Option<*mut u8> {
        (self.sums.readable > 0).then(|| self.segments[0].base())
    }

    /// Where on the disk the request's data lies and how much it is, in bytes, if it is a read as drivers
    /// lay them out. Only good for prefetching, as the guest may change its header before it is parsed.
    #[inline]
    #[must_use]
    pub fn peek_read(&self) -> Option<(u64, u64)> {
        let segment = self.segments[0];
        let at: *mut AtomicU64 = segment.base().cast();
        if self.sums.readable != 1 || segment.len() != HEADER_BYTES || !at.is_aligned() {
            return None;
        }
        // SAFETY: 16 bytes of guest memory that is mapped now, aligned to their words.
        let kind = u64::from_le(unsafe { &*at }.load(Ordering::Relaxed)) as u32;
        // SAFETY: as above.
        let sector = u64::from_le(unsafe { &*at.wrapping_add(1) }.load(Ordering::Relaxed));
        let len = self.sums.writable_bytes();
        (kind == VIRTIO_BLK_T_IN).then(|| (sector.wrapping_mul(SECTOR_BYTES), len))
    }

    /// Has the processor fetch the header, and the status byte's line for writing. In Linux, and
    /// most other drivers, they are one line.
    #[inline]
    pub fn prefetch(&self) {
        if let Some(status) = self.sums.status {
            let status = status.as_ptr();
            cache::prefetch_write(status);
            if let Some(header) = self.header()
                && (header as usize ^ status as usize) >= cache::LINE
            {
                cache::prefetch_read(header);
            }
        }
    }

    /// Writes the status byte.
    #[inline]
    pub fn write_status(&self, status: u8) {
        if let Some(at) = self.sums.status {
            // SAFETY: a byte of guest memory, translated by `push`, which the request's owner
            // keeps mapped until it is done.
            unsafe { at.write_volatile(status) };
        }
    }

    /// Bytes that the guest is told were written by a read, whether it went well or not.
    #[inline]
    #[must_use]
    pub fn written_by_read(&self) -> u32 {
        u32::try_from(self.sums.writable_bytes()).unwrap_or(u32::MAX)
    }

    /// The answer where there is no disk any more.
    #[must_use]
    pub fn refuse(&self) -> Request {
        if self.sums.status.is_none() {
            Request::NoStatus
        } else {
            Request::Answer(STATUS_IOERR, 0)
        }
    }

    /// Makes a request of what was collected.
    #[inline(always)]
    #[must_use]
    pub fn parse(&mut self, limits: &Limits) -> Request {
        if self.sums.status.is_none() {
            return Request::NoStatus;
        }
        let Self { sums, segments, long, ranges } = self;
        let segments = match long {
            None => &mut segments[..],
            Some(long) => long_part_mut(long),
        };
        Parts { sums, segments, ranges }.parse(limits)
    }
}

/// Collects a chain into `segments`. What there is no room for is looked at only if `to_its_end`: for
/// the status, and for where the chain ends.
#[inline(always)]
fn collect_into<const N: usize, C: Chained>(
    segments: &mut [Segment; N],
    to: &mut Sums,
    near: &mut Near<'_>,
    chain: &C,
    to_its_end: bool,
) -> C::Taken {
    // By value, for the processor's registers.
    let mut sums = Sums::default();
    let (whole, taken) =
        chain.walk(near, |near, buffer| sums.push(segments, near, buffer) || to_its_end);
    if !whole {
        // The last byte seen is not the chain's last, where the status belongs.
        sums.status = None;
    }
    let malformed = sums.malformed || !whole || sums.count > N;
    *to = Sums { malformed, ..sums };
    taken
}

/// An operation without data: what to do, where on the disk, and how much.
type Plain = (Op, u64, u64);
/// A status, and the bytes written before it.
type Answer = (u8, u32);

/// A chain with a place for the status, while it is made a request.
struct Parts<'c> {
    sums: &'c mut Sums,
    segments: &'c mut [Segment],
    ranges: &'c mut Ranges,
}

impl Parts<'_> {
    #[inline(always)]
    fn parse(mut self, limits: &Limits) -> Request {
        if self.sums.malformed || self.sums.readable_bytes < HEADER_BYTES as u64 {
            return Request::Answer(STATUS_IOERR, 0);
        }
        let (kind, sector, first) = self.take_header();
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, limits),
            VIRTIO_BLK_T_OUT => self.write(sector, first, limits),
            _ => match self.other(kind, sector, first, limits) {
                Ok((op, offset, len)) => Request::Io { op, offset, len, first: 0, count: 0 },
                Err((status, written)) => Request::Answer(status, written),
            },
        }
    }

    /// Makes an operation without data of the request, or an answer.
    #[inline(never)]
    fn other(
        mut self,
        kind: u32,
        sector: u64,
        first: usize,
        limits: &Limits,
    ) -> Result<Plain, Answer> {
        match kind {
            VIRTIO_BLK_T_FLUSH => flush(sector, limits),
            VIRTIO_BLK_T_DISCARD if limits.features.unmap => self.range(Op::Unmap, first, limits),
            VIRTIO_BLK_T_WRITE_ZEROES if limits.features.write_zeroes => {
                self.range(Op::WriteZeroes, first, limits)
            }
            VIRTIO_BLK_T_GET_ID => Err(self.get_id(limits)),
            _ => Err((STATUS_UNSUPP, 0)),
        }
    }

    /// Reads the header and removes it: type, sector, and the first segment of the rest.
    #[inline]
    fn take_header(&mut self) -> (u32, u64, usize) {
        let segment = self.segments[0];
        let at: *mut AtomicU64 = segment.base().cast();
        if segment.len() != HEADER_BYTES || !at.is_aligned() {
            return self.take_odd_header();
        }
        // SAFETY: 16 bytes of guest memory that is mapped now, aligned to their words.
        let kind = u64::from_le(unsafe { &*at }.load(Ordering::Relaxed)) as u32;
        // SAFETY: as above.
        let sector = u64::from_le(unsafe { &*at.wrapping_add(1) }.load(Ordering::Relaxed));
        (kind & !TYPE_BARRIER, sector, 1)
    }

    /// The header as no driver lays it out: in parts, with data behind it, or at an odd address.
    #[cold]
    fn take_odd_header(&mut self) -> (u32, u64, usize) {
        let (header, first) = self.take_front::<HEADER_BYTES>(0);
        let kind = u32::from_le_bytes(std::array::from_fn(|i| header[i]));
        let sector = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
        (kind & !TYPE_BARRIER, sector, first)
    }

    /// Copies the first `N` readable bytes from segment `first` on, which are there, and removes
    /// them. Answers with the first segment of the rest as well.
    fn take_front<const N: usize>(&mut self, mut first: usize) -> ([u8; N], usize) {
        let mut bytes = [0; N];
        let mut got = 0;
        while got < N {
            let segment = &mut self.segments[first];
            let n = segment.len().min(N - got);
            // SAFETY: `n` bytes of a segment, which is guest memory that is mapped now.
            let piece: VolatileSlice<'_> = unsafe { VolatileSlice::new(segment.base(), n) };
            piece.read_slice(&mut bytes[got..got + n], 0).expect("both are `n` bytes long");
            got += n;
            if n == segment.len() {
                first += 1;
            } else {
                *segment = Segment::new(segment.base().wrapping_add(n), segment.len() - n);
            }
        }
        (bytes, first)
    }

    /// Removes the status byte from the writable segments and answers with their range.
    #[inline]
    fn data_in(&mut self) -> (usize, usize) {
        let last = &mut self.segments[self.sums.count - 1];
        *last = Segment::new(last.base(), last.len() - 1);
        if last.is_empty() {
            self.sums.count -= 1;
        }
        (self.sums.readable, self.sums.count - self.sums.readable)
    }

    #[inline]
    fn read(&mut self, sector: u64, limits: &Limits) -> Request {
        let len = self.sums.writable_bytes() - 1;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Request::Answer(STATUS_UNSUPP, 0);
        }
        let (first, count) = self.data_in();
        match byte_range(sector, len / SECTOR_BYTES, DATA_SECTORS_MAX, limits) {
            Some((offset, len)) => Request::Io { op: Op::Read, offset, len, first, count },
            None => Request::Answer(STATUS_IOERR, len.try_into().unwrap_or(u32::MAX - 1)),
        }
    }

    #[inline]
    fn write(&mut self, sector: u64, first: usize, limits: &Limits) -> Request {
        if limits.features.read_only {
            return Request::Answer(STATUS_IOERR, 0);
        }
        let len = self.sums.readable_bytes - HEADER_BYTES as u64;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Request::Answer(STATUS_UNSUPP, 0);
        }
        let count = self.sums.readable - first;
        match byte_range(sector, len / SECTOR_BYTES, DATA_SECTORS_MAX, limits) {
            Some((offset, len)) => Request::Io { op: Op::Write, offset, len, first, count },
            None => Request::Answer(STATUS_IOERR, 0),
        }
    }

    /// Discard and write-zeroes: one range or more.
    fn range(&mut self, op: Op, mut first: usize, limits: &Limits) -> Result<Plain, Answer> {
        let len = self.sums.readable_bytes - HEADER_BYTES as u64;
        let count = len / RANGE_BYTES as u64;
        let fits = (1..=RANGES_MAX as u64).contains(&count);
        if !len.is_multiple_of(RANGE_BYTES as u64) || !fits {
            return Err((STATUS_IOERR, 0));
        }
        // Section 5.2.6.2: a discard with the unmap flag, or any flag that we do not know, is
        // unsupported, whatever else is wrong with the request.
        let known = if op == Op::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        let mut status = if limits.features.read_only { STATUS_IOERR } else { STATUS_OK };
        let ranges = &mut *self.ranges;
        ranges.left.clear();
        ranges.may_unmap = op == Op::WriteZeroes && limits.features.unmap;
        for _ in 0..count {
            let (range, rest) = self.take_front::<RANGE_BYTES>(first);
            first = rest;
            let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| range[at + i]));
            let sector = u64::from_le_bytes(std::array::from_fn(|i| range[i]));
            let (sectors, flags) = (u32_at(8), u32_at(12));
            self.ranges.may_unmap &= flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            let bytes = byte_range(sector, sectors.into(), u64::MAX, limits);
            if flags & !known != 0 {
                status = STATUS_UNSUPP;
            } else if bytes.is_none() && status == STATUS_OK {
                status = STATUS_IOERR;
            }
            // `fits` has made sure of the room.
            self.ranges.left.extend(bytes.filter(|(_, len)| *len > 0));
        }
        if status != STATUS_OK {
            self.ranges.left.clear();
            return Err((status, 0));
        }
        self.ranges.left.reverse();
        match self.ranges.left.pop() {
            Some((offset, len)) => Ok((op, offset, len)),
            None => Err((STATUS_OK, 0)),
        }
    }

    fn get_id(&mut self, limits: &Limits) -> Answer {
        let (first, count) = self.data_in();
        if count == 0 {
            return (STATUS_UNSUPP, 0);
        }
        let mut put = 0;
        for segment in &self.segments[first..first + count] {
            let n = segment.len().min(limits.id.len() - put);
            // SAFETY: `n` bytes of a segment, which is guest memory that is mapped now.
            let piece: VolatileSlice<'_> = unsafe { VolatileSlice::new(segment.base(), n) };
            piece.write_slice(&limits.id[put..put + n], 0).expect("both are `n` bytes long");
            put += n;
        }
        (STATUS_OK, put as u32)
    }
}

fn flush(sector: u64, limits: &Limits) -> Result<Plain, Answer> {
    if !limits.features.flush {
        return Err((STATUS_UNSUPP, 0));
    }
    // Section 5.2.6.1: the driver sets the sector to 0.
    if sector != 0 {
        return Err((STATUS_IOERR, 0));
    }
    Ok((Op::Flush, 0, 0))
}

/// Sectors to bytes, if they are no more than `most`, lie on the disk and are whole blocks of it.
#[inline]
fn byte_range(sector: u64, sectors: u64, most: u64, limits: &Limits) -> Option<(u64, u64)> {
    let end = sector.checked_add(sectors)?;
    let whole = (sector | sectors) & (limits.block_sectors - 1) == 0;
    // No overflow: the disk's size in bytes fits, and the range lies on it.
    (end <= limits.sectors && sectors <= most && whole)
        .then(|| (sector * SECTOR_BYTES, sectors * SECTOR_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Nearest;
    use crate::memory::tests::flat;

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
    fn buffers_that_lead_nowhere_count() {
        let memory = flat(0x1000);
        // SAFETY: the default is of every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let buffers = [Buffer { gpa: 0x1000, len: 16, write: false }; 5];
        let mut chain = Chain::default();
        chain.collect(&mut near, &buffers[..]);
        assert_eq!(chain.pieces(), 5);
        chain.written(u64::MAX, |_, _| panic!("nothing is written"));
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_is_refused() {
        let memory = flat(0x1000);
        // SAFETY: the default is of every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let of = |writes: [bool; 3]| writes.map(|write| Buffer { gpa: 0, len: 16, write });
        let mut chain = Chain::default();
        chain.collect(&mut near, &of([false, false, true])[..]);
        assert!(!chain.sums.malformed);
        assert_eq!((chain.bytes(), chain.written_by_read()), (48, 16));
        chain.collect(&mut near, &of([false, true, false])[..]);
        assert!(chain.sums.malformed);
    }

    #[test]
    fn only_reads_as_drivers_lay_them_out_are_peeked_at() {
        let memory = flat(0x2000);
        let header = |kind: u32, sector: u64| {
            let at = memory.slice(0, HEADER_BYTES).unwrap();
            at.write_slice(&u64::from(kind).to_le_bytes(), 0).unwrap();
            at.write_slice(&sector.to_le_bytes(), 8).unwrap();
        };
        // SAFETY: the default is of every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let data = |write| Buffer { gpa: 0x1000, len: 1024, write };
        let status = Buffer { gpa: 0x1800, len: 1, write: true };
        let mut peek = |gpa, header_len, writes| {
            let header = Buffer { gpa, len: header_len, write: false };
            let mut chain = Chain::default();
            chain.collect(&mut near, &[header, data(writes), status][..]);
            chain.peek_read()
        };
        header(VIRTIO_BLK_T_IN, 3);
        assert_eq!(peek(0, 16, true), Some((3 * SECTOR_BYTES, 1025)));
        assert_eq!(peek(4, 16, true), None, "at an odd address");
        assert_eq!(peek(0, 24, true), None, "with data behind it");
        assert_eq!(peek(0, 16, false), None, "in parts, or a write");
        header(VIRTIO_BLK_T_FLUSH, 3);
        assert_eq!(peek(0, 16, true), None);
        header(VIRTIO_BLK_T_IN, u64::MAX);
        assert!(peek(0, 16, true).is_some(), "nobody relies on it");
    }

    /// A buffer may cover all regions of a guest that has many small ones, and a chain may have as
    /// many buffers as there are descriptors.
    #[test]
    fn a_chain_has_no_more_pieces_than_buffers_once_it_is_too_long() {
        let memory = crate::memory::tests::pages(crate::memory::SLOTS_MAX);
        let len = 4096 * memory.regions() as u32;
        let buffers = vec![Buffer { gpa: 0, len, write: false }; 65536];
        // SAFETY: the default is of every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let mut chain = Chain::default();
        chain.collect(&mut near, &buffers[..]);
        assert!(chain.overflown());
        assert!(chain.pieces() <= SEGMENTS_MAX + memory.regions(), "it is not walked to its end");
        chain.collect_long(&mut near, &buffers[..], long_segments());
        assert!(chain.sums.malformed);
        assert!(chain.pieces() <= LONG_SEGMENTS_MAX + buffers.len(), "{}", chain.pieces());
    }
}
