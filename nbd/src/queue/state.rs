//! The state of a queue, for the thread that has taken it: the link, the channels, their I/Os.
#![expect(unsafe_code, reason = "copies a guest's memory")]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::memory::{Stores, gather, scatter};
use bdev::{Durability, Ended, Io, Line, Op};

use super::Offline;
use crate::link::{Event, Link, STAGING};
use crate::parser::{Item, Parser};
use crate::protocol::{Request, SimpleReply, command, command_flag, errno_from_wire};

/// The most bytes that one request without a payload covers: the protocol has 32 bits.
const PLAIN_MAX: u64 = 1 << 30;

/// The longest payload of a write, in bytes: an empty output buffer has room for it and its header.
/// A power of two, and not less than the largest minimum block size of the protocol, so that longer
/// writes are cut at blocks.
const WRITE_MAX: u64 = STAGING as u64;

/// The bits of a cookie that hold the request's slot. The others hold a sequence number, so that a
/// reply to an earlier request of the slot is detected.
const SLOT_BITS: u32 = 24;

/// The most abandoned requests that wait for a reply. Beyond it, the connection is over, as a server
/// that answers some requests only would make the slots grow with each new channel.
const ABANDONED_MAX: usize = 4096;

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The server has closed it.
    Closed,
    /// The server has refused a request because it is shutting down.
    ShuttingDown,
    /// The socket has failed with this errno.
    Failed(i32),
    /// The server has not replied to more than [`ABANDONED_MAX`] abandoned requests.
    Unanswered,
    /// The server has violated the protocol.
    Violation(&'static str),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the server has closed the connection"),
            Self::ShuttingDown => f.write_str("the server is shutting down"),
            Self::Failed(errno) => {
                write!(f, "the connection has failed: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Unanswered => f.write_str("the server does not reply"),
            Self::Violation(what) => write!(f, "the server has violated the protocol: {what}"),
        }
    }
}

/// A connection that a queue does not use any more.
#[derive(Debug)]
pub(crate) struct Detached {
    /// `None`: there was none.
    pub(crate) link: Option<Box<Link>>,
    /// Why the connection is over, if the queue has found a reason.
    pub(crate) broken: Option<Broken>,
    /// No request was on its way.
    pub(crate) quiet: bool,
}

/// The state of a queue.
pub(super) struct State {
    /// `None` while there is no connection.
    link: Option<Box<Link>>,
    broken: Option<Broken>,
    offline: Offline,
    /// The longest payload in bytes.
    payload_max: u64,
    durability: Arc<Durability>,
    clients: Vec<Option<Client>>,
    /// The client whose I/Os are accepted first next time.
    next: usize,
    next_id: u64,
    /// The I/Os, by slot.
    jobs: Vec<Option<Job>>,
    free: Vec<u32>,
    /// The slots of I/Os whose next request is not sent, in order. It has room for all slots.
    unsent: VecDeque<u32>,
    /// The requests that wait for a reply.
    in_flight: usize,
    sequence: u64,
    parser: Parser,
    /// The slot of the read whose data is arriving.
    receiving: u32,
}

/// A channel.
pub(super) struct Client {
    id: u64,
    line: Arc<Line>,
    depth: usize,
    /// The losses of writes that its flushes have reported: see [`Durability::take_loss`].
    losses: u64,
}

/// An I/O, which is done in one piece after another if it is longer than a request may be.
struct Job {
    client: usize,
    client_id: u64,
    io: Io,
    /// The I/O was reported, and its memory must not be accessed. The slot waits for the reply.
    reported: bool,
    /// Bytes of the pieces that are done.
    done: u64,
    /// The length of the request in flight, in bytes.
    len: usize,
    /// The cookie of the request in flight, or `None`.
    cookie: Option<u64>,
    /// [`Durability::written`] at the request's start.
    written: u64,
}

impl Job {
    /// Copies the data of a write that follows the pieces that are done.
    fn copy_to(&self, payload: &mut [u8]) {
        if payload.is_empty() {
            return;
        }
        // SAFETY: the I/O is outstanding, so the array is valid.
        let segments = unsafe { self.io.segments() };
        let (to, len) = (payload.as_mut_ptr(), payload.len());
        // SAFETY: the segments are readable, as the I/O is outstanding; `payload` has room for `len`
        // bytes, and a guest's memory does not overlap it.
        let whole = unsafe { gather(segments, self.done, to, len, Stores::Cached) };
        debug_assert!(whole, "the segments' lengths add up to the I/O's");
    }
}

impl State {
    pub(super) fn new(payload_max: u32, durability: &Arc<Durability>) -> Self {
        Self {
            link: None,
            broken: None,
            offline: Offline::Wait,
            payload_max: payload_max.into(),
            durability: Arc::clone(durability),
            clients: vec![],
            next: 0,
            next_id: 0,
            jobs: vec![],
            free: vec![],
            unsent: VecDeque::new(),
            in_flight: 0,
            sequence: 0,
            parser: Parser::default(),
            receiving: 0,
        }
    }

    /// Adds a channel, and returns its place. Makes room for its I/Os.
    pub(super) fn add(&mut self, line: &Arc<Line>, depth: u16) -> usize {
        let depth = usize::from(depth);
        let others: usize = self.clients.iter().flatten().map(|client| client.depth).sum();
        for slot in (0..).take(others + self.abandoned() + depth).skip(self.jobs.len()) {
            self.jobs.push(None);
            self.free.push(slot);
        }
        self.free.reserve(self.jobs.len() - self.free.len());
        self.unsent.reserve(self.jobs.len() - self.unsent.len());
        self.next_id += 1;
        let losses = self.durability.channel_opened();
        let client = Client { id: self.next_id, line: Arc::clone(line), depth, losses };
        if let Some(at) = self.clients.iter().position(Option::is_none) {
            self.clients[at] = Some(client);
            return at;
        }
        self.clients.push(Some(client));
        self.clients.len() - 1
    }

    /// The number of I/Os that were reported before their reply.
    fn abandoned(&self) -> usize {
        self.jobs.iter().flatten().filter(|job| job.reported).count()
    }

    /// Removes a channel, and returns what is to be dropped.
    pub(super) fn remove(&mut self, place: usize) -> Option<Client> {
        let removed = self.clients[place].take();
        if removed.is_some() {
            self.durability.channel_closed();
        }
        removed
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Uses a link from now on. Returns the one before.
    pub(super) fn connect(&mut self, link: Box<Link>) -> Option<Box<Link>> {
        let before = self.disconnect(Offline::Wait).link;
        self.link = Some(link);
        before
    }

    /// Stops using the link, and returns it. The requests in flight have to be sent again.
    pub(super) fn disconnect(&mut self, offline: Offline) -> Detached {
        let quiet = self.in_flight == 0;
        self.offline = offline;
        self.parser = Parser::default();
        self.in_flight = 0;
        let mut again = vec![];
        for (slot, place) in (0..).zip(&mut self.jobs) {
            let Some(job) = place else { continue };
            let Some(cookie) = job.cookie.take() else { continue };
            if job.reported {
                *place = None;
                self.free.push(slot);
            } else {
                again.push((cookie, slot));
            }
        }
        again.sort_unstable();
        again.iter().rev().for_each(|(_, slot)| self.unsent.push_front(*slot));
        Detached { link: self.link.take(), broken: self.broken.take(), quiet }
    }

    /// Serves all channels once. Returns whether no work is left now. If work is left, wakes the
    /// owners that sleep: the kernel may not have taken an operation, which no event follows, and
    /// this caller may have no I/O any more.
    pub(super) fn serve(&mut self) -> bool {
        self.accept();
        self.end_abandoned();
        let connected = self.broken.is_none();
        let Some(mut link) = self.link.take_if(|_| connected) else {
            if self.offline == Offline::Fail {
                self.fail_all();
            }
            return true;
        };
        // At most the events of one send and of one receive.
        while self.broken.is_none()
            && let Some(event) = link.poll()
        {
            match event {
                Event::Sent => {}
                Event::Received(len) => self.received(link.input(len)),
                Event::Closed => self.broken = Some(Broken::Closed),
                Event::Failed(errno) => self.broken = Some(Broken::Failed(errno)),
            }
        }
        let mut left = false;
        if self.broken.is_none() {
            self.send(&mut link);
            if self.in_flight > 0 {
                link.receive();
            }
            link.submit();
            left = link.has_work();
        }
        self.link = Some(link);
        if left {
            self.clients.iter().flatten().for_each(|client| client.line.wake_owner());
        }
        !left
    }

    /// Takes the I/Os of all lines, one of each in turn.
    fn accept(&mut self) {
        let mut idle = 0;
        while idle < self.clients.len() {
            let at = self.next % self.clients.len();
            self.next = at + 1;
            idle += 1;
            let Some(client) = &self.clients[at] else { continue };
            if client.line.waiting() == 0 {
                continue;
            }
            // There are as many slots as I/Os may be outstanding.
            let Some(slot) = self.free.pop() else { return };
            let Some(io) = client.line.take_job() else {
                self.free.push(slot);
                continue;
            };
            let client_id = client.id;
            self.jobs[slot as usize] = Some(Job {
                client: at,
                client_id,
                io,
                reported: false,
                done: 0,
                len: 0,
                cookie: None,
                written: 0,
            });
            self.unsent.push_back(slot);
            idle = 0;
        }
    }

    /// Reports the I/Os of channels that were abandoned.
    fn end_abandoned(&mut self) {
        for at in 0..self.clients.len() {
            let Some(client) = &self.clients[at] else { continue };
            if client.line.abandoned().load(Ordering::Relaxed) {
                let id = client.id;
                self.report_all(|job| job.client_id == id, libc::ECANCELED);
            }
        }
    }

    fn fail_all(&mut self) {
        self.report_all(|_| true, libc::ENOTCONN);
    }

    /// Reports I/Os as failed. Those that were sent keep their slots until the reply.
    #[cold]
    fn report_all(&mut self, which: impl Fn(&Job) -> bool, errno: i32) {
        for slot in 0..self.jobs.len() {
            let Some(job) = &mut self.jobs[slot] else { continue };
            if job.reported || !which(job) {
                continue;
            }
            job.reported = true;
            if let Some(client) = client_of(&self.clients, job) {
                client.line.complete(job.io.tag, Ended::Failed(errno));
            }
        }
        let jobs = &mut self.jobs;
        let free = &mut self.free;
        self.unsent.retain(|slot| {
            let keep = jobs[*slot as usize].as_ref().is_some_and(|job| !job.reported);
            if !keep {
                jobs[*slot as usize] = None;
                free.push(*slot);
            }
            keep
        });
        if self.abandoned() > ABANDONED_MAX {
            self.broken = Some(Broken::Unanswered);
        }
    }

    /// Fills the output buffer with requests, if it is free, and sends it.
    fn send(&mut self, link: &mut Link) {
        let Some(output) = link.output() else { return };
        let mut filled = 0;
        while let Some(slot) = self.unsent.front().copied() {
            let Some(len) = self.stage(slot, &mut output[filled..]) else { break };
            self.unsent.pop_front();
            filled += len;
        }
        if filled > 0 {
            link.send(filled);
        }
    }

    /// Puts the next request of an I/O into the output buffer, if there is room for all of it: the
    /// I/O's memory is not needed later, so that the I/O can be abandoned. Returns the bytes used: 0
    /// if the I/O has ended. `None`: it needs more room.
    fn stage(&mut self, slot: u32, to: &mut [u8]) -> Option<usize> {
        let Some(job) = self.jobs[slot as usize].as_mut() else { return Some(0) };
        if job.io.op == Op::Flush
            && let Some(client) = self.clients[job.client].as_mut()
            && self.durability.take_loss(&mut client.losses)
        {
            self.end(slot, Ended::Failed(libc::EIO));
            return Some(0);
        }
        let (command, flags, max) = match job.io.op {
            Op::Read => (command::READ, 0, self.payload_max),
            Op::Write => (command::WRITE, 0, self.payload_max.min(WRITE_MAX)),
            Op::Flush => (command::FLUSH, 0, 0),
            Op::Unmap => (command::TRIM, 0, PLAIN_MAX),
            Op::WriteZeroes if job.io.may_unmap => (command::WRITE_ZEROES, 0, PLAIN_MAX),
            Op::WriteZeroes => (command::WRITE_ZEROES, command_flag::NO_HOLE, PLAIN_MAX),
        };
        let len = u32::try_from(job.io.len.saturating_sub(job.done).min(max)).unwrap_or(0);
        let payload_len = if job.io.op == Op::Write { len as usize } else { 0 };
        let (header, rest) = to.split_at_mut_checked(Request::SIZE)?;
        let payload = rest.get_mut(..payload_len)?;
        self.sequence += 1;
        let cookie = self.sequence << SLOT_BITS | u64::from(slot);
        let offset = if job.io.op == Op::Flush { 0 } else { job.io.offset + job.done };
        header.copy_from_slice(&Request { flags, command, cookie, offset, len }.encode());
        job.copy_to(payload);
        job.len = len as usize;
        job.cookie = Some(cookie);
        job.written = self.durability.written();
        self.in_flight += 1;
        Some(Request::SIZE + payload_len)
    }

    /// Passes on what the server has sent.
    fn received(&mut self, mut input: &[u8]) {
        while let Some(item) = self.parser.next(&mut input) {
            let result = match item {
                Item::Reply(reply) => self.reply(reply),
                Item::Data(data) => {
                    self.data(data);
                    Ok(())
                }
                Item::Violation => Err(Broken::Violation("expected a reply")),
            };
            if let Err(broken) = result {
                self.broken = Some(broken);
                return;
            }
        }
    }

    fn reply(&mut self, reply: SimpleReply) -> Result<(), Broken> {
        let slot = (reply.cookie & ((1 << SLOT_BITS) - 1)) as u32;
        let job = self.jobs.get(slot as usize).and_then(Option::as_ref);
        let Some(job) = job.filter(|job| job.cookie == Some(reply.cookie)) else {
            return Err(Broken::Violation("a reply to no request"));
        };
        match (reply.error, job.io.op) {
            (0, Op::Read) => {
                self.receiving = slot;
                self.parser.expect(job.len);
            }
            (0, _) => self.piece_done(slot),
            (error, _) => {
                let ended = match errno_from_wire(error) {
                    // The request stays in flight, so the next connection sends it again.
                    libc::ESHUTDOWN => return Err(Broken::ShuttingDown),
                    libc::EOPNOTSUPP => Ended::Unsupported,
                    errno => Ended::Failed(errno),
                };
                self.in_flight -= 1;
                self.end(slot, ended);
            }
        }
        Ok(())
    }

    /// Passes on data of a read.
    fn data(&mut self, data: &[u8]) {
        let missing = self.parser.missing();
        let Some(job) = &self.jobs[self.receiving as usize] else { return };
        if !job.reported {
            let skip = job.done + (job.len - missing - data.len()) as u64;
            // SAFETY: the I/O is outstanding, so the array is valid.
            let segments = unsafe { job.io.segments() };
            // SAFETY: the segments are writable, as the I/O is outstanding; a guest's memory does
            // not overlap `data`.
            let whole = unsafe { scatter(segments, skip, data.as_ptr(), data.len()) };
            debug_assert!(whole, "the segments' lengths add up to the I/O's");
        }
        if missing == 0 {
            self.piece_done(self.receiving);
        }
    }

    /// The server has done a request.
    fn piece_done(&mut self, slot: u32) {
        let Some(job) = &mut self.jobs[slot as usize] else { return };
        self.in_flight -= 1;
        job.cookie = None;
        job.done += job.len as u64;
        self.durability.done(job.io.op, job.written);
        if job.reported || job.done >= job.io.len {
            self.end(slot, Ended::Ok);
        } else {
            self.unsent.push_back(slot);
        }
    }

    /// Reports an I/O, and frees its slot.
    fn end(&mut self, slot: u32, ended: Ended) {
        let Some(job) = self.jobs[slot as usize].take() else { return };
        self.free.push(slot);
        if !job.reported
            && let Some(client) = client_of(&self.clients, &job)
        {
            client.line.complete(job.io.tag, ended);
        }
    }
}

/// The channel of an I/O, if it was not removed since.
fn client_of<'a>(clients: &'a [Option<Client>], job: &Job) -> Option<&'a Client> {
    clients.get(job.client)?.as_ref().filter(|client| client.id == job.client_id)
}
