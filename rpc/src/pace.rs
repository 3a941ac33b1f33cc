//! Long work in turns: what keeps one call from holding the thread that serves everybody.
//!
//! A call that builds or writes much counts what it does and gives way after each
//! [`TURN_VALUES`]. Its connection starts no further request until it goes on, as if the call
//! had not been interrupted: calls that need not wait are answered in the order in which they
//! came, long ones included.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

use crate::params::Client;

/// JSON values that are built or written in one turn: about a tenth of a millisecond.
pub const TURN_VALUES: usize = 1000;

/// What the requests of one connection are up to.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Calls that have given way and go on by themselves.
    paused: Cell<usize>,
    /// Bytes of answers that wait for the rest of their batch.
    held: Cell<usize>,
    /// An answer was added, or a request goes on, waits or has ended.
    pub(crate) changed: Notify,
}

impl Load {
    /// Whether a call has given way and goes on by itself.
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

/// Counts a call as paused, however it ends.
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

/// Counts the work of one call and gives way in between.
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
/// What a method borrows or counts on across `spend` may have changed after it.
#[derive(Debug)]
pub struct Pace {
    client: Client,
    left: usize,
}

impl Pace {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, left: TURN_VALUES }
    }

    /// `values` were built, or something else was done that takes as long. Gives way if the turn
    /// is over.
    pub async fn spend(&mut self, values: usize) {
        self.left = self.left.saturating_sub(values);
        if self.left == 0 {
            self.left = TURN_VALUES;
            self.client.give_way().await;
        }
    }
}
