//! What the owner of a queue keeps about it, and what it does in a visit.
#![expect(unsafe_code, reason = "submits guest memory; signals")]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use bdev::{Channel, Completion, Counters, Io, Op, Shortcut, Status, Submit, Tag, Wait};

use super::{Coalescing, NOTHING, Queue, QueueState, View, Watch};
use crate::cache;
use crate::config::Disk;
use crate::memory::Nearest;
use crate::reactor::{Cause, Event, Events, Turn};
use crate::request::{Chain, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};

/// New requests taken in one visit, so that one queue cannot keep a reactor; SPDK's number.
const VISIT_REQUESTS_MAX: usize = 32;
/// Bytes after which a visit takes no further request, for the same reason: 32 requests of the
/// largest size that Linux makes would be 40 MiB of copying for a memory disk.
const VISIT_BYTES_MAX: u64 = 512 << 10;
/// Descriptors after which a visit takes no further request: chains that lead nowhere cost time too.
const VISIT_DESCRIPTORS_MAX: u32 = 1024;
/// Requests that a queue may have in flight. A larger ring waits; the memory for a request is some
/// 2 KiB, and a front end may start 128 rings.
const SLOTS_MAX: u16 = 256;
/// How long a sleeping reactor waits before it tries again what nothing announces.
const RETRY: Duration = Duration::from_millis(1);
/// Completions taken from a channel at a time.
const COMPLETIONS: usize = 32;

/// A request on its way through the block device.
#[derive(Debug)]
struct Slot {
    /// The view that it was submitted under, whose memory it uses.
    view: Option<NonNull<View>>,
    /// Bytes of data.
    len: u64,
    started_ticks: u64,
    head: u16,
    op: Op,
    chain: Chain,
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
    inflight: u32,
    /// The control side wants a stop, as of the last visit.
    stopping: bool,
    stopped: bool,
    broken: bool,
    /// The guest was asked for kicks, as its reactor was about to sleep.
    armed: bool,
    /// The next call goes out whether the guest wants it or not.
    call_unasked: bool,
    /// The system could not make the last call right then.
    call_refused: bool,
    call_due: CallDue,
    /// Where in the guest's memory the last request was.
    nearest: Nearest,
    expected: Expected,
    device: Option<Device>,
    slots: Box<[Slot]>,
    /// Slots that are free, most recently used last.
    free: Vec<u16>,
    /// An I/O that the channel had no room for.
    parked: Option<Io>,
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

/// Reads or writes of one visit that were done on the spot, to be counted at its end.
#[derive(Debug, Default)]
struct Tally {
    count: u64,
    bytes: u64,
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
        let device = match disk {
            Some(disk) => {
                let channel = ChannelBox(Arc::clone(&disk.bdev).open(depth)?);
                let shortcut = channel.0.shortcut();
                Some(Device { shortcut, channel, counters: disk.bdev.stats().attach() })
            }
            None => None,
        };
        let slot = || Slot {
            view: None,
            len: 0,
            started_ticks: 0,
            head: 0,
            op: Op::Flush,
            chain: Chain::default(),
        };
        Ok(Self {
            generation: 0,
            last_avail: base,
            used: base,
            published: base,
            called: base,
            inflight: 0,
            stopping: false,
            stopped: false,
            broken: false,
            armed: false,
            call_unasked: false,
            call_refused: false,
            call_due: CallDue::default(),
            nearest: Nearest::default(),
            expected: Expected { head: 0, header: std::ptr::null() },
            device,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            parked: None,
            owed: None,
            done: [Completion { tag: Tag(0), status: Status::Ok }; COMPLETIONS],
        })
    }

    /// The order: adopt first, as everything else uses the view; complete before fetch, as it
    /// frees slots; tell the device, then the guest, once for the batch; count before the guest is
    /// called, which is no part of an I/O; stop last, as it wants to know what is left.
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
            turn.note(Cause::Adopt);
        }
        let stop = queue.stop.load(Ordering::Acquire);
        self.stopping = stop;
        let completed = self.inflight > 0 && self.complete(queue, view, turn);
        if self.parked.is_some() {
            self.unpark(queue, view, turn);
        }
        let mut tallies = [const { Tally { count: 0, bytes: 0 } }; 2];
        let fetched = !stop
            && !self.broken
            && self.parked.is_none()
            && self.fetch(queue, view, turn, events, &mut tallies);
        if self.used != self.published {
            view.ring.publish_used(self.used);
            self.published = self.used;
            self.call_due.pending = true;
        }
        if fetched {
            self.count(turn, &tallies);
        }
        if self.call_due.pending {
            self.call_guest(queue, view, turn, stop);
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
        completed || fetched
    }

    /// What is to be looked at until the next visit, which was one with `view`.
    #[inline]
    pub(super) fn watch(&self, view: &View) -> Watch {
        let rings = !self.stopped && !self.broken;
        let due = self.inflight > 0 || self.call_due.pending || self.owed.is_some();
        let released = view.disk.is_none() && self.device.is_some();
        let cell: *const _ = if rings { view.ring.avail_idx_cell() } else { &raw const NOTHING };
        Watch {
            avail: cell,
            generation: view.generation,
            seen: if rings { self.last_avail.to_le() } else { 0 },
            due: due || released && !self.stopped,
            kicks: view.kicks || !rings,
            stop: self.stopping,
        }
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
        // Addresses of the memory before may not even be mapped any more.
        self.nearest = Nearest::default();
        self.expected.header = std::ptr::null();
        self.refuse_kicks(view);
        // The fd before this view's may have been told last, and nobody may be listening to it.
        self.call_unasked = true;
        self.call_due.pending = true;
    }

    fn refuse_kicks(&mut self, view: &View) {
        self.armed = false;
        view.ring.suppress_kicks(self.last_avail);
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
        }
        if self.parked.is_some() {
            wait = wait.sooner(Wait::Until(Instant::now() + RETRY));
        }
        // Without a slot for it, nothing is fetched before a completion.
        let fetches = !self.stopping && !self.broken && self.parked.is_none();
        if fetches && !self.free.is_empty() && !self.armed {
            debug_assert!(view.kicks, "the poll set has looked at its watches first");
            self.armed = true;
            if view.ring.want_kicks(self.last_avail) {
                self.refuse_kicks(view);
                return Wait::Poll;
            }
        }
        wait
    }

    /// Where the disk says that it has completed something, if it does.
    pub(super) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref()?.channel.0.wake_fd()
    }

    /// Takes what the device has finished.
    fn complete(&mut self, queue: &Queue, view: &View, turn: &mut Turn) -> bool {
        let Some(device) = &mut self.device else { return false };
        let n = device.channel.0.poll(&mut self.done);
        if n == 0 {
            return false;
        }
        turn.note(Cause::Complete);
        turn.read_clock();
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
        let slot = &mut self.slots[usize::from(tag)];
        let pinned = slot.view.take().expect("a channel reports an I/O once");
        if let Some(device) = &self.device {
            let ticks = turn.now_ticks().saturating_sub(slot.started_ticks);
            device.counters.record(slot.op, slot.len, ticks, status);
        }
        self.finish(queue, view, tag, status);
        // SAFETY: a view with pins is not freed, and this one was pinned for this slot.
        unsafe { pinned.as_ref() }.unpin();
        self.inflight -= 1;
    }

    /// Answers the request in `slot` and frees the slot.
    #[inline]
    fn finish(&mut self, queue: &Queue, view: &View, index: u16, status: Status) {
        let slot = &self.slots[usize::from(index)];
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

    /// Takes new requests and submits them, in three passes over the batch, so that the lines of
    /// one pass are on their way while those of another are used: heads, chains, requests.
    #[inline]
    fn fetch(
        &mut self,
        queue: &Queue,
        view: &View,
        turn: &mut Turn,
        events: &Events,
        tallies: &mut [Tally; 2],
    ) -> bool {
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
        cache::prefetch_write(self.expected.header);
        view.ring.prefetch_desc(self.expected.head);
        view.ring.prefetch_used(self.used);
        turn.note(Cause::Fetch);
        turn.read_clock();
        let mut batch = ArrayVec::<u16, VISIT_REQUESTS_MAX>::new();
        self.collect(view, pending, &mut batch);
        let taken = self.submit_batch(queue, view, &batch, turn, tallies);
        // Those that did not fit are looked at again, in their order, at the next visit.
        self.free.extend(batch[taken..].iter().rev());
        let before = self.last_avail;
        self.last_avail = before.wrapping_add(taken as u16);
        queue.last_avail.store(self.last_avail, Ordering::Relaxed);
        queue.inflight.store(self.inflight, Ordering::Relaxed);
        if self.armed || view.ring.kick_suppression_is_due(before, self.last_avail) {
            self.refuse_kicks(view);
        }
        if self.inflight > 0
            && let Some(device) = &mut self.device
        {
            device.channel.0.kick();
        }
        taken > 0
    }

    /// The first two passes: takes heads from the available ring into slots, and collects their
    /// chains, up to the limits of a visit.
    #[inline]
    fn collect(
        &mut self,
        view: &View,
        pending: u16,
        batch: &mut ArrayVec<u16, VISIT_REQUESTS_MAX>,
    ) {
        let count = usize::from(pending).min(VISIT_REQUESTS_MAX).min(self.free.len());
        let mut position = self.last_avail;
        for index in self.free.drain(self.free.len() - count..).rev() {
            let head = view.ring.head(position);
            position = position.wrapping_add(1);
            view.ring.prefetch_desc(head);
            self.slots[usize::from(index)].head = head;
            batch.push(index);
        }
        // SAFETY: the nearest place is of this view's memory: `adopt` forgets that of another.
        let mut near = unsafe { view.memory.near(self.nearest) };
        let (mut descriptors, mut bytes) = (0, 0);
        for (n, &index) in batch.iter().enumerate() {
            let slot = &mut self.slots[usize::from(index)];
            slot.chain.collect(&view.ring, &mut near, slot.head);
            slot.chain.prefetch();
            if let Some(header) = slot.chain.header() {
                self.expected = Expected { head: slot.head, header };
            }
            descriptors += slot.chain.descriptors();
            bytes += slot.chain.bytes();
            if descriptors > VISIT_DESCRIPTORS_MAX || bytes > VISIT_BYTES_MAX {
                self.free.extend(batch.drain(n + 1..).rev());
                break;
            }
        }
        self.nearest = near.nearest();
    }

    /// The third pass: makes requests of the chains and submits them. Answers with how many were
    /// taken: fewer than there are when the channel is full, or enough bytes were moved.
    #[inline]
    fn submit_batch(
        &mut self,
        queue: &Queue,
        view: &View,
        batch: &[u16],
        turn: &mut Turn,
        tallies: &mut [Tally; 2],
    ) -> usize {
        let mut bytes = 0;
        for (n, &index) in batch.iter().enumerate() {
            bytes += self.start(queue, view, index, turn, tallies);
            if bytes > VISIT_BYTES_MAX || self.parked.is_some() {
                return n + 1;
            }
        }
        batch.len()
    }

    /// Begins the request in slot `index`; answers with its bytes of data.
    #[inline]
    fn start(
        &mut self,
        queue: &Queue,
        view: &View,
        index: u16,
        turn: &mut Turn,
        tallies: &mut [Tally; 2],
    ) -> u64 {
        let slot = &mut self.slots[usize::from(index)];
        let mut request = match &view.limits {
            Some(limits) => slot.chain.parse(limits),
            None => slot.chain.refuse(),
        };
        if matches!(request, Request::Answer(STATUS_IOERR, _)) {
            request = parse_again(slot, view, request);
        }
        match request {
            Request::Io { op, offset, len, first, count } => {
                slot.op = op;
                slot.len = len;
                let io = match op {
                    Op::Read | Op::Write => {
                        Io::rw(op, Tag(index), offset, len, slot.chain.data(first, count))
                    }
                    _ => Io::plain(op, Tag(index), offset, len),
                };
                // SAFETY: the channel is open, and segments and memory stay as they are meanwhile.
                let done = self.device.as_ref().is_some_and(|d| unsafe { d.shortcut.run(&io) });
                if done {
                    let tally = &mut tallies[usize::from(op == Op::Write)];
                    tally.count += 1;
                    tally.bytes += len;
                    self.finish(queue, view, index, Status::Ok);
                } else {
                    self.submit(queue, view, io, turn);
                }
                len
            }
            Request::Answer(status, written) => {
                slot.chain.write_status(status);
                if status != STATUS_OK {
                    bump(&queue.malformed);
                }
                let head = slot.head;
                self.put(queue, view, head, written + 1);
                self.free.push(index);
                0
            }
            Request::NoStatus => {
                bump(&queue.malformed);
                let head = slot.head;
                self.put(queue, view, head, 0);
                self.free.push(index);
                0
            }
        }
    }

    /// Submits an I/O whose slot is filled in.
    fn submit(&mut self, queue: &Queue, view: &View, io: Io, turn: &mut Turn) {
        let index = io.tag.0;
        let slot = &mut self.slots[usize::from(index)];
        slot.started_ticks = turn.now_ticks();
        let Some(device) = &mut self.device else {
            self.finish(queue, view, index, Status::IoError);
            return;
        };
        // SAFETY: segments and memory stay until the completion: the slot is not reused before,
        // and its pin on the view keeps the memory mapped.
        match unsafe { device.channel.0.submit(io) } {
            Submit::Done(status) => {
                let ticks = turn.read_clock().saturating_sub(slot.started_ticks);
                device.counters.record(slot.op, slot.len, ticks, status);
                return self.finish(queue, view, index, status);
            }
            Submit::Queued => {}
            Submit::Full(io) => self.parked = Some(io),
        }
        view.pin();
        slot.view = Some(NonNull::from(view));
        self.inflight += 1;
    }

    /// Counts what was done on the spot in this visit. The time it took is that of the whole visit,
    /// shared out by number: they were done one after the other.
    #[inline]
    fn count(&self, turn: &mut Turn, tallies: &[Tally; 2]) {
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

    /// Tries the I/O again that the channel had no room for.
    #[cold]
    fn unpark(&mut self, queue: &Queue, view: &View, turn: &mut Turn) {
        let (Some(io), Some(device)) = (self.parked.take(), &mut self.device) else { return };
        let channel = &mut device.channel;
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

    /// Calls the guest if it wants that and the time has come.
    /// A queue that stops does not make the guest wait for coalescing.
    #[inline]
    fn call_guest(&mut self, queue: &Queue, view: &View, turn: &mut Turn, stop: bool) {
        if !stop && self.call_due.wait(&queue.coalescing, turn) {
            return;
        }
        let wanted = view.ring.wants_call(self.called, self.used) || self.call_unasked;
        if wanted && let Some(call) = &view.call {
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

/// Looks at a refused request once more if the disk has grown since the view was made: a guest may
/// have been told before the view that says so was adopted.
#[cold]
fn parse_again(slot: &mut Slot, view: &View, refused: Request) -> Request {
    let (Some(disk), Some(then)) = (&view.disk, &view.limits) else { return refused };
    let now = disk.limits();
    if now.sectors == then.sectors {
        return refused;
    }
    // SAFETY: the default is of every memory.
    let mut near = unsafe { view.memory.near(Nearest::default()) };
    slot.chain.collect(&view.ring, &mut near, slot.head);
    slot.chain.parse(&now)
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
