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

use super::Methods;

pub(crate) use setters::refuses;

pub(super) use setters::Kept;

pub(super) fn register(methods: &mut Methods<'_>) {
    setters::register(methods);
    getters::register(methods);
}

/// The type of a parameter, as in SPDK's schema.
#[derive(Clone, Copy, Debug)]
enum Type {
    Bool,
    /// An unsigned integer that is not larger than this.
    Unsigned(u64),
    /// A signed integer of 32 bits.
    Signed,
    Text,
    /// One of these strings.
    OneOf(&'static [&'static str]),
    /// An array with elements of this type.
    Array(&'static Type),
    /// An object with these members, all optional.
    Object(&'static [Parameter]),
}

impl Type {
    const U8: Self = Self::Unsigned(u8::MAX as u64);
    const U16: Self = Self::Unsigned(u16::MAX as u64);
    const U32: Self = Self::Unsigned(u32::MAX as u64);
    const U64: Self = Self::Unsigned(u64::MAX);

    fn accepts(self, value: &Value) -> bool {
        match self {
            Self::Bool => value.is_boolean(),
            Self::Unsigned(max) => value.as_u64().is_some_and(|number| number <= max),
            Self::Signed => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
            Self::Text => value.is_string(),
            Self::OneOf(names) => value.as_str().is_some_and(|text| names.contains(&text)),
            Self::Array(of) => {
                value.as_array().is_some_and(|all| all.iter().all(|value| of.accepts(value)))
            }
            Self::Object(members) => {
                value.as_object().is_some_and(|object| wrong(members, object).is_none())
            }
        }
    }
}

/// A parameter of a method.
#[derive(Clone, Copy, Debug)]
struct Parameter {
    name: &'static str,
    of: Type,
    required: bool,
}

const fn required(name: &'static str, of: Type) -> Parameter {
    Parameter { name, of, required: true }
}

const fn optional(name: &'static str, of: Type) -> Parameter {
    Parameter { name, of, required: false }
}

/// The first parameter that is missing, unknown or of a wrong type.
fn wrong(parameters: &[Parameter], given: &Map<String, Value>) -> Option<String> {
    let missing = parameters.iter().find(|p| p.required && !given.contains_key(p.name));
    let bad = given.iter().find(|(name, value)| {
        parameters.iter().find(|p| p.name == *name).is_none_or(|p| !p.of.accepts(value))
    });
    missing.map(|p| p.name.to_owned()).or_else(|| bad.map(|(name, _)| name.clone()))
}

/// Decodes the parameters of a method, strictly.
///
/// # Errors
/// `failure`; the reason is in the log.
fn decode(
    params: &Params,
    parameters: &[Parameter],
    failure: DecodeFailure,
) -> Result<Map<String, Value>, RpcError> {
    let given: Map<String, Value> = params.decode(failure)?;
    match wrong(parameters, &given) {
        None => Ok(given),
        Some(name) => {
            error!("{}: invalid parameters: {name:?}", params.method());
            Err(failure.error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_are_checked_to_their_limits() {
        const OBJECT: Type = Type::Object(&[optional("a", Type::Bool)]);
        let cases = [
            (Type::Bool, json!(true), json!(1)),
            (Type::U8, json!(255), json!(256)),
            (Type::U16, json!(65535), json!(-1)),
            (Type::U32, json!(u32::MAX), json!(1_u64 << 32)),
            (Type::U64, json!(u64::MAX), json!("1")),
            (Type::Signed, json!(i32::MIN), json!(i64::from(i32::MIN) - 1)),
            (Type::Text, json!(""), json!(["a"])),
            (Type::OneOf(&["a", "b"]), json!("b"), json!("B")),
            (Type::Array(&Type::U8), json!([1, 2]), json!([1, 256])),
            (OBJECT, json!({"a": false}), json!({"b": false})),
        ];
        for (of, good, bad) in cases {
            assert!(of.accepts(&good), "{of:?} {good}");
            assert!(!of.accepts(&bad), "{of:?} {bad}");
            assert!(!of.accepts(&Value::Null), "{of:?}");
        }
    }

    #[test]
    fn missing_and_unknown_parameters_are_found() {
        let parameters = [required("a", Type::Bool), optional("b", Type::U8)];
        let wrong = |given: Value| wrong(&parameters, given.as_object().unwrap());
        assert_eq!(wrong(json!({"a": true})), None);
        assert_eq!(wrong(json!({"a": true, "b": 1})), None);
        assert_eq!(wrong(json!({"b": 1})).as_deref(), Some("a"));
        assert_eq!(wrong(json!({"a": true, "c": 1})).as_deref(), Some("c"));
        assert_eq!(wrong(json!({"a": true, "b": "1"})).as_deref(), Some("b"));
    }
}
