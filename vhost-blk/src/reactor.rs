//! The threads that serve queues: one per core, each with a list of queues that it owns. They poll,
//! or sleep when there is nothing to do.
#![expect(unsafe_code, reason = "visits queues as their owner; pins threads; reads the TSC")]

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bdev::Wait;

use crossbeam_queue::ArrayQueue;
use qsbr::{Domain, Published, Reader};

use crate::notify::EventFd;
use crate::queue::core::ChannelBox;
use crate::queue::{Queue, QueueId};
use crate::reclaim::Reclaim;

mod bell;
mod clock;
mod poll_set;
mod turn;

pub(crate) use bell::{Bell, BellRope};

pub use clock::{read_tsc, ticks_per_second};
pub use turn::{Cause, LongestTurn, Turn};

use poll_set::PollSet;

/// What a reactor does when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Look again, for as long as it has a queue.
    #[default]
    Poll,
    /// Look again for so many microseconds, then sleep until a guest kicks, a disk has completed
    /// something, or the control side has something new. 0 is SPDK's interrupt mode.
    Sleep {
        /// Microseconds without work after which it sleeps.
        after_us: u64,
    },
}

/// A processor, by the system's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Core(pub usize);

/// A function that a thread calls before its work.
pub type OnStart = Arc<dyn Fn() + Send + Sync>;

/// Events that reactors can have on the way to the control side; more wait in their queues.
const EVENTS_MAX: usize = 1024;

/// Idle turns between two readings of the clock: at a few nanoseconds a turn, about a microsecond.
const IDLE_TURNS_PER_CLOCK: u32 = 256;

/// What a reactor tells the control side.
#[derive(Debug)]
pub enum Event {
    /// A queue was told to stop and has nothing in flight any more.
    Drained(QueueId),
    /// A guest broke its ring.
    Broken(QueueId),
    /// A removed disk's channel has nothing in flight any more; dropping it is for the receiver.
    Released(QueueId, ChannelBox),
}

/// The way from the reactors to the control side: bounded, and never waited for.
#[derive(Debug)]
pub struct Events {
    queue: ArrayQueue<Event>,
    wake: EventFd,
}

impl Events {
    /// An empty one.
    ///
    /// # Errors
    /// Out of fds.
    pub fn new() -> io::Result<Self> {
        Ok(Self { queue: ArrayQueue::new(EVENTS_MAX), wake: EventFd::new()? })
    }

    /// Sends an event.
    ///
    /// # Errors
    /// Gives it back when there is no room.
    pub fn push(&self, event: Event) -> Result<(), Event> {
        self.queue.push(event)?;
        self.wake.signal();
        Ok(())
    }

    /// The next event.
    pub fn pop(&self) -> Option<Event> {
        self.queue.pop()
    }

    /// Becomes readable when there are events; to be emptied before they are taken.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}

/// What others see of a reactor.
#[derive(Debug)]
pub struct Reactor {
    core: Core,
    mode: Mode,
    poll_set: Published<PollSet>,
    /// Wakes it when it sleeps.
    bell: Arc<Bell>,
    /// The control side's hand on the bell. Never read.
    wake: EventFd,
    asleep: AtomicBool,
    sleeps: AtomicU64,
    shutdown: AtomicBool,
    tid: AtomicU64,
    turns: AtomicU64,
    busy_ticks: AtomicU64,
    idle_ticks: AtomicU64,
    longest: LongestTurn,
}

/// A reactor as the operator sees it. Times are in ticks of the time-stamp counter.
#[derive(Clone, Debug)]
pub struct ReactorInfo {
    /// Where it runs.
    pub core: Core,
    /// Its thread's id.
    pub tid: u64,
    /// Time in turns that found something to do.
    pub busy_ticks: u64,
    /// Time in the others, asleep included.
    pub idle_ticks: u64,
    /// Turns made.
    pub turns: u64,
    /// Times that it has gone to sleep.
    pub sleeps: u64,
    /// Whether it sleeps rather than polls: always so in interrupt mode, right now otherwise.
    pub in_interrupt: bool,
    /// Queues attached.
    pub queues: usize,
}

/// What comes after a turn.
enum Next {
    /// Another one.
    Turn,
    /// A sleep, until then at the most.
    Sleep(Option<Instant>),
}

impl Reactor {
    /// A reactor without a thread: see [`SteppedReactor`].
    ///
    /// # Errors
    /// Out of fds.
    pub fn new(core: Core, domain: &Arc<Domain>, mode: Mode) -> io::Result<Self> {
        let (bell, wake) = (Bell::new()?, EventFd::new()?);
        bell.watch(wake.as_fd())?;
        Ok(Self {
            core,
            mode,
            poll_set: Published::new(domain, Box::default()),
            bell: Arc::new(bell),
            wake,
            asleep: AtomicBool::new(false),
            sleeps: AtomicU64::new(0),
            shutdown: AtomicBool::new(false),
            tid: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            busy_ticks: AtomicU64::new(0),
            idle_ticks: AtomicU64::new(0),
            longest: LongestTurn::default(),
        })
    }

    /// Starts a reactor on `core`. `on_start` is called on its thread before its first turn.
    ///
    /// # Errors
    /// The core does not exist, or may not be used, or the system has no thread to give.
    pub fn start(
        core: Core,
        domain: &Arc<Domain>,
        events: &Arc<Events>,
        mode: Mode,
        on_start: OnStart,
    ) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let reactor = Arc::new(Self::new(core, domain, mode)?);
        let reader =
            domain.reader().ok_or_else(|| io::Error::other("more reactors than readers"))?;
        // Measured before the reactor runs.
        let _ = ticks_per_second();
        let (running, events) = (Arc::clone(&reactor), Arc::clone(events));
        let (result_in, result) = std::sync::mpsc::channel();
        let thread =
            thread::Builder::new().name(format!("reactor_{}", core.0)).spawn(move || {
                let pinned = pin_to(core);
                let ok = pinned.is_ok();
                let _ = result_in.send(pinned);
                if ok {
                    on_start();
                    running.run(reader, &events);
                }
            })?;
        result.recv().map_err(|_| io::Error::other("the reactor's thread ended"))??;
        Ok((reactor, thread))
    }

    fn run(&self, mut reader: Reader, events: &Events) {
        // SAFETY: a query without side effects.
        self.tid.store(unsafe { libc::gettid() } as u64, Ordering::Relaxed);
        let mut turn = Turn::new();
        reader.online();
        while !self.shutdown.load(Ordering::Relaxed) {
            let Next::Sleep(until) = self.poll_once(&mut reader, &mut turn, events) else {
                continue;
            };
            self.sleep(&mut reader, &mut turn, until);
        }
    }

    /// One turn, and what is to come after it.
    #[inline]
    fn poll_once(&self, reader: &mut Reader, turn: &mut Turn, events: &Events) -> Next {
        let changed = reader.quiesce() | turn.take_woken();
        // SAFETY: the reader is online and of the one domain that there is.
        let set = unsafe { self.poll_set.load(reader) };
        // SAFETY: the set was published to this reactor, and `changed` is about this turn.
        let worked = unsafe { set.turn(changed, reader, turn, events) };
        let read_clock = self.account(turn, worked);
        if set.is_empty() {
            return Next::Sleep(None);
        }
        match self.mode {
            Mode::Poll => Next::Turn,
            Mode::Sleep { after_us: 0 } if worked => Next::Turn,
            Mode::Sleep { after_us: 0 } => self.rest(set, reader, turn),
            Mode::Sleep { after_us } if read_clock && !worked => {
                let idle = turn.now_ticks().saturating_sub(turn.worked_ticks);
                let after = after_us.saturating_mul(turn.ticks_per_second() / 1_000_000);
                if idle < after { Next::Turn } else { self.rest(set, reader, turn) }
            }
            Mode::Sleep { .. } => Next::Turn,
        }
    }

    /// Prepares a sleep, if nothing wants to be polled.
    fn rest(&self, set: &PollSet, reader: &Reader, turn: &Turn) -> Next {
        // SAFETY: in the turn of this set, on its reactor.
        match unsafe { set.arm(reader, turn) } {
            Wait::Poll => Next::Turn,
            Wait::Event => Next::Sleep(None),
            Wait::Until(until) => Next::Sleep(Some(until)),
        }
    }

    /// Books the time since the last booking as busy or idle, if the clock was read.
    #[inline]
    fn account(&self, turn: &mut Turn, worked: bool) -> bool {
        turn.turns += 1;
        turn.idle_turns = if worked { 0 } else { turn.idle_turns + 1 };
        if worked || turn.idle_turns == IDLE_TURNS_PER_CLOCK {
            // Work ends with a reading of the clock.
            let now = if worked { turn.now_ticks() } else { turn.read_clock() };
            let book = if worked { &self.busy_ticks } else { &self.idle_ticks };
            let spent = enter(book, turn, now);
            self.turns.store(turn.turns, Ordering::Relaxed);
            let causes = turn.take_causes();
            self.longest.note(spent, causes);
            turn.idle_turns = 0;
            if worked {
                turn.worked_ticks = now;
            }
            return true;
        }
        false
    }

    /// Sleeps until a guest kicks, a disk has something, the control side has changed something, or
    /// `until`.
    ///
    /// What a guest publishes after [`PollSet::arm`] has looked comes with a kick. What the control
    /// side publishes comes with a ring of the bell, and what it published before the last turn was
    /// seen in that; a ring that came in between makes this sleep a short one.
    #[cold]
    fn sleep(&self, reader: &mut Reader, turn: &mut Turn, until: Option<Instant>) {
        self.asleep.store(true, Ordering::Relaxed);
        reader.offline();
        self.bell.wait(until);
        reader.online();
        self.asleep.store(false, Ordering::Relaxed);
        self.sleeps.store(self.sleeps.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let now = turn.read_clock();
        enter(&self.idle_ticks, turn, now);
        turn.worked_ticks = now;
        turn.woken();
    }

    /// Where it runs.
    #[must_use]
    pub fn core(&self) -> Core {
        self.core
    }

    /// Has it look at once at what was published to it, should it sleep.
    pub fn wake(&self) {
        self.wake.signal();
    }

    /// What wakes it, if it ever sleeps while it has queues.
    pub(crate) fn bell(&self) -> Option<&Arc<Bell>> {
        (self.mode != Mode::Poll).then_some(&self.bell)
    }

    /// Publishes `queues` as what the reactor polls, and wakes it.
    pub fn publish(&self, queues: Vec<Arc<Queue>>, reclaim: &Reclaim) {
        self.publish_with(queues, false, reclaim);
    }

    /// As [`Reactor::publish`]. `strays`: I/O that this reactor has submitted is in flight on queues
    /// that have moved away; see [`PollSet::new`].
    pub(crate) fn publish_with(&self, queues: Vec<Arc<Queue>>, strays: bool, reclaim: &Reclaim) {
        reclaim.free(self.poll_set.replace(Box::new(PollSet::new(queues, strays))));
        self.wake();
    }

    /// Asks it to end after its turn.
    pub fn shut_down(&self) {
        self.shutdown.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Its longest turn so far; with `reset`, the next answer is about what comes after.
    #[must_use]
    pub fn longest_turn(&self, reset: bool) -> (u64, Vec<Cause>) {
        self.longest.read(reset)
    }

    /// What it has done so far; `queues` is for the caller to fill in.
    #[must_use]
    pub fn info(&self) -> ReactorInfo {
        ReactorInfo {
            core: self.core,
            tid: self.tid.load(Ordering::Relaxed),
            busy_ticks: self.busy_ticks.load(Ordering::Relaxed),
            idle_ticks: self.idle_ticks.load(Ordering::Relaxed),
            turns: self.turns.load(Ordering::Relaxed),
            sleeps: self.sleeps.load(Ordering::Relaxed),
            in_interrupt: self.mode == Mode::Sleep { after_us: 0 }
                || self.asleep.load(Ordering::Relaxed),
            queues: 0,
        }
    }
}

/// Adds the time since the last entry to a book and answers with it.
#[inline]
fn enter(book: &AtomicU64, turn: &mut Turn, now: u64) -> u64 {
    let spent = now.saturating_sub(turn.since);
    // Relaxed: the reactor's thread is the only writer, and readers want no order.
    book.store(book.load(Ordering::Relaxed) + spent, Ordering::Relaxed);
    turn.since = now;
    spent
}

/// A reactor without a thread, which makes a turn when it is told to.
#[derive(Debug)]
pub struct SteppedReactor {
    reactor: Arc<Reactor>,
    reader: Reader,
    turn: Turn,
    events: Arc<Events>,
    /// It sleeps, until then at the most.
    sleeping: Option<Option<Instant>>,
}

impl SteppedReactor {
    /// Takes over `reactor`, which nobody else may step.
    ///
    /// # Errors
    /// The domain has no room for another reader.
    pub fn new(
        reactor: &Arc<Reactor>,
        domain: &Arc<Domain>,
        events: &Arc<Events>,
    ) -> io::Result<Self> {
        let mut reader =
            domain.reader().ok_or_else(|| io::Error::other("more reactors than readers"))?;
        reader.online();
        let (reactor, events) = (Arc::clone(reactor), Arc::clone(events));
        Ok(Self { reactor, reader, turn: Turn::new(), events, sleeping: None })
    }

    /// Makes one turn, unless it sleeps and nothing has woken it; says whether it sleeps now.
    pub fn step(&mut self) -> bool {
        if let Some(until) = self.sleeping {
            // A limit is one that has passed: here is no time.
            if until.is_none() && !self.reactor.bell.wait(Some(Instant::now())) {
                return true;
            }
            self.reader.online();
            self.turn.woken();
        }
        self.sleeping = None;
        if let Next::Sleep(until) =
            self.reactor.poll_once(&mut self.reader, &mut self.turn, &self.events)
        {
            self.reader.offline();
            self.sleeping = Some(until);
        }
        self.sleeping.is_some()
    }
}

#[cfg(test)]
impl SteppedReactor {
    /// Whether it knows of I/O in flight of queues that were moved to other reactors.
    pub(crate) fn has_strays(&mut self) -> bool {
        self.reader.online();
        // SAFETY: of its domain, and online.
        let strays = unsafe { self.reactor.poll_set.load(&self.reader) }.has_strays();
        if self.sleeping.is_some() {
            self.reader.offline();
        }
        strays
    }
}

/// Pins the calling thread to one core.
fn pin_to(core: Core) -> io::Result<()> {
    // SAFETY: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core.0 >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the index was checked.
    unsafe { libc::CPU_SET(core.0, &mut set) };
    // SAFETY: the set is ours; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
