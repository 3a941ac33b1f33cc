//! Methods of SPDK's components that this program does not have.
//!
//! Every configuration that SPDK has saved sets options of such components, and monitoring tools
//! ask for their state at each refresh. So options are checked, kept, shown and saved again
//! (`setters`), and getters answer what an SPDK without such objects answers (`getters`). Methods
//! that create or change such objects are not registered, so that a script that needs them fails.

mod getters;
mod setters;

use rpc::{DecodeFailure, Params, RpcError};
use serde_json::{Map, Value};
use tracing::error;

use super::{Methods, SubsystemOptions, schema};

pub(super) use setters::Kept;

pub(super) fn register(methods: &mut Methods<'_>) {
    setters::register(methods);
    getters::register(methods);
}

/// Makes the call on these options; `None` if no method of this module has the name.
pub(super) fn call_on(
    options: &mut SubsystemOptions,
    params: &Params,
) -> Option<Result<(), RpcError>> {
    let set = || setters::call_on(options, params);
    getters::call(params).map(|answer| answer.map(drop)).or_else(set)
}

/// Decodes the parameters of a method, strictly, by its line in the table of methods.
///
/// # Errors
/// `failure`; the reason is in the log.
fn decode(params: &Params, failure: DecodeFailure) -> Result<Map<String, Value>, RpcError> {
    let given: Map<String, Value> = params.decode(failure)?;
    let method = schema::method(params.method()).expect("the method is in the table");
    match method.problem(&given) {
        None => Ok(given),
        Some(problem) => {
            error!("{}: invalid parameters: {problem}", params.method());
            Err(failure.error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_methods_are_in_the_table() {
        for name in setters::names().chain(getters::names()) {
            assert!(schema::method(name).is_some(), "{name}");
        }
    }
}
