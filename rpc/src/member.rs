//! Runs one request, or one member of a batch.

use std::rc::Rc;

use serde_json::Value;

use crate::answer::{self, Pieces};
use crate::client::Client;
use crate::error::RpcError;
use crate::registry::Registry;
use crate::request::Member;

/// Runs one member. Returns no answer for a notification that succeeded.
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
    // Encoded even if it is not sent: encoding frees a long result piece by piece.
    let answer = answer::encode(id.as_ref(), outcome, &client).await;
    (!is_silent).then_some(answer)
}
