//! `bdev_set_qos_limit`.

use bdev::{Bdev, RateLimits};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info, warn};

use super::{Answer, App, Methods};
use crate::devices;

/// The largest bandwidth, in MiB/s, whose number of bytes fits into 64 bits. As in SPDK, a larger
/// value is stored and shown as this one.
const MBYTES_MAX: u64 = u64::MAX >> 20;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_set_qos_limit", Phases::Runtime, set_limit);
}

#[derive(Deserialize)]
struct Request {
    name: String,
    rw_ios_per_sec: Option<u64>,
    rw_mbytes_per_sec: Option<u64>,
    r_mbytes_per_sec: Option<u64>,
    w_mbytes_per_sec: Option<u64>,
}

impl Request {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INTERNAL)
    }

    fn check(&self) -> Result<(), RpcError> {
        let given = [
            self.rw_ios_per_sec,
            self.rw_mbytes_per_sec,
            self.r_mbytes_per_sec,
            self.w_mbytes_per_sec,
        ];
        if given == [None; 4] {
            return Err(RpcError::new(-i64::from(libc::EINVAL), "No rate limits specified"));
        }
        Ok(())
    }
}

/// Checks the parameters of `bdev_set_qos_limit`.
pub(super) fn check(params: &Params) -> Result<(), RpcError> {
    Request::decode(params)?.check()
}

/// A limit that is absent keeps its value; 0 removes it. Unlike SPDK, a number of I/Os that is not a
/// multiple of 1,000 is not rounded up.
fn set_limit(app: &App, params: &Params) -> Answer {
    let request = Request::decode(params)?;
    let bdev = app.bdevs.bdev(&request.name).ok_or_else(|| {
        error!("bdev_set_qos_limit: no bdev {:?}", request.name);
        RpcError::errno(libc::ENODEV)
    })?;
    request.check()?;
    let current = bdev.qos().limits();
    let mbytes = |parameter, given: Option<u64>, current| {
        given.map_or(current, |mbytes| clamp(bdev.name(), parameter, mbytes))
    };
    let limits = RateLimits {
        rw_ios_per_sec: request.rw_ios_per_sec.unwrap_or(current.rw_ios_per_sec),
        rw_mbytes_per_sec: mbytes(
            "rw_mbytes_per_sec",
            request.rw_mbytes_per_sec,
            current.rw_mbytes_per_sec,
        ),
        r_mbytes_per_sec: mbytes(
            "r_mbytes_per_sec",
            request.r_mbytes_per_sec,
            current.r_mbytes_per_sec,
        ),
        w_mbytes_per_sec: mbytes(
            "w_mbytes_per_sec",
            request.w_mbytes_per_sec,
            current.w_mbytes_per_sec,
        ),
    };
    bdev.qos().set_limits(limits);
    devices::limits_changed(app.control.target(), &bdev);
    info!("bdev {}: rate limits: {}", bdev.name(), json!(object(limits)));
    Ok(true.into())
}

fn clamp(bdev: &str, parameter: &str, mbytes: u64) -> u64 {
    if mbytes > MBYTES_MAX {
        warn!("bdev {bdev}: {parameter} {mbytes} MiB/s is too large; stored as {MBYTES_MAX}");
    }
    mbytes.min(MBYTES_MAX)
}

/// The limits by SPDK's names, 0 for none, as `assigned_rate_limits` of `bdev_get_bdevs` has them.
pub(super) fn object(limits: RateLimits) -> Map<String, Value> {
    [
        ("rw_ios_per_sec", limits.rw_ios_per_sec),
        ("rw_mbytes_per_sec", limits.rw_mbytes_per_sec),
        ("r_mbytes_per_sec", limits.r_mbytes_per_sec),
        ("w_mbytes_per_sec", limits.w_mbytes_per_sec),
    ]
    .map(|(name, limit)| (name.to_owned(), limit.into()))
    .into_iter()
    .collect()
}

/// The call that sets a bdev's limits again, if it has any.
pub(super) fn config(bdev: &dyn Bdev) -> Option<Value> {
    let limits = bdev.qos().limits();
    if limits.is_unlimited() {
        return None;
    }
    let mut params = Map::from_iter([("name".to_owned(), bdev.name().into())]);
    params.extend(object(limits).into_iter().filter(|(_, limit)| *limit != 0));
    Some(json!({ "method": "bdev_set_qos_limit", "params": params }))
}
