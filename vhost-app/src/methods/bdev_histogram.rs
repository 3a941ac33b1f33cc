//! `bdev_enable_histogram`, `bdev_get_histogram`, `bdev_get_histogram_borders`.

use std::rc::Rc;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bdev::{Bdev, BdevId, HistogramOptions, Latencies, Op};
use reactor::ticks_per_second;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;

use super::{Answer, App, Methods};

const GRANULARITY: u8 = 7;
const MIN_NS: u64 = 1000;
const MAX_NS: u64 = 120_000_000_000;

/// The longest list of borders that SPDK takes.
const BORDERS_MAX: usize = 256;

/// SPDK's types of I/O, with the operation that is counted for them, if there is one.
const TYPES: [(&str, Option<Op>); 21] = [
    ("read", Some(Op::Read)),
    ("write", Some(Op::Write)),
    ("unmap", Some(Op::Unmap)),
    ("flush", Some(Op::Flush)),
    ("write_zeroes", Some(Op::WriteZeroes)),
    ("reset", None),
    ("nvme_admin", None),
    ("nvme_io", None),
    ("nvme_io_md", None),
    ("nvme_iov_md", None),
    ("zcopy", None),
    ("get_zone_info", None),
    ("zone_management", None),
    ("zone_append", None),
    ("compare", None),
    ("compare_and_write", None),
    ("abort", None),
    ("seek_hole", None),
    ("seek_data", None),
    ("copy", None),
    ("unknown", None),
];

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_enable_histogram", Phases::Runtime, enable);
    methods.add("bdev_get_histogram", Phases::Runtime, get);
    methods.add("bdev_get_histogram_borders", Phases::Runtime, get_borders);
}

/// What an operator gave to `bdev_enable_histogram`, for a saved configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    opc: Option<String>,
    granularity: u8,
    min_nsec: u64,
    max_nsec: u64,
}

fn ticks(ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(ticks_per_second()) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn find(app: &App, params: &Params, name: &str) -> Result<(BdevId, Arc<dyn Bdev>), RpcError> {
    let found = app.bdevs.id(name).and_then(|id| Some((id, app.bdevs.live(id)?.bdev)));
    found.ok_or_else(|| {
        error!("{}: no bdev {name:?}", params.method());
        RpcError::errno(libc::ENODEV)
    })
}

/// The parameters of `bdev_enable_histogram`.
#[derive(Deserialize)]
struct Request {
    name: String,
    enable: bool,
    opc: Option<String>,
    granularity: Option<u8>,
    min_nsec: Option<u64>,
    max_nsec: Option<u64>,
}

impl Request {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INTERNAL)
    }

    /// The options of the histogram to enable; `None` disables the histogram.
    fn options(self) -> Result<Option<(HistogramOptions, Given)>, RpcError> {
        let ops = match self.opc.as_deref().map(|opc| TYPES.iter().find(|(name, _)| *name == opc)) {
            None => HistogramOptions::ALL_OPS,
            Some(Some((_, op))) => op.map_or(0, |op| 1 << (op as u8)),
            Some(None) => return Err(RpcError::internal("Invalid Io type")),
        };
        if !self.enable {
            return Ok(None);
        }
        let given = Given {
            opc: self.opc,
            granularity: self.granularity.unwrap_or(GRANULARITY),
            min_nsec: self.min_nsec.unwrap_or(MIN_NS),
            max_nsec: self.max_nsec.unwrap_or(MAX_NS),
        };
        let max = HistogramOptions::GRANULARITY_MAX;
        if given.granularity > max || given.min_nsec > given.max_nsec {
            error!("bdev_enable_histogram: granularity above {max}, or min_nsec above max_nsec");
            return Err(RpcError::errno(libc::EINVAL));
        }
        let options = HistogramOptions {
            ops,
            granularity: given.granularity,
            min_ticks: ticks(given.min_nsec),
            max_ticks: ticks(given.max_nsec),
        };
        Ok(Some((options, given)))
    }
}

/// Checks the parameters of `bdev_enable_histogram`.
pub(super) fn check(params: &Params) -> Result<(), RpcError> {
    Request::decode(params)?.options().map(drop)
}

fn enable(app: &App, params: &Params) -> Answer {
    let request = Request::decode(params)?;
    let (id, bdev) = find(app, params, &request.name)?;
    let Some((options, given)) = request.options()? else {
        bdev.stats().disable_histogram();
        app.options.borrow_mut().histograms.remove(&id);
        return Ok(true.into());
    };
    bdev.stats().enable_histogram(options);
    let histograms = &mut app.options.borrow_mut().histograms;
    histograms.retain(|id, _| app.bdevs.live(*id).is_some());
    histograms.insert(id, given);
    Ok(true.into())
}

/// The call that enables a bdev's histogram again. Unlike SPDK's, it has the options that differ
/// from the defaults.
pub(super) fn config(app: &App, id: BdevId, bdev: &dyn Bdev) -> Option<Value> {
    let options = app.options.borrow();
    let given = options.histograms.get(&id)?;
    let mut params = Map::from_iter([
        ("name".to_owned(), bdev.name().into()),
        ("enable".to_owned(), true.into()),
    ]);
    let numbers = [
        ("granularity", u64::from(given.granularity), u64::from(GRANULARITY)),
        ("min_nsec", given.min_nsec, MIN_NS),
        ("max_nsec", given.max_nsec, MAX_NS),
    ];
    params.extend(given.opc.clone().map(|opc| ("opc".to_owned(), opc.into())));
    let changed = numbers.into_iter().filter(|(_, value, default)| value != default);
    params.extend(changed.map(|(name, value, _)| (name.to_owned(), value.into())));
    Some(json!({ "method": "bdev_enable_histogram", "params": params }))
}

fn latencies(app: &App, params: &Params, name: &str) -> Result<Latencies, RpcError> {
    find(app, params, name)?.1.stats().latencies().ok_or_else(|| {
        error!("{}: the histogram of bdev {name} is not enabled", params.method());
        RpcError::errno(libc::ENOMEM)
    })
}

async fn get(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: String,
    }
    let p: Request = params.decode(DecodeFailure::INTERNAL)?;
    let latencies = latencies(&app, &params, &p.name)?;
    let buckets = latencies.buckets();
    params.pace().spend(buckets.len()).await;
    let bytes: Vec<u8> = buckets.iter().flat_map(|count| count.to_le_bytes()).collect();
    let (min_range, max_range) = latencies.ranges();
    Ok(json!({
        "histogram": STANDARD.encode(bytes),
        "granularity": latencies.options().granularity,
        "min_range": min_range,
        "max_range": max_range,
        "tsc_rate": ticks_per_second(),
    }))
}

/// The number of I/Os up to each border, and the number of all.
async fn get_borders(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: String,
        /// In microseconds.
        borders: Vec<u64>,
    }
    let p: Request = params.decode(DecodeFailure::INTERNAL)?;
    if p.borders.len() > BORDERS_MAX {
        error!("bdev_get_histogram_borders: more than {BORDERS_MAX} borders");
        return Err(DecodeFailure::INTERNAL.error());
    }
    let latencies = latencies(&app, &params, &p.name)?;
    let (mut pace, mut counts) = (params.pace(), vec![]);
    for border in &p.borders {
        counts.push(latencies.count_up_to(ticks(border.saturating_mul(1000))));
        // Each sums up to thousands of counters.
        pace.spend(1000).await;
    }
    counts.push(latencies.count());
    Ok(json!({ "borders_count": counts }))
}
