//! virtio-blk requests (virtio 1.2, section 5.2.6): parses a descriptor chain into an I/O or an
//! answer.
//!
//! Every layout is accepted: the first 16 readable bytes are the header, the last writable byte is
//! the status, the rest is data. A request that cannot be served gets a status if it has a place
//! for one.
#![expect(unsafe_code, reason = "copies headers out of guest memory")]

use std::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use bdev::Op;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtqueue::chain::{Chain, Parts};
use vm_memory::{Bytes, VolatileSlice};

/// Ranges of a discard or write-zeroes request at most.
pub const RANGES_MAX: u32 = 16;

/// The unit of `sector` and of every length in a request, in bytes, whatever the block size is.
pub const SECTOR_BYTES: u64 = 512;

/// Success.
pub const STATUS_OK: u8 = status(VIRTIO_BLK_S_OK);
/// The device failed, or the request is invalid.
pub const STATUS_IOERR: u8 = status(VIRTIO_BLK_S_IOERR);
/// The device does not support the request.
pub const STATUS_UNSUPP: u8 = status(VIRTIO_BLK_S_UNSUPP);

#[expect(clippy::cast_possible_truncation, reason = "the three constants are 0 to 2")]
const fn status(constant: u32) -> u8 {
    constant as u8
}

/// Sectors of the largest read or write: 1 GiB. Drivers send far smaller ones. A larger limit would
/// let one request take the neighbours' time.
pub const DATA_SECTORS_MAX: u64 = (1 << 30) / SECTOR_BYTES;

const HEADER_BYTES: usize = 16;
/// Bytes of a discard or write-zeroes segment.
const RANGE_BYTES: usize = 16;
/// The obsolete barrier bit, which SPDK masks off too.
const TYPE_BARRIER: u32 = 1 << 31;

/// The limits of requests on a disk.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Block size in sectors. Ranges are multiples of it.
    pub block_sectors: u64,
    /// The device's features; `read_only` if the controller or the device is read-only.
    pub features: bdev::Features,
    /// The disk's name, padded with spaces, for GET_ID.
    pub id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// The result of parsing a chain. [`Chain::data`] of `first` and `count` is the I/O's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// An I/O to submit. Ranges are in bytes.
    Io {
        /// The operation.
        op: Op,
        /// The offset on the disk.
        offset: u64,
        /// The length.
        len: u64,
        /// The index of the first data segment.
        first: usize,
        /// The number of data segments.
        count: usize,
    },
    /// A discard or write-zeroes: see [`Ranges::parse`].
    Ranges {
        /// The operation.
        op: Op,
        /// The index of the segment in which the ranges begin.
        first: usize,
    },
    /// An answer without I/O: the status byte, and the number of bytes written before it.
    Answer(u8, u32),
    /// The chain has no place for a status. It is returned with nothing written.
    NoStatus,
}

/// The ranges of a discard or write-zeroes.
#[derive(Debug, Default)]
pub struct Ranges {
    /// The remaining byte ranges on the disk: offset and length. The next one is last.
    left: ArrayVec<(u64, u64), { RANGES_MAX as usize }>,
    /// For a write-zeroes: all of its ranges have the unmap flag, and the disk supports unmap.
    may_unmap: bool,
}

impl Ranges {
    /// Parses the ranges of a request for which [`parse`] has returned [`Parsed::Ranges`]. Returns
    /// an I/O for the first range, or an answer.
    pub fn parse(
        &mut self,
        chain: &mut Chain,
        op: Op,
        mut first: usize,
        limits: &Limits,
    ) -> Parsed {
        let mut chain = chain.parts();
        let len = chain.totals.readable_bytes - HEADER_BYTES as u64;
        let count = len / RANGE_BYTES as u64;
        let fits = (1..=u64::from(RANGES_MAX)).contains(&count);
        if !len.is_multiple_of(RANGE_BYTES as u64) || !fits {
            return Parsed::Answer(STATUS_IOERR, 0);
        }
        // Section 5.2.6.2: a discard with the unmap flag, or any request with an unknown flag, is
        // unsupported, even if it has other errors.
        let known = if op == Op::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        let mut status = if limits.features.read_only { STATUS_IOERR } else { STATUS_OK };
        self.left.clear();
        self.may_unmap = op == Op::WriteZeroes && limits.features.unmap;
        for _ in 0..count {
            let (range, rest) = chain.take_front::<RANGE_BYTES>(first);
            first = rest;
            let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| range[at + i]));
            let sector = u64::from_le_bytes(std::array::from_fn(|i| range[i]));
            let (sectors, flags) = (u32_at(8), u32_at(12));
            self.may_unmap &= flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            let bytes = byte_range(sector, sectors.into(), u64::MAX, limits);
            if flags & !known != 0 {
                status = STATUS_UNSUPP;
            } else if bytes.is_none() && status == STATUS_OK {
                status = STATUS_IOERR;
            }
            // There is room: `fits` was checked.
            self.left.extend(bytes.filter(|(_, len)| *len > 0));
        }
        if status != STATUS_OK {
            self.left.clear();
            return Parsed::Answer(status, 0);
        }
        self.left.reverse();
        match self.left.pop() {
            Some((offset, len)) => Parsed::Io { op, offset, len, first: 0, count: 0 },
            None => Parsed::Answer(STATUS_OK, 0),
        }
    }

    /// Removes and returns the next byte range on the disk: offset and length.
    #[must_use]
    pub fn take_next(&mut self) -> Option<(u64, u64)> {
        self.left.pop()
    }

    /// Returns whether a write-zeroes may release the space of its ranges.
    #[must_use]
    pub fn may_unmap(&self) -> bool {
        self.may_unmap
    }

    /// Returns whether a range remains.
    #[must_use]
    pub fn any_left(&self) -> bool {
        !self.left.is_empty()
    }
}

/// Returns the offset on the disk and the length of the request's data, in bytes, if the request is
/// a read in the layout of common drivers. Only valid for prefetching, because the guest may change
/// its header before it is parsed.
#[inline]
#[must_use]
pub fn peek_read(chain: &Chain) -> Option<(u64, u64)> {
    let at: *mut AtomicU64 = chain.lone_readable(HEADER_BYTES)?.cast();
    if !at.is_aligned() {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes the low 32 bits, the header's `type`"
    )]
    // SAFETY: these are 16 bytes of guest memory that is mapped now, aligned for `u64`.
    let kind = u64::from_le(unsafe { &*at }.load(Ordering::Relaxed)) as u32;
    // SAFETY: as above.
    let sector = u64::from_le(unsafe { &*at.wrapping_add(1) }.load(Ordering::Relaxed));
    let len = chain.writable_bytes();
    (kind == VIRTIO_BLK_T_IN).then(|| (sector.wrapping_mul(SECTOR_BYTES), len))
}

/// Returns the number of written bytes that the used ring reports for a read, successful or not.
#[inline]
#[must_use]
pub fn written_by_read(chain: &Chain) -> u32 {
    u32::try_from(chain.writable_bytes()).unwrap_or(u32::MAX)
}

/// Parses a collected chain.
#[inline(always)]
#[must_use]
pub fn parse(chain: &mut Chain, limits: &Limits) -> Parsed {
    let chain = chain.parts();
    if chain.totals.last_writable.is_none() {
        return Parsed::NoStatus;
    }
    Parser { chain }.parse(limits)
}

/// Parses a chain that has a place for the status.
struct Parser<'c> {
    chain: Parts<'c>,
}

impl Parser<'_> {
    #[inline(always)]
    fn parse(mut self, limits: &Limits) -> Parsed {
        if self.chain.totals.malformed || self.chain.totals.readable_bytes < HEADER_BYTES as u64 {
            return Parsed::Answer(STATUS_IOERR, 0);
        }
        let (kind, sector, first) = self.take_header();
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, limits),
            VIRTIO_BLK_T_OUT => self.write(sector, first, limits),
            _ => self.other(kind, sector, first, limits),
        }
    }

    /// Parses a request that is not a read or a write.
    #[inline(never)]
    fn other(mut self, kind: u32, sector: u64, first: usize, limits: &Limits) -> Parsed {
        match kind {
            VIRTIO_BLK_T_FLUSH => flush(sector, limits),
            VIRTIO_BLK_T_DISCARD if limits.features.unmap => {
                Parsed::Ranges { op: Op::Unmap, first }
            }
            VIRTIO_BLK_T_WRITE_ZEROES if limits.features.write_zeroes => {
                Parsed::Ranges { op: Op::WriteZeroes, first }
            }
            VIRTIO_BLK_T_GET_ID => self.get_id(limits),
            _ => Parsed::Answer(STATUS_UNSUPP, 0),
        }
    }

    /// Reads the header and removes it: type, sector, and the first segment of the rest.
    #[inline]
    fn take_header(&mut self) -> (u32, u64, usize) {
        let segment = self.chain.segments[0];
        let at: *mut AtomicU64 = segment.base().cast();
        if segment.len() != HEADER_BYTES || !at.is_aligned() {
            return self.take_uncommon_header();
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "takes the low 32 bits, the header's `type`"
        )]
        // SAFETY: these are 16 bytes of guest memory that is mapped now, aligned for `u64`.
        let kind = u64::from_le(unsafe { &*at }.load(Ordering::Relaxed)) as u32;
        // SAFETY: as above.
        let sector = u64::from_le(unsafe { &*at.wrapping_add(1) }.load(Ordering::Relaxed));
        (kind & !TYPE_BARRIER, sector, 1)
    }

    /// Reads a header in a layout that no known driver uses: in parts, followed by data, or
    /// misaligned.
    #[cold]
    fn take_uncommon_header(&mut self) -> (u32, u64, usize) {
        let (header, first) = self.chain.take_front::<HEADER_BYTES>(0);
        let kind = u32::from_le_bytes(std::array::from_fn(|i| header[i]));
        let sector = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
        (kind & !TYPE_BARRIER, sector, first)
    }

    #[inline]
    fn read(&mut self, sector: u64, limits: &Limits) -> Parsed {
        let len = self.chain.totals.writable_bytes() - 1;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Parsed::Answer(STATUS_UNSUPP, 0);
        }
        let (first, count) = self.chain.take_last_byte();
        match byte_range(sector, len / SECTOR_BYTES, DATA_SECTORS_MAX, limits) {
            Some((offset, len)) => Parsed::Io { op: Op::Read, offset, len, first, count },
            None => Parsed::Answer(STATUS_IOERR, len.try_into().unwrap_or(u32::MAX - 1)),
        }
    }

    #[inline]
    fn write(&mut self, sector: u64, first: usize, limits: &Limits) -> Parsed {
        if limits.features.read_only {
            return Parsed::Answer(STATUS_IOERR, 0);
        }
        let len = self.chain.totals.readable_bytes - HEADER_BYTES as u64;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Parsed::Answer(STATUS_UNSUPP, 0);
        }
        let count = self.chain.totals.readable - first;
        match byte_range(sector, len / SECTOR_BYTES, DATA_SECTORS_MAX, limits) {
            Some((offset, len)) => Parsed::Io { op: Op::Write, offset, len, first, count },
            None => Parsed::Answer(STATUS_IOERR, 0),
        }
    }

    fn get_id(&mut self, limits: &Limits) -> Parsed {
        let (first, count) = self.chain.take_last_byte();
        if count == 0 {
            return Parsed::Answer(STATUS_UNSUPP, 0);
        }
        let mut put = 0;
        for segment in &self.chain.segments[first..first + count] {
            let n = segment.len().min(limits.id.len() - put);
            // SAFETY: these are `n` bytes of a segment, which is guest memory that is mapped now.
            let piece: VolatileSlice<'_> = unsafe { VolatileSlice::new(segment.base(), n) };
            piece
                .write_slice(&limits.id[put..put + n], 0)
                .expect("source and destination are `n` bytes long");
            put += n;
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most the 20 bytes of the ID")]
        let put = put as u32;
        Parsed::Answer(STATUS_OK, put)
    }
}

fn flush(sector: u64, limits: &Limits) -> Parsed {
    if !limits.features.flush {
        return Parsed::Answer(STATUS_UNSUPP, 0);
    }
    // Section 5.2.6.1: the driver sets the sector to 0.
    if sector != 0 {
        return Parsed::Answer(STATUS_IOERR, 0);
    }
    Parsed::Io { op: Op::Flush, offset: 0, len: 0, first: 0, count: 0 }
}

/// Converts sectors to bytes, if there are at most `most`, they are on the disk, and they are whole
/// blocks.
#[inline]
fn byte_range(sector: u64, sectors: u64, most: u64, limits: &Limits) -> Option<(u64, u64)> {
    let end = sector.checked_add(sectors)?;
    let whole = (sector | sectors) & (limits.block_sectors - 1) == 0;
    // No overflow: the disk's size in bytes fits, and the range is on the disk.
    (end <= limits.sectors && sectors <= most && whole)
        .then(|| (sector * SECTOR_BYTES, sectors * SECTOR_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::testing::flat;
    use guest_memory::{Near, Nearest};
    use virtqueue::{Buffer, Chained};

    impl Chained for Buffers<'_> {
        type Taken = ();

        fn walk(
            &self,
            near: &mut Near<'_>,
            mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
        ) -> (bool, ()) {
            (self.0.iter().all(|&buffer| visit(near, buffer)), ())
        }
    }

    struct Buffers<'b>(&'b [Buffer]);

    #[test]
    fn peek_read_accepts_only_the_layout_of_common_drivers() {
        let memory = flat(0x2000);
        let header = |kind: u32, sector: u64| {
            let at = memory.slice(0, HEADER_BYTES).unwrap();
            at.write_slice(&u64::from(kind).to_le_bytes(), 0).unwrap();
            at.write_slice(&sector.to_le_bytes(), 8).unwrap();
        };
        // SAFETY: the default is valid for every memory.
        let mut near = unsafe { memory.near(Nearest::default()) };
        let data = |write| Buffer { gpa: 0x1000, len: 1024, write };
        let status = Buffer { gpa: 0x1800, len: 1, write: true };
        let mut peek = |gpa, header_len, writes| {
            let header = Buffer { gpa, len: header_len, write: false };
            let mut chain = Chain::default();
            chain.collect(&mut near, Buffers(&[header, data(writes), status]));
            peek_read(&chain)
        };
        header(VIRTIO_BLK_T_IN, 3);
        assert_eq!(peek(0, 16, true), Some((3 * SECTOR_BYTES, 1025)));
        assert_eq!(peek(4, 16, true), None, "misaligned header");
        assert_eq!(peek(0, 24, true), None, "data follows the header");
        assert_eq!(peek(0, 16, false), None, "header in parts, or a write");
        header(VIRTIO_BLK_T_FLUSH, 3);
        assert_eq!(peek(0, 16, true), None);
        header(VIRTIO_BLK_T_IN, u64::MAX);
        assert!(peek(0, 16, true).is_some(), "the range is not checked");
    }
}
