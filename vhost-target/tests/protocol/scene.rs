//! A connection in a given state: a target with its own reactor, one controller, and a disk that
//! keeps its I/O in flight until the test lets it complete.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use bdev::{ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection, Malloc, MallocOptions};
use closer::ForeignFd;
use reactor::EventFd;
use vhost_blk::Blk;
use vhost_scsi::Scsi;
use vhost_target::SteppedReactor;
use vhost_target::device::Device;
use vhost_target::protocol::request;
use vhost_target::session::Phase;
use vhost_target::transport::SharedConnection;
use vhost_target::{ConnId, ControllerSpec, Core, Mode, Target, Verdict};

use crate::wire::{NoSockets, Wire};
use crate::{PACKED, words};
use guest_memory::testing::memfd;

/// The address of the guest's memory in the front end.
pub(crate) const USER: u64 = 0x7000_0000;
pub(crate) const RAM_BYTES: u64 = 0x1_0000;
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// A flag in a request's number in these tests: the front end waits for an acknowledgement.
pub(crate) const NEED_REPLY: u32 = 1 << 31;
const SIZE: u32 = 8;

/// Where the rings and the parts of a request are in the guest's memory.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;
/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// READ (10) of block 0.
const READ_ONE_BLOCK: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// The controller's device, which has one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    /// With the disk as its target 0.
    Scsi,
}

impl Kind {
    /// The first ring of requests, which front ends start.
    fn ring(self) -> u32 {
        match self {
            Self::Block => 0,
            Self::Scsi => 2,
        }
    }
}

/// The state of a connection when a message arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No message was sent.
    New,
    /// Features, memory, and the ring are set up.
    Ready,
    /// The ring was started, and an earlier connection has I/O in flight.
    Gated,
    /// The ring is live, and has I/O in flight.
    Live,
    /// The ring was stopped, and the reply is pending.
    Draining,
    /// The ring was stopped, and has drained.
    Suspended,
    /// The connection is closed, with I/O in flight.
    Closed,
}

pub(crate) const STATES: [State; 7] = [
    State::New,
    State::Ready,
    State::Gated,
    State::Live,
    State::Draining,
    State::Suspended,
    State::Closed,
];

impl State {
    pub(crate) fn phase(self) -> Phase {
        match self {
            Self::New | Self::Ready => Phase::Negotiating,
            Self::Gated => Phase::Starting,
            Self::Live => Phase::Running,
            Self::Draining => Phase::Quiescing,
            Self::Suspended => Phase::Suspended,
            Self::Closed => Phase::Closed,
        }
    }
}

pub(crate) struct World {
    kind: Kind,
    pub(crate) target: Arc<Target>,
    /// Reactors that the test steps.
    steps: RefCell<Vec<SteppedReactor>>,
    disk: Arc<ErrorDisk>,
    socket: PathBuf,
    /// The offered features.
    features: u64,
    /// Open fds of the process without any connection.
    fds: usize,
    /// Last, so that it is dropped last.
    _leaves_nothing: LeavesNothing,
}

/// When dropped, waits until there are no more fds and mappings than before: a target releases them
/// on its own threads, and one process runs several tests.
struct LeavesNothing {
    fds: usize,
    mappings: usize,
}

impl LeavesNothing {
    fn new() -> Self {
        Self { fds: fds(), mappings: mappings() }
    }
}

impl Drop for LeavesNothing {
    fn drop(&mut self) {
        if !thread::panicking() {
            until(|| mappings() <= self.mappings && fds() <= self.fds);
        }
    }
}

impl World {
    pub(crate) fn new(kind: Kind) -> Self {
        let before = LeavesNothing::new();
        let mode = Mode::Sleep { after_us: 0 };
        let target = Target::start(&[core()], mode, Arc::new(|| {})).unwrap();
        let world = Self::of(kind, target, vec![], before);
        // Creates what stays for the whole process: the closing thread, and what the disk keeps.
        world.front(State::Live).end();
        Self { fds: fds(), ..world }
    }

    /// Creates a scene with a block device, whose reactor the test steps.
    pub(crate) fn in_steps() -> Self {
        let before = LeavesNothing::new();
        let (target, steps) = Target::in_steps(1, Mode::Poll, Arc::new(|| {})).unwrap();
        Self::of(Kind::Block, target, steps, before)
    }

    /// Performs one poll iteration of that reactor.
    pub(crate) fn step(&self) {
        self.steps.borrow_mut()[0].step();
    }

    fn of(
        kind: Kind,
        target: Arc<Target>,
        steps: Vec<SteppedReactor>,
        before: LeavesNothing,
    ) -> Self {
        let options =
            MallocOptions { name: "m".into(), num_blocks: 64, block_size: 512, uuid: None };
        let base = Malloc::create(options).unwrap();
        let disk = ErrorDisk::create(ErrorOptions { name: "e".into(), base, uuid: None }).unwrap();
        let scsi = Scsi::new("c", &Arc::default());
        let device: Arc<dyn Device> = match kind {
            Kind::Block => Blk::new(Arc::clone(&disk) as _, false),
            Kind::Scsi => Arc::clone(&scsi) as _,
        };
        let features = device.features();
        let spec = ControllerSpec {
            name: "c".into(),
            socket: "/c".into(),
            device,
            cores: None,
            packed_ring: true,
        };
        target.create_controller(spec, &NoSockets).unwrap();
        if kind == Kind::Scsi {
            scsi.add_target(&target, Some(0), &(Arc::clone(&disk) as _)).unwrap();
        }
        Self {
            kind,
            target,
            steps: RefCell::new(steps),
            disk,
            socket: "/c".into(),
            features: features | PACKED,
            fds: 0,
            _leaves_nothing: before,
        }
    }

    /// Creates a front end whose connection is in `state`.
    pub(crate) fn front(&self, state: State) -> Front<'_> {
        let mut earlier = None;
        if state == State::Gated {
            let front = self.connect();
            front.set_up();
            front.start_with_io();
            self.target.closed(front.id);
            earlier = Some(front.ram);
        }
        let mut front = self.connect();
        front.earlier = earlier;
        if state == State::New {
            return front;
        }
        front.set_up();
        match state {
            State::New | State::Ready => {}
            State::Gated => front.start(),
            State::Live => front.start_with_io(),
            State::Draining | State::Suspended | State::Closed => {
                front.start_with_io();
                if state != State::Closed {
                    let verdict =
                        front.send(request::GET_VRING_BASE, words(&[front.ring(), 0]), vec![]);
                    assert!(matches!(verdict, Verdict::Deferred));
                }
                if state == State::Suspended {
                    self.disk.resume_pending();
                    until(|| {
                        self.target.process_events();
                        front.sent().len() == 1
                    });
                }
                if state == State::Closed {
                    self.target.closed(front.id);
                }
            }
        }
        assert_eq!(front.phase(), state.phase());
        front
    }

    fn connect(&self) -> Front<'_> {
        let wire = Arc::<Wire>::default();
        let id = self.target.connected(&self.socket, Arc::clone(&wire) as SharedConnection);
        let ram = memfd(RAM_BYTES);
        let offered = Cell::new(0);
        Front { world: self, id: id.unwrap(), wire, ram, offered, earlier: None }
    }
}

/// A front end.
pub(crate) struct Front<'w> {
    world: &'w World,
    id: ConnId,
    wire: Arc<Wire>,
    pub(crate) ram: OwnedFd,
    /// The number of chains that the ring has been offered.
    offered: Cell<u16>,
    earlier: Option<OwnedFd>,
}

impl Front<'_> {
    /// The number of the ring that it starts.
    pub(crate) fn ring(&self) -> u32 {
        self.world.kind.ring()
    }

    /// Returns SET_VRING_ADDR of that ring, moved by `by` bytes.
    pub(crate) fn addrs(&self, by: u64) -> Vec<u8> {
        let [desc, used, avail] = [0, USED, AVAIL].map(|at| USER + at + by);
        [words(&[self.ring(), 0]), [desc, used, avail, 0].map(u64::to_le_bytes).concat()].concat()
    }

    /// Returns all offered features except LOG_ALL and packed rings.
    pub(crate) fn features(&self) -> u64 {
        self.world.features & !LOG_ALL & !PACKED
    }

    pub(crate) fn send(&self, request: u32, payload: Vec<u8>, fds: Vec<OwnedFd>) -> Verdict {
        let fds = fds.into_iter().map(ForeignFd::alone).collect();
        let (request, need_reply) = (request & !NEED_REPLY, request & NEED_REPLY != 0);
        self.world.target.message(self.id, request, need_reply, &payload, fds)
    }

    #[track_caller]
    pub(crate) fn tell(&self, request: u32, payload: Vec<u8>, fds: Vec<OwnedFd>) {
        let verdict = self.send(request, payload, fds);
        assert!(matches!(verdict, Verdict::Done | Verdict::Pass), "{request}: {verdict:?}");
    }

    pub(crate) fn set_up(&self) {
        self.tell(request::SET_FEATURES, self.features().to_le_bytes().into(), vec![]);
        self.tell(request::SET_MEM_TABLE, table(&[0]), vec![dup(&self.ram)]);
        self.tell(request::SET_VRING_NUM, words(&[self.ring(), SIZE]), vec![]);
        self.tell(request::SET_VRING_BASE, words(&[self.ring(), 0]), vec![]);
        self.tell(request::SET_VRING_ADDR, self.addrs(0), vec![]);
    }

    pub(crate) fn start(&self) {
        self.start_with(eventfd());
    }

    fn start_with(&self, kick: OwnedFd) {
        self.tell(request::SET_VRING_KICK, u64::from(self.ring()).to_le_bytes().into(), vec![kick]);
    }

    /// Starts the ring, and offers a read in it, which the disk keeps in flight.
    fn start_with_io(&self) {
        let kick = EventFd::new().unwrap();
        self.start_with(kick.as_fd().try_clone_to_owned().unwrap());
        if self.world.kind == Kind::Scsi {
            self.take_unit_attentions(&kick);
        }
        self.offer_io();
        kick.signal();
        self.wait_for_io(1);
    }

    /// Sends TEST UNIT READY until the disk has reported all unit attentions.
    fn take_unit_attentions(&self, kick: &EventFd) {
        let ram = File::from(dup(&self.ram));
        let mut status = [0xff];
        while status != [0] {
            write_scsi_request(&ram, &[0; 6]);
            self.offer(&[(HEADER, 51, NEXT), (STATUS, 108, WRITE)]);
            kick.signal();
            let mut used = [0; 2];
            until(|| {
                ram.read_exact_at(&mut used, USED + 2).unwrap();
                u16::from_le_bytes(used) == self.offered.get()
            });
            ram.read_exact_at(&mut status, STATUS + 10).unwrap();
        }
    }

    /// Makes a chain of buffers, with addresses, lengths and flags, available.
    fn offer(&self, chain: &[(u64, u32, u16)]) {
        let ram = File::from(dup(&self.ram));
        for (n, (addr, len, flags)) in chain.iter().enumerate() {
            let next = u16::try_from(n + 1).unwrap();
            let desc = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes()].concat();
            let desc = [&desc[..], &next.to_le_bytes()].concat();
            ram.write_all_at(&desc, 16 * n as u64).unwrap();
        }
        self.offered.set(self.offered.get() + 1);
        // Available ring: flags and index. All heads are 0.
        ram.write_all_at(&self.offered.get().to_le_bytes(), AVAIL + 2).unwrap();
    }

    /// Offers a read in the ring. The disk keeps it in flight.
    pub(crate) fn offer_io(&self) {
        let rule = Injection {
            op: InjectedOp::Read,
            error: InjectedError::Pending,
            count: 1,
            queue_depth: 0,
        };
        self.world.disk.inject(rule).unwrap();
        match self.world.kind {
            Kind::Block => {
                self.offer(&[(HEADER, 16, NEXT), (DATA, 512, NEXT | WRITE), (STATUS, 1, WRITE)]);
            }
            Kind::Scsi => {
                write_scsi_request(&File::from(dup(&self.ram)), &READ_ONE_BLOCK);
                self.offer(&[(HEADER, 51, NEXT), (STATUS, 108, NEXT | WRITE), (DATA, 512, WRITE)]);
            }
        }
    }

    /// Waits until the disk has `count` I/Os in flight.
    pub(crate) fn wait_for_io(&self, count: u64) {
        until(|| {
            let controllers = self.world.target.controllers();
            controllers[0].sessions.iter().any(|s| s.phase == Phase::Running && s.inflight == count)
        });
    }

    pub(crate) fn phase(&self) -> Phase {
        let controllers = self.world.target.controllers();
        controllers[0]
            .sessions
            .last()
            .expect("the session is connected, or has I/O in flight")
            .phase
    }

    /// Returns the messages that the target has sent on its own since the last call.
    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire.sent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets all I/O complete, and waits for the pending reply.
    pub(crate) fn answer(&self) -> Vec<u8> {
        self.world.disk.resume_pending();
        let mut sent = vec![];
        until(|| {
            self.world.target.process_events();
            sent.extend(self.sent());
            !sent.is_empty()
        });
        assert_eq!(sent.len(), 1);
        sent.remove(0)
    }

    /// Closes the connection. Another one is still open.
    pub(crate) fn leave(self) {
        self.world.target.closed(self.id);
    }

    /// Closes all connections, and waits until all resources are released.
    pub(crate) fn end(self) {
        let Self { world, id, wire, ram, offered: _, earlier } = self;
        world.target.closed(id);
        drop((wire, ram, earlier));
        until(|| {
            world.disk.resume_pending();
            world.target.process_events();
            world.target.connections() == 0
        });
        // The thread that closes front ends' fds closes them in order.
        let (mut reader, writer) = io::pipe().unwrap();
        drop(ForeignFd::alone(writer.into()));
        reader.read_exact(&mut [0]).expect_err("closed");
        drop(reader);
        until(|| mappings() == 0 && (world.fds == 0 || fds() <= world.fds));
    }
}

/// Waits for a condition that other threads make true.
pub(crate) fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        thread::sleep(Duration::from_micros(50));
    }
}

pub(crate) fn fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns the number of mappings of memory files.
pub(crate) fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

/// Returns the first core that this process may use.
fn core() -> Core {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let first = line.trim().split(['-', ',']).next().unwrap();
    Core(first.parse().unwrap())
}

pub(crate) fn eventfd() -> OwnedFd {
    EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

pub(crate) fn dup(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

/// Returns a region of the size of all memory at `gpa`: address, size, user address, offset.
pub(crate) fn region(gpa: u64) -> Vec<u8> {
    [gpa, RAM_BYTES, USER + gpa, 0].map(u64::to_le_bytes).concat()
}

/// Returns a memory table of such regions.
pub(crate) fn table(gpas: &[u64]) -> Vec<u8> {
    let mut payload = words(&[gpas.len().try_into().unwrap(), 0]);
    gpas.iter().for_each(|gpa| payload.extend(region(*gpa)));
    payload
}

/// Writes the header of a command for target 0: LUN, tag, attributes, CDB.
fn write_scsi_request(ram: &File, cdb: &[u8]) {
    let mut header = [0; 51];
    header[..4].copy_from_slice(&[1, 0, 0x40, 0]);
    header[19..19 + cdb.len()].copy_from_slice(cdb);
    ram.write_all_at(&header, HEADER).unwrap();
}
