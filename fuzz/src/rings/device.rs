//! The devices whose queues are served.

use std::sync::Arc;

use bdev::Bdev;
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::device_queue::{DeviceQueue, DeviceView};

use super::driver::Buffer;
use super::model::{Chain, Piece};
use super::{DATA, HEADERS, STATUSES};
use crate::guest::{END, Guest, Place};
use crate::input::Input;

/// A device, and what its requests and answers look like.
pub(super) trait Device: Sized {
    type Queue: DeviceQueue;

    /// A device on a disk. `option`: one that the device has.
    fn new(bdev: Arc<dyn Bdev>, option: bool) -> Self;

    /// Its queue, with at most `depth` requests in flight.
    fn open(&self, depth: u16) -> Self::Queue;

    /// A view. `option`: one that the driver sets.
    fn view(&self, option: bool) -> DeviceView;

    /// Whether I/O only accesses the guest's memory.
    const GUEST_MEMORY_ONLY: bool;

    /// Writes the header of a request that is valid, except perhaps for its range on the disk, and fills the memory of
    /// its answer. Returns its buffers.
    fn request(guest: &mut Guest, table: usize, n: u16, input: &mut Input<'_>) -> Vec<Buffer>;

    /// The places of the answer to a chain; `None`: the device need not answer it.
    fn answer(chain: &Chain) -> Option<Vec<Place>>;

    /// The places that may be written of a chain without an answer.
    fn refused(chain: &Chain) -> Vec<Place>;

    /// The data that may be written.
    fn data(chain: &Chain) -> Vec<&Piece>;

    /// Checks an answer.
    fn check(answer: &[u8]);
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// A virtio-blk device. Its options: it is read-only; its driver has switched the write cache off.
pub(super) struct Block(Arc<Disk>);

impl Device for Block {
    type Queue = BlkQueue;

    fn new(bdev: Arc<dyn Bdev>, read_only: bool) -> Self {
        Self(Arc::new(Disk::new(bdev, read_only)))
    }

    fn open(&self, depth: u16) -> BlkQueue {
        BlkQueue::open(Some(&self.0), depth).expect("a channel")
    }

    fn view(&self, write_through: bool) -> DeviceView {
        BlkView::erased(&self.0, write_through)
    }

    const GUEST_MEMORY_ONLY: bool = true;

    fn request(guest: &mut Guest, table: usize, n: u16, input: &mut Input<'_>) -> Vec<Buffer> {
        let kind = match input.u8() % 8 {
            0 | 1 => IN,
            2 | 3 => OUT,
            4 => FLUSH,
            5 => GET_ID,
            6 => input.pick(&[DISCARD, WRITE_ZEROES]),
            _ => input.u32(),
        };
        let sector = match input.u8() {
            0xff => input.u64(),
            sector => u64::from(sector) * 8,
        };
        let header = HEADERS + 16 * u64::from(n % 64);
        guest.put(table, header, &u64::from(kind).to_le_bytes());
        guest.put(table, header + 8, &sector.to_le_bytes());
        let mut buffers = vec![Buffer::readable(header, 16)];
        let shape = input.u8();
        let (count, times) = (usize::from(shape & 3), shape >> 2);
        let write = matches!(kind, IN | GET_ID);
        for _ in 0..count {
            let gpa = DATA + u64::from(input.u16()) % (END - DATA);
            let len = match input.u8() {
                0xff => input.u32(),
                0xfe => input.u16().into(),
                small if matches!(kind, DISCARD | WRITE_ZEROES) => 16 * u32::from(small % 20),
                small if kind == GET_ID => u32::from(small % 32),
                len => 512 << (len % 6),
            };
            buffers.push(if write {
                Buffer::writable(gpa, len)
            } else {
                Buffer::readable(gpa, len)
            });
            if matches!(kind, DISCARD | WRITE_ZEROES) {
                guest.put(table, gpa, input.bytes(16));
            }
        }
        if times > 56 && count > 0 {
            // Long: the same buffers repeated, up to more than the longest allowed chain.
            let pattern: Vec<_> = buffers[1..].to_vec();
            let wanted = usize::from(input.u8()) * 5;
            buffers.extend(pattern.iter().cycle().take(wanted));
        }
        let status = STATUSES + u64::from(n) % (DATA - STATUSES);
        guest.put(table, status, &[0xee]);
        buffers.push(Buffer::writable(status, 1));
        buffers
    }

    /// The status.
    fn answer(chain: &Chain) -> Option<Vec<Place>> {
        Some(vec![chain.last_byte()?])
    }

    /// The specification does not say where the status of a malformed chain is.
    fn refused(chain: &Chain) -> Vec<Place> {
        let last = |piece: &Piece| Place { at: piece.place.at + piece.len - 1, ..piece.place };
        chain.writable().map(last).collect()
    }

    fn data(chain: &Chain) -> Vec<&Piece> {
        let kind = chain.header.first_chunk().filter(|_| chain.header.len() >= 16);
        let kind = kind.map(|kind| u32::from_le_bytes(*kind) & !(1 << 31));
        let has_data = chain.whole && matches!(kind, Some(IN | GET_ID));
        if has_data { chain.writable().collect() } else { vec![] }
    }

    fn check(answer: &[u8]) {
        assert!(answer[0] <= 2, "status {:#x}", answer[0]);
    }
}
