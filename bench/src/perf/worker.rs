//! A thread of the load, which serves its queues until the end of the run.

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
use crate::perf::lane::{Lane, SharedCounter, Tally};
use crate::perf::work::Work;

/// Iterations without a completion between two readings of the clock and of the stop flags.
const SPINS: u32 = 256;
/// The longest sleep: the time that a sleeping thread takes to see a stop flag.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// The times of a run, in ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// The end of the ramp, and start of the measurement.
    pub(crate) start: u64,
    /// The end of submissions.
    pub(crate) end: u64,
    /// Limit on the time without completions after the end.
    pub(crate) drain_limit: u64,
}

/// The parameters of all workers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerOptions<'a> {
    /// The times of the run.
    pub(crate) schedule: Schedule,
    /// What to do without completions.
    pub(crate) idle: Idle,
    /// Stop submitting, and wait for requests in flight.
    pub(crate) stop: &'a AtomicBool,
    /// End without waiting for requests in flight.
    pub(crate) abandon: &'a AtomicBool,
}

/// The result of a worker.
#[derive(Debug)]
pub(crate) struct WorkerResult {
    pub(crate) tally: Tally,
    /// The time at which the last request completed or was given up.
    pub(crate) ended: u64,
    /// Requests that have not completed.
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

/// The state of a thread.
pub(crate) struct Worker<'a, 'q, V: Virtqueue, W> {
    lanes: Vec<Lane<'q, V, W>>,
    clock: Clock,
    options: WorkerOptions<'a>,
    completed: &'a SharedCounter,
    tally: Tally,
    calls: &'a [Arc<EventFd>],
    waits: Vec<PollFd<'a>>,
    phase: Phase,
    /// The scheduled end of the phase.
    phase_end: u64,
    /// The time at which the drain phase began.
    stopped: u64,
    /// All completions, with those in the ramp.
    total: u64,
}

impl<'a, 'q, V: Virtqueue, W: Work> Worker<'a, 'q, V, W> {
    /// A worker that counts into `tally`, whose time line starts at `options.schedule.start`. It
    /// shows the number of completions in `completed`. `calls` are the call fds of the lanes.
    pub(crate) fn new(
        lanes: Vec<Lane<'q, V, W>>,
        calls: &'a [Arc<EventFd>],
        clock: Clock,
        options: WorkerOptions<'a>,
        completed: &'a SharedCounter,
        tally: Tally,
    ) -> Self {
        Self {
            lanes,
            clock,
            options,
            completed,
            tally,
            calls,
            waits: calls
                .iter()
                .map(|fd| PollFd::from_borrowed_fd(event::as_fd(fd), PollFlags::IN))
                .collect(),
            phase: Phase::Ramp,
            phase_end: options.schedule.start,
            stopped: 0,
            total: 0,
        }
    }

    /// Runs until the end of the run.
    ///
    /// # Errors
    /// A system call failed, or the device returned an invalid completion.
    pub(crate) fn run(mut self) -> Result<WorkerResult> {
        let mut spins = 0_u32;
        let mut last = self.clock.now();
        loop {
            let (completed, seen) = self.poll_once()?;
            let now = if completed > 0 {
                spins = 0;
                last = seen;
                self.total += completed as u64;
                self.completed.set(self.total);
                seen
            } else if self.options.idle == Idle::Sleep {
                self.sleep()?;
                self.clock.now()
            } else {
                // No PAUSE instruction: it takes as long as half a request to a near core. The
                // polled cache lines stay in this core's cache until the device writes to them.
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

    /// Visits each queue once: takes completed requests first, which frees slots, and then submits.
    /// Returns the number of completed requests, and the time of the last ones.
    #[inline]
    fn poll_once(&mut self) -> Result<(usize, u64)> {
        let mut sum = 0;
        let mut when = 0;
        for lane in &mut self.lanes {
            let (completed, seen) = lane.reap(&self.clock, &mut self.tally)?;
            if completed > 0 {
                sum += completed;
                when = seen;
            } else {
                // The device may want a kick now: see `Virtqueue`.
                lane.kick()?;
            }
            if self.phase != Phase::Drain {
                lane.submit(&self.clock)?;
            }
        }
        Ok((sum, when))
    }

    /// Enters the next phase if it is time. Returns whether the run has ended.
    #[inline]
    fn is_over(&mut self, now: u64, last: u64) -> Result<bool> {
        if self.phase != Phase::Drain {
            if now >= self.phase_end || self.options.stop.load(Ordering::Relaxed) {
                self.next_phase(now)?;
            }
            if self.phase != Phase::Drain {
                return Ok(self.options.abandon.load(Ordering::Relaxed));
            }
        }
        let over = self.in_flight() == 0
            || self.options.abandon.load(Ordering::Relaxed)
            || now.saturating_sub(last.max(self.stopped)) > self.options.schedule.drain_limit;
        Ok(over)
    }

    #[cold]
    fn next_phase(&mut self, now: u64) -> Result<()> {
        if self.phase == Phase::Ramp && now >= self.phase_end {
            self.reset_tally();
            self.lanes.iter_mut().for_each(|lane| lane.begin_gap(now));
            (self.phase, self.phase_end) = (Phase::Measure, self.options.schedule.end);
        }
        let stop = self.options.stop.load(Ordering::Relaxed);
        if stop || self.phase == Phase::Measure && now >= self.phase_end {
            // Submits the requests that are due, as far as slots are free.
            for lane in &mut self.lanes {
                lane.submit(&self.clock)?;
            }
            (self.phase, self.phase_end, self.stopped) = (Phase::Drain, u64::MAX, now);
        }
        Ok(())
    }

    /// Resets the counters.
    fn reset_tally(&mut self) {
        self.tally = Tally::new(self.tally.timeline.emptied());
    }

    fn in_flight(&self) -> usize {
        self.lanes.iter().map(Lane::in_flight).sum()
    }

    fn finish(mut self, now: u64) -> WorkerResult {
        self.lanes.iter().for_each(|lane| lane.end(now, &mut self.tally));
        if now < self.options.schedule.start {
            // Stopped in the ramp.
            self.reset_tally();
        }
        let stopped = if self.phase == Phase::Drain { self.stopped } else { now };
        WorkerResult {
            ended: now,
            outstanding: self.in_flight(),
            unsubmitted: self.lanes.iter().map(|lane| lane.due_before(stopped)).sum(),
            tally: self.tally,
        }
    }

    /// Sleeps until a device calls, or until the next scheduled time.
    fn sleep(&mut self) -> Result<()> {
        self.lanes.iter_mut().for_each(|lane| lane.queue().ask_for_call());
        // If the store of the event flags comes first, the device sees it and calls. If the
        // device's completion comes first, `has_completion` sees it. The same holds for published
        // requests and the device's wish for a kick.
        fence(Ordering::SeqCst);
        for lane in &mut self.lanes {
            lane.kick()?;
        }
        if !self.lanes.iter_mut().any(|lane| lane.queue().has_completion()) {
            let time = self.sleep_time();
            self.wait_for_calls(time)?;
        }
        self.lanes.iter_mut().for_each(|lane| lane.queue().refuse_calls());
        Ok(())
    }

    /// How long nothing has to be done unless a device calls.
    fn sleep_time(&self) -> Duration {
        let now = self.clock.now();
        let due = self.lanes.iter().filter_map(Lane::due).min();
        let due = due.filter(|_| self.phase != Phase::Drain).unwrap_or(u64::MAX);
        let ticks = due.min(self.phase_end).saturating_sub(now);
        Duration::from_nanos(self.clock.ns(ticks)).min(SLEEP_MAX)
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
