//! Long work in turns, so that one call does not block the thread that serves all clients.
//!
//! A call that builds or writes much counts its work and yields after every [`TURN_VALUES`]. Until
//! it resumes, its connection starts no further request, as if the call had not been interrupted:
//! calls that need not wait, long ones included, are answered in the order in which they came.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

use crate::params::Client;

/// JSON values that are built or written in one turn: about a tenth of a millisecond.
pub const TURN_VALUES: usize = 1000;

/// The state of one connection's running requests.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Calls that have yielded and will resume by themselves.
    paused: Cell<usize>,
    /// Bytes of answers that wait for the rest of their batch.
    held: Cell<usize>,
    /// An answer was added, or a request resumes, waits or has ended.
    pub(crate) changed: Notify,
}

impl Load {
    /// Whether a call has yielded and will resume by itself.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get() > 0
    }

    /// Bytes of answers that wait for the rest of their batch.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }

    pub(crate) fn hold(&self, bytes: usize) {
        self.held.update(|held| held + bytes);
    }

    pub(crate) fn let_go(&self, bytes: usize) {
        self.held.update(|held| held - bytes);
    }
}

/// Counts a call as paused until it resumes or is dropped.
pub(crate) struct Paused {
    own: Rc<Cell<bool>>,
    load: Rc<Load>,
}

impl Paused {
    pub(crate) fn new(own: &Rc<Cell<bool>>, load: &Rc<Load>) -> Self {
        own.set(true);
        load.paused.update(|count| count + 1);
        Self { own: Rc::clone(own), load: Rc::clone(load) }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.own.set(false);
        self.load.paused.update(|count| count - 1);
        self.load.changed.notify_one();
    }
}

/// Counts the work of one call, and yields in between.
///
/// ```
/// # use rpc::{Params, RpcError};
/// # use serde_json::Value;
/// async fn list(params: Params) -> Result<Value, RpcError> {
///     let mut pace = params.pace();
///     let mut list = vec![];
///     for number in 0..1_000_000 {
///         list.push(Value::from(number));
///         pace.spend(1).await;
///     }
///     Ok(list.into())
/// }
/// ```
///
/// State that a method borrows or relies on may have changed after `spend`.
#[derive(Debug)]
pub struct Pace {
    client: Client,
    left: usize,
}

impl Pace {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, left: TURN_VALUES }
    }

    /// Records that `values` were built, or that other work of the same duration was done. Yields
    /// if the turn is over.
    pub async fn spend(&mut self, values: usize) {
        self.left = self.left.saturating_sub(values);
        if self.left == 0 {
            self.left = TURN_VALUES;
            self.client.give_way().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_batch_lets_go_is_held_no_longer_and_what_others_hold_is() {
        let load = Load::default();
        load.hold(3000);
        load.hold(600);
        load.let_go(600);
        assert_eq!(load.held(), 3000);
        load.let_go(3000);
        assert_eq!(load.held(), 0);
    }
}
