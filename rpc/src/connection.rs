//! The task of one connection: receives requests, starts them, and sends answers.
//!
//! The task owns the socket. An iteration of its loop sends answers, or starts at most one request,
//! or reads; if none of these is possible, the task waits. It sends first, so that a client gets an
//! answer before its next request starts. An iteration is bounded, and the task yields after it, so
//! a client that sends much or requests much does not delay other clients.
//!
//! A request starts when the one before it has ended or lets it start
//! ([`Client::let_next_start`](crate::Client::let_next_start)), so that it sees the effects of the earlier ones.
//! It is polled once in this task. A request that waits becomes a separate task, which outlives the
//! connection.

use std::future::Future;
use std::io::ErrorKind;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{spawn_local, yield_now};

use crate::answer;
use crate::batch::answer_batch;
use crate::error::RpcError;
use crate::hang_up::HangUp;
use crate::idle::Idle;
use crate::input::{Input, Next, READ_SIZE, REQUEST_MAX};
use crate::link::{Flushed, GoneOnDrop, Link, Running};
use crate::member::answer_member;
use crate::mode::{Mode, stopping};
use crate::registry::Registry;
use crate::request::Request;
use crate::stream::Stream;

/// Limit on the bytes that are discarded after an error that closes a connection. The client may
/// have to write all of its request before it reads the error. Far more than any valid request.
const DISCARD_MAX: usize = 1 << 30;

/// Limit on the time in which a client sends nothing after such an error.
const DISCARD_IDLE_MAX: Duration = Duration::from_secs(5);

/// Serves one client until it disconnects, sends invalid JSON, or the server stops.
pub(crate) async fn serve(
    stream: Stream,
    registry: Rc<Registry>,
    mut modes: watch::Receiver<Mode>,
    idle: Rc<Idle>,
) {
    let hang_up = match HangUp::new(&stream) {
        Ok(hang_up) => hang_up,
        Err(error) => {
            tracing::warn!("closing an RPC connection: cannot watch it for hang-up: {error}");
            return;
        }
    };
    let link = Rc::new(Link::new());
    // Running requests learn of the end of this task however it ends, and their answers are
    // dropped.
    let _guard = GoneOnDrop(Rc::clone(&link));
    let mut connection =
        Connection { stream, hang_up, link, input: Input::new(), eof: false, registry };
    loop {
        let mode = *modes.borrow_and_update();
        let wants_read = match connection.step(mode, &idle) {
            Step::Again => {
                yield_now().await;
                continue;
            }
            Step::Wait { wants_read } => wants_read,
            Step::Refuse(error) => return connection.refuse(modes, error).await,
            Step::Close => return,
        };
        let Connection { stream, hang_up, link, .. } = &connection;
        if mode == Mode::Serving && link.is_idle() {
            idle.begin();
        } else if link.is_gone() {
            // Its client is gone, but the request that holds the connection may never end.
            idle.begin_expired();
        }
        tokio::select! {
            () = link.ready(stream, hang_up, wants_read) => {}
            () = link.load.changed.notified() => {}
            changed = modes.changed() => if changed.is_err() { return },
            () = idle.closed() => {
                tracing::info!("closing an idle RPC connection, because another client waits");
                return;
            }
        }
    }
}

/// The task's state of one connection.
struct Connection {
    stream: Stream,
    hang_up: HangUp,
    link: Rc<Link>,
    input: Input,
    /// The client has sent its last byte.
    eof: bool,
    registry: Rc<Registry>,
}

/// What the task does after an iteration.
enum Step {
    /// Yields to other tasks, and runs the next iteration.
    Again,
    /// Waits for an event: that the client can be read, if `wants_read`, or written, or another.
    Wait { wants_read: bool },
    /// Sends an error, and closes the connection.
    Refuse(RpcError),
    /// Closes the connection.
    Close,
}

impl Connection {
    /// One iteration: sends, or starts one request, or reads. Does not block.
    fn step(&mut self, mode: Mode, idle: &Idle) -> Step {
        let link = &self.link;
        match link.flush(&self.stream) {
            Ok(Flushed::Everything) => {}
            Ok(Flushed::Some) => return Step::Again,
            // Requests that the client sent before it disconnected still run.
            Err(_) => link.set_gone(),
        }
        if mode == Mode::Stopping || link.is_overfull() {
            return Step::Close;
        }
        let is_paused = link.load.is_paused();
        if mode == Mode::Serving && !is_paused && link.may_start() {
            return self.next_request(idle);
        }
        if link.is_gone() && !is_paused && !link.has_room() {
            // The maximum number of requests runs, and no client waits for their answers.
            return Step::Close;
        }
        Step::Wait { wants_read: false }
    }

    /// Starts the next request, or reads if the input holds no whole request.
    fn next_request(&mut self, idle: &Idle) -> Step {
        match self.input.next() {
            Next::Request(request) => {
                idle.end();
                start(request, &self.registry, &self.link);
                return Step::Again;
            }
            Next::Invalid => return Step::Refuse(RpcError::parse_error()),
            Next::TooLong => return Step::Refuse(too_long()),
            Next::Incomplete if self.eof && self.link.is_done() => return Step::Close,
            Next::Incomplete if self.eof => return Step::Wait { wants_read: false },
            Next::Incomplete => {}
        }
        match self.input.read(&mut self.stream) {
            Ok(count) => {
                idle.end();
                self.eof = count == 0;
                Step::Again
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Step::Wait { wants_read: true },
            Err(error) => {
                tracing::debug!("closing an RPC connection: cannot read from it: {error}");
                Step::Close
            }
        }
    }

    /// Closes the connection after input that cannot be parsed: the start of the next request is
    /// unknown. Sends earlier answers first, then the error.
    ///
    /// Discards what the client sends meanwhile and afterwards: a client that writes its whole
    /// request before it reads would otherwise never read the error, and closing a socket with
    /// unread bytes makes the client's read fail with ECONNRESET.
    async fn refuse(mut self, modes: watch::Receiver<Mode>, error: RpcError) {
        let link = &self.link;
        link.push(answer::encode_error(None, &error));
        link.close();
        let mut bytes = vec![0; READ_SIZE];
        let (mut discarded, mut shut_down, mut eof) = (0, false, false);
        loop {
            let Ok(flushed) = link.flush(&self.stream) else { return };
            if link.is_gone() || discarded > DISCARD_MAX {
                return;
            }
            if link.is_done_sending() && !std::mem::replace(&mut shut_down, true) {
                self.stream.shut_down_write();
            }
            if shut_down && eof {
                return;
            }
            let read = if eof {
                Err(ErrorKind::WouldBlock.into())
            } else {
                self.stream.try_read(&mut bytes)
            };
            match read {
                Ok(count) => {
                    eof = count == 0;
                    discarded += count;
                    yield_now().await;
                    continue;
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return,
                Err(_) if flushed == Flushed::Some => {
                    yield_now().await;
                    continue;
                }
                Err(_) => {}
            }
            tokio::select! {
                () = link.ready(&self.stream, &self.hang_up, !eof) => {}
                () = stopping(modes.clone()) => return,
                () = tokio::time::sleep(DISCARD_IDLE_MAX), if shut_down => return,
            }
        }
    }
}

fn too_long() -> RpcError {
    RpcError::new(
        RpcError::INVALID_REQUEST,
        format!("Request too long: the limit is {REQUEST_MAX} bytes"),
    )
}

/// Starts a request. If it does not finish at once, a new task continues it.
fn start(request: Request, registry: &Rc<Registry>, link: &Rc<Link>) {
    let running = Running::new(Rc::clone(link));
    let registry = Rc::clone(registry);
    run(async move {
        let client = running.0.client();
        let answer = match request {
            Request::Single(member) => answer_member(member, &registry, client).await,
            Request::Batch(members) => {
                answer_batch(members, &registry, client, Rc::clone(&running.0.load)).await
            }
        };
        if let Some(answer) = answer {
            running.0.push(answer);
        }
    });
}

/// Polls a future once, and spawns it if it is pending.
fn run(future: impl Future<Output = ()> + 'static) {
    let mut future: Pin<Box<dyn Future<Output = ()>>> = Box::pin(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    // Wake-ups from this poll are lost, but the new task polls again when it starts.
    if future.as_mut().poll(&mut context).is_pending() {
        spawn_local(future);
    }
}
