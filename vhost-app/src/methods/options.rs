//! Options of SPDK's subsystems, and `bdev_set_options`.
//!
//! Of the latter, only `bdev_auto_examine` has an effect. The others size pools and caches of SPDK;
//! this program allocates the memory for requests when a queue starts.

use std::collections::BTreeMap;

use bdev::BdevId;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::error;

use super::Methods;
use super::absent::Kept;
use super::bdev_histogram as histogram;
use super::scheduler::Scheduler;
use super::trace::Trace;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_set_options", Phases::Startup, |app, params| {
        let mut options = app.options.borrow_mut();
        set_bdev(&mut options, params)?;
        app.bdevs.set_auto_examine(options.bdev.auto_examine());
        Ok(true.into())
    });
}

/// The subsystems' options. `bdev_set_options` and the scheduler are always saved, the others only
/// if a client set them.
#[derive(Debug)]
pub(crate) struct SubsystemOptions {
    pub(super) bdev: BdevOptions,
    pub(super) scheduler: Scheduler,
    pub(super) trace: Trace,
    /// The options of the enabled histograms, by bdev.
    pub(super) histograms: BTreeMap<BdevId, histogram::Given>,
    /// Whether `framework_monitor_context_switch` is on: shown, but nothing is monitored.
    pub(super) monitors_context_switches: bool,
    /// Options of components that this program does not have.
    pub(super) kept: Kept,
}

impl Default for SubsystemOptions {
    fn default() -> Self {
        Self {
            bdev: BdevOptions::default(),
            scheduler: Scheduler::default(),
            trace: Trace::default(),
            histograms: BTreeMap::new(),
            monitors_context_switches: true,
            kept: Kept::default(),
        }
    }
}

/// `bdev_set_options`, with SPDK's defaults.
#[derive(Clone, Debug, Serialize)]
pub(super) struct BdevOptions {
    bdev_io_pool_size: u32,
    bdev_io_cache_size: u32,
    bdev_auto_examine: bool,
    iobuf_small_cache_size: u32,
    iobuf_large_cache_size: u32,
}

impl Default for BdevOptions {
    fn default() -> Self {
        Self {
            bdev_io_pool_size: 65535,
            bdev_io_cache_size: 256,
            bdev_auto_examine: true,
            iobuf_small_cache_size: 128,
            iobuf_large_cache_size: 16,
        }
    }
}

impl BdevOptions {
    pub(super) fn auto_examine(&self) -> bool {
        self.bdev_auto_examine
    }

    pub(super) fn config(&self) -> Value {
        json!({ "method": "bdev_set_options", "params": self })
    }
}

pub(super) fn set_bdev(all: &mut SubsystemOptions, params: &Params) -> Result<(), RpcError> {
    #[derive(Deserialize)]
    struct Request {
        bdev_io_pool_size: Option<u32>,
        bdev_io_cache_size: Option<u32>,
        bdev_auto_examine: Option<bool>,
        iobuf_small_cache_size: Option<u32>,
        iobuf_large_cache_size: Option<u32>,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let old = &all.bdev;
    let options = BdevOptions {
        bdev_io_pool_size: request.bdev_io_pool_size.unwrap_or(old.bdev_io_pool_size),
        bdev_io_cache_size: request.bdev_io_cache_size.unwrap_or(old.bdev_io_cache_size),
        bdev_auto_examine: request.bdev_auto_examine.unwrap_or(old.bdev_auto_examine),
        iobuf_small_cache_size: request
            .iobuf_small_cache_size
            .unwrap_or(old.iobuf_small_cache_size),
        iobuf_large_cache_size: request
            .iobuf_large_cache_size
            .unwrap_or(old.iobuf_large_cache_size),
    };
    let (pool, cache) = (options.bdev_io_pool_size, options.bdev_io_cache_size);
    // As in SPDK: the pool must hold a cache for each thread, of which SPDK has one at this time,
    // and one more.
    if u64::from(pool) < 2 * u64::from(cache) {
        let text = format!("Pool size {pool} too small for cache size {cache}");
        error!("bdev_set_options: {text}");
        return Err(RpcError::invalid_params(text));
    }
    all.bdev = options;
    Ok(())
}
