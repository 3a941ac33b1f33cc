//! One queue under load: counts completed requests, and submits free slots again.

use std::sync::atomic::{AtomicU64, Ordering};

use front_end::prepared::{Head, HeadOf, Slots, Virtqueue};
use front_end::ring::Ring;

use crate::error::{Error, Result};
use crate::perf::clock::Clock;
use crate::perf::histogram::Counts;
use crate::perf::pace::Pace;
use crate::perf::timeline::Timeline;
use crate::perf::work::{Io, SECTOR, Work};

/// Limit on completions that share a reading of the clock, and on requests that are published
/// together. A larger batch shares costs; a smaller one lets the device start earlier.
const BATCH: usize = 16;

/// The measurements of a thread.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    /// Latencies in ticks, of reads and of writes.
    pub(crate) latencies: [Counts; 2],
    pub(crate) timeline: Timeline,
    pub(crate) errors: u64,
    pub(crate) mismatches: u64,
    /// The first error or mismatch, as a text.
    pub(crate) first_problem: Option<String>,
}

impl Tally {
    pub(crate) fn new(timeline: Timeline) -> Self {
        let latencies = Default::default();
        Self { latencies, timeline, errors: 0, mismatches: 0, first_problem: None }
    }

    /// Adds the measurements of another thread.
    pub(crate) fn add(&mut self, other: Self) {
        self.latencies.iter_mut().zip(&other.latencies).for_each(|(sum, more)| sum.add(more));
        self.timeline.add(&other.timeline);
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.first_problem = self.first_problem.take().or(other.first_problem);
    }
}

/// The time at which a request was submitted or was due, and whether it writes. Both are in one
/// number, because requests that complete together and agree in both are counted together.
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

/// A request's header and answer, and its last use.
#[derive(Clone, Copy, Debug)]
struct Slot<H> {
    head: H,
    kind: Kind,
}

impl<H: Head> Slot<H> {
    /// Records that the request completed with `status`, which is not OK.
    #[cold]
    #[inline(never)]
    fn note_failure(&self, status: H::Status, tally: &mut Tally) {
        let kind = if self.kind.write() { "write" } else { "read" };
        let at = self.head.sector() * u64::from(SECTOR);
        tally.errors += 1;
        tally.first_problem.get_or_insert_with(|| {
            let how = if status == H::UNWRITTEN {
                "without a status".into()
            } else {
                format!("with {}", self.head.describe(status))
            };
            format!("a {kind} at byte {at} completed {how}")
        });
    }
}

/// A queue with its requests and its work.
pub(crate) struct Lane<'a, V: Virtqueue, W> {
    ring: &'a Ring,
    queue: V,
    work: W,
    pace: Option<Pace>,
    slots: Box<[Slot<HeadOf<'a, V>>]>,
    /// Slots that the device does not hold.
    free: Free,
    /// The time of the last completion, or of a submission while the device held no request.
    last: u64,
}

impl<'a, V: Virtqueue, W: Work> Lane<'a, V, W> {
    pub(crate) fn new(ring: &'a Ring, queue: V, slots: &'a Slots<V::Form>, work: W) -> Self {
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

    /// The due time of the next request, if there is a schedule and a free slot.
    pub(crate) fn due(&self) -> Option<u64> {
        // Without a free slot, a due request waits for a completion.
        self.pace.filter(|_| self.free.count > 0).map(|pace| pace.due())
    }

    /// Requests that were due before `end` and have not been submitted.
    pub(crate) fn due_before(&self, end: u64) -> u64 {
        self.pace.map_or(0, |pace| pace.due_before(end))
    }

    /// Starts to submit, on the schedule `pace`, or whenever a slot is free.
    pub(crate) fn begin(&mut self, now: u64, pace: Option<Pace>) {
        (self.last, self.pace) = (now, pace);
    }

    /// Starts a gap at `now`.
    pub(crate) fn begin_gap(&mut self, now: u64) {
        self.last = now;
    }

    /// Records the current gap.
    pub(crate) fn end(&self, now: u64, tally: &mut Tally) {
        if self.in_flight() > 0 {
            tally.timeline.note(now, self.last, 0);
        }
    }

    /// Takes and counts completed requests, at most a batch. Returns their number and the time.
    ///
    /// # Errors
    /// [`Error::NotHeld`] if the device returns a request that it does not hold.
    #[inline]
    pub(crate) fn reap(&mut self, clock: &Clock, tally: &mut Tally) -> Result<(usize, u64)> {
        let (free, held) = self.free.split();
        let room = held.len().min(BATCH);
        let taken = self.queue.take(&mut held[..room]);
        if taken == 0 {
            // While the device holds nothing, a completion is an error.
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
            let ok = status == HeadOf::<'a, V>::OK;
            if !ok {
                slot.note_failure(status, tally);
                let mut others = free.iter().chain(&held[..i]);
                let unwritten = status == HeadOf::<'a, V>::UNWRITTEN;
                if unwritten && others.any(|other| usize::from(*other) == id) {
                    return Err(not_held(id));
                }
            }
            if W::CHECKS
                && let Some(problem) = self.work.done(id, ok)?
            {
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

    /// Submits free slots, or those that are due, and kicks the device if it wants a kick.
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
        while self.free.count > 0
            && let Some(due) = self.pace.as_mut().and_then(|p| p.take(now))
        {
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

    /// Makes `count` free slots available to the device. Their latencies count from `since`.
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

    /// Kicks the device if it wants a kick.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    #[inline]
    pub(crate) fn kick(&mut self) -> Result<()> {
        if self.queue.take_kick() {
            self.ring.kick()?;
        }
        Ok(())
    }

    /// Checks that the device, which holds no request, returns none.
    #[cold]
    fn expect_none(&mut self) -> Result<(usize, u64)> {
        let mut slots = [0];
        if self.queue.take(&mut slots) == 0 { Ok((0, 0)) } else { Err(not_held(slots[0].into())) }
    }
}

#[cold]
fn not_held(id: usize) -> Error {
    front_end::Error::NotHeld { id: id.try_into().unwrap_or(u32::MAX) }.into()
}

/// Counts `times` requests that completed together and have the same kind.
#[inline]
fn record(tally: &mut Tally, now: u64, alike: Kind, times: u64) {
    if times > 0 {
        let latency = now.saturating_sub(alike.since());
        tally.latencies[usize::from(alike.write())].record(latency, times);
    }
}

/// The free slots: the first `count`. The last one is used first, because its memory is most likely
/// in the cache. The rest of the table is room for the slots that the device holds.
#[derive(Clone, Debug)]
struct Free {
    slots: Box<[u16]>,
    count: usize,
}

impl Free {
    fn all(count: usize) -> Self {
        let end = u16::try_from(count).expect("the depth of a queue has 16 bits");
        Self { slots: (0..end).rev().collect(), count }
    }

    /// The free slots, and the room for the others.
    #[inline]
    fn split(&mut self) -> (&[u16], &mut [u16]) {
        let (free, held) = self.slots.split_at_mut(self.count);
        (free, held)
    }
}

/// A number that one thread writes often and others read, on a separate cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct SharedCounter(AtomicU64);

impl SharedCounter {
    /// Stores `value`. Only one thread may store.
    #[inline]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The last value.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::plan::Order;
    use crate::perf::work::{Area, Chooser};
    use front_end::prepared::Split;
    use front_end::request::STATUS_UNWRITTEN;
    use front_end::{GuestRam, STATUS_OK};

    const DEPTH: usize = 4;

    /// The memory of a lane, whose device is the test.
    struct Parts {
        ring: Ring,
        slots: Slots,
        clock: Clock,
    }

    impl Parts {
        fn new() -> Self {
            let ram = GuestRam::new(&[1 << 20]).unwrap();
            let ring = Ring::new(&ram, 0, 16).unwrap();
            let slots = Slots::new(&ram, DEPTH, 4096, 4096, false).unwrap();
            Self { ring, slots, clock: Clock::calibrated() }
        }

        fn lane(&self) -> Lane<'_, Split<'_>, Chooser> {
            let area = Area { first: 0, count: 8, block_bytes: 4096 };
            let queue = Split::new(&self.ring, &self.slots, false);
            Lane::new(&self.ring, queue, &self.slots, Chooser::new(area, Order::Sequential, 50, 1))
        }

        fn tally(&self) -> Tally {
            Tally::new(Timeline::new(self.clock.now(), 1 << 40, 1))
        }

        /// Completes the request in `slot` with `status`. The used index becomes `index`.
        fn give_back(&self, index: u16, slot: usize, status: u8) {
            let status_at = self.slots.descriptors(slot, false).last().unwrap().addr;
            let used = self.ring.addrs()[2];
            let ram = self.ring.ram();
            ram.write(status_at, &[status]).unwrap();
            let element = used + 4 + u64::from((index - 1) % 16) * 8;
            ram.write(element, &head(slot).to_le_bytes()).unwrap();
            ram.write(used + 2, &index.to_le_bytes()).unwrap();
        }
    }

    /// The first descriptor of the request in `slot`.
    fn head(slot: usize) -> u32 {
        4 * u32::try_from(slot).unwrap()
    }

    #[test]
    fn completions_are_counted_by_kind_and_submitted_again() {
        let parts = Parts::new();
        let (mut lane, mut tally) = (parts.lane(), parts.tally());
        lane.submit(&parts.clock).unwrap();
        assert_eq!((lane.in_flight(), parts.ring.available_index()), (DEPTH, 4));
        let mut writes = 0;
        for index in 1..=100 {
            let slot = usize::from(index * 3 % 4);
            writes += u64::from(lane.slots[slot].kind.write());
            parts.give_back(index, slot, STATUS_OK);
            assert_eq!(lane.reap(&parts.clock, &mut tally).unwrap().0, 1);
            assert_eq!(lane.in_flight(), DEPTH - 1);
            lane.submit(&parts.clock).unwrap();
        }
        assert_eq!(parts.ring.available_index(), 104);
        let counted = tally.latencies.each_ref().map(Counts::total);
        assert_eq!(counted, [100 - writes, writes]);
        assert!(writes > 20 && writes < 80);
        assert_eq!((tally.errors, tally.timeline.buckets().0[0].completed), (0, 100));
    }

    #[test]
    fn a_bad_status_is_reported_with_its_offset() {
        let parts = Parts::new();
        let (mut lane, mut tally) = (parts.lane(), parts.tally());
        lane.submit(&parts.clock).unwrap();
        let kind = if lane.slots[2].kind.write() { "write" } else { "read" };
        // Free slots are used from the last one on: the third block is in the second slot.
        let at = lane.slots[2].head.sector() * 512;
        parts.give_back(1, 2, 1);
        lane.reap(&parts.clock, &mut tally).unwrap();
        let problem = tally.first_problem.take().unwrap();
        assert_eq!(problem, format!("a {kind} at byte {at} completed with status 1"));
        parts.give_back(2, 1, STATUS_UNWRITTEN);
        lane.reap(&parts.clock, &mut tally).unwrap();
        assert!(tally.first_problem.unwrap().ends_with("completed without a status"));
        assert_eq!(tally.errors, 2);
    }

    #[test]
    fn a_completion_that_the_device_does_not_hold_is_an_error() {
        let not_held = |slots: &[usize]| {
            let parts = Parts::new();
            let (mut lane, mut tally) = (parts.lane(), parts.tally());
            lane.submit(&parts.clock).unwrap();
            slots.iter().zip(1..).for_each(|(slot, index)| {
                let status = if slots[..usize::from(index) - 1].contains(slot) { 0xee } else { 0 };
                parts.give_back(index, (*slot).min(3), status);
                let id = parts.ring.addrs()[2] + 4 + u64::from(index - 1) * 8;
                parts.ring.ram().write(id, &head(*slot).to_le_bytes()).unwrap();
            });
            let first = lane.reap(&parts.clock, &mut tally);
            first.and_then(|_| lane.reap(&parts.clock, &mut tally)).map(|(n, _)| n)
        };
        assert_eq!(not_held(&[3, 0, 1]).unwrap(), 0);
        assert!(
            matches!(not_held(&[4]), Err(Error::FrontEnd(front_end::Error::NotHeld { id: 4 }))),
            "out of range"
        );
        assert!(
            matches!(not_held(&[1, 1]), Err(Error::FrontEnd(front_end::Error::NotHeld { id: 1 }))),
            "in one batch"
        );
        // Nothing is held any more when the fifth is seen.
        assert!(matches!(
            not_held(&[0, 1, 2, 3, 2]),
            Err(Error::FrontEnd(front_end::Error::NotHeld { id: 2 }))
        ));
    }

    #[test]
    fn latencies_of_an_open_loop_count_from_the_due_times() {
        let parts = Parts::new();
        let (mut lane, mut tally) = (parts.lane(), parts.tally());
        let begin = parts.clock.now();
        // Ten requests are due, and there are four slots, because the device stalls.
        let interval = parts.clock.ticks(std::time::Duration::from_millis(2));
        lane.begin(begin, Some(Pace::new(begin, interval as f64)));
        while parts.clock.now() < begin + 9 * interval {}
        lane.submit(&parts.clock).unwrap();
        assert_eq!((lane.in_flight(), lane.due()), (DEPTH, None));
        let kept = [3, 2, 1, 0].map(|slot| lane.slots[slot].kind.since());
        assert_eq!(kept.map(|since| since.abs_diff(begin)), [3, 2, 1, 0].map(|i| i * interval));
        assert_eq!(lane.due_before(begin + 9 * interval), 5);
        for index in 1..=4 {
            parts.give_back(index, 4 - usize::from(index), STATUS_OK);
        }
        assert_eq!(lane.reap(&parts.clock, &mut tally).unwrap().0, 4);
        let reads = tally.latencies[0].clone();
        let mut all = tally.latencies[1].clone();
        all.add(&reads);
        let ticks = all.distribution(|ticks| ticks);
        assert!(ticks.max >= 9 * interval && ticks.min >= 6 * interval, "{ticks:?}");
        // The next request has its own due time.
        lane.submit(&parts.clock).unwrap();
        let next = lane.slots.iter().map(|slot| slot.kind.since()).min();
        assert_eq!(next, Some((begin + 4 * interval) & (u64::MAX >> 1)));
    }

    #[test]
    fn a_gap_is_a_time_in_which_the_device_held_a_request() {
        let parts = Parts::new();
        let (mut lane, mut tally) = (parts.lane(), parts.tally());
        let begin = parts.clock.now();
        lane.begin(begin, Some(Pace::new(begin + 1, 1e15)));
        let far = parts.clock.ticks(std::time::Duration::from_millis(20));
        while parts.clock.now() < begin + far {}
        // No request was submitted until now.
        lane.submit(&parts.clock).unwrap();
        assert_eq!(lane.in_flight(), 1);
        parts.give_back(1, 0, STATUS_OK);
        lane.reap(&parts.clock, &mut tally).unwrap();
        let gap = tally.timeline.longest_gaps().next().unwrap();
        assert!(gap.from >= begin + far, "{gap:?}, from {begin}");
        // A device that holds a request at the end has a gap up to the end.
        lane.pace = None;
        lane.submit(&parts.clock).unwrap();
        lane.end(gap.from + 1000 * far, &mut tally);
        assert!(tally.timeline.longest_gaps().next().unwrap().length > 900 * far);
    }
}
