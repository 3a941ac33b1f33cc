//! Runs a batch request: one member after the other, and yields to other clients between them.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Poll;

use tokio::task::{JoinError, JoinSet};

use crate::answer::{self, ANSWER_MAX, Pieces, too_long};
use crate::client::Client;
use crate::error::RpcError;
use crate::link::OUTSTANDING_MAX;
use crate::load::Load;
use crate::member::answer_member;
use crate::registry::Registry;
use crate::request::{Id, Member};

/// Runs a batch's members. Each starts when the one before it has ended or lets it start, and all
/// start before the next request of their client. Other tasks of the thread run between two members.
/// The answers are in the order in which the members finish. A batch of notifications that succeed
/// has no answer.
///
/// When the answers exceed [`ANSWER_MAX`], further members do not run, and each gets an error.
pub(crate) async fn answer_batch(
    members: Vec<Member>,
    registry: &Rc<Registry>,
    client: Client,
    load: Rc<Load>,
) -> Option<Pieces> {
    let mut answers = Answers { text: Pieces::default(), is_full: false, buffered: 0, load };
    let mut running: JoinSet<Ended> = JoinSet::new();
    for member in members {
        while running.len() >= OUTSTANDING_MAX {
            answers.join(running.join_next().await);
        }
        if answers.is_full {
            answers.add(answer::encode_error(member.id.as_ref(), &not_run()));
            continue;
        }
        let (registry, (client_of_member, is_held)) = (Rc::clone(registry), client.for_member());
        let paused = client_of_member.clone();
        let id = member.id.clone();
        let mut future =
            Box::pin(async move { answer_member(member, &registry, client_of_member).await });
        // A member that only yields, after it has let the next one start, runs to its end here, so
        // that few members hold part of an answer at a time.
        let first = poll_fn(|context| {
            // A member that panics is not polled again, and what it has left behind is its own.
            match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
                Ok(Poll::Pending) if is_held.get() || paused.is_paused() => Poll::Pending,
                polled => Poll::Ready(polled),
            }
        });
        match first.await {
            Ok(Poll::Ready(Some(answer))) => answers.add_or_refuse(id.as_ref(), answer),
            Ok(Poll::Ready(None)) => {}
            Ok(Poll::Pending) => drop(running.spawn_local(async move { (id, future.await) })),
            Err(_) => answers.add(answer::encode_error(id.as_ref(), &panicked())),
        }
        client.yield_now().await;
    }
    client.let_next_start();
    while !running.is_empty() {
        answers.join(running.join_next().await);
    }
    answers.finish()
}

/// A member that has waited: its id and its answer.
type Ended = (Option<Id>, Option<Pieces>);

fn not_run() -> RpcError {
    RpcError::internal("Not run: the answers to this batch are too long")
}

fn panicked() -> RpcError {
    RpcError::internal("Internal error")
}

/// The answers to a batch that have arrived.
struct Answers {
    text: Pieces,
    /// An answer did not fit.
    is_full: bool,
    /// Bytes that are counted in `load`.
    buffered: usize,
    load: Rc<Load>,
}

impl Answers {
    /// Adds the answer of a member that has waited.
    fn join(&mut self, ended: Option<Result<Ended, JoinError>>) {
        match ended {
            Some(Ok((id, Some(answer)))) => self.add_or_refuse(id.as_ref(), answer),
            Some(Err(_)) => {
                self.add(answer::encode_error(None, &panicked()));
            }
            Some(Ok((_, None))) | None => {}
        }
    }

    fn add_or_refuse(&mut self, id: Option<&Id>, answer: Pieces) {
        if self.text.len() + answer.len() <= ANSWER_MAX {
            self.add(answer);
        } else {
            self.is_full = true;
            // The length of these errors is bounded by the request's length, which includes the
            // ids.
            self.add(answer::encode_error(id, &too_long()));
        }
    }

    fn add(&mut self, answer: Pieces) {
        self.buffered += answer.len();
        self.load.add_buffered(answer.len());
        self.text.push(if self.text.is_empty() { b"[" } else { b"," });
        self.text.append(answer);
    }

    fn finish(mut self) -> Option<Pieces> {
        if self.text.is_empty() {
            return None;
        }
        self.text.push(b"]");
        Some(std::mem::take(&mut self.text))
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.load.remove_buffered(self.buffered);
    }
}
