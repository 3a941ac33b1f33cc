//! The state of a queue, for the thread that has taken it: the ring, the channels, their I/Os.
#![expect(unsafe_code, reason = "copies a guest's memory")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::memory::{Stores, gather, scatter};
use bdev::{Durability, Ended, Io, Line, Op, Tag};

use super::Offline;
use crate::request::{Limits, Piece, header};
use crate::ring::Ring;

/// The most requests that are started, and completed, per call, so that a reactor's poll iteration
/// stays short.
const BATCH: usize = 16;

/// The state of a queue.
pub(super) struct State {
    /// `None` while the server is away.
    pub(super) ring: Option<Ring>,
    pub(super) offline: Offline,
    pub(super) limits: Limits,
    durability: Arc<Durability>,
    clients: Vec<Option<Client>>,
    /// The client that is served first next time.
    next: usize,
    next_id: u64,
    /// The requests in flight, by slot.
    pieces: Box<[Option<Placed>]>,
    free: Vec<u16>,
}

/// A channel.
pub(super) struct Client {
    id: u64,
    line: Arc<Line>,
    /// The I/Os that have not ended, by tag.
    jobs: Box<[Option<Job>]>,
    /// Their number.
    active: usize,
    /// The tags of I/Os of which a part is not started, in order. It has room for all tags.
    unstarted: VecDeque<u16>,
    /// The losses of writes that its flushes have reported: see [`Durability::take_loss`].
    losses: u64,
}

/// An I/O that is done in pieces.
struct Job {
    io: Io,
    /// Bytes whose pieces are started.
    started: u64,
    /// Pieces in flight.
    in_flight: u16,
    /// For a flush: [`Durability::written`] at its start.
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

impl State {
    /// For at most `slots` requests in flight, without a ring.
    pub(super) fn new(slots: u16, limits: Limits, durability: &Arc<Durability>) -> Self {
        Self {
            ring: None,
            offline: Offline::Wait,
            limits,
            durability: Arc::clone(durability),
            clients: vec![],
            next: 0,
            next_id: 0,
            pieces: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
        }
    }

    /// Adds a channel, and returns its place.
    pub(super) fn add(&mut self, line: &Arc<Line>, depth: u16) -> usize {
        self.next_id += 1;
        let client = Client {
            id: self.next_id,
            line: Arc::clone(line),
            jobs: (0..depth).map(|_| None).collect(),
            active: 0,
            unstarted: VecDeque::with_capacity(depth.into()),
            losses: self.durability.channel_opened(),
        };
        if let Some(at) = self.clients.iter().position(Option::is_none) {
            self.clients[at] = Some(client);
            return at;
        }
        self.clients.push(Some(client));
        self.clients.len() - 1
    }

    /// Removes a channel, and returns what is to be dropped.
    pub(super) fn remove(&mut self, place: usize) -> Option<Client> {
        let removed = self.clients[place].take();
        if removed.is_some() {
            self.durability.channel_closed();
        }
        removed
    }

    pub(super) fn set_signals(&mut self, wanted: bool) {
        if let Some(ring) = &self.ring {
            ring.set_signals(wanted);
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_broken)
    }

    /// Serves all channels once. Returns whether no work is left now. If work is left, wakes the
    /// owners that sleep: the server's signal for that work may have woken only this caller.
    pub(super) fn serve(&mut self) -> bool {
        self.accept();
        if self.ring.is_none() || self.is_broken() {
            if self.offline == Offline::Fail {
                self.fail_all();
            }
            return true;
        }
        self.complete();
        self.start();
        let Some(ring) = &mut self.ring else { return true };
        ring.publish();
        let startable = |client: &Client| !client.unstarted.is_empty();
        let left = ring.has_work()
            || !self.free.is_empty() && self.clients.iter().flatten().any(startable);
        if left {
            let active = self.clients.iter().flatten().filter(|client| client.active > 0);
            active.for_each(|client| client.line.wake_owner());
        }
        !left
    }

    /// Takes the I/Os of all lines.
    fn accept(&mut self) {
        for client in self.clients.iter_mut().flatten() {
            while let Some(io) = client.line.take_job() {
                let job = Job { io, started: 0, in_flight: 0, written: 0, ended: Ended::Ok };
                client.jobs[usize::from(io.tag.0)] = Some(job);
                client.active += 1;
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
            // Otherwise, the channel was removed before the server's answer.
            if let Some(client) = client.filter(|client| client.id == placed.client_id) {
                let status = ring.status(slot);
                client.piece_ended(placed, status, ring.buffer(slot), &self.durability);
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
        if job.io.op == Op::Flush && self.durability.take_loss(&mut client.losses) {
            client.unstarted.pop_front();
            client.end(tag, Ended::Failed(libc::EIO));
            return true;
        }
        job.written = self.durability.written();
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
    pub(super) fn resubmit(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        for (slot, place) in (0..).zip(&mut self.pieces) {
            let Some(placed) = place else { continue };
            let client = self.clients.get_mut(placed.client).and_then(Option::as_mut);
            let client = client.filter(|client| client.id == placed.client_id);
            if let Some(client) = client
                && let Some(Job { io, .. }) = client.jobs[usize::from(placed.tag)]
            {
                if io.op != Op::Flush || !self.durability.take_loss(&mut client.losses) {
                    // SAFETY: the I/O is outstanding, so its segments are valid.
                    unsafe { put(ring, slot, &io, placed.piece) };
                    continue;
                }
                client.end(placed.tag, Ended::Failed(libc::EIO));
            }
            *place = None;
            self.free.push(slot);
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
    fn piece_ended(
        &mut self,
        placed: Placed,
        status: u8,
        buffer: *const u8,
        durability: &Durability,
    ) {
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
            OK => durability.done(job.io.op, job.written),
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
        self.active -= 1;
        self.line.complete(Tag(tag), ended);
    }

    /// Reports all I/Os as failed. The requests in flight use bounce buffers, not a guest's memory.
    fn end_all(&mut self, errno: i32) {
        self.unstarted.clear();
        for place in &mut self.jobs {
            if let Some(job) = place.take() {
                self.line.complete(job.io.tag, Ended::Failed(errno));
            }
        }
        self.active = 0;
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use bdev::SharedQueue;

    use super::*;
    use crate::memory::{Layout, Memory};
    use crate::queue::Queue;

    /// A server of one queue: it completes the requests that it is told to.
    struct Server {
        memory: Arc<Memory>,
        used: u16,
    }

    impl Server {
        fn connect(queue: &Queue) -> Self {
            let layout = Layout::new(16);
            let memory = Arc::new(Memory::new(1, layout).unwrap());
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            queue.connect(Ring::new(&memory, 0, kick), Limits::new(0, 0, 0));
            Self { memory, used: 0 }
        }

        fn write(&self, at: u64, bytes: &[u8]) {
            rustix::io::pwrite(&self.memory.file, bytes, at).unwrap();
        }

        /// Ends the request of a slot well.
        fn complete(&mut self, slot: u16) {
            let addresses = self.memory.part(0).addresses();
            let used = addresses[2] - self.memory.address();
            let status = self.memory.part(0).status_at(slot) as u64;
            self.write(status, &[0]);
            let first = u32::from(slot) * 3;
            self.write(used + 4 + 8 * u64::from(self.used % 16), &first.to_le_bytes());
            self.used += 1;
            self.write(used + 2, &self.used.to_le_bytes());
        }
    }

    fn queue(durability: &Arc<Durability>) -> (Queue, Arc<Line>) {
        let queue = Queue::new(5, Limits::new(0, 0, 0), durability).unwrap();
        let line = Line::new(4).unwrap();
        queue.add(&line, 4);
        (queue, line)
    }

    fn give(queue: &Queue, line: &Line, op: Op) {
        line.push(Io::plain(op, Tag(0), 0, if op == Op::Flush { 0 } else { 512 }));
        assert!(queue.try_serve());
    }

    fn flush_of(queue: &Queue, line: &Line, server: &mut Server) -> Ended {
        give(queue, line, Op::Flush);
        if let Some((_, ended)) = line.pop() {
            return ended;
        }
        server.complete(0);
        queue.try_serve();
        line.pop().unwrap().1
    }

    #[test]
    fn each_channel_learns_once_that_writes_may_be_lost() {
        let durability = Arc::new(Durability::default());
        let ((one, of_one), (other, of_other)) = (queue(&durability), queue(&durability));
        let (mut first, _) = (Server::connect(&one), Server::connect(&other));
        give(&one, &of_one, Op::WriteZeroes);
        first.complete(0);
        one.try_serve();
        assert_eq!(of_one.pop(), Some((Tag(0), Ended::Ok)));
        // A flush is in flight when the server goes away.
        give(&one, &of_one, Op::Flush);
        assert_eq!(of_one.pop(), None);
        one.disconnect(Offline::Wait);
        other.disconnect(Offline::Wait);
        durability.server_lost();
        let (mut second, mut of_second) = (Server::connect(&one), Server::connect(&other));
        assert_eq!(of_one.pop(), Some((Tag(0), Ended::Failed(libc::EIO))));
        assert_eq!(flush_of(&one, &of_one, &mut second), Ended::Ok);
        // The guest's other ring has written nothing, and may be the one that it flushes on.
        let lost = flush_of(&other, &of_other, &mut of_second);
        assert_eq!(lost, Ended::Failed(libc::EIO));
        assert_eq!(flush_of(&other, &of_other, &mut of_second), Ended::Ok);
        // All is flushed.
        one.disconnect(Offline::Wait);
        durability.server_lost();
        let mut third = Server::connect(&one);
        assert_eq!(flush_of(&one, &of_one, &mut third), Ended::Ok);
    }

    #[test]
    fn a_disk_that_is_deleted_ends_all_io() {
        let durability = Arc::new(Durability::default());
        let (queue, line) = queue(&durability);
        give(&queue, &line, Op::WriteZeroes);
        assert_eq!(line.pop(), None, "it waits for a server");
        let _server = Server::connect(&queue);
        assert_eq!(line.pop(), None, "the server has not answered");
        queue.disconnect(Offline::Fail);
        assert_eq!(line.pop(), Some((Tag(0), Ended::Failed(libc::ESHUTDOWN))));
        give(&queue, &line, Op::WriteZeroes);
        assert_eq!(line.pop(), Some((Tag(0), Ended::Failed(libc::ESHUTDOWN))));
    }
}
