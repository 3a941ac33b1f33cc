//! Reactors: threads that serve queues, one per core. Each polls the queues that it owns, or sleeps
//! while there is no work.
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

/// What a reactor does while there is no work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Polls all the time, unless it has no queue.
    #[default]
    Poll,
    /// Polls for some microseconds, then sleeps until a guest kicks, I/O of a disk completes, or
    /// the control side changes something. 0 is SPDK's interrupt mode.
    Sleep {
        /// Microseconds without work before a sleep.
        after_us: u64,
    },
}

/// A CPU core, by its number in Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Core(pub usize);

/// A function that a reactor's thread calls before its first iteration.
pub type OnStart = Arc<dyn Fn() + Send + Sync>;

/// Idle iterations between two readings of the clock: at a few nanoseconds per iteration, about a
/// microsecond.
const IDLE_ITERATIONS_PER_CLOCK: u32 = 256;

/// A reactor, as other threads share it.
#[derive(Debug)]
pub struct Reactor<E> {
    core: Core,
    mode: Mode,
    poll_set: Published<PollSet<E>>,
    /// Wakes the reactor when it sleeps.
    waker: Arc<Waker>,
    /// The wake source of the control side. Never read.
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
    /// Its core.
    pub core: Core,
    /// Its thread's id.
    pub tid: u64,
    /// Time in iterations with work.
    pub busy_ticks: u64,
    /// Time in iterations without work, and asleep.
    pub idle_ticks: u64,
    /// Number of iterations.
    pub iterations: u64,
    /// Number of sleeps.
    pub sleeps: u64,
    /// Whether it is in interrupt mode, or asleep at the moment.
    pub in_interrupt: bool,
    /// Whether it is asleep at the moment.
    pub asleep: bool,
    /// Number of queues that it polls.
    pub queues: usize,
}

/// What follows an iteration.
enum Next {
    /// Another iteration.
    Iteration,
    /// A sleep, at most until the time, if there is one.
    Sleep(Option<Instant>),
}

impl<E: Send + 'static> Reactor<E> {
    /// Creates a reactor without a thread; see [`SteppedReactor`].
    ///
    /// # Errors
    /// The process has no fd left.
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

    /// Starts a reactor on `core`. Its thread calls `on_start` before its first iteration.
    ///
    /// # Errors
    /// The core does not exist, the process may not use it, or the system cannot start a thread.
    pub fn start(
        core: Core,
        domain: &Arc<Domain>,
        events: &Arc<Events<E>>,
        mode: Mode,
        on_start: OnStart,
    ) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let reactor = Arc::new(Self::new(core, domain, mode)?);
        let reader = domain
            .reader()
            .ok_or_else(|| io::Error::other("no QSBR reader is free for another reactor"))?;
        // Measures the frequency now, so that the reactor does not.
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

    /// Runs one iteration. Returns what follows it.
    #[inline]
    fn poll_once(
        &self,
        reader: &mut Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> Next {
        let changed = reader.quiesce() | iteration.take_woken();
        // SAFETY: the reader is online, and there is only one domain.
        let set = unsafe { self.poll_set.load(reader) };
        // SAFETY: the set was published to this reactor, and `changed` is up to date in this
        // iteration.
        let worked = unsafe { set.iteration(changed, reader, iteration, events) };
        let read_clock = self.account(iteration, worked);
        if set.is_empty() {
            return Next::Sleep(None);
        }
        match self.mode {
            Mode::Poll => Next::Iteration,
            Mode::Sleep { after_us: 0 } if worked => Next::Iteration,
            Mode::Sleep { after_us: 0 } => self.prepare_sleep(set, reader, iteration),
            Mode::Sleep { after_us } if read_clock && !worked => {
                let idle = iteration.now_ticks().saturating_sub(iteration.worked_ticks);
                let after = after_us.saturating_mul(iteration.ticks_per_second() / 1_000_000);
                if idle < after {
                    Next::Iteration
                } else {
                    self.prepare_sleep(set, reader, iteration)
                }
            }
            Mode::Sleep { .. } => Next::Iteration,
        }
    }

    /// Prepares a sleep, unless a pollable needs to be polled.
    fn prepare_sleep(&self, set: &PollSet<E>, reader: &Reader, iteration: &Iteration) -> Next {
        // SAFETY: called in the iteration of this set, on its reactor.
        match unsafe { set.arm(reader, iteration) } {
            Wait::Poll => Next::Iteration,
            Wait::Event => Next::Sleep(None),
            Wait::Until(until) => Next::Sleep(Some(until)),
        }
    }

    /// If the clock was read, accounts the time since the last entry as busy or idle, and returns
    /// true.
    #[inline]
    fn account(&self, iteration: &mut Iteration, worked: bool) -> bool {
        iteration.iterations += 1;
        iteration.idle_iterations = if worked { 0 } else { iteration.idle_iterations + 1 };
        if worked || iteration.idle_iterations == IDLE_ITERATIONS_PER_CLOCK {
            // An iteration with work has read the clock at its end.
            let now = if worked { iteration.now_ticks() } else { iteration.read_clock() };
            let account = if worked { &self.busy_ticks } else { &self.idle_ticks };
            let spent = account_time(account, iteration, now);
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

    /// Sleeps until a guest kicks, I/O of a disk completes, the control side changes something, or
    /// `until` has come.
    ///
    /// No work is missed. A chain that a guest makes available after [`PollSet::arm`] has checked
    /// the ring comes with a kick. A change that the control side published before the last
    /// iteration was seen in that iteration. A later change signals the wake source; if it did so
    /// before the sleep, the sleep ends at once.
    #[cold]
    fn sleep(&self, reader: &mut Reader, iteration: &mut Iteration, until: Option<Instant>) {
        self.asleep.store(true, Ordering::Relaxed);
        reader.offline();
        self.waker.wait(until);
        reader.online();
        self.sleeps.store(self.sleeps.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // Whoever sees that it is awake sees that it has slept.
        self.asleep.store(false, Ordering::Release);
        let now = iteration.read_clock();
        account_time(&self.idle_ticks, iteration, now);
        iteration.worked_ticks = now;
        iteration.woken();
    }

    /// Its core.
    #[must_use]
    pub fn core(&self) -> Core {
        self.core
    }

    /// Wakes the reactor if it sleeps, so that it sees what was published to it.
    pub fn wake(&self) {
        self.wake.signal();
    }

    /// The waker, if the reactor ever sleeps while it has queues.
    pub fn waker(&self) -> Option<&Arc<Waker>> {
        (self.mode != Mode::Poll).then_some(&self.waker)
    }

    /// Replaces the reactor's poll set by one of `queues`, and wakes the reactor.
    pub fn publish(&self, queues: Vec<Arc<dyn Pollable<E>>>, reclaim: &Reclaim) {
        self.publish_with(queues, false, reclaim);
    }

    /// As [`Reactor::publish`]. `orphans`: the reactor has orphan I/O, I/O in flight that it
    /// submitted for queues that have moved to another reactor. It then makes a system call now and
    /// then, so that this I/O completes.
    pub fn publish_with(
        &self,
        queues: Vec<Arc<dyn Pollable<E>>>,
        orphans: bool,
        reclaim: &Reclaim,
    ) {
        reclaim.free(self.poll_set.replace(Box::new(PollSet::new(queues, orphans))));
        self.wake();
    }

    /// Requests that the reactor ends after its current iteration.
    pub fn shut_down(&self) {
        self.shutdown.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Returns the ticks of the longest iteration so far, and its causes. `reset` starts a new
    /// measurement.
    #[must_use]
    pub fn longest_iteration(&self, reset: bool) -> (u64, Vec<Cause>) {
        self.longest.read(reset)
    }

    /// A snapshot of the counters. The caller fills in `queues`.
    #[must_use]
    pub fn info(&self) -> ReactorInfo {
        let asleep = self.asleep.load(Ordering::Acquire);
        ReactorInfo {
            core: self.core,
            tid: self.tid.load(Ordering::Relaxed),
            busy_ticks: self.busy_ticks.load(Ordering::Relaxed),
            idle_ticks: self.idle_ticks.load(Ordering::Relaxed),
            iterations: self.iterations.load(Ordering::Relaxed),
            sleeps: self.sleeps.load(Ordering::Relaxed),
            in_interrupt: self.mode == Mode::Sleep { after_us: 0 } || asleep,
            asleep,
            queues: 0,
        }
    }
}

/// Adds the time since the last entry to `account`, and returns that time.
#[inline]
fn account_time(account: &AtomicU64, iteration: &mut Iteration, now: u64) -> u64 {
    let spent = now.saturating_sub(iteration.since);
    // Relaxed: the reactor's thread is the only writer, and readers need no order.
    account.store(account.load(Ordering::Relaxed) + spent, Ordering::Relaxed);
    iteration.since = now;
    spent
}

/// A reactor without a thread, whose iterations the caller runs one by one.
#[derive(Debug)]
pub struct SteppedReactor<E> {
    reactor: Arc<Reactor<E>>,
    reader: Reader,
    iteration: Iteration,
    events: Arc<Events<E>>,
    /// The reactor sleeps, at most until the inner time.
    sleeping: Option<Option<Instant>>,
}

impl<E: Send + 'static> SteppedReactor<E> {
    /// Creates a stepped reactor from `reactor`, which no other thread may run.
    ///
    /// # Errors
    /// The domain has no room for another reader.
    pub fn new(
        reactor: &Arc<Reactor<E>>,
        domain: &Arc<Domain>,
        events: &Arc<Events<E>>,
    ) -> io::Result<Self> {
        let mut reader = domain
            .reader()
            .ok_or_else(|| io::Error::other("no QSBR reader is free for another reactor"))?;
        reader.online();
        let (reactor, events) = (Arc::clone(reactor), Arc::clone(events));
        Ok(Self { reactor, reader, iteration: Iteration::new(), events, sleeping: None })
    }

    /// Runs one iteration, unless the reactor sleeps and nothing has woken it. Returns whether it
    /// sleeps now.
    pub fn step(&mut self) -> bool {
        if let Some(until) = self.sleeping {
            // A sleep with a limit ends at once, because a stepped reactor has no clock.
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

    /// The waker, if the reactor ever sleeps.
    #[must_use]
    pub fn waker(&self) -> Option<&Arc<Waker>> {
        self.reactor.waker()
    }

    /// Returns whether the reactor has orphan I/O.
    #[must_use]
    pub fn has_orphans(&mut self) -> bool {
        self.reader.online();
        // SAFETY: the reader is online and belongs to the reactor's domain.
        let orphans = unsafe { self.reactor.poll_set.load(&self.reader) }.has_orphans();
        if self.sleeping.is_some() {
            self.reader.offline();
        }
        orphans
    }
}

/// Pins the calling thread to one core.
fn pin_to(core: Core) -> io::Result<()> {
    // SAFETY: all zeroes is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core.0 >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the index was checked.
    unsafe { libc::CPU_SET(core.0, &mut set) };
    // SAFETY: `set` is a local variable; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
