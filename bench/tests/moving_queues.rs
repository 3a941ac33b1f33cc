//! Queues on real reactors that move from one to the other under load, and flushes across queues.
//!
//! In the place of a transport there is a front end that calls the target. Asserts counts and
//! contents: no request is lost, none is done twice, no completion goes untold.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(unsafe_code, reason = "accesses guest memory by address")]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bdev::{
    Bdev, Channel, Completion, Features, FileDisk, FileOptions, Flavour, Io, Malloc, MallocOptions,
    Op, Qos, Stats, Status, Submit,
};
use bench::{Load, LoadOptions};
use closer::{Account, ForeignFd};
use front_end::{GuestRam, Queue, QueueOptions, Request, STATUS_OK, event};
use vhost_blk::Blk;
use vhost_target::protocol::request;
use vhost_target::{
    ConnId, Connection, ControllerSpec, Core, Error, Mode, Offer, Target, Transport, Verdict,
};

const NAME: &str = "vhost.0";
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const CORES: [Core; 2] = [Core(0), Core(1)];
const DISK_BYTES: u64 = 8 << 20;

/// A front end that is always there, on a socket that is none.
#[derive(Debug)]
struct Nobody;

impl Transport for Nobody {
    fn listen(&self, _: &Path, _: Offer, _: &Account) -> io::Result<()> {
        Ok(())
    }
    fn unlisten(&self, _: &Path) {}
}

impl Connection for Nobody {
    fn vid(&self) -> i32 {
        0
    }
    fn send(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn shut_down(&self) {}
}

/// A target with two reactors, a controller, and a guest with `queues` queues on it.
struct Scene {
    target: Arc<Target>,
    conn: ConnId,
    queues: Vec<Queue>,
}

impl Scene {
    fn new(mode: Mode, bdev: Arc<dyn Bdev>, queues: usize) -> Self {
        let cores = thread::available_parallelism().unwrap().get();
        assert!(cores >= CORES.len(), "it takes two cores: with one it would show nothing");
        let target = Target::start(&CORES, mode, Arc::new(|| {})).unwrap();
        let spec = ControllerSpec {
            name: NAME.into(),
            socket: Path::new("/nowhere").into(),
            device: Blk::new(bdev, false),
            cores: None,
            packed_ring: false,
        };
        target.create_controller(spec, &Nobody).unwrap();
        let conn = target.connected(Path::new("/nowhere"), Arc::new(Nobody)).unwrap();
        let ram = GuestRam::new(&[16 << 20]).unwrap();
        let queue = |n| Queue::new(&ram, n, QueueOptions::default(), true).unwrap();
        let scene = Self { target, conn, queues: (0..queues).map(queue).collect() };
        scene.set_up(&ram);
        // The disk is opened for each queue on another thread.
        while scene.target.controllers()[0].sessions[0].queues.len() < queues {
            thread::yield_now();
        }
        scene
    }

    fn say(&self, message: u32, words: &[u64], fd: Option<BorrowedFd<'_>>) {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let fds = fd.map(|fd| ForeignFd::alone(fd.try_clone_to_owned().unwrap()));
        let verdict = self.target.message(self.conn, message, false, &payload, Vec::from_iter(fds));
        assert!(!matches!(verdict, Verdict::Reject), "message {message}");
    }

    fn set_up(&self, ram: &GuestRam) {
        self.say(request::SET_FEATURES, &[VERSION_1 | EVENT_IDX], None);
        let line = ram.table()[0];
        let table = [1, line.guest_phys_addr, line.memory_size, line.userspace_addr, 0];
        self.say(request::SET_MEM_TABLE, &table, Some(ram.file(0).as_fd()));
        for (n, queue) in (0..).zip(&self.queues) {
            let ring = queue.ring();
            let [desc, avail, used] = ring.user_addrs();
            self.say(request::SET_VRING_NUM, &[n | u64::from(ring.size()) << 32], None);
            self.say(request::SET_VRING_ADDR, &[n, desc, used, avail, 0], None);
            self.say(request::SET_VRING_CALL, &[n], Some(event::as_fd(&ring.call_fd())));
            self.say(request::SET_VRING_KICK, &[n], Some(event::as_fd(ring.kick_fd())));
        }
    }

    fn place(&self, queue: usize) -> Core {
        self.target.controllers()[0].sessions[0].queues[queue].core
    }

    /// Moves a queue to the other core.
    fn switch(&self, queue: usize) {
        let to = CORES[usize::from(self.place(queue) == CORES[0])];
        self.target.move_queue(NAME, None, queue, to).unwrap();
        assert_eq!(self.place(queue), to);
    }

    fn end(self) {
        self.target.closed(self.conn);
        while self.target.connections() > 0 {
            self.target.process_events();
            thread::yield_now();
        }
        self.target.begin_delete(NAME, false).unwrap().finish(&Nobody);
        self.target.stop_reactors();
    }
}

fn malloc() -> Arc<Malloc> {
    let num_blocks = DISK_BYTES / 512;
    let options = MallocOptions { name: "m".into(), num_blocks, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

/// Moves two queues to and fro `moves` times while a load that checks all that it reads is on them.
fn moves_under_load(mode: Mode, bdev: Arc<dyn Bdev>, moves: usize) {
    let mut scene = Scene::new(mode, bdev, 2);
    let options = LoadOptions { depth: 16, ..LoadOptions::default() };
    let load = Load::start(std::mem::take(&mut scene.queues), options).unwrap();
    for n in 0..moves {
        scene.switch(n % 2);
        if n % 16 == 0 {
            load.wait_for(100).unwrap();
        }
    }
    // Neither queue is on its first reactor: the wake sources of that reactor do not apply here.
    (0..2).for_each(|queue| scene.switch(queue));
    load.wait_for(1000).unwrap();
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    let session = &scene.target.controllers()[0].sessions[0];
    assert_eq!((session.requests, session.inflight), (summary.completed, 0));
    scene.end();
}

#[test]
fn a_queue_of_a_memory_disk_moves_between_polling_reactors() {
    moves_under_load(Mode::Poll, malloc(), 1000);
}

#[test]
fn a_queue_of_a_memory_disk_moves_between_sleeping_reactors() {
    moves_under_load(Mode::Sleep { after_us: 0 }, malloc(), 4000);
}

fn file_disk(dir: &Path) -> Arc<FileDisk> {
    let filename = dir.join("disk");
    File::create(&filename).unwrap().set_len(DISK_BYTES).unwrap();
    let options = FileOptions {
        name: "f".into(),
        filename,
        block_size: Some(512),
        readonly: false,
        fallocate: false,
        uuid: None,
        flavour: Flavour::Uring,
        engine: None,
    };
    let disk = FileDisk::create(options).unwrap();
    // Without a lease, which another thread takes, a ring is attached when the front end starts it.
    disk.share();
    disk
}

#[test]
fn io_in_flight_in_a_file_moves_along_between_polling_reactors() {
    let dir = tempfile::tempdir().unwrap();
    moves_under_load(Mode::Poll, file_disk(dir.path()), 1000);
}

#[test]
fn io_in_flight_in_a_file_moves_along_between_sleeping_reactors() {
    let dir = tempfile::tempdir().unwrap();
    moves_under_load(Mode::Sleep { after_us: 0 }, file_disk(dir.path()), 4000);
}

#[test]
fn io_in_flight_in_a_file_moves_along_between_reactors_that_poll_first() {
    let dir = tempfile::tempdir().unwrap();
    moves_under_load(Mode::Sleep { after_us: 20 }, file_disk(dir.path()), 2000);
}

/// A controller's queues follow its cpumask, the new ones too.
#[test]
fn a_cpumask_moves_all_queues_of_a_controller() {
    let scene = Scene::new(Mode::Sleep { after_us: 0 }, malloc(), 5);
    let places = || (0..5).map(|queue| scene.place(queue)).collect::<Vec<_>>();
    let on = |core| places().into_iter().filter(|place| *place == core).count();
    assert_eq!((on(CORES[0]), on(CORES[1])), (3, 2));
    scene.target.set_cores(NAME, &[CORES[1]]).unwrap();
    assert_eq!(on(CORES[1]), 5);
    let refused = scene.target.move_queue(NAME, None, 0, CORES[0]);
    assert!(matches!(refused, Err(Error::Cpumask)), "the mask keeps it: {refused:?}");
    scene.target.set_cores(NAME, &CORES).unwrap();
    assert_eq!((on(CORES[0]), on(CORES[1])), (2, 3));
    scene.end();
}

/// A disk with a cache that a flush empties. Each I/O takes a few polls, and a flush takes with it
/// what was in the cache when it began.
#[derive(Default)]
struct Cached {
    stats: Stats,
    qos: Qos,
    cached: Mutex<Vec<u64>>,
    stable: Mutex<HashSet<u64>>,
}

struct CachedChannel {
    disk: Arc<Cached>,
    flying: Vec<Flying>,
}

struct Flying {
    io: Io,
    polls_left: u32,
    /// Of a flush.
    takes: Vec<u64>,
}

const POLLS: u32 = 4;

impl Bdev for Cached {
    fn name(&self) -> &str {
        "cached"
    }
    fn product_name(&self) -> &'static str {
        "Cached disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn num_blocks(&self) -> u64 {
        DISK_BYTES / 512
    }
    fn features(&self) -> Features {
        Features { flush: true, ..Features::default() }
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, _: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        Ok(Box::new(CachedChannel { disk: self, flying: vec![] }))
    }
}

impl Channel for CachedChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let takes = if io.op == Op::Flush { lock(&self.disk.cached).clone() } else { vec![] };
        self.flying.push(Flying { io, polls_left: POLLS, takes });
        Submit::Queued
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let Some(flying) = self.flying.first_mut() else { return 0 };
        flying.polls_left -= 1;
        if flying.polls_left > 0 {
            return 0;
        }
        let Flying { io, takes, .. } = self.flying.remove(0);
        if io.op == Op::Write {
            lock(&self.disk.cached).push(io.offset);
        }
        lock(&self.disk.stable).extend(takes);
        done[0] = Completion { tag: io.tag, status: Status::Ok };
        1
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A flush on one queue covers the writes that had completed on another one, on another reactor
/// (virtio 1.2, 5.2.6.2), wherever the two are and are going.
#[test]
fn a_flush_covers_what_another_queue_has_completed() {
    const ROUNDS: u64 = 2000;
    let disk = Arc::new(Cached::default());
    let bdev = Arc::clone(&disk) as Arc<dyn Bdev>;
    let mut scene = Scene::new(Mode::Sleep { after_us: 20 }, bdev, 2);
    let mut queues = std::mem::take(&mut scene.queues);
    let data = queues[0].ring().ram().alloc(512, 512).unwrap();
    assert_ne!(scene.place(0), scene.place(1));
    for n in 0..ROUNDS {
        for (queue, request) in [(0, Request::write(n, &[data])), (1, Request::flush())] {
            queues[queue].submit(&request).unwrap();
            queues[queue].kick().unwrap();
            if n % 4 == 3 {
                scene.switch(queue);
            }
            assert_eq!(queues[queue].wait().unwrap().status, STATUS_OK);
        }
        assert!(lock(&disk.stable).contains(&(n * 512)), "write {n} is not stable");
    }
    scene.end();
}
