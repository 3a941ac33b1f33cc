//! The arguments of a method: its parameters, and its client.

use serde::Deserialize;
use serde::de::DeserializeSeed;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::client::Client;
use crate::decode::{Error, UnknownNames, decode, decode_seed};
use crate::error::RpcError;
use crate::pace::Pace;
use crate::phase::Phase;

/// The parameters and the context of one call. A method takes it by value.
pub struct Params {
    pub(crate) method: &'static str,
    pub(crate) raw: Option<Box<RawValue>>,
    pub(crate) client: Client,
    pub(crate) phase: Phase,
}

impl Params {
    /// The parameters of a call from within the process, whose method is called by the caller.
    ///
    /// # Errors
    /// They are neither an object nor an array. Null and `None` mean no parameters.
    pub fn local(method: &'static str, params: Option<Value>) -> Result<Self, RpcError> {
        let (raw, client) = (raw(params)?, Client::local());
        Ok(Self { method, raw, client, phase: Phase::Startup })
    }

    /// Decodes the parameters strictly, as a struct of named fields.
    ///
    /// Unknown and repeated names, wrong types, `null` and missing required fields are errors. The
    /// answer is `failure`, and the reason goes to the log. An integer may be written `1e2` or
    /// `512.0`. A call without parameters decodes as `{}`. `Option<T>` and `#[serde(default)]`
    /// fields may be missing. Enums must match in case. Unknown names are not checked in types with
    /// `#[serde(flatten)]`.
    pub fn decode<T: for<'de> Deserialize<'de>>(
        &self,
        failure: DecodeFailure,
    ) -> Result<T, RpcError> {
        self.refuse(failure, decode(self.json().unwrap_or("{}"), UnknownNames::Refused))
    }

    /// Like [`decode`](Self::decode), but ignores unknown names in the outermost object.
    pub fn decode_relaxed<T: for<'de> Deserialize<'de>>(
        &self,
        failure: DecodeFailure,
    ) -> Result<T, RpcError> {
        self.refuse(failure, decode(self.json().unwrap_or("{}"), UnknownNames::Ignored))
    }

    /// Like [`decode`](Self::decode), with a seed in place of a type: for callers that have the
    /// type only behind a trait object.
    pub fn decode_seed<S: for<'de> DeserializeSeed<'de, Value = ()>>(
        &self,
        seed: S,
        failure: DecodeFailure,
    ) -> Result<(), RpcError> {
        self.refuse(failure, decode_seed(seed, self.json().unwrap_or("{}"), UnknownNames::Refused))
    }

    fn refuse<T>(&self, failure: DecodeFailure, read: Result<T, Error>) -> Result<T, RpcError> {
        read.map_err(|reason| {
            tracing::error!("{}: invalid parameters: {reason}", self.method);
            failure.error()
        })
    }

    /// Fails with code -32602 and `text` unless the parameters are missing or empty.
    ///
    /// SPDK also refuses an empty object, but some clients always send one.
    pub fn none(&self, text: &str) -> Result<(), RpcError> {
        let bare: String =
            self.json().unwrap_or_default().split(|c: char| c.is_ascii_whitespace()).collect();
        if matches!(bare.as_str(), "" | "{}" | "[]") {
            return Ok(());
        }
        Err(RpcError::invalid_params(text))
    }

    /// The parameters as JSON text, an object or an array. `None` if the call has none.
    pub fn json(&self) -> Option<&str> {
        self.raw.as_deref().map(RawValue::get)
    }

    /// The method's name. For an alias, the name of the aliased method.
    pub fn method(&self) -> &'static str {
        self.method
    }

    /// The caller.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Lets the client's next request start: see [`Client::let_next_start`].
    pub fn let_next_start(&self) {
        self.client.let_next_start();
    }

    /// Counts the work of this call, for a method whose work grows with its answer.
    pub fn pace(&self) -> Pace {
        Pace::new(self.client.clone())
    }

    /// The phase in which the call was made.
    pub fn phase(&self) -> Phase {
        self.phase
    }
}

/// The text of parameters that were not received from a client.
pub(crate) fn raw(params: Option<Value>) -> Result<Option<Box<RawValue>>, RpcError> {
    match params {
        None | Some(Value::Null) => Ok(None),
        Some(params @ (Value::Object(_) | Value::Array(_))) => {
            let raw = serde_json::value::to_raw_value(&params);
            raw.map(Some).map_err(|error| RpcError::internal(error.to_string()))
        }
        Some(_) => Err(RpcError::invalid_request()),
    }
}

/// The answer to a call whose parameters cannot be decoded. It differs between SPDK's methods.
#[derive(Clone, Copy, Debug)]
pub struct DecodeFailure {
    code: i64,
    message: &'static str,
}

impl DecodeFailure {
    /// -32603 "spdk_json_decode_object failed": most bdev and log methods.
    pub const INTERNAL: Self = Self::new(RpcError::INTERNAL, "spdk_json_decode_object failed");
    /// -32602 "spdk_json_decode_object failed".
    pub const PARAMS: Self = Self::new(RpcError::INVALID_PARAMS, "spdk_json_decode_object failed");
    /// -32700 "spdk_json_decode_object failed": the raid methods.
    pub const PARSE: Self = Self::new(RpcError::PARSE_ERROR, "spdk_json_decode_object failed");
    /// -32602 "Invalid parameters".
    pub const INVALID_PARAMETERS: Self = Self::new(RpcError::INVALID_PARAMS, "Invalid parameters");
    /// -32602 "Invalid argument": the vhost methods that change something.
    pub const INVALID_ARGUMENT: Self = Self::new(RpcError::INVALID_PARAMS, "Invalid argument");
    /// -32602 "Invalid arguments".
    pub const INVALID_ARGUMENTS: Self = Self::new(RpcError::INVALID_PARAMS, "Invalid arguments");
    /// -32603 "Invalid argument": vhost_get_controllers.
    pub const INTERNAL_ARGUMENT: Self = Self::new(RpcError::INTERNAL, "Invalid argument");
    /// -22 "Invalid argument": virtio_blk_create_transport.
    pub const EINVAL: Self = Self::new(-22, "Invalid argument");

    /// Another answer.
    pub const fn new(code: i64, message: &'static str) -> Self {
        Self { code, message }
    }

    /// The answer as an error.
    pub fn error(self) -> RpcError {
        RpcError::new(self.code, self.message)
    }
}
