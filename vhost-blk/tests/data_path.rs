//! Visits of a queue, in one thread: requests of a guest go in, statuses and used elements come
//! out.
//!
//! The guest is a set of helpers over [`GuestMemory`]. The disk is a real malloc disk, or
//! [`Manual`], which completes I/O when the test says so.
#![expect(unsafe_code, reason = "visits a queue as its reactor does")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use bdev::{
    Bdev, Channel, Completion, Features, Io, Malloc, MallocOptions, Null, NullOptions, Qos, Stats,
    Status, Submit,
};
use guest_memory::GuestMemory;
use guest_memory::testing::flat_at;
use qsbr::{Domain, Reader};
use reactor::Garbage;
use reactor::{Iteration, PollHint, Pollable};
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::Events;
use vhost_target::queue::Event;
use vhost_target::queue::{NewQueue, Queue, QueueId, TargetQueue, ViewSpec};
use virtqueue::{Layout, RingAddrs};
use vm_memory::Bytes;

const SIZE: u16 = 16;
const MEMORY: u64 = 0x4_0000;
const ADDRS: RingAddrs = RingAddrs { desc: 0, avail: 0x1000, used: 0x2000 };
/// Addresses of requests' headers, data and statuses, by descriptor.
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x3800;
const DATA: u64 = 0x1_0000;
const DISK_SECTORS: u64 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// The initial value of a status byte.
const UNTOUCHED: u8 = 0xee;

/// A queue, its guest and its reactor.
struct Bench {
    memory: Arc<GuestMemory>,
    queue: Arc<Queue<BlkQueue>>,
    disk: Arc<Disk>,
    reader: Reader,
    iteration: Iteration,
    hint: PollHint,
    events: Events,
    avail: u16,
    used: u16,
    generation: u64,
}

impl Bench {
    fn new(bdev: Arc<dyn Bdev>, read_only: bool) -> Self {
        let domain = Domain::new(1);
        let mut reader = domain.reader().unwrap();
        reader.online();
        let disk = Arc::new(Disk::new(bdev, read_only));
        let memory = flat_at(MEMORY, 0);
        let device = Some(BlkView::erased(&disk, false));
        let view = ViewSpec::new(&memory, SIZE, ADDRS, Layout::default(), device);
        let (id, domain, coalescing) = (QueueId(1), &domain, Arc::default());
        let new = NewQueue { id, domain, view, base: 0, coalescing, tracked: None };
        let queue = Queue::new(BlkQueue::open(Some(&disk), SIZE).unwrap(), new).unwrap();
        Self {
            memory,
            queue,
            disk,
            reader,
            iteration: Iteration::new(),
            hint: PollHint::default(),
            events: Events::new().unwrap(),
            avail: 0,
            used: 0,
            generation: 1,
        }
    }

    fn malloc() -> Self {
        Self::new(malloc(512), false)
    }

    fn visit(&mut self) -> bool {
        self.reader.quiesce();
        // SAFETY: this is the queue's only visitor.
        unsafe { self.queue.visit(&self.reader, &mut self.iteration, &self.events, &mut self.hint) }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
    }

    fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.slice(gpa, len).unwrap().read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    fn desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = u64::from(index) * 16;
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes `head` available.
    fn offer(&mut self, head: u16) {
        let at = 0x1004 + 2 * u64::from(self.avail % SIZE);
        self.put(at, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(0x1002, &self.avail.to_le_bytes());
    }

    fn header(&self, slot: u16, kind: u32, sector: u64) -> u64 {
        let at = HEADERS + 16 * u64::from(slot);
        self.put(at, &kind.to_le_bytes());
        self.put(at + 4, &[0; 4]);
        self.put(at + 8, &sector.to_le_bytes());
        self.put(STATUSES + u64::from(slot), &[UNTOUCHED]);
        at
    }

    /// Offers a request in the usual layout: header, `data`, status. It takes three descriptors.
    fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> u16 {
        let head = (self.avail * 3) % (SIZE - 3);
        let header = self.header(head, kind, sector);
        self.desc(head, header, 16, NEXT, head + 1);
        let write = if matches!(kind, IN | GET_ID) { WRITE } else { 0 };
        if let Some((gpa, len)) = data {
            self.desc(head + 1, gpa, len, NEXT | write, head + 2);
        } else {
            self.desc(head, header, 16, NEXT, head + 2);
        }
        self.desc(head + 2, STATUSES + u64::from(head), 1, WRITE, 0);
        self.offer(head);
        head
    }

    /// Returns the next used element, if there is one: head and length.
    fn take_used(&mut self) -> Option<(u16, u32)> {
        let idx = u16::from_le_bytes(self.get(0x2002, 2).try_into().unwrap());
        if idx == self.used {
            return None;
        }
        let at = 0x2004 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().unwrap());
        Some((word(at).try_into().unwrap(), word(at + 4)))
    }

    fn status(&self, head: u16) -> u8 {
        self.get(STATUSES + u64::from(head), 1)[0]
    }

    /// Offers a request, visits the queue, and returns the status and the used length.
    fn answer(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> (u8, u32) {
        let head = self.request(kind, sector, data);
        self.visit();
        let (used, len) = self.take_used().expect("the request was not completed");
        assert_eq!(used, head);
        (self.status(head), len)
    }

    /// Writes a discard or write-zeroes range into the data area.
    fn range(&self, sector: u64, sectors: u32, flags: u32) -> Option<(u64, u32)> {
        self.put(DATA, &sector.to_le_bytes());
        self.put(DATA + 8, &sectors.to_le_bytes());
        self.put(DATA + 12, &flags.to_le_bytes());
        Some((DATA, 16))
    }

    /// Publishes a view without the disk, which was removed.
    fn publish_removed(&mut self) -> Box<dyn Garbage> {
        self.generation += 1;
        let view = ViewSpec {
            generation: self.generation,
            ..ViewSpec::new(&self.memory, SIZE, ADDRS, Layout::default(), None)
        };
        self.queue.publish(view).unwrap()
    }
}

fn malloc(block_size: u32) -> Arc<dyn Bdev> {
    let num_blocks = DISK_SECTORS * 512 / u64::from(block_size);
    let options = MallocOptions { name: "Malloc0".into(), num_blocks, block_size, uuid: None };
    Malloc::create(options).unwrap()
}

/// A disk whose I/O completes when the test says so.
///
/// Fault that it may show: I/O that does not complete.
#[derive(Default)]
struct Manual {
    shared: Arc<Mutex<ManualState>>,
    features: Features,
    stats: Stats,
    qos: Qos,
}

#[derive(Default)]
struct ManualState {
    submitted: Vec<Io>,
    done: Vec<Completion>,
}

impl Bdev for Manual {
    fn name(&self) -> &str {
        "Manual"
    }
    fn product_name(&self) -> &'static str {
        "Manual disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn num_blocks(&self) -> u64 {
        DISK_SECTORS
    }
    fn features(&self) -> Features {
        self.features
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, _depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        Ok(Box::new(ManualChannel(Arc::clone(&self.shared))))
    }
}

struct ManualChannel(Arc<Mutex<ManualState>>);

impl Channel for ManualChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let mut state = self.0.lock().unwrap();
        state.submitted.push(io);
        Submit::Queued
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = self.0.lock().unwrap();
        let n = state.done.len().min(done.len());
        for (to, from) in done.iter_mut().zip(state.done.drain(..n)) {
            *to = from;
        }
        n
    }
}

fn manual() -> (Bench, Arc<Mutex<ManualState>>) {
    manual_with(Features { flush: true, ..Features::default() })
}

fn manual_with(features: Features) -> (Bench, Arc<Mutex<ManualState>>) {
    let bdev = Arc::new(Manual { features, ..Manual::default() });
    let shared = Arc::clone(&bdev.shared);
    (Bench::new(bdev, false), shared)
}

fn complete_all(shared: &Mutex<ManualState>, status: Status) {
    let mut state = shared.lock().unwrap();
    let done: Vec<_> =
        state.submitted.drain(..).map(|io| Completion { tag: io.tag, status }).collect();
    state.done.extend(done);
}

#[test]
fn written_data_is_read_back() {
    let mut bench = Bench::malloc();
    bench.put(DATA, &[7; 1024]);
    assert_eq!(bench.answer(OUT, 3, Some((DATA, 1024))), (OK, 1));
    assert_eq!(bench.answer(IN, 3, Some((DATA + 0x1000, 1024))), (OK, 1025));
    assert_eq!(bench.get(DATA + 0x1000, 1024), [7; 1024]);
    assert!(!bench.visit(), "there is no more work");
}

#[test]
fn ranges_are_checked_without_overflow() {
    let mut bench = Bench::malloc();
    let data = Some((DATA, 512));
    assert_eq!(bench.answer(IN, DISK_SECTORS - 1, data), (OK, 513));
    for sector in [DISK_SECTORS, 1 << 55, 1 << 60, u64::MAX] {
        assert_eq!(bench.answer(IN, sector, data).0, IOERR, "{sector:#x}");
        assert_eq!(bench.answer(OUT, sector, data).0, IOERR, "{sector:#x}");
    }
    assert_eq!(bench.answer(IN, 0, Some((DATA, 100))).0, UNSUPP);
    assert_eq!(bench.answer(OUT, 0, None).0, UNSUPP);
    let mut bench = Bench::new(malloc(4096), false);
    assert_eq!(bench.answer(IN, 0, data).0, IOERR, "half a block");
    assert_eq!(bench.answer(IN, 1, Some((DATA, 4096))).0, IOERR, "across blocks");
    assert_eq!(bench.answer(IN, 8, Some((DATA, 4096))).0, OK);
}

#[test]
fn get_id_and_unsupported_requests() {
    let mut bench = Bench::malloc();
    assert_eq!(bench.answer(FLUSH, 0, None), (OK, 1));
    assert_eq!(bench.answer(FLUSH, 1, None).0, IOERR);
    assert_eq!(bench.answer(GET_ID, 0, Some((DATA, 20))), (OK, 21));
    assert_eq!(bench.get(DATA, 20), b"Malloc0             ");
    assert_eq!(bench.answer(GET_ID, 0, None).0, UNSUPP);
    assert_eq!(bench.answer(GET_ID, 0, Some((DATA, 4))), (OK, 5));
    for kind in [2, 3, 10, 14, 99, u32::MAX >> 1] {
        assert_eq!(bench.answer(kind, 0, None).0, UNSUPP, "{kind}");
    }
    assert_eq!(bench.answer(IN | 1 << 31, 0, Some((DATA, 512))).0, UNSUPP, "data is not writable");
}

#[test]
fn discard_and_write_zeroes() {
    let mut bench = Bench::malloc();
    bench.put(DATA, &[9; 512]);
    assert_eq!(bench.answer(OUT, 5, Some((DATA, 512))).0, OK);
    let range = bench.range(5, 1, 0);
    assert_eq!(bench.answer(WRITE_ZEROES, 0, range).0, OK);
    assert_eq!(bench.answer(IN, 5, Some((DATA, 512))).0, OK);
    assert_eq!(bench.get(DATA, 512), [0; 512]);
    let cases = [
        (DISCARD, 5, 1, 0, OK),
        (DISCARD, 5, 0, 0, OK),
        (DISCARD, 5, 1, 1, UNSUPP),
        (WRITE_ZEROES, 5, 1, 1, OK),
        (WRITE_ZEROES, 5, 1, 2, UNSUPP),
        (DISCARD, DISK_SECTORS, 1, 0, IOERR),
        (DISCARD, u64::MAX, 1, 0, IOERR),
        (WRITE_ZEROES, 0, u32::MAX, 0, IOERR),
    ];
    for (kind, sector, sectors, flags, want) in cases {
        let range = bench.range(sector, sectors, flags);
        assert_eq!(bench.answer(kind, 0, range).0, want, "{kind} {sector} {sectors} {flags}");
    }
    assert_eq!(bench.answer(DISCARD, 0, Some((DATA, 32))).0, IOERR, "two ranges");
    assert_eq!(bench.answer(DISCARD, 0, Some((DATA, 15))).0, IOERR, "part of one");
    assert_eq!(bench.answer(DISCARD, 0, None).0, IOERR, "none");
}

#[test]
fn a_write_zeroes_may_unmap_if_all_ranges_have_the_flag_and_the_disk_supports_it() {
    for (unmap, flags, want) in
        [(true, [1, 1], true), (true, [1, 0], false), (true, [0, 1], false), (false, [1, 1], false)]
    {
        let features = Features { write_zeroes: true, unmap, ..Features::default() };
        let (mut bench, shared) = manual_with(features);
        bench.range(0, 1, flags[0]);
        let (first, _) = (bench.get(DATA, 16), bench.range(9, 1, flags[1]));
        let second = bench.get(DATA, 16);
        bench.put(DATA, &[first, second].concat());
        bench.request(WRITE_ZEROES, 0, Some((DATA, 32)));
        for _ in 0..2 {
            bench.visit();
            let io = shared.lock().unwrap().submitted[0];
            assert_eq!((io.op, io.may_unmap), (bdev::Op::WriteZeroes, want), "{unmap} {flags:?}");
            complete_all(&shared, Status::Ok);
        }
    }
}

#[test]
fn a_read_only_disk_refuses_all_requests_that_write() {
    let mut bench = Bench::new(malloc(512), true);
    assert_eq!(bench.answer(OUT, 0, Some((DATA, 512))).0, IOERR);
    let range = bench.range(0, 1, 0);
    assert_eq!(bench.answer(DISCARD, 0, range).0, IOERR);
    assert_eq!(bench.answer(WRITE_ZEROES, 0, range).0, IOERR);
    assert_eq!(bench.answer(IN, 0, Some((DATA, 512))).0, OK);
    assert_eq!(bench.answer(FLUSH, 0, None).0, OK);
}

#[test]
fn any_layout_is_accepted() {
    let mut bench = Bench::malloc();
    bench.put(DATA, &[3; 512]);
    assert_eq!(bench.answer(OUT, 2, Some((DATA, 512))).0, OK);
    // A write whose header is in three pieces. Data follows the header in the last piece.
    let header = bench.header(0, OUT, 4);
    bench.desc(0, header, 5, NEXT, 1);
    bench.desc(1, header + 5, 10, NEXT, 2);
    bench.put(DATA + 0x2000, &bench.get(header + 15, 1));
    bench.put(DATA + 0x2001, &[4; 512]);
    bench.desc(2, DATA + 0x2000, 513, NEXT, 3);
    bench.desc(3, STATUSES, 1, WRITE, 0);
    bench.offer(0);
    bench.visit();
    assert_eq!((bench.take_used(), bench.status(0)), (Some((0, 1)), OK));
    // A read whose status follows the data in the same buffer.
    let header = bench.header(0, IN, 4);
    bench.desc(0, header, 16, NEXT, 1);
    bench.desc(1, DATA + 0x4000, 513, WRITE, 0);
    bench.put(DATA + 0x4000 + 512, &[UNTOUCHED]);
    bench.offer(0);
    bench.visit();
    assert_eq!(bench.take_used(), Some((0, 513)));
    assert_eq!(bench.get(DATA + 0x4000, 512), [4; 512]);
    assert_eq!(bench.get(DATA + 0x4000 + 512, 1), [OK]);
}

#[test]
fn malformed_chains_are_returned() {
    let mut bench = Bench::malloc();
    let header = bench.header(0, IN, 0);
    let mut answer = |descs: &[(u64, u32, u16, u16)]| {
        for (n, (addr, len, flags, next)) in (0..).zip(descs) {
            bench.desc(n, *addr, *len, *flags, *next);
        }
        bench.put(STATUSES, &[UNTOUCHED]);
        bench.offer(0);
        bench.visit();
        (bench.take_used().expect("the chain was not returned").1, bench.status(0))
    };
    let status = (STATUSES, 1, WRITE, 0);
    // With a place for the status: an error status.
    assert_eq!(answer(&[(header, 15, NEXT, 1), status]), (1, IOERR));
    assert_eq!(answer(&[(DATA, 512, NEXT | WRITE, 1), (header, 16, NEXT, 2), status]), (1, IOERR));
    assert_eq!(answer(&[(MEMORY, 16, NEXT, 1), status]), (1, IOERR));
    // Without one: returned with nothing written.
    assert_eq!(answer(&[(header, 16, 0, 0)]), (0, UNTOUCHED));
    assert_eq!(answer(&[(header, 16, NEXT, 1), (MEMORY - 1, 2, WRITE, 0)]), (0, UNTOUCHED));
    assert_eq!(answer(&[(header, 16, NEXT, 0)]).1, UNTOUCHED, "a loop");
    // Nothing is written to the buffers before the invalid descriptor either.
    let written = (STATUSES, 1, NEXT | WRITE, SIZE);
    assert_eq!(answer(&[(header, 16, NEXT, 1), written]), (0, UNTOUCHED), "out of range");
    let written = (STATUSES, 1, NEXT | WRITE, 1);
    assert_eq!(
        answer(&[(header, 16, NEXT, 1), written]),
        (0, UNTOUCHED),
        "a loop with a writable buffer"
    );
    let tables = (DATA, 15, INDIRECT, 0);
    let written = (STATUSES, 1, NEXT | WRITE, 2);
    assert_eq!(
        answer(&[(header, 16, NEXT, 1), written, tables]),
        (0, UNTOUCHED),
        "an invalid indirect table"
    );
    assert_eq!(bench.queue.control().requests(), (9, 9));
    bench.offer(SIZE + 5);
    bench.visit();
    assert_eq!(bench.take_used(), Some((SIZE + 5, 0)), "a head out of range");
    assert_eq!(bench.answer(IN, 0, Some((DATA, 512))), (OK, 513), "the queue continues");
}

#[test]
fn a_removed_disk_fails_requests_and_releases_its_channel() {
    let (mut bench, shared) = manual();
    let first = bench.request(IN, 0, Some((DATA, 512)));
    bench.visit();
    let _retired = bench.publish_removed();
    let second = bench.request(IN, 1, Some((DATA, 512)));
    bench.visit();
    assert_eq!(bench.take_used(), Some((second, 1)));
    assert_eq!(bench.status(second), IOERR);
    assert!(bench.events.pop().is_none(), "I/O is in flight on the channel");
    complete_all(&shared, Status::Ok);
    bench.visit();
    assert_eq!((bench.take_used(), bench.status(first)), (Some((first, 513)), OK));
    assert!(matches!(bench.events.pop(), Some(Event::Released(QueueId(1), _))));
    assert_eq!(bench.answer(FLUSH, 0, None), (IOERR, 1));
}

#[test]
fn requests_are_counted_for_the_disk() {
    let mut bench = Bench::malloc();
    bench.answer(OUT, 0, Some((DATA, 1024)));
    bench.answer(IN, 0, Some((DATA, 512)));
    let totals = bench.disk.bdev.stats().totals();
    let read = totals[bdev::Op::Read as usize];
    let write = totals[bdev::Op::Write as usize];
    assert_eq!((read.count, read.bytes, write.count, write.bytes), (1, 512, 1, 1024));
}

/// A guest may learn of a new size before the reactor does.
#[test]
fn a_request_beyond_the_size_in_the_view_is_checked_again() {
    let options =
        NullOptions { name: "n".into(), num_blocks: DISK_SECTORS, block_size: 512, uuid: None };
    let null = Null::create(options).unwrap();
    let mut bench = Bench::new(Arc::clone(&null) as Arc<dyn Bdev>, false);
    assert_eq!(bench.answer(IN, DISK_SECTORS, Some((DATA, 512))), (IOERR, 513));
    null.resize(DISK_SECTORS + 1).unwrap();
    assert_eq!(bench.answer(IN, DISK_SECTORS, Some((DATA, 512))), (OK, 513));
    assert_eq!(bench.answer(OUT, DISK_SECTORS + 1, Some((DATA, 512))), (IOERR, 1));
}
