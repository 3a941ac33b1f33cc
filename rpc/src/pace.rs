//! Time slices for long work, so that one call does not block the thread that serves all clients.
//!
//! A call that builds or writes a long result counts its work and yields after [`SLICE_VALUES`].
//! Until it resumes, its connection starts no further request. So requests that only yield are
//! answered in the order in which they arrive.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

use crate::params::Client;

/// JSON values that a call builds or writes in one slice: about a tenth of a millisecond.
pub const SLICE_VALUES: usize = 1000;

/// The state of one connection's running requests.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Calls that have yielded and resume without an event.
    paused: Cell<usize>,
    /// Bytes of answers in unfinished batches.
    buffered: Cell<usize>,
    /// Notified when an answer is queued, and when a request resumes or ends.
    pub(crate) changed: Notify,
}

impl Load {
    /// Whether a call has yielded and resumes without an event.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get() > 0
    }

    /// Bytes of answers in unfinished batches.
    pub(crate) fn buffered(&self) -> usize {
        self.buffered.get()
    }

    pub(crate) fn add_buffered(&self, bytes: usize) {
        self.buffered.update(|buffered| buffered + bytes);
    }

    pub(crate) fn remove_buffered(&self, bytes: usize) {
        self.buffered.update(|buffered| buffered - bytes);
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

/// Counts the work of one call, and yields after each slice.
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
/// Other tasks may change state that the method relies on during `spend`.
#[derive(Debug)]
pub struct Pace {
    client: Client,
    left: usize,
}

impl Pace {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, left: SLICE_VALUES }
    }

    /// Counts `values` that were built, or other work of the same duration. Yields if the slice has
    /// ended.
    pub async fn spend(&mut self, values: usize) {
        self.left = self.left.saturating_sub(values);
        if self.left == 0 {
            self.left = SLICE_VALUES;
            self.client.yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_unfinished_batches_add_up() {
        let load = Load::default();
        load.add_buffered(3000);
        load.add_buffered(600);
        load.remove_buffered(600);
        assert_eq!(load.buffered(), 3000);
        load.remove_buffered(3000);
        assert_eq!(load.buffered(), 0);
    }
}
