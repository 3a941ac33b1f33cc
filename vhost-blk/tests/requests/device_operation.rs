//! Virtio 1.2, sections 5.2.6 (device operation) and 2.7.4 (message framing), sentence by sentence:
//! the answer to each request, and the bytes of guest memory that it changes.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks and rings")]

use std::sync::Arc;

use bdev::{Bdev, Features, Malloc, MallocOptions};
use vhost_blk::config::Disk;
use virtqueue::Buffer;

use super::disk::Manual;
use super::scene::{
    DATA, DISCARD, FAR, FLUSH, IN, IOERR, LAYOUTS, OK, OUT, PAGE, STATUSES, Scene, UNSUPP,
    UNTOUCHED, WRITE_ZEROES,
};

const GET_ID: u32 = 8;
const GET_LIFETIME: u32 = 10;
const SECURE_ERASE: u32 = 14;
const BARRIER: u32 = 1 << 31;

/// The contents of each of the disk's first sectors before a request.
const BEFORE: [u8; 8] = [0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58];
const SECTORS: u64 = 64;
/// The contents of a driver's readable buffers.
const WRITTEN: u8 = 0xd1;

/// The address of a request's header.
const HEADER: u64 = DATA + 8 * PAGE;
/// The address of a discard's segments.
const RANGES: u64 = DATA + 9 * PAGE;
/// The guest memory that is checked for changes: all that the requests here use, and the adjacent
/// pages.
const WATCHED: [(u64, u64); 3] =
    [(STATUSES - PAGE, 3 * PAGE), (DATA - PAGE, 12 * PAGE), (FAR, 2 * PAGE)];

/// The disk of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    /// 64 sectors of 512 bytes; supports everything.
    Malloc,
    /// 8 blocks of 4,096 bytes.
    Blocks4096,
    /// `Malloc` in a read-only controller.
    ReadOnly,
    /// A read-only bdev that otherwise supports everything.
    ReadOnlyBdev,
    /// A bdev that supports reads and writes only.
    Bare,
}

impl On {
    fn scene(self, packed: bool) -> Scene {
        let malloc = |block_size| -> Arc<dyn Bdev> {
            let num_blocks = SECTORS * 512 / u64::from(block_size);
            let options =
                MallocOptions { name: "Malloc0".into(), num_blocks, block_size, uuid: None };
            Malloc::create(options).unwrap()
        };
        let all = Features { flush: true, unmap: true, write_zeroes: true, ..Features::default() };
        let bdev = match self {
            Self::Malloc | Self::ReadOnly => malloc(512),
            Self::Blocks4096 => malloc(4096),
            Self::ReadOnlyBdev => Manual::with(Features { read_only: true, ..all }),
            Self::Bare => Manual::with(Features::default()),
        };
        let mut scene = Scene::started_on(packed, 64, bdev);
        if self.keeps() {
            for (sector, byte) in BEFORE.into_iter().enumerate() {
                scene.put(DATA + 512 * sector as u64, &[byte; 512]);
            }
            let n = scene.send(OUT, 0, &[(DATA, 4096)]);
            scene.settle();
            assert_eq!(scene.answers(), [(n, OK, 1)]);
        }
        if self == Self::ReadOnly {
            let bdev = Arc::clone(&scene.device.disk.bdev);
            scene.device.disk = Arc::new(Disk::new(bdev, true));
            let memory = Arc::clone(&scene.memory);
            drop(scene.publish(&memory));
        }
        scene
    }

    fn keeps(self) -> bool {
        matches!(self, Self::Malloc | Self::Blocks4096 | Self::ReadOnly)
    }
}

/// Returns a readable buffer.
fn r(gpa: u64, len: u32) -> Buffer {
    Buffer { gpa, len, write: false }
}

/// Returns a writable buffer.
fn w(gpa: u64, len: u32) -> Buffer {
    Buffer { gpa, len, write: true }
}

const S: Buffer = Buffer { gpa: STATUSES, len: 1, write: true };
const H: Buffer = Buffer { gpa: HEADER, len: 16, write: false };

/// The effect of a request.
struct Did {
    /// The address and value of the status byte; `None`: none is written.
    status: Option<(u64, u8)>,
    /// The used element's length.
    len: u32,
    /// Other changes of guest memory.
    data: Vec<(u64, Vec<u8>)>,
    /// The contents of the disk's first sectors afterwards.
    disk: [u8; 8],
}

fn did(status: u8, len: u32) -> Did {
    Did { status: Some((STATUSES, status)), len, data: vec![], disk: BEFORE }
}

impl Did {
    fn at(mut self, gpa: u64) -> Self {
        self.status = self.status.map(|(_, status)| (gpa, status));
        self
    }
    fn puts(mut self, gpa: u64, bytes: impl Into<Vec<u8>>) -> Self {
        self.data.push((gpa, bytes.into()));
        self
    }
    fn sector(mut self, sector: usize, byte: u8) -> Self {
        self.disk[sector] = byte;
        self
    }
}

fn no_effect() -> Did {
    Did { status: None, len: 0, data: vec![], disk: BEFORE }
}

type Row = (&'static str, On, (u32, u64), Vec<Buffer>, Did);

fn assert_row(packed: bool, indirect: bool, row: &Row) {
    let (says, on, (kind, sector), buffers, want) = row;
    let what = format!("{says}; {on:?}, type {kind}, packed: {packed}, indirect: {indirect}");
    let mut scene = on.scene(packed);
    scene.indirect = indirect;
    for (gpa, len) in WATCHED {
        scene.put(gpa, &vec![UNTOUCHED; len as usize]);
    }
    for buffer in buffers.iter().filter(|b| !b.write && b.gpa < HEADER) {
        scene.put(buffer.gpa, &vec![WRITTEN; buffer.len as usize]);
    }
    ranges_of(says).iter().enumerate().for_each(|(n, &(sector, sectors, flags))| {
        let at = RANGES + 16 * n as u64;
        scene.put(at, &sector.to_le_bytes());
        scene.put(at + 8, &[sectors, flags].map(u32::to_le_bytes).concat());
    });
    scene.put(HEADER, &u64::from(*kind).to_le_bytes());
    scene.put(HEADER + 8, &sector.to_le_bytes());

    let watch = |scene: &Scene| WATCHED.map(|(gpa, len)| scene.get(gpa, len as usize));
    let mut expected = watch(&scene);
    let status = want.status.map(|(gpa, status)| (gpa, vec![status]));
    for (gpa, bytes) in want.data.iter().cloned().chain(status) {
        let n = WATCHED.iter().position(|(at, len)| (*at..at + len).contains(&gpa)).unwrap();
        let at = (gpa - WATCHED[n].0) as usize;
        expected[n][at..at + bytes.len()].copy_from_slice(&bytes);
    }
    scene.send_raw(buffers);
    scene.settle();
    let answers = scene.answers();
    assert_eq!(answers.iter().map(|(.., len)| *len).collect::<Vec<_>>(), [want.len], "{what}");
    for ((got, want), (gpa, _)) in watch(&scene).iter().zip(&expected).zip(WATCHED) {
        let differs = got.iter().zip(want).position(|(got, want)| got != want);
        let differs = differs.map(|at| (gpa + at as u64, got[at], want[at]));
        assert_eq!(differs, None, "address, actual and expected value; {what}");
    }
    if on.keeps() {
        scene.indirect = false;
        let n = scene.send(IN, 0, &[(DATA, 4096)]);
        scene.settle();
        assert_eq!(scene.answers(), [(n, OK, 4097)]);
        let disk = std::array::from_fn(|n| scene.get(DATA + 512 * n as u64 + 100, 1)[0]);
        assert_eq!(want.disk, disk, "{what}");
    }
}

fn assert_rows(rows: &[Row]) {
    for packed in LAYOUTS {
        for indirect in [false, true] {
            rows.iter().for_each(|row| assert_row(packed, indirect, row));
        }
    }
}

/// Parses the segments of a discard or write-zeroes row from its text: "[sector, sectors, flags]".
fn ranges_of(says: &str) -> Vec<(u64, u32, u32)> {
    let segments = says.split('[').skip(1).map(|rest| rest.split(']').next().unwrap());
    let number = |text: &str| text.trim().parse::<u64>().unwrap();
    let of = |segment: &str| {
        let numbers: Vec<u64> = segment.split(',').map(number).collect();
        (numbers[0], numbers[1] as u32, numbers[2] as u32)
    };
    segments.map(of).collect()
}

#[test]
#[rustfmt::skip]
fn reads_writes_and_flushes() {
    use On::{Bare, Blocks4096, Malloc, ReadOnly, ReadOnlyBdev};
    let data = w(DATA, 512);
    let from = r(DATA, 512);
    assert_rows(&[
        // "The sector number indicates the offset (multiplied by 512) where the read or write is to
        // occur."
        ("IN populates data with the contents of sectors", Malloc, (IN, 1), vec![H, data, S],
            did(OK, 513).puts(DATA, [0x52; 512])),
        ("… in multiples of 512 bytes", Malloc, (IN, 6), vec![H, w(DATA, 1024), S],
            did(OK, 1025).puts(DATA, [0x57; 512]).puts(DATA + 512, [0x58; 512])),
        ("… of 512 bytes where a block is larger, too", Blocks4096, (IN, 0), vec![H, w(DATA, 4096), S],
            did(OK, 4097).puts(DATA, BEFORE.map(|b| [b; 512]).concat())),
        ("OUT writes data to the device", Malloc, (OUT, 2), vec![H, from, S], did(OK, 1).sector(2, WRITTEN)),
        ("a request that goes by no block of the device", Blocks4096, (IN, 1), vec![H, w(DATA, 4096), S], did(IOERR, 4097)),
        ("… nor its length", Blocks4096, (OUT, 0), vec![H, from, S], did(IOERR, 1)),
        // 5.2.6.1: "The length of data MUST be a multiple of 512 bytes for IN and OUT requests."
        ("IN of 100 bytes", Malloc, (IN, 0), vec![H, w(DATA, 100), S], did(UNSUPP, 1)),
        ("IN of 513 bytes", Malloc, (IN, 0), vec![H, w(DATA, 513), S], did(UNSUPP, 1)),
        ("IN of no bytes", Malloc, (IN, 0), vec![H, S], did(UNSUPP, 1)),
        ("OUT of 511 bytes", Malloc, (OUT, 0), vec![H, r(DATA, 511), S], did(UNSUPP, 1)),
        ("OUT of no bytes", Malloc, (OUT, 0), vec![H, S], did(UNSUPP, 1)),
        // 5.2.6.1: "A driver MUST NOT submit a request which would cause a read or write beyond
        // capacity." The used length of a read that fails includes the data, as SPDK's does.
        ("IN of the last sector", Malloc, (IN, SECTORS - 1), vec![H, data, S], did(OK, 513).puts(DATA, [0; 512])),
        ("IN across the end", Malloc, (IN, SECTORS - 1), vec![H, w(DATA, 1024), S], did(IOERR, 1025)),
        ("IN beyond the end", Malloc, (IN, SECTORS), vec![H, data, S], did(IOERR, 513)),
        ("IN of a sector whose offset has 65 bits", Malloc, (IN, 1 << 55), vec![H, data, S], did(IOERR, 513)),
        ("IN of a last sector that has 65 bits", Malloc, (IN, u64::MAX), vec![H, data, S], did(IOERR, 513)),
        ("OUT across the end", Malloc, (OUT, SECTORS - 1), vec![H, r(DATA, 1024), S], did(IOERR, 1)),
        ("OUT of a sector whose offset has 65 bits", Malloc, (OUT, 1 << 55), vec![H, from, S], did(IOERR, 1)),
        // 5.2.6.2: "IOERR for a write request if the VIRTIO_BLK_F_RO feature is offered, and MUST
        // NOT write any data."
        ("OUT to a read-only controller", ReadOnly, (OUT, 0), vec![H, from, S], did(IOERR, 1)),
        ("OUT of odd bytes to it", ReadOnly, (OUT, 0), vec![H, r(DATA, 3), S], did(IOERR, 1)),
        ("OUT to a read-only device", ReadOnlyBdev, (OUT, 0), vec![H, from, S], did(IOERR, 1)),
        ("IN from a read-only controller", ReadOnly, (IN, 0), vec![H, data, S], did(OK, 513).puts(DATA, [0x51; 512])),
        // 5.2.6.1: "A driver MUST set sector to 0 for a FLUSH request", and SHOULD NOT include data.
        ("FLUSH", Malloc, (FLUSH, 0), vec![H, S], did(OK, 1)),
        ("FLUSH of a sector", Malloc, (FLUSH, 1), vec![H, S], did(IOERR, 1)),
        ("FLUSH with data to write", Malloc, (FLUSH, 0), vec![H, from, S], did(OK, 1)),
        ("FLUSH with room for data", Malloc, (FLUSH, 0), vec![H, data, S], did(OK, 1)),
        ("FLUSH of a read-only controller", ReadOnly, (FLUSH, 0), vec![H, S], did(OK, 1)),
        ("FLUSH that is not offered", Bare, (FLUSH, 0), vec![H, S], did(UNSUPP, 1)),
    ]);
}

#[test]
#[rustfmt::skip]
fn get_id_and_unsupported_requests() {
    use On::{Bare, Malloc};
    // Padded as by SPDK, where section 5.2.6 has zeroes: the guest's serial number stays the same.
    let id = b"Malloc0             ";
    assert_rows(&[
        // "GET_ID requests fetch the device ID string from the device into data. [It] is up to 20 bytes long."
        ("GET_ID", Malloc, (GET_ID, 0), vec![H, w(DATA, 20), S], did(OK, 21).puts(DATA, *id)),
        ("GET_ID in pieces", Malloc, (GET_ID, 0), vec![H, w(DATA, 3), w(DATA + 64, 17), S],
            did(OK, 21).puts(DATA, &id[..3]).puts(DATA + 64, &id[3..])),
        // 5.2.6.1: "The length of data MUST be 20 bytes for GET_ID requests."
        ("GET_ID with more room", Malloc, (GET_ID, 0), vec![H, w(DATA, 21), S], did(OK, 21).puts(DATA, *id)),
        ("GET_ID with less room", Malloc, (GET_ID, 0), vec![H, w(DATA, 4), S], did(OK, 5).puts(DATA, &id[..4])),
        ("GET_ID without room", Malloc, (GET_ID, 0), vec![H, S], did(UNSUPP, 1)),
        // "UNSUPP for a request unsupported by device."
        ("SCSI_CMD", Malloc, (2, 0), vec![H, w(DATA, 96), S], did(UNSUPP, 1)),
        ("SCSI_CMD_OUT", Malloc, (3, 0), vec![H, r(DATA, 96), S], did(UNSUPP, 1)),
        ("GET_LIFETIME, which is not offered", Malloc, (GET_LIFETIME, 0), vec![H, w(DATA, 12), S], did(UNSUPP, 1)),
        ("SECURE_ERASE, which is not offered", Malloc, (SECURE_ERASE, 0), vec![H, r(DATA, 16), S], did(UNSUPP, 1)),
        ("ZONE_APPEND, of later versions", Malloc, (15, 0), vec![H, from_guest(), S], did(UNSUPP, 1)),
        ("a type that nobody knows", Malloc, (0x7fff_ffff, 0), vec![H, w(DATA, 512), S], did(UNSUPP, 1)),
        ("DISCARD that is not offered", Bare, (DISCARD, 0), vec![H, r(RANGES, 16), S], did(UNSUPP, 1)),
        ("WRITE_ZEROES that is not offered", Bare, (WRITE_ZEROES, 0), vec![H, r(RANGES, 16), S], did(UNSUPP, 1)),
        // Section 5.2.6.3's legacy barrier, which SPDK masks off too.
        ("IN with a barrier", Malloc, (IN | BARRIER, 0), vec![H, w(DATA, 512), S], did(OK, 513).puts(DATA, [0x51; 512])),
    ]);
}

fn from_guest() -> Buffer {
    r(DATA, 512)
}

#[test]
#[rustfmt::skip]
fn discards_and_write_zeroes() {
    use On::{Malloc, ReadOnly, ReadOnlyBdev};
    let segments = |n: u32| vec![H, r(RANGES, 16 * n), S];
    assert_rows(&[
        // "The data used for discard or write zeroes commands consists of one or more segments."
        // Discarded sectors of this device read as zeroes.
        ("DISCARD of [1, 1, 0]", Malloc, (DISCARD, 0), segments(1), did(OK, 1).sector(1, 0)),
        ("DISCARD of [1, 1, 0] [3, 2, 0]", Malloc, (DISCARD, 0), segments(2),
            did(OK, 1).sector(1, 0).sector(3, 0).sector(4, 0)),
        ("DISCARD of [1, 0, 0]", Malloc, (DISCARD, 0), segments(1), did(OK, 1)),
        // 5.2.6.2: "After a write zeroes command is completed, reads … MUST return zeroes. This is
        // true independent of whether unmap was set or clear."
        ("WRITE_ZEROES of [1, 1, 0]", Malloc, (WRITE_ZEROES, 0), segments(1), did(OK, 1).sector(1, 0)),
        ("WRITE_ZEROES of [1, 1, 1]", Malloc, (WRITE_ZEROES, 0), segments(1), did(OK, 1).sector(1, 0)),
        // "The sector is unused and set to 0 for commands other than read or write."
        ("WRITE_ZEROES, whose header has a sector, of [1, 1, 0]", Malloc, (WRITE_ZEROES, 9), segments(1), did(OK, 1).sector(1, 0)),
        ("WRITE_ZEROES, whose segment is in pieces, of [1, 1, 0]", Malloc, (WRITE_ZEROES, 0),
            vec![H, r(RANGES, 7), r(RANGES + 7, 9), S], did(OK, 1).sector(1, 0)),
        // 5.2.6.1: "The length of data MUST be a multiple of the size of struct
        // virtio_blk_discard_write_zeroes", and no more than max_discard_seg of them.
        ("DISCARD of half of [1, 1, 0]", Malloc, (DISCARD, 0), vec![H, r(RANGES, 8), S], did(IOERR, 1)),
        ("DISCARD of one and a half of [1, 1, 0] [2, 1, 0]", Malloc, (DISCARD, 0), vec![H, r(RANGES, 24), S], did(IOERR, 1)),
        ("DISCARD of nothing", Malloc, (DISCARD, 0), vec![H, S], did(IOERR, 1)),
        ("DISCARD of 17 segments", Malloc, (DISCARD, 0), segments(17), did(IOERR, 1)),
        ("WRITE_ZEROES of 17 segments", Malloc, (WRITE_ZEROES, 0), segments(17), did(IOERR, 1)),
        ("DISCARD beyond the end, of [63, 2, 0]", Malloc, (DISCARD, 0), segments(1), did(IOERR, 1)),
        ("WRITE_ZEROES of [18446744073709551615, 2, 0]", Malloc, (WRITE_ZEROES, 0), segments(1), did(IOERR, 1)),
        ("WRITE_ZEROES of [0, 4294967295, 0]", Malloc, (WRITE_ZEROES, 0), segments(1), did(IOERR, 1)),
        ("WRITE_ZEROES of [1, 1, 0] and a bad [64, 1, 0]", Malloc, (WRITE_ZEROES, 0), segments(2), did(IOERR, 1)),
        // 5.2.6.2: "UNSUPP for discard, secure erase and write zeroes commands if any unknown flag is
        // set. Furthermore, … for discard commands if the unmap flag is set."
        ("DISCARD with unmap, of [1, 1, 1]", Malloc, (DISCARD, 0), segments(1), did(UNSUPP, 1)),
        ("DISCARD of [1, 1, 2]", Malloc, (DISCARD, 0), segments(1), did(UNSUPP, 1)),
        ("WRITE_ZEROES of [1, 1, 3]", Malloc, (WRITE_ZEROES, 0), segments(1), did(UNSUPP, 1)),
        ("WRITE_ZEROES of [1, 1, 2147483648]", Malloc, (WRITE_ZEROES, 0), segments(1), did(UNSUPP, 1)),
        ("… whatever else is wrong: [64, 1, 0] [1, 1, 2]", Malloc, (WRITE_ZEROES, 0), segments(2), did(UNSUPP, 1)),
        ("… on a read-only disk: [1, 1, 2]", ReadOnly, (DISCARD, 0), segments(1), did(UNSUPP, 1)),
        // Discards and write-zeroes count as writes (section 5.2.6.2) if they change what is read.
        ("DISCARD on a read-only controller, of [1, 1, 0]", ReadOnly, (DISCARD, 0), segments(1), did(IOERR, 1)),
        ("WRITE_ZEROES on it, of [1, 1, 0]", ReadOnly, (WRITE_ZEROES, 0), segments(1), did(IOERR, 1)),
        ("WRITE_ZEROES on a read-only device, of [1, 1, 0]", ReadOnlyBdev, (WRITE_ZEROES, 0), segments(1), did(IOERR, 1)),
    ]);
}

#[test]
#[rustfmt::skip]
fn framing() {
    use On::Malloc;
    let one = [0x51; 512];
    let outside = 0x800_0000;
    assert_rows(&[
        // 2.7.4.1: "The device MUST NOT make assumptions about the particular arrangement of
        // descriptors."
        ("data in three buffers", Malloc, (IN, 0), vec![H, w(DATA, 1), w(DATA + 64, 500), w(DATA + 1024, 11), S],
            did(OK, 513).puts(DATA, [0x51]).puts(DATA + 64, [0x51; 500]).puts(DATA + 1024, [0x51; 11])),
        ("the status behind the data", Malloc, (IN, 0), vec![H, w(DATA, 513)], did(OK, 513).puts(DATA, one).at(DATA + 512)),
        ("… and data in the buffer before", Malloc, (IN, 0), vec![H, w(DATA, 5), w(DATA + 64, 508)],
            did(OK, 513).puts(DATA, [0x51; 5]).puts(DATA + 64, [0x51; 507]).at(DATA + 64 + 507)),
        ("the header in three buffers", Malloc, (IN, 0), vec![r(HEADER, 1), r(HEADER + 1, 8), r(HEADER + 9, 7), w(DATA, 512), S],
            did(OK, 513).puts(DATA, one)),
        ("data that a read does not look at", Malloc, (IN, 0), vec![H, r(DATA + PAGE, 512), w(DATA, 512), S],
            did(OK, 513).puts(DATA, one)),
        ("room that a write does not fill", Malloc, (OUT, 0), vec![H, r(DATA + PAGE, 512), w(DATA, 512), S],
            did(OK, 1).sector(0, WRITTEN)),
        // "The final status byte is written by the device": it is the last writable byte.
        ("a header of 15 bytes", Malloc, (IN, 0), vec![r(HEADER, 15), w(DATA, 512), S], did(IOERR, 1)),
        ("no header", Malloc, (IN, 0), vec![w(DATA, 512), S], did(IOERR, 1)),
        ("no place for a status", Malloc, (OUT, 0), vec![H, r(DATA, 512)], no_effect()),
        // 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any
        // device-readable descriptor elements."
        ("a readable buffer after a writable one", Malloc, (IN, 0), vec![H, w(DATA, 512), r(DATA + PAGE, 1), S], did(IOERR, 1)),
        ("… and at the end", Malloc, (IN, 0), vec![H, w(DATA, 512), r(DATA + PAGE, 1)], did(IOERR, 1).at(DATA + 511)),
        // Buffers outside of memory.
        ("data outside of memory", Malloc, (IN, 0), vec![H, w(outside, 512), S], did(IOERR, 1)),
        ("the status outside of memory", Malloc, (IN, 0), vec![H, w(DATA, 512), w(outside, 1)], no_effect()),
        ("a header outside of memory", Malloc, (IN, 0), vec![r(outside, 16), w(DATA, 512), S], did(IOERR, 1)),
        // Empty buffers, which no driver sends: the chain is refused. The status byte is where it
        // would be without them.
        ("an empty buffer among the data", Malloc, (IN, 0), vec![H, w(DATA, 256), w(DATA + PAGE, 0), w(DATA + 256, 256), S], did(IOERR, 1)),
        ("… before it", Malloc, (IN, 0), vec![H, w(DATA, 0), w(DATA, 512), S], did(IOERR, 1)),
        ("… after it", Malloc, (IN, 0), vec![H, w(DATA, 512), w(DATA + 512, 0), S], did(IOERR, 1)),
        ("… where memory begins", Malloc, (IN, 0), vec![H, w(DATA, 512), w(FAR, 0), S], did(IOERR, 1)),
        ("… at the end", Malloc, (IN, 0), vec![H, w(DATA, 512), S, w(DATA + PAGE, 0)], did(IOERR, 1)),
        ("… at the end, outside of memory", Malloc, (IN, 0), vec![H, w(DATA, 513), w(outside, 0)], did(IOERR, 1).at(DATA + 512)),
        ("… and nothing else to write", Malloc, (IN, 0), vec![H, w(STATUSES, 0)], no_effect()),
        ("… of data to write", Malloc, (OUT, 0), vec![H, r(DATA, 256), r(DATA, 0), r(DATA, 256), S], did(IOERR, 1)),
        ("… in the header's place", Malloc, (OUT, 0), vec![r(HEADER, 0), H, r(DATA, 512), S], did(IOERR, 1)),
        ("… of a GET_ID", Malloc, (GET_ID, 0), vec![H, w(DATA, 20), w(DATA + 64, 0), S], did(IOERR, 1)),
        ("… many of them", Malloc, (IN, 0), [vec![H, w(DATA, 512)], vec![w(DATA, 0); 40], vec![S]].concat(), did(IOERR, 1)),
    ]);
}
