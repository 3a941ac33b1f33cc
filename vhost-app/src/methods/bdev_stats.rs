//! `bdev_get_iostat` and `bdev_reset_iostat`.

use std::collections::HashMap;
use std::rc::Rc;

use bdev::{BdevId, FailureKind, Live, OPS, Op, OpCounts};
use reactor::{read_tsc, ticks_per_second};
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;

use super::qd_sampling;
use super::threads::controller_ids;
use super::{Answer, App, Methods};
use crate::devices;

/// JSON values of a device's counters.
pub(super) const BDEV_VALUES: usize = 25;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_get_iostat", Phases::Runtime, get_iostat);
    methods.add("bdev_reset_iostat", Phases::Runtime, reset_iostat);
}

/// Which counters start from zero.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Reset {
    All,
    /// The shortest and the longest latencies.
    Maxmin,
    Error,
    None,
}

impl Reset {
    fn apply(self, live: &Live) {
        match self {
            Self::All => live.bdev.stats().reset(),
            Self::Error => live.bdev.stats().reset_failures(),
            Self::Maxmin => live.bdev.stats().reset_extremes(),
            Self::None => {}
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
    let reset = wanted.reset_mode.unwrap_or(Reset::None);
    if wanted.per_channel {
        let live = all.first().and_then(|id| app.bdevs.live(*id));
        let live = live.ok_or_else(|| RpcError::errno(libc::ENODEV))?;
        let shown = describe_channels(&app, &live);
        reset.apply(&live);
        return Ok(shown);
    }
    let mut bdevs = vec![];
    for id in all {
        if let Some(live) = app.bdevs.live(id) {
            let mut shown = describe(&live);
            shown.extend(qd_sampling::describe(&app, id));
            bdevs.push(Value::from(shown));
            reset.apply(&live);
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

/// One entry for each controller that has the device open, as SPDK has one for each thread. Errors
/// are counted for the device only.
fn describe_channels(app: &App, live: &Live) -> Value {
    let target = app.control.target();
    let mut controllers = HashMap::new();
    for controller in target.controllers() {
        let users = devices::disks(&controller.device).into_iter().filter_map(|disk| disk.user);
        controllers.extend(users.map(|user| (user, controller.number)));
    }
    let mut channels: Vec<(u64, [OpCounts; OPS])> = vec![];
    for (user, counts) in live.bdev.stats().per_channel() {
        let Some(&controller) = controllers.get(&user) else { continue };
        match channels.iter_mut().find(|(other, _)| *other == controller) {
            Some((_, sums)) => sums.iter_mut().zip(&counts).for_each(|(sum, more)| sum.add(more)),
            None => channels.push((controller, counts)),
        }
    }
    let first = controller_ids(target.reactors().len());
    let show = |(controller, counts): (u64, [OpCounts; OPS])| {
        let mut shown = Map::from_iter([("thread_id".to_owned(), (first + controller).into())]);
        insert_counts(&mut shown, &counts);
        shown.insert("io_error".into(), json!({}));
        Value::from(shown)
    };
    json!({
        "tick_rate": ticks_per_second(),
        "ticks": read_tsc(),
        "name": live.bdev.name(),
        "channels": channels.into_iter().map(show).collect::<Vec<_>>(),
    })
}

/// In SPDK's shape and order. As there, operations that failed are counted under `io_error` only.
fn describe(live: &Live) -> Map<String, Value> {
    let mut object = Map::from_iter([("name".to_owned(), live.bdev.name().into())]);
    insert_counts(&mut object, &live.bdev.stats().totals());
    // Kinds that have not occurred are omitted.
    let kinds = [(FailureKind::Failed, "failed"), (FailureKind::Aio, "aio_error")];
    let failures = live.bdev.stats().failures();
    let of = |(kind, name): (FailureKind, &str)| (name.to_owned(), failures[kind as usize].into());
    let occurred = kinds.into_iter().filter(|(kind, _)| failures[*kind as usize] > 0);
    object.insert("io_error".into(), Value::Object(occurred.map(of).collect()));
    object
}

fn insert_counts(object: &mut Map<String, Value>, counts: &[OpCounts; OPS]) {
    let of = |op: Op| counts[op as usize];
    let kinds = [
        ("read", "read", of(Op::Read)),
        ("written", "write", of(Op::Write)),
        ("unmapped", "unmap", of(Op::Unmap)),
        ("copied", "copy", OpCounts::default()),
    ];
    for (bytes, ops, counts) in kinds {
        object.insert(format!("bytes_{bytes}"), counts.bytes.into());
        object.insert(format!("num_{ops}_ops"), counts.count.saturating_sub(counts.errors).into());
    }
    for (_, ops, counts) in kinds {
        object.insert(format!("{ops}_latency_ticks"), counts.ticks.into());
        object.insert(format!("max_{ops}_latency_ticks"), counts.max_ticks.into());
        let min = counts.min_ticks.unwrap_or(0);
        object.insert(format!("min_{ops}_latency_ticks"), min.into());
    }
}
