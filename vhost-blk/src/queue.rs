//! The virtio-blk device of one virtqueue, on a reactor: submits I/Os, and answers requests.
#![expect(unsafe_code, reason = "submits guest memory")]

use std::sync::Arc;

use bdev::{Channel, Completion, Counters, Io, Limiting, Op, Status, Submit, Tag};
use reactor::{Cause, Iteration, Wait};
use served_bdev::{Opened, Tallies, Throttled};
use vhost_target::device_queue::{Answer, DeviceQueue, Progress, Request, WakeFds};
use virtqueue::chain::Chain;

use crate::config::Disk;
use crate::request::{
    Parsed, Ranges, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, parse, peek_read, written_by_read,
};
use crate::view::BlkView;

/// Completions that one poll takes from a channel at most.
const COMPLETIONS: usize = 32;

/// What a request still has to do when its I/O has succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Rest {
    #[default]
    Nothing,
    /// A flush: the guest requires writes to be durable when they are answered.
    Flush,
    /// The remaining ranges of its chain.
    Ranges,
    /// The remaining ranges, and then [`Rest::Flush`].
    RangesThenFlush,
}

/// A request in flight.
#[derive(Debug)]
pub struct BlkRequest {
    /// Bytes of the I/O in flight.
    len: u64,
    /// When that I/O was submitted.
    started_ticks: u64,
    op: Op,
    rest: Rest,
}

impl Default for BlkRequest {
    fn default() -> Self {
        Self { len: 0, started_ticks: 0, op: Op::Flush, rest: Rest::Nothing }
    }
}

/// The device of one virtqueue.
pub struct BlkQueue {
    /// `None` if the disk was removed.
    open: Option<Opened>,
    /// The counters of a channel that was released. Dropped with the queue.
    counters: Option<Arc<Counters>>,
    /// The remaining ranges of each request.
    ranges: Box<[Ranges]>,
    /// The I/O of each request that waits for room, or for a rate limit.
    parked: Box<[Option<Io>]>,
    throttled: Throttled,
    abandoned: bool,
    tallies: Tallies,
    done: [Completion; COMPLETIONS],
}

impl std::fmt::Debug for BlkQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlkQueue")
    }
}

impl BlkQueue {
    /// Opens the disk for a queue with at most `depth` requests in flight.
    ///
    /// # Errors
    /// The bdev cannot be opened.
    pub fn open(disk: Option<&Disk>, depth: u16) -> Result<Self, bdev::Error> {
        Ok(Self {
            open: disk.map(|disk| Opened::open(&disk.user, depth)).transpose()?,
            counters: None,
            ranges: (0..depth).map(|_| Ranges::default()).collect(),
            parked: (0..depth).map(|_| None).collect(),
            throttled: Throttled::new(depth),
            abandoned: false,
            tallies: Tallies::default(),
            done: [Completion { tag: Tag(0), status: Status::Ok }; COMPLETIONS],
        })
    }

    /// Submits an I/O. The request's operation and length are set.
    #[inline(never)]
    fn submit<R: Request<Self>>(&mut self, view: &BlkView, mut request: R, io: Io) -> Progress {
        let index = usize::from(request.slot());
        let now = request.iteration().now_ticks();
        let (state, _) = request.parts();
        state.started_ticks = now;
        state.rest = match state.op {
            Op::Write if view.write_through => Rest::Flush,
            Op::WriteZeroes if view.write_through => Rest::RangesThenFlush,
            Op::Unmap | Op::WriteZeroes if self.ranges[index].any_left() => Rest::Ranges,
            _ => Rest::Nothing,
        };
        let Some(open) = &mut self.open else {
            request.count_error();
            return finished(request, Status::IoError);
        };
        // SAFETY: segments and memory stay until the completion: the engine reuses neither the slot
        // nor the view that it pins before the request has ended.
        match unsafe { open.channel.submit(io) } {
            Submit::Done(status) => {
                request.iteration().read_clock();
                self.io_ended(request, status)
            }
            Submit::Queued => request.keep(),
            Submit::Full(io) => {
                self.parked[index] = Some(io);
                request.wait_for_room()
            }
            Submit::Throttled(io) => self.throttle(request, io),
        }
    }

    /// Keeps a request pending whose I/O waits for a rate limit.
    #[cold]
    #[inline(never)]
    fn throttle<R: Request<Self>>(&mut self, request: R, io: Io) -> Progress {
        self.throttled.push(&io, self.open.as_ref());
        self.parked[usize::from(request.slot())] = Some(io);
        request.keep()
    }

    /// Submits throttled I/Os that the limits now admit, and polls the channel. Those that complete
    /// at once take half of `done` at most. Returns the number of completions.
    #[cold]
    #[inline(never)]
    fn poll_throttled(&mut self) -> usize {
        let Self { open, parked, throttled, abandoned, done, .. } = self;
        let Some(open) = open else { return 0 };
        let mut count = 0;
        throttled.release(|slot| {
            if count == COMPLETIONS / 2 {
                return false;
            }
            let (tag, place) = (Tag(slot), &mut parked[usize::from(slot)]);
            let mut ended = |status| {
                done[count] = Completion { tag, status };
                count += 1;
                true
            };
            let Some(io) = place.take().filter(|_| !*abandoned) else {
                return ended(Status::IoError);
            };
            // SAFETY: as in `submit`. The engine has pinned the view when the request was kept.
            match unsafe { open.channel.submit(io) } {
                Submit::Done(status) => ended(status),
                Submit::Queued => true,
                Submit::Full(io) | Submit::Throttled(io) => {
                    *place = Some(io);
                    false
                }
            }
        });
        open.channel.kick();
        count + open.channel.poll(&mut done[count..])
    }

    /// Starts a request that is not a valid read or write.
    #[cold]
    #[inline(never)]
    fn start_other<R: Request<Self>>(
        &mut self,
        view: &BlkView,
        mut request: R,
        mut parsed: Parsed,
        resubmitted: bool,
    ) -> Progress {
        let mut limits = &view.limits;
        let now = view.disk.limits();
        if !resubmitted && now.sectors != limits.sectors {
            // The disk has grown. The guest may have been told before this queue adopted the view
            // with the new size.
            limits = &now;
            request.recollect_chain();
            parsed = parse(request.parts().1, limits);
        }
        let slot = usize::from(request.slot());
        if let Parsed::Ranges { op, first } = parsed {
            parsed = self.ranges[slot].parse(request.parts().1, op, first, limits);
        }
        match parsed {
            Parsed::Io { op, offset, len, first, count } => {
                let tag = Tag(request.slot());
                let (state, chain) = request.parts();
                (state.op, state.len) = (op, len);
                let io = match op {
                    Op::Read | Op::Write => Io::rw(op, tag, offset, len, chain.data(first, count)),
                    _ => Io::plain(op, tag, offset, len).unmapping(self.ranges[slot].may_unmap()),
                };
                request.spend(len);
                self.submit(view, request, io)
            }
            Parsed::Answer(status, written) => finished_at_once(request, Some((status, written))),
            Parsed::NoStatus | Parsed::Ranges { .. } => finished_at_once(request, None),
        }
    }

    /// Counts an I/O that has ended, and continues its request.
    #[inline]
    fn io_ended<R: Request<Self>>(&mut self, mut request: R, status: Status) -> Progress {
        self.count(&mut request, status);
        let (state, _) = request.parts();
        if state.rest == Rest::Nothing {
            return finished(request, status);
        }
        self.continue_request(request, status)
    }

    /// Continues a request whose last I/O has ended with `status`.
    #[cold]
    fn continue_request<R: Request<Self>>(
        &mut self,
        mut request: R,
        mut status: Status,
    ) -> Progress {
        let index = request.slot();
        while status == Status::Ok {
            let now = request.iteration().now_ticks();
            let ranges = &mut self.ranges[usize::from(index)];
            let (state, _) = request.parts();
            let (op, offset, len) = match state.rest {
                Rest::Nothing => break,
                Rest::Flush => {
                    state.rest = Rest::Nothing;
                    (Op::Flush, 0, 0)
                }
                Rest::Ranges | Rest::RangesThenFlush => match ranges.take_next() {
                    Some((offset, len)) => (state.op, offset, len),
                    None if state.rest == Rest::RangesThenFlush => {
                        state.rest = Rest::Nothing;
                        (Op::Flush, 0, 0)
                    }
                    None => break,
                },
            };
            (state.op, state.len, state.started_ticks) = (op, len, now);
            // The used ring reports the same number of written bytes for all operations but reads.
            let io = Io::plain(op, Tag(index), offset, len).unmapping(ranges.may_unmap());
            let Some(open) = &mut self.open else {
                request.count_error();
                return finished(request, Status::IoError);
            };
            // SAFETY: the I/O uses no memory.
            status = match unsafe { open.channel.submit(io) } {
                Submit::Done(status) => {
                    request.iteration().read_clock();
                    self.count(&mut request, status);
                    status
                }
                Submit::Queued => {
                    open.channel.kick();
                    return request.keep();
                }
                Submit::Full(io) => {
                    self.parked[usize::from(index)] = Some(io);
                    return request.wait_for_room();
                }
                Submit::Throttled(io) => return self.throttle(request, io),
            };
        }
        finished(request, status)
    }

    /// Counts an I/O that has ended, at the time of the poll iteration's clock.
    #[inline]
    fn count<R: Request<Self>>(&mut self, request: &mut R, status: Status) {
        let now = request.iteration().now_ticks();
        let tag = request.slot();
        let Some(open) = &mut self.open else { return };
        let (state, _) = request.parts();
        let (op, len) = (state.op, state.len);
        let ticks = now.saturating_sub(state.started_ticks);
        if status == Status::Ok {
            open.counters.record(op, len, ticks);
        } else {
            let _ = open.count_failure((tag, op, len), ticks, status);
            request.count_error();
        }
    }
}

/// Finishes a request whose last I/O has ended with `status`.
#[inline(always)]
fn finished<R: Request<BlkQueue>>(mut request: R, status: Status) -> Progress {
    let (state, chain) = request.parts();
    let (written, dirty) = match state.op {
        Op::Read => (written_by_read(chain), u64::MAX),
        _ => (1, 0),
    };
    let status = match status {
        Status::Ok => STATUS_OK,
        Status::IoError => STATUS_IOERR,
        Status::Unsupported => STATUS_UNSUPP,
    };
    request.finish(Answer { last_byte: Some(status), written, dirty })
}

/// Finishes a request that causes no I/O. `answer`: its status and the number of bytes written
/// before the status byte; `None` if it has no place for a status.
#[cold]
#[inline(never)]
fn finished_at_once<R: Request<BlkQueue>>(mut request: R, answer: Option<(u8, u32)>) -> Progress {
    let Some((status, written)) = answer else {
        request.count_error();
        return request.finish(Answer { last_byte: None, written: 0, dirty: 0 });
    };
    if status != STATUS_OK {
        request.count_error();
    }
    // For GET_ID, its data. For a refused request, the used ring may report all of its data as
    // written.
    let dirty = if status == STATUS_OK { u64::from(written) } else { 0 };
    request.finish(Answer { last_byte: Some(status), written: written + 1, dirty })
}

impl DeviceQueue for BlkQueue {
    type Request = BlkRequest;
    type View = BlkView;

    fn refuse(chain: &mut Chain) -> Answer {
        let (last_byte, written) =
            if chain.has_last_byte() { (Some(STATUS_IOERR), 1) } else { (None, 0) };
        Answer { last_byte, written, dirty: 0 }
    }

    #[inline(always)]
    fn start<R: Request<Self>>(
        &mut self,
        view: &BlkView,
        mut request: R,
        resubmitted: bool,
    ) -> Progress {
        let (_, chain) = request.parts();
        let parsed = parse(chain, &view.limits);
        if let Parsed::Io { op: op @ (Op::Read | Op::Write), offset, len, first, count } = parsed {
            let tag = Tag(request.slot());
            let (state, chain) = request.parts();
            (state.op, state.len) = (op, len);
            let io = Io::rw(op, tag, offset, len, chain.data(first, count));
            request.spend(len);
            // The shortcut does not serve a request that needs a flush afterwards.
            let is_only_io = op == Op::Read || !view.write_through;
            // SAFETY: the channel is open, and segments and memory do not change meanwhile.
            let done =
                is_only_io && self.open.as_ref().is_some_and(|o| unsafe { o.shortcut.run(&io) });
            if !done {
                return self.submit(view, request, io);
            }
            self.tallies.add(op == Op::Write, len);
            return finished(request, Status::Ok);
        }
        self.start_other(view, request, parsed, resubmitted)
    }

    #[cold]
    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress {
        let index = usize::from(request.slot());
        let (Some(open), Some(io)) = (&mut self.open, self.parked[index].take()) else {
            return finished(request, Status::IoError);
        };
        // SAFETY: as in `submit`. The engine has pinned the view when the request was parked.
        match unsafe { open.channel.submit(io) } {
            Submit::Done(status) => self.io_ended(request, status),
            Submit::Queued => {
                open.channel.kick();
                request.keep()
            }
            Submit::Full(io) => {
                self.parked[index] = Some(io);
                request.wait_for_room()
            }
            Submit::Throttled(io) => self.throttle(request, io),
        }
    }

    #[inline]
    fn adopted(&mut self, view: Option<&BlkView>) {
        let Some(open) = &mut self.open else { return };
        let limited = view.is_some_and(|view| view.limited);
        if limited || open.limited {
            // When the disk was removed, throttled requests pass at once.
            let apply =
                view.map_or(Limiting::ChargeOnly, |view| Limiting::Apply(view.disk.user.id()));
            open.set_limiting(apply, limited);
        }
    }

    /// Lets throttled requests pass, so that a stop does not wait for a rate limit.
    fn stopping(&mut self) {
        if let Some(open) = &mut self.open
            && open.limited
        {
            open.set_limiting(Limiting::ChargeOnly, true);
        }
    }

    #[inline]
    fn looks_ahead(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.shortcut.copies())
    }

    #[inline(always)]
    fn look_ahead(&self, chain: &Chain) {
        if let Some(open) = &self.open
            && let Some((offset, len)) = peek_read(chain)
        {
            open.shortcut.expect_read(offset, len);
        }
    }

    #[inline(always)]
    fn started(&mut self, iteration: &mut Iteration) {
        let Some(open) = &self.open else { return };
        let begun = iteration.now_ticks();
        let ticks = iteration.read_clock().saturating_sub(begun);
        self.tallies.record(&open.counters, ticks);
    }

    #[inline]
    fn poll(&mut self, iteration: &mut Iteration) -> usize {
        let Some(open) = &mut self.open else { return 0 };
        let none = self.throttled.is_empty();
        let count = if none { open.channel.poll(&mut self.done) } else { self.poll_throttled() };
        if count > 0 {
            iteration.note(Cause::Complete);
            iteration.read_clock();
        }
        count
    }

    #[inline]
    fn progressed(&self, n: usize) -> u16 {
        self.done[n].tag.0
    }

    #[inline]
    fn advance<R: Request<Self>>(&mut self, n: usize, request: R) -> Progress {
        self.io_ended(request, self.done[n].status)
    }

    #[cold]
    fn discard<R: Request<Self>>(&mut self, n: usize, request: &mut R) {
        // A failure may only be due to the abandoning.
        if self.done[n].status == Status::Ok {
            self.count(request, Status::Ok);
        }
    }

    #[inline]
    fn kick(&mut self) {
        if let Some(open) = &mut self.open {
            open.channel.kick();
        }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        if let Some(open) = &mut self.open {
            open.channel.abandon();
        }
    }

    fn wait(&self, pending: usize) -> Wait {
        let throttled = self.throttled.len();
        let queued = pending.saturating_sub(throttled);
        self.open.as_ref().map_or(Wait::Poll, |open| open.wait(queued, throttled))
    }

    #[inline]
    fn is_open(&self) -> bool {
        self.open.is_some()
    }

    fn release(&mut self) -> Option<Box<dyn Send>> {
        let Opened { channel, counters, .. } = self.open.take()?;
        self.counters = Some(counters);
        Some(channel)
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        self.open.as_ref().map_or_else(WakeFds::new, |open| open.channel.wake_fds())
    }

    fn set_wakes(&mut self, wakes: bool) {
        if let Some(open) = &mut self.open {
            open.channel.set_wakes(wakes);
        }
    }
}
