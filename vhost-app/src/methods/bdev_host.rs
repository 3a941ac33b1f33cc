//! The program as the bdev modules see it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::method::{self, LocalFuture, MethodError, Parameters, Reader};
use bdev::{Bdev, BdevEvent, BdevModule, Host, OpenFile, Registry};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::de::{DeserializeSeed, Deserializer, Error};
use serde_json::{Map, Value};
use tracing::warn;
use vhost_target::Target;

use super::{App, Methods, blocking};
use crate::{active_time, devices};

/// Registers the modules' methods, in the modules' order.
pub(super) fn register(methods: &mut Methods<'_>) {
    for module in methods.app.modules.clone() {
        for method in module.methods() {
            methods.add(method.name, Phases::Runtime, move |app, params| {
                let answer = method.call(app, method::Params::new(Given(params)));
                async { answer.await.map_err(|e| RpcError::new(e.code, e.text)) }
            });
        }
    }
}

impl Host for App {
    fn registry(&self) -> &Registry {
        &self.bdevs
    }

    fn modules(&self) -> &[Rc<dyn BdevModule>] {
        &self.modules
    }

    fn run_blocking(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        Box::pin(blocking(work))
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'static, ()> {
        Box::pin(active_time::sleep(time))
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        drop(tokio::task::spawn_local(task));
    }

    fn open_file(&self) -> OpenFile {
        let opener = self.opener.clone();
        Box::new(move |path, access| opener.open(path, access))
    }

    fn options(&self, method: &str) -> Map<String, Value> {
        self.options.borrow().kept.params(method, None).cloned().unwrap_or_default()
    }

    fn shares_files(&self) -> bool {
        self.share
    }

    fn bdev_event(&self, event: BdevEvent, name: &str) {
        self.notifications.add(event, name);
    }

    fn bdev_resized(&self, bdev: &Arc<dyn Bdev>) {
        devices::bdev_resized(self.control.target(), bdev);
    }

    fn retire(&self, bdevs: Vec<Arc<dyn Bdev>>) -> LocalFuture<'_, ()> {
        Box::pin(async {
            // All first, so that none waits for another to be taken away from the guests.
            bdevs.iter().for_each(|bdev| self.exports.remove_bdev(bdev));
            let (began, shown) = (Instant::now(), bdevs.clone());
            let remove = move |target: &Target| {
                shown.iter().for_each(|bdev| devices::remove_bdev(target, bdev));
            };
            self.control.change(remove).await;
            for bdev in bdevs {
                let (name, limit) = (bdev.name().to_owned(), bdev.deletion_limit());
                let removed = self.control.remove_bdev(bdev);
                let Some(limit) = limit else {
                    removed.await;
                    continue;
                };
                let left = limit.saturating_sub(began.elapsed());
                if active_time::timeout(left, removed).await.is_none() {
                    warn!(
                        "bdev {name}: deleted, but its storage has not answered I/O for {} s; it \
                         is closed when that I/O has ended",
                        limit.as_secs()
                    );
                }
            }
        })
    }

    fn released(&self) {
        self.control.notify();
    }
}

/// The parameters of a call, for a module.
pub(super) struct Given(pub(super) Params);

impl Parameters for Given {
    fn method(&self) -> &'static str {
        self.0.method()
    }

    fn read(
        &self,
        failure: method::DecodeFailure,
        read: &mut Reader<'_>,
    ) -> Result<(), MethodError> {
        let failure = DecodeFailure::new(failure.code, failure.text);
        let decoded = self.0.decode_seed(Seed(read), failure);
        decoded.map_err(|RpcError { code, message: text }| MethodError { code, text })
    }

    fn let_next_start(&self) {
        self.0.let_next_start();
    }
}

/// Hands a deserializer over to a module.
struct Seed<'a, 'r>(&'a mut Reader<'r>);

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let mut erased = <dyn erased_serde::Deserializer<'_>>::erase(deserializer);
        (self.0)(&mut erased).map_err(D::Error::custom)
    }
}
