//! A host for tests: one thread, no controllers, and calls in the form of the `bdev_*` methods.
//!
//! It injects no faults: blocking work runs at once, and a deletion ends at once, as the tests hold
//! no bdev.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::contract::Bdev;
use crate::control::host::{BdevEvent, Host, OpenFile};
use crate::control::method::{
    Answer, DecodeFailure, LocalFuture, Method, MethodError, Parameters, Params, Reader,
};
use crate::control::module::BdevModule;
use crate::control::registry::Registry;

pub(crate) struct TestHost {
    registry: Registry,
    modules: Vec<Rc<dyn BdevModule>>,
    methods: Vec<Method>,
    /// The number of changes that the registry has reported.
    pub(crate) changes: Rc<Cell<u32>>,
    /// Names of the bdevs whose users were told of another size, and of the retired bdevs.
    pub(crate) resized: RefCell<Vec<String>>,
    pub(crate) retired: RefCell<Vec<String>>,
    /// The events of bdevs, with their names.
    pub(crate) events: RefCell<Vec<(BdevEvent, String)>>,
}

impl TestHost {
    /// Makes a host with all modules, and the given ones.
    pub(crate) fn new(more: impl IntoIterator<Item = Rc<dyn BdevModule>>) -> Rc<Self> {
        let mut modules = crate::modules::all();
        modules.extend(more);
        let changes = Rc::new(Cell::new(0));
        let counter = Rc::clone(&changes);
        Rc::new(Self {
            registry: Registry::new(move || counter.set(counter.get() + 1)),
            methods: modules.iter().flat_map(|module| Rc::clone(module).methods()).collect(),
            modules,
            changes,
            resized: RefCell::default(),
            retired: RefCell::default(),
            events: RefCell::default(),
        })
    }

    /// Runs a method to its end.
    pub(crate) fn call(self: &Rc<Self>, method: &str, params: Value) -> Answer {
        run(self.begin(method, params))
            .unwrap_or_else(|| panic!("{method} does not end: its future is pending"))
    }

    /// Returns the future of a call.
    pub(crate) fn begin(
        self: &Rc<Self>,
        method: &str,
        params: Value,
    ) -> LocalFuture<'static, Answer> {
        let method = self.methods.iter().find(|known| known.name == method);
        let method = method.expect("a module has this method");
        let params = Params::new(Json { method: method.name, params });
        method.call(Rc::clone(self) as _, params)
    }

    /// Creates a null bdev of 64 MiB with 512-byte blocks and this UUID number.
    pub(crate) fn null(self: &Rc<Self>, name: &str, uuid: u128) {
        let uuid = uuid::Uuid::from_u128(uuid).to_string();
        let params = json!({"name": name, "num_blocks": 131_072, "block_size": 512, "uuid": uuid});
        assert_eq!(self.call("bdev_null_create", params), Ok(name.into()));
    }

    /// Returns the names of the live bdevs, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        self.registry.all().iter().map(|live| live.bdev.name().to_owned()).collect()
    }

    /// Returns the configuration that `save_config` would write.
    pub(crate) fn config(&self) -> Vec<Value> {
        let calls = self.registry.ids().into_iter().flat_map(|id| self.registry.config(id));
        calls.map(|call| json!([call.method, call.params])).collect()
    }

    /// Returns the claim on a bdev as it is shown.
    pub(crate) fn claim_type(&self, name: &str) -> Option<&'static str> {
        self.registry.claim_type(self.registry.id(name)?)
    }

    /// Returns a bdev's `driver_specific` object.
    pub(crate) fn driver_specific(&self, name: &str) -> Value {
        let live = self.registry.id(name).and_then(|id| self.registry.live(id));
        live.unwrap().entry.describe().driver_specific.into()
    }
}

/// Polls a future until it ends; `None` if it is pending.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

impl Host for TestHost {
    fn registry(&self) -> &Registry {
        &self.registry
    }

    fn modules(&self) -> &[Rc<dyn BdevModule>] {
        &self.modules
    }

    fn run_blocking(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        Box::pin(async { work() })
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'static, ()> {
        let until = Instant::now() + time;
        Box::pin(std::future::poll_fn(move |_| match Instant::now() >= until {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }))
    }

    /// Runs the task to its first wait.
    fn spawn(&self, mut task: LocalFuture<'static, ()>) {
        let _ = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }

    fn open_file(&self) -> OpenFile {
        Box::new(crate::open_file)
    }

    fn shares_files(&self) -> bool {
        false
    }

    fn bdev_event(&self, event: BdevEvent, name: &str) {
        self.events.borrow_mut().push((event, name.to_owned()));
    }

    fn bdev_resized(&self, bdev: &Arc<dyn Bdev>) {
        self.resized.borrow_mut().push(bdev.name().to_owned());
    }

    fn retire(&self, bdevs: Vec<Arc<dyn Bdev>>) -> LocalFuture<'_, ()> {
        let names = bdevs.iter().map(|bdev| bdev.name().to_owned());
        self.retired.borrow_mut().extend(names);
        let left: Vec<_> = bdevs.iter().map(Arc::downgrade).collect();
        drop(bdevs);
        Box::pin(std::future::poll_fn(move |_| {
            match left.iter().all(|bdev| bdev.strong_count() == 0) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        }))
    }

    fn released(&self) {}
}

/// Parameters that serde_json decodes.
struct Json {
    method: &'static str,
    params: Value,
}

impl Parameters for Json {
    fn method(&self) -> &'static str {
        self.method
    }

    fn read(&self, failure: DecodeFailure, read: &mut Reader<'_>) -> Result<(), MethodError> {
        let mut deserializer = <dyn erased_serde::Deserializer<'_>>::erase(&self.params);
        let failed = |_| MethodError { code: failure.code, text: failure.text.into() };
        read(&mut deserializer).map_err(failed)
    }

    fn let_next_start(&self) {}
}
