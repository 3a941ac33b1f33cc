//! One client: its bytes in, its requests, its bytes out.
//!
//! One task owns the socket. A turn of its loop sends what is ready, starts at most one
//! request, and reads if there is no whole request left; otherwise it waits. Sending comes
//! first so that a client gets an answer before its next request is looked at, and one
//! request a turn keeps a client that sends many from holding the thread.
//!
//! A request is polled once where it is found, so requests start in order and those that
//! need not wait are answered in order; one that has to wait becomes a task of its own,
//! which outlives the connection.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinSet, spawn_local};

use crate::answer;
use crate::error::RpcError;
use crate::hang_up::HangUp;
use crate::params::Client;
use crate::registry::Registry;
use crate::request::{Member, Request};
use crate::scan::{self, Scan, Scanner};
use crate::server::{Mode, stopping};

/// Bytes of one request; a longer one resets the connection. SPDK's number.
pub const REQUEST_MAX: usize = 256 * 1024;

/// Requests of one connection (and members of one batch) that may run at a time; further ones
/// stay unread until one of them ends. SPDK has no limit. A client that waits for its answers
/// has one, and scripts that pipeline have tens.
pub const OUTSTANDING_MAX: usize = 128;

/// Bytes of one answer; a longer one is replaced by an error. SPDK's number.
pub const ANSWER_MAX: usize = 32 * 1024 * 1024;

/// Bytes of unsent answers above which no further request is started: a client that does not
/// read its answers gets no more of them.
const UNSENT_HIGH: usize = 1024 * 1024;

/// Bytes of unsent answers above which the connection is closed. Only requests that ran at
/// the same time can get there; twice the longest answer.
const UNSENT_MAX: usize = 2 * ANSWER_MAX;

/// Bytes asked of the socket at a time.
const READ_SIZE: usize = 16 * 1024;

/// Serves one client until it is gone, errs, or the server stops.
pub(crate) async fn serve(
    stream: UnixStream,
    registry: Rc<Registry>,
    mut modes: watch::Receiver<Mode>,
) {
    let link = Rc::new(Link::new());
    // Whatever ends this task, running requests are told and their answers thrown away.
    let _closer = Closer(Rc::clone(&link));
    let hang_up = match HangUp::new(&stream) {
        Ok(hang_up) => hang_up,
        Err(error) => {
            tracing::warn!("cannot watch an RPC connection: {error}");
            return;
        }
    };
    let mut input = Input::new();
    let mut eof = false;
    loop {
        let mode = *modes.borrow_and_update();
        if link.flush(&stream).is_err() {
            // What the client sent before it left is still run.
            link.set_gone();
        }
        if mode == Mode::Stopping || link.is_overfull() {
            return;
        }
        let mut wants_read = false;
        if mode == Mode::Serving && link.may_start() {
            match input.next() {
                Next::Request(request) => {
                    start(request, &registry, &link);
                    tokio::task::coop::consume_budget().await;
                    continue;
                }
                Next::Invalid => return refuse(&stream, &hang_up, &link, modes).await,
                Next::Incomplete if eof && link.is_done() => return,
                Next::Incomplete if eof => {}
                Next::Incomplete => match input.read(&stream) {
                    Ok(0) => {
                        eof = true;
                        continue;
                    }
                    Ok(_) => continue,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => wants_read = true,
                    Err(error) => {
                        tracing::debug!("RPC connection closed: {error}");
                        return;
                    }
                },
            }
        } else if link.is_gone() && !link.may_start() {
            // Nobody waits for the answers, and the client has its share of running requests.
            return;
        }
        tokio::select! {
            () = link.ready(&stream, &hang_up, wants_read) => {}
            () = link.changed.notified() => {}
            changed = modes.changed() => if changed.is_err() { return },
        }
    }
}

/// Ends a connection whose bytes are not JSON: there is no telling where the next request
/// would start. What was answered before is sent first, then the error.
async fn refuse(stream: &UnixStream, hang_up: &HangUp, link: &Link, modes: watch::Receiver<Mode>) {
    link.push(answer::encode(None, &Err(RpcError::parse_error())));
    link.closed.set(true);
    while link.flush(stream).is_ok() && !link.is_done_sending() {
        tokio::select! {
            () = link.ready(stream, hang_up, false) => {}
            () = stopping(modes.clone()) => return,
        }
    }
    // Bytes left unread would turn the client's end of file into ECONNRESET.
    let mut rest = [0; 4096];
    for _ in 0..64 {
        match stream.try_read(&mut rest) {
            Ok(1..) => {}
            _ => break,
        }
    }
}

/// Starts a request. If it is not finished at once, a task of its own goes on with it.
fn start(request: Request, registry: &Rc<Registry>, link: &Rc<Link>) {
    let running = Running::new(Rc::clone(link));
    let registry = Rc::clone(registry);
    run(async move {
        let client = running.0.client();
        let answer = match request {
            Request::Single(member) => answer_member(member, &registry, client).await,
            Request::Batch(members) => answer_batch(members, &registry, client).await,
        };
        if let Some(answer) = answer {
            running.0.push(answer);
        }
    });
}

/// Polls a future once, and spawns what is left of it.
fn run(future: impl Future<Output = ()> + 'static) {
    let mut future: Pin<Box<dyn Future<Output = ()>>> = Box::pin(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    // The wake-ups of this poll are lost; the task polls again when it starts.
    if future.as_mut().poll(&mut context).is_pending() {
        spawn_local(future);
    }
}

/// Runs one member. No answer for a notification that went well.
async fn answer_member(member: Member, registry: &Rc<Registry>, client: Client) -> Option<Vec<u8>> {
    let Member { id, call } = member;
    let outcome: Result<Value, RpcError> = match call {
        None => Err(RpcError::invalid_request()),
        Some(call) => registry.dispatch(&call.method, call.params, client, registry.phase()).await,
    };
    if id.is_none() && outcome.is_ok() {
        return None;
    }
    let answer = answer::encode(id.as_ref(), &outcome);
    if answer.len() > ANSWER_MAX {
        return Some(answer::encode(id.as_ref(), &Err(too_long())));
    }
    Some(answer)
}

fn too_long() -> RpcError {
    RpcError::internal("The answer is too long")
}

/// Runs a batch's members. Answers come in the order in which the members finish; nothing is
/// answered if all are notifications.
async fn answer_batch(
    members: Vec<Member>,
    registry: &Rc<Registry>,
    client: Client,
) -> Option<Vec<u8>> {
    let mut answers = Answers::default();
    let mut running: JoinSet<Option<Vec<u8>>> = JoinSet::new();
    for member in members {
        while running.len() >= OUTSTANDING_MAX {
            answers.add(running.join_next().await);
        }
        let (registry, client) = (Rc::clone(registry), client.clone());
        let mut future = Box::pin(async move { answer_member(member, &registry, client).await });
        match poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await {
            Poll::Ready(answer) => answers.add(Some(Ok(answer))),
            Poll::Pending => drop(running.spawn_local(future)),
        }
    }
    while !running.is_empty() {
        answers.add(running.join_next().await);
    }
    answers.finish()
}

/// A batch's answer as it grows.
#[derive(Default)]
struct Answers(Vec<u8>);

impl Answers {
    fn add(&mut self, ended: Option<Result<Option<Vec<u8>>, tokio::task::JoinError>>) {
        let answer = match ended {
            Some(Ok(Some(answer))) if self.0.len() + answer.len() <= ANSWER_MAX => answer,
            // Each member is at least four tokens, so these cannot add up to much.
            Some(Ok(Some(_))) => answer::encode(None, &Err(too_long())),
            Some(Err(_)) => answer::encode(None, &Err(RpcError::internal("Internal error"))),
            Some(Ok(None)) | None => return,
        };
        self.0.push(if self.0.is_empty() { b'[' } else { b',' });
        self.0.extend_from_slice(&answer);
    }

    fn finish(mut self) -> Option<Vec<u8>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.push(b']');
        Some(self.0)
    }
}

/// What a connection's task shares with the requests it started.
struct Link {
    unsent: RefCell<Unsent>,
    outstanding: Cell<usize>,
    /// No further answers are taken.
    closed: Cell<bool>,
    gone: watch::Sender<bool>,
    /// An answer was added, or a request ended.
    changed: Notify,
}

#[derive(Default)]
struct Unsent {
    bytes: Vec<u8>,
    /// How many of them are sent.
    sent: usize,
}

impl Link {
    fn new() -> Self {
        Self {
            unsent: RefCell::default(),
            outstanding: Cell::new(0),
            closed: Cell::new(false),
            gone: watch::Sender::new(false),
            changed: Notify::new(),
        }
    }

    fn client(&self) -> Client {
        Client::remote(self.gone.subscribe())
    }

    fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// The client can read no answer any more.
    fn set_gone(&self) {
        self.closed.set(true);
        self.unsent.take();
        self.gone.send_replace(true);
    }

    fn unsent_len(&self) -> usize {
        let unsent = self.unsent.borrow();
        unsent.bytes.len() - unsent.sent
    }

    fn may_start(&self) -> bool {
        self.outstanding.get() < OUTSTANDING_MAX && self.unsent_len() < UNSENT_HIGH
    }

    fn is_overfull(&self) -> bool {
        self.unsent_len() > UNSENT_MAX
    }

    fn is_done_sending(&self) -> bool {
        self.unsent_len() == 0
    }

    /// Nothing runs for this client, or nobody waits for it, and all is sent.
    fn is_done(&self) -> bool {
        self.is_done_sending() && (self.is_gone() || self.outstanding.get() == 0)
    }

    fn push(&self, answer: Vec<u8>) {
        if self.closed.get() || self.is_overfull() {
            return;
        }
        let mut unsent = self.unsent.borrow_mut();
        let sent = std::mem::take(&mut unsent.sent);
        unsent.bytes.drain(..sent);
        unsent.bytes.extend_from_slice(&answer);
        unsent.bytes.push(b'\n');
        self.changed.notify_one();
    }

    /// Sends what the socket takes. Fails when the client cannot be written to any more.
    fn flush(&self, stream: &UnixStream) -> io::Result<()> {
        let mut unsent = self.unsent.borrow_mut();
        while unsent.sent < unsent.bytes.len() {
            match stream.try_write(&unsent.bytes[unsent.sent..]) {
                Ok(count) => unsent.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        *unsent = Unsent::default();
        Ok(())
    }

    /// Waits until the client can be read if `wants_read`, can be written if there is something
    /// to write, or is gone.
    async fn ready(&self, stream: &UnixStream, hang_up: &HangUp, wants_read: bool) {
        if self.is_gone() {
            return std::future::pending().await;
        }
        let read = wants_read.then_some(Interest::READABLE);
        let write = (!self.is_done_sending()).then_some(Interest::WRITABLE);
        let interest = match (read, write) {
            (Some(read), Some(write)) => Some(read | write),
            (read, write) => read.or(write),
        };
        tokio::select! {
            () = hang_up.wait() => self.set_gone(),
            // What the socket has to say comes out when it is read or written.
            _ = stream.ready(interest.unwrap_or(Interest::READABLE)), if interest.is_some() => {}
        }
    }
}

/// Ends a link with the task that owns it.
struct Closer(Rc<Link>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.set_gone();
    }
}

/// Counts a request as long as it runs, however it ends.
struct Running(Rc<Link>);

impl Running {
    fn new(link: Rc<Link>) -> Self {
        link.outstanding.update(|count| count + 1);
        Self(link)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.outstanding.update(|count| count - 1);
        self.0.changed.notify_one();
    }
}

/// Bytes received and not yet understood.
struct Input {
    bytes: Vec<u8>,
    /// Where the value being scanned starts.
    start: usize,
    /// How far it is scanned.
    scanned: usize,
    scanner: Scanner,
}

enum Next {
    Request(Request),
    Incomplete,
    Invalid,
}

impl Input {
    fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, scanned: 0, scanner: Scanner::new() }
    }

    fn next(&mut self) -> Next {
        if self.scanner.is_idle() {
            // Space before a request is no part of it.
            let space = self.bytes[self.scanned..].iter().take_while(|b| scan::is_space(**b));
            self.scanned += space.count();
            self.start = self.scanned;
        }
        match self.scanner.feed(&self.bytes[self.scanned..]) {
            Scan::Incomplete => {
                self.scanned = self.bytes.len();
                Next::Incomplete
            }
            Scan::Invalid => Next::Invalid,
            Scan::Complete(count) => {
                let value = self.start..self.scanned + count;
                self.scanner = Scanner::new();
                self.start = value.end;
                self.scanned = value.end;
                let text = std::str::from_utf8(&self.bytes[value]).ok();
                match text.map(Request::parse) {
                    Some(Ok(request)) => Next::Request(request),
                    _ => Next::Invalid,
                }
            }
        }
    }

    /// Reads once. Fails when the request does not fit.
    fn read(&mut self, stream: &UnixStream) -> io::Result<usize> {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        let filled = self.bytes.len();
        if filled == 0 {
            // An idle client keeps no buffer.
            self.bytes = Vec::new();
        }
        let room = READ_SIZE.min(REQUEST_MAX - filled);
        if room == 0 {
            return Err(io::Error::new(ErrorKind::InvalidData, "a request is too long"));
        }
        self.bytes.resize(filled + room, 0);
        let read = stream.try_read(&mut self.bytes[filled..]);
        self.bytes.truncate(filled + *read.as_ref().unwrap_or(&0));
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        read
    }
}
