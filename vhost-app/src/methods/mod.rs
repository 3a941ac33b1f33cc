//! The RPC methods, one file per family, and what they work on.
//!
//! A method decodes its parameters, asks [`Control`] or the [`Registry`](::bdev::Registry) of
//! bdevs, and answers in SPDK's shape, with SPDK's code and text where it fails; the reason goes to
//! the log. Methods run on the control thread: what can block goes to the blocking pool
//! ([`blocking`]). The methods of each kind of bdev are in crate `bdev`.

mod absent;
mod bdev;
mod bdev_histogram;
mod bdev_host;
mod bdev_qos;
mod bdev_show;
mod bdev_stats;
mod framework;
mod log;
mod nbd;
mod notify;
mod options;
mod qd_sampling;
mod scheduler;
pub(crate) mod schema;
mod served;
mod threads;
mod trace;
mod trial;
mod vhost;
mod vhost_blk;
mod vhost_scsi;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use ::bdev::BdevModule;
use rpc::{Params, Phases, Registry, RpcError};
use sandbox::{Network, Opener};
use serde_json::Value;
use tokio::sync::watch;

use crate::control::Control;
use crate::core_locks::CoreLocks;
use crate::logging::Log;

pub(crate) use bdev::EXAMINED_BY_THEMSELVES;
pub(crate) use framework::{SUBSYSTEMS, Startup};
use notify::Notifications;
use qd_sampling::Samplings;
use served::Served;

pub(crate) use options::SubsystemOptions;
pub(crate) use trial::Trial;
pub(crate) use vhost_scsi::start_loaded;

/// What the methods work on.
pub(crate) struct App {
    pub(crate) control: Rc<Control>,
    pub(crate) bdevs: ::bdev::Registry,
    /// Told when a bdev has come or gone.
    pub(crate) bdevs_changed: watch::Sender<()>,
    /// The kinds of bdevs.
    modules: Vec<Rc<dyn BdevModule>>,
    /// The claims of controllers on their bdevs.
    served: Served,
    /// The logical units of SCSI targets.
    scsi_units: Arc<::vhost_scsi::Units>,
    /// SCSI controllers of the configuration, whose sockets open when it has been loaded.
    loaded: RefCell<Vec<String>>,
    /// Bdevs that are exported over NBD.
    pub(crate) exports: nbd::Exports,
    pub(crate) log: Log,
    /// Opens the files of disks.
    pub(crate) opener: Opener,
    /// Several disks may write to the same file (`--share`).
    pub(crate) share: bool,
    /// Options that subsystems were given.
    pub(crate) options: RefCell<SubsystemOptions>,
    /// The last events of bdevs.
    notifications: Notifications,
    /// Bdevs whose queue depth is sampled.
    samplings: RefCell<Samplings>,
    /// The controllers' parts of the reactors' time.
    busy_times: RefCell<threads::BusyTimes>,
    /// The locks of the reactors' cores.
    pub(crate) core_locks: RefCell<CoreLocks>,
    /// How far the start has come.
    pub(crate) startup: watch::Sender<Startup>,
    /// When the program was started, in ticks.
    pub(crate) began: u64,
    /// The processor's times at the start.
    pub(crate) cpu_times: threads::CpuTimes,
}

/// A method's answer.
type Answer = Result<Value, RpcError>;

impl App {
    pub(crate) fn new(
        control: Rc<Control>,
        log: Log,
        opener: Opener,
        share: bool,
        network: Network,
    ) -> Self {
        let bdevs_changed = watch::Sender::new(());
        let changed = bdevs_changed.clone();
        Self {
            control,
            bdevs: ::bdev::Registry::new(move || changed.send_replace(())),
            bdevs_changed,
            modules: crate::engines::modules(network),
            served: Served::default(),
            scsi_units: Arc::default(),
            loaded: RefCell::default(),
            exports: nbd::Exports::default(),
            log,
            opener,
            share,
            options: RefCell::default(),
            notifications: Notifications::default(),
            samplings: RefCell::default(),
            core_locks: RefCell::default(),
            busy_times: RefCell::default(),
            startup: watch::Sender::new(Startup::Waiting),
            began: reactor::read_tsc(),
            cpu_times: threads::CpuTimes::read(),
        }
    }
}

/// Registers all methods.
pub(crate) fn register(registry: &mut Registry, app: &Rc<App>) {
    let mut methods = Methods { registry, app };
    framework::register(&mut methods);
    threads::register(&mut methods);
    log::register(&mut methods);
    options::register(&mut methods);
    scheduler::register(&mut methods);
    trace::register(&mut methods);
    notify::register(&mut methods);
    absent::register(&mut methods);
    bdev::register(&mut methods);
    bdev_host::register(&mut methods);
    bdev_histogram::register(&mut methods);
    qd_sampling::register(&mut methods);
    bdev_qos::register(&mut methods);
    bdev_stats::register(&mut methods);
    nbd::register(&mut methods);
    vhost::register(&mut methods);
    vhost_blk::register(&mut methods);
    vhost_scsi::register(&mut methods);
}

/// A registry whose methods get the [`App`].
struct Methods<'a> {
    registry: &'a mut Registry,
    app: &'a Rc<App>,
}

impl Methods<'_> {
    /// Whether a bdev module has a method of this name.
    fn has_module(&self, name: &str) -> bool {
        let modules = self.app.modules.iter();
        modules.flat_map(|module| Rc::clone(module).methods()).any(|method| method.name == name)
    }

    fn add<F, R>(&mut self, name: &'static str, phases: Phases, method: F)
    where
        F: Fn(Rc<App>, Params) -> R + 'static,
        R: Future<Output = Answer> + 'static,
    {
        let app = Rc::clone(self.app);
        self.registry.register(name, phases, move |params| method(Rc::clone(&app), params));
    }

    /// A method that never waits.
    fn add_plain<F>(&mut self, name: &'static str, phases: Phases, method: F)
    where
        F: Fn(&App, &Params) -> Answer + 'static,
    {
        let app = Rc::clone(self.app);
        self.registry
            .register(name, phases, move |params| std::future::ready(method(&app, &params)));
    }
}

/// Runs what may block on a thread of the blocking pool.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// Cores as SPDK writes a mask: lower-case hexadecimal without leading zeroes and without 0x.
fn mask(cores: impl IntoIterator<Item = usize>) -> String {
    let mut digits: Vec<u32> = vec![];
    for core in cores {
        if digits.len() <= core / 4 {
            digits.resize(core / 4 + 1, 0);
        }
        digits[core / 4] |= 1 << (core % 4);
    }
    let digit = |d: &u32| char::from_digit(*d, 16).unwrap_or('0');
    if digits.is_empty() { "0".into() } else { digits.iter().rev().map(digit).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_no_leading_zeroes_and_any_length() {
        assert_eq!(mask([]), "0");
        assert_eq!(mask([0]), "1");
        assert_eq!(mask([1, 0]), "3");
        assert_eq!(mask([3, 4, 5, 6, 7]), "f8");
        assert_eq!(mask([0, 79]), format!("8{}1", "0".repeat(18)));
    }
}
