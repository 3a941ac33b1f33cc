//! Takes chains from the ring and starts their requests.
#![expect(unsafe_code, reason = "translates with the memory of a view")]

use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use guest_memory::{Near, Nearest};
use reactor::{Cause, Events, Iteration};
use virtqueue::inflight::Tracker;
use virtqueue::{
    Chained, KeptChain, PackedChain, PackedRing, Ring, RingError, SplitChain, SplitRing, cache,
};

use super::core::{At, Core, RingCore};
use super::requests::Visit;
use super::slot::{Expected, Slot};
use super::{Event, View};
use crate::device_queue::DeviceQueue;

/// New requests that one visit takes at most, so that a queue cannot monopolize a reactor. SPDK's
/// number.
const VISIT_REQUESTS_MAX: u16 = 32;
/// Bytes after which a visit takes no further request, for the same reason: 32 requests of the
/// largest size that Linux sends would be 40 MiB of copying for a memory disk.
const VISIT_BYTES_MAX: u64 = 512 << 10;
/// Pieces of memory after which a visit takes no further request: invalid chains cost time
/// too.
const VISIT_PIECES_MAX: usize = 1024;

/// Slots whose chains were collected in a visit.
type Batch = ArrayVec<u16, { VISIT_REQUESTS_MAX as usize }>;

/// A ring that a core can serve: finds chains in it.
pub(super) trait Serve: Ring + Sized {
    /// Whether a chain takes as many places of the ring as it has descriptors.
    const SPANS: bool;

    /// Collects available chains, up to the limits of a visit. At least `pending` chains are
    /// available.
    ///
    /// # Errors
    /// The ring is invalid. The chains in the batch are valid.
    fn collect<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        pending: u16,
        batch: &mut Batch,
    ) -> Result<(), RingError>;

    /// Collects the chain of a request that is resubmitted. Returns false if there is no room for
    /// it now.
    ///
    /// # Errors
    /// The record of the request is invalid.
    fn collect_resubmission<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError>;

    /// Collects the chain of a new request once more.
    fn recollect<D: DeviceQueue>(slot: &mut Slot<D>, at: At<'_, Self, D::View>);

    /// Records that the request of `slot` is about to be submitted. Returns false if the record has
    /// no room.
    fn record<D: DeviceQueue>(&self, tracker: &mut Tracker, slot: &mut Slot<D>) -> bool;
}

impl Serve for SplitRing {
    const SPANS: bool = false;

    /// Reads the heads twice. The first pass only prefetches their descriptors, so that these cache
    /// lines arrive while the second pass uses others.
    #[inline]
    fn collect<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        pending: u16,
        batch: &mut Batch,
    ) -> Result<(), RingError> {
        let count = pending.min(VISIT_REQUESTS_MAX);
        for n in 0..count {
            at.ring.prefetch_desc(at.ring.head(core.last_avail.wrapping_add(n)));
        }
        // SAFETY: `nearest` is of this view's memory: `adopt` clears it when the view changes.
        let mut near = unsafe { at.view.memory.near(core.nearest) };
        let mut limit = Limit::default();
        for n in 0..count {
            let Some(index) = core.free.pop() else { break };
            let head = at.ring.head(core.last_avail.wrapping_add(n));
            let chain = SplitChain { ring: at.ring, head };
            if core.collect(index, &mut near, chain).is_none() {
                core.free.push(index);
                break;
            }
            let slot = &mut core.slots[usize::from(index)];
            slot.id = head;
            slot.chain.prefetch();
            batch.push(index);
            if limit.reached_with(slot) {
                break;
            }
        }
        core.nearest = near.nearest();
        if let Some(&index) = batch.last() {
            let slot = &core.slots[usize::from(index)];
            if let Some(header) = slot.chain.first_readable() {
                core.expected = Expected { head: slot.id, header };
            }
        }
        Ok(())
    }

    fn collect_resubmission<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError> {
        let slot = &mut core.slots[usize::from(index)];
        (slot.id, slot.entry) = (entry, entry);
        let chain = SplitChain { ring: at.ring, head: entry };
        Ok(core.collect(index, &mut near_default(at.view), chain).is_some())
    }

    fn recollect<D: DeviceQueue>(slot: &mut Slot<D>, at: At<'_, Self, D::View>) {
        recollect(slot, at.view, SplitChain { ring: at.ring, head: slot.id });
    }

    #[inline]
    fn record<D: DeviceQueue>(&self, tracker: &mut Tracker, slot: &mut Slot<D>) -> bool {
        slot.entry = slot.id;
        tracker.fetched(slot.id);
        true
    }
}

impl Serve for PackedRing {
    const SPANS: bool = true;

    /// Collects one chain after the other: only the end of a chain shows where the next one begins.
    /// A prefetch pass is not needed, as descriptors are adjacent.
    #[inline]
    fn collect<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        _pending: u16,
        batch: &mut Batch,
    ) -> Result<(), RingError> {
        // SAFETY: as for split rings.
        let mut near = unsafe { at.view.memory.near(core.nearest) };
        let mut limit = Limit::default();
        let mut position = core.last_avail;
        let mut result = Ok(());
        while !batch.is_full() && at.ring.pending(position)? > 0 {
            let Some(index) = core.free.pop() else { break };
            let room = at.ring.room(core.published, position);
            let chain = PackedChain { ring: at.ring, position, room };
            let Some(taken) = core.collect(index, &mut near, chain) else {
                core.free.push(index);
                break;
            };
            let slot = &mut core.slots[usize::from(index)];
            match taken {
                Ok(taken) => (slot.id, slot.span, slot.position) = (taken.id, taken.span, position),
                Err(error) => {
                    core.release(index);
                    result = Err(error);
                    break;
                }
            }
            position = at.ring.advance(position, slot.span);
            slot.chain.prefetch();
            if let Some(header) = slot.chain.first_readable() {
                core.expected.header = header;
            }
            batch.push(index);
            if limit.reached_with(slot) {
                break;
            }
        }
        core.nearest = near.nearest();
        result
    }

    fn collect_resubmission<D: DeviceQueue>(
        core: &mut RingCore<D>,
        at: At<'_, Self, D::View>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError> {
        let Some(tracker) = core.tracker.take() else { return Ok(false) };
        let chain = KeptChain { ring: at.ring, tracker: &tracker, entry };
        let taken = core.collect(index, &mut near_default(at.view), chain);
        core.tracker = Some(tracker);
        let Some(taken) = taken else { return Ok(false) };
        let slot = &mut core.slots[usize::from(index)];
        let (id, span) = taken.ok_or(RingError::Chain(core.used))?;
        (slot.id, slot.span, slot.entry) = (id, span, entry);
        Ok(true)
    }

    fn recollect<D: DeviceQueue>(slot: &mut Slot<D>, at: At<'_, Self, D::View>) {
        let chain = PackedChain { ring: at.ring, position: slot.position, room: slot.span };
        recollect(slot, at.view, chain);
    }

    #[inline]
    fn record<D: DeviceQueue>(&self, tracker: &mut Tracker, slot: &mut Slot<D>) -> bool {
        let mut position = slot.position;
        let descs = (0..slot.span).map(|_| {
            let desc = self.desc(position);
            position = self.advance(position, 1);
            desc
        });
        match tracker.fetched_packed(descs) {
            Some(entry) => {
                slot.entry = entry;
                true
            }
            None => false,
        }
    }
}

/// Counts what one visit takes.
#[derive(Default)]
struct Limit {
    pieces: usize,
    bytes: u64,
}

impl Limit {
    /// Adds `slot`. Returns whether the visit takes no further request.
    #[inline]
    fn reached_with<D: DeviceQueue>(&mut self, slot: &Slot<D>) -> bool {
        self.pieces += slot.chain.pieces();
        self.bytes += slot.chain.bytes();
        self.pieces > VISIT_PIECES_MAX || self.bytes > VISIT_BYTES_MAX
    }
}

/// Collects a chain that was collected before, into the room that its slot has.
fn recollect<D: DeviceQueue, C: Chained>(slot: &mut Slot<D>, view: &View<D::View>, chain: C) {
    let mut near = near_default(view);
    match slot.chain.take_long() {
        Some(long) => drop(slot.chain.collect_long(&mut near, chain, long)),
        None => drop(slot.chain.collect(&mut near, chain)),
    }
}

/// Returns a translator for a chain at any address.
fn near_default<V>(view: &View<V>) -> Near<'_> {
    // SAFETY: the default is valid for every memory.
    unsafe { view.memory.near(Nearest::default()) }
}

impl<D: DeviceQueue> RingCore<D> {
    /// Collects a chain into a slot. Returns `None` if it is a long chain and there is no room for
    /// one now.
    #[inline(always)]
    fn collect<C: Chained + Copy>(
        &mut self,
        index: u16,
        near: &mut Near<'_>,
        chain: C,
    ) -> Option<C::Taken> {
        let slot = &mut self.slots[usize::from(index)];
        let taken = slot.chain.collect(near, chain);
        if slot.chain.overflown() { self.collect_long(index, near, chain) } else { Some(taken) }
    }

    #[cold]
    fn collect_long<C: Chained + Copy>(
        &mut self,
        index: u16,
        near: &mut Near<'_>,
        chain: C,
    ) -> Option<C::Taken> {
        let room = self.long.pop();
        self.room_wanted = room.is_none();
        Some(self.slots[usize::from(index)].chain.collect_long(near, chain, room?))
    }

    /// Frees a slot.
    pub(super) fn release(&mut self, index: u16) {
        if self.slots[usize::from(index)].chain.is_long() {
            self.take_room_back(index);
        }
        self.free.push(index);
    }

    #[cold]
    pub(super) fn take_room_back(&mut self, index: u16) {
        self.long.extend(self.slots[usize::from(index)].chain.take_long());
        self.room_wanted = false;
    }

    /// Returns the number of places in the ring that the chains of `batch` take.
    fn spans(&self, batch: &[u16]) -> u16 {
        batch.iter().fold(0, |sum, &index| sum + self.slots[usize::from(index)].span)
    }
}

impl<D: DeviceQueue> Core<D> {
    /// Takes requests and submits them: first the ones that are resubmitted, then new ones. The
    /// batch is processed in passes, so that the cache lines of one pass arrive while those of
    /// another are used.
    #[inline]
    pub(super) fn fetch<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> bool {
        let At { control, view, ring, .. } = at;
        let available = if self.ring.resubmissions.is_empty() {
            if D::SELECTIVE && !self.device.wants_requests() {
                return false;
            }
            ring.pending(self.ring.last_avail)
        } else {
            Ok(1)
        };
        let pending = match available {
            Ok(0) => return false,
            Ok(pending) if !view.memory.truncated() => pending,
            _ => {
                self.ring.break_queue(control, events);
                return false;
            }
        };
        if !self.ring.resubmissions.is_empty() {
            return self.fetch_resubmissions(at, iteration, events);
        }
        cache::prefetch_write(self.ring.expected.header);
        ring.prefetch_avail(self.ring.last_avail, self.ring.expected.head);
        ring.prefetch_used(self.ring.used);
        iteration.note(Cause::Fetch);
        iteration.read_clock();
        let mut batch = Batch::new();
        let collected = R::collect(&mut self.ring, at, pending, &mut batch);
        let taken = self.submit_batch(at, &batch, iteration, events);
        let before = self.ring.last_avail;
        #[expect(clippy::cast_possible_truncation, reason = "at most the 32 of a batch")]
        let by = if R::SPANS { self.ring.spans(&batch[..taken]) } else { taken as u16 };
        self.ring.last_avail = ring.advance(before, by);
        self.ring.places.take(by);
        // The next visit collects the requests that did not fit again, in the same order.
        batch[taken..].iter().rev().for_each(|&index| self.ring.release(index));
        control.last_avail.store(self.ring.last_avail, Ordering::Relaxed);
        control.inflight.store(self.ring.inflight, Ordering::Relaxed);
        if self.ring.armed || ring.kick_suppression_is_due(before, self.ring.last_avail) {
            self.ring.refuse_kicks(view, view.ring.as_dyn());
        }
        self.kick_device();
        // The chains before the invalid one are served first.
        if collected.is_err() && taken == batch.len() {
            self.ring.break_queue(control, events);
        }
        taken > 0
    }

    /// Takes requests that are resubmitted, oldest first, and submits them.
    #[cold]
    fn fetch_resubmissions<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> bool {
        iteration.note(Cause::Fetch);
        iteration.read_clock();
        let (mut taken, mut bytes, mut pieces) = (0, 0, 0);
        while taken < VISIT_REQUESTS_MAX
            && bytes <= VISIT_BYTES_MAX
            && pieces <= VISIT_PIECES_MAX
            && self.ring.parked.is_empty()
        {
            let Some(&entry) = self.ring.resubmissions.last() else { break };
            let Some(index) = self.ring.free.pop() else { break };
            match R::collect_resubmission(&mut self.ring, at, index, entry) {
                Ok(true) => {}
                Ok(false) => {
                    self.ring.release(index);
                    break;
                }
                Err(_) => {
                    self.ring.release(index);
                    self.ring.break_queue(at.control, events);
                    break;
                }
            }
            self.ring.resubmissions.pop();
            pieces += self.ring.slots[usize::from(index)].chain.pieces();
            bytes += self.start_resubmission(at, index, iteration);
            taken += 1;
        }
        at.control.inflight.store(self.ring.inflight, Ordering::Relaxed);
        self.kick_device();
        taken > 0
    }

    #[inline(never)]
    fn start_resubmission<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        index: u16,
        iteration: &mut Iteration,
    ) -> u64 {
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        visit.start(&mut self.device, index, true);
        visit.bytes
    }

    #[inline]
    fn kick_device(&mut self) {
        if self.ring.inflight > 0 {
            self.device.kick();
        }
    }

    /// The last pass: starts the requests. Returns how many were taken, which are not all if the
    /// device is full or enough bytes were moved.
    // A function of its own, so that it has all registers.
    #[inline(never)]
    fn submit_batch<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        batch: &[u16],
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> usize {
        // A batch of one has no next request to look ahead to.
        if batch.len() > 1 && self.device.looks_ahead() {
            return self.submit_looking_ahead(at, batch, iteration, events);
        }
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        for (n, &index) in batch.iter().enumerate() {
            if D::SELECTIVE && !self.device.wants_requests() {
                return n;
            }
            if at.recorded && !visit.record_fetched(index) {
                visit.core.break_queue(at.control, events);
                return n;
            }
            visit.start(&mut self.device, index, false);
            if visit.bytes > VISIT_BYTES_MAX || !visit.core.parked.is_empty() {
                return n + 1;
            }
        }
        batch.len()
    }

    /// As [`Core::submit_batch`]. While one request is served, the processor prefetches the
    /// beginning of what the next one accesses.
    #[inline(never)]
    fn submit_looking_ahead<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        batch: &[u16],
        iteration: &mut Iteration,
        events: &Events<Event>,
    ) -> usize {
        let mut visit = Visit::new(&mut self.ring, at, iteration);
        for (n, &index) in batch.iter().enumerate() {
            if at.recorded && !visit.record_fetched(index) {
                visit.core.break_queue(at.control, events);
                return n;
            }
            if let Some(&next) = batch.get(n + 1) {
                self.device.look_ahead(&visit.core.slots[usize::from(next)].chain);
            }
            visit.start(&mut self.device, index, false);
            if visit.bytes > VISIT_BYTES_MAX || !visit.core.parked.is_empty() {
                return n + 1;
            }
        }
        batch.len()
    }
}
