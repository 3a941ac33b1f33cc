//! A guest with a ring of either layout, a queue, and the reactor that visits it.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bdev::Bdev;
use closer::ForeignFd;
use guest_memory::DirtyLog;
use guest_memory::Unmapper;
use guest_memory::testing::memfd;
use guest_memory::{GuestMemory, RegionSpec};
use qsbr::{Domain, Reader};
use reactor::{Garbage, Reclaim};
use reactor::{Iteration, PollHint, Pollable};
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_target::notify::CallFd;
use vhost_target::queue::{
    Coalescing, NewQueue, Queue, QueueId, StartError, TargetQueue, Tracked, ViewSpec,
};
use vhost_target::{Core, Mode};
use vhost_target::{Events, Reactor, SteppedReactor};
use virtqueue::inflight::Area;
use virtqueue::{Buffer, Layout, RingAddrs};
use vm_memory::Bytes;

use super::split;
use crate::packed;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const ADDRS: RingAddrs = RingAddrs { desc: 0, avail: 0x1_0000, used: 0x2_0000 };
/// Addresses of requests' headers and statuses, by number.
const HEADERS: u64 = 0x3_0000;
pub(crate) const STATUSES: u64 = 0x4_0000;
/// Addresses of the ranges of discards.
const RANGES: u64 = 0x5_0000;
/// Addresses of indirect tables, used in rotation.
const TABLES: u64 = 0x10_0000;
const TABLE_BYTES: u64 = 0x8000;
pub(crate) const DATA: u64 = 0x100_0000;
const MEMORY: u64 = 0x200_0000;
/// The address of a second region.
pub(crate) const FAR: u64 = 0x1000_0000;
const FAR_BYTES: u64 = 0x10_0000;

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

/// Both layouts.
pub(crate) const LAYOUTS: [bool; 2] = [false, true];

#[derive(Debug)]
enum Driver {
    Split(split::Driver),
    Packed(packed::Driver),
}

/// A completed request: its number, its status, and the used length.
pub(crate) type Answer = (usize, u8, u32);

/// The fixture.
pub(crate) struct Scene {
    pub(crate) memory: Arc<GuestMemory>,
    unmapper: Arc<Unmapper>,
    pub(crate) packed: bool,
    size: u16,
    /// Whether requests use indirect tables.
    pub(crate) indirect: bool,
    driver: Driver,
    /// The numbers of the requests that the device has, by head or buffer id.
    sent: HashMap<u16, usize>,
    /// The number of requests so far, and the number of places that they have taken in the
    /// available ring.
    count: usize,
    places: u64,
    pub(crate) disk: Arc<Disk>,
    /// The disk was removed: the next view has none.
    pub(crate) removed: bool,
    pub(crate) write_through: bool,
    pub(crate) log: Option<(Arc<DirtyLog>, File)>,
    /// The eventfd of the guest's calls.
    pub(crate) call: Option<Arc<CallFd>>,
    pub(crate) coalescing: Arc<Coalescing>,
    pub(crate) area: Option<(Arc<Area>, File)>,
    /// The position at which a packed ring without an area starts.
    pub(crate) base: u16,
    generation: u64,
    queue: Option<Arc<Queue<BlkQueue>>>,
    reader: Reader,
    domain: Arc<Domain>,
    iteration: Iteration,
    hint: PollHint,
    pub(crate) events: Events,
}

fn file(fd: &OwnedFd) -> File {
    fd.try_clone().unwrap().into()
}

fn region(gpa: u64, size: u64) -> (RegionSpec, ForeignFd) {
    let spec = RegionSpec { gpa, size, user_addr: gpa, offset: 0 };
    (spec, ForeignFd::alone(memfd(size)))
}

fn online(domain: &Arc<Domain>) -> Reader {
    let mut reader = domain.reader().unwrap();
    reader.online();
    reader
}

impl Scene {
    /// Creates a guest and a disk, without a queue.
    pub(crate) fn new(packed: bool, size: u16, bdev: Arc<dyn Bdev>) -> Self {
        let unmapper = Arc::new(Unmapper::start().unwrap());
        let table = vec![region(0, MEMORY), region(FAR, FAR_BYTES)];
        let memory = Arc::new(GuestMemory::map(table, None, &unmapper).unwrap());
        let driver = if packed {
            Driver::Packed(packed::Driver::new(&memory, ADDRS, size, false, 0))
        } else {
            Driver::Split(split::Driver::new(&memory, ADDRS, size))
        };
        let domain = Domain::new(1);
        Self {
            memory,
            unmapper,
            packed,
            size,
            indirect: false,
            driver,
            sent: HashMap::new(),
            count: 0,
            places: 0,
            disk: Arc::new(Disk::new(bdev, false)),
            removed: false,
            write_through: false,
            log: None,
            call: None,
            coalescing: Arc::default(),
            area: None,
            base: 1 << 15,
            generation: 0,
            queue: None,
            reader: online(&domain),
            domain,
            iteration: Iteration::new(),
            hint: PollHint::default(),
            events: Events::new().unwrap(),
        }
    }

    /// As [`Scene::new`], with a started queue.
    pub(crate) fn started(packed: bool, size: u16, bdev: Arc<dyn Bdev>) -> Self {
        let mut scene = Self::new(packed, size, bdev);
        scene.start().unwrap();
        scene
    }

    /// Records requests in flight in an area for rings of `size`.
    pub(crate) fn track(&mut self, size: u16) {
        let (spec, fd) = Area::create(2, size, self.packed).unwrap();
        let file = file(&fd);
        let area = Area::map(spec, &ForeignFd::alone(fd), &self.unmapper).unwrap();
        self.area = Some((Arc::new(area), file));
    }

    /// Marks dirty pages, from the next view on.
    pub(crate) fn migrate(&mut self) {
        let bytes = (FAR + FAR_BYTES) / PAGE / 8;
        let fd = memfd(bytes);
        let file = file(&fd);
        let log = DirtyLog::map(&ForeignFd::alone(fd), 0, bytes, &self.unmapper).unwrap();
        self.log = Some((Arc::new(log), file));
    }

    /// Returns the marked pages and clears the marks.
    pub(crate) fn dirty(&self) -> Vec<u64> {
        let (_, file) = self.log.as_ref().unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        file.write_all_at(&vec![0; bytes.len()], 0).unwrap();
        let bits = (0..8 * bytes.len()).filter(|n| bytes[n / 8] >> (n % 8) & 1 != 0);
        bits.map(|n| n as u64).collect()
    }

    pub(crate) fn view(&mut self, memory: &Arc<GuestMemory>) -> ViewSpec {
        self.generation += 1;
        let layout = Layout { packed: self.packed, event_idx: false };
        let device = (!self.removed).then(|| BlkView::erased(&self.disk, self.write_through));
        ViewSpec {
            generation: self.generation,
            call: self.call.clone(),
            log: self.log.as_ref().map(|(log, _)| Arc::clone(log)),
            ..ViewSpec::new(memory, self.size, ADDRS, layout, device)
        }
    }

    /// Opens the disk for a queue.
    fn open(&self) -> BlkQueue {
        BlkQueue::open(Some(&self.disk), self.size.min(256)).unwrap()
    }

    /// Creates a queue, as a new process does.
    pub(crate) fn start(&mut self) -> Result<(), StartError> {
        self.domain = Domain::new(1);
        self.reader = online(&self.domain);
        self.events = Events::new().unwrap();
        let view = self.view(&Arc::clone(&self.memory));
        let tracked = self.area.as_ref().map(|(area, _)| Tracked { area, ring: 0 });
        let coalescing = Arc::clone(&self.coalescing);
        let (id, domain, base) = (QueueId(1), &self.domain, self.base);
        let new = NewQueue { id, domain, view, base, coalescing, tracked };
        let queue = Queue::new(self.open(), new)?;
        self.queue = Some(queue);
        Ok(())
    }

    /// As [`Scene::start`], for a reactor that sleeps when it can. Returns the reactor.
    pub(crate) fn start_to_sleep(&mut self) -> (Arc<Reactor>, SteppedReactor) {
        let domain = Domain::new(1);
        let mut view = self.view(&Arc::clone(&self.memory));
        view.kicks = true;
        let (id, base, coalescing) = (QueueId(1), self.base, Arc::default());
        let new = NewQueue { id, domain: &domain, view, base, coalescing, tracked: None };
        let queue = Queue::new(self.open(), new).unwrap();
        self.queue = Some(Arc::clone(&queue));
        let mode = Mode::Sleep { after_us: 0 };
        let reactor = Arc::new(Reactor::new(Core(0), &domain, mode).unwrap());
        reactor.publish(vec![queue as _], &Reclaim::start(|| {}).unwrap());
        let events = Arc::new(Events::new().unwrap());
        let stepped = SteppedReactor::new(&reactor, &domain, &events).unwrap();
        (reactor, stepped)
    }

    /// Discards the queue as it is.
    pub(crate) fn kill(&mut self) {
        self.queue = None;
    }

    pub(crate) fn queue(&self) -> &Arc<Queue<BlkQueue>> {
        self.queue.as_ref().expect("the queue is started")
    }

    /// Publishes a view of `memory`, and of other changes.
    pub(crate) fn publish(&mut self, memory: &Arc<GuestMemory>) -> Box<dyn Garbage> {
        let view = self.view(memory);
        self.queue().publish(view).unwrap()
    }

    pub(crate) fn visit(&mut self) -> bool {
        self.reader.quiesce();
        let queue = self.queue.as_ref().expect("the queue is started");
        // SAFETY: this is the queue's only visitor.
        unsafe { queue.visit(&self.reader, &mut self.iteration, &self.events, &mut self.hint) }
    }

    /// Visits until there is no more work.
    pub(crate) fn settle(&mut self) {
        let visits = (0..10_000).take_while(|_| self.visit()).count();
        assert!(visits < 10_000, "the queue does not become idle");
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.slice(gpa, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
    }

    pub(crate) fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.slice(gpa, len).unwrap().read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    /// Offers a request with `data` in pieces. Returns its number.
    pub(crate) fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> usize {
        let n = self.count;
        let header = HEADERS + 16 * (n as u64 % 1024);
        self.put(header, &u64::from(kind).to_le_bytes());
        self.put(header + 8, &sector.to_le_bytes());
        let status = STATUSES + n as u64 % PAGE;
        self.put(status, &[UNTOUCHED]);
        let write = kind == IN;
        let mut buffers = vec![Buffer { gpa: header, len: 16, write: false }];
        buffers.extend(data.iter().map(|&(gpa, len)| Buffer { gpa, len, write }));
        buffers.push(Buffer { gpa: status, len: 1, write: true });
        self.send_raw(&buffers)
    }

    /// Offers a chain. Returns its number.
    pub(crate) fn send_raw(&mut self, buffers: &[Buffer]) -> usize {
        let n = self.count;
        self.count += 1;
        let spans = self.packed && !self.indirect;
        self.places += if spans { buffers.len() as u64 } else { 1 };
        let table = self.indirect.then_some(TABLES + TABLE_BYTES * (n as u64 % 64));
        let id = match &mut self.driver {
            Driver::Split(driver) => driver.add(buffers, table),
            Driver::Packed(driver) => driver.add(buffers, table),
        };
        assert_eq!(self.sent.insert(id, n), None);
        n
    }

    /// Offers a discard or write-zeroes of ranges (sector, sectors, flags). Returns its number.
    pub(crate) fn send_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> usize {
        let at = RANGES + 1024 * (self.count as u64 % 64);
        for (n, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = at + 16 * n as u64;
            self.put(at, &sector.to_le_bytes());
            self.put(at + 8, &sectors.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
        }
        self.send(kind, 0, &[(at, 16 * ranges.len() as u32)])
    }

    /// Returns the requests that were completed since the last call.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        let mut answers = vec![];
        loop {
            let taken = match &mut self.driver {
                Driver::Split(driver) => driver.take(),
                Driver::Packed(driver) => driver.take(),
            };
            let Some((id, len)) = taken else { return answers };
            let n = self.sent.remove(&id).expect("a chain was returned twice");
            answers.push((n, self.get(STATUSES + n as u64 % PAGE, 1)[0], len));
        }
    }

    /// Makes the driver request calls. A split ring's driver always does.
    pub(crate) fn ask_for_calls(&mut self) {
        if let Driver::Packed(driver) = &mut self.driver {
            driver.ask_for_call();
        }
    }

    /// Returns the number of requests that the device has.
    pub(crate) fn outstanding(&self) -> usize {
        self.sent.len()
    }

    /// Returns the position of the driver's next chain.
    pub(crate) fn position(&self) -> u16 {
        if self.packed { packed::position(self.places, self.size) } else { self.places as u16 }
    }

    /// Returns the guest's memory with another file for its second region, at `far`.
    pub(crate) fn moved(&self, far: u64) -> Arc<GuestMemory> {
        let left = self.memory.without_region(region(FAR, FAR_BYTES).0).unwrap();
        let (spec, fd) = region(far, FAR_BYTES);
        Arc::new(GuestMemory::with_region(Some(&left), spec, &fd, &self.unmapper).unwrap())
    }
}
