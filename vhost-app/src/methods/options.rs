//! Options of SPDK's subsystems: accepted, checked, and written to a saved configuration.
//!
//! Only `bdev_auto_examine` has an effect. The other options size pools and caches of SPDK; this
//! program allocates the memory for requests when a queue starts.

use std::collections::BTreeMap;

use bdev::BdevId;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{error, info};

use super::absent::Kept;
use super::bdev_histogram as histogram;
use super::scheduler::Scheduler;
use super::trace::Trace;
use super::{Answer, App, Methods};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_set_options", Phases::Startup, set_bdev);
    methods.add_plain("iobuf_set_options", Phases::Startup, set_iobuf);
    methods.add_plain("accel_set_options", Phases::Startup, set_accel);
}

/// The subsystems' options. `bdev_set_options` and the scheduler are always saved, the others only
/// if a client set them.
#[derive(Debug)]
pub(crate) struct SubsystemOptions {
    pub(super) bdev: BdevOptions,
    pub(super) iobuf: Option<IobufOptions>,
    pub(super) accel: Option<AccelOptions>,
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
            iobuf: None,
            accel: None,
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
    pub(super) fn config(&self) -> Value {
        json!({ "method": "bdev_set_options", "params": self })
    }
}

fn set_bdev(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        bdev_io_pool_size: Option<u32>,
        bdev_io_cache_size: Option<u32>,
        bdev_auto_examine: Option<bool>,
        iobuf_small_cache_size: Option<u32>,
        iobuf_large_cache_size: Option<u32>,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let mut all = app.options.borrow_mut();
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
    app.bdevs.set_auto_examine(options.bdev_auto_examine);
    all.bdev = options;
    Ok(true.into())
}

/// `iobuf_set_options`, with SPDK's defaults.
#[derive(Clone, Debug, Serialize)]
pub(super) struct IobufOptions {
    small_pool_count: u64,
    large_pool_count: u64,
    small_bufsize: u32,
    large_bufsize: u32,
    enable_numa: bool,
}

impl Default for IobufOptions {
    fn default() -> Self {
        Self {
            small_pool_count: 8192,
            large_pool_count: 1024,
            small_bufsize: 8192,
            large_bufsize: 135_168,
            enable_numa: false,
        }
    }
}

impl IobufOptions {
    pub(super) fn config(&self) -> Value {
        json!({ "method": "iobuf_set_options", "params": self })
    }
}

fn set_iobuf(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        small_pool_count: Option<u64>,
        large_pool_count: Option<u64>,
        small_bufsize: Option<u32>,
        large_bufsize: Option<u32>,
        enable_numa: Option<bool>,
    }
    let request: Request = params.decode(DecodeFailure::PARAMS)?;
    let old = app.options.borrow().iobuf.clone().unwrap_or_default();
    let options = IobufOptions {
        small_pool_count: request.small_pool_count.unwrap_or(old.small_pool_count),
        large_pool_count: request.large_pool_count.unwrap_or(old.large_pool_count),
        small_bufsize: request.small_bufsize.unwrap_or(old.small_bufsize),
        large_bufsize: request.large_bufsize.unwrap_or(old.large_bufsize),
        enable_numa: request.enable_numa.unwrap_or(old.enable_numa),
    };
    let minima = [
        ("small_pool_count", options.small_pool_count, 64),
        ("large_pool_count", options.large_pool_count, 8),
        ("small_bufsize", options.small_bufsize.into(), 4096),
        ("large_bufsize", options.large_bufsize.into(), 8192),
    ];
    if let Some((name, value, min)) = minima.into_iter().find(|(_, value, min)| value < min) {
        error!("iobuf_set_options: {name} is {value}, but must be at least {min}");
        return Err(RpcError::errno(libc::EINVAL));
    }
    info!("iobuf_set_options: saved, but without effect: vhost has no iobuf pools");
    app.options.borrow_mut().iobuf = Some(options);
    Ok(true.into())
}

/// `accel_set_options`, with SPDK's defaults.
#[derive(Clone, Debug, Serialize)]
pub(super) struct AccelOptions {
    small_cache_size: u32,
    large_cache_size: u32,
    task_count: u32,
    sequence_count: u32,
    buf_count: u32,
}

impl Default for AccelOptions {
    fn default() -> Self {
        Self {
            small_cache_size: 128,
            large_cache_size: 16,
            task_count: 2048,
            sequence_count: 2048,
            buf_count: 2048,
        }
    }
}

impl AccelOptions {
    pub(super) fn config(&self) -> Value {
        json!({ "method": "accel_set_options", "params": self })
    }
}

fn set_accel(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        small_cache_size: Option<u32>,
        large_cache_size: Option<u32>,
        task_count: Option<u32>,
        sequence_count: Option<u32>,
        buf_count: Option<u32>,
    }
    let request: Request = params.decode(DecodeFailure::PARSE)?;
    info!("accel_set_options: saved, but without effect: vhost has no acceleration framework");
    let mut all = app.options.borrow_mut();
    let old = all.accel.clone().unwrap_or_default();
    all.accel = Some(AccelOptions {
        small_cache_size: request.small_cache_size.unwrap_or(old.small_cache_size),
        large_cache_size: request.large_cache_size.unwrap_or(old.large_cache_size),
        task_count: request.task_count.unwrap_or(old.task_count),
        sequence_count: request.sequence_count.unwrap_or(old.sequence_count),
        buf_count: request.buf_count.unwrap_or(old.buf_count),
    });
    Ok(true.into())
}
