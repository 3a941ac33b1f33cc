//! A guest with a block device: the scene of the suites, with requests of every kind.

use std::sync::Arc;

use bdev::Bdev;
use virtqueue::Buffer;

use super::block::{Block, frame};
pub(crate) use crate::suites::scene::{ADDRS, DATA, FAR, LAYOUTS, PAGE};

pub(crate) type Scene = crate::suites::scene::Scene<Block>;

/// Addresses of requests' statuses, by number.
pub(crate) const STATUSES: u64 = 0x4_0000;
/// Addresses of the ranges of discards.
const RANGES: u64 = 0x5_0000;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;
/// The initial value of a status byte.
pub(crate) const UNTOUCHED: u8 = 0xee;

/// A completed request: its number, its status, and the used length.
pub(crate) type Answer = (usize, u8, u32);

/// Returns the address of the status of request `n`.
pub(crate) fn status_gpa(n: usize) -> u64 {
    STATUSES + n as u64 % PAGE
}

impl Scene {
    /// Creates a guest with a disk, without a queue.
    pub(crate) fn on(packed: bool, size: u16, bdev: Arc<dyn Bdev>) -> Self {
        Self::new(packed, size, Block::new(bdev))
    }

    /// As [`Scene::on`], with a started queue.
    pub(crate) fn started_on(packed: bool, size: u16, bdev: Arc<dyn Bdev>) -> Self {
        let mut scene = Self::on(packed, size, bdev);
        scene.start().unwrap();
        scene
    }

    /// Offers a request with `data` in pieces. Returns its number.
    pub(crate) fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> usize {
        let (header, status) = frame(&self.memory, self.next(), kind, sector);
        let data = data.iter().map(|&(gpa, len)| Buffer { gpa, len, write: kind == IN });
        let buffers: Vec<_> = [header].into_iter().chain(data).chain([status]).collect();
        self.send_raw(&buffers)
    }

    /// Offers a discard or write-zeroes of ranges (sector, sectors, flags). Returns its number.
    pub(crate) fn send_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> usize {
        let at = RANGES + 1024 * (self.next() as u64 % 64);
        for (n, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = at + 16 * n as u64;
            self.put(at, &sector.to_le_bytes());
            self.put(at + 8, &sectors.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
        }
        self.send(kind, 0, &[(at, 16 * u32::try_from(ranges.len()).unwrap())])
    }

    /// Returns the requests that were completed since the last call.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        let taken = self.take();
        let status = |n| self.get(status_gpa(n), 1)[0];
        taken.into_iter().map(|(n, len)| (n, status(n), len)).collect()
    }
}
