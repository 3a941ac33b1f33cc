//! One virtqueue of a server, shared by several channels.
//!
//! A server has a fixed number of queues, often one, and a bdev has a channel for each ring of each
//! guest. So channels share a queue. Each has a [`Line`]; whoever has the queue at the moment
//! serves all lines: starts their I/Os, and passes on their results. A reactor *tries* to take the
//! queue and goes on if another thread has it: it never waits. It looks again in its next poll, and
//! does not sleep before.
#![expect(unsafe_code, reason = "copies a guest's memory, and shares a queue without a lock")]

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bdev::memory::{Stores, gather, scatter};
use bdev::{Ended, Io, Line, Op, Tag};
use rustix::event::{EventfdFlags, eventfd};

use crate::request::{Limits, Piece, header};
use crate::ring::Ring;

/// The most requests that are started, and completed, per call, so that a reactor's poll iteration
/// stays short.
const BATCH: usize = 16;

/// A queue, with the channels that use it.
pub(crate) struct Queue {
    /// Set while a thread has the state.
    taken: AtomicBool,
    state: UnsafeCell<State>,
    /// Signalled by the server for used requests. It is never read.
    call: OwnedFd,
    /// Channels whose owners may sleep.
    sleepers: AtomicUsize,
}

// SAFETY: the state is accessed only by the thread that has set `taken`.
unsafe impl Sync for Queue {}
// SAFETY: as above; what the state points to may be used by any thread.
unsafe impl Send for Queue {}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

/// What happens to I/Os while there is no ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offline {
    /// They wait for the next ring.
    Wait,
    /// They fail.
    Fail,
}

struct State {
    /// `None` while the server is away.
    ring: Option<Ring>,
    offline: Offline,
    limits: Limits,
    clients: Vec<Option<Client>>,
    /// The client that is served first next time.
    next: usize,
    next_id: u64,
    /// The requests in flight, by slot.
    pieces: Box<[Option<Placed>]>,
    free: Vec<u16>,
}

/// A channel.
struct Client {
    id: u64,
    line: Arc<Line>,
    /// I/Os that are not done, by tag.
    jobs: Box<[Option<Job>]>,
    /// Tags of I/Os of which a part is not started, in order. It has room for all.
    unstarted: VecDeque<u16>,
    /// Requests that have changed the disk, and those of them that a flush has made durable.
    written: u64,
    flushed: u64,
    /// A server went away before it had made all of them durable. The next flush reports it.
    lost: bool,
}

/// An I/O that is done in pieces.
struct Job {
    io: Io,
    /// Bytes whose pieces are started.
    started: u64,
    /// Pieces in flight.
    in_flight: u16,
    /// For a flush: [`Client::written`] at its start.
    written: u64,
    ended: Ended,
}

/// A piece in flight.
#[derive(Clone, Copy)]
struct Placed {
    client: usize,
    client_id: u64,
    tag: u16,
    piece: Piece,
}

/// The right to use the state, until it is dropped.
struct Taken<'a>(&'a Queue);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        // Release: the next thread sees what this one has done.
        self.0.taken.store(false, Ordering::Release);
    }
}

impl Taken<'_> {
    fn state(&mut self) -> &mut State {
        // SAFETY: this thread has set `taken`, and `self` is borrowed as long as the state.
        unsafe { &mut *self.0.state.get() }
    }
}

impl Queue {
    /// Makes a queue with `slots` requests in flight at most, and no ring yet.
    pub(crate) fn new(slots: u16, limits: Limits) -> io::Result<Self> {
        let state = State {
            ring: None,
            offline: Offline::Wait,
            limits,
            clients: vec![],
            next: 0,
            next_id: 0,
            pieces: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
        };
        Ok(Self {
            taken: AtomicBool::new(false),
            state: UnsafeCell::new(state),
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            sleepers: AtomicUsize::new(0),
        })
    }

    /// The fd that the server signals. Each channel has a duplicate, as a reactor can wait only once
    /// for each fd.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    fn try_take(&self) -> Option<Taken<'_>> {
        // Acquire: pairs with the Release of the thread that had it before.
        // Not `then_some`: dropping a `Taken` releases the queue.
        (!self.taken.swap(true, Ordering::Acquire)).then(|| Taken(self))
    }

    /// Takes the queue, for threads that may wait. A reactor has it for some microseconds.
    fn take(&self) -> Taken<'_> {
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            std::thread::yield_now();
        }
    }

    /// For a reactor: serves all channels, if no other thread does. Returns whether it did.
    #[inline]
    pub(crate) fn try_serve(&self) -> bool {
        let Some(mut taken) = self.try_take() else { return false };
        taken.state().serve();
        true
    }

    /// Adds a channel, and returns its place.
    pub(crate) fn add(&self, line: &Arc<Line>, depth: u16) -> usize {
        let mut taken = self.take();
        let state = taken.state();
        state.next_id += 1;
        let client = Client {
            id: state.next_id,
            line: Arc::clone(line),
            jobs: (0..depth).map(|_| None).collect(),
            unstarted: VecDeque::with_capacity(depth.into()),
            written: 0,
            flushed: 0,
            lost: false,
        };
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        state.set_signals(true);
        if let Some(at) = state.clients.iter().position(Option::is_none) {
            state.clients[at] = Some(client);
            return at;
        }
        state.clients.push(Some(client));
        state.clients.len() - 1
    }

    /// Removes a channel that has no outstanding I/O.
    pub(crate) fn remove(&self, client: usize, sleeps: bool) {
        let removed = self.take().state().clients[client].take();
        drop(removed);
        if sleeps {
            self.set_sleeps(false);
        }
    }

    /// One more channel's owner may sleep, or one less.
    pub(crate) fn set_sleeps(&self, sleeps: bool) {
        let mut taken = self.take();
        let before = if sleeps {
            self.sleepers.fetch_add(1, Ordering::Relaxed)
        } else {
            self.sleepers.fetch_sub(1, Ordering::Relaxed)
        };
        let now = if sleeps { before + 1 } else { before - 1 };
        taken.state().set_signals(now > 0);
    }

    /// Starts to use a ring. Requests that were in flight in the ring before are put into it again:
    /// they change nothing when they are done twice. If the server before had completed writes that
    /// were not flushed, the next flush of their channel fails.
    pub(crate) fn connect(&self, ring: Ring, limits: Limits) {
        let mut taken = self.take();
        let state = taken.state();
        let before = state.ring.replace(ring);
        state.clients.iter_mut().flatten().for_each(Client::server_lost);
        state.limits = limits;
        state.offline = Offline::Wait;
        state.set_signals(self.sleepers.load(Ordering::Relaxed) > 0);
        state.resubmit();
        state.serve();
        drop(taken);
        drop(before);
    }

    /// Stops to use the ring: the server is away.
    pub(crate) fn disconnect(&self, offline: Offline) {
        let mut taken = self.take();
        let before = taken.state().ring.take();
        taken.state().offline = offline;
        taken.state().serve();
        drop(taken);
        drop(before);
    }

    /// Returns whether the server has broken the ring's rules.
    pub(crate) fn is_broken(&self) -> bool {
        self.take().state().ring.as_ref().is_some_and(Ring::is_broken)
    }
}

impl State {
    fn set_signals(&mut self, wanted: bool) {
        if let Some(ring) = &self.ring {
            ring.set_signals(wanted);
        }
    }

    fn serve(&mut self) {
        self.accept();
        let online = self.ring.as_ref().is_some_and(|ring| !ring.is_broken());
        if !online {
            if self.offline == Offline::Fail {
                self.fail_all();
            }
            return;
        }
        self.complete();
        self.start();
        if let Some(ring) = &mut self.ring {
            ring.publish();
        }
    }

    /// Takes the I/Os of all lines.
    fn accept(&mut self) {
        for client in self.clients.iter_mut().flatten() {
            while let Some(io) = client.line.take_job() {
                let job = Job { io, started: 0, in_flight: 0, written: 0, ended: Ended::Ok };
                client.jobs[usize::from(io.tag.0)] = Some(job);
                client.unstarted.push_back(io.tag.0);
            }
            if client.line.abandoned().load(Ordering::Relaxed) {
                client.end_all(libc::ECANCELED);
            }
        }
    }

    /// Passes on the results of used requests.
    fn complete(&mut self) {
        for _ in 0..BATCH {
            let Some(ring) = &mut self.ring else { return };
            let Some(slot) = ring.take_used() else { return };
            let Some(placed) = self.pieces.get_mut(usize::from(slot)).and_then(Option::take) else {
                return ring.set_broken();
            };
            self.free.push(slot);
            let client = self.clients.get_mut(placed.client).and_then(Option::as_mut);
            // Otherwise, the channel has ended without the server's answer.
            if let Some(client) = client.filter(|client| client.id == placed.client_id) {
                let status = ring.status(slot);
                client.piece_ended(placed, status, ring.buffer(slot));
            }
        }
    }

    /// Starts pieces while there are free slots, of each channel in rotation.
    fn start(&mut self) {
        let mut idle = 0;
        let mut started = 0;
        while started < BATCH && idle < self.clients.len() && !self.free.is_empty() {
            let at = self.next % self.clients.len();
            self.next = at + 1;
            if self.start_piece_of(at) {
                started += 1;
                idle = 0;
            } else {
                idle += 1;
            }
        }
    }

    fn start_piece_of(&mut self, at: usize) -> bool {
        let Some(client) = &mut self.clients[at] else { return false };
        let Some(&tag) = client.unstarted.front() else { return false };
        let Some(job) = &mut client.jobs[usize::from(tag)] else {
            client.unstarted.pop_front();
            return false;
        };
        if job.io.op == Op::Flush && std::mem::take(&mut client.lost) {
            client.unstarted.pop_front();
            client.end(tag, Ended::Failed(libc::EIO));
            return true;
        }
        job.written = client.written;
        let piece = Piece::of(&job.io, job.started, self.limits);
        job.started += piece.len;
        job.in_flight += 1;
        if job.started >= job.io.len {
            client.unstarted.pop_front();
        }
        let io = job.io;
        let placed = Placed { client: at, client_id: client.id, tag, piece };
        if let (Some(ring), Some(slot)) = (&mut self.ring, self.free.pop()) {
            self.pieces[usize::from(slot)] = Some(placed);
            // SAFETY: the I/O is outstanding, so its segments are valid.
            unsafe { put(ring, slot, &io, piece) };
        }
        true
    }

    /// Puts the requests in flight into a new ring.
    fn resubmit(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        for (slot, place) in (0..).zip(&mut self.pieces) {
            let Some(placed) = place else { continue };
            let client = self.clients.get(placed.client).and_then(Option::as_ref);
            let client = client.filter(|client| client.id == placed.client_id);
            let job = client.and_then(|client| client.jobs[usize::from(placed.tag)].as_ref());
            if let Some(job) = job {
                // SAFETY: the I/O is outstanding, so its segments are valid.
                unsafe { put(ring, slot, &job.io, placed.piece) };
            } else {
                *place = None;
                self.free.push(slot);
            }
        }
    }

    fn fail_all(&mut self) {
        for client in self.clients.iter_mut().flatten() {
            client.end_all(libc::ESHUTDOWN);
        }
    }
}

/// Puts a request into the ring.
///
/// # Safety
/// The I/O's segments are valid.
unsafe fn put(ring: &mut Ring, slot: u16, io: &Io, piece: Piece) {
    if io.op == Op::Write {
        // SAFETY: the caller guarantees that the array is valid.
        let segments = unsafe { io.segments() };
        let (to, len) = (ring.buffer(slot), piece.bytes());
        // SAFETY: the segments are readable by the caller's promise, the buffer has room for a
        // piece, and a guest's memory does not overlap it.
        unsafe { gather(segments, piece.offset, to, len, Stores::Cached) };
    }
    let (header, range) = header(io, piece);
    ring.put(slot, &header, range.as_ref(), piece, io.op);
}

impl Client {
    /// A piece of an I/O has ended, with the server's status; `buffer` has the data of a read.
    fn piece_ended(&mut self, placed: Placed, status: u8, buffer: *const u8) {
        const OK: u8 = 0;
        const UNSUPPORTED: u8 = 2;
        let place = &mut self.jobs[usize::from(placed.tag)];
        let Some(job) = place else { return };
        job.in_flight -= 1;
        match status {
            OK if job.io.op == Op::Read => {
                // SAFETY: the I/O is outstanding, so the array is valid.
                let segments = unsafe { job.io.segments() };
                let (skip, len) = (placed.piece.offset, placed.piece.bytes());
                // SAFETY: the segments are writable, as the I/O is outstanding; the buffer has a
                // piece's bytes, and does not overlap a guest's memory.
                let whole = unsafe { scatter(segments, skip, buffer, len) };
                debug_assert!(whole, "the segments' lengths add up to the I/O's");
            }
            OK if job.io.op == Op::Flush => self.flushed = self.flushed.max(job.written),
            OK => self.written += 1,
            UNSUPPORTED => job.ended = Ended::Unsupported,
            _ => job.ended = Ended::Failed(libc::EIO),
        }
        if job.ended != Ended::Ok {
            // The rest is not started; its tag is skipped.
            job.started = job.io.len;
            self.unstarted.retain(|tag| *tag != placed.tag);
        }
        if job.in_flight == 0 && job.started >= job.io.len {
            let ended = job.ended;
            self.end(placed.tag, ended);
        }
    }

    /// Reports an I/O.
    fn end(&mut self, tag: u16, ended: Ended) {
        self.jobs[usize::from(tag)] = None;
        self.line.complete(Tag(tag), ended);
    }

    /// Another server has taken over. What the one before had not made durable may be lost.
    fn server_lost(&mut self) {
        self.lost |= self.written != self.flushed;
        self.flushed = self.written;
    }

    /// Reports all I/Os as failed. Requests in flight use no memory of the guest.
    fn end_all(&mut self, errno: i32) {
        self.unstarted.clear();
        for place in &mut self.jobs {
            if let Some(job) = place.take() {
                self.line.complete(job.io.tag, Ended::Failed(errno));
            }
        }
    }
}
