//! The methods by name, and the phases in which they may be called.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::rc::Rc;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::client::Client;
use crate::error::RpcError;
use crate::params::{DecodeFailure, Params, raw};
use crate::phase::{Phase, Phases};

type Answer = Pin<Box<dyn Future<Output = Result<Value, RpcError>>>>;

/// It gets the registry for `rpc_get_methods`.
type Handler = dyn Fn(&Registry, Params) -> Answer;

struct Entry {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    Method {
        phases: Phases,
        handler: Box<Handler>,
        calls: Calls,
    },
    /// A deprecated name of the method at this index.
    Alias {
        of: usize,
        warned: Cell<bool>,
    },
}

/// How often a method was called.
#[derive(Default)]
struct Calls {
    all: Cell<u64>,
    failed: Cell<u64>,
}

/// All methods of one server.
pub struct Registry {
    /// In the order of their registration.
    entries: Vec<Entry>,
    index: HashMap<&'static str, usize>,
    /// Names that may be called. `None` allows all.
    allowed: Option<HashSet<String>>,
    phase: Cell<Phase>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry in [`Phase::Startup`] with one method, `rpc_get_methods`.
    pub fn new() -> Self {
        let mut registry = Self {
            entries: Vec::new(),
            index: HashMap::new(),
            allowed: None,
            phase: Cell::new(Phase::Startup),
        };
        let handler = Box::new(|registry: &Registry, params| {
            Box::pin(std::future::ready(rpc_get_methods(registry, &params))) as Answer
        });
        registry.add(
            "rpc_get_methods",
            Kind::Method { phases: Phases::Both, handler, calls: Calls::default() },
        );
        registry
    }

    /// Adds a method. Its future runs on the server's thread and must not block.
    ///
    /// # Panics
    /// The name is already registered.
    pub fn register<F, R>(&mut self, name: &'static str, phases: Phases, handler: F)
    where
        F: Fn(Params) -> R + 'static,
        R: Future<Output = Result<Value, RpcError>> + 'static,
    {
        let handler = Box::new(move |_: &Registry, params| Box::pin(handler(params)) as Answer);
        self.add(name, Kind::Method { phases, handler, calls: Calls::default() });
    }

    /// Adds a deprecated name of a method. Its first use is logged.
    ///
    /// # Panics
    /// The name is already registered, or `of` is not a registered method.
    pub fn alias(&mut self, name: &'static str, of: &str) {
        let of = *self.index.get(of).expect("an alias names a registered method");
        assert!(matches!(self.entries[of].kind, Kind::Method { .. }), "an alias of an alias");
        self.add(name, Kind::Alias { of, warned: Cell::new(false) });
    }

    fn add(&mut self, name: &'static str, kind: Kind) {
        let before = self.index.insert(name, self.entries.len());
        assert!(before.is_none(), "method {name} is registered twice");
        self.entries.push(Entry { name, kind });
    }

    /// Allows only these names (`--rpcs-allowed`), for calls from sockets and from within the
    /// process.
    pub fn allow_only(&mut self, names: impl IntoIterator<Item = String>) {
        self.allowed = Some(names.into_iter().collect());
    }

    /// The phase of calls from sockets.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Sets the phase of later calls from sockets.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.set(phase);
    }

    /// The phases in which `name` may be called. `None` if there is no such method.
    pub fn phases(&self, name: &str) -> Option<Phases> {
        let (_, phases, ..) = self.resolve(name)?;
        Some(phases)
    }

    /// Names of allowed methods, the last registered first. With `current`, only those of this
    /// phase; with `aliases`, also deprecated names.
    pub fn names(&self, current: Option<Phase>, aliases: bool) -> Vec<&'static str> {
        let is_listed = |entry: &&Entry| {
            let is_alias = matches!(entry.kind, Kind::Alias { .. });
            let phases = self.phases(entry.name);
            (aliases || !is_alias)
                && phases.is_some_and(|phases| current.is_none_or(|phase| phases.contains(phase)))
        };
        self.entries.iter().rev().filter(is_listed).map(|entry| entry.name).collect()
    }

    /// Name, calls and failed calls of each method that was called, also from within the process.
    pub fn calls(&self) -> Vec<(&'static str, u64, u64)> {
        let counts = |entry: &Entry| match &entry.kind {
            Kind::Method { calls, .. } if calls.all.get() > 0 => {
                Some((entry.name, calls.all.get(), calls.failed.get()))
            }
            Kind::Method { .. } | Kind::Alias { .. } => None,
        };
        self.entries.iter().filter_map(counts).collect()
    }

    /// Calls a method from within the process, as if the application were in `phase`.
    ///
    /// `params` must be an object or an array; null and `None` mean no parameters. The result and
    /// the errors are those of a call from a socket.
    pub async fn call(
        self: &Rc<Self>,
        name: &str,
        params: Option<Value>,
        phase: Phase,
    ) -> Result<Value, RpcError> {
        self.dispatch(name, raw(params)?, Client::local(), phase).await
    }

    pub(crate) async fn dispatch(
        self: &Rc<Self>,
        name: &str,
        raw: Option<Box<RawValue>>,
        client: Client,
        phase: Phase,
    ) -> Result<Value, RpcError> {
        let Some((method, phases, handler, calls)) = self.resolve(name) else {
            return Err(RpcError::method_not_found());
        };
        calls.all.update(|calls| calls + 1);
        if !phases.contains(phase) {
            calls.failed.update(|failed| failed + 1);
            return Err(RpcError::new(RpcError::INVALID_STATE, wrong_phase(phase)));
        }
        self.warn_if_alias(name, method);
        let answer = handler(self, Params { method, raw, client, phase }).await;
        if answer.is_err() {
            calls.failed.update(|failed| failed + 1);
        }
        answer
    }

    fn resolve(&self, name: &str) -> Option<(&'static str, Phases, &Handler, &Calls)> {
        if self.allowed.as_ref().is_some_and(|allowed| !allowed.contains(name)) {
            return None;
        }
        let mut entry = &self.entries[*self.index.get(name)?];
        if let Kind::Alias { of, .. } = entry.kind {
            entry = &self.entries[of];
        }
        match &entry.kind {
            Kind::Method { phases, handler, calls } => Some((entry.name, *phases, handler, calls)),
            Kind::Alias { .. } => None,
        }
    }

    fn warn_if_alias(&self, name: &str, method: &str) {
        let entry = self.index.get(name).map(|&index| &self.entries[index].kind);
        if let Some(Kind::Alias { warned, .. }) = entry
            && !warned.replace(true)
        {
            tracing::warn!("RPC method {name} is deprecated. Use {method} instead.");
        }
    }
}

fn wrong_phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Startup => {
            "Method may only be called after framework is initialized using \
             framework_start_init RPC."
        }
        Phase::Runtime => {
            "Method may only be called before framework is initialized. Use --wait-for-rpc \
             command line parameter and then issue this RPC before the framework_start_init RPC."
        }
    }
}

fn rpc_get_methods(registry: &Registry, params: &Params) -> Result<Value, RpcError> {
    #[derive(Deserialize)]
    struct Request {
        #[serde(default)]
        current: bool,
        #[serde(default)]
        include_aliases: bool,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let current = request.current.then_some(params.phase());
    Ok(registry.names(current, request.include_aliases).into())
}
