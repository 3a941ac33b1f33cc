//! Time slices for long work, so that one call does not block the thread that serves all clients.
//!
//! A call that builds or writes a long result counts its work and yields after [`SLICE_VALUES`].
//! Until it resumes, its connection starts no further request. So requests that only yield are
//! answered in the order in which they arrive.

use crate::client::Client;

/// JSON values that a call builds or writes in one slice: about a tenth of a millisecond.
pub const SLICE_VALUES: usize = 1000;

/// Counts the work of one call, or of another task, and yields after each slice.
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

    /// Counts the work of a task that no client waits for.
    pub fn local() -> Self {
        Self::new(Client::local())
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
