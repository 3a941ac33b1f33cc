//! What the owner of a queue keeps about it, and what it does in a visit. How requests are taken and
//! answered is in `core/requests.rs`.
#![expect(unsafe_code, reason = "submits guest memory; signals")]

mod outcome;
mod requests;

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use bdev::{Channel, Completion, Counters, Io, Op, Shortcut, Status, Tag, Wait};

use self::outcome::add;
use self::requests::{Rest, Serve, Tally};
use super::{Coalescing, NOTHING, Queue, QueueState, StartError, Tracked, View, Watch};
use crate::config::Disk;
use crate::inflight::{Recovery, Tracker};
use crate::memory::Nearest;
use crate::reactor::{Cause, Event, Events, Turn};
use crate::request::{Chain, LongSegments, long_segments};
use crate::ring::{AnyRing, Look, Ring};

/// Requests that a queue may have in flight. A larger ring waits; the memory for a request is some
/// 2 KiB, and a front end may start 128 rings.
const SLOTS_MAX: u16 = 256;
/// How long a sleeping reactor waits before it tries again what nothing announces.
const RETRY: Duration = Duration::from_millis(1);
/// Long chains that a queue may have in flight; some 16 KiB each. Further ones wait.
const LONG_CHAINS: usize = 4;
/// Completions taken from a channel at a time.
const COMPLETIONS: usize = 32;

/// A request on its way through the block device. What every request touches comes first and together,
/// the first segments of its chain included: three cache lines.
#[repr(C)]
#[derive(Debug)]
struct Slot {
    /// The view that it was submitted under, whose memory it uses.
    view: Option<NonNull<View>>,
    /// Bytes of data.
    len: u64,
    started_ticks: u64,
    /// What the used ring calls it: head (split) or buffer id (packed).
    id: u16,
    /// Where its chain begins; packed only.
    position: u16,
    /// Places that it takes in the used ring.
    span: u16,
    /// What the in-flight area calls it.
    entry: u16,
    op: Op,
    /// What is left to do when the I/O under way has ended well.
    rest: Rest,
    chain: Chain,
}

// SAFETY: the pointer is to a view that the slot has pinned; see `RetiredView`.
unsafe impl Send for Slot {}

/// What the owner of a queue keeps about it.
#[derive(Debug)]
pub struct Core {
    generation: u64,
    /// Position in the ring after the last chain that was taken.
    last_avail: u16,
    /// Position in the used ring: everything before it was put.
    used: u16,
    /// The position that the guest was last told about.
    published: u16,
    /// Requests that were put since.
    unpublished: u32,
    /// The position at the last decision whether to call.
    called: u16,
    inflight: u32,
    /// The control side wants a stop, as of the last visit.
    stopping: bool,
    stopped: bool,
    /// The ring must not be accessed any more.
    abandoned: bool,
    /// The ring is served no further, as it is malformed or abandoned.
    broken: bool,
    /// The guest was asked for kicks, as its reactor was about to sleep.
    armed: bool,
    /// The guest has asked for a call that it has not got, or may not have got an earlier one.
    call_wanted: bool,
    /// The system could not make the last call right then.
    call_refused: bool,
    call_due: CallDue,
    /// Where in the guest's memory the last request was.
    nearest: Nearest,
    expected: Expected,
    device: Option<Device>,
    slots: Box<[Slot]>,
    /// Slots that are free, most recently used last.
    free: ArrayVec<u16, { SLOTS_MAX as usize }>,
    /// Room for long chains that is not lent.
    long: Vec<LongSegments>,
    /// The next chain is a long one, and there was no room for it.
    room_wanted: bool,
    /// I/Os that the channel had no room for, oldest first.
    parked: VecDeque<Io>,
    /// The record of what is in flight, if the front end has asked for one.
    tracker: Option<Tracker>,
    /// What an earlier owner of the ring has left to be done again, as the record calls it; the
    /// oldest last. Comes before anything new.
    again: Vec<u16>,
    /// An event that found the event queue full.
    owed: Option<Event>,
    done: [Completion; COMPLETIONS],
}

/// A disk as this queue has opened it.
#[derive(Debug)]
struct Device {
    /// Of `channel`, and good for as long as that is open.
    shortcut: Shortcut,
    channel: ChannelBox,
    counters: Arc<Counters>,
}

/// Where the next request is likely to be: in the place of the one before, as drivers keep free
/// descriptors and headers on stacks. Fetching these lines while the available ring's is on its way
/// spares a guest at depth 1 two trips between the cores. Only ever prefetched.
#[derive(Debug)]
struct Expected {
    head: u16,
    header: *const u8,
}

// SAFETY: an address that nobody follows.
unsafe impl Send for Expected {}

/// A channel, with a `Debug` that says nothing.
pub struct ChannelBox(pub Box<dyn Channel>);

impl std::fmt::Debug for ChannelBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Channel")
    }
}

/// What coalescing keeps: when the next call may go out, and how it came to that.
#[derive(Debug, Default)]
struct CallDue {
    /// There are completions that the guest may not have been told of.
    pending: bool,
    not_before_ticks: u64,
    delay_ticks: u64,
    window_end_ticks: u64,
    window_requests: u32,
}

/// A queue in a visit: who sees it, by which view, and the view's ring.
#[derive(Debug)]
struct At<'a, R> {
    queue: &'a Queue,
    view: &'a View,
    ring: &'a R,
    /// Requests have to be written down: in flight, or the pages that they dirty.
    recorded: bool,
}

impl<R> Clone for At<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for At<'_, R> {}

impl Core {
    /// For a queue that nobody serves: what its ring and the record of what is in flight say is not
    /// changed by anybody.
    pub(super) fn new(
        view: &View,
        base: u16,
        tracked: Option<Tracked<'_>>,
    ) -> Result<Self, StartError> {
        let (tracker, recovery) = begin(view, base, tracked)?;
        let Recovery { used, last_avail, mut again, .. } = recovery;
        again.reverse();
        let depth = view.ring.size().min(SLOTS_MAX);
        let device = match view.disk.as_deref() {
            Some(disk) => Some(Device::open(disk, depth)?),
            None => None,
        };
        let slot = || Slot {
            view: None,
            len: 0,
            started_ticks: 0,
            id: 0,
            position: 0,
            span: 1,
            entry: 0,
            op: Op::Flush,
            rest: Rest::Nothing,
            chain: Chain::default(),
        };
        Ok(Self {
            generation: 0,
            last_avail,
            used,
            published: used,
            unpublished: 0,
            called: used,
            inflight: 0,
            stopping: false,
            stopped: false,
            abandoned: false,
            broken: false,
            armed: false,
            call_wanted: false,
            call_refused: false,
            call_due: CallDue::default(),
            nearest: Nearest::default(),
            expected: Expected { head: 0, header: std::ptr::null() },
            device,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            long: (0..LONG_CHAINS).map(|_| long_segments()).collect(),
            room_wanted: false,
            parked: VecDeque::with_capacity(depth.into()),
            tracker,
            again,
            owed: None,
            done: [Completion { tag: Tag(0), status: Status::Ok }; COMPLETIONS],
        })
    }

    /// Position in the ring after the last chain that was taken.
    pub(super) fn last_avail(&self) -> u16 {
        self.last_avail
    }

    /// One visit; says whether there was anything to do, and what to look for before the next.
    #[inline]
    pub(super) fn visit(
        &mut self,
        queue: &Queue,
        view: &View,
        turn: &mut Turn,
        events: &Events,
    ) -> (bool, Watch) {
        let recorded = view.log.is_some() || self.tracker.is_some();
        match &view.ring {
            AnyRing::Split(ring) => self.serve(At { queue, view, ring, recorded }, turn, events),
            AnyRing::Packed(ring) => self.serve(At { queue, view, ring, recorded }, turn, events),
        }
    }

    /// The order: adopt first, as everything else uses the view. Adoption checks by itself whether
    /// the ring may still be accessed, which keeps the common path free of values that are live
    /// across a call; the check for the other steps follows. Complete before fetch, as it frees
    /// slots; tell the device, then the guest, once for the batch; count before the guest is called,
    /// which is no part of an I/O; stop last, as it wants to know what is left.
    #[inline]
    fn serve<R: Serve>(
        &mut self,
        at: At<'_, R>,
        turn: &mut Turn,
        events: &Events,
    ) -> (bool, Watch) {
        let At { queue, view, ring, .. } = at;
        if self.stopped {
            let settled = self.owed.is_some() && self.settle(events);
            return (settled, self.watch(view, ring));
        }
        if view.generation != self.generation {
            self.adopt(at, turn);
        }
        let stop = queue.stop.load(Ordering::Acquire);
        self.stopping = stop;
        if stop && self.is_abandoned(queue) {
            let worked = self.let_go(queue, view, turn, events);
            return (worked, self.watch(view, ring));
        }
        let completed = self.inflight > 0 && self.complete(at, turn);
        if !self.parked.is_empty() {
            self.unpark(at, turn);
        }
        let mut tallies = [const { Tally { count: 0, bytes: 0 } }; 2];
        let wanted = !stop || !self.again.is_empty();
        let fetched = wanted
            && !self.broken
            && self.parked.is_empty()
            && self.fetch(at, turn, events, &mut tallies);
        if self.used != self.published {
            self.publish(at);
        }
        if fetched {
            self.count(turn, &tallies);
        }
        if self.call_due.pending {
            self.call_guest(at, turn, stop);
        }
        if self.owed.is_some() {
            self.settle(events);
        }
        if view.disk.is_none() && self.device.is_some() {
            self.release_device(queue, events);
        }
        if stop && self.inflight == 0 && self.owed.is_none() {
            self.acknowledge_stop(queue, events);
            turn.note(Cause::Stop);
        }
        (completed || fetched, self.watch(view, ring))
    }

    /// What is to be looked at until the next visit, after one with `view`.
    #[inline]
    fn watch(&self, view: &View, ring: &impl Ring) -> Watch {
        let rings = !self.stopped && !self.broken;
        let due = self.inflight > 0 || self.call_due.pending || self.owed.is_some();
        let released = view.disk.is_none() && self.device.is_some();
        let nothing = Look { cell: &raw const NOTHING, seen: 0, due: false };
        let look = if rings { ring.look(self.last_avail) } else { nothing };
        let again = rings && !self.again.is_empty();
        Watch {
            avail: look.cell,
            generation: view.generation,
            seen: look.seen,
            due: due || look.due || again || released && !self.stopped,
            kicks: view.kicks || !rings,
            stop: self.stopping,
        }
    }

    /// Whether a queue that stops must not access its ring any more.
    #[cold]
    fn is_abandoned(&mut self, queue: &Queue) -> bool {
        if queue.reset.load(Ordering::Relaxed) {
            self.again.clear();
        }
        queue.abandoned.load(Ordering::Relaxed)
    }

    /// A visit of a queue that must not access its ring: completions are discarded.
    #[cold]
    fn let_go(&mut self, queue: &Queue, view: &View, turn: &mut Turn, events: &Events) -> bool {
        if !std::mem::replace(&mut self.abandoned, true) {
            self.broken = true;
            self.again.clear();
            self.call_due.pending = false;
            if let Some(device) = &mut self.device {
                device.channel.0.abandon();
            }
        }
        // Not adopted, as that would write to the ring.
        self.generation = view.generation;
        let worked = self.forget_completed(queue, turn);
        if self.owed.is_some() {
            self.settle(events);
        }
        if view.disk.is_none() && self.device.is_some() {
            self.release_device(queue, events);
        }
        if self.inflight == 0 && self.owed.is_none() {
            self.acknowledge_stop(queue, events);
            turn.note(Cause::Stop);
        }
        worked
    }

    /// Takes over a new view, unless the queue must not access its ring any more: then it is for
    /// [`Core::let_go`], to which the visit comes next, as a stop is never taken back.
    #[cold]
    fn adopt<R: Ring>(&mut self, at: At<'_, R>, turn: &mut Turn) {
        let At { queue, view, ring, .. } = at;
        if queue.stop.load(Ordering::Acquire) && queue.abandoned.load(Ordering::Relaxed) {
            return;
        }
        turn.note(Cause::Adopt);
        self.generation = view.generation;
        // Addresses of the memory before may not even be mapped any more.
        self.nearest = Nearest::default();
        self.expected.header = std::ptr::null();
        self.refuse_kicks(view, ring);
        // The fd before this view's may have been told last, and nobody may be listening to it.
        self.call_wanted = true;
        self.call_due.pending = true;
    }

    fn refuse_kicks(&mut self, view: &View, ring: &(impl Ring + ?Sized)) {
        self.armed = false;
        ring.suppress_kicks(self.last_avail);
        if let Some(log) = &view.log {
            ring.log_events(log);
        }
    }

    fn want_kicks(&mut self, view: &View) -> bool {
        self.armed = true;
        let ring = view.ring.as_dyn();
        let missed = ring.want_kicks(self.last_avail);
        if let Some(log) = &view.log {
            ring.log_events(log);
        }
        missed
    }

    /// See [`Queue::arm`].
    pub(super) fn arm(&mut self, queue: &Queue, view: &View, turn: &Turn) -> Wait {
        let mut wait = Wait::Event;
        if self.owed.is_some() {
            // Nothing says when the event queue has room again, or an eventfd.
            wait = Wait::Until(Instant::now() + RETRY);
        }
        if self.stopped {
            return wait;
        }
        if view.generation != self.generation || queue.stop.load(Ordering::Acquire) != self.stopping
        {
            return Wait::Poll;
        }
        if self.call_due.pending {
            let left = self.call_due.not_before_ticks.saturating_sub(turn.now_ticks());
            if left == 0 && !self.call_refused {
                return Wait::Poll;
            }
            let left_us = left.saturating_mul(1_000_000) / turn.ticks_per_second();
            let at_least = if left == 0 { RETRY } else { Duration::from_micros(left_us + 1) };
            wait = wait.sooner(Wait::Until(Instant::now() + at_least));
        }
        if self.inflight > 0
            && let Some(device) = &self.device
        {
            wait = wait.sooner(device.channel.0.wait());
        } else if !self.again.is_empty() && !self.broken {
            return Wait::Poll;
        }
        if !self.parked.is_empty() {
            wait = wait.sooner(Wait::Until(Instant::now() + RETRY));
        }
        // Without a slot for it, or room in it, nothing is fetched before a completion.
        let waits = self.free.is_empty() || self.room_wanted || !self.parked.is_empty();
        if !self.stopping && !self.broken && !waits && !self.armed {
            debug_assert!(view.kicks, "the poll set has looked at its watches first");
            if self.want_kicks(view) {
                self.refuse_kicks(view, view.ring.as_dyn());
                return Wait::Poll;
            }
        }
        wait
    }

    /// The disk's channel.
    pub(super) fn channel(&mut self) -> Option<&mut dyn Channel> {
        Some(&mut *self.device.as_mut()?.channel.0)
    }

    /// Calls the guest if it wants that and the time has come.
    /// A queue that stops does not make the guest wait for coalescing.
    #[inline]
    fn call_guest<R: Ring>(&mut self, at: At<'_, R>, turn: &mut Turn, stop: bool) {
        // Asked at once even if the call has to wait: positions of a ring that has gone round
        // meanwhile would say nothing.
        self.call_wanted |= at.ring.wants_call(self.called, self.used);
        self.called = self.used;
        if !stop && self.call_due.wait(&at.queue.coalescing, turn) {
            return;
        }
        if self.call_wanted
            && let Some(call) = &at.view.call
        {
            turn.note(Cause::Call);
            // SAFETY: this queue's owner is the one user of its call fd, and this is it.
            let called = unsafe { call.signal() };
            turn.read_clock();
            self.call_refused = !called;
            if !called {
                return; // tried again at the next visit
            }
        }
        self.call_due.pending = false;
        self.call_wanted = false;
    }

    #[cold]
    fn break_queue(&mut self, queue: &Queue, events: &Events) {
        if self.broken {
            return;
        }
        self.broken = true;
        queue.state.store(QueueState::Broken as u8, Ordering::Release);
        // It only makes a line in the log; an event that is owed carries more.
        if self.owed.is_none() {
            self.send(Event::Broken(queue.id), events);
        }
    }

    #[cold]
    fn release_device(&mut self, queue: &Queue, events: &Events) {
        if self.inflight == 0
            && self.owed.is_none()
            && let Some(device) = self.device.take()
        {
            self.send(Event::Released(queue.id, device.channel), events);
        }
    }

    #[cold]
    fn acknowledge_stop(&mut self, queue: &Queue, events: &Events) {
        if self.call_due.pending || !self.again.is_empty() && !self.broken {
            // A call that the system refused goes out first, and what was found in flight is done.
            return;
        }
        self.stopped = true;
        queue.last_avail.store(self.last_avail, Ordering::Relaxed);
        // Release: the indices and everything written for the guest come before it.
        queue.state.store(QueueState::Stopped as u8, Ordering::Release);
        self.send(Event::Drained(queue.id), events);
    }

    /// Sends an event, or keeps it for the next turn when there is no room.
    fn send(&mut self, event: Event, events: &Events) {
        if let Err(event) = events.push(event) {
            self.owed = Some(event);
        }
    }

    #[cold]
    fn settle(&mut self, events: &Events) -> bool {
        let Some(event) = self.owed.take() else { return false };
        self.send(event, events);
        self.owed.is_none()
    }
}

/// Where a queue begins, and what it has to do again: as its ring has it, and the record of what is in
/// flight.
fn begin(
    view: &View,
    base: u16,
    tracked: Option<Tracked<'_>>,
) -> Result<(Option<Tracker>, Recovery), StartError> {
    let size = view.ring.size();
    let untracked = |at| (None, Recovery { used: at, last_avail: at, ..Recovery::default() });
    let tracker = match (&view.ring, tracked) {
        // What the guest was told counts. A front end that reconnects gives the used index that it
        // saw when the connection ended; requests that completed after that would be fetched and
        // completed again.
        (AnyRing::Split(ring), None) => return Ok(untracked(ring.used_idx())),
        (AnyRing::Packed(ring), _) if !ring.valid(base) => return Err(StartError::Base(base)),
        (AnyRing::Packed(_), None) => return Ok(untracked(base)),
        (AnyRing::Split(ring), Some(Tracked { area, ring: n })) => {
            Tracker::split(area, n, size, ring.used_idx())
        }
        (AnyRing::Packed(ring), Some(Tracked { area, ring: n })) => {
            Tracker::packed(area, n, size, base, |position| ring.flags(position))
        }
    };
    let (tracker, recovery) = tracker.ok_or(StartError::NoRoom)?;
    if let Some(damage) = recovery.damage {
        tracing::warn!("{damage}");
    }
    if let AnyRing::Packed(ring) = &view.ring {
        ring.take_back(recovery.used, recovery.last_avail);
    }
    Ok((Some(tracker), recovery))
}

impl Device {
    fn open(disk: &Disk, depth: u16) -> Result<Self, bdev::Error> {
        let channel = ChannelBox(Arc::clone(&disk.bdev).open(depth)?);
        let shortcut = channel.0.shortcut();
        Ok(Self { shortcut, channel, counters: disk.bdev.stats().attach() })
    }
}

impl CallDue {
    /// Whether the call has to wait. SPDK's rule: every 10 ms, if there were more requests than
    /// the threshold, the delay becomes the base times the excess over the threshold.
    fn wait(&mut self, coalescing: &Coalescing, turn: &mut Turn) -> bool {
        let base = coalescing.delay_base_ticks.load(Ordering::Relaxed);
        if base == 0 {
            self.window_requests = 0;
            return false;
        }
        let now = turn.now_ticks();
        if now >= self.window_end_ticks {
            let threshold = coalescing.threshold.load(Ordering::Relaxed).max(1);
            let excess = u64::from(self.window_requests.saturating_sub(threshold));
            self.delay_ticks = base.saturating_mul(excess) / u64::from(threshold);
            self.window_requests = 0;
            self.window_end_ticks = now + turn.ticks_per_second() / 100;
        }
        if now < self.not_before_ticks {
            return true;
        }
        self.not_before_ticks = now + self.delay_ticks;
        false
    }
}
