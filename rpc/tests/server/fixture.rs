//! A server in a temporary directory, with methods that tests control, and a raw client.
#![expect(clippy::unwrap_used, reason = "a fixture fails its test by panicking")]

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

use rpc::{Params, Phase, Phases, Registry, RpcError, Server};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore};

/// The state that the methods and the test share.
#[derive(Default)]
pub(crate) struct Probe {
    /// Calls of `note`, `wait`, `hold` and `big`, in the order in which they started.
    pub(crate) started: RefCell<Vec<String>>,
    /// Number of `wait` and `hold` calls whose client has disconnected.
    pub(crate) gone: Cell<usize>,
    /// Notified when `started` or `gone` changes.
    pub(crate) changed: Notify,
    /// One permit ends one call of `wait` or `hold`.
    pub(crate) permits: Permits,
}

pub(crate) struct Permits(Semaphore);

impl Default for Permits {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Probe {
    /// Waits until `done` returns true. Calls it at first and after each change.
    pub(crate) async fn until(&self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            self.changed.notified().await;
        }
    }
}

pub(crate) struct Fixture {
    pub(crate) dir: TempDir,
    pub(crate) probe: Rc<Probe>,
    pub(crate) registry: Rc<Registry>,
    pub(crate) server: Server,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let probe = Rc::new(Probe::default());
        let registry = Rc::new(registry(&probe));
        registry.set_phase(Phase::Runtime);
        let server = Server::bind(dir.path().join("rpc.sock"), Rc::clone(&registry)).unwrap();
        Self { dir, probe, registry, server }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.server.path().to_owned()
    }

    pub(crate) async fn client(&self) -> RawClient {
        RawClient { stream: UnixStream::connect(self.path()).await.unwrap(), bytes: Vec::new() }
    }

    /// Lets `count` calls of `wait` or `hold` end.
    pub(crate) fn release(&self, count: usize) {
        self.probe.permits.0.add_permits(count);
    }
}

fn registry(probe: &Rc<Probe>) -> Registry {
    let mut registry = Registry::new();
    registry.register("echo", Phases::Both, |params: Params| async move {
        Ok(params.json().map_or(Value::Null, |text| Value::String(text.into())))
    });
    registry.register("fail", Phases::Both, |_| async { Err(RpcError::errno(17)) });
    registry.register("early", Phases::Startup, |_| async { Ok(json!(true)) });
    registry.register("late", Phases::Runtime, |_| async { Ok(json!(true)) });
    register_recorded(&mut registry, probe);
    registry.register("panic", Phases::Both, |_| async {
        tokio::task::yield_now().await;
        panic!("a method that panics")
    });
    // Answers with a list of params[0] numbers, and yields while it builds the list.
    registry.register("list", Phases::Both, |params: Params| async move {
        let (count,): (usize,) = params.decode(rpc::DecodeFailure::INTERNAL)?;
        let (mut pace, mut list) = (params.pace(), vec![]);
        for number in 0..count {
            list.push(Value::from(number));
            pace.spend(1).await;
        }
        Ok(list.into())
    });
    register_endless(&mut registry);
    registry
}

/// Registers methods that let the next request start, and do not end.
fn register_endless(registry: &mut Registry) {
    // Waits once, and then works and yields.
    registry.register("spin", Phases::Both, |params: Params| async move {
        params.let_next_start();
        tokio::task::yield_now().await;
        let mut pace = params.pace();
        loop {
            pace.spend(rpc::SLICE_VALUES).await;
        }
    });
    // Lets the next request start after other tasks have run a few times.
    registry.register("hesitate", Phases::Both, |params: Params| async move {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        params.let_next_start();
        std::future::pending().await
    });
}

/// Registers the methods that record their calls in `started`.
fn register_recorded(registry: &mut Registry, probe: &Rc<Probe>) {
    let shared = Rc::clone(probe);
    // Records its parameters.
    registry.register("note", Phases::Both, move |params| {
        let probe = Rc::clone(&shared);
        async move {
            probe.started.borrow_mut().push(params.json().unwrap_or_default().into());
            probe.changed.notify_one();
            Ok(json!(true))
        }
    });
    register_wait(registry, probe, "wait", false);
    register_wait(registry, probe, "hold", true);
    let shared = Rc::clone(probe);
    // Answers with a string of params[0] bytes.
    registry.register("big", Phases::Both, move |params: Params| {
        let probe = Rc::clone(&shared);
        async move {
            probe.started.borrow_mut().push("big".into());
            let (size,): (usize,) = params.decode(rpc::DecodeFailure::INTERNAL)?;
            Ok(Value::String("x".repeat(size)))
        }
    });
}

/// Registers a method that records its parameters, waits for a permit, and counts its client's
/// disconnect. It lets the next request start before it waits, unless it `holds` the
/// connection.
fn register_wait(registry: &mut Registry, probe: &Rc<Probe>, name: &'static str, holds: bool) {
    let shared = Rc::clone(probe);
    registry.register(name, Phases::Both, move |params| {
        let probe = Rc::clone(&shared);
        async move {
            probe.started.borrow_mut().push(params.json().unwrap_or_default().into());
            probe.changed.notify_one();
            if !holds {
                params.let_next_start();
            }
            let gone = async {
                params.client().gone().await;
                probe.gone.update(|count| count + 1);
                probe.changed.notify_one();
                std::future::pending::<()>().await;
            };
            tokio::select! {
                permit = probe.permits.0.acquire() => permit.unwrap().forget(),
                () = gone => {}
            }
            probe.started.borrow_mut().push("done".into());
            probe.changed.notify_one();
            Ok(json!("waited"))
        }
    });
}

/// A client that writes and reads bytes.
pub(crate) struct RawClient {
    pub(crate) stream: UnixStream,
    bytes: Vec<u8>,
}

impl RawClient {
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// The next line without its newline. `None` at end of file or after a reset.
    pub(crate) async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Some(String::from_utf8(line[..end].to_vec()).unwrap());
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk).await {
                Ok(0) | Err(_) => {
                    assert!(self.bytes.is_empty(), "half a line");
                    return None;
                }
                Ok(count) => self.bytes.extend_from_slice(&chunk[..count]),
            }
        }
    }

    /// Sends a request, and reads the next line as JSON.
    pub(crate) async fn ask(&mut self, request: impl AsRef<[u8]>) -> Value {
        self.send(request).await;
        serde_json::from_str(&self.line().await.expect("an answer")).unwrap()
    }

    /// A round trip, after which the server has read everything that was sent before.
    pub(crate) async fn sync(&mut self) {
        let answer = self.ask(r#"{"method":"echo","id":"sync"}"#).await;
        assert_eq!(answer["id"], "sync");
    }

    /// Closes the sending direction.
    pub(crate) async fn half_close(&mut self) {
        self.stream.shutdown().await.unwrap();
    }
}

/// Runs a test on the runtime that the server needs.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

/// As [`run`], with a clock that advances to the next timer when all tasks are idle.
pub(crate) fn run_with_paused_clock(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}
