//! One queue under load: what has completed is counted, and what is free is submitted again.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::{STATUS_OK, STATUS_UNWRITTEN};
use crate::error::{Error, Result};
use crate::perf::clock::Clock;
use crate::perf::histogram::Counts;
use crate::perf::pace::Pace;
use crate::perf::slots::Heads;
use crate::perf::timeline::Timeline;
use crate::perf::virtqueue::Virtqueue;
use crate::perf::work::{Io, SECTOR, Work};
use crate::ring::Ring;

/// Completions that share a look at the clock, and requests that are published together: enough
/// to share the costs, few enough for the device not to wait for the rest.
const BATCH: usize = 16;

/// What a thread has seen while it measured.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    /// Latencies in ticks, of reads and of writes.
    pub(crate) latencies: [Counts; 2],
    pub(crate) timeline: Timeline,
    pub(crate) errors: u64,
    pub(crate) mismatches: u64,
    /// The first error or mismatch, in words.
    pub(crate) first_problem: Option<String>,
}

impl Tally {
    pub(crate) fn new(timeline: Timeline) -> Self {
        let latencies = Default::default();
        Self { latencies, timeline, errors: 0, mismatches: 0, first_problem: None }
    }

    /// Adds what another thread has seen.
    pub(crate) fn add(&mut self, other: Self) {
        self.latencies.iter_mut().zip(&other.latencies).for_each(|(sum, more)| sum.add(more));
        self.timeline.add(&other.timeline);
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.first_problem = self.first_problem.take().or(other.first_problem);
    }
}

/// A request's place in memory.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// When it was submitted, or should have been.
    since: u64,
    write: bool,
}

/// Requests of one kind that completed together and were submitted together.
#[derive(Clone, Copy, Debug, Default)]
struct Alike {
    slot: Slot,
    times: u64,
}

/// A queue, its requests, and the work they do.
pub(crate) struct Lane<'a, V, W> {
    ring: &'a Ring,
    queue: V,
    heads: Heads<'a>,
    work: W,
    pace: Option<Pace>,
    slots: Box<[Slot]>,
    /// Slots that the device does not hold.
    free: Vec<usize>,
    /// When something last completed, or was submitted while the device held nothing.
    last: u64,
}

impl<'a, V: Virtqueue, W: Work> Lane<'a, V, W> {
    pub(crate) fn new(ring: &'a Ring, queue: V, heads: Heads<'a>, depth: usize, work: W) -> Self {
        let slots = vec![Slot::default(); depth].into_boxed_slice();
        let free = (0..depth).rev().collect();
        Self { ring, queue, heads, work, pace: None, slots, free, last: 0 }
    }

    pub(crate) fn queue(&mut self) -> &mut V {
        &mut self.queue
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// When the next request is due, if there is a schedule.
    pub(crate) fn due(&self) -> Option<u64> {
        // What is due already waits for a slot, that is for the device.
        self.pace.filter(|_| !self.free.is_empty()).map(|pace| pace.due())
    }

    /// Requests that were due before `end` and have not been submitted.
    pub(crate) fn due_before(&self, end: u64) -> u64 {
        self.pace.map_or(0, |pace| pace.due_before(end))
    }

    /// Submits from now on as `pace` says, or whenever there is room.
    pub(crate) fn begin(&mut self, now: u64, pace: Option<Pace>) {
        (self.last, self.pace) = (now, pace);
    }

    /// Counts gaps from `now` on.
    pub(crate) fn begin_gap(&mut self, now: u64) {
        self.last = now;
    }

    /// Counts the gap that has not ended.
    pub(crate) fn end(&self, now: u64, tally: &mut Tally) {
        if self.in_flight() > 0 {
            tally.timeline.note(now, self.last, 0);
        }
    }

    /// Takes and counts what has completed, a batch at most. Returns how many that was, and when.
    ///
    /// # Errors
    /// [`Error::NotHeld`]: a device that returns what it does not hold cannot be worked with.
    #[inline]
    pub(crate) fn reap(&mut self, clock: &Clock, tally: &mut Tally) -> Result<(usize, u64)> {
        let Some(mut id) = self.queue.take() else { return Ok((0, 0)) };
        let now = clock.now();
        let mut alike = Alike::default();
        let mut completed = 0;
        loop {
            let Some(&slot) = self.slots.get(id) else { return Err(self.not_held(id)) };
            let status = self.heads.take_status(id);
            let problem = if status == STATUS_OK { None } else { self.bad_status(id, status)? };
            if slot.since != alike.slot.since || slot.write != alike.slot.write {
                alike.record(now, tally);
                alike = Alike { slot, times: 0 };
            }
            alike.times += 1;
            if let Some(problem) = problem {
                tally.errors += 1;
                tally.first_problem.get_or_insert(problem);
            }
            if let Some(problem) = self.work.done(id, status == STATUS_OK)? {
                tally.mismatches += 1;
                tally.first_problem.get_or_insert(problem);
            }
            self.free.push(id);
            completed += 1;
            if completed == BATCH {
                break;
            }
            match self.queue.take() {
                Some(next) => id = next,
                None => break,
            }
        }
        alike.record(now, tally);
        tally.timeline.note(now, self.last, completed as u64);
        self.last = now;
        Ok((completed, now))
    }

    /// Submits what is free, or what of it is due, and kicks the device if it wants that.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    #[inline]
    pub(crate) fn submit(&mut self, clock: &Clock) -> Result<()> {
        if self.free.is_empty() {
            return Ok(());
        }
        let now = clock.now();
        let before = self.free.len();
        while let Some(&slot) = self.free.last() {
            let since = match &mut self.pace {
                None => now,
                Some(pace) => match pace.take(now) {
                    Some(due) => due,
                    None => break,
                },
            };
            self.free.pop();
            let Io { sector, write } = self.work.next(slot)?;
            self.heads.set_sector(slot, sector);
            if write != self.slots[slot].write {
                self.heads.set_kind(slot, write);
                self.queue.set_kind(slot, write);
            }
            self.slots[slot] = Slot { since, write };
            self.queue.give(slot);
        }
        if self.free.len() == before {
            return Ok(());
        }
        self.queue.publish();
        if before == self.slots.len() {
            self.last = now;
        }
        self.kick()
    }

    /// Kicks the device if it wants that for what was published.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    #[inline]
    pub(crate) fn kick(&mut self) -> Result<()> {
        if self.queue.take_kick() {
            self.ring.kick_fd().write(1).map_err(Error::system("cannot kick"))?;
        }
        Ok(())
    }

    #[cold]
    fn not_held(&self, id: usize) -> Error {
        Error::NotHeld { id: id as u32 }
    }

    /// What a status other than OK means.
    #[cold]
    fn bad_status(&self, slot: usize, status: u8) -> Result<Option<String>> {
        if status == STATUS_UNWRITTEN && self.free.contains(&slot) {
            return Err(self.not_held(slot));
        }
        let kind = if self.slots[slot].write { "write" } else { "read" };
        let at = self.heads.sector(slot) * u64::from(SECTOR);
        Ok(Some(match status {
            STATUS_UNWRITTEN => format!("a {kind} at byte {at} came back without a status"),
            _ => format!("a {kind} at byte {at} came back with status {status}"),
        }))
    }
}

impl Alike {
    #[inline]
    fn record(self, now: u64, tally: &mut Tally) {
        if self.times > 0 {
            let latency = now.saturating_sub(self.slot.since);
            tally.latencies[usize::from(self.slot.write)].record(latency, self.times);
        }
    }
}

/// A number that one thread writes often and others read, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Shown(AtomicU64);

impl Shown {
    /// Shows `value`; only one thread may.
    #[inline]
    pub(crate) fn show(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// What was last shown.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
