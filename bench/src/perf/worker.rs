//! A thread that keeps its queues under load until the time is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use front_end::event::{self, EventFd};
use front_end::prepared::Virtqueue;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::load::Idle;
use crate::perf::clock::Clock;
use crate::perf::lane::{Lane, Shown, Tally};
use crate::perf::work::Work;

/// Turns without a completion between two looks at the clock and at who wants the load to end.
const SPINS: u32 = 256;
/// How long a sleeping load takes at most to notice that it should stop.
const NAP: Duration = Duration::from_millis(50);

/// When things happen, in ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// The ramp is over, measuring begins.
    pub(crate) start: u64,
    /// No more is submitted.
    pub(crate) end: u64,
    /// How long nothing may complete after the end.
    pub(crate) patience: u64,
}

/// What all workers are told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orders<'a> {
    /// When to do what.
    pub(crate) schedule: Schedule,
    /// What to do when nothing has completed.
    pub(crate) idle: Idle,
    /// Submit no more, and wait for what is in flight.
    pub(crate) stop: &'a AtomicBool,
    /// Do not wait either.
    pub(crate) abandon: &'a AtomicBool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) tally: Tally,
    /// When the last request came back or was given up.
    pub(crate) ended: u64,
    /// Requests that have not come back.
    pub(crate) outstanding: usize,
    /// Requests that were due and were not submitted.
    pub(crate) unsubmitted: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Ramp,
    Measure,
    Drain,
}

pub(crate) struct Worker<'a, V, W> {
    lanes: Vec<Lane<'a, V, W>>,
    clock: Clock,
    orders: Orders<'a>,
    completed: &'a Shown,
    tally: Tally,
    calls: &'a [Arc<EventFd>],
    waits: Vec<PollFd<'a>>,
    phase: Phase,
    /// When the phase ends by itself.
    phase_end: u64,
    stopped: u64,
    /// All completions since the beginning.
    total: u64,
}

impl<'a, V: Virtqueue, W: Work> Worker<'a, V, W> {
    /// Counts into `tally`, whose time line begins where the schedule says that measuring does, and
    /// shows in `completed` how much has completed so far. `calls` are the call fds of the lanes.
    pub(crate) fn new(
        lanes: Vec<Lane<'a, V, W>>,
        calls: &'a [Arc<EventFd>],
        clock: Clock,
        orders: Orders<'a>,
        completed: &'a Shown,
        tally: Tally,
    ) -> Self {
        Self {
            lanes,
            clock,
            orders,
            completed,
            tally,
            calls,
            waits: calls
                .iter()
                .map(|fd| PollFd::from_borrowed_fd(event::as_fd(fd), PollFlags::IN))
                .collect(),
            phase: Phase::Ramp,
            phase_end: orders.schedule.start,
            stopped: 0,
            total: 0,
        }
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The system or the device broke off.
    pub(crate) fn run(mut self) -> Result<Finding> {
        let mut spins = 0_u32;
        let mut last = self.clock.now();
        loop {
            let (completed, seen) = self.turn()?;
            let now = if completed > 0 {
                spins = 0;
                last = seen;
                self.total += completed as u64;
                self.completed.show(self.total);
                seen
            } else if self.orders.idle == Idle::Sleep {
                self.sleep()?;
                self.clock.now()
            } else {
                // Without a pause, which takes as long as half a request to a near core does. What is
                // looked at is in this core's cache until the device writes it.
                spins = spins.wrapping_add(1);
                if !spins.is_multiple_of(SPINS) {
                    continue;
                }
                self.clock.now()
            };
            if self.is_over(now, last)? {
                return Ok(self.finish(now));
            }
        }
    }

    /// Visits each queue once: takes what has completed, which makes room for what is submitted
    /// then. Returns how many requests have completed, and when that was last seen.
    #[inline]
    fn turn(&mut self) -> Result<(usize, u64)> {
        let mut sum = 0;
        let mut when = 0;
        for lane in &mut self.lanes {
            let (completed, seen) = lane.reap(&self.clock, &mut self.tally)?;
            if completed > 0 {
                sum += completed;
                when = seen;
            } else {
                // The device may want a kick after all: see `Virtqueue`.
                lane.kick()?;
            }
            if self.phase != Phase::Drain {
                lane.submit(&self.clock)?;
            }
        }
        Ok((sum, when))
    }

    /// Goes on to the next phase if it is time. Whether all is over.
    #[inline]
    fn is_over(&mut self, now: u64, last: u64) -> Result<bool> {
        if self.phase != Phase::Drain {
            if now >= self.phase_end || self.orders.stop.load(Ordering::Relaxed) {
                self.next_phase(now)?;
            }
            if self.phase != Phase::Drain {
                return Ok(self.orders.abandon.load(Ordering::Relaxed));
            }
        }
        let over = self.in_flight() == 0
            || self.orders.abandon.load(Ordering::Relaxed)
            || now.saturating_sub(last.max(self.stopped)) > self.orders.schedule.patience;
        Ok(over)
    }

    #[cold]
    fn next_phase(&mut self, now: u64) -> Result<()> {
        if self.phase == Phase::Ramp && now >= self.phase_end {
            self.forget();
            self.lanes.iter_mut().for_each(|lane| lane.begin_gap(now));
            (self.phase, self.phase_end) = (Phase::Measure, self.orders.schedule.end);
        }
        let stop = self.orders.stop.load(Ordering::Relaxed);
        if stop || self.phase == Phase::Measure && now >= self.phase_end {
            // What was due by now, as far as there is room.
            for lane in &mut self.lanes {
                lane.submit(&self.clock)?;
            }
            (self.phase, self.phase_end, self.stopped) = (Phase::Drain, u64::MAX, now);
        }
        Ok(())
    }

    /// Forgets all that was counted.
    fn forget(&mut self) {
        self.tally = Tally::new(self.tally.timeline.emptied());
    }

    fn in_flight(&self) -> usize {
        self.lanes.iter().map(Lane::in_flight).sum()
    }

    fn finish(mut self, now: u64) -> Finding {
        self.lanes.iter().for_each(|lane| lane.end(now, &mut self.tally));
        if now < self.orders.schedule.start {
            // Stopped in the ramp.
            self.forget();
        }
        let stopped = if self.phase == Phase::Drain { self.stopped } else { now };
        Finding {
            ended: now,
            outstanding: self.in_flight(),
            unsubmitted: self.lanes.iter().map(|lane| lane.due_before(stopped)).sum(),
            tally: self.tally,
        }
    }

    /// Sleeps until a device calls, or something is to be done at a certain time.
    fn sleep(&mut self) -> Result<()> {
        self.lanes.iter_mut().for_each(|lane| lane.queue().ask_for_call());
        // If our asking comes first, the device sees it and calls; if its completion comes first,
        // the look below sees that. The same goes for what was published and its wish for a kick.
        fence(Ordering::SeqCst);
        for lane in &mut self.lanes {
            lane.kick()?;
        }
        if !self.lanes.iter_mut().any(|lane| lane.queue().has_completion()) {
            let nap = self.nap();
            self.wait_for_calls(nap)?;
        }
        self.lanes.iter_mut().for_each(|lane| lane.queue().refuse_calls());
        Ok(())
    }

    /// How long nothing has to be done unless a device calls.
    fn nap(&self) -> Duration {
        let now = self.clock.now();
        let due = self.lanes.iter().filter_map(Lane::due).min();
        let due = due.filter(|_| self.phase != Phase::Drain).unwrap_or(u64::MAX);
        let ticks = due.min(self.phase_end).saturating_sub(now);
        Duration::from_nanos(self.clock.ns(ticks)).min(NAP)
    }

    fn wait_for_calls(&mut self, limit: Duration) -> Result<()> {
        let limit =
            Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        match poll(&mut self.waits, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(Error::system("cannot wait for a call")(e)),
        }
        // Empty eventfds are fine: most have not been called.
        self.calls.iter().for_each(|fd| drop(fd.read()));
        Ok(())
    }
}
