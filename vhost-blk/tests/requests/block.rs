//! The block device, for the suites of `vhost-target`.

use std::sync::{Arc, MutexGuard};

use bdev::{Bdev, Op};
use guest_memory::GuestMemory;
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::device_queue::DeviceView;
use virtqueue::Buffer;
use vm_memory::Bytes;

use super::disk::{Manual, Record};
use super::scene::{IN, IOERR, OK, OUT, UNTOUCHED, status_gpa};
use crate::suites::device::{Kind, Outcome, Sent, State, TestDevice};
use crate::suites::scene::PARTS;

/// A virtio-blk device.
pub(crate) struct Block {
    pub(crate) disk: Arc<Disk>,
    pub(crate) write_through: bool,
    /// The disk, if it is one that the test controls.
    manual: Option<Arc<Manual>>,
}

impl Block {
    pub(crate) fn new(bdev: Arc<dyn Bdev>) -> Self {
        let disk = Arc::new(Disk::new(bdev, false));
        Self { disk, write_through: false, manual: None }
    }
}

/// Writes the header of request `n` and resets its status. Returns the buffers of both.
pub(crate) fn frame(memory: &GuestMemory, n: usize, kind: u32, sector: u64) -> (Buffer, Buffer) {
    let put = |gpa, bytes: &[u8]| {
        memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
    };
    let header = PARTS + 16 * (n as u64 % 1024);
    put(header, &u64::from(kind).to_le_bytes());
    put(header + 8, &sector.to_le_bytes());
    put(status_gpa(n), &[UNTOUCHED]);
    let status = Buffer { gpa: status_gpa(n), len: 1, write: true };
    (Buffer { gpa: header, len: 16, write: false }, status)
}

/// The tag of a request is its sector.
impl TestDevice for Block {
    type Queue = BlkQueue;
    type Record = Record;

    fn create() -> Self {
        let manual = Manual::create();
        Self { manual: Some(Arc::clone(&manual)), ..Self::new(manual) }
    }

    fn open(&self, depth: u16) -> BlkQueue {
        BlkQueue::open(Some(&self.disk), depth).unwrap()
    }

    fn view(&self) -> DeviceView {
        BlkView::erased(&self.disk, self.write_through)
    }

    fn state(&self) -> MutexGuard<'_, State<Record>> {
        self.manual.as_ref().expect("the suites use a manual disk").state()
    }

    fn request(&self, memory: &GuestMemory, sent: &Sent) -> Vec<Buffer> {
        let (kind, write) = match sent.kind {
            Kind::Read => (IN, true),
            Kind::Write => (OUT, false),
        };
        let (header, status) = frame(memory, sent.n, kind, sent.tag);
        let data = sent.data.iter().map(|&(gpa, len)| Buffer { gpa, len, write });
        [header].into_iter().chain(data).chain([status]).collect()
    }

    fn seen(&(op, offset, len): &Record) -> (u64, u64) {
        assert!(matches!(op, Op::Read | Op::Write), "{op:?}");
        (offset / 512, len)
    }

    /// The used length of a read that fails includes the data, as SPDK's does.
    fn check_answer(&self, memory: &GuestMemory, sent: &Sent, len: u32, expected: Outcome) {
        let mut status = [0];
        let gpa = status_gpa(sent.n);
        memory.slice(gpa, 1).unwrap().read_slice(&mut status, 0).unwrap();
        let data = if sent.kind == Kind::Read { sent.bytes() } else { 0 };
        let expected = match expected {
            Outcome::Done => (OK, data + 1),
            Outcome::Failed => (IOERR, data + 1),
            Outcome::Refused => (IOERR, 1),
        };
        assert_eq!((status[0], len), expected, "{sent:?}");
    }

    fn written(sent: &Sent) -> Vec<(u64, u32)> {
        let mut written = vec![(status_gpa(sent.n), 1)];
        if sent.kind == Kind::Read {
            written.extend(&sent.data);
        }
        written
    }
}
