//! One queue under load: what has completed is counted, and what is free is submitted again.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::{STATUS_OK, STATUS_UNWRITTEN};
use crate::error::{Error, Result};
use crate::perf::clock::Clock;
use crate::perf::histogram::Counts;
use crate::perf::pace::Pace;
use crate::perf::slots::{Head, Slots};
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

/// When a request was submitted, or should have been, and whether it writes: in one number, as
/// requests that completed together and are alike in both are counted together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kind(u64);

impl Kind {
    #[inline]
    fn new(since: u64, write: bool) -> Self {
        Self(since << 1 | u64::from(write))
    }

    #[inline]
    fn since(self) -> u64 {
        self.0 >> 1
    }

    #[inline]
    fn write(self) -> bool {
        self.0 & 1 != 0
    }
}

/// A request's place in memory, and what it was last used for.
#[derive(Clone, Copy, Debug)]
struct Slot<'a> {
    head: Head<'a>,
    kind: Kind,
}

impl Slot<'_> {
    /// Notes that the request came back with `status`, which is not OK.
    #[cold]
    #[inline(never)]
    fn note_failure(&self, status: u8, tally: &mut Tally) {
        let kind = if self.kind.write() { "write" } else { "read" };
        let at = self.head.sector() * u64::from(SECTOR);
        tally.errors += 1;
        tally.first_problem.get_or_insert_with(|| match status {
            STATUS_UNWRITTEN => format!("a {kind} at byte {at} came back without a status"),
            _ => format!("a {kind} at byte {at} came back with status {status}"),
        });
    }
}

/// A queue, its requests, and the work they do.
pub(crate) struct Lane<'a, V, W> {
    ring: &'a Ring,
    queue: V,
    work: W,
    pace: Option<Pace>,
    slots: Box<[Slot<'a>]>,
    /// Slots that the device does not hold.
    free: Free,
    /// When something last completed, or was submitted while the device held nothing.
    last: u64,
}

impl<'a, V: Virtqueue, W: Work> Lane<'a, V, W> {
    pub(crate) fn new(ring: &'a Ring, queue: V, slots: &'a Slots, work: W) -> Self {
        let slots: Box<[_]> =
            slots.heads().map(|head| Slot { head, kind: Kind::default() }).collect();
        let free = Free::all(slots.len());
        Self { ring, queue, work, pace: None, slots, free, last: 0 }
    }

    pub(crate) fn queue(&mut self) -> &mut V {
        &mut self.queue
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.count
    }

    /// When the next request is due, if there is a schedule.
    pub(crate) fn due(&self) -> Option<u64> {
        // What is due already waits for a slot, that is for the device.
        self.pace.filter(|_| self.free.count > 0).map(|pace| pace.due())
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
        let (free, held) = self.free.split();
        let room = held.len().min(BATCH);
        let taken = self.queue.take(&mut held[..room]);
        if taken == 0 {
            // Whatever it gives back while it holds nothing is none of ours.
            return if room == 0 { self.expect_none() } else { Ok((0, 0)) };
        }
        let now = clock.now();
        let (mut alike, mut times) = (Kind::default(), 0);
        for (i, id) in held[..taken].iter().map(|id| usize::from(*id)).enumerate() {
            let Some(slot) = self.slots.get(id) else { return Err(not_held(id)) };
            let status = slot.head.take_status();
            if slot.kind != alike {
                record(tally, now, alike, times);
                (alike, times) = (slot.kind, 0);
            }
            times += 1;
            if status != STATUS_OK {
                slot.note_failure(status, tally);
                let mut others = free.iter().chain(&held[..i]);
                if status == STATUS_UNWRITTEN && others.any(|other| usize::from(*other) == id) {
                    return Err(not_held(id));
                }
            }
            if W::CHECKS && let Some(problem) = self.work.done(id, status == STATUS_OK)? {
                tally.mismatches += 1;
                tally.first_problem.get_or_insert(problem);
            }
        }
        self.free.count += taken;
        record(tally, now, alike, times);
        tally.timeline.note(now, self.last, taken as u64);
        self.last = now;
        Ok((taken, now))
    }

    /// Submits what is free, or what of it is due, and kicks the device if it wants that.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    #[inline]
    pub(crate) fn submit(&mut self, clock: &Clock) -> Result<()> {
        let before = self.free.count;
        if before == 0 {
            return Ok(());
        }
        let now = clock.now();
        if self.pace.is_none() {
            self.give(before, now)?;
        }
        while self.free.count > 0 && let Some(due) = self.pace.as_mut().and_then(|p| p.take(now)) {
            self.give(1, due)?;
        }
        if self.free.count == before {
            return Ok(());
        }
        if before == self.slots.len() {
            self.last = now;
        }
        self.kick()
    }

    /// Gives `count` free slots to the device, with requests that count from `since`.
    #[inline]
    fn give(&mut self, count: usize, since: u64) -> Result<()> {
        let rest = self.free.count - count;
        let given = &self.free.slots[rest..self.free.count];
        self.work.next(given, |id, Io { sector, write }| {
            let slot = &mut self.slots[id];
            slot.head.set_sector(sector);
            if write != slot.kind.write() {
                slot.head.set_kind(write);
                self.queue.set_kind(id, write);
            }
            slot.kind = Kind::new(since, write);
        })?;
        self.queue.give(given);
        self.free.count = rest;
        Ok(())
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

    /// What a device has done that gives back a request while it holds none.
    #[cold]
    fn expect_none(&mut self) -> Result<(usize, u64)> {
        let mut slots = [0];
        if self.queue.take(&mut slots) == 0 { Ok((0, 0)) } else { Err(not_held(slots[0].into())) }
    }
}

#[cold]
fn not_held(id: usize) -> Error {
    Error::NotHeld { id: id as u32 }
}

/// Counts `times` requests that completed together and are alike.
#[inline]
fn record(tally: &mut Tally, now: u64, alike: Kind, times: u64) {
    if times > 0 {
        let latency = now.saturating_sub(alike.since());
        tally.latencies[usize::from(alike.write())].record(latency, times);
    }
}

/// Slots that are free: the first `count`. The last of these is used first, as its memory is the
/// warmest. Behind them is room for those that the device holds.
#[derive(Clone, Debug)]
struct Free {
    slots: Box<[u16]>,
    count: usize,
}

impl Free {
    fn all(count: usize) -> Self {
        Self { slots: (0..count as u16).rev().collect(), count }
    }

    /// Those that are free, and the room for the others.
    #[inline]
    fn split(&mut self) -> (&[u16], &mut [u16]) {
        let (free, held) = self.slots.split_at_mut(self.count);
        (free, held)
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
