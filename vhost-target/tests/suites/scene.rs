//! A guest with a ring of either layout, a queue of a device, and the reactor that visits it.
#![expect(unsafe_code, reason = "visits a queue as its reactor does")]
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use closer::ForeignFd;
use guest_memory::DirtyLog;
use guest_memory::Unmapper;
use guest_memory::testing::memfd;
use guest_memory::{GuestMemory, RegionSpec};
use qsbr::{Domain, Reader};
use reactor::{Garbage, Reclaim};
use reactor::{Iteration, PollHint, Pollable};
use vhost_target::notify::CallFd;
use vhost_target::queue::{
    Coalescing, Event, NewQueue, Queue, QueueId, QueueState, StartError, TargetQueue, Tracked,
    ViewSpec,
};
use vhost_target::{Core, Mode};
use vhost_target::{Events, Reactor, SteppedReactor};
use virtqueue::inflight::Area;
use virtqueue::{Buffer, Layout, RingAddrs};
use vm_memory::Bytes;

use super::device::{Kind, Outcome, Sent, TestDevice};
use super::{packed, split};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const ADDRS: RingAddrs = RingAddrs { desc: 0, avail: 0x1_0000, used: 0x2_0000 };
/// Memory that devices may use for parts of their requests, up to `TABLES`.
pub(crate) const PARTS: u64 = 0x3_0000;
/// Addresses of indirect tables, used in rotation.
const TABLES: u64 = 0x10_0000;
const TABLE_BYTES: u64 = 0x8000;
pub(crate) const DATA: u64 = 0x100_0000;
const MEMORY: u64 = 0x200_0000;
/// The address of a second region.
pub(crate) const FAR: u64 = 0x1000_0000;
const FAR_BYTES: u64 = 0x10_0000;

/// Requests that a queue may have in flight.
const DEPTH_MAX: u16 = 256;

/// Both layouts.
pub(crate) const LAYOUTS: [bool; 2] = [false, true];

#[derive(Debug)]
enum Driver {
    Split(split::Driver),
    Packed(packed::Driver),
}

/// The fixture.
pub(crate) struct Scene<D: TestDevice> {
    pub(crate) memory: Arc<GuestMemory>,
    unmapper: Arc<Unmapper>,
    pub(crate) packed: bool,
    size: u16,
    /// Whether requests use indirect tables.
    pub(crate) indirect: bool,
    driver: Driver,
    /// The numbers of the requests that the device has, by head or buffer id.
    outstanding: HashMap<u16, usize>,
    /// The requests of [`Scene::submit`] that the device has, by number.
    sent: HashMap<usize, Sent>,
    /// The number of requests so far, and the number of places that they have taken in the
    /// available ring.
    count: usize,
    places: u64,
    pub(crate) device: D,
    pub(crate) log: Option<(Arc<DirtyLog>, File)>,
    /// The eventfd of the guest's calls.
    pub(crate) call: Option<Arc<CallFd>>,
    pub(crate) coalescing: Arc<Coalescing>,
    pub(crate) area: Option<(Arc<Area>, File)>,
    /// The position at which a packed ring without an area starts.
    pub(crate) base: u16,
    generation: u64,
    queue: Option<Arc<Queue<D::Queue>>>,
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

/// Returns the guest's memory: two regions.
fn table() -> Vec<(RegionSpec, ForeignFd)> {
    vec![region(0, MEMORY), region(FAR, FAR_BYTES)]
}

fn online(domain: &Arc<Domain>) -> Reader {
    let mut reader = domain.reader().unwrap();
    reader.online();
    reader
}

impl<D: TestDevice> Scene<D> {
    /// Creates a guest with a device, without a queue.
    pub(crate) fn new(packed: bool, size: u16, device: D) -> Self {
        let unmapper = Arc::new(Unmapper::start().unwrap());
        let memory = Arc::new(GuestMemory::map(table(), None, &unmapper).unwrap());
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
            outstanding: HashMap::new(),
            sent: HashMap::new(),
            count: 0,
            places: 0,
            device,
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
    pub(crate) fn started(packed: bool, size: u16) -> Self {
        let mut scene = Self::new(packed, size, D::create());
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

    /// Returns the next view of the queue, with `memory`.
    pub(crate) fn view(&mut self, memory: &Arc<GuestMemory>) -> ViewSpec {
        self.generation += 1;
        let layout = Layout { packed: self.packed, event_idx: false };
        let device = Some(self.device.view());
        ViewSpec {
            generation: self.generation,
            call: self.call.clone(),
            log: self.log.as_ref().map(|(log, _)| Arc::clone(log)),
            ..ViewSpec::new(memory, self.size, ADDRS, layout, device)
        }
    }

    fn open(&self) -> D::Queue {
        self.device.open(self.size.min(DEPTH_MAX))
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

    pub(crate) fn queue(&self) -> &Arc<Queue<D::Queue>> {
        self.queue.as_ref().expect("the queue is started")
    }

    /// Publishes a view of `memory`, and of other changes.
    pub(crate) fn publish(&mut self, memory: &Arc<GuestMemory>) -> Box<dyn Garbage> {
        let view = self.view(memory);
        self.queue().publish(view).unwrap()
    }

    /// Publishes a view without a device: it was removed.
    pub(crate) fn publish_removed(&mut self, memory: &Arc<GuestMemory>) -> Box<dyn Garbage> {
        let view = ViewSpec { device: None, ..self.view(memory) };
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

    /// Returns the number of the next request.
    pub(crate) fn next(&self) -> usize {
        self.count
    }

    /// Returns a request of [`Scene::submit`] that the device has.
    pub(crate) fn sent(&self, n: usize) -> &Sent {
        &self.sent[&n]
    }

    /// Offers a request with `data` in pieces. Returns its number.
    pub(crate) fn submit(&mut self, kind: Kind, tag: u64, data: &[(u64, u32)]) -> usize {
        let sent = Sent { n: self.count, kind, tag, data: data.to_vec() };
        let buffers = self.device.request(&self.memory, &sent);
        self.sent.insert(self.count, sent);
        self.send_raw(&buffers)
    }

    /// Offers a read of 512 bytes, whose tag is its number.
    pub(crate) fn submit_one(&mut self) -> usize {
        let n = self.count as u64;
        self.submit(Kind::Read, n, &[(DATA + 1024 * (n % 4096), 512)])
    }

    pub(crate) fn submit_some(&mut self, count: usize) {
        for _ in 0..count {
            self.submit_one();
        }
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
        assert_eq!(self.outstanding.insert(id, n), None);
        n
    }

    /// Returns the requests that were completed since the last call, with their used lengths.
    pub(crate) fn take(&mut self) -> Vec<(usize, u32)> {
        let mut taken = vec![];
        loop {
            let next = match &mut self.driver {
                Driver::Split(driver) => driver.take(),
                Driver::Packed(driver) => driver.take(),
            };
            let Some((id, len)) = next else { return taken };
            let n = self.outstanding.remove(&id).expect("a chain was returned twice");
            taken.push((n, len));
        }
    }

    /// Takes the completed requests of [`Scene::submit`] and returns their numbers. Asserts how
    /// they have ended.
    pub(crate) fn ended_as(&mut self, expected: &[Outcome]) -> Vec<usize> {
        let taken = self.take();
        assert_eq!(taken.len(), expected.len(), "{taken:?}");
        for ((n, len), outcome) in taken.iter().zip(expected) {
            self.check(*n, *len, *outcome);
        }
        taken.into_iter().map(|(n, _)| n).collect()
    }

    /// As [`Scene::ended_as`], for requests that have succeeded.
    pub(crate) fn done(&mut self) -> Vec<usize> {
        let taken = self.take();
        taken.iter().for_each(|&(n, len)| self.check(n, len, Outcome::Done));
        taken.into_iter().map(|(n, _)| n).collect()
    }

    fn check(&mut self, n: usize, len: u32, expected: Outcome) {
        let sent = self.sent.remove(&n).expect("the request was submitted");
        self.device.check_answer(&self.memory, &sent, len, expected);
    }

    /// Returns the tags of the requests that the device has seen since the last call.
    pub(crate) fn seen(&self) -> Vec<u64> {
        let seen = std::mem::take(&mut self.device.state().seen);
        seen.iter().map(|record| D::seen(record).0).collect()
    }

    /// Completes all I/Os in flight, and visits until there is no more work.
    pub(crate) fn complete_all(&mut self) {
        self.device.state().complete_all();
        self.settle();
    }

    /// Makes the driver request calls. A split ring's driver always does.
    pub(crate) fn ask_for_calls(&mut self) {
        if let Driver::Packed(driver) = &mut self.driver {
            driver.ask_for_call();
        }
    }

    /// Returns the number of requests that the device has.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Returns the number of places that the requests so far have taken in the available ring.
    pub(crate) fn places(&self) -> u64 {
        self.places
    }

    /// Asserts that the guest has made the ring invalid.
    pub(crate) fn assert_broken(&mut self) {
        assert_eq!(self.queue().control().state(), QueueState::Broken);
        assert!(matches!(self.events.pop(), Some(Event::Broken(QueueId(1)))));
    }

    /// Stops the queue, which has no request in flight.
    pub(crate) fn stop(&mut self) {
        self.queue().control().stop();
        self.settle();
        assert_eq!(self.queue().control().state(), QueueState::Stopped);
    }

    /// Returns the position of the driver's next chain.
    pub(crate) fn position(&self) -> u16 {
        if self.packed { packed::position(self.places, self.size) } else { self.places as u16 }
    }

    /// Returns other memory at the same addresses.
    pub(crate) fn remapped(&self) -> Arc<GuestMemory> {
        Arc::new(GuestMemory::map(table(), None, &self.unmapper).unwrap())
    }

    /// Drops the driver, which uses the memory that the scene was created with. It offers nothing
    /// any more.
    pub(crate) fn drop_driver(&mut self) {
        self.driver = Driver::Split(split::Driver::new(&self.memory, ADDRS, self.size));
    }

    /// Returns the guest's memory with another file for its second region, at `far`.
    pub(crate) fn moved(&self, far: u64) -> Arc<GuestMemory> {
        let left = self.memory.without_region(region(FAR, FAR_BYTES).0).unwrap();
        let (spec, fd) = region(far, FAR_BYTES);
        Arc::new(GuestMemory::with_region(Some(&left), spec, &fd, &self.unmapper).unwrap())
    }
}
