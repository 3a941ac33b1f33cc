//! Moves of queues, wake-ups of reactors, and waits for leases, with stepped reactors.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use bdev::{
    Bdev, Channel, ErrorDisk, ErrorOptions, Features, Granted, InjectedError, InjectedOp,
    Injection, Lease, Malloc, MallocOptions, Qos, Stats,
};
use closer::ForeignFd;

use guest_memory::testing::memfd;
use reactor::EventFd;
use vhost_blk::Blk;
use vhost_target::protocol::request;
use vhost_target::{
    ConnId, Connection, ControllerSpec, Core, Mode, Offer, SteppedReactor, Target, Transport,
    Verdict,
};

const NAME: &str = "c";
const RAM_BYTES: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000;

/// A transport without sockets, and a front end that never hangs up and counts the messages that it
/// gets.
#[derive(Debug, Default)]
struct Nobody(Mutex<usize>);

impl Transport for Nobody {
    fn listen(&self, _: &Path, _: Offer, _: &closer::Account) -> io::Result<()> {
        Ok(())
    }
    fn unlisten(&self, _: &Path) {}
}

impl Connection for Nobody {
    fn vid(&self) -> i32 {
        0
    }
    fn send(&self, _: &[u8]) -> io::Result<()> {
        *self.0.lock().unwrap() += 1;
        Ok(())
    }
    fn shut_down(&self) {}
}

/// A lease that the test grants: its users, whether it is held, and the callbacks that wait for it.
#[derive(Clone, Default)]
struct TestLease(Arc<Mutex<(usize, bool, Vec<Granted>)>>);

impl TestLease {
    fn users(&self) -> usize {
        self.0.lock().unwrap().0
    }

    fn grant(&self) {
        let granted = {
            let mut state = self.0.lock().unwrap();
            state.1 = true;
            std::mem::take(&mut state.2)
        };
        granted.iter().for_each(|granted| granted());
    }
}

impl std::fmt::Debug for TestLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestLease").finish_non_exhaustive()
    }
}

impl Lease for TestLease {
    fn add_user(&self, granted: &Granted) -> bool {
        let mut state = self.0.lock().unwrap();
        state.0 += 1;
        state.2.push(Arc::clone(granted));
        state.1
    }
    fn remove_user(&self) {
        self.0.lock().unwrap().0 -= 1;
    }
    fn is_held(&self) -> bool {
        self.0.lock().unwrap().1
    }
}

/// A malloc disk with a lease.
struct Leased(Arc<Malloc>, TestLease);

impl Bdev for Leased {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn product_name(&self) -> &'static str {
        self.0.product_name()
    }
    fn uuid(&self) -> uuid::Uuid {
        self.0.uuid()
    }
    fn block_size(&self) -> u32 {
        self.0.block_size()
    }
    fn num_blocks(&self) -> u64 {
        self.0.num_blocks()
    }
    fn features(&self) -> Features {
        self.0.features()
    }
    fn lease(&self) -> Option<Arc<dyn Lease>> {
        Some(Arc::new(self.1.clone()))
    }
    fn stats(&self) -> &Stats {
        self.0.stats()
    }

    fn qos(&self) -> &Qos {
        self.0.qos()
    }
    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        Arc::clone(&self.0).open(depth)
    }
}

/// Two reactors, and a controller whose ring 0 is on the first reactor.
struct Scene {
    target: Arc<Target>,
    steps: Vec<SteppedReactor>,
    disk: Arc<ErrorDisk>,
    conn: ConnId,
    front_end: Arc<Nobody>,
    ram: File,
    offered: u16,
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Scene {
    fn new(mode: Mode) -> Self {
        Self::of(mode, None, false)
    }

    fn of(mode: Mode, lease: Option<&TestLease>, read_only: bool) -> Self {
        let (target, steps) = Target::in_steps(2, mode, Arc::new(|| {})).unwrap();
        let options =
            MallocOptions { name: "m".into(), num_blocks: 64, block_size: 512, uuid: None };
        let base = Malloc::create(options).unwrap();
        let base = match lease {
            Some(lease) => Arc::new(Leased(base, lease.clone())) as Arc<dyn Bdev>,
            None => base,
        };
        let disk = ErrorDisk::create(ErrorOptions { name: "e".into(), base, uuid: None }).unwrap();
        let spec = ControllerSpec {
            name: NAME.into(),
            socket: "/c".into(),
            device: Blk::new(Arc::clone(&disk) as _, read_only),
            cores: None,
            packed_ring: false,
        };
        target.create_controller(spec, &Nobody::default()).unwrap();
        let front_end = Arc::new(Nobody::default());
        let conn = target.connected("/c".as_ref(), Arc::clone(&front_end) as _).unwrap();
        let ram = memfd(RAM_BYTES);
        let file = ram.try_clone().unwrap().into();
        let scene = Self { target, steps, disk, conn, front_end, ram: file, offered: 0 };
        scene.set_up(ram);
        scene
    }

    fn set_up(&self, ram: OwnedFd) {
        // Header, data, status of a read.
        for (n, (addr, len, flags)) in
            [(0x4000_u64, 16_u64, 1_u64), (0x5000, 512, 3), (0x6000, 1, 2)].into_iter().enumerate()
        {
            let rest = len | flags << 32 | (n as u64 + 1) << 48;
            self.ram.write_all_at(&words(&[addr, rest]), 16 * n as u64).unwrap();
        }
        self.say(request::SET_FEATURES, &[1 << 32], None);
        self.say(request::SET_MEM_TABLE, &[1, 0, RAM_BYTES, USER, 0], Some(ram));
        self.say(request::SET_VRING_NUM, &[8 << 32], None);
        let addrs = [0, USER, USER + 0x2000, USER + 0x1000, 0];
        self.say(request::SET_VRING_ADDR, &addrs, None);
        let kick = EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap();
        self.say(request::SET_VRING_KICK, &[0], Some(kick));
    }

    /// Sends a message whose reply is deferred.
    fn send_deferred(&self, message: u32, payload: &[u64]) {
        let verdict = self.target.message(self.conn, message, true, &words(payload), vec![]);
        assert!(matches!(verdict, Verdict::Deferred), "{message}: {verdict:?}");
    }

    /// Returns the number of deferred replies.
    fn answers(&self) -> usize {
        *self.front_end.0.lock().unwrap()
    }

    fn step(&mut self) {
        self.steps.iter_mut().for_each(|reactor| _ = reactor.step());
        self.target.process_events();
    }

    fn say(&self, message: u32, payload: &[u64], fd: Option<OwnedFd>) {
        let fds = fd.into_iter().map(ForeignFd::alone).collect();
        let verdict = self.target.message(self.conn, message, false, &words(payload), fds);
        assert!(matches!(verdict, Verdict::Done | Verdict::Pass), "{message}: {verdict:?}");
    }

    /// Offers a read.
    fn offer(&mut self) {
        self.offered += 1;
        self.ram.write_all_at(&self.offered.to_le_bytes(), 0x1002).unwrap();
    }

    /// Offers a read that the disk keeps in flight.
    fn offer_io(&mut self) {
        let (op, error) = (InjectedOp::Read, InjectedError::Pending);
        self.disk.inject(Injection { op, error, count: 1, queue_depth: 0 }).unwrap();
        self.offer();
    }

    /// The number of answered requests.
    fn answered(&self) -> u16 {
        let mut used = [0; 2];
        self.ram.read_exact_at(&mut used, 0x2002).unwrap();
        u16::from_le_bytes(used)
    }

    fn inflight(&self) -> u64 {
        self.target.controllers()[0].sessions[0].inflight
    }

    /// Returns the reactors with orphan I/O of the ring.
    fn orphans(&self) -> Vec<usize> {
        self.target.reactors_with_orphans()
    }

    /// Returns whether a reactor was woken since the last call.
    fn was_woken(&self, reactor: usize) -> bool {
        let waker = self.steps[reactor].waker().expect("the reactor may sleep");
        waker.wait(Some(Instant::now()))
    }
}

#[test]
fn a_queue_is_moved_after_a_poll_iteration_of_its_reactor() {
    let mut scene = Scene::new(Mode::Poll);
    scene.steps.iter_mut().for_each(|reactor| _ = reactor.step());
    let moving = scene.target.begin_move(NAME, None, 0, Core(1)).unwrap().unwrap();
    assert!(scene.target.end_move(&moving).is_none(), "the reactor may be in a visit");
    scene.steps[1].step();
    assert!(
        scene.target.end_move(&moving).is_none(),
        "a poll iteration of the other reactor does not count"
    );
    scene.offer();
    scene.steps[0].step();
    assert_eq!(scene.answered(), 0, "the previous reactor does not have the queue any more");
    assert!(scene.target.end_move(&moving).unwrap().is_ok());
    scene.steps[0].step();
    assert_eq!(scene.answered(), 0);
    scene.steps[1].step();
    assert_eq!(scene.answered(), 1);
    let shown = scene.target.controllers();
    assert_eq!(shown[0].sessions[0].queues[0].core, Core(1));
}

#[test]
fn the_previous_reactor_polls_orphan_io() {
    let mut scene = Scene::new(Mode::Poll);
    scene.offer_io();
    scene.steps.iter_mut().for_each(|reactor| _ = reactor.step());
    assert_eq!(scene.inflight(), 1);
    let moving = scene.target.begin_move(NAME, None, 0, Core(1)).unwrap().unwrap();
    scene.steps[0].step();
    assert!(scene.target.end_move(&moving).unwrap().is_ok());
    for _ in 0..3 {
        assert_eq!(scene.orphans(), [0]);
        assert!(scene.steps[0].has_orphans() && !scene.steps[1].has_orphans());
        scene.steps.iter_mut().for_each(|reactor| _ = reactor.step());
        scene.target.tick();
    }
    scene.disk.resume_pending();
    scene.steps[1].step();
    assert_eq!((scene.inflight(), scene.answered()), (0, 1));
    // Until the reclaim thread has freed the view that the I/O was submitted under.
    while !scene.orphans().is_empty() {
        thread::yield_now();
        scene.steps.iter_mut().for_each(|reactor| _ = reactor.step());
        scene.target.tick();
    }
    assert!(!scene.steps[0].has_orphans());
}

#[test]
fn a_queue_without_io_in_flight_leaves_no_orphan_io() {
    let mut scene = Scene::new(Mode::Poll);
    scene.steps.iter_mut().for_each(|reactor| _ = reactor.step());
    let moving = scene.target.begin_move(NAME, None, 0, Core(1)).unwrap().unwrap();
    scene.steps[0].step();
    assert!(scene.target.end_move(&moving).unwrap().is_ok());
    assert!(scene.orphans().is_empty());
    assert!(!scene.steps[0].has_orphans());
}

#[test]
fn a_change_of_coalescing_wakes_reactors() {
    let mut scene = Scene::new(Mode::Sleep { after_us: 0 });
    // Until earlier wake-ups are consumed.
    for reactor in &mut scene.steps {
        while !(reactor.step() && reactor.step()) {}
    }
    let woken = |scene: &Scene| [0, 1].map(|reactor| scene.was_woken(reactor));
    assert_eq!(woken(&scene), [false; 2]);
    scene.target.set_coalescing(NAME, 1000, 1000).unwrap();
    assert_eq!(woken(&scene), [true; 2]);
    assert!(scene.target.set_coalescing(NAME, 1000, 1).is_err());
    assert_eq!(woken(&scene), [false; 2], "nothing has changed");
}

#[test]
fn rings_wait_for_the_lease_of_the_base_bdev_and_release_it() {
    let lease = TestLease::default();
    let mut scene = Scene::of(Mode::Poll, Some(&lease), false);
    scene.offer();
    scene.step();
    assert_eq!((lease.users(), scene.answered()), (1, 0));
    lease.grant();
    scene.step();
    assert_eq!(scene.answered(), 1);
    // The lease has a user until the I/O has ended.
    scene.offer_io();
    scene.step();
    scene.send_deferred(request::GET_VRING_BASE, &[0]);
    scene.step();
    assert_eq!((lease.users(), scene.answers()), (1, 0));
    scene.disk.resume_pending();
    scene.step();
    assert_eq!((lease.users(), scene.answers()), (0, 1));
}

#[test]
fn a_ring_is_stopped_when_the_previous_process_has_ended_its_io() {
    let lease = TestLease::default();
    let mut scene = Scene::of(Mode::Poll, Some(&lease), false);
    scene.send_deferred(request::GET_VRING_BASE, &[0]);
    scene.step();
    assert_eq!((lease.users(), scene.answers()), (1, 0));
    lease.grant();
    scene.step();
    assert_eq!((lease.users(), scene.answers()), (0, 1));
}

#[test]
fn a_reset_ends_when_the_previous_process_has_ended_its_io() {
    let lease = TestLease::default();
    let mut scene = Scene::of(Mode::Poll, Some(&lease), false);
    scene.send_deferred(request::RESET_DEVICE, &[]);
    scene.step();
    assert_eq!(
        (lease.users(), scene.answers()),
        (1, 0),
        "its ring does not wait any more, the reset does"
    );
    lease.grant();
    assert_eq!((lease.users(), scene.answers()), (0, 1));
}

#[test]
fn a_closed_connection_does_not_wait_for_the_lease() {
    let lease = TestLease::default();
    let scene = Scene::of(Mode::Poll, Some(&lease), false);
    scene.send_deferred(request::RESET_DEVICE, &[]);
    scene.target.closed(scene.conn);
    assert_eq!((lease.users(), scene.target.connections()), (0, 0));
    lease.grant();
}

#[test]
fn a_read_only_guest_needs_no_lease() {
    let lease = TestLease::default();
    let mut scene = Scene::of(Mode::Poll, Some(&lease), true);
    scene.offer();
    scene.step();
    assert_eq!((lease.users(), scene.answered()), (0, 1));
}
