//! A disk whose I/O completes at once or when the test says so.
//!
//! Faults that it may show: I/O that does not complete, I/O that fails, and a channel that is full.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use bdev::{Bdev, Channel, Completion, Features, Io, Op, Qos, Stats, Status, Submit, Tag, Wait};

pub(crate) const SECTORS: u64 = 8192;

/// The disk's behaviour and its record of I/Os.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Whether I/O completes in `submit`.
    pub(crate) at_once: bool,
    /// How many further I/Os the channel accepts, if there is a limit.
    pub(crate) room: Option<usize>,
    /// The index in `seen` of the I/O that fails.
    pub(crate) failing: Option<usize>,
    /// The submitted I/Os: operation, offset, length.
    pub(crate) seen: Vec<(Op, u64, u64)>,
    /// Called at the next poll of a channel, in the middle of a visit.
    pub(crate) at_poll: Hook,
    /// Called at the next call of a channel's `wait`, while the reactor is about to sleep.
    pub(crate) at_wait: Hook,
    waiting: VecDeque<Completion>,
    done: Vec<Completion>,
}

/// An action that is run once.
#[derive(Default)]
pub(crate) struct Hook(pub(crate) Option<Box<dyn FnOnce() + Send>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hook").field(&self.0.is_some()).finish()
    }
}

impl State {
    /// Returns the number of I/Os in flight.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Completes the `nth` I/O in flight.
    pub(crate) fn complete(&mut self, nth: usize) {
        self.done.extend(self.waiting.remove(nth));
    }

    /// Completes all I/Os in flight.
    pub(crate) fn complete_all(&mut self) {
        self.done.extend(self.waiting.drain(..));
    }

    /// Drops all I/Os in flight, as if the process was killed.
    pub(crate) fn forget(&mut self) {
        *self = Self { at_once: self.at_once, ..Self::default() };
    }
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Manual {
    state: Arc<Mutex<State>>,
    features: Features,
    stats: Stats,
    qos: Qos,
    sectors: u64,
}

impl Manual {
    /// Creates a disk that supports everything.
    pub(crate) fn create() -> Arc<Self> {
        Self::with(Features { flush: true, unmap: true, write_zeroes: true, ..Features::default() })
    }

    /// Creates a disk with these features.
    pub(crate) fn with(features: Features) -> Arc<Self> {
        Self::of_size(features, SECTORS)
    }

    /// Creates a disk that supports everything, for requests of any length.
    pub(crate) fn large() -> Arc<Self> {
        let features =
            Features { flush: true, unmap: true, write_zeroes: true, ..Features::default() };
        Self::of_size(features, 1 << 32)
    }

    fn of_size(features: Features, sectors: u64) -> Arc<Self> {
        Arc::new(Self {
            sectors,
            state: Arc::default(),
            features,
            stats: Stats::default(),
            qos: Qos::default(),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
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
        self.sectors
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
        Ok(Box::new(ManualChannel(Arc::clone(&self.state))))
    }
}

struct ManualChannel(Arc<Mutex<State>>);

impl Channel for ManualChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let mut state = self.0.lock().unwrap();
        match &mut state.room {
            Some(0) => return Submit::Full(io),
            Some(room) => *room -= 1,
            None => {}
        }
        let fails = state.failing == Some(state.seen.len());
        let status = if fails { Status::IoError } else { Status::Ok };
        state.seen.push((io.op, io.offset, io.len));
        if state.at_once {
            return Submit::Done(status);
        }
        let Tag(tag) = io.tag;
        state.waiting.push_back(Completion { tag: Tag(tag), status });
        Submit::Queued
    }

    /// The test wakes the reactor.
    fn wait(&self) -> Wait {
        if let Some(hook) = self.0.lock().unwrap().at_wait.0.take() {
            hook();
        }
        Wait::Event
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = self.0.lock().unwrap();
        if let Some(hook) = state.at_poll.0.take() {
            hook();
        }
        let n = state.done.len().min(done.len());
        for (to, from) in done.iter_mut().zip(state.done.drain(..n)) {
            *to = from;
        }
        n
    }
}
