//! A target with stepped reactors, controllers, and the guests of their front ends.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use bdev::Bdev;
use closer::ForeignFd;
use front_end::event::as_fd;
use front_end::ring::Ring;
use front_end::scsi::cdb::{self, Cdb};
use front_end::scsi::{
    Answered, Command, CommandQueue, ControlQueue, DRIVER_FEATURES, Done, Event, EventQueue,
    Layout, Response, Tmf, lun,
};
use front_end::{GuestRam, QueueOptions, Segment};
use guest_memory::testing::memfd;
use vhost_scsi::{Scsi, Units};
use vhost_target::protocol::request;
use vhost_target::{ConnId, ControllerSpec, Core, Mode, SteppedReactor, Target, Verdict};

use super::disk::{TestDisk, lock};
use super::wire::{NoSockets, Wire};

/// More steps than anything takes. A test that waits longer has failed.
const STEPS_MAX: usize = 200_000;
const PAGE: u64 = 4096;
const RAM_BYTES: u64 = 64 << 20;
/// Feature bits of rings and of vhost.
pub(crate) const LOG_ALL: u64 = 1 << 26;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const RING_PACKED: u64 = 1 << 34;

thread_local! {
    /// The thread runs an iteration of a reactor.
    pub(crate) static IN_REACTOR: Cell<bool> = const { Cell::new(false) };
}

/// Runs an iteration of a reactor. Returns whether the reactor sleeps.
fn step(reactor: &mut SteppedReactor) -> bool {
    IN_REACTOR.set(true);
    let sleeps = reactor.step();
    IN_REACTOR.set(false);
    sleeps
}

/// A target and its reactors.
pub(crate) struct World {
    pub(crate) target: Arc<Target>,
    pub(crate) reactors: Vec<SteppedReactor>,
    pub(crate) units: Arc<Units>,
    /// Whether each reactor sleeps, as of its last step.
    pub(crate) asleep: Vec<bool>,
}

impl World {
    pub(crate) fn new(reactors: usize) -> Self {
        Self::in_mode(reactors, Mode::Poll)
    }

    pub(crate) fn in_mode(reactors: usize, mode: Mode) -> Self {
        let (target, reactors) = Target::in_steps(reactors, mode, Arc::new(|| {})).unwrap();
        let asleep = vec![false; reactors.len()];
        Self { target, reactors, units: Arc::default(), asleep }
    }

    /// Creates a controller whose queues are on these reactors.
    pub(crate) fn controller_on(&self, name: &str, cores: Option<Vec<Core>>) -> Arc<Scsi> {
        let scsi = Scsi::new(name, &self.units);
        let spec = ControllerSpec {
            name: name.into(),
            socket: name.into(),
            device: Arc::clone(&scsi) as _,
            cores,
            packed_ring: true,
        };
        self.target.create_controller(spec, &NoSockets).unwrap();
        scsi
    }

    pub(crate) fn controller(&self, name: &str) -> Arc<Scsi> {
        self.controller_on(name, None)
    }

    /// One iteration of one reactor, and then of the control thread.
    pub(crate) fn step_one(&mut self, reactor: usize) {
        self.asleep[reactor] = step(&mut self.reactors[reactor]);
        self.target.process_events();
    }

    /// One iteration of every reactor, and then of the control thread.
    pub(crate) fn step(&mut self) {
        for (reactor, asleep) in self.reactors.iter_mut().zip(&mut self.asleep) {
            *asleep = step(reactor);
        }
        self.target.process_events();
    }

    /// As many steps as anything takes that waits for nothing.
    pub(crate) fn settle(&mut self) {
        for _ in 0..24 {
            self.step();
        }
    }

    /// Steps until `done`.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut done: impl FnMut() -> bool) {
        for _ in 0..STEPS_MAX {
            if done() {
                return;
            }
            self.step();
            // Memory and channels are freed by threads of the target.
            thread::yield_now();
        }
        panic!("waited in vain: {what}");
    }
}

/// What a front end negotiates, and the rings of its guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest {
    /// Request queues.
    pub(crate) queues: usize,
    pub(crate) size: u16,
    pub(crate) packed: bool,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
    /// Feature bits that are not accepted.
    pub(crate) without: u64,
    /// Requests in flight are recorded.
    pub(crate) tracked: bool,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            queues: 1,
            size: 64,
            packed: false,
            indirect: false,
            event_idx: false,
            without: 0,
            tracked: false,
        }
    }
}

/// A front end and its guest.
pub(crate) struct Vm {
    target: Arc<Target>,
    pub(crate) id: ConnId,
    pub(crate) wire: Arc<Wire>,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) guest: Guest,
    pub(crate) features: u64,
    pub(crate) control: ControlQueue,
    pub(crate) events: EventQueue,
    pub(crate) queues: Vec<CommandQueue>,
    next_tag: u64,
    /// Commands that were answered, and not yet taken.
    answered: HashMap<u64, Done>,
    area: Option<(Vec<u8>, File)>,
    log: Option<File>,
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn dup(fd: impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}

impl Vm {
    /// Connects, and sets up memory and queues. Starts no ring.
    pub(crate) fn connect(world: &World, controller: &str, guest: Guest) -> Self {
        let ram = GuestRam::new(&[RAM_BYTES / 2, RAM_BYTES / 2]).unwrap();
        let Guest { queues, size, packed, indirect, event_idx, .. } = guest;
        let segments_max = 1200;
        let options = QueueOptions { size, indirect, segments_max };
        let small = QueueOptions { size: 16, indirect: false, segments_max: 4 };
        let layout = (event_idx, packed);
        let commands = |n| CommandQueue::new(&ram, 2 + n, options, layout, 16 << 10).unwrap();
        let (wire, id) = connected(world, controller);
        let vm = Self {
            target: Arc::clone(&world.target),
            id,
            wire,
            guest,
            features: features(&guest),
            control: ControlQueue::new(&ram, small, layout).unwrap(),
            events: EventQueue::new(&ram, small, layout).unwrap(),
            queues: (0..queues).map(commands).collect(),
            next_tag: 1,
            answered: HashMap::new(),
            area: None,
            log: None,
            ram,
        };
        vm.negotiate();
        vm
    }

    /// As [`Vm::connect`], with all rings started.
    pub(crate) fn started(world: &mut World, controller: &str, guest: Guest) -> Self {
        let mut vm = Self::connect(world, controller, guest);
        vm.start_all();
        world.settle();
        vm
    }

    pub(crate) fn negotiate(&self) {
        self.tell(request::SET_FEATURES, &words(&[self.features]), vec![]);
        self.set_memory();
    }

    /// Sends the memory table.
    pub(crate) fn set_memory(&self) {
        let table = self.ram.table();
        let mut payload = vec![table.len() as u64];
        for region in &table {
            let (gpa, size) = (region.guest_phys_addr, region.memory_size);
            payload.extend([gpa, size, region.userspace_addr, region.mmap_offset]);
        }
        let fds = (0..table.len()).map(|n| dup(self.ram.file(n))).collect();
        self.tell(request::SET_MEM_TABLE, &words(&payload), fds);
    }

    /// Ends the connection, as a VMM that is killed does.
    pub(crate) fn hang_up(&self) {
        self.target.closed(self.id);
    }

    /// Connects again, with the same memory and rings, and starts all rings. The last connection
    /// was closed, or its process was killed.
    pub(crate) fn reconnect(&mut self, world: &World, controller: &str) {
        self.target = Arc::clone(&world.target);
        (self.wire, self.id) = connected(world, controller);
        self.negotiate();
        self.start_all();
    }

    pub(crate) fn send(&self, request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Verdict {
        let fds = fds.into_iter().map(ForeignFd::alone).collect();
        self.target.message(self.id, request, true, payload, fds)
    }

    #[track_caller]
    pub(crate) fn tell(&self, request: u32, payload: &[u8], fds: Vec<OwnedFd>) {
        let verdict = self.send(request, payload, fds);
        let done = matches!(verdict, Verdict::Done | Verdict::Pass | Verdict::Reply(_));
        assert!(done, "{request}: {verdict:?}");
    }

    /// The rings, with the positions at which they continue.
    fn rings(&self) -> Vec<(Arc<Ring>, u16)> {
        let mut rings = vec![
            (Arc::clone(self.control.ring()), self.control.base()),
            (Arc::clone(self.events.ring()), self.events.base()),
        ];
        rings.extend(self.queues.iter().map(|queue| (Arc::clone(queue.ring()), queue.base())));
        rings
    }

    pub(crate) fn start_all(&mut self) {
        if self.guest.tracked {
            self.set_area();
        }
        for n in 0..self.rings().len() {
            self.start_ring(n);
        }
    }

    /// Starts a ring.
    pub(crate) fn start_ring(&self, n: usize) {
        let (ring, base) = &self.rings()[n];
        self.start_ring_at(ring, *base);
    }

    fn start_ring_at(&self, ring: &Ring, base: u16) {
        let n = ring.index() as u64;
        let [desc, avail, used] = ring.user_addrs();
        self.tell(request::SET_VRING_NUM, &words(&[n | u64::from(ring.size()) << 32]), vec![]);
        self.tell(request::SET_VRING_BASE, &words(&[n | u64::from(base) << 32]), vec![]);
        self.tell(request::SET_VRING_ADDR, &words(&[n, desc, used, avail, 0]), vec![]);
        let call = dup(as_fd(&ring.call_fd()));
        self.tell(request::SET_VRING_CALL, &words(&[n]), vec![call]);
        let kick = dup(as_fd(ring.kick_fd()));
        self.tell(request::SET_VRING_KICK, &words(&[n]), vec![kick]);
    }

    /// Sends GET_VRING_BASE. If its reply is deferred, it is the next message in `wire`.
    pub(crate) fn stop_ring(&self, n: usize) -> Verdict {
        let verdict = self.send(request::GET_VRING_BASE, &words(&[n as u64]), vec![]);
        assert!(matches!(verdict, Verdict::Deferred | Verdict::Reply(_)), "{verdict:?}");
        verdict
    }

    /// Stops all rings, which drain.
    #[track_caller]
    pub(crate) fn stop_all(&self, world: &mut World) {
        for n in 0..self.rings().len() {
            lock(&self.wire.sent).clear();
            if let Verdict::Deferred = self.stop_ring(n) {
                world.until("a ring drains", || !lock(&self.wire.sent).is_empty());
            }
        }
    }

    /// Gets an in-flight area, or continues with the one that it has.
    fn set_area(&mut self) {
        if self.area.is_none() {
            let (queues, size) = (2 + self.guest.queues as u16, self.guest.size.max(16));
            let mut wanted = vec![0; 16];
            wanted.extend([queues, size].map(u16::to_le_bytes).concat());
            let verdict = self.send(request::GET_INFLIGHT_FD, &wanted, vec![]);
            let Verdict::ReplyWithFd(area, fd) = verdict else { panic!("{verdict:?}") };
            self.area = Some((area, fd.into()));
        }
        let (area, file) = self.area.as_ref().unwrap();
        self.tell(request::SET_INFLIGHT_FD, area, vec![dup(file)]);
    }

    /// Returns the in-flight area.
    pub(crate) fn area(&self) -> &File {
        &self.area.as_ref().unwrap().1
    }

    /// Returns whether a page was marked in the log.
    pub(crate) fn is_marked(&self, gpa: u64) -> bool {
        let (page, mut byte) = (gpa / PAGE, [0]);
        self.log.as_ref().unwrap().read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] >> (page % 8) & 1 == 1
    }

    pub(crate) fn clear_log(&self) {
        let zeroes = vec![0; (RAM_BYTES / PAGE / 8) as usize];
        self.log.as_ref().unwrap().write_all_at(&zeroes, 0).unwrap();
    }

    /// Begins to log the pages that the device writes.
    pub(crate) fn begin_log(&mut self) {
        let bytes = RAM_BYTES / PAGE / 8;
        let log = memfd(bytes);
        self.tell(request::SET_LOG_BASE, &words(&[bytes, 0]), vec![dup(&log)]);
        self.log = Some(log.into());
        self.switch_log(self.features | LOG_ALL);
    }

    pub(crate) fn end_log(&mut self) {
        self.switch_log(self.features);
        self.log = None;
    }

    /// The process with the log was killed.
    pub(crate) fn forget_log(&mut self) {
        self.log = None;
    }

    /// The target refuses a change that the reactors have not adopted in time. Stepped reactors
    /// that do not sleep adopt it in their next steps.
    fn switch_log(&self, features: u64) {
        let verdict = self.send(request::SET_FEATURES, &words(&[features]), vec![]);
        assert!(matches!(verdict, Verdict::Reject | Verdict::Pass), "{verdict:?}");
    }

    /// Returns a new tag.
    pub(crate) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag - 1
    }

    /// Allocates a buffer of zeroes.
    pub(crate) fn zeroed(&self, len: usize) -> Segment {
        self.ram.alloc(u32::try_from(len).unwrap(), 1).unwrap()
    }

    /// Allocates a buffer with these bytes.
    pub(crate) fn buffer(&self, bytes: &[u8]) -> Segment {
        let segment = self.zeroed(bytes.len());
        self.ram.write(segment.gpa, bytes).unwrap();
        segment
    }

    pub(crate) fn bytes(&self, segment: Segment) -> Vec<u8> {
        let mut bytes = vec![0; segment.len as usize];
        self.ram.read(segment.gpa, &mut bytes).unwrap();
        bytes
    }

    /// Submits a command to queue `queue`. Returns its tag.
    pub(crate) fn submit(&mut self, queue: usize, command: Command<'_>, layout: Layout) -> u64 {
        let tag = self.tag();
        let command = Command { tag, ..command };
        self.queues[queue].submit(&command, layout).unwrap();
        self.queues[queue].kick().unwrap();
        tag
    }

    /// Submits a write of one block. Returns its tag.
    pub(crate) fn write(&mut self, queue: usize, target: u8, lba: u32) -> u64 {
        let out = [self.buffer(&[7; 512])];
        let command = Command::new(lun(target, 0), 0, cdb::write(lba, 1)).with_data_out(&out);
        self.submit(queue, command, Layout::Separate)
    }

    /// Takes what the device has used. Each tag is answered once.
    pub(crate) fn take_all(&mut self) {
        for queue in &mut self.queues {
            while let Some(done) = queue.poll().unwrap() {
                assert_eq!(self.answered.insert(done.tag, done), None, "answered twice");
            }
        }
    }

    /// Returns the answer to a command, if there is one.
    pub(crate) fn answer(&mut self, tag: u64) -> Option<Done> {
        self.take_all();
        self.answered.remove(&tag)
    }

    /// Steps until a command is answered.
    #[track_caller]
    pub(crate) fn wait(&mut self, world: &mut World, tag: u64) -> Done {
        let mut done = None;
        world.until("the command is answered", || {
            done = self.answer(tag);
            done.is_some()
        });
        done.unwrap()
    }

    /// Submits a command to queue 0, and waits for its answer.
    #[track_caller]
    pub(crate) fn run(&mut self, world: &mut World, command: Command<'_>) -> Done {
        let tag = self.submit(0, command, Layout::Separate);
        self.wait(world, tag)
    }

    /// Runs a command to LUN 0 of a target.
    #[track_caller]
    pub(crate) fn command(
        &mut self,
        world: &mut World,
        target: u8,
        cdb: Cdb,
        data_out: &[u8],
        data_in: usize,
    ) -> (Response, Vec<u8>) {
        let out = self.buffer(data_out);
        let to = self.zeroed(data_in);
        let (out, to) = ([out], [to]);
        let command = Command::new(lun(target, 0), 0, cdb);
        let command = if data_out.is_empty() { command } else { command.with_data_out(&out) };
        let command = if data_in == 0 { command } else { command.with_data_in(&to) };
        let response = self.run(world, command).response;
        (response, self.bytes(to[0]))
    }

    /// Runs a command that must end with GOOD, after the unit attentions of a new nexus.
    #[track_caller]
    pub(crate) fn good(
        &mut self,
        world: &mut World,
        target: u8,
        cdb: Cdb,
        data_out: &[u8],
        data_in: usize,
    ) -> Vec<u8> {
        let (response, data) = self.command(world, target, cdb, data_out, data_in);
        assert!(response.is_good(), "{response:?}");
        data
    }

    /// Takes all unit attentions of a target. Returns their additional sense codes.
    #[track_caller]
    pub(crate) fn attentions(&mut self, world: &mut World, target: u8) -> Vec<(u8, u8)> {
        let mut attentions = vec![];
        loop {
            let ready = cdb::test_unit_ready();
            let (response, _) = self.command(world, target, ready, &[], 0);
            match response.sense() {
                Some((6, code, qualifier)) => attentions.push((code, qualifier)),
                _ => return attentions,
            }
        }
    }

    /// Submits a task management function.
    pub(crate) fn manage(&mut self, subtype: u32, lun: [u8; 8], tag: u64) {
        self.control.submit(&Tmf { subtype, lun, tag }).unwrap();
        self.control.kick().unwrap();
    }

    /// Steps until the next request of the control queue is answered.
    #[track_caller]
    pub(crate) fn managed(&mut self, world: &mut World) -> Answered {
        let mut answer = None;
        world.until("the function is answered", || {
            answer = self.control.poll().unwrap();
            answer.is_some()
        });
        answer.unwrap()
    }

    /// Returns the events that the guest has got.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.poll().unwrap()).collect()
    }
}

fn connected(world: &World, controller: &str) -> (Arc<Wire>, ConnId) {
    let wire = Arc::<Wire>::default();
    let id = world.target.connected(controller.as_ref(), Arc::clone(&wire) as _);
    (wire, id.expect("the controller accepts front ends"))
}

fn features(guest: &Guest) -> u64 {
    let optional = [(guest.packed, RING_PACKED), (guest.event_idx, EVENT_IDX)];
    let on = optional.iter().filter(|(on, _)| *on).fold(0, |bits, (_, bit)| bits | bit);
    (DRIVER_FEATURES & !(EVENT_IDX | PROTOCOL_FEATURES) | on) & !guest.without
}

/// A controller with one guest.
pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) scsi: Arc<Scsi>,
    pub(crate) vm: Vm,
}

impl Scene {
    /// Target 0 shows `bdev`. The guest has taken its unit attentions.
    pub(crate) fn new(bdev: Arc<dyn Bdev>, guest: Guest) -> Self {
        let mut scene = Self::empty(1, guest);
        scene.add(0, &bdev);
        scene.vm.attentions(&mut scene.world, 0);
        scene
    }

    /// As [`Scene::new`], with a test disk.
    pub(crate) fn of(blocks: u64, guest: Guest) -> (Self, Arc<TestDisk>) {
        let disk = TestDisk::create("disk", blocks);
        (Self::new(Arc::clone(&disk) as _, guest), disk)
    }

    /// A controller without targets.
    pub(crate) fn empty(reactors: usize, guest: Guest) -> Self {
        let mut world = World::new(reactors);
        let scsi = world.controller("c");
        let vm = Vm::started(&mut world, "c", guest);
        Self { world, scsi, vm }
    }

    /// Adds a target.
    pub(crate) fn add(&mut self, number: u8, bdev: &Arc<dyn Bdev>) {
        self.scsi.add_target(&self.world.target, Some(number), bdev).unwrap();
        self.world.settle();
    }

    pub(crate) fn run(&mut self, command: Command<'_>) -> Done {
        self.vm.run(&mut self.world, command)
    }

    pub(crate) fn wait(&mut self, tag: u64) -> Done {
        self.vm.wait(&mut self.world, tag)
    }

    pub(crate) fn command(
        &mut self,
        target: u8,
        cdb: Cdb,
        data_out: &[u8],
        data_in: usize,
    ) -> (Response, Vec<u8>) {
        self.vm.command(&mut self.world, target, cdb, data_out, data_in)
    }

    #[track_caller]
    pub(crate) fn good(
        &mut self,
        target: u8,
        cdb: Cdb,
        data_out: &[u8],
        data_in: usize,
    ) -> Vec<u8> {
        self.vm.good(&mut self.world, target, cdb, data_out, data_in)
    }
}
