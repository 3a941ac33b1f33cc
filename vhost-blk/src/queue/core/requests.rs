//! What a queue's owner does with requests: takes them from the ring, submits them, answers them.
#![expect(unsafe_code, reason = "submits guest memory")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use bdev::{Completion, Io, Op, Status, Submit, Tag};

use super::{At, Core, Expected, Slot, add};
use crate::cache;
use crate::dirty_log::DirtyLog;
use crate::inflight::Tracker;
use crate::memory::{Near, Nearest};
use crate::queue::{Queue, View};
use crate::reactor::{Cause, Events, Turn};
use crate::request::{Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use crate::ring::{
    Chained, KeptChain, PackedChain, PackedRing, Ring, RingError, SplitChain, SplitRing,
};

/// New requests taken in one visit, so that one queue cannot keep a reactor; SPDK's number.
const VISIT_REQUESTS_MAX: usize = 32;
/// Bytes after which a visit takes no further request, for the same reason: 32 requests of the
/// largest size that Linux makes would be 40 MiB of copying for a memory disk.
const VISIT_BYTES_MAX: u64 = 512 << 10;
/// Pieces of memory after which a visit takes no further request: chains that lead nowhere cost time
/// too.
const VISIT_PIECES_MAX: usize = 1024;

/// Slots with chains that were collected in a visit.
type Batch = ArrayVec<u16, VISIT_REQUESTS_MAX>;

/// What is left to do of a request when its I/O has ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    Nothing,
    /// Make it durable: the guest wants writes to be when they are answered.
    Flush,
    /// The further ranges of its chain.
    Ranges,
    /// The same, and then [`Rest::Flush`].
    RangesThenFlush,
}

/// Reads or writes of one visit that were done on the spot, to be counted at its end.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub count: u64,
    pub bytes: u64,
}

/// A ring that a core can serve: how chains are found in it.
pub(super) trait Serve: Ring + Sized {
    /// Whether a chain takes as many places of the ring as it has descriptors.
    const SPANS: bool;

    /// Collects chains that are available, `pending` of them at least, up to the limits of a visit.
    ///
    /// # Errors
    /// The ring makes no sense any more; what is in the batch does.
    fn collect(
        core: &mut Core,
        at: At<'_, Self>,
        pending: u16,
        batch: &mut Batch,
    ) -> Result<(), RingError>;

    /// Collects the chain of a request that is to be done again. `false` if there is no room for it
    /// right now.
    ///
    /// # Errors
    /// The record of it makes no sense.
    fn collect_again(
        core: &mut Core,
        at: At<'_, Self>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError>;

    /// Collects a new request's chain once more.
    fn collect_anew(slot: &mut Slot, at: At<'_, Self>);

    /// Writes down that the request of `slot` is about to be submitted. `false` if that cannot be.
    fn record(&self, tracker: &mut Tracker, slot: &mut Slot) -> bool;
}

impl Serve for SplitRing {
    const SPANS: bool = false;

    /// Heads twice, the first time only to have their descriptors fetched, so that the lines of one
    /// pass are on their way while those of the other are used.
    #[inline]
    fn collect(
        core: &mut Core,
        at: At<'_, Self>,
        pending: u16,
        batch: &mut Batch,
    ) -> Result<(), RingError> {
        let count = pending.min(VISIT_REQUESTS_MAX as u16);
        for n in 0..count {
            at.ring.prefetch_desc(at.ring.head(core.last_avail.wrapping_add(n)));
        }
        // SAFETY: the nearest place is of this view's memory: `adopt` forgets that of another.
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
            if let Some(header) = slot.chain.header() {
                core.expected = Expected { head: slot.id, header };
            }
        }
        Ok(())
    }

    fn collect_again(
        core: &mut Core,
        at: At<'_, Self>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError> {
        let slot = &mut core.slots[usize::from(index)];
        (slot.id, slot.entry) = (entry, entry);
        let chain = SplitChain { ring: at.ring, head: entry };
        Ok(core.collect(index, &mut near_anything(at.view), chain).is_some())
    }

    fn collect_anew(slot: &mut Slot, at: At<'_, Self>) {
        collect_anew(slot, at.view, SplitChain { ring: at.ring, head: slot.id });
    }

    #[inline]
    fn record(&self, tracker: &mut Tracker, slot: &mut Slot) -> bool {
        slot.entry = slot.id;
        tracker.fetched(slot.id);
        true
    }
}

impl Serve for PackedRing {
    const SPANS: bool = true;

    /// One after the other: only a chain's end tells where the next one begins, and descriptors lie
    /// side by side as it is.
    #[inline]
    fn collect(
        core: &mut Core,
        at: At<'_, Self>,
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
            if let Some(header) = slot.chain.header() {
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

    fn collect_again(
        core: &mut Core,
        at: At<'_, Self>,
        index: u16,
        entry: u16,
    ) -> Result<bool, RingError> {
        let Some(tracker) = core.tracker.take() else { return Ok(false) };
        let chain = KeptChain { ring: at.ring, tracker: &tracker, entry };
        let taken = core.collect(index, &mut near_anything(at.view), chain);
        core.tracker = Some(tracker);
        let Some(taken) = taken else { return Ok(false) };
        let slot = &mut core.slots[usize::from(index)];
        let (id, span) = taken.ok_or(RingError::Chain(core.used))?;
        (slot.id, slot.span, slot.entry) = (id, span, entry);
        Ok(true)
    }

    fn collect_anew(slot: &mut Slot, at: At<'_, Self>) {
        let chain = PackedChain { ring: at.ring, position: slot.position, room: slot.span };
        collect_anew(slot, at.view, chain);
    }

    #[inline]
    fn record(&self, tracker: &mut Tracker, slot: &mut Slot) -> bool {
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

/// How much one visit takes.
#[derive(Default)]
struct Limit {
    pieces: usize,
    bytes: u64,
}

impl Limit {
    /// Whether a visit that has taken `slot` too takes no more.
    #[inline]
    fn reached_with(&mut self, slot: &Slot) -> bool {
        self.pieces += slot.chain.pieces();
        self.bytes += slot.chain.bytes();
        self.pieces > VISIT_PIECES_MAX || self.bytes > VISIT_BYTES_MAX
    }
}

/// Collects a chain that has been collected once, in the room that it has.
fn collect_anew<C: Chained>(slot: &mut Slot, view: &View, chain: C) {
    let mut near = near_anything(view);
    match slot.chain.take_long() {
        Some(long) => drop(slot.chain.collect_long(&mut near, chain, long)),
        None => drop(slot.chain.collect(&mut near, chain)),
    }
}

/// A translator for a chain that may be anywhere.
fn near_anything(view: &View) -> Near<'_> {
    // SAFETY: the default is of every memory.
    unsafe { view.memory.near(Nearest::default()) }
}

impl Core {
    /// Collects a chain into a slot. `None` if it is a long one and there is no room for it right now.
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

    /// Takes what the device has finished.
    pub(super) fn complete<R: Serve>(&mut self, at: At<'_, R>, turn: &mut Turn) -> bool {
        let Some(device) = &mut self.device else { return false };
        let n = device.channel.0.poll(&mut self.done);
        if n == 0 {
            return false;
        }
        turn.note(Cause::Complete);
        turn.read_clock();
        for i in 0..n {
            let Completion { tag, status } = self.done[i];
            self.finish_pinned(at, tag.0, status, turn);
        }
        at.queue.inflight.store(self.inflight, Ordering::Relaxed);
        true
    }

    /// Discards what the device has completed, and what it had no room for, without answering the
    /// guest.
    #[cold]
    pub(super) fn forget_completed(&mut self, queue: &Queue, turn: &mut Turn) -> bool {
        let before = self.inflight;
        while let Some(io) = self.parked.pop_front() {
            self.forget(io.tag.0);
        }
        turn.read_clock();
        let n = match &mut self.device {
            Some(device) if self.inflight > 0 => device.channel.0.poll(&mut self.done),
            _ => 0,
        };
        for i in 0..n {
            let Completion { tag, status } = self.done[i];
            if status == Status::Ok {
                // A failure may only be due to the abandonment.
                self.count_done(queue, tag.0, turn);
            }
            self.forget(tag.0);
        }
        queue.inflight.store(self.inflight, Ordering::Relaxed);
        self.inflight < before
    }

    /// Frees a slot whose I/O has ended, and unpins the view that it was submitted under.
    fn forget(&mut self, index: u16) {
        self.release(index);
        self.unpin(index);
    }

    fn count_done(&mut self, queue: &Queue, index: u16, turn: &Turn) {
        let slot = &self.slots[usize::from(index)];
        if let Some(device) = &mut self.device {
            let ticks = turn.now_ticks().saturating_sub(slot.started_ticks);
            device.count(queue, (index, slot.op, slot.len), ticks, Status::Ok);
        }
    }

    #[inline]
    fn unpin(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let pinned = slot.view.take().expect("a channel reports an I/O once");
        // SAFETY: a view with pins is not freed, and this one was pinned for this slot.
        unsafe { pinned.as_ref() }.unpin();
        self.inflight -= 1;
    }

    /// Goes on with a request whose I/O the device has done, and lets go of the view that it was
    /// submitted under when there is nothing left to do.
    fn finish_pinned<R: Serve>(
        &mut self,
        at: At<'_, R>,
        tag: u16,
        status: Status,
        turn: &mut Turn,
    ) {
        let slot = &mut self.slots[usize::from(tag)];
        if let Some(device) = &mut self.device {
            let ticks = turn.now_ticks().saturating_sub(slot.started_ticks);
            device.count(at.queue, (tag, slot.op, slot.len), ticks, status);
        }
        let mut status = status;
        if slot.rest != Rest::Nothing {
            match self.go_on(at.queue, tag, status, turn) {
                Some(last) => status = last,
                None => return,
            }
        }
        self.finish(at, tag, status);
        self.unpin(tag);
    }

    /// Does what is left of a request, whose last I/O has ended with `status`. `None` if it is not
    /// done yet: the channel has more to do, or no room.
    #[cold]
    fn go_on(
        &mut self,
        queue: &Queue,
        index: u16,
        mut status: Status,
        turn: &mut Turn,
    ) -> Option<Status> {
        let slot = &mut self.slots[usize::from(index)];
        while status == Status::Ok {
            let (op, offset, len) = match slot.rest {
                Rest::Nothing => break,
                Rest::Flush => {
                    slot.rest = Rest::Nothing;
                    (Op::Flush, 0, 0)
                }
                Rest::Ranges | Rest::RangesThenFlush => match slot.chain.next_range() {
                    Some((offset, len)) => (slot.op, offset, len),
                    None if slot.rest == Rest::RangesThenFlush => {
                        slot.rest = Rest::Nothing;
                        (Op::Flush, 0, 0)
                    }
                    None => break,
                },
            };
            (slot.op, slot.len) = (op, len);
            slot.started_ticks = turn.now_ticks();
            // What the guest is told was written is the same for all operations but reads.
            let io = Io::plain(op, Tag(index), offset, len).unmapping(slot.chain.may_unmap());
            let Some(device) = &mut self.device else {
                add(&queue.errors, 1);
                return Some(Status::IoError);
            };
            // SAFETY: it names no memory.
            status = match unsafe { device.channel.0.submit(io) } {
                Submit::Done(status) => {
                    let ticks = turn.read_clock().saturating_sub(slot.started_ticks);
                    device.count(queue, (index, op, len), ticks, status);
                    status
                }
                Submit::Queued => {
                    device.channel.0.kick();
                    return None;
                }
                Submit::Full(io) => {
                    self.parked.push_back(io);
                    return None;
                }
            };
        }
        Some(status)
    }

    /// Answers the request in `slot` and frees the slot.
    #[inline(always)]
    fn finish<R: Serve>(&mut self, at: At<'_, R>, index: u16, status: Status) {
        let slot = &self.slots[usize::from(index)];
        let status = match status {
            Status::Ok => STATUS_OK,
            Status::IoError => STATUS_IOERR,
            Status::Unsupported => STATUS_UNSUPP,
        };
        let (written, data_most) = match slot.op {
            Op::Read => (slot.chain.written_by_read(), u64::MAX),
            _ => (1, 0),
        };
        self.put(at, index, status, written, data_most);
    }

    /// Writes a chain's status if it has a place for one, puts it into the used ring and frees its
    /// slot. `data_most`: bytes of data that may have been written, whatever the guest is told.
    #[inline(always)]
    fn put<R: Serve>(
        &mut self,
        at: At<'_, R>,
        index: u16,
        status: u8,
        written: u32,
        data_most: u64,
    ) {
        let slot = &self.slots[usize::from(index)];
        // Before guest memory is written, after which the compiler would look the slot up again.
        let &Slot { id, span, entry, .. } = slot;
        let long = slot.chain.is_long();
        slot.chain.write_status(status);
        if at.recorded {
            if let Some(log) = &at.view.log {
                self.log_written(log, at.view, index, data_most);
            }
            if let Some(tracker) = &mut self.tracker {
                tracker.put(entry);
            }
        }
        at.ring.put_used(self.published, self.used, id, written);
        self.used = at.ring.advance(self.used, if R::SPANS { span } else { 1 });
        self.unpublished += 1;
        if long {
            self.take_room_back(index);
        }
        self.free.push(index);
    }

    /// As [`Core::put`], for a request that no device has seen.
    #[inline(never)]
    fn put_unserved<R: Serve>(&mut self, at: At<'_, R>, index: u16, status: u8, written: u32) {
        // GET_ID's; what else is refused may say that it has written all of its data.
        let data_most = if status == STATUS_OK { u64::from(written) } else { 0 };
        self.put(at, index, status, written, data_most);
    }

    /// Marks the pages that a request has dirtied.
    #[inline(never)]
    fn log_written(&self, log: &DirtyLog, view: &View, index: u16, data_most: u64) {
        let slot = &self.slots[usize::from(index)];
        // SAFETY: a view with pins is not freed; without, the request was of this visit's view.
        let of = slot.view.map_or(view, |pinned| unsafe { pinned.as_ref() });
        slot.chain.written(data_most, |host, len| {
            if let Some(gpa) = of.memory.gpa_of_host(host) {
                log.mark(gpa, len);
            }
        });
    }

    /// Frees a slot.
    fn release(&mut self, index: u16) {
        if self.slots[usize::from(index)].chain.is_long() {
            self.take_room_back(index);
        }
        self.free.push(index);
    }

    #[cold]
    fn take_room_back(&mut self, index: u16) {
        self.long.extend(self.slots[usize::from(index)].chain.take_long());
        self.room_wanted = false;
    }

    /// Tells the guest about everything that was put.
    #[inline]
    pub(super) fn publish<R: Serve>(&mut self, at: At<'_, R>) {
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
        add(&at.queue.requests, count.into());
        if at.recorded {
            if let Some(tracker) = &mut self.tracker {
                tracker.published(to);
            }
            if let Some(log) = &at.view.log {
                at.ring.log_used(log, from, to);
            }
        }
    }

    /// Takes requests and submits them: those that are to be done again first, then new ones, in
    /// passes over the batch, so that the lines of one pass are on their way while those of another
    /// are used.
    #[inline]
    pub(super) fn fetch<R: Serve>(
        &mut self,
        at: At<'_, R>,
        turn: &mut Turn,
        events: &Events,
        tallies: &mut [Tally; 2],
    ) -> bool {
        let At { queue, view, ring, .. } = at;
        let available = if self.again.is_empty() { ring.pending(self.last_avail) } else { Ok(1) };
        let pending = match available {
            Ok(0) => return false,
            Ok(pending) if !view.memory.truncated() => pending,
            _ => {
                self.break_queue(queue, events);
                return false;
            }
        };
        if !self.again.is_empty() {
            return self.fetch_again(at, turn, events, tallies);
        }
        cache::prefetch_write(self.expected.header);
        ring.prefetch_avail(self.last_avail, self.expected.head);
        ring.prefetch_used(self.used);
        turn.note(Cause::Fetch);
        turn.read_clock();
        let mut batch = Batch::new();
        let collected = R::collect(self, at, pending, &mut batch);
        let taken = self.submit_batch(at, &batch, turn, events, tallies);
        let before = self.last_avail;
        let by = if R::SPANS { self.spans(&batch[..taken]) } else { taken as u16 };
        self.last_avail = ring.advance(before, by);
        // Those that did not fit are looked at again, in their order, at the next visit.
        batch[taken..].iter().rev().for_each(|&index| self.release(index));
        queue.last_avail.store(self.last_avail, Ordering::Relaxed);
        queue.inflight.store(self.inflight, Ordering::Relaxed);
        if self.armed || ring.kick_suppression_is_due(before, self.last_avail) {
            self.refuse_kicks(view, view.ring.as_dyn());
        }
        self.kick_device();
        // The chains in front of the invalid one are served first.
        if collected.is_err() && taken == batch.len() {
            self.break_queue(queue, events);
        }
        taken > 0
    }

    /// Places in the ring that the chains of `batch` have taken.
    fn spans(&self, batch: &[u16]) -> u16 {
        batch.iter().fold(0, |sum, &index| sum + self.slots[usize::from(index)].span)
    }

    /// Takes requests that are to be done again, oldest first, and submits them.
    #[cold]
    fn fetch_again<R: Serve>(
        &mut self,
        at: At<'_, R>,
        turn: &mut Turn,
        events: &Events,
        tallies: &mut [Tally; 2],
    ) -> bool {
        turn.note(Cause::Fetch);
        turn.read_clock();
        let (mut taken, mut bytes, mut pieces) = (0, 0, 0);
        while taken < VISIT_REQUESTS_MAX
            && bytes <= VISIT_BYTES_MAX
            && pieces <= VISIT_PIECES_MAX
            && self.parked.is_empty()
        {
            let Some(&entry) = self.again.last() else { break };
            let Some(index) = self.free.pop() else { break };
            match R::collect_again(self, at, index, entry) {
                Ok(true) => {}
                Ok(false) => {
                    self.release(index);
                    break;
                }
                Err(_) => {
                    self.release(index);
                    self.break_queue(at.queue, events);
                    break;
                }
            }
            self.again.pop();
            pieces += self.slots[usize::from(index)].chain.pieces();
            bytes += self.start_again(at, index, turn, tallies);
            taken += 1;
        }
        at.queue.inflight.store(self.inflight, Ordering::Relaxed);
        self.kick_device();
        taken > 0
    }

    #[inline(never)]
    fn start_again<R: Serve>(
        &mut self,
        at: At<'_, R>,
        index: u16,
        turn: &mut Turn,
        tallies: &mut [Tally; 2],
    ) -> u64 {
        self.start(at, index, turn, tallies, true)
    }

    #[inline]
    fn kick_device(&mut self) {
        if self.inflight > 0
            && let Some(device) = &mut self.device
        {
            device.channel.0.kick();
        }
    }

    /// The last pass: makes requests of the chains and submits them. Answers with how many were
    /// taken: fewer than there are when the channel is full, or enough bytes were moved.
    // A function of its own, whose registers are for nothing else.
    #[inline(never)]
    fn submit_batch<R: Serve>(
        &mut self,
        at: At<'_, R>,
        batch: &[u16],
        turn: &mut Turn,
        events: &Events,
        tallies: &mut [Tally; 2],
    ) -> usize {
        // A batch of one has nothing to look ahead to.
        if batch.len() > 1 && self.device.as_ref().is_some_and(|d| d.shortcut.copies()) {
            return self.submit_copies(at, batch, turn, events, tallies);
        }
        let mut bytes = 0;
        for (n, &index) in batch.iter().enumerate() {
            if at.recorded && !self.record_fetched(at.ring, index) {
                self.break_queue(at.queue, events);
                return n;
            }
            bytes += self.start(at, index, turn, tallies, false);
            if bytes > VISIT_BYTES_MAX || !self.parked.is_empty() {
                return n + 1;
            }
        }
        batch.len()
    }

    /// As [`Core::submit_batch`], for a disk in memory: while one request is copied, the processor
    /// fetches the beginning of what the next one copies. The first lines of a random place are what a
    /// copy waits for.
    #[inline(never)]
    fn submit_copies<R: Serve>(
        &mut self,
        at: At<'_, R>,
        batch: &[u16],
        turn: &mut Turn,
        events: &Events,
        tallies: &mut [Tally; 2],
    ) -> usize {
        let mut bytes = 0;
        for (n, &index) in batch.iter().enumerate() {
            if at.recorded && !self.record_fetched(at.ring, index) {
                self.break_queue(at.queue, events);
                return n;
            }
            if let Some(&next) = batch.get(n + 1) {
                self.look_ahead(next);
            }
            bytes += self.start(at, index, turn, tallies, false);
            if bytes > VISIT_BYTES_MAX || !self.parked.is_empty() {
                return n + 1;
            }
        }
        batch.len()
    }

    /// Has the processor fetch what the request in slot `index` will copy.
    #[inline(always)]
    fn look_ahead(&self, index: u16) {
        if let Some(device) = &self.device
            && let Some((offset, len)) = self.slots[usize::from(index)].chain.peek_read()
        {
            device.shortcut.expect_read(offset, len);
        }
    }

    /// Writes down that a request is in flight; `false` if the record has no room for it.
    #[inline]
    fn record_fetched<R: Serve>(&mut self, ring: &R, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        self.tracker.as_mut().is_none_or(|tracker| ring.record(tracker, slot))
    }

    /// Begins the request in slot `index`; answers with its bytes of data. `again` if it was begun
    /// before, by an earlier owner of the ring.
    #[inline(always)]
    fn start<R: Serve>(
        &mut self,
        at: At<'_, R>,
        index: u16,
        turn: &mut Turn,
        tallies: &mut [Tally; 2],
        again: bool,
    ) -> u64 {
        let slot = &mut self.slots[usize::from(index)];
        let mut request = match &at.view.limits {
            Some(limits) => slot.chain.parse(limits),
            None => slot.chain.refuse(),
        };
        if matches!(request, Request::Answer(STATUS_IOERR, _)) && !again {
            request = parse_again(slot, at).unwrap_or(request);
        }
        match request {
            Request::Io { op, offset, len, first, count } => {
                slot.op = op;
                slot.len = len;
                let io = match op {
                    Op::Read | Op::Write => {
                        Io::rw(op, Tag(index), offset, len, slot.chain.data(first, count))
                    }
                    _ => Io::plain(op, Tag(index), offset, len).unmapping(slot.chain.may_unmap()),
                };
                // No shortcut for what has a rest: none does other than reads and writes.
                let alone = op == Op::Read || !at.view.write_through;
                // SAFETY: the channel is open, and segments and memory stay as they are meanwhile.
                let done =
                    alone && self.device.as_ref().is_some_and(|d| unsafe { d.shortcut.run(&io) });
                if done {
                    let tally = &mut tallies[usize::from(op == Op::Write)];
                    tally.count += 1;
                    tally.bytes += len;
                    self.finish(at, index, Status::Ok);
                } else {
                    self.submit(at, io, turn);
                }
                len
            }
            Request::Answer(status, written) => {
                if status != STATUS_OK {
                    add(&at.queue.errors, 1);
                }
                self.put_unserved(at, index, status, written + 1);
                0
            }
            Request::NoStatus => {
                add(&at.queue.errors, 1);
                self.put_unserved(at, index, STATUS_IOERR, 0);
                0
            }
        }
    }

    /// Submits an I/O whose slot is filled in.
    fn submit<R: Serve>(&mut self, at: At<'_, R>, io: Io, turn: &mut Turn) {
        let index = io.tag.0;
        let slot = &mut self.slots[usize::from(index)];
        slot.started_ticks = turn.now_ticks();
        slot.rest = match slot.op {
            Op::Write if at.view.write_through => Rest::Flush,
            Op::WriteZeroes if at.view.write_through => Rest::RangesThenFlush,
            Op::Unmap | Op::WriteZeroes if slot.chain.has_ranges() => Rest::Ranges,
            _ => Rest::Nothing,
        };
        let Some(device) = &mut self.device else {
            add(&at.queue.errors, 1);
            self.finish(at, index, Status::IoError);
            return;
        };
        // SAFETY: segments and memory stay until the completion: the slot is not reused before,
        // and its pin on the view keeps the memory mapped.
        match unsafe { device.channel.0.submit(io) } {
            Submit::Done(mut status) => {
                let ticks = turn.read_clock().saturating_sub(slot.started_ticks);
                device.count(at.queue, (index, slot.op, slot.len), ticks, status);
                if slot.rest != Rest::Nothing {
                    match self.go_on(at.queue, index, status, turn) {
                        Some(last) => status = last,
                        None => return self.pin(at.view, index),
                    }
                }
                return self.finish(at, index, status);
            }
            Submit::Queued => {}
            Submit::Full(io) => self.parked.push_back(io),
        }
        self.pin(at.view, index);
    }

    /// Keeps the view that a request was submitted under.
    fn pin(&mut self, view: &View, index: u16) {
        view.pin();
        self.slots[usize::from(index)].view = Some(NonNull::from(view));
        self.inflight += 1;
    }

    /// Counts what was done on the spot in this visit. The time it took is that of the whole visit,
    /// shared out by number: they were done one after the other.
    #[inline]
    pub(super) fn count(&self, turn: &mut Turn, tallies: &[Tally; 2]) {
        let Some(device) = &self.device else { return };
        let begun = turn.now_ticks();
        let ticks = turn.read_clock().saturating_sub(begun);
        let [reads, writes] = tallies;
        let of_writes = match (reads.count, writes.count) {
            (_, 0) => 0,
            (0, _) => ticks,
            (r, w) => ticks * w / (r + w),
        };
        if reads.count > 0 {
            device.counters.record_batch(Op::Read, reads.count, reads.bytes, ticks - of_writes);
        }
        if writes.count > 0 {
            device.counters.record_batch(Op::Write, writes.count, writes.bytes, of_writes);
        }
    }

    /// Tries the I/Os again that the channel had no room for.
    #[cold]
    pub(super) fn unpark<R: Serve>(&mut self, at: At<'_, R>, turn: &mut Turn) {
        // No more than there are now: what follows on one of them may be parked as well.
        for _ in 0..self.parked.len() {
            let (Some(io), Some(device)) = (self.parked.pop_front(), &mut self.device) else {
                return;
            };
            // SAFETY: as in `submit`; the slot was pinned when the I/O was parked.
            match unsafe { device.channel.0.submit(io) } {
                Submit::Done(status) => {
                    self.finish_pinned(at, io.tag.0, status, turn);
                    at.queue.inflight.store(self.inflight, Ordering::Relaxed);
                }
                Submit::Queued => device.channel.0.kick(),
                Submit::Full(io) => {
                    self.parked.push_front(io);
                    return;
                }
            }
        }
    }
}

/// Looks at a refused request once more if the disk has grown since the view was made: a guest may
/// have been told before the view that says so was adopted.
#[cold]
fn parse_again<R: Serve>(slot: &mut Slot, at: At<'_, R>) -> Option<Request> {
    let (Some(disk), Some(then)) = (&at.view.disk, &at.view.limits) else { return None };
    let now = disk.limits();
    if now.sectors == then.sectors {
        return None;
    }
    R::collect_anew(slot, at);
    Some(slot.chain.parse(&now))
}
