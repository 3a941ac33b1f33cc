//! The threads that serve queues: one per core, each with a list of queues that it owns. They poll,
//! or sleep when there is nothing to do.
#![expect(unsafe_code, reason = "visits queues as their owner; pins threads; reads the TSC")]

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use qsbr::{Domain, Published, Reader};

use crate::clock::ticks_per_second;
use crate::event_fd::EventFd;
use crate::events::Events;
use crate::iteration::{Cause, Iteration, LongestIteration};
use crate::poll_set::PollSet;
use crate::pollable::{Pollable, Wait};
use crate::reclaim::Reclaim;
use crate::waker::Waker;

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

/// Idle iterations between two readings of the clock: at a few nanoseconds a iteration, about a microsecond.
const IDLE_ITERATIONS_PER_CLOCK: u32 = 256;

/// What others see of a reactor.
#[derive(Debug)]
pub struct Reactor<E> {
    core: Core,
    mode: Mode,
    poll_set: Published<PollSet<E>>,
    /// Wakes it when it sleeps.
    waker: Arc<Waker>,
    /// The control side's hand on the waker. Never read.
    wake: EventFd,
    asleep: AtomicBool,
    sleeps: AtomicU64,
    shutdown: AtomicBool,
    tid: AtomicU64,
    iterations: AtomicU64,
    busy_ticks: AtomicU64,
    idle_ticks: AtomicU64,
    longest: LongestIteration,
}

/// A reactor as the operator sees it. Times are in ticks of the time-stamp counter.
#[derive(Clone, Debug)]
pub struct ReactorInfo {
    /// Where it runs.
    pub core: Core,
    /// Its thread's id.
    pub tid: u64,
    /// Time in iterations that found something to do.
    pub busy_ticks: u64,
    /// Time in the others, asleep included.
    pub idle_ticks: u64,
    /// Turns made.
    pub iterations: u64,
    /// Times that it has gone to sleep.
    pub sleeps: u64,
    /// Whether it sleeps rather than polls: always so in interrupt mode, right now otherwise.
    pub in_interrupt: bool,
    /// Queues attached.
    pub queues: usize,
}

/// What comes after a iteration.
enum Next {
    /// Another one.
    Iteration,
    /// A sleep, until then at the most.
    Sleep(Option<Instant>),
}

impl<E: Send + 'static> Reactor<E> {
    /// A reactor without a thread: see [`SteppedReactor`].
    ///
    /// # Errors
    /// Out of fds.
    pub fn new(core: Core, domain: &Arc<Domain>, mode: Mode) -> io::Result<Self> {
        let (waker, wake) = (Waker::new()?, EventFd::new()?);
        waker.watch(wake.as_fd())?;
        Ok(Self {
            core,
            mode,
            poll_set: Published::new(domain, Box::default()),
            waker: Arc::new(waker),
            wake,
            asleep: AtomicBool::new(false),
            sleeps: AtomicU64::new(0),
            shutdown: AtomicBool::new(false),
            tid: AtomicU64::new(0),
            iterations: AtomicU64::new(0),
            busy_ticks: AtomicU64::new(0),
            idle_ticks: AtomicU64::new(0),
            longest: LongestIteration::default(),
        })
    }

    /// Starts a reactor on `core`. `on_start` is called on its thread before its first iteration.
    ///
    /// # Errors
    /// The core does not exist, or may not be used, or the system has no thread to give.
    pub fn start(
        core: Core,
        domain: &Arc<Domain>,
        events: &Arc<Events<E>>,
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

    fn run(&self, mut reader: Reader, events: &Events<E>) {
        // SAFETY: a query without side effects.
        self.tid.store(unsafe { libc::gettid() } as u64, Ordering::Relaxed);
        let mut iteration = Iteration::new();
        reader.online();
        while !self.shutdown.load(Ordering::Relaxed) {
            let Next::Sleep(until) = self.poll_once(&mut reader, &mut iteration, events) else {
                continue;
            };
            self.sleep(&mut reader, &mut iteration, until);
        }
    }

    /// One iteration, and what is to come after it.
    #[inline]
    fn poll_once(
        &self,
        reader: &mut Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> Next {
        let changed = reader.quiesce() | iteration.take_woken();
        // SAFETY: the reader is online and of the one domain that there is.
        let set = unsafe { self.poll_set.load(reader) };
        // SAFETY: the set was published to this reactor, and `changed` is about this iteration.
        let worked = unsafe { set.iteration(changed, reader, iteration, events) };
        let read_clock = self.account(iteration, worked);
        if set.is_empty() {
            return Next::Sleep(None);
        }
        match self.mode {
            Mode::Poll => Next::Iteration,
            Mode::Sleep { after_us: 0 } if worked => Next::Iteration,
            Mode::Sleep { after_us: 0 } => self.rest(set, reader, iteration),
            Mode::Sleep { after_us } if read_clock && !worked => {
                let idle = iteration.now_ticks().saturating_sub(iteration.worked_ticks);
                let after = after_us.saturating_mul(iteration.ticks_per_second() / 1_000_000);
                if idle < after { Next::Iteration } else { self.rest(set, reader, iteration) }
            }
            Mode::Sleep { .. } => Next::Iteration,
        }
    }

    /// Prepares a sleep, if nothing wants to be polled.
    fn rest(&self, set: &PollSet<E>, reader: &Reader, iteration: &Iteration) -> Next {
        // SAFETY: in the iteration of this set, on its reactor.
        match unsafe { set.arm(reader, iteration) } {
            Wait::Poll => Next::Iteration,
            Wait::Event => Next::Sleep(None),
            Wait::Until(until) => Next::Sleep(Some(until)),
        }
    }

    /// Books the time since the last booking as busy or idle, if the clock was read.
    #[inline]
    fn account(&self, iteration: &mut Iteration, worked: bool) -> bool {
        iteration.iterations += 1;
        iteration.idle_iterations = if worked { 0 } else { iteration.idle_iterations + 1 };
        if worked || iteration.idle_iterations == IDLE_ITERATIONS_PER_CLOCK {
            // Work ends with a reading of the clock.
            let now = if worked { iteration.now_ticks() } else { iteration.read_clock() };
            let book = if worked { &self.busy_ticks } else { &self.idle_ticks };
            let spent = enter(book, iteration, now);
            self.iterations.store(iteration.iterations, Ordering::Relaxed);
            let causes = iteration.take_causes();
            self.longest.note(spent, causes);
            iteration.idle_iterations = 0;
            if worked {
                iteration.worked_ticks = now;
            }
            return true;
        }
        false
    }

    /// Sleeps until a guest kicks, a disk has something, the control side has changed something, or
    /// `until`.
    ///
    /// What a guest publishes after [`PollSet::arm`] has looked comes with a kick. What the control
    /// side publishes comes with a ring of the waker, and what it published before the last iteration was
    /// seen in that; a ring that came in between makes this sleep a short one.
    #[cold]
    fn sleep(&self, reader: &mut Reader, iteration: &mut Iteration, until: Option<Instant>) {
        self.asleep.store(true, Ordering::Relaxed);
        reader.offline();
        self.waker.wait(until);
        reader.online();
        self.asleep.store(false, Ordering::Relaxed);
        self.sleeps.store(self.sleeps.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let now = iteration.read_clock();
        enter(&self.idle_ticks, iteration, now);
        iteration.worked_ticks = now;
        iteration.woken();
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
    pub fn waker(&self) -> Option<&Arc<Waker>> {
        (self.mode != Mode::Poll).then_some(&self.waker)
    }

    /// Publishes `queues` as what the reactor polls, and wakes it.
    pub fn publish(&self, queues: Vec<Arc<dyn Pollable<E>>>, reclaim: &Reclaim) {
        self.publish_with(queues, false, reclaim);
    }

    /// As [`Reactor::publish`]. `orphans`: I/O that this reactor has submitted is in flight on queues
    /// that have moved away; see [`PollSet::new`].
    pub fn publish_with(
        &self,
        queues: Vec<Arc<dyn Pollable<E>>>,
        orphans: bool,
        reclaim: &Reclaim,
    ) {
        reclaim.free(self.poll_set.replace(Box::new(PollSet::new(queues, orphans))));
        self.wake();
    }

    /// Asks it to end after its iteration.
    pub fn shut_down(&self) {
        self.shutdown.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Its longest iteration so far; with `reset`, the next answer is about what comes after.
    #[must_use]
    pub fn longest_iteration(&self, reset: bool) -> (u64, Vec<Cause>) {
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
            iterations: self.iterations.load(Ordering::Relaxed),
            sleeps: self.sleeps.load(Ordering::Relaxed),
            in_interrupt: self.mode == Mode::Sleep { after_us: 0 }
                || self.asleep.load(Ordering::Relaxed),
            queues: 0,
        }
    }
}

/// Adds the time since the last entry to a book and answers with it.
#[inline]
fn enter(book: &AtomicU64, iteration: &mut Iteration, now: u64) -> u64 {
    let spent = now.saturating_sub(iteration.since);
    // Relaxed: the reactor's thread is the only writer, and readers want no order.
    book.store(book.load(Ordering::Relaxed) + spent, Ordering::Relaxed);
    iteration.since = now;
    spent
}

/// A reactor without a thread, which makes a iteration when it is told to.
#[derive(Debug)]
pub struct SteppedReactor<E> {
    reactor: Arc<Reactor<E>>,
    reader: Reader,
    iteration: Iteration,
    events: Arc<Events<E>>,
    /// It sleeps, until then at the most.
    sleeping: Option<Option<Instant>>,
}

impl<E: Send + 'static> SteppedReactor<E> {
    /// Takes over `reactor`, which nobody else may step.
    ///
    /// # Errors
    /// The domain has no room for another reader.
    pub fn new(
        reactor: &Arc<Reactor<E>>,
        domain: &Arc<Domain>,
        events: &Arc<Events<E>>,
    ) -> io::Result<Self> {
        let mut reader =
            domain.reader().ok_or_else(|| io::Error::other("more reactors than readers"))?;
        reader.online();
        let (reactor, events) = (Arc::clone(reactor), Arc::clone(events));
        Ok(Self { reactor, reader, iteration: Iteration::new(), events, sleeping: None })
    }

    /// Makes one iteration, unless it sleeps and nothing has woken it; says whether it sleeps now.
    pub fn step(&mut self) -> bool {
        if let Some(until) = self.sleeping {
            // A limit is one that has passed: here is no time.
            if until.is_none() && !self.reactor.waker.wait(Some(Instant::now())) {
                return true;
            }
            self.reader.online();
            self.iteration.woken();
        }
        self.sleeping = None;
        if let Next::Sleep(until) =
            self.reactor.poll_once(&mut self.reader, &mut self.iteration, &self.events)
        {
            self.reader.offline();
            self.sleeping = Some(until);
        }
        self.sleeping.is_some()
    }

    /// What wakes it, if it ever sleeps.
    #[must_use]
    pub fn waker(&self) -> Option<&Arc<Waker>> {
        self.reactor.waker()
    }

    /// Whether it knows of I/O in flight of queues that were moved to other reactors.
    #[must_use]
    pub fn has_orphans(&mut self) -> bool {
        self.reader.online();
        // SAFETY: of its domain, and online.
        let orphans = unsafe { self.reactor.poll_set.load(&self.reader) }.has_orphans();
        if self.sleeping.is_some() {
            self.reader.offline();
        }
        orphans
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
