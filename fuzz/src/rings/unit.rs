//! A virtio-scsi device with two targets that show one disk.

use std::cell::OnceCell;
use std::sync::Arc;

use bdev::Bdev;
use vhost_scsi::{RequestQueue, Scsi, Units};
use vhost_target::device::{Device as _, Negotiated};
use vhost_target::device_queue::DeviceView;
use vhost_target::{Mode, Target};

use super::device::Device;
use super::driver::Buffer;
use super::model::{Chain, Piece};
use super::{DATA, HEADERS, STATUSES};
use crate::guest::{END, Guest, Place};
use crate::input::Input;

const HEADER_BYTES: usize = 51;
const RESPONSE_BYTES: usize = 108;

/// Operation codes, most of them with a length in the same place as others of their group.
const OPERATIONS: [u8; 28] = [
    0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x16, 0x17, 0x1a, 0x1b, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x35,
    0x41, 0x42, 0x5e, 0x5f, 0x83, 0x88, 0x89, 0x8a, 0x8b, 0x93, 0x9e, 0xa0,
];

thread_local! {
    /// The target that devices report changes to. It has no controller.
    static NOBODY: OnceCell<Arc<Target>> = const { OnceCell::new() };
}

/// The device. It has no options.
pub(super) struct Unit {
    scsi: Arc<Scsi>,
    front_end: Box<dyn Negotiated>,
}

impl Device for Unit {
    type Queue = RequestQueue;

    fn new(bdev: Arc<dyn Bdev>, _: bool) -> Self {
        let scsi = Scsi::new("fuzz", &Arc::<Units>::default());
        NOBODY.with(|nobody| {
            let target = nobody.get_or_init(|| {
                Target::in_steps(1, Mode::Poll, Arc::new(|| {})).expect("threads").0
            });
            for number in [0, 1] {
                scsi.add_target(target, Some(number), &bdev).expect("a target");
            }
        });
        let mut front_end = Arc::clone(&scsi).connect();
        front_end.set_features(1 << 32);
        Self { scsi, front_end }
    }

    fn open(&self, depth: u16) -> RequestQueue {
        self.scsi.open_request_queue(self.front_end.key(), depth).expect("channels")
    }

    fn view(&self, _: bool) -> DeviceView {
        self.front_end.view().expect("the device exists")
    }

    /// Jobs do I/O on buffers of their own.
    const GUEST_MEMORY_ONLY: bool = false;

    fn request(guest: &mut Guest, table: usize, n: u16, input: &mut Input<'_>) -> Vec<Buffer> {
        let at = HEADERS + 64 * u64::from(n % 56);
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(match input.u8() {
            0 => &[0, 0, 0, 0],
            1 => &[1, 0, 0x40, 1],
            2 => &[1, 9, 0, 0],
            3 => &[0xc1, 1, 0, 0],
            target if target & 1 == 0 => &[1, 0, 0x40, 0],
            _ => &[1, 1, 0, 0],
        });
        header[8..10].copy_from_slice(&n.to_le_bytes());
        let cdb = &mut header[19..];
        let (bytes, operation) = (input.u8() % 17, input.u8());
        cdb.iter_mut().zip(input.bytes(bytes.into())).for_each(|(to, from)| *to = *from);
        cdb[0] = match operation {
            0xff => input.u8(),
            operation => OPERATIONS[usize::from(operation) % OPERATIONS.len()],
        };
        // Addresses and lengths that are mostly on the disk.
        let mask = input.u8();
        let (lba, len): (&[usize], &[usize]) = match cdb[0] >> 5 {
            0 => (&[1, 2], &[]),
            1 | 2 => (&[2, 3, 4], &[7]),
            4 => (&[2, 3, 4, 5, 6, 7, 8], &[10, 11, 12]),
            _ => (&[2, 3, 4], &[6, 7, 8]),
        };
        let cleared =
            lba.iter().filter(|_| mask & 1 == 0).chain(len.iter().filter(|_| mask & 2 == 0));
        cleared.for_each(|at| cdb[*at] = 0);
        guest.put(table, at, &header);
        let response = STATUSES + 128 * u64::from(n % 16);
        guest.put(table, response, &[0xee; RESPONSE_BYTES]);
        let shape = input.u8();
        let mut data = |count: u8| -> Vec<(u64, u32)> {
            (0..count)
                .map(|_| {
                    let gpa = DATA + u64::from(input.u16()) % (END - DATA);
                    let len = match input.u8() {
                        0xff => input.u32(),
                        0xfe => input.u16().into(),
                        small if small & 1 == 0 => u32::from(small) / 2,
                        len => 512 << (len % 5),
                    };
                    guest.put(table, gpa, input.bytes(24));
                    (gpa, len)
                })
                .collect()
        };
        let (out, to) = (data(shape & 3), data(shape >> 2 & 3));
        let times = if shape >> 4 == 0xf { usize::from(input.u8()) * 5 } else { 0 };
        let mut buffers = vec![Buffer::readable(at, HEADER_BYTES as u32)];
        let long = |part: &[(u64, u32)]| -> Vec<(u64, u32)> {
            part.iter().copied().chain(part.iter().copied().cycle().take(times)).collect()
        };
        buffers.extend(long(&out).into_iter().map(|(gpa, len)| Buffer::readable(gpa, len)));
        buffers.push(Buffer::writable(response, RESPONSE_BYTES as u32));
        buffers.extend(long(&to).into_iter().map(|(gpa, len)| Buffer::writable(gpa, len)));
        buffers
    }

    /// The response. A request without a header has one, too.
    fn answer(chain: &Chain) -> Option<Vec<Place>> {
        chain.first_bytes(RESPONSE_BYTES)
    }

    fn refused(_: &Chain) -> Vec<Place> {
        vec![]
    }

    /// The writable pieces that reach beyond the response. If one also holds its end, the response is not checked.
    fn data(chain: &Chain) -> Vec<&Piece> {
        if !chain.whole || chain.header.len() < HEADER_BYTES {
            return vec![];
        }
        let mut before = 0;
        let behind = |piece: &&Piece| {
            before += piece.len;
            before > RESPONSE_BYTES
        };
        chain.writable().filter(behind).collect()
    }

    fn check(answer: &[u8]) {
        let sense_len = u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]]);
        let (status, response) = (answer[10], answer[11]);
        assert!(matches!(status, 0 | 2 | 8 | 0x18 | 0x40), "status {status:#x}");
        assert!(matches!(response, 0..=5 | 9), "response {response}");
        assert_eq!(status == 2, sense_len >= 8, "sense data of {sense_len} bytes");
        assert!(response == 0 || status == 0 && sense_len == 0);
        assert_eq!(answer[8..10], [0, 0], "the status qualifier");
    }
}
