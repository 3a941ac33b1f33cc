//! Starts and continues requests, and returns their chains to the guest.
#![expect(unsafe_code, reason = "unpins views; an index that was checked")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use guest_memory::DirtyLog;
use reactor::Iteration;
use virtqueue::chain::Chain;

use super::View;
use super::core::{At, Core, RingCore};
use super::fetch::Serve;
use super::slot::Slot;
use crate::device_queue::{Answer, DeviceQueue, Outcome, Progress, Request};

/// Adds to a counter that only this thread writes.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed) + count, Ordering::Relaxed);
}

/// The state of the engine while it starts or continues requests, one after the other.
pub(super) struct Visit<'c, 'v, R, D: DeviceQueue> {
    pub(super) core: &'c mut RingCore<D>,
    at: At<'v, R, D::View>,
    iteration: &'c mut Iteration,
    /// The slot of the current request: its number and its address.
    index: u16,
    slot: NonNull<Slot<D>>,
    /// Bytes that the requests move.
    pub(super) bytes: u64,
}

/// The current request of a visit, as its device sees it. It is one pointer, so that it is passed
/// in a register.
struct Current<'a, 'c, 'v, R, D: DeviceQueue>(&'a mut Visit<'c, 'v, R, D>);

impl<R: Serve, D: DeviceQueue> Request<D> for Current<'_, '_, '_, R, D> {
    #[inline(always)]
    fn slot(&self) -> u16 {
        self.0.index
    }

    #[inline(always)]
    fn parts(&mut self) -> (&mut D::Request, &mut Chain) {
        let slot = self.0.slot_mut();
        (&mut slot.request, &mut slot.chain)
    }

    #[inline(always)]
    fn iteration(&mut self) -> &mut Iteration {
        self.0.iteration
    }

    #[inline(always)]
    fn recollect_chain(&mut self) {
        self.0.recollect_chain();
    }

    #[inline(always)]
    fn spend(&mut self, bytes: u64) {
        self.0.bytes += bytes;
    }

    #[inline]
    fn count_error(&mut self) {
        add(&self.0.at.control.errors, 1);
    }

    #[inline(always)]
    fn finish(self, answer: Answer) -> Progress {
        let Visit { core, at, index, slot, .. } = self.0;
        // SAFETY: as in `slot_mut`. `put` borrows no other slot.
        core.put(*at, *index, unsafe { slot.as_ref() }, answer);
        Progress(Outcome::Finished)
    }

    #[inline(always)]
    fn keep(self) -> Progress {
        Progress(Outcome::Pending)
    }

    #[inline(always)]
    fn wait_for_room(self) -> Progress {
        self.0.core.parked.push_back(self.0.index);
        Progress(Outcome::WaitsForRoom)
    }
}

impl<'c, 'v, R: Serve, D: DeviceQueue> Visit<'c, 'v, R, D> {
    #[inline(always)]
    pub(super) fn new(
        core: &'c mut RingCore<D>,
        at: At<'v, R, D::View>,
        iteration: &'c mut Iteration,
    ) -> Self {
        Self { core, at, iteration, index: 0, slot: NonNull::dangling(), bytes: 0 }
    }

    /// Makes the request in slot `index` the current one.
    #[inline(always)]
    fn current(&mut self, index: u16) -> Current<'_, 'c, 'v, R, D> {
        self.index = index;
        self.slot = NonNull::from(&mut self.core.slots[usize::from(index)]);
        Current(self)
    }

    #[inline(always)]
    fn slot_mut(&mut self) -> &mut Slot<D> {
        // SAFETY: `current` has stored the address, slots never move, and nothing else borrows a
        // slot until the request is finished.
        unsafe { self.slot.as_mut() }
    }

    #[cold]
    #[inline(never)]
    fn recollect_chain(&mut self) {
        R::recollect(&mut self.core.slots[usize::from(self.index)], self.at);
    }

    /// Starts the request in slot `index`.
    #[inline(always)]
    pub(super) fn start(&mut self, device: &mut D, index: u16, resubmitted: bool) {
        let Some(view) = &self.at.view.device else { return self.refuse(index) };
        if device.start(view, self.current(index), resubmitted).0 != Outcome::Finished {
            self.core.pin(self.at.view, index);
        }
    }

    #[cold]
    fn refuse(&mut self, index: u16) {
        add(&self.at.control.errors, 1);
        let answer = D::refuse(&mut self.core.slots[usize::from(index)].chain);
        let slot = NonNull::from(&self.core.slots[usize::from(index)]);
        // SAFETY: as in `slot_mut`.
        self.core.put(self.at, index, unsafe { slot.as_ref() }, answer);
    }

    /// Records that a request is in flight. Returns false if the record has no room for it.
    #[inline]
    pub(super) fn record_fetched(&mut self, index: u16) -> bool {
        let slot = &mut self.core.slots[usize::from(index)];
        self.core.tracker.as_mut().is_none_or(|tracker| self.at.ring.record(tracker, slot))
    }
}

impl<D: DeviceQueue> Core<D> {
    /// Continues the requests that have made progress.
    #[inline]
    pub(super) fn complete<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
    ) -> bool {
        let count = self.device.poll(iteration);
        if count == 0 {
            return false;
        }
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        for n in 0..count {
            let index = self.device.progressed(n);
            if self.device.advance(n, visit.current(index)).0 == Outcome::Finished {
                visit.core.unpin(index);
            }
        }
        at.control.inflight.store(self.ring.inflight, Ordering::Relaxed);
        true
    }

    /// Ends the requests that have made progress, and the parked requests. Does not return their
    /// chains.
    #[cold]
    pub(super) fn discard_ended<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
    ) -> bool {
        let before = self.ring.inflight;
        while let Some(index) = self.ring.parked.pop_front() {
            self.ring.forget(index);
        }
        let count = if self.ring.inflight > 0 { self.device.poll(iteration) } else { 0 };
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        for n in 0..count {
            let index = self.device.progressed(n);
            self.device.discard(n, &mut visit.current(index));
            visit.core.forget(index);
        }
        at.control.inflight.store(self.ring.inflight, Ordering::Relaxed);
        self.ring.inflight < before
    }

    /// Retries the parked requests.
    #[cold]
    pub(super) fn retry<R: Serve>(&mut self, at: At<'_, R, D::View>, iteration: &mut Iteration) {
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        // No more than are parked now: a retried request may be parked again for its next I/O.
        for _ in 0..visit.core.parked.len() {
            let Some(&index) = visit.core.parked.front() else { break };
            let waiting = visit.core.parked.len();
            match self.device.retry(visit.current(index)).0 {
                Outcome::Finished => visit.core.unpin(index),
                Outcome::Pending => {}
                // The device has parked it at the end of the list. It keeps its place instead.
                Outcome::WaitsForRoom => {
                    visit.core.parked.truncate(waiting);
                    break;
                }
            }
            visit.core.parked.pop_front();
        }
        at.control.inflight.store(self.ring.inflight, Ordering::Relaxed);
    }
}

impl<D: DeviceQueue> RingCore<D> {
    /// Pins the view that a request was submitted under.
    #[inline]
    fn pin(&mut self, view: &View<D::View>, index: u16) {
        view.pin();
        self.slots[usize::from(index)].view = Some(NonNull::from(view));
        self.inflight += 1;
    }

    #[inline]
    fn unpin(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let pinned = slot.view.take().expect("the device reports each pending request once");
        // SAFETY: a view with pins is not freed, and this view was pinned for this slot.
        unsafe { pinned.as_ref() }.unpin();
        self.inflight -= 1;
    }

    /// Frees the slot of a pending request and unpins its view.
    fn forget(&mut self, index: u16) {
        self.release(index);
        self.unpin(index);
    }

    /// Puts a chain into the used ring and frees its slot, which has the number `index`.
    #[inline(always)]
    fn put<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        index: u16,
        slot: &Slot<D>,
        answer: Answer,
    ) {
        // Read before guest memory is written: after that, the compiler would have to read them
        // again.
        let (id, span, entry) = (slot.id, slot.span, slot.entry);
        let long = slot.chain.is_long();
        if let Some(value) = answer.last_byte {
            slot.chain.write_last_byte(value);
        }
        if at.recorded {
            if let Some(log) = &at.view.log {
                self.log_written(log, at.view, index, answer.dirty);
            }
            if let Some(tracker) = &mut self.tracker {
                tracker.put(entry);
            }
        }
        at.ring.put_used(self.published, self.used, id, answer.written);
        self.used = at.ring.advance(self.used, if R::SPANS { span } else { 1 });
        self.unpublished += 1;
        if long {
            self.take_room_back(index);
        }
        self.free.push(index);
    }

    /// Marks the pages that a request has written.
    #[inline(never)]
    fn log_written(&self, log: &DirtyLog, view: &View<D::View>, index: u16, dirty: u64) {
        let slot = &self.slots[usize::from(index)];
        // SAFETY: a view with pins is not freed. A request without one is of this visit's view.
        let of: &View<D::View> = slot.view.map_or(view, |pinned| unsafe { pinned.as_ref() });
        slot.chain.written(dirty, |host, len| {
            if let Some(gpa) = of.memory.gpa_of_host(host) {
                log.mark(gpa, len);
            }
        });
    }

    /// Publishes to the guest all chains that were put into the used ring.
    #[inline]
    pub(super) fn publish<R: Serve>(&mut self, at: At<'_, R, D::View>) {
        let (from, to) = (self.published, self.used);
        if at.recorded
            && let Some(tracker) = &mut self.tracker
        {
            tracker.publishing(to);
        }
        at.ring.publish_used(from, to);
        self.published = to;
        self.call_due.pending = true;
        let count = std::mem::take(&mut self.unpublished);
        self.call_due.window_requests += count;
        add(&at.control.requests, count.into());
        if at.recorded {
            if let Some(tracker) = &mut self.tracker {
                tracker.published(to);
            }
            if let Some(log) = &at.view.log {
                at.ring.log_used(log, from, to);
            }
        }
    }
}
