//! A device of one of the kinds, and the parameters of a wrapper.

use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, ErrorDisk, FileDisk, Flavour, Latency, LatencyKind, Malloc, Null,
};
use serde_json::{Map, Value};
use uuid::Uuid;

/// The kinds of devices, after SPDK's modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Malloc,
    Null,
    Aio,
    Uring,
    Delay,
    Error,
}

impl Kind {
    /// The RPC method that creates one.
    pub(crate) fn create_method(self) -> &'static str {
        match self {
            Self::Malloc => "bdev_malloc_create",
            Self::Null => "bdev_null_create",
            Self::Aio => "bdev_aio_create",
            Self::Uring => "bdev_uring_create",
            Self::Delay => "bdev_delay_create",
            Self::Error => "bdev_error_create",
        }
    }
}

/// A device of one of the kinds.
#[derive(Clone)]
pub(crate) enum Disk {
    Malloc(Arc<Malloc>),
    Null(Arc<Null>),
    File(Arc<FileDisk>),
    Delay(Arc<Delay>),
    Error(Arc<ErrorDisk>),
}

impl Disk {
    /// The device, whatever its kind.
    pub(crate) fn bdev(&self) -> Arc<dyn Bdev> {
        match self {
            Self::Malloc(disk) => Arc::clone(disk) as _,
            Self::Null(disk) => Arc::clone(disk) as _,
            Self::File(disk) => Arc::clone(disk) as _,
            Self::Delay(disk) => Arc::clone(disk) as _,
            Self::Error(disk) => Arc::clone(disk) as _,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Malloc(_) => Kind::Malloc,
            Self::Null(_) => Kind::Null,
            Self::File(disk) if disk.flavour() == Flavour::Aio => Kind::Aio,
            Self::File(_) => Kind::Uring,
            Self::Delay(_) => Kind::Delay,
            Self::Error(_) => Kind::Error,
        }
    }

    /// The base of a wrapper.
    pub(crate) fn base(&self) -> Option<&Arc<dyn Bdev>> {
        match self {
            Self::Delay(disk) => Some(disk.base()),
            Self::Error(disk) => Some(disk.base()),
            Self::Malloc(_) | Self::Null(_) | Self::File(_) => None,
        }
    }
}

/// A wrapper, as its create method was called.
#[derive(Clone, Debug)]
pub(crate) struct Wrapper {
    /// Its base's name or UUID.
    pub(crate) base: String,
    /// A delay bdev's latencies; `None` for an error bdev.
    pub(crate) latency: Option<Latency>,
}

/// Makes a delay bdev with any latencies: updates may have set a p99 below its average, which the
/// create method refuses.
pub(super) fn make_delay(
    name: String,
    base: Arc<dyn Bdev>,
    latency: Latency,
    uuid: Option<Uuid>,
) -> Result<Arc<Delay>, bdev::Error> {
    let raised = Latency {
        p99_read_us: latency.p99_read_us.max(latency.avg_read_us),
        p99_write_us: latency.p99_write_us.max(latency.avg_write_us),
        ..latency
    };
    let disk = Delay::create(DelayOptions { name, base, latency: raised, uuid })?;
    disk.update_latency(LatencyKind::P99Read, latency.p99_read_us);
    disk.update_latency(LatencyKind::P99Write, latency.p99_write_us);
    Ok(disk)
}

/// A delay bdev's latencies, with the parameter names of `bdev_delay_create`.
pub(crate) fn latency_params(latency: Latency) -> Map<String, Value> {
    let Latency { avg_read_us, p99_read_us, avg_write_us, p99_write_us } = latency;
    [
        ("avg_read_latency", avg_read_us),
        ("p99_read_latency", p99_read_us),
        ("avg_write_latency", avg_write_us),
        ("p99_write_latency", p99_write_us),
    ]
    .into_iter()
    .map(|(name, us)| (name.to_owned(), us.into()))
    .collect()
}
