//! A target whose front ends send messages and fds of any kind, and whose guests use their rings.
//!
//! The input is a [`script`]. The reactor runs a poll iteration when the script says so. Invariants:
//!
//! * Every pending answer comes once, when all I/O has completed, unless the connection has ended.
//! * When all front ends have left and the disk is done, nothing of them is left: no connection, no channel, no fd,
//!   no mapping.
//! * A well-behaved neighbour is served all the time.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bdev::Bdev;
use closer::{Account, ForeignFd};
use reactor::EventFd;
use vhost_blk::Blk;
use vhost_target::SteppedReactor;
use vhost_target::transport::SharedConnection;
use vhost_target::{ConnId, Connection, ControllerSpec, Mode, Offer, Target, Transport, Verdict};

use crate::disk::ModelDisk;
use crate::guest::memfd;
use crate::input::Input;
use crate::script::{self, FRONTS, Fd, Message, RAM_BYTES, RINGS, Step};

const STEPS_MAX: usize = 64;
/// Poll iterations after which an idle reactor sleeps if it may.
const ITERATIONS: usize = 16;
/// After this many times [`ITERATIONS`], a condition that is not met never will be.
const ITERATIONS_MAX: usize = 1000;
/// How often the process's mappings are checked: reading the list takes long.
const MAPPINGS_EVERY: u64 = 16;

#[derive(Debug, Default)]
struct Wire {
    sent: Mutex<Sent>,
}

#[derive(Debug, Default)]
struct Sent {
    count: usize,
    shut: bool,
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection for Wire {
    fn vid(&self) -> i32 {
        0
    }
    fn send(&self, message: &[u8]) -> io::Result<()> {
        assert!(message.len() >= 12, "a reply without a header");
        self.lock().count += 1;
        Ok(())
    }
    fn shut_down(&self) {
        self.lock().shut = true;
    }
}

/// A transport without sockets.
#[derive(Default)]
struct Sockets(Mutex<BTreeSet<PathBuf>>);

impl Transport for Sockets {
    fn listen(&self, path: &Path, _offer: Offer, _account: &Account) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path.into());
        Ok(())
    }
    fn unlisten(&self, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }
}

struct Front {
    id: ConnId,
    wire: Arc<Wire>,
    /// The number of replies that were ever pending.
    pending: usize,
}

/// A guest's memory, which outlives its connections.
struct Ram {
    file: File,
    /// Requests offered per ring.
    offered: [u16; RINGS],
}

impl Ram {
    fn new() -> Self {
        Self { file: File::from(memfd(RAM_BYTES)), offered: [0; RINGS] }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // A write beyond the file's end extends it again, as a front end may do.
        self.file.write_all_at(bytes, at).expect("a memfd");
    }

    fn offer(&mut self, ring: usize, kind: u32, sector: u64) {
        let nth = self.offered[ring % RINGS];
        self.offered[ring % RINGS] = nth.wrapping_add(1);
        for (at, bytes) in script::offered(ring, nth, kind, sector) {
            self.write(at, &bytes);
        }
    }
}

/// State that is made once per process.
struct Stage {
    target: Arc<Target>,
    steps: Vec<SteppedReactor>,
    sockets: Sockets,
    disk: Arc<ModelDisk>,
    neighbour: (Front, Ram),
    /// Open fds when only the neighbour is connected; `None` before the first input has ended.
    fds: Option<usize>,
    mappings: Option<usize>,
    runs: u64,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

fn spec(name: &str, disk: &Arc<ModelDisk>) -> ControllerSpec {
    ControllerSpec {
        name: name.into(),
        socket: format!("/{name}").into(),
        device: Blk::new(disk.clone(), false),
        cores: None,
        packed_ring: true,
    }
}

impl Stage {
    fn new() -> Self {
        let mode = Mode::Sleep { after_us: 0 };
        let (target, steps) = Target::in_steps(1, mode, Arc::new(|| {})).expect("threads");
        let (sockets, disk) = (Sockets::default(), ModelDisk::new(512));
        for name in ["a", "b", "n"] {
            target.create_controller(spec(name, &disk), &sockets).expect("a controller");
        }
        let (wire, ram) = (Arc::<Wire>::default(), Ram::new());
        let id = target.connected(Path::new("/n"), Arc::clone(&wire) as SharedConnection);
        let front = Front { id: id.expect("a connection"), wire, pending: 0 };
        let mut stage = Self {
            target,
            steps,
            sockets,
            disk,
            neighbour: (front, ram),
            fds: None,
            mappings: None,
            runs: 0,
        };
        let mut messages = script::well_behaved(0, 1 << 32 | 1 << 30);
        messages.push(script::kick(0, true));
        for message in messages {
            let fds = message.fds.iter().map(|fd| match fd {
                Fd::Ram => stage.neighbour.1.file.try_clone().expect("an fd").into(),
                _ => eventfd(),
            });
            let fds = fds.map(ForeignFd::alone).collect();
            let id = stage.neighbour.0.id;
            let verdict = stage.target.message(id, message.request, false, &message.payload, fds);
            assert!(matches!(verdict, Verdict::Done | Verdict::Pass), "{verdict:?}");
        }
        stage.poll(ITERATIONS);
        stage
    }

    /// Steps the reactors until they sleep, or for `most` iterations. They never sleep with a
    /// ring without a kick fd, which must be polled.
    fn poll(&mut self, most: usize) {
        for _ in 0..most {
            let mut asleep = true;
            for reactor in &mut self.steps {
                asleep &= reactor.step();
            }
            self.target.process_events();
            if asleep {
                break;
            }
        }
    }

    /// Lets everything in progress end; continues until `done`.
    fn settle(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        self.disk.state().settle();
        for _ in 0..ITERATIONS_MAX {
            // The disk's completions wake no reactor.
            self.wake();
            self.poll(ITERATIONS);
            if done(self) {
                return;
            }
        }
        panic!("{what}");
    }

    /// Wakes all reactors.
    fn wake(&self) {
        vhost_blk::bdev_resized(&self.target, &(self.disk.clone() as Arc<dyn Bdev>));
    }

    /// The neighbour reads a sector.
    fn neighbour_reads(&mut self) {
        self.neighbour.1.offer(0, 0, 1);
        self.wake();
        self.poll(ITERATIONS);
        let mut status = [0xff];
        let ram = &self.neighbour.1.file;
        ram.read_exact_at(&mut status, script::status_at(0)).expect("a memfd");
        assert_eq!(status, [0], "the neighbour is not served");
    }
}

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    STAGE.with_borrow_mut(|stage| {
        let mut input = Input::new(bytes);
        let account = Account::new("fuzz");
        let mut play = Play {
            stage,
            fronts: Default::default(),
            rams: Default::default(),
            area: None,
            account,
        };
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            play.step(script::step(&mut input));
        }
        play.end();
    });
}

struct Play<'s> {
    stage: &'s mut Stage,
    fronts: [Option<Front>; FRONTS],
    rams: [Option<Ram>; FRONTS],
    /// The area from the last answer to GET_INFLIGHT_FD.
    area: Option<OwnedFd>,
    account: Account,
}

impl Play<'_> {
    fn step(&mut self, step: Step) {
        match step {
            Step::Say(front, messages) => {
                for message in messages {
                    if !self.say(front, &message) {
                        break;
                    }
                }
            }
            Step::Offer(front, ring, kind, sector) => self.ram(front).offer(ring, kind, sector),
            Step::Poke(front, at, bytes) => self.ram(front).write(at, &bytes),
            Step::Cut(front, len) => self.ram(front).file.set_len(len).expect("a memfd"),
            Step::Leave(front) => self.leave(front),
            Step::Complete(Some(nth)) => self.stage.disk.state().complete(nth.into()),
            Step::Complete(None) => {
                let mut disk = self.stage.disk.state();
                while disk.pending() > 0 {
                    disk.complete(0);
                }
            }
            Step::Iterations(count) => {
                self.stage.wake();
                self.stage.poll(count.into());
            }
            Step::Operate(what) => self.operate(what),
        }
    }

    fn ram(&mut self, front: usize) -> &mut Ram {
        self.rams[front].get_or_insert_with(Ram::new)
    }

    fn front(&mut self, number: usize) -> Option<&mut Front> {
        if self.fronts[number].is_none() {
            let (wire, socket) = (Arc::<Wire>::default(), if number == 0 { "/a" } else { "/b" });
            let connection = Arc::clone(&wire) as SharedConnection;
            let id = self.stage.target.connected(Path::new(socket), connection)?;
            self.fronts[number] = Some(Front { id, wire, pending: 0 });
        }
        self.fronts[number].as_mut()
    }

    fn fd(&mut self, front: usize, kind: Fd) -> OwnedFd {
        let dup = |file: &File| file.try_clone().expect("an fd").into();
        match kind {
            Fd::Ram => dup(&self.ram(front).file),
            Fd::Memory(len) => memfd(len),
            Fd::Event => eventfd(),
            Fd::Pipe => io::pipe().expect("a pipe").1.into(),
            Fd::Socket => UnixStream::pair().expect("sockets").0.into(),
            Fd::File => File::open("/proc/self/exe").expect("a file").into(),
            Fd::Area => match &self.area {
                Some(area) => area.try_clone().expect("an fd"),
                None => memfd(0x1000),
            },
        }
    }

    /// Sends a message; `false` if the connection has ended.
    fn say(&mut self, number: usize, message: &Message) -> bool {
        let fds: Vec<_> = message.fds.iter().map(|kind| self.fd(number, *kind)).collect();
        let fds = fds.into_iter().map(|fd| ForeignFd::new(fd, &self.account)).collect();
        let Some(front) = self.front(number) else { return false };
        let id = front.id;
        let Message { request, need_reply, payload, .. } = message;
        let verdict = self.stage.target.message(id, *request, *need_reply, payload, fds);
        match verdict {
            Verdict::Pass | Verdict::Done | Verdict::Reply(_) => {}
            Verdict::ReplyWithFd(_, fd) => self.area = Some(fd),
            Verdict::Deferred => {
                if let Some(front) = &mut self.fronts[number] {
                    front.pending += 1;
                }
            }
            Verdict::Reject => self.leave(number),
        }
        let shut = self.fronts[number].as_ref().is_some_and(|front| front.wire.lock().shut);
        if shut {
            self.leave(number);
        }
        self.fronts[number].is_some()
    }

    fn leave(&mut self, number: usize) {
        if let Some(front) = self.fronts[number].take() {
            self.stage.target.closed(front.id);
        }
    }

    fn operate(&mut self, what: u8) {
        let target = &self.stage.target;
        match what % 8 {
            0 => drop(target.set_coalescing("a", u32::from(what >> 4), 100)),
            1 => target.tick(),
            2 => self.stage.disk.state().at_once ^= true,
            3 => {
                self.stage.disk.state().room = (what & 0x80 != 0).then_some(usize::from(what >> 4))
            }
            4 => {
                let infos = target.controllers();
                assert!(infos.len() <= 3);
            }
            5 => self.recreate(),
            _ => self.stage.poll(ITERATIONS),
        }
    }

    /// Deletes a controller with its connections, and creates it anew.
    fn recreate(&mut self) {
        let (target, sockets) = (&self.stage.target, &self.stage.sockets);
        if let Ok(deletion) = target.begin_delete("b", true) {
            deletion.finish(sockets);
        }
        // Its connections are gone.
        (self.fronts[1], self.fronts[2]) = (None, None);
        let made = target.create_controller(spec("b", &self.stage.disk), sockets);
        assert!(made.is_ok() || target.controller_id("b").is_some(), "{made:?}");
    }

    fn end(mut self) {
        let Self { stage, fronts, .. } = &mut self;
        stage.settle("a pending reply does not arrive", |_| {
            fronts.iter().flatten().all(|front| {
                let sent = front.wire.lock();
                sent.shut || sent.count == front.pending
            })
        });
        stage.neighbour_reads();
        (0..FRONTS).for_each(|front| self.leave(front));
        let Self { stage, rams, area, account, .. } = self;
        drop((rams, area));
        stage.settle("a connection is left", |stage| stage.target.connections() == 1);
        let sent = stage.neighbour.0.wire.lock();
        assert!(sent.count == 0 && !sent.shut && stage.neighbour.0.pending == 0);
        drop(sent);
        stage.disk.state().at_once = false;
        until(|| stage.disk.state().open == 1);
        until(|| account.open() == 0);
        stage.runs += 1;
        match stage.fds {
            None => {
                quiesce();
                (stage.fds, stage.mappings) = (Some(fds()), Some(mappings()));
            }
            // If this hangs, something was leaked: libFuzzer's time limit reports it.
            Some(most) => until(|| fds() <= most),
        }
        if stage.runs.is_multiple_of(MAPPINGS_EVERY) {
            until(|| stage.mappings.is_some_and(|most| mappings() <= most));
        }
    }
}

/// A change that other threads are about to make.
fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        thread::yield_now();
    }
}

/// Waits until everything that was dropped so far is closed and unmapped.
fn quiesce() {
    let (mut reader, writer) = io::pipe().expect("a pipe");
    drop(ForeignFd::alone(writer.into()));
    reader.read_exact(&mut [0]).expect_err("closed");
    let mut before = (0, 0);
    until(|| {
        thread::sleep(std::time::Duration::from_millis(50));
        let now = (fds(), mappings());
        std::mem::replace(&mut before, now) == now
    });
}

fn eventfd() -> OwnedFd {
    EventFd::new().expect("an eventfd").as_fd().try_clone_to_owned().expect("an fd")
}

/// Open fds, except for pipes, as libFuzzer has some to its symbolizer. The scripts' fds are counted by their
/// account.
fn fds() -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").expect("it is there");
    let name = |fd: io::Result<std::fs::DirEntry>| std::fs::read_link(fd.ok()?.path()).ok();
    fds.filter_map(name).filter(|name| !name.to_string_lossy().starts_with("pipe:")).count()
}

/// Mappings of memory files.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("it is there");
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}
