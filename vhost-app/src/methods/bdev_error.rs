//! `bdev_delay_*` and `bdev_error_*`: devices that make another slow, or fail.

use std::sync::Arc;

use bdev::{ErrorDisk, InjectedError, InjectedOp, Injection, Latency, LatencyKind};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use tracing::error;

use super::bdev::{Named, delete, refuse_if_served};
use super::{Answer, App, GivenUuid, Methods, as_given, bdev_error, given};
use crate::bdevs::{Disk, Kind, Wrapper};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_delay_create", Phases::Runtime, delay_create);
    methods
        .add("bdev_delay_delete", Phases::Runtime, |app, params| delete(app, params, Kind::Delay));
    methods.add_plain("bdev_delay_update_latency", Phases::Runtime, delay_update);
    methods.add_plain("bdev_error_create", Phases::Runtime, error_create);
    methods
        .add("bdev_error_delete", Phases::Runtime, |app, params| delete(app, params, Kind::Error));
    methods.add_plain("bdev_error_inject_error", Phases::Runtime, inject);
    methods.add_plain("bdev_error_resume_pending", Phases::Runtime, resume_pending);
}

fn delay_create(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Create {
        name: String,
        base_bdev_name: String,
        avg_read_latency: u64,
        p99_read_latency: u64,
        avg_write_latency: u64,
        p99_write_latency: u64,
        uuid: Option<GivenUuid>,
    }
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    let invalid = p.name.is_empty()
        || p.p99_read_latency < p.avg_read_latency
        || p.p99_write_latency < p.avg_write_latency;
    if invalid {
        error!("bdev_delay_create: an empty name, or a p99 latency below its average");
        return Err(RpcError::errno(libc::EINVAL));
    }
    let latency = Latency {
        avg_read_us: p.avg_read_latency,
        p99_read_us: p.p99_read_latency,
        avg_write_us: p.avg_write_latency,
        p99_write_us: p.p99_write_latency,
    };
    refuse_served_base(app, params.method(), &p.base_bdev_name)?;
    let wrapper = Wrapper { base: p.base_bdev_name, latency: Some(latency) };
    app.bdevs
        .add_wrapper(&p.name, given(p.uuid), wrapper, as_given(params))
        .map_err(RpcError::errno)?;
    Ok(p.name.into())
}

fn delay_update(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Update {
        delay_bdev_name: String,
        latency_type: Type,
        latency_us: u64,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Type {
        AvgRead,
        P99Read,
        AvgWrite,
        P99Write,
    }
    let p: Update = params.decode(DecodeFailure::INTERNAL)?;
    let change = |latency: &mut Latency| {
        *match p.latency_type {
            Type::AvgRead => &mut latency.avg_read_us,
            Type::P99Read => &mut latency.p99_read_us,
            Type::AvgWrite => &mut latency.avg_write_us,
            Type::P99Write => &mut latency.p99_write_us,
        } = p.latency_us;
    };
    let kind = match p.latency_type {
        Type::AvgRead => LatencyKind::AvgRead,
        Type::P99Read => LatencyKind::P99Read,
        Type::AvgWrite => LatencyKind::AvgWrite,
        Type::P99Write => LatencyKind::P99Write,
    };
    match app.bdevs.disk(&p.delay_bdev_name) {
        Some(Disk::Delay(disk)) => disk.update_latency(kind, p.latency_us),
        // A delay bdev that waits for its base has latencies too, and a configuration may set them.
        None if app.bdevs.update_waiting(&p.delay_bdev_name, change) => {}
        _ => {
            error!("bdev_delay_update_latency: no delay bdev {:?}", p.delay_bdev_name);
            return Err(RpcError::invalid_params("The requested bdev does not exist."));
        }
    }
    Ok(true.into())
}

/// Fails if there is such a device and a controller serves it.
fn refuse_served_base(app: &App, method: &str, base: &str) -> Result<(), RpcError> {
    match app.bdevs.disk(base) {
        Some(base) => refuse_if_served(app, method, &*base.bdev()),
        None => Ok(()),
    }
}

fn error_create(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Create {
        base_name: String,
        uuid: Option<GivenUuid>,
    }
    let p: Create = params.decode(DecodeFailure::PARAMS)?;
    refuse_served_base(app, params.method(), &p.base_name)?;
    let name = format!("EE_{}", p.base_name);
    let wrapper = Wrapper { base: p.base_name, latency: None };
    app.bdevs
        .add_wrapper(&name, given(p.uuid), wrapper, as_given(params))
        .map_err(RpcError::errno)?;
    Ok(true.into())
}

fn error_disk(app: &App, method: &str, name: &str) -> Result<Arc<ErrorDisk>, RpcError> {
    match app.bdevs.disk(name) {
        Some(Disk::Error(disk)) => Ok(disk),
        _ => {
            error!("{method}: no error bdev {name:?}");
            Err(RpcError::errno(libc::ENODEV))
        }
    }
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "virtio has one error for all of NVMe's")]
struct Inject {
    name: String,
    io_type: IoType,
    error_type: ErrorType,
    num: Option<u32>,
    #[serde(default)]
    queue_depth: u64,
    #[serde(default)]
    corrupt_offset: u64,
    #[serde(default)]
    corrupt_value: u8,
    nvme_sct: Option<u32>,
    nvme_sc: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum IoType {
    Clear,
    Read,
    Write,
    Unmap,
    Flush,
    All,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ErrorType {
    Failure,
    NvmeFailure,
    Pending,
    CorruptData,
    Nomem,
}

fn inject(app: &App, params: &Params) -> Answer {
    let method = params.method();
    let p: Inject = params.decode(DecodeFailure::PARAMS)?;
    let disk = error_disk(app, method, &p.name)?;
    let op = match p.io_type {
        IoType::Clear => InjectedOp::Clear,
        IoType::Read => InjectedOp::Read,
        IoType::Write => InjectedOp::Write,
        IoType::Unmap => InjectedOp::Unmap,
        IoType::Flush => InjectedOp::Flush,
        IoType::All => InjectedOp::All,
    };
    let error = match p.error_type {
        ErrorType::Failure | ErrorType::NvmeFailure => InjectedError::Failure,
        ErrorType::Pending => InjectedError::Pending,
        ErrorType::CorruptData => {
            InjectedError::CorruptData { offset: p.corrupt_offset, value: p.corrupt_value }
        }
        ErrorType::Nomem => InjectedError::NoMemory,
    };
    let injection = Injection { op, error, count: p.num.unwrap_or(1), queue_depth: p.queue_depth };
    disk.inject(injection).map_err(|e| bdev_error(method, &e))?;
    Ok(true.into())
}

fn resume_pending(app: &App, params: &Params) -> Answer {
    let named: Named = params.decode(DecodeFailure::PARAMS)?;
    error_disk(app, params.method(), &named.name)?.resume_pending();
    Ok(true.into())
}
