//! A disk that the simulation controls, and that records the I/O that it gets. A source of entropy
//! has the same state.
//!
//! Faults that it may show: I/O that completes late, in any order, with an error, or only at the
//! end; channels that are full for a while; a device that cannot be opened; an `open` during which
//! another event happens; and a lease that another process releases late.
#![expect(unsafe_code, reason = "a channel gets addresses")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::{
    Bdev, Channel, Completion, Features, Granted, Io, Lease, Op, Qos, Stats, Status, Submit, Tag,
    Wait, WakeFds,
};

use reactor::EventFd;

use super::probe;

/// Sectors between requests: an I/O's offset identifies its request.
pub(crate) const REQUEST_SECTORS: u64 = 16;

/// An event that happens while a device is being opened.
pub(crate) type Meanwhile = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// The part of a request that an I/O does: the request itself, or the flush that makes it durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) request: u64,
    pub(crate) flush: bool,
}

/// An event of a channel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seen {
    /// The I/O was submitted, whether or not there was room.
    Fetched(Part),
    DoneAtOnce(Part),
}

/// What an I/O in flight is.
pub(crate) enum Job {
    /// An I/O of a disk.
    Io(Io),
    /// A request for entropy, by its slot.
    Supply(u16),
}

/// An I/O in flight.
pub(crate) struct Flying {
    pub(crate) part: Part,
    /// The I/O completes only at the end of the simulation.
    pub(crate) stuck: bool,
    channel: u64,
    job: Job,
}

/// The state that the simulation and channels share.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) flying: Vec<Flying>,
    /// The events since the simulation's last check, in order.
    pub(crate) seen: Vec<Seen>,
    pub(crate) full: bool,
    pub(crate) at_once: bool,
    pub(crate) open_fails: bool,
    pub(crate) channels: usize,
    /// Whether other processes may use the disk: the target uses it under a lease.
    pub(crate) leased: bool,
    users: usize,
    held: bool,
    granted: Vec<Granted>,
    /// A defect of the target.
    pub(crate) wrong: Option<String>,
    channels_made: u64,
    /// Requests that were parked because there was no room.
    parked: BTreeSet<u64>,
    /// The eventfds that wake a sleeping reactor on completions.
    wakes: BTreeMap<u64, Arc<EventFd>>,
    done: BTreeMap<u64, VecDeque<Completion>>,
}

impl State {
    /// Ends the `n`th I/O in flight.
    pub(crate) fn complete(&mut self, n: usize, status: Status) {
        let Flying { part, channel, job, .. } = self.flying.swap_remove(n);
        let tag = match job {
            Job::Io(io) => {
                if status == Status::Ok {
                    self.transfer(&io, part.request);
                }
                io.tag
            }
            Job::Supply(slot) => Tag(slot),
        };
        self.done.entry(channel).or_default().push_back(Completion { tag, status });
        self.wakes[&channel].signal();
    }

    /// Returns whether the target holds the lease or waits for it.
    pub(crate) fn has_users(&self) -> bool {
        self.users > 0
    }

    /// Returns whether the target waits for the lease.
    pub(crate) fn waits(&self) -> bool {
        self.users > 0 && !self.held
    }

    /// Grants the lease. Returns the callbacks, which the caller has to call.
    pub(crate) fn grant(&mut self) -> Vec<Granted> {
        self.held = true;
        std::mem::take(&mut self.granted)
    }

    /// Records a defect if the target may not do `what` without the lease.
    fn check_lease(&mut self, what: &str) {
        if self.leased && !self.held {
            self.wrong = Some(format!("{what} without the lease"));
        }
    }

    /// Records a defect if the target has discarded a request that was not in flight.
    pub(crate) fn forget(&mut self, request: u64) {
        self.parked.remove(&request);
    }

    /// Records that a part of a request was submitted. Returns whether there is room for it.
    pub(super) fn accept(&mut self, part: Part) -> bool {
        self.check_lease("I/O is submitted");
        if !self.parked.remove(&part.request) {
            self.seen.push(Seen::Fetched(part));
        }
        if self.full {
            self.parked.insert(part.request);
        }
        !self.full
    }

    pub(super) fn done_at_once(&mut self, part: Part) {
        self.seen.push(Seen::DoneAtOnce(part));
    }

    /// Records an I/O in flight.
    pub(super) fn fly(&mut self, part: Part, channel: u64, job: Job) {
        self.flying.push(Flying { part, stuck: false, channel, job });
    }

    /// Returns the completions for a channel.
    pub(super) fn done(&mut self, channel: u64) -> Option<&mut VecDeque<Completion>> {
        self.done.get_mut(&channel)
    }

    /// Records that a channel is closed, which must have no I/O in flight.
    pub(super) fn close(&mut self, channel: u64) {
        self.channels -= 1;
        let waiting = self.done.get(&channel).is_some_and(|done| !done.is_empty());
        if waiting || self.flying.iter().any(|f| f.channel == channel) {
            self.wrong = Some("a channel was dropped with I/O in flight".into());
        }
    }

    fn transfer(&mut self, io: &Io, request: u64) {
        // SAFETY: the I/O has not completed.
        for segment in unsafe { io.segments() } {
            let (base, len) = (segment.base(), segment.len());
            let pattern = vec![pattern(request); len];
            let ok = match io.op {
                Op::Read => probe::write(base, &pattern).is_some(),
                Op::Write => probe::read(base, len) == Some(pattern),
                _ => true,
            };
            if !ok {
                self.wrong = Some(format!("request {request}: its memory is not what it was"));
            }
        }
    }
}

/// Returns the byte that a request's data consists of.
pub(crate) fn pattern(request: u64) -> u8 {
    (request % 251) as u8 + 1
}

pub(crate) struct SimDisk {
    name: String,
    state: Arc<Mutex<State>>,
    meanwhile: Meanwhile,
    stats: Stats,
    qos: Qos,
}

impl SimDisk {
    pub(crate) fn new(name: String, state: Arc<Mutex<State>>, meanwhile: Meanwhile) -> Arc<Self> {
        Arc::new(Self { name, state, meanwhile, stats: Stats::default(), qos: Qos::default() })
    }
}

/// Opens a channel. Returns its number and the eventfd that signals its completions, or `None` if
/// that fails.
pub(super) fn open(state: &Mutex<State>, meanwhile: &Meanwhile) -> Option<(u64, Arc<EventFd>)> {
    // The event during the opening may end the start: no user needs the lease then.
    lock(state).check_lease("the disk is opened");
    let meanwhile = lock(meanwhile).take();
    if let Some(meanwhile) = meanwhile {
        meanwhile();
    }
    let mut state = lock(state);
    if state.open_fails {
        return None;
    }
    state.channels += 1;
    state.channels_made += 1;
    let number = state.channels_made;
    let wake = Arc::new(EventFd::new().expect("an fd"));
    state.wakes.insert(number, Arc::clone(&wake));
    Some((number, wake))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bdev for SimDisk {
    fn name(&self) -> &str {
        &self.name
    }
    fn product_name(&self) -> &'static str {
        "Simulated disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn num_blocks(&self) -> u64 {
        1 << 40
    }
    fn features(&self) -> Features {
        Features { flush: true, write_zeroes: true, ..Features::default() }
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn lease(&self) -> Option<Arc<dyn Lease>> {
        let lease = SimLease(Arc::clone(&self.state));
        lock(&self.state).leased.then(|| Arc::new(lease) as Arc<dyn Lease>)
    }
    fn open(self: Arc<Self>, _depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        let opened = open(&self.state, &self.meanwhile);
        let (number, wake) = opened.ok_or_else(|| bdev::Error::NoMemory("simulated".into()))?;
        Ok(Box::new(SimChannel { number, wake, disk: self, tags: BTreeMap::new() }))
    }
}

pub(super) struct SimLease(pub(super) Arc<Mutex<State>>);

impl std::fmt::Debug for SimLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimLease").finish_non_exhaustive()
    }
}

impl Lease for SimLease {
    fn add_user(&self, granted: &Granted) -> bool {
        let mut state = lock(&self.0);
        state.users += 1;
        if !state.held {
            state.granted.push(Arc::clone(granted));
        }
        state.held
    }

    fn remove_user(&self) {
        let mut state = lock(&self.0);
        state.users -= 1;
        if state.users > 0 {
            return;
        }
        if !state.flying.is_empty() {
            state.wrong = Some("the lease is given back with I/O in flight".into());
        }
        state.held = false;
        state.granted.clear();
    }

    fn is_held(&self) -> bool {
        lock(&self.0).held
    }
}

struct SimChannel {
    number: u64,
    wake: Arc<EventFd>,
    disk: Arc<SimDisk>,
    /// The last request of each tag: a flush does not identify its request in another way.
    tags: BTreeMap<u16, u64>,
}

impl Channel for SimChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let mut state = lock(&self.disk.state);
        // No guest sends a flush itself.
        let flush = io.op == Op::Flush;
        if !flush {
            self.tags.insert(io.tag.0, io.offset / 512 / REQUEST_SECTORS);
        }
        let request = self.tags.get(&io.tag.0).copied();
        let request = request.expect("a flush without a previous write");
        let part = Part { request, flush };
        if !state.accept(part) {
            return Submit::Full(io);
        }
        if state.at_once {
            state.transfer(&io, request);
            state.done_at_once(part);
            return Submit::Done(Status::Ok);
        }
        state.fly(part, self.number, Job::Io(io));
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.wake.as_fd()].into_iter().collect()
    }

    fn wait(&self) -> Wait {
        Wait::Event
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = lock(&self.disk.state);
        let Some(mine) = state.done(self.number) else { return 0 };
        let n = mine.len().min(done.len());
        for (to, from) in done.iter_mut().zip(mine.drain(..n)) {
            *to = from;
        }
        n
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        lock(&self.disk.state).close(self.number);
    }
}
