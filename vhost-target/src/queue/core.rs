//! The state that the owner of a queue keeps, and the steps of a visit. `fetch` takes chains from
//! the ring, `requests` returns them.
#![expect(unsafe_code, reason = "signals")]

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use guest_memory::Nearest;
use reactor::{Cause, Events, Iteration, PollHint, Wait};
use virtqueue::chain::{Chain, LongSegments, long_segments};
use virtqueue::inflight::{Recovery, Tracker};
use virtqueue::{AnyRing, Ring, RingHint};

use super::call_due::CallDue;
use super::fetch::Serve;
use super::notices::Places;
use super::slot::{Expected, Slot};
use super::start::begin;
use super::{Control, Event, QueueState, StartError, Tracked, View};
use crate::device_queue::DeviceQueue;

/// Requests that a queue may have in flight. The further requests of a larger ring wait. A request
/// needs about 2 KiB of memory, and a front end may start 128 rings.
pub(crate) const DEPTH_MAX: u16 = 256;
/// How long a sleeping reactor waits before it retries an operation whose readiness nothing
/// signals.
const RETRY: Duration = Duration::from_millis(1);
/// Long chains that a queue may have in flight. Each needs about 16 KiB. Further ones wait.
const LONG_CHAINS: usize = 4;

/// The state that the owner of a queue keeps.
pub(super) struct Core<D: DeviceQueue> {
    pub(super) ring: RingCore<D>,
    pub(super) device: D,
}

/// The state without the device. The device uses it during a visit.
pub(super) struct RingCore<D: DeviceQueue> {
    generation: u64,
    pub(super) places: Places,
    /// The position in the ring after the last chain that was taken.
    pub(super) last_avail: u16,
    /// The position in the used ring after the last chain that was put.
    pub(super) used: u16,
    /// The position up to which the used ring was published to the guest.
    pub(super) published: u16,
    /// The number of requests that were put since then.
    pub(super) unpublished: u32,
    /// The position at the last decision whether to notify the guest.
    called: u16,
    pub(super) inflight: u32,
    /// The control side has told the queue to stop, as of the last visit.
    pub(super) stopping: bool,
    stopped: bool,
    /// The ring must not be accessed any more.
    abandoned: bool,
    /// No request is taken any more: the ring is malformed or abandoned.
    pub(super) broken: bool,
    /// The guest was asked for kicks, because the reactor was about to sleep.
    pub(super) armed: bool,
    /// The guest wants a notification that it has not received, or may not have received.
    call_wanted: bool,
    /// The system could not send the last notification.
    call_refused: bool,
    pub(super) call_due: CallDue,
    /// The memory region that the last request's address was in.
    pub(super) nearest: Nearest,
    pub(super) expected: Expected,
    pub(super) slots: Box<[Slot<D>]>,
    /// Free slots, most recently used last.
    pub(super) free: ArrayVec<u16, { DEPTH_MAX as usize }>,
    /// Free buffers for long chains.
    pub(super) long: Vec<LongSegments>,
    /// The next chain is a long one, and no buffer was free for it.
    pub(super) room_wanted: bool,
    /// Requests that the device had no room for, oldest first.
    pub(super) parked: VecDeque<u16>,
    /// The queue's part of the in-flight area, if the front end has requested one.
    pub(super) tracker: Option<Tracker>,
    /// Entries of requests of an earlier process that are to be resubmitted; the oldest is last.
    /// They are submitted before any new request.
    pub(super) resubmissions: Vec<u16>,
    /// An event that found the event queue full.
    pub(super) pending_event: Option<Event>,
}

/// A queue during a visit: its control, its view, and the view's ring.
pub(super) struct At<'a, R, V> {
    pub(super) control: &'a Control,
    pub(super) view: &'a View<V>,
    pub(super) ring: &'a R,
    /// Whether requests in flight, or the pages that they write, have to be recorded.
    pub(super) recorded: bool,
}

impl<R, V> Clone for At<'_, R, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R, V> Copy for At<'_, R, V> {}

impl<D: DeviceQueue> Core<D> {
    /// Creates the core of a queue that no reactor serves: nothing else changes its ring or its
    /// part of the in-flight area.
    pub(super) fn new(
        device: D,
        view: &View<D::View>,
        base: u16,
        tracked: Option<Tracked<'_>>,
    ) -> Result<Self, StartError> {
        let (tracker, recovery) = begin(&view.ring, base, tracked)?;
        Ok(Self { ring: RingCore::new(view.ring.size().min(DEPTH_MAX), tracker, recovery), device })
    }

    /// Returns the position in the ring after the last chain that was taken.
    pub(super) fn last_avail(&self) -> u16 {
        self.ring.last_avail
    }

    /// Returns the device.
    pub(super) fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Performs one visit. Returns whether there was work, and stores the poll hint for the time
    /// until the next visit.
    #[inline]
    pub(super) fn visit(
        &mut self,
        control: &Control,
        view: &View<D::View>,
        iteration: &mut Iteration,
        events: &Events<Event>,
        hint: &mut PollHint,
    ) -> bool {
        let recorded = view.log.is_some() || self.ring.tracker.is_some();
        match &view.ring {
            AnyRing::Split(ring) => {
                let worked = self.serve(At { control, view, ring, recorded }, iteration, events);
                *hint = self.hint(view, ring);
                worked
            }
            AnyRing::Packed(ring) => {
                let worked = self.serve(At { control, view, ring, recorded }, iteration, events);
                *hint = self.hint(view, ring);
                worked
            }
        }
    }

    /// The order of the steps: adopt first, because every other step uses the view. `adopt` checks
    /// by itself whether the ring may still be accessed: this keeps values from being live across a
    /// call in the common path. The other steps follow a check of their own. Complete before fetch,
    /// because completions free slots. Notify the device, then the guest, once for the batch.
    /// Count before the guest is notified, because the notification is not part of a request. Stop
    /// last, because the stop depends on what is left.
    #[inline]
    fn serve<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> bool {
        let At { control, view, ring, .. } = at;
        if self.ring.stopped {
            return self.ring.pending_event.is_some() && self.ring.send_pending(events);
        }
        if view.generation != self.ring.generation {
            self.adopt(at, iteration);
        }
        let stop = control.stop.load(Ordering::Acquire);
        self.ring.stopping = stop;
        if stop && self.begin_stop(control) {
            return self.discard(at, iteration, events);
        }
        let completed = self.ring.inflight > 0 && self.complete(at, iteration);
        if !self.ring.parked.is_empty() {
            self.retry(at, iteration);
        }
        let wanted = !stop || !self.ring.resubmissions.is_empty();
        let fetched = wanted
            && !self.ring.broken
            && self.ring.parked.is_empty()
            && self.fetch(at, iteration, events);
        if self.ring.used != self.ring.published {
            self.ring.publish(at);
        }
        if fetched {
            self.device.started(iteration);
        }
        if self.ring.call_due.pending {
            self.ring.call_guest(control, view, ring, iteration, stop);
        }
        if self.ring.pending_event.is_some() {
            self.ring.send_pending(events);
        }
        if view.device.is_none() && self.device.is_open() {
            self.release_device(control, events);
        }
        if self.device.is_watching() {
            self.end_watched_visit(at, events);
        }
        if stop && self.ring.inflight == 0 && self.ring.pending_event.is_none() {
            self.ring.acknowledge_stop(control, events);
            iteration.note(Cause::Stop);
        }
        completed || fetched
    }

    /// Returns the poll hint for the time after a visit with `view`.
    #[inline]
    fn hint(&self, view: &View<D::View>, ring: &impl Ring) -> PollHint {
        let core = &self.ring;
        let rings = !core.stopped && !core.broken;
        let due = core.inflight > 0 || core.call_due.pending || core.pending_event.is_some();
        let released = view.device.is_none() && self.device.is_open();
        let (cell, seen) = PollHint::NEVER;
        let takes = rings && (!D::SELECTIVE || self.device.wants_requests());
        let ring_hint =
            if takes { ring.hint(core.last_avail) } else { RingHint { cell, seen, due: false } };
        let resubmits = rings && !core.resubmissions.is_empty();
        PollHint {
            cell: ring_hint.cell,
            seen: ring_hint.seen,
            generation: view.generation,
            due: due || ring_hint.due || resubmits || released && !core.stopped,
            wakes: view.kicks || !takes,
            stop: core.stopping,
        }
    }

    /// A visit of a queue that must not access its ring: it discards completions.
    #[cold]
    fn discard<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> bool {
        let At { control, view, .. } = at;
        if !std::mem::replace(&mut self.ring.abandoned, true) {
            self.ring.broken = true;
            self.ring.resubmissions.clear();
            self.ring.call_due.pending = false;
            self.device.abandon();
        }
        // Not adopted, because adopting writes to the ring.
        self.ring.generation = view.generation;
        let worked = self.discard_ended(at, iteration);
        if self.ring.pending_event.is_some() {
            self.ring.send_pending(events);
        }
        if view.device.is_none() && self.device.is_open() {
            self.release_device(control, events);
        }
        if self.device.is_watching() {
            self.end_watched_visit(at, events);
        }
        if self.ring.inflight == 0 && self.ring.pending_event.is_none() {
            self.ring.acknowledge_stop(control, events);
            iteration.note(Cause::Stop);
        }
        worked
    }

    /// See [`reactor::Pollable::arm`].
    pub(super) fn arm(
        &mut self,
        control: &Control,
        view: &View<D::View>,
        iteration: &Iteration,
    ) -> Wait {
        let core = &mut self.ring;
        let mut wait = Wait::Event;
        if core.pending_event.is_some() {
            // Nothing signals that the event queue has room again.
            wait = Wait::Until(Instant::now() + RETRY);
        }
        if core.stopped {
            return wait;
        }
        if view.generation != core.generation
            || control.stop.load(Ordering::Acquire) != core.stopping
        {
            return Wait::Poll;
        }
        if core.call_due.pending {
            let left = core.call_due.not_before_ticks.saturating_sub(iteration.now_ticks());
            if left == 0 && !core.call_refused {
                return Wait::Poll;
            }
            let left_us = left.saturating_mul(1_000_000) / iteration.ticks_per_second();
            let at_least = if left == 0 { RETRY } else { Duration::from_micros(left_us + 1) };
            wait = wait.sooner(Wait::Until(Instant::now() + at_least));
        }
        if core.inflight > 0 && self.device.is_open() {
            // Cannot underflow: `inflight` counts the parked requests too.
            wait = wait.sooner(self.device.wait(core.inflight as usize - core.parked.len()));
        } else if !core.resubmissions.is_empty() && !core.broken {
            return Wait::Poll;
        }
        if !core.parked.is_empty() {
            wait = wait.sooner(Wait::Until(Instant::now() + RETRY));
        }
        // Without a free slot, a free buffer or room in the device, nothing is fetched before a
        // completion.
        let waits = core.free.is_empty()
            || core.room_wanted
            || !core.parked.is_empty()
            || D::SELECTIVE && !self.device.wants_requests();
        if !core.stopping && !core.broken && !waits && !core.armed {
            debug_assert!(view.kicks, "the poll set has looked at its hints first");
            if core.want_kicks(view) {
                core.refuse_kicks(view, view.ring.as_dyn());
                return Wait::Poll;
            }
        }
        wait
    }

    /// Adopts a new view, unless the queue must not access its ring any more. The visit then
    /// continues with [`Core::discard`], because a stop is never withdrawn.
    #[cold]
    fn adopt<R: Ring>(&mut self, at: At<'_, R, D::View>, iteration: &mut Iteration) {
        let At { control, view, .. } = at;
        if !(control.stop.load(Ordering::Acquire) && control.abandoned.load(Ordering::Relaxed)) {
            self.ring.adopt(at, iteration);
            self.device.adopted(view.device.as_ref());
        }
    }

    /// Begins a stop. Returns whether the queue must not access its ring any more.
    #[cold]
    fn begin_stop(&mut self, control: &Control) -> bool {
        self.device.stopping();
        if control.reset.load(Ordering::Relaxed) {
            self.ring.resubmissions.clear();
        }
        control.abandoned.load(Ordering::Relaxed)
    }
}

impl<D: DeviceQueue> RingCore<D> {
    fn new(depth: u16, tracker: Option<Tracker>, recovery: Recovery) -> Self {
        let Recovery { used, last_avail, mut resubmissions, .. } = recovery;
        resubmissions.reverse();
        let slot = || Slot {
            view: None,
            id: 0,
            position: 0,
            span: 1,
            entry: 0,
            request: D::Request::default(),
            chain: Chain::default(),
        };
        Self {
            generation: 0,
            places: Places::default(),
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
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            long: (0..LONG_CHAINS).map(|_| long_segments()).collect(),
            room_wanted: false,
            // One more than can be parked: a retry adds its request before it removes it.
            parked: VecDeque::with_capacity(usize::from(depth) + 1),
            tracker,
            resubmissions,
            pending_event: None,
        }
    }

    fn adopt<R: Ring>(&mut self, at: At<'_, R, D::View>, iteration: &mut Iteration) {
        let At { view, ring, .. } = at;
        iteration.note(Cause::Adopt);
        self.generation = view.generation;
        self.places.begin();
        // Addresses in the previous memory may not be mapped any more.
        self.nearest = Nearest::default();
        self.expected.header = std::ptr::null();
        self.refuse_kicks(view, ring);
        // The last notification may have gone to the previous view's call fd, which the front end
        // may not read any more.
        self.call_wanted = true;
        self.call_due.pending = true;
    }

    pub(super) fn refuse_kicks(&mut self, view: &View<D::View>, ring: &(impl Ring + ?Sized)) {
        self.armed = false;
        ring.suppress_kicks(self.last_avail);
        if let Some(log) = &view.log {
            ring.log_events(log);
        }
    }

    fn want_kicks(&mut self, view: &View<D::View>) -> bool {
        self.armed = true;
        let ring = view.ring.as_dyn();
        let missed = ring.want_kicks(self.last_avail);
        if let Some(log) = &view.log {
            ring.log_events(log);
        }
        missed
    }

    /// Notifies the guest if it wants that and coalescing allows it now. A queue that stops does
    /// not make the guest wait for coalescing.
    #[inline]
    fn call_guest(
        &mut self,
        control: &Control,
        view: &View<D::View>,
        ring: &impl Ring,
        iteration: &mut Iteration,
        stop: bool,
    ) {
        // Read now, even if the notification has to wait: once the used ring has wrapped around,
        // the positions would not give the answer.
        self.call_wanted |= ring.wants_call(self.called, self.used);
        self.called = self.used;
        if !stop && self.call_due.wait(&control.coalescing, iteration) {
            return;
        }
        if self.call_wanted
            && let Some(call) = &view.call
        {
            iteration.note(Cause::Call);
            // SAFETY: the queue's owner is the only user of its call fd, and it is the caller.
            let called = unsafe { call.signal() };
            iteration.read_clock();
            self.call_refused = !called;
            if !called {
                return; // tried again at the next visit
            }
        }
        self.call_due.pending = false;
        self.call_wanted = false;
    }

    #[cold]
    pub(super) fn break_queue(&mut self, control: &Control, events: &Events<Event>) {
        if self.broken {
            return;
        }
        self.broken = true;
        control.state.store(QueueState::Broken as u8, Ordering::Release);
        // The event only causes a log line. An event that waits to be sent is more important.
        if self.pending_event.is_none() {
            self.send(Event::Broken(control.id), events);
        }
    }

    #[cold]
    fn acknowledge_stop(&mut self, control: &Control, events: &Events<Event>) {
        if self.call_due.pending || !self.resubmissions.is_empty() && !self.broken {
            // A notification that the system refused is sent first, and the requests that were
            // found in flight are completed first.
            return;
        }
        self.stopped = true;
        control.last_avail.store(self.last_avail, Ordering::Relaxed);
        // Release: the indices and all writes for the guest come before it.
        control.state.store(QueueState::Stopped as u8, Ordering::Release);
        self.send(Event::Drained(control.id), events);
    }

    /// Sends an event, or keeps it for the next poll iteration if the event queue is full.
    pub(super) fn send(&mut self, event: Event, events: &Events<Event>) {
        if let Err(event) = events.push(event) {
            self.pending_event = Some(event);
        }
    }

    #[cold]
    fn send_pending(&mut self, events: &Events<Event>) -> bool {
        let Some(event) = self.pending_event.take() else { return false };
        self.send(event, events);
        self.pending_event.is_none()
    }
}
