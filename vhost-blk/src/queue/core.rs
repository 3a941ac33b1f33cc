//! What the owner of a queue keeps about it, and what it does in a visit.
#![expect(unsafe_code, reason = "submits guest memory; signals")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bdev::{Channel, Completion, Counters, Io, Op, Status, Submit, Tag};

use super::{Coalescing, Queue, QueueState, View};
use crate::config::Disk;
use crate::reactor::{Event, Events, Turn};
use crate::request::{Chain, Limits, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};

/// New requests taken in one visit, so that one queue cannot keep a reactor; SPDK's number.
const VISIT_REQUESTS_MAX: u16 = 32;
/// Bytes after which a visit takes no further request, for the same reason: 32 requests of the
/// largest size that Linux makes would be 40 MiB of copying for a memory disk.
const VISIT_BYTES_MAX: u64 = 512 << 10;
/// Descriptors after which a visit takes no further request: chains that lead nowhere cost time too.
const VISIT_DESCRIPTORS_MAX: u32 = 1024;
/// Requests that a queue may have in flight. A larger ring waits; the memory for a request is some
/// 2 KiB, and a front end may start 128 rings.
const SLOTS_MAX: u16 = 256;
/// Completions taken from a channel at a time.
const COMPLETIONS: usize = 32;

/// A request on its way through the block device.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    /// The view that it was submitted under, whose memory it uses.
    view: Option<NonNull<View>>,
    head: u16,
    op: Op,
    /// Bytes of data.
    len: u64,
    started_ticks: u64,
}

// SAFETY: the pointer is to a view that the slot has pinned; see `RetiredView`.
unsafe impl Send for Slot {}

/// What the owner of a queue keeps about it.
#[derive(Debug)]
pub struct Core {
    generation: u64,
    last_avail: u16,
    /// The used index: everything before it was put.
    used: u16,
    /// The used index that the guest was last told about.
    published: u16,
    /// The used index at the last decision whether to call.
    called: u16,
    call_due: CallDue,
    /// The next call goes out whether the guest wants it or not.
    call_unasked: bool,
    inflight: u32,
    stopped: bool,
    broken: bool,
    /// An event that found the event queue full.
    owed: Option<Event>,
    channel: Option<ChannelBox>,
    counters: Option<Arc<Counters>>,
    slots: Box<[Slot]>,
    /// Slots that are free, most recently used last.
    free: Vec<u16>,
    /// An I/O that the channel had no room for.
    parked: Option<Io>,
    done: [Completion; COMPLETIONS],
}

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

impl Core {
    pub(super) fn new(disk: Option<&Disk>, size: u16, base: u16) -> Result<Self, bdev::Error> {
        let depth = size.min(SLOTS_MAX);
        let (channel, counters) = match disk {
            Some(disk) => {
                let channel = Arc::clone(&disk.bdev).open(depth)?;
                (Some(ChannelBox(channel)), Some(disk.bdev.stats().attach()))
            }
            None => (None, None),
        };
        let slot = || Slot {
            chain: Chain::default(),
            view: None,
            head: 0,
            op: Op::Flush,
            len: 0,
            started_ticks: 0,
        };
        Ok(Self {
            generation: 0,
            last_avail: base,
            used: base,
            published: base,
            called: base,
            call_due: CallDue::default(),
            call_unasked: false,
            inflight: 0,
            stopped: false,
            broken: false,
            owed: None,
            channel,
            counters,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            parked: None,
            done: [Completion { tag: Tag(0), status: Status::Ok }; COMPLETIONS],
        })
    }

    /// The order: adopt first, as everything else uses the view; complete before fetch, as it
    /// frees slots; tell the device, then the guest, once for the batch; stop last, as it wants to
    /// know what is left.
    #[inline]
    pub(super) fn visit(
        &mut self,
        queue: &Queue,
        view: &View,
        turn: &mut Turn,
        events: &Events,
    ) -> bool {
        if self.stopped {
            return self.owed.is_some() && self.settle(events);
        }
        if view.generation != self.generation {
            self.adopt(queue, view);
        }
        let stop = queue.stop.load(Ordering::Acquire);
        let completed = self.inflight > 0 && self.complete(queue, view, turn);
        if self.parked.is_some() {
            self.unpark(queue, view, turn);
        }
        let fetched =
            !stop && !self.broken && self.parked.is_none() && self.fetch(queue, view, turn, events);
        if self.used != self.published || self.call_due.pending {
            self.tell_guest(queue, view, turn, stop);
        }
        if self.owed.is_some() {
            self.settle(events);
        }
        if view.disk.is_none() && self.channel.is_some() {
            self.release_channel(queue, events);
        }
        if stop && self.inflight == 0 && self.owed.is_none() {
            self.acknowledge_stop(queue, events);
        }
        completed || fetched
    }

    #[cold]
    fn adopt(&mut self, queue: &Queue, view: &View) {
        if self.generation == 0 {
            // What the guest was told counts. A front end that reconnects gives the used index that
            // it saw when the connection ended; requests that completed after that would be fetched
            // and completed again.
            self.used = view.ring.used_idx();
            self.published = self.used;
            self.called = self.used;
            self.last_avail = self.used;
            queue.last_avail.store(self.last_avail, Ordering::Relaxed);
        }
        self.generation = view.generation;
        view.ring.suppress_kicks(self.last_avail);
        // The fd before this view's may have been told last, and nobody may be listening to it.
        self.call_unasked = true;
        self.call_due.pending = true;
    }

    /// Takes what the device has finished.
    fn complete(&mut self, queue: &Queue, view: &View, turn: &mut Turn) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        let n = channel.0.poll(&mut self.done);
        if n == 0 {
            return false;
        }
        for i in 0..n {
            let Completion { tag, status } = self.done[i];
            self.finish_pinned(queue, view, tag.0, status, turn);
        }
        queue.inflight.store(self.inflight, Ordering::Relaxed);
        true
    }

    /// Answers a request that had to wait, and lets go of the view that it was submitted under.
    fn finish_pinned(
        &mut self,
        queue: &Queue,
        view: &View,
        tag: u16,
        status: Status,
        turn: &mut Turn,
    ) {
        let pinned = self.slots[usize::from(tag)].view.take();
        let pinned = pinned.expect("a channel reports an I/O once");
        self.finish(queue, view, tag, status, turn);
        // SAFETY: a view with pins is not freed, and this one was pinned for this slot.
        unsafe { pinned.as_ref() }.unpin();
        self.inflight -= 1;
    }

    /// Answers the request in `slot` and frees the slot.
    fn finish(&mut self, queue: &Queue, view: &View, index: u16, status: Status, turn: &mut Turn) {
        let slot = &self.slots[usize::from(index)];
        if let Some(counters) = &self.counters {
            let ticks = turn.read_clock().saturating_sub(slot.started_ticks);
            counters.record(slot.op, slot.len, ticks, status);
        }
        let status = match status {
            Status::Ok => STATUS_OK,
            Status::IoError => STATUS_IOERR,
            Status::Unsupported => STATUS_UNSUPP,
        };
        let written = if slot.op == Op::Read { slot.chain.written_by_read() } else { 1 };
        slot.chain.write_status(status);
        let head = slot.head;
        self.put(queue, view, head, written);
        self.free.push(index);
    }

    /// Puts a finished chain into the used ring.
    #[inline]
    fn put(&mut self, queue: &Queue, view: &View, head: u16, written: u32) {
        view.ring.put_used(self.used, head, written);
        self.used = self.used.wrapping_add(1);
        self.call_due.window_requests += 1;
        bump(&queue.requests);
    }

    /// Takes new requests and submits them.
    fn fetch(&mut self, queue: &Queue, view: &View, turn: &mut Turn, events: &Events) -> bool {
        let pending = match view.ring.pending(self.last_avail) {
            Ok(0) => return false,
            Ok(pending) => pending,
            Err(_) => {
                self.break_queue(queue, events);
                return false;
            }
        };
        if view.memory.truncated() {
            self.break_queue(queue, events);
            return false;
        }
        let limits = view.disk.as_deref().map(Disk::limits);
        let before = self.last_avail;
        let (mut bytes, mut descriptors) = (0, 0);
        for _ in 0..pending.min(VISIT_REQUESTS_MAX) {
            let Some(index) = self.free.pop() else { break };
            let head = view.ring.head(self.last_avail);
            self.last_avail = self.last_avail.wrapping_add(1);
            bytes += self.start(queue, view, limits.as_ref(), index, head, turn);
            descriptors += self.slots[usize::from(index)].chain.descriptors();
            if bytes > VISIT_BYTES_MAX
                || descriptors > VISIT_DESCRIPTORS_MAX
                || self.parked.is_some()
            {
                break;
            }
        }
        queue.last_avail.store(self.last_avail, Ordering::Relaxed);
        queue.inflight.store(self.inflight, Ordering::Relaxed);
        if view.ring.kick_suppression_is_due(before, self.last_avail) {
            view.ring.suppress_kicks(self.last_avail);
        }
        if let Some(channel) = &mut self.channel {
            channel.0.kick();
        }
        before != self.last_avail
    }

    /// Takes the chain at `head` into slot `index`; answers with its bytes of data.
    fn start(
        &mut self,
        queue: &Queue,
        view: &View,
        limits: Option<&Limits>,
        index: u16,
        head: u16,
        turn: &mut Turn,
    ) -> u64 {
        let slot = &mut self.slots[usize::from(index)];
        slot.head = head;
        slot.chain.collect(&view.ring, &view.memory, head);
        let request = match limits {
            Some(limits) => slot.chain.parse(limits),
            None => slot.chain.refuse(),
        };
        match request {
            Request::Io { op, offset, len, first, count } => {
                slot.op = op;
                slot.len = len;
                slot.started_ticks = turn.now_ticks();
                let io = match op {
                    Op::Read | Op::Write => {
                        let data = &slot.chain.segments[first..first + count];
                        Io::rw(op, Tag(index), offset, len, data)
                    }
                    _ => Io::plain(op, Tag(index), offset, len),
                };
                self.submit(queue, view, io, turn);
                len
            }
            Request::Answer(status, written) => {
                slot.chain.write_status(status);
                if status != STATUS_OK {
                    bump(&queue.malformed);
                }
                self.put(queue, view, head, written + 1);
                self.free.push(index);
                0
            }
            Request::NoStatus => {
                bump(&queue.malformed);
                self.put(queue, view, head, 0);
                self.free.push(index);
                0
            }
        }
    }

    /// Submits an I/O whose slot is filled in.
    fn submit(&mut self, queue: &Queue, view: &View, io: Io, turn: &mut Turn) {
        let index = io.tag.0;
        let Some(channel) = &mut self.channel else {
            self.finish(queue, view, index, Status::IoError, turn);
            return;
        };
        // SAFETY: segments and memory stay until the completion: the slot is not reused before,
        // and its pin on the view keeps the memory mapped.
        match unsafe { channel.0.submit(io) } {
            Submit::Done(status) => return self.finish(queue, view, index, status, turn),
            Submit::Queued => {}
            Submit::Full(io) => self.parked = Some(io),
        }
        view.pin();
        self.slots[usize::from(index)].view = Some(NonNull::from(view));
        self.inflight += 1;
    }

    /// Tries the I/O again that the channel had no room for.
    #[cold]
    fn unpark(&mut self, queue: &Queue, view: &View, turn: &mut Turn) {
        let (Some(io), Some(channel)) = (self.parked.take(), &mut self.channel) else { return };
        // SAFETY: as in `submit`; the slot was pinned when the I/O was parked.
        match unsafe { channel.0.submit(io) } {
            Submit::Done(status) => {
                self.finish_pinned(queue, view, io.tag.0, status, turn);
                queue.inflight.store(self.inflight, Ordering::Relaxed);
            }
            Submit::Queued => channel.0.kick(),
            Submit::Full(io) => self.parked = Some(io),
        }
    }

    /// Shows the guest what was put, and calls it if it wants that and the time has come.
    /// A queue that stops does not make the guest wait for coalescing.
    fn tell_guest(&mut self, queue: &Queue, view: &View, turn: &mut Turn, stop: bool) {
        if self.used != self.published {
            view.ring.publish_used(self.used);
            self.published = self.used;
            self.call_due.pending = true;
        }
        if !stop && self.call_due.wait(&queue.coalescing, turn) {
            return;
        }
        let wanted = view.ring.wants_call(self.called, self.used) || self.call_unasked;
        if wanted
            && let Some(call) = &view.call
            // SAFETY: this queue's owner is the one user of its call fd, and this is it.
            && !unsafe { call.signal() }
        {
            return; // tried again at the next visit
        }
        self.call_due.pending = false;
        self.call_unasked = false;
        self.called = self.used;
    }

    #[cold]
    fn break_queue(&mut self, queue: &Queue, events: &Events) {
        self.broken = true;
        queue.state.store(QueueState::Broken as u8, Ordering::Release);
        // It only makes a line in the log; an event that is owed carries more.
        if self.owed.is_none() {
            self.send(Event::Broken(queue.id), events);
        }
    }

    #[cold]
    fn release_channel(&mut self, queue: &Queue, events: &Events) {
        if self.inflight == 0
            && self.owed.is_none()
            && let Some(channel) = self.channel.take()
        {
            self.counters = None;
            self.send(Event::Released(queue.id, channel), events);
        }
    }

    #[cold]
    fn acknowledge_stop(&mut self, queue: &Queue, events: &Events) {
        if self.call_due.pending {
            return; // a call that the system refused goes out first
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

/// Adds one to a counter that only this thread writes.
#[inline]
fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}
