//! What a method gets: its parameters, and whether its client is still there.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;

use serde::Deserialize;
use serde::de::DeserializeSeed;
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::decode::{Error, decode, decode_seed};
use crate::error::RpcError;
use crate::pace::{Load, Pace, Paused};
use crate::registry::{Phase, Registry};

/// One call's parameters and surroundings; a method takes it by value.
pub struct Params {
    pub(crate) method: &'static str,
    pub(crate) raw: Option<Box<RawValue>>,
    pub(crate) client: Client,
    pub(crate) phase: Phase,
    pub(crate) registry: Rc<Registry>,
}

impl Params {
    /// Reads the parameters strictly, as a struct of named fields.
    ///
    /// Unknown and repeated names, wrong types, `null` and missing required fields all fail,
    /// with what `failure` says for an answer and the reason in the log. An integer may be
    /// written `1e2` or `512.0`. No parameters at all are read as `{}`. `Option<T>` and
    /// `#[serde(default)]` fields may be left out; enums are matched by exact case. Types with
    /// `#[serde(flatten)]` lose the check for unknown names.
    pub fn decode<T: for<'de> Deserialize<'de>>(
        &self,
        failure: DecodeFailure,
    ) -> Result<T, RpcError> {
        self.refuse(failure, decode(self.json().unwrap_or("{}"), false))
    }

    /// Like [`decode`](Self::decode), but unknown names in the outermost object are ignored.
    pub fn decode_relaxed<T: for<'de> Deserialize<'de>>(
        &self,
        failure: DecodeFailure,
    ) -> Result<T, RpcError> {
        self.refuse(failure, decode(self.json().unwrap_or("{}"), true))
    }

    /// Like [`decode`](Self::decode), with a seed in place of a type: for callers that have the
    /// type only behind a trait object.
    pub fn decode_seed<S: for<'de> DeserializeSeed<'de, Value = ()>>(
        &self,
        seed: S,
        failure: DecodeFailure,
    ) -> Result<(), RpcError> {
        self.refuse(failure, decode_seed(seed, self.json().unwrap_or("{}"), false))
    }

    fn refuse<T>(&self, failure: DecodeFailure, read: Result<T, Error>) -> Result<T, RpcError> {
        read.map_err(|reason| {
            tracing::error!("{}: invalid parameters: {reason}", self.method);
            failure.error()
        })
    }

    /// Fails with code -32602 and `text` unless there are no parameters, or empty ones.
    ///
    /// SPDK refuses an empty object too, but some clients always send one.
    pub fn none(&self, text: &str) -> Result<(), RpcError> {
        let bare: String =
            self.json().unwrap_or_default().split(|c: char| c.is_ascii_whitespace()).collect();
        if matches!(bare.as_str(), "" | "{}" | "[]") {
            return Ok(());
        }
        Err(RpcError::invalid_params(text))
    }

    /// The parameters' JSON text, an object or an array; none if there are none.
    pub fn json(&self) -> Option<&str> {
        self.raw.as_deref().map(RawValue::get)
    }

    /// The method's name; for an alias, the name it stands for.
    pub fn method(&self) -> &'static str {
        self.method
    }

    /// The caller.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Counts the work of this call, for methods whose work grows with what they answer.
    pub fn pace(&self) -> Pace {
        Pace::new(self.client.clone())
    }

    /// The phase in which the call was made.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The registry the method was found in.
    pub fn registry(&self) -> &Rc<Registry> {
        &self.registry
    }
}

/// The other end of a call, which may go away before the answer is ready.
///
/// A method whose work nobody wants any more may stop:
///
/// ```
/// # use rpc::{Params, RpcError};
/// # use serde_json::Value;
/// # async fn drain() -> Result<Value, RpcError> { Ok(Value::Bool(true)) }
/// async fn delete(params: Params) -> Result<Value, RpcError> {
///     tokio::select! {
///         done = drain() => done,
///         () = params.client().gone() => Err(RpcError::errno(125)),
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Client {
    /// None if the call was made in process.
    gone: Option<watch::Receiver<bool>>,
    load: Rc<Load>,
    /// Whether this call has yielded.
    paused: Rc<Cell<bool>>,
}

impl Client {
    /// A caller inside the process, which never goes away.
    pub(crate) fn local() -> Self {
        Self { gone: None, load: Rc::default(), paused: Rc::default() }
    }

    pub(crate) fn remote(gone: watch::Receiver<bool>, load: &Rc<Load>) -> Self {
        Self { gone: Some(gone), load: Rc::clone(load), paused: Rc::default() }
    }

    /// The same client, for another call.
    pub(crate) fn for_member(&self) -> Self {
        Self { paused: Rc::default(), ..self.clone() }
    }

    /// Lets other tasks run. The client's next request waits meanwhile.
    pub(crate) async fn give_way(&self) {
        let _paused = Paused::new(&self.paused, &self.load);
        tokio::task::yield_now().await;
    }

    /// Whether this call has yielded and will resume by itself.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// True once the client closed its connection, or the server did. A client that only
    /// shut down its sending side is still there.
    pub fn is_gone(&self) -> bool {
        self.gone.as_ref().is_some_and(|gone| *gone.borrow() || gone.has_changed().is_err())
    }

    /// Waits until the client is gone; for ever if the call was made in process.
    pub async fn gone(&self) {
        match self.gone.clone() {
            // The sender is dropped only with its connection: gone as well.
            Some(mut gone) => drop(gone.wait_for(|gone| *gone).await),
            None => std::future::pending().await,
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("gone", &self.is_gone()).finish_non_exhaustive()
    }
}

/// What a method answers when its parameters cannot be read; SPDK's methods differ.
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

    /// Any other answer.
    pub const fn new(code: i64, message: &'static str) -> Self {
        Self { code, message }
    }

    /// The answer.
    pub fn error(self) -> RpcError {
        RpcError::new(self.code, self.message)
    }
}
