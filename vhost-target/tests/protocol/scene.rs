//! A connection in a given state: a target with its own reactor, one controller, and a disk that
//! keeps its I/O in flight until the test lets it complete.

use std::cell::RefCell;
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

/// The state of a connection when a message arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No message was sent.
    New,
    /// Features, memory, and ring 0 are set up.
    Ready,
    /// Ring 0 was started, and an earlier connection has I/O in flight.
    Gated,
    /// Ring 0 is live, and has I/O in flight.
    Live,
    /// Ring 0 was stopped, and the reply is pending.
    Draining,
    /// Ring 0 was stopped, and has drained.
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
    pub(crate) fn new() -> Self {
        let before = LeavesNothing::new();
        let mode = Mode::Sleep { after_us: 0 };
        let target = Target::start(&[core()], mode, Arc::new(|| {})).unwrap();
        let world = Self::of(target, vec![], before);
        // Creates what stays for the whole process: the closing thread, and what the disk keeps.
        world.front(State::Live).end();
        Self { fds: fds(), ..world }
    }

    /// Creates a scene whose reactor the test steps.
    pub(crate) fn in_steps() -> Self {
        let before = LeavesNothing::new();
        let (target, steps) = Target::in_steps(1, Mode::Poll, Arc::new(|| {})).unwrap();
        Self::of(target, steps, before)
    }

    /// Performs one poll iteration of that reactor.
    pub(crate) fn step(&self) {
        self.steps.borrow_mut()[0].step();
    }

    fn of(target: Arc<Target>, steps: Vec<SteppedReactor>, before: LeavesNothing) -> Self {
        let options =
            MallocOptions { name: "m".into(), num_blocks: 64, block_size: 512, uuid: None };
        let base = Malloc::create(options).unwrap();
        let disk = ErrorDisk::create(ErrorOptions { name: "e".into(), base, uuid: None }).unwrap();
        let device = Blk::new(Arc::clone(&disk) as _, false);
        let features = device.features();
        let spec = ControllerSpec {
            name: "c".into(),
            socket: "/c".into(),
            device,
            cores: None,
            packed_ring: true,
        };
        target.create_controller(spec, &NoSockets).unwrap();
        Self {
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
            let mut front = self.connect();
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
                    let verdict = front.send(request::GET_VRING_BASE, words(&[0, 0]), vec![]);
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
        Front { world: self, id: id.unwrap(), wire, ram, earlier: None }
    }
}

/// A front end.
pub(crate) struct Front<'w> {
    world: &'w World,
    id: ConnId,
    wire: Arc<Wire>,
    pub(crate) ram: OwnedFd,
    earlier: Option<OwnedFd>,
}

impl Front<'_> {
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
        self.tell(request::SET_VRING_NUM, words(&[0, SIZE]), vec![]);
        self.tell(request::SET_VRING_BASE, words(&[0, 0]), vec![]);
        self.tell(request::SET_VRING_ADDR, addrs(0), vec![]);
    }

    pub(crate) fn start(&self) {
        self.tell(request::SET_VRING_KICK, vec![0; 8], vec![eventfd()]);
    }

    /// Starts ring 0 with a read in it, which the disk keeps in flight.
    fn start_with_io(&mut self) {
        self.offer_io(1);
        self.start();
        self.wait_for_io(1);
    }

    /// Offers the `nth` read in ring 0, counted from 1. The disk keeps it in flight.
    pub(crate) fn offer_io(&self, nth: u16) {
        let rule = Injection {
            op: InjectedOp::Read,
            error: InjectedError::Pending,
            count: 1,
            queue_depth: 0,
        };
        self.world.disk.inject(rule).unwrap();
        let ram = File::from(dup(&self.ram));
        // Header, data, status.
        for (n, (addr, len, flags)) in
            [(0x4000_u64, 16_u32, 1_u16), (0x5000, 512, 3), (0x6000, 1, 2)].into_iter().enumerate()
        {
            let next = u16::try_from(n + 1).unwrap();
            let desc = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes()].concat();
            let desc = [&desc[..], &next.to_le_bytes()].concat();
            ram.write_all_at(&desc, 16 * n as u64).unwrap();
        }
        // Available ring: flags and index. All heads are 0.
        ram.write_all_at(&nth.to_le_bytes(), 0x1002).unwrap();
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
        let Self { world, id, wire, ram, earlier } = self;
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

/// Returns SET_VRING_ADDR of ring 0, moved by `by` bytes.
pub(crate) fn addrs(by: u64) -> Vec<u8> {
    let [desc, used, avail] = [0, 0x2000, 0x1000].map(|at| USER + at + by);
    [words(&[0, 0]), [desc, used, avail, 0].map(u64::to_le_bytes).concat()].concat()
}
