//! A module's RPC methods: their names, parameters and results.
//!
//! This crate has no JSON-RPC server. The program that runs one passes each call's parameters as
//! [`Parameters`] and sends the method's result.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};
use tracing::error;
use uuid::Uuid;

use crate::control::host::Host;
use crate::error::Error;

/// A future that runs on the control thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The result of a method.
pub type Answer = Result<Value, MethodError>;

type Handler = Rc<dyn Fn(Rc<dyn Host>, Params) -> LocalFuture<'static, Answer>>;

type Check = Rc<dyn Fn(&Params) -> Result<(), MethodError>>;

/// An RPC method of a module. It may be called after the program's start, not during it.
#[derive(Clone)]
pub struct Method {
    /// Its name in the RPC.
    pub name: &'static str,
    check: Option<Check>,
    handler: Handler,
}

impl Method {
    /// Makes a method that `handler` implements. Apart from their types, whether the parameters are
    /// valid depends on the state of the program, such as which bdevs exist.
    pub fn new<F, R>(name: &'static str, handler: F) -> Self
    where
        F: Fn(Rc<dyn Host>, Params) -> R + 'static,
        R: Future<Output = Answer> + 'static,
    {
        Self {
            name,
            check: None,
            handler: Rc::new(move |host, params| Box::pin(handler(host, params))),
        }
    }

    /// Makes a method in two steps. `parse` decodes the parameters, and refuses those that are
    /// invalid in any state of the program. It logs the reason, and has no other effect. `handler`
    /// gets its result.
    pub fn parsed<T, P, F, R>(name: &'static str, parse: P, handler: F) -> Self
    where
        T: 'static,
        P: Fn(&Params) -> Result<T, MethodError> + 'static,
        F: Fn(Rc<dyn Host>, Params, T) -> R + 'static,
        R: Future<Output = Answer> + 'static,
    {
        let parse = Rc::new(parse);
        let check = Rc::clone(&parse);
        Self {
            name,
            check: Some(Rc::new(move |params| check(params).map(drop))),
            handler: Rc::new(move |host, params| match parse(&params) {
                Ok(parsed) => Box::pin(handler(host, params, parsed)),
                Err(e) => Box::pin(std::future::ready(Err(e))),
            }),
        }
    }

    /// Checks parameters as [`Method::call`] does before it looks at the state of the program.
    /// Returns the error of the call; the reason is in the log. `None` if the method is not a
    /// [`parsed`](Method::parsed) one.
    #[must_use]
    pub fn check(&self, params: &Params) -> Option<Result<(), MethodError>> {
        self.check.as_ref().map(|check| check(params))
    }

    /// Calls it.
    pub fn call(&self, host: Rc<dyn Host>, params: Params) -> LocalFuture<'static, Answer> {
        (self.handler)(host, params)
    }
}

/// A call with its parameters, as `save_config` writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The method's name.
    pub method: &'static str,
    /// Its parameters.
    pub params: Map<String, Value>,
}

impl Call {
    /// Makes a call with a JSON object of parameters; any other value counts as no parameters.
    #[must_use]
    pub fn new(method: &'static str, params: Value) -> Self {
        let params = match params {
            Value::Object(params) => params,
            _ => Map::new(),
        };
        Self { method, params }
    }
}

/// Reads one value from a deserializer.
pub type Reader<'a> =
    dyn FnMut(&mut dyn erased_serde::Deserializer<'_>) -> Result<(), erased_serde::Error> + 'a;

/// The parameters of one call, as the program holds them.
pub trait Parameters {
    /// The method's name.
    fn method(&self) -> &'static str;

    /// Calls `read` with the parameters, once.
    ///
    /// The deserializer is as strict as SPDK's decoder: an object that becomes a struct may hold no
    /// unknown and no repeated name, and `null` is invalid. It accepts integers in any notation,
    /// such as `1e2`.
    ///
    /// # Errors
    /// Returns `failure` if `read` fails. The implementer logs the reason.
    fn read(&self, failure: DecodeFailure, read: &mut Reader<'_>) -> Result<(), MethodError>;

    /// Lets the client's next call start before this one ends.
    fn let_next_start(&self);
}

/// The parameters of one call.
pub struct Params(Box<dyn Parameters>);

impl Params {
    /// Wraps the program's parameters.
    pub fn new(parameters: impl Parameters + 'static) -> Self {
        Self(Box::new(parameters))
    }

    /// The method's name.
    #[must_use]
    pub fn method(&self) -> &'static str {
        self.0.method()
    }

    /// Lets the client's next call start before this one ends. The calls of one client run one after
    /// the other; a method calls this before it waits for something that other calls need not wait
    /// for, such as the I/O of a deleted bdev.
    pub fn let_next_start(&self) {
        self.0.let_next_start();
    }

    /// Decodes them strictly into a struct of named fields: see [`Parameters::read`].
    ///
    /// # Errors
    /// Returns `failure`; the reason is in the log.
    pub fn decode<T: DeserializeOwned>(&self, failure: DecodeFailure) -> Result<T, MethodError> {
        let mut value = None;
        self.0.read(failure, &mut |deserializer| {
            value = Some(erased_serde::deserialize(deserializer)?);
            Ok(())
        })?;
        value.ok_or_else(|| failure.error())
    }

    /// Returns the parameters as they were given, for `save_config`. Integers are written without a
    /// fraction in any case.
    #[must_use]
    pub fn as_given(&self) -> Map<String, Value> {
        self.decode(DecodeFailure::INTERNAL).unwrap_or_default()
    }

    /// Returns the same, with the bdev's actual name and UUID.
    #[must_use]
    pub fn as_named(&self, name: &str, uuid: Uuid) -> Map<String, Value> {
        let mut params = self.as_given();
        params.insert("name".into(), name.into());
        params.insert("uuid".into(), uuid.to_string().into());
        params
    }
}

/// The error of a method whose parameters cannot be decoded. SPDK's methods differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeFailure {
    /// The JSON-RPC code.
    pub code: i64,
    /// The text.
    pub text: &'static str,
}

impl DecodeFailure {
    /// -32603 "spdk_json_decode_object failed": most bdev methods.
    pub const INTERNAL: Self =
        Self { code: MethodError::INTERNAL, text: "spdk_json_decode_object failed" };
    /// -32602 "spdk_json_decode_object failed": the error bdev's methods.
    pub const PARAMS: Self =
        Self { code: MethodError::INVALID_PARAMS, text: "spdk_json_decode_object failed" };
    /// -32602 "Invalid parameters": the split bdev's methods.
    pub const INVALID_PARAMETERS: Self =
        Self { code: MethodError::INVALID_PARAMS, text: "Invalid parameters" };

    fn error(self) -> MethodError {
        MethodError { code: self.code, text: self.text.to_owned() }
    }
}

/// The error of a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodError {
    /// A JSON-RPC code or a negative errno.
    pub code: i64,
    /// The text.
    pub text: String,
}

impl MethodError {
    const INVALID_PARAMS: i64 = -32602;
    const INTERNAL: i64 = -32603;

    /// Makes an error with code `-errno` and glibc's text; `errno` is positive.
    #[must_use]
    pub fn errno(errno: i32) -> Self {
        Self { code: -i64::from(errno), text: strerror(errno) }
    }

    /// Makes an error with code -32602.
    #[must_use]
    pub fn invalid_params(text: impl Into<String>) -> Self {
        Self { code: Self::INVALID_PARAMS, text: text.into() }
    }

    /// Makes an error with code -32603.
    #[must_use]
    pub fn internal(text: impl Into<String>) -> Self {
        Self { code: Self::INTERNAL, text: text.into() }
    }

    /// Logs the reason of a failed bdev operation, and returns its errno as an error.
    #[must_use]
    pub fn of(method: &str, e: &Error) -> Self {
        error!("{method}: {e}");
        Self::errno(e.errno())
    }
}

/// Returns glibc's text for a positive errno: "File exists" for 17.
#[must_use]
pub fn strerror(errno: i32) -> String {
    let mut text = std::io::Error::from_raw_os_error(errno).to_string();
    // std appends the number to the text from strerror_r.
    let suffix = format!(" (os error {errno})");
    if text.ends_with(&suffix) {
        text.truncate(text.len() - suffix.len());
    }
    text
}

/// The parameters of a method that takes only a name.
#[derive(Deserialize)]
pub struct Named {
    /// The name.
    pub name: String,
}

/// A UUID in the form with hyphens. The null UUID counts as absent.
#[derive(Clone, Copy, Debug)]
pub struct GivenUuid(Option<Uuid>);

impl<'de> Deserialize<'de> for GivenUuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const HYPHENATED: usize = 36;
        let text = String::deserialize(deserializer)?;
        let uuid = Uuid::try_parse(&text).ok().filter(|_| text.len() == HYPHENATED);
        let uuid = uuid.ok_or_else(|| de::Error::custom("expected a UUID with hyphens"))?;
        Ok(Self((!uuid.is_nil()).then_some(uuid)))
    }
}

/// Returns the UUID of an optional parameter.
#[must_use]
pub fn given(uuid: Option<GivenUuid>) -> Option<Uuid> {
    uuid.and_then(|uuid| uuid.0)
}
