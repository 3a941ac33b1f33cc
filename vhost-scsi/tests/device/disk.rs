//! A disk in memory whose I/O ends when the test says so, and which records the I/O that it gets.
//!
//! Faults that it may show: I/O that ends late, in any order, with an error, or never; a channel
//! without room; and a disk that cannot be opened. Data is transferred when an I/O ends.
#![expect(unsafe_code, reason = "a channel gets addresses")]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::memory::{self, Stores};
use bdev::{
    Bdev, Channel, Completion, Failure, FailureKind, Features, Io, Op, Qos, Stats, Status, Submit,
    Tag, Topology, Wait, WakeFds,
};
use guest_memory::usize_of;
use reactor::EventFd;

/// All operations.
pub(crate) const ALL: Features = Features {
    read_only: false,
    flush: true,
    unmap: true,
    write_zeroes: true,
    reset: false,
    any_alignment: true,
};

/// An I/O that the disk has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) op: Op,
    /// In bytes.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) may_unmap: bool,
}

/// How I/O fails.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Unsupported,
    /// With this errno.
    Errno(i32),
    /// Without a reason.
    Unknown,
}

struct Flying {
    io: Io,
    channel: u64,
}

/// What the test and the channels share.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) data: Vec<u8>,
    /// I/O stays in flight until [`State::complete`].
    pub(crate) holds: bool,
    /// The further I/Os that are accepted, if there is a limit.
    pub(crate) room: Option<usize>,
    /// How the I/Os of these operations fail.
    pub(crate) faults: Vec<(Op, Fault)>,
    /// I/Os until these faults apply.
    pub(crate) good: usize,
    /// All accepted I/Os, in order.
    pub(crate) seen: Vec<Seen>,
    pub(crate) open_fails: bool,
    /// Open channels.
    pub(crate) channels: usize,
    /// A defect of the device.
    pub(crate) wrong: Option<String>,
    flying: Vec<Flying>,
    made: u64,
    done: BTreeMap<u64, VecDeque<Completion>>,
    failures: BTreeMap<(u64, Tag), Failure>,
    wakes: BTreeMap<u64, Arc<EventFd>>,
}

impl State {
    /// Returns the number of I/Os in flight.
    pub(crate) fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Ends the `nth` I/O in flight.
    pub(crate) fn complete(&mut self, nth: usize) {
        let Flying { io, channel } = self.flying.remove(nth);
        let status = self.carry_out(&io, channel);
        self.done.entry(channel).or_default().push_back(Completion { tag: io.tag, status });
        self.wakes[&channel].signal();
    }

    /// Ends all I/Os in flight.
    pub(crate) fn complete_all(&mut self) {
        while !self.flying.is_empty() {
            self.complete(0);
        }
    }

    /// No I/O stays in flight any more.
    pub(crate) fn release(&mut self) {
        self.holds = false;
        self.complete_all();
    }

    /// Returns the I/Os since the last call.
    pub(crate) fn take_seen(&mut self) -> Vec<(Op, u64, u64)> {
        self.seen.drain(..).map(|seen| (seen.op, seen.offset, seen.len)).collect()
    }

    fn carry_out(&mut self, io: &Io, channel: u64) -> Status {
        let fault = self.faults.iter().find(|(op, _)| *op == io.op).map(|(_, fault)| *fault);
        match fault {
            Some(_) if self.good > 0 => self.good -= 1,
            Some(Fault::Unsupported) => return Status::Unsupported,
            Some(Fault::Unknown) => return Status::IoError,
            Some(Fault::Errno(errno)) => {
                let failure = io.failed(FailureKind::Failed, errno);
                self.failures.insert((channel, io.tag), failure);
                return Status::IoError;
            }
            None => {}
        }
        self.transfer(io)
    }

    fn transfer(&mut self, io: &Io) -> Status {
        let (at, len) = (usize_of(io.offset), usize_of(io.len));
        let Some(data) = self.data.get_mut(at..).and_then(|data| data.get_mut(..len)) else {
            return Status::IoError;
        };
        // SAFETY: the I/O has not been reported.
        let segments = unsafe { io.segments() };
        let total: usize = segments.iter().map(|segment| segment.len()).sum();
        match io.op {
            Op::Read | Op::Write if total != len => {
                self.wrong = Some(format!("{io:?} has segments of {total} bytes"));
            }
            // SAFETY: the segments stay until the I/O is reported.
            Op::Read => assert!(unsafe { memory::scatter(segments, 0, data.as_ptr(), len) }),
            Op::Write => {
                let to = data.as_mut_ptr();
                // SAFETY: as above.
                assert!(unsafe { memory::gather(segments, 0, to, len, Stores::Cached) });
            }
            Op::Unmap | Op::WriteZeroes => data.fill(0),
            Op::Flush => {}
        }
        Status::Ok
    }
}

/// The disk.
pub(crate) struct TestDisk {
    name: String,
    block_bytes: u32,
    blocks: AtomicU64,
    features: Features,
    state: Arc<Mutex<State>>,
    stats: Stats,
    qos: Qos,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestDisk {
    /// Creates a disk of zeroes.
    pub(crate) fn create(name: &str, blocks: u64) -> Arc<Self> {
        Self::with(name, blocks, 512, ALL)
    }

    pub(crate) fn with(name: &str, blocks: u64, block_bytes: u32, features: Features) -> Arc<Self> {
        let data = vec![0; usize_of(blocks * u64::from(block_bytes))];
        let state = Arc::new(Mutex::new(State { data, ..State::default() }));
        let (stats, qos) = (Stats::default(), Qos::default());
        let (name, blocks) = (name.into(), AtomicU64::new(blocks));
        Arc::new(Self { name, block_bytes, blocks, features, state, stats, qos })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn resize(&self, blocks: u64) {
        self.state().data.resize(usize_of(blocks * u64::from(self.block_bytes)), 0);
        self.blocks.store(blocks, Ordering::Relaxed);
    }
}

impl Bdev for TestDisk {
    fn name(&self) -> &str {
        &self.name
    }
    fn product_name(&self) -> &'static str {
        "Test disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        self.block_bytes
    }
    fn num_blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }
    fn features(&self) -> Features {
        self.features
    }
    fn topology(&self) -> Topology {
        Topology::default()
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, _depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        let mut state = lock(&self.state);
        if state.open_fails {
            return Err(bdev::Error::NoMemory("a test".into()));
        }
        state.channels += 1;
        state.made += 1;
        let number = state.made;
        let wake = Arc::new(EventFd::new().expect("an fd"));
        state.wakes.insert(number, Arc::clone(&wake));
        drop(state);
        Ok(Box::new(TestChannel { number, wake, disk: self }))
    }
}

struct TestChannel {
    number: u64,
    wake: Arc<EventFd>,
    disk: Arc<TestDisk>,
}

impl Channel for TestChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let mut state = self.disk.state();
        match &mut state.room {
            Some(0) => return Submit::Full(io),
            Some(room) => *room -= 1,
            None => {}
        }
        let Io { op, offset, len, may_unmap, tag, .. } = io;
        state.seen.push(Seen { op, offset, len, may_unmap });
        if state.flying.iter().any(|other| (other.channel, other.io.tag) == (self.number, tag)) {
            state.wrong = Some(format!("{tag:?} is used twice"));
        }
        if state.holds {
            state.flying.push(Flying { io, channel: self.number });
            return Submit::Queued;
        }
        Submit::Done(state.carry_out(&io, self.number))
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.wake.as_fd()].into_iter().collect()
    }

    fn wait(&self) -> Wait {
        Wait::Event
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.disk.state().failures.remove(&(self.number, tag))
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = self.disk.state();
        let Some(mine) = state.done.get_mut(&self.number) else { return 0 };
        let count = mine.len().min(done.len());
        for (to, from) in done.iter_mut().zip(mine.drain(..count)) {
            *to = from;
        }
        count
    }
}

impl Drop for TestChannel {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        state.channels -= 1;
        let waits = state.done.get(&self.number).is_some_and(|done| !done.is_empty());
        if waits || state.flying.iter().any(|other| other.channel == self.number) {
            state.wrong = Some("a channel was dropped with I/O in flight".into());
        }
    }
}
