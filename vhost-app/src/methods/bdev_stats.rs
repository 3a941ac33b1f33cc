//! `bdev_get_iostat` and `bdev_reset_iostat`.

use std::rc::Rc;

use bdev::{BdevId, FailureKind, Live, Op, OpCounts};
use reactor::{read_tsc, ticks_per_second};
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;

use super::{Answer, App, Methods};

/// JSON values of a device's counters.
const BDEV_VALUES: usize = 25;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_get_iostat", Phases::Runtime, get_iostat);
    methods.add("bdev_reset_iostat", Phases::Runtime, reset_iostat);
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
    fn apply(self, live: &Live) {
        match self {
            Self::All => live.bdev.stats().reset(),
            Self::Error => live.bdev.stats().reset_failures(),
            Self::Maxmin | Self::None => {}
        }
    }
}

async fn get_iostat(app: Rc<App>, params: Params) -> Answer {
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
    let mut pace = params.pace();
    let all = find(&app, params.method(), wanted.names.as_deref(), &mut pace).await?;
    if wanted.per_channel {
        error!("bdev_get_iostat: counters are not kept per channel");
        return Err(RpcError::errno(libc::EOPNOTSUPP));
    }
    let mut bdevs = vec![];
    for id in all {
        if let Some(live) = app.bdevs.live(id) {
            bdevs.push(describe(&live));
            wanted.reset_mode.unwrap_or(Reset::None).apply(&live);
        }
        pace.spend(BDEV_VALUES).await;
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "ticks": read_tsc(), "bdevs": bdevs }))
}

async fn reset_iostat(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
        mode: Option<Reset>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    let names = wanted.name.map(|name| vec![name]);
    let mut pace = params.pace();
    for id in find(&app, params.method(), names.as_deref(), &mut pace).await? {
        if let Some(live) = app.bdevs.live(id) {
            wanted.mode.unwrap_or(Reset::All).apply(&live);
        }
        pace.spend(BDEV_VALUES).await;
    }
    Ok(true.into())
}

/// The devices of these names, or all.
async fn find(
    app: &App,
    method: &str,
    names: Option<&[String]>,
    pace: &mut Pace,
) -> Result<Vec<BdevId>, RpcError> {
    let Some(names) = names else { return Ok(app.bdevs.ids()) };
    let mut all = vec![];
    for name in names {
        let id = app.bdevs.id(name).ok_or_else(|| {
            error!("{method}: no bdev {name:?}");
            RpcError::errno(libc::ENODEV)
        })?;
        all.push(id);
        // Each lookup scans all devices.
        pace.spend(BDEV_VALUES).await;
    }
    Ok(all)
}

/// In SPDK's shape and order. As there, operations that failed are counted under `io_error` only.
fn describe(live: &Live) -> Value {
    let totals = live.bdev.stats().totals();
    let of = |op: Op| totals[op as usize];
    let kinds = [
        ("read", "read", of(Op::Read)),
        ("written", "write", of(Op::Write)),
        ("unmapped", "unmap", of(Op::Unmap)),
        ("copied", "copy", OpCounts::default()),
    ];
    let mut object = Map::new();
    object.insert("name".into(), live.bdev.name().into());
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
    // Kinds that have not occurred are omitted.
    let kinds = [(FailureKind::Failed, "failed"), (FailureKind::Aio, "aio_error")];
    let failures = live.bdev.stats().failures();
    let of = |(kind, name): (FailureKind, &str)| (name.to_owned(), failures[kind as usize].into());
    let occurred = kinds.into_iter().filter(|(kind, _)| failures[*kind as usize] > 0);
    object.insert("io_error".into(), Value::Object(occurred.map(of).collect()));
    object.into()
}
