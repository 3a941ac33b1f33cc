//! One client: its bytes in, its requests, its bytes out.
//!
//! One task owns the socket. A turn of its loop sends what is ready, starts at most one
//! request, and reads if there is no whole request left; otherwise it waits. Sending comes
//! first so that a client gets an answer before its next request is looked at. Each turn is
//! bounded, and every other task of the thread gets a turn before the next, so a client that sends
//! or requests much does not delay others.
//!
//! A request is polled once where it is found, so requests start in order and those that
//! need not wait are answered in order; one that has to wait becomes a task of its own,
//! which outlives the connection.

use std::future::Future;
use std::io::ErrorKind;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::{spawn_local, yield_now};

use crate::answer::{self, Pieces};
use crate::batch::answer_batch;
use crate::error::RpcError;
use crate::hang_up::HangUp;
use crate::idle::Idle;
use crate::input::{Input, Next, READ_SIZE, REQUEST_MAX};
use crate::link::{EndOfLink, Link, Running};
use crate::params::Client;
use crate::registry::Registry;
use crate::request::{Member, Request};
use crate::server::{Mode, stopping};
use crate::stream::Stream;

/// Bytes that are discarded after an error that ends a connection, so that the client can finish
/// writing and read the error. Far more than any valid request.
const THROWN_AWAY_MAX: usize = 1 << 30;

/// How long a client may send nothing after such an error before its connection is closed.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Serves one client until it is gone, errs, or the server stops.
pub(crate) async fn serve(
    mut stream: Stream,
    registry: Rc<Registry>,
    mut modes: watch::Receiver<Mode>,
    idle: Rc<Idle>,
) {
    let link = Rc::new(Link::new());
    // Whatever ends this task, running requests are told and their answers thrown away.
    let _end = EndOfLink(Rc::clone(&link));
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
        match link.flush(&stream) {
            Ok(false) => {}
            Ok(true) => {
                yield_now().await;
                continue;
            }
            // What the client sent before it left is still run.
            Err(_) => link.set_gone(),
        }
        if mode == Mode::Stopping || link.is_overfull() {
            return;
        }
        let mut wants_read = false;
        if mode == Mode::Serving && !link.load.is_paused() && link.may_start() {
            match input.next() {
                Next::Request(request) => {
                    idle.end();
                    start(request, &registry, &link);
                    yield_now().await;
                    continue;
                }
                Next::Invalid => {
                    return refuse(stream, &hang_up, &link, modes, RpcError::parse_error()).await;
                }
                Next::TooLong => return refuse(stream, &hang_up, &link, modes, too_long()).await,
                Next::Incomplete if eof && link.is_done() => return,
                Next::Incomplete if eof => {}
                Next::Incomplete => match input.read(&mut stream) {
                    Ok(count) => {
                        idle.end();
                        eof = count == 0;
                        yield_now().await;
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => wants_read = true,
                    Err(error) => {
                        tracing::debug!("RPC connection closed: {error}");
                        return;
                    }
                },
            }
        } else if link.is_gone() && !link.load.is_paused() && !link.may_start() {
            // Nobody waits for the answers, and the client has its share of running requests.
            return;
        }
        if mode == Mode::Serving && link.is_idle() {
            idle.begin();
        }
        tokio::select! {
            () = link.ready(&stream, &hang_up, wants_read) => {}
            () = link.load.changed.notified() => {}
            changed = modes.changed() => if changed.is_err() { return },
            () = idle.closed() => {
                tracing::info!("closing an idle RPC connection, as another client is waiting");
                return;
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

/// Ends a connection after input that cannot be parsed: the start of the next request is unknown.
/// Earlier answers are sent first, then the error.
///
/// Meanwhile and afterwards the client's bytes are discarded: a client that writes its whole
/// request before it reads would never read the error, and closing a socket with unread bytes would
/// give the client ECONNRESET instead of end of file.
async fn refuse(
    mut stream: Stream,
    hang_up: &HangUp,
    link: &Link,
    modes: watch::Receiver<Mode>,
    error: RpcError,
) {
    link.push(answer::encode_error(None, &error));
    link.close();
    let mut bytes = vec![0; READ_SIZE];
    let (mut thrown_away, mut shut_down, mut eof) = (0, false, false);
    loop {
        let Ok(more) = link.flush(&stream) else { return };
        if link.is_gone() || thrown_away > THROWN_AWAY_MAX {
            return;
        }
        if link.is_done_sending() && !std::mem::replace(&mut shut_down, true) {
            stream.shut_down_write();
        }
        if shut_down && eof {
            return;
        }
        let read =
            if eof { Err(ErrorKind::WouldBlock.into()) } else { stream.try_read(&mut bytes) };
        match read {
            Ok(count) => {
                eof = count == 0;
                thrown_away += count;
                yield_now().await;
                continue;
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return,
            Err(_) if more => {
                yield_now().await;
                continue;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = link.ready(&stream, hang_up, !eof) => {}
            () = stopping(modes.clone()) => return,
            () = tokio::time::sleep(SILENCE_MAX), if shut_down => return,
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
            Request::Batch(members) => {
                answer_batch(members, &registry, client, Rc::clone(&running.0.load)).await
            }
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
pub(crate) async fn answer_member(
    member: Member,
    registry: &Rc<Registry>,
    client: Client,
) -> Option<Pieces> {
    let Member { id, call } = member;
    let outcome: Result<Value, RpcError> = match call {
        None => Err(RpcError::invalid_request()),
        Some(call) => {
            let phase = registry.phase();
            registry.dispatch(&call.method, call.params, client.clone(), phase).await
        }
    };
    let is_silent = id.is_none() && outcome.is_ok();
    // Encoded even if nobody reads it: encoding frees a long result in turns.
    let answer = answer::encode(id.as_ref(), outcome, &client).await;
    (!is_silent).then_some(answer)
}
