//! `bdev_get_iostat` and `bdev_reset_iostat`.

use bdev::{FailureKind, Op, OpCounts};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;
use vhost_blk::reactor::{read_tsc, ticks_per_second};

use super::{Answer, App, Methods};
use crate::bdevs::Shown;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("bdev_get_iostat", Phases::Runtime, get_iostat);
    methods.add_plain("bdev_reset_iostat", Phases::Runtime, reset_iostat);
}

/// Which counters start from zero.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Reset {
    All,
    /// Longest and shortest latencies: they are not measured, so there is nothing to do.
    Maxmin,
    Error,
    None,
}

impl Reset {
    fn apply(self, shown: &Shown) {
        match self {
            Self::All => shown.bdev.stats().reset(),
            Self::Error => shown.bdev.stats().reset_failures(),
            Self::Maxmin | Self::None => {}
        }
    }
}

fn get_iostat(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        names: Option<Vec<String>>,
        #[serde(default)]
        per_channel: bool,
        reset_mode: Option<Reset>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    if wanted.per_channel && wanted.names.as_ref().is_none_or(|names| names.len() != 1) {
        error!("bdev_get_iostat: per_channel needs exactly one name");
        return Err(RpcError::errno(libc::EINVAL));
    }
    let all = find(app, params.method(), wanted.names.as_deref())?;
    if wanted.per_channel {
        error!("bdev_get_iostat: counters are not kept per channel");
        return Err(RpcError::errno(libc::EOPNOTSUPP));
    }
    let mut bdevs = vec![];
    for shown in &all {
        bdevs.push(describe(shown));
        wanted.reset_mode.unwrap_or(Reset::None).apply(shown);
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "ticks": read_tsc(), "bdevs": bdevs }))
}

fn reset_iostat(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
        mode: Option<Reset>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    let names = wanted.name.map(|name| vec![name]);
    for shown in find(app, params.method(), names.as_deref())? {
        wanted.mode.unwrap_or(Reset::All).apply(&shown);
    }
    Ok(true.into())
}

/// The devices of these names, or all.
fn find(app: &App, method: &str, names: Option<&[String]>) -> Result<Vec<Shown>, RpcError> {
    let Some(names) = names else { return Ok(app.bdevs.all_shown()) };
    let find = |name: &String| {
        app.bdevs.shown(name).ok_or_else(|| {
            error!("{method}: no bdev {name:?}");
            RpcError::errno(libc::ENODEV)
        })
    };
    names.iter().map(find).collect()
}

/// In SPDK's shape and order. As there, operations that failed are counted under `io_error` only.
fn describe(shown: &Shown) -> Value {
    let totals = shown.bdev.stats().totals();
    let of = |op: Op| totals[op as usize];
    let kinds = [
        ("read", "read", of(Op::Read)),
        ("written", "write", of(Op::Write)),
        ("unmapped", "unmap", of(Op::Unmap)),
        ("copied", "copy", OpCounts::default()),
    ];
    let mut object = Map::new();
    object.insert("name".into(), shown.bdev.name().into());
    for (bytes, ops, counts) in kinds {
        object.insert(format!("bytes_{bytes}"), counts.bytes.into());
        object.insert(format!("num_{ops}_ops"), counts.count.saturating_sub(counts.errors).into());
    }
    for (_, ops, counts) in kinds {
        object.insert(format!("{ops}_latency_ticks"), counts.ticks.into());
        // Not measured.
        object.insert(format!("max_{ops}_latency_ticks"), 0.into());
        object.insert(format!("min_{ops}_latency_ticks"), 0.into());
    }
    // Kinds that have not occurred are left out.
    let kinds = [(FailureKind::Failed, "failed"), (FailureKind::Aio, "aio_error")];
    let failures = shown.bdev.stats().failures();
    let of = |(kind, name): (FailureKind, &str)| (name.to_owned(), failures[kind as usize].into());
    let occurred = kinds.into_iter().filter(|(kind, _)| failures[*kind as usize] > 0);
    object.insert("io_error".into(), Value::Object(occurred.map(of).collect()));
    object.into()
}
