//! A virtio-scsi device with one target, for the suites of `vhost-target`.

use std::sync::{Arc, MutexGuard, OnceLock};

use bdev::{Features, Op};
use guest_memory::GuestMemory;
use vhost_scsi::{RequestQueue, Scsi, Units};
use vhost_target::device::{Device, Negotiated};
use vhost_target::device_queue::DeviceView;
use vhost_target::{Mode, Target};
use virtqueue::Buffer;
use vm_memory::Bytes;

use super::disk::{Manual, Record};
use crate::suites::device::{Kind, Outcome, Sent, State, TestDevice};
use crate::suites::scene::{PARTS, Scene};

const HEADER_BYTES: u32 = 51;
const RESPONSE_BYTES: u32 = 108;
/// Memory for the header and the response of a request.
const FRAME_BYTES: u64 = 256;
const RESPONSE_AT: u64 = 64;

const READ: u8 = 0x28;
const WRITE: u8 = 0x2a;

/// The device, and a front end.
pub(crate) struct Unit {
    scsi: Arc<Scsi>,
    front_end: Box<dyn Negotiated>,
    disk: Arc<Manual>,
}

fn frame(n: usize) -> u64 {
    PARTS + FRAME_BYTES * (n as u64 % 1024)
}

/// The target that the devices' changes are told to. It has no controller.
fn nobody() -> &'static Target {
    static NOBODY: OnceLock<Arc<Target>> = OnceLock::new();
    NOBODY.get_or_init(|| Target::in_steps(1, Mode::Poll, Arc::new(|| {})).unwrap().0)
}

impl Unit {
    /// Writes a header for target 0, and clears the response. Returns the buffers of both.
    fn head(memory: &GuestMemory, n: usize, cdb: &[u8]) -> (Buffer, Buffer) {
        let put = |gpa, bytes: &[u8]| {
            memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
        };
        let mut header = [0; HEADER_BYTES as usize];
        header[..3].copy_from_slice(&[1, 0, 0x40]);
        header[8..16].copy_from_slice(&(n as u64).to_le_bytes());
        header[19..19 + cdb.len()].copy_from_slice(cdb);
        let (header_gpa, response_gpa) = (frame(n), frame(n) + RESPONSE_AT);
        put(header_gpa, &header);
        put(response_gpa, &[0xee; RESPONSE_BYTES as usize]);
        let header = Buffer { gpa: header_gpa, len: HEADER_BYTES, write: false };
        (header, Buffer { gpa: response_gpa, len: RESPONSE_BYTES, write: true })
    }
}

/// The tag of a request is its first block.
impl TestDevice for Unit {
    type Queue = RequestQueue;
    type Record = Record;

    const FETCHES_WITHOUT_ROOM: bool = true;

    /// The unit attention of a new nexus has been taken.
    fn create() -> Self {
        let disk = Manual::with(Features { flush: true, ..Features::default() });
        let scsi = Scsi::new("test", &Arc::<Units>::default());
        scsi.add_target(nobody(), Some(0), &(Arc::clone(&disk) as _)).unwrap();
        let mut front_end = Arc::clone(&scsi).connect();
        front_end.set_features(1 << 32);
        let mut scene = Scene::new(false, 4, Self { scsi, front_end, disk });
        scene.start().unwrap();
        let (header, response) = Self::head(&scene.memory, 0, &[0]);
        let n = scene.send_raw(&[header, response]);
        scene.settle();
        assert_eq!(scene.take(), [(n, RESPONSE_BYTES)]);
        scene.kill();
        scene.device
    }

    fn open(&self, depth: u16) -> RequestQueue {
        self.scsi.open_request_queue(self.front_end.key(), depth).unwrap()
    }

    fn view(&self) -> DeviceView {
        self.front_end.view().unwrap()
    }

    fn state(&self) -> MutexGuard<'_, State<Record>> {
        self.disk.state()
    }

    fn request(&self, memory: &GuestMemory, sent: &Sent) -> Vec<Buffer> {
        let (operation, write) = match sent.kind {
            Kind::Read => (READ, true),
            Kind::Write => (WRITE, false),
        };
        let lba = u32::try_from(sent.tag).unwrap().to_be_bytes();
        let blocks = u16::try_from(sent.bytes() / 512).unwrap().to_be_bytes();
        let cdb = [&[operation, 0], &lba[..], &[0], &blocks].concat();
        let (header, response) = Self::head(memory, sent.n, &cdb);
        let data = sent.data.iter().map(|&(gpa, len)| Buffer { gpa, len, write });
        match sent.kind {
            Kind::Read => [header, response].into_iter().chain(data).collect(),
            Kind::Write => [header].into_iter().chain(data).chain([response]).collect(),
        }
    }

    fn seen(&(op, offset, len): &Record) -> (u64, u64) {
        assert!(matches!(op, Op::Read | Op::Write), "{op:?}");
        (offset / 512, len)
    }

    fn check_answer(&self, memory: &GuestMemory, sent: &Sent, len: u32, expected: Outcome) {
        let mut bytes = [0; RESPONSE_BYTES as usize];
        let gpa = frame(sent.n) + RESPONSE_AT;
        memory.slice(gpa, bytes.len()).unwrap().read_slice(&mut bytes, 0).unwrap();
        let data = if sent.kind == Kind::Read { sent.bytes() } else { 0 };
        // Sense length, residual, status, response, used length.
        let expected = match expected {
            Outcome::Done => (0, 0, 0, 0, RESPONSE_BYTES + data),
            Outcome::Failed => (18, sent.bytes(), 2, 0, RESPONSE_BYTES),
            Outcome::Refused => (0, 0, 0, 3, RESPONSE_BYTES),
        };
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        assert_eq!((word(0), word(4), bytes[10], bytes[11], len), expected, "{sent:?}");
    }

    fn written(sent: &Sent) -> Vec<(u64, u32)> {
        let mut written = vec![(frame(sent.n) + RESPONSE_AT, RESPONSE_BYTES)];
        if sent.kind == Kind::Read {
            written.extend(&sent.data);
        }
        written
    }
}
