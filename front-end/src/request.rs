//! Virtio-blk requests as a driver lays them out (virtio 1.2, 5.2.6): header, data, status byte.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::descriptor::WRITE;
use crate::error::Result;
use crate::guest::{GuestRam, Segment, Window};

/// Status byte: done.
pub const STATUS_OK: u8 = 0;
/// Status byte: the disk failed.
pub const STATUS_IOERR: u8 = 1;
/// Status byte: there is no such request, or not in this form.
pub const STATUS_UNSUPP: u8 = 2;
/// What the status byte holds until the device writes it: no status of the specification.
pub const STATUS_UNWRITTEN: u8 = 0xee;

/// The header, then the status byte, in a cache line of their own, which travels to the device and
/// back once a request.
pub(crate) const HEAD_BYTES: u32 = 64;
pub(crate) const STATUS_AT: usize = HEADER_BYTES as usize;
/// A request's header: type, priority, sector.
pub(crate) const HEADER_BYTES: u32 = 16;

/// How a queue is made and driven.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Descriptors: a power of two up to 32768.
    pub size: u16,
    /// Put each request in an indirect table. The back end must have been asked for it.
    pub indirect: bool,
    /// Data segments that a request may have.
    pub segments_max: usize,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self { size: 128, indirect: false, segments_max: 32 }
    }
}

/// Names a request in flight: the index of the first descriptor of its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u16);

/// A request that the device has given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which one.
    pub tag: Tag,
    /// The status byte; [`STATUS_UNWRITTEN`] if the device left it alone.
    pub status: u8,
    /// Bytes that the device says it has written.
    pub used_len: u32,
}

/// A virtio-blk request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The header's type.
    pub kind: u32,
    /// The header's sector, in units of 512 bytes.
    pub sector: u64,
    /// The data.
    pub data: &'a [Segment],
    /// Whether the device writes the data, or reads it.
    pub device_writes: bool,
}

impl<'a> Request<'a> {
    /// Reads into `data`.
    #[must_use]
    pub fn read(sector: u64, data: &'a [Segment]) -> Self {
        Self { kind: 0, sector, data, device_writes: true }
    }

    /// Writes `data`.
    #[must_use]
    pub fn write(sector: u64, data: &'a [Segment]) -> Self {
        Self { kind: 1, sector, data, device_writes: false }
    }

    /// Makes what was written stay.
    #[must_use]
    pub fn flush() -> Self {
        Self { kind: 4, sector: 0, data: &[], device_writes: false }
    }

    /// Asks for the device's name, up to 20 bytes of it.
    #[must_use]
    pub fn id(data: &'a [Segment]) -> Self {
        Self { kind: 8, sector: 0, data, device_writes: true }
    }

    /// Discards the ranges that `data` lists (see [`range`]).
    #[must_use]
    pub fn discard(data: &'a [Segment]) -> Self {
        Self { kind: 11, sector: 0, data, device_writes: false }
    }

    /// Zeroes the ranges that `data` lists (see [`range`]).
    #[must_use]
    pub fn write_zeroes(data: &'a [Segment]) -> Self {
        Self { kind: 13, sector: 0, data, device_writes: false }
    }
}

/// One range of a DISCARD or WRITE_ZEROES request, as it lies in memory: first sector and number
/// of sectors, of 512 bytes each, and flags (1: unmap).
#[must_use]
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
}

/// Memory for the headers and status bytes of a queue's requests, a cache line for each.
#[derive(Debug)]
pub(crate) struct Heads(Window);

impl Heads {
    /// Takes memory for `count` requests.
    pub(crate) fn new(ram: &Arc<GuestRam>, count: u16) -> Result<Self> {
        ram.window(HEAD_BYTES * u32::from(count), u64::from(HEAD_BYTES)).map(Self)
    }

    /// Writes the header of `request` into line `index`, and returns the request's buffers in
    /// order, each with [`WRITE`] or 0.
    pub(crate) fn lay<'r>(
        &self,
        index: u16,
        request: &Request<'r>,
    ) -> impl Iterator<Item = (Segment, u16)> + use<'r> {
        let at = usize::from(index) * HEAD_BYTES as usize;
        self.0.store(at, u64::from(request.kind), Relaxed);
        self.0.store(at + 8, request.sector, Relaxed);
        self.0.store(at + STATUS_AT, STATUS_UNWRITTEN, Relaxed);
        let (header, status) = self.addrs(index);
        let data_flags = if request.device_writes { WRITE } else { 0 };
        std::iter::once((Segment { gpa: header, len: HEADER_BYTES }, 0))
            .chain(request.data.iter().map(move |&segment| (segment, data_flags)))
            .chain(std::iter::once((Segment { gpa: status, len: 1 }, WRITE)))
    }

    /// Where the header and the status byte of line `index` lie.
    pub(crate) fn addrs(&self, index: u16) -> (u64, u64) {
        let header = self.0.gpa() + u64::from(index) * u64::from(HEAD_BYTES);
        (header, header + STATUS_AT as u64)
    }

    /// The status byte in line `index`.
    pub(crate) fn status(&self, index: u16) -> u8 {
        self.0.load(usize::from(index) * HEAD_BYTES as usize + STATUS_AT, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_lies_in_memory_as_the_specification_says() {
        assert_eq!(range(0x0102, 3, 1), [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
    }
}
