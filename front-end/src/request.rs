//! Virtio-blk requests as a driver lays them out (virtio 1.2, 5.2.6): header, data, status byte.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::descriptor::WRITE;
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment, Window};

/// Status byte: success.
pub const STATUS_OK: u8 = 0;
/// Status byte: I/O error.
pub const STATUS_IOERR: u8 = 1;
/// Status byte: the request, or its form, is not supported.
pub const STATUS_UNSUPP: u8 = 2;
/// The status byte before the device writes it: not a status of the specification.
pub const STATUS_UNWRITTEN: u8 = 0xee;

/// The header, then the status byte, in a cache line of their own, which moves to the device and
/// back once per request.
pub(crate) const HEAD_BYTES: u32 = 64;
pub(crate) const STATUS_AT: usize = HEADER_BYTES as usize;
/// A request's header: type, priority, sector.
pub(crate) const HEADER_BYTES: u32 = 16;

/// The parameters of a queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// The number of descriptors: a power of two up to 32768.
    pub size: u16,
    /// Put each request in an indirect table. The feature must be negotiated.
    pub indirect: bool,
    /// The most data segments of a request.
    pub segments_max: usize,
}

impl QueueOptions {
    /// Returns the size of an indirect table for the largest request: header, data, status.
    pub(crate) fn table_bytes(&self) -> Result<u32> {
        let bytes = 16 * (self.segments_max as u64 + 2);
        u32::try_from(bytes).map_err(|_| Error::NoRam(bytes))
    }
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self { size: 128, indirect: false, segments_max: 32 }
    }
}

/// Identifies a request in flight: the index of the first descriptor of its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u16);

/// A request that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tag of the request.
    pub tag: Tag,
    /// The status byte; [`STATUS_UNWRITTEN`] if the device did not write it.
    pub status: u8,
    /// The number of bytes that the device reports as written.
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
    /// Whether the device writes the data; otherwise it reads it.
    pub device_writes: bool,
}

impl<'a> Request<'a> {
    /// Makes a read into `data`.
    #[must_use]
    pub fn read(sector: u64, data: &'a [Segment]) -> Self {
        Self { kind: 0, sector, data, device_writes: true }
    }

    /// Makes a write of `data`.
    #[must_use]
    pub fn write(sector: u64, data: &'a [Segment]) -> Self {
        Self { kind: 1, sector, data, device_writes: false }
    }

    /// Makes a flush, which makes completed writes durable.
    #[must_use]
    pub fn flush() -> Self {
        Self { kind: 4, sector: 0, data: &[], device_writes: false }
    }

    /// Makes a request for the device's name, up to 20 bytes.
    #[must_use]
    pub fn id(data: &'a [Segment]) -> Self {
        Self { kind: 8, sector: 0, data, device_writes: true }
    }

    /// Makes a discard of the ranges that `data` lists (see [`range`]).
    #[must_use]
    pub fn discard(data: &'a [Segment]) -> Self {
        Self { kind: 11, sector: 0, data, device_writes: false }
    }

    /// Makes a write-zeroes request for the ranges that `data` lists (see [`range`]).
    #[must_use]
    pub fn write_zeroes(data: &'a [Segment]) -> Self {
        Self { kind: 13, sector: 0, data, device_writes: false }
    }
}

/// Returns one range of a DISCARD or WRITE_ZEROES request as it lies in memory: first sector and
/// number of sectors, in units of 512 bytes, and flags (1: unmap).
#[must_use]
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
}

/// Memory for the headers and status bytes of a queue's requests, a cache line for each.
#[derive(Debug)]
pub(crate) struct Heads(Window);

impl Heads {
    /// Allocates memory for `count` requests.
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

    /// Returns the addresses of the header and the status byte of line `index`.
    pub(crate) fn addrs(&self, index: u16) -> (u64, u64) {
        let header = self.0.gpa() + u64::from(index) * u64::from(HEAD_BYTES);
        (header, header + STATUS_AT as u64)
    }

    /// Returns the status byte in line `index`.
    pub(crate) fn status(&self, index: u16) -> u8 {
        self.0.load(usize::from(index) * HEAD_BYTES as usize + STATUS_AT, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_of_a_range_follows_the_specification() {
        assert_eq!(range(0x0102, 3, 1), [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
    }
}
