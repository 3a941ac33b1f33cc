//! The polling threads: one per core, each with a list of queues that it owns.
#![expect(unsafe_code, reason = "visits queues as their owner; pins threads; reads the TSC")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_queue::ArrayQueue;
use qsbr::{Domain, Published, Reader};

use crate::notify::EventFd;
use crate::queue::core::ChannelBox;
use crate::queue::{Queue, QueueId};
use crate::reclaim::Reclaim;

mod poll_set;
mod turn;

pub use turn::{Cause, LongestTurn, Turn, read_tsc, ticks_per_second};

use poll_set::PollSet;

/// A processor, by the system's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Core(pub usize);

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
    poll_set: Published<PollSet>,
    /// Wakes it when it sleeps because it has no queue.
    wake: EventFd,
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
    /// Queues attached.
    pub queues: usize,
}

impl Reactor {
    /// A reactor without a thread: see [`SteppedReactor`].
    ///
    /// # Errors
    /// Out of fds.
    pub fn new(core: Core, domain: &Arc<Domain>) -> io::Result<Self> {
        Ok(Self {
            core,
            poll_set: Published::new(domain, Box::default()),
            wake: EventFd::new()?,
            shutdown: AtomicBool::new(false),
            tid: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            busy_ticks: AtomicU64::new(0),
            idle_ticks: AtomicU64::new(0),
            longest: LongestTurn::default(),
        })
    }

    /// Starts a reactor on `core`.
    ///
    /// # Errors
    /// The core does not exist, or may not be used, or the system has no thread to give.
    pub fn start(
        core: Core,
        domain: &Arc<Domain>,
        events: &Arc<Events>,
    ) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let reactor = Arc::new(Self::new(core, domain)?);
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
            if !self.poll_once(&mut reader, &mut turn, events) {
                self.sleep(&mut reader, &mut turn);
            }
        }
    }

    /// One turn; `false` if there is no queue to poll.
    #[inline]
    fn poll_once(&self, reader: &mut Reader, turn: &mut Turn, events: &Events) -> bool {
        let changed = reader.quiesce() | turn.take_woken();
        // SAFETY: the reader is online and of the one domain that there is.
        let set = unsafe { self.poll_set.load(reader) };
        // SAFETY: the set was published to this reactor, and `changed` is about this turn.
        let worked = unsafe { set.turn(changed, reader, turn, events) };
        self.account(turn, worked);
        !set.queues().is_empty()
    }

    /// Books the time since the last booking as busy or idle.
    #[inline]
    fn account(&self, turn: &mut Turn, worked: bool) {
        turn.turns += 1;
        turn.idle_turns = if worked { 0 } else { turn.idle_turns + 1 };
        if worked || turn.idle_turns == IDLE_TURNS_PER_CLOCK {
            // Work ends with a reading of the clock.
            let now = if worked { turn.now_ticks() } else { turn.read_clock() };
            let book = if worked { &self.busy_ticks } else { &self.idle_ticks };
            let spent = now.saturating_sub(turn.since);
            // Relaxed: this thread is the only writer, and readers want no order.
            book.store(book.load(Ordering::Relaxed) + spent, Ordering::Relaxed);
            self.turns.store(turn.turns, Ordering::Relaxed);
            let causes = turn.take_causes();
            self.longest.note(spent, causes);
            turn.since = now;
            turn.idle_turns = 0;
        }
    }

    /// Sleeps until somebody publishes a queue: with nothing to poll there is nothing to miss.
    #[cold]
    fn sleep(&self, reader: &mut Reader, turn: &mut Turn) {
        reader.offline();
        // A set published before the wake-up was taken is found at the next turn; one published
        // after it has signalled again.
        if self.wake.take() == 0 {
            self.wake.wait();
        }
        reader.online();
        let now = turn.read_clock();
        let spent = now.saturating_sub(turn.since);
        self.idle_ticks.store(self.idle_ticks.load(Ordering::Relaxed) + spent, Ordering::Relaxed);
        turn.since = now;
        turn.woken();
    }

    /// Where it runs.
    #[must_use]
    pub fn core(&self) -> Core {
        self.core
    }

    /// Publishes `queues` as what the reactor polls, and wakes it.
    pub fn publish(&self, queues: Vec<Arc<Queue>>, reclaim: &Reclaim) {
        reclaim.free(self.poll_set.replace(Box::new(PollSet::new(queues))));
        self.wake.signal();
    }

    /// Asks it to end after its turn.
    pub fn shut_down(&self) {
        self.shutdown.store(true, Ordering::Relaxed);
        self.wake.signal();
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
            queues: 0,
        }
    }
}

/// A reactor without a thread, which makes a turn when it is told to.
#[derive(Debug)]
pub struct SteppedReactor {
    reactor: Arc<Reactor>,
    reader: Reader,
    turn: Turn,
    events: Arc<Events>,
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
        Ok(Self { reactor, reader, turn: Turn::new(), events })
    }

    /// Makes one turn; `false` if there was no queue to poll.
    pub fn step(&mut self) -> bool {
        self.reactor.poll_once(&mut self.reader, &mut self.turn, &self.events)
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
