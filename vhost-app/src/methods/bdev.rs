//! `bdev_*` for devices of every kind, and what the files for each kind share.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::Bdev;
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;
use vhost_blk::Blk;

use super::bdev_show::describe;
use super::{Answer, App, Methods};
use crate::bdevs::{Disk, Kind};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_get_bdevs", Phases::Runtime, get_bdevs);
    methods.add_plain("bdev_wait_for_examine", Phases::Runtime, |_, params| {
        params.none("bdev_wait_for_examine requires no parameters")?;
        // A wrapper comes to life within the call that made its base.
        Ok(true.into())
    });
    methods.add_plain("bdev_examine", Phases::Runtime, examine);
}

/// JSON values in a device's description, approximately.
const BDEV_VALUES: usize = 60;

async fn get_bdevs(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
        /// In milliseconds.
        timeout: Option<u64>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    let Some(name) = wanted.name else {
        let mut pace = params.pace();
        let mut all = vec![];
        for id in app.bdevs.ids() {
            all.extend(app.bdevs.shown_by_id(id).as_ref().map(describe));
            pace.spend(BDEV_VALUES).await;
        }
        return Ok(all.into());
    };
    let limit = Duration::from_millis(wanted.timeout.unwrap_or(0));
    let shown = match app.bdevs.shown(&name) {
        Some(shown) => Some(shown),
        None if limit.is_zero() => None,
        None => tokio::select! {
            shown = app.bdevs.wait_for(&name, limit) => shown,
            () = params.client().gone() => None,
        },
    };
    let shown = shown.ok_or_else(|| {
        error!("bdev_get_bdevs: no bdev {name:?}");
        RpcError::errno(if limit.is_zero() { libc::ENODEV } else { libc::ETIMEDOUT })
    })?;
    Ok(json!([describe(&shown)]))
}

fn examine(app: &App, params: &Params) -> Answer {
    let named: Named = params.decode(DecodeFailure::PARAMS)?;
    if app.bdevs.auto_examine.get() {
        error!("bdev_examine: bdevs are examined by themselves");
        return Err(RpcError::errno(libc::EINVAL));
    }
    if let Some(disk) = app.bdevs.disk(&named.name) {
        refuse_if_served(app, params.method(), &*disk.bdev())?;
    }
    app.bdevs.examine(&named.name).map_err(|errno| {
        error!("bdev_examine: {:?} was already given", named.name);
        RpcError::errno(errno)
    })?;
    Ok(true.into())
}

/// Fails if a controller serves this device. Another bdev on it would write to the same blocks, and
/// the controller of such a configuration could not be created when it is loaded.
pub(super) fn refuse_if_served(app: &App, method: &str, bdev: &dyn Bdev) -> Result<(), RpcError> {
    let all = app.control.target().controllers();
    let shows = |device| Blk::of(device).and_then(Blk::bdev).as_deref() == Some(bdev.name());
    match all.iter().find(|controller| shows(&controller.device)) {
        Some(controller) => {
            error!("{method}: bdev {} is served by controller {}", bdev.name(), controller.name);
            Err(RpcError::errno(libc::EPERM))
        }
        None => Ok(()),
    }
}

/// The parameters of a method that only needs a name.
#[derive(Deserialize)]
pub(super) struct Named {
    pub(super) name: String,
}

/// Deletes a device of this kind and what is on it; answers when nobody uses it any more.
pub(super) async fn delete(app: Rc<App>, params: Params, kind: Kind) -> Answer {
    let named: Named = params.decode(DecodeFailure::INTERNAL)?;
    if kind == Kind::Error
        && let Some(Disk::Error(disk)) = app.bdevs.disk(&named.name)
    {
        disk.abort_pending();
    }
    let devices = app.bdevs.remove(&named.name, kind).map_err(|errno| {
        error!("{}: no such bdev of this kind: {:?}", params.method(), named.name);
        RpcError::errno(errno)
    })?;
    // All first, so that none waits for another to be taken away from the guests.
    devices.iter().for_each(|bdev| vhost_blk::remove_bdev(app.control.target(), bdev));
    for bdev in devices {
        app.control.remove_bdev(bdev).await;
    }
    Ok(true.into())
}

/// Tells guests that a device and what is on it have another size.
pub(super) fn tell_of_size(app: &App, bdev: &Arc<dyn Bdev>) {
    for bdev in app.bdevs.with_uppers(bdev) {
        vhost_blk::bdev_resized(app.control.target(), &bdev);
    }
}

/// The entries of `save_config` that make the devices again.
pub(super) async fn config(app: &App, pace: &mut Pace) -> Vec<Value> {
    let mut entries = vec![app.options.borrow().bdev.config()];
    let examine = |name| json!({ "method": "bdev_examine", "params": { "name": name } });
    entries.extend(app.bdevs.examined().into_iter().map(examine));
    for id in app.bdevs.ids() {
        if let Some((kind, mut params)) = app.bdevs.config(id) {
            let updates = if kind == Kind::Delay { legal_latencies(&mut params) } else { vec![] };
            entries.push(json!({ "method": kind.create_method(), "params": params }));
            entries.extend(updates);
        }
        pace.spend(CONFIG_VALUES).await;
    }
    entries.push(json!({ "method": "bdev_wait_for_examine" }));
    entries
}

/// JSON values in a device's part of a configuration, approximately.
const CONFIG_VALUES: usize = 12;

/// `bdev_delay_update_latency` may set a p99 latency below its average, which `bdev_delay_create`
/// refuses. Then the p99 is raised here, and the returned calls set it again.
fn legal_latencies(params: &mut Map<String, Value>) -> Vec<Value> {
    let mut updates = vec![];
    for of in ["read", "write"] {
        let (average, p99) = (format!("avg_{of}_latency"), format!("p99_{of}_latency"));
        let us = |name: &str| params.get(name).and_then(Value::as_u64).unwrap_or(0);
        let (average_us, p99_us) = (us(&average), us(&p99));
        if p99_us < average_us {
            params.insert(p99, average_us.into());
            let name = params.get("name").cloned();
            updates.push(json!({
                "method": "bdev_delay_update_latency",
                "params": {
                    "delay_bdev_name": name,
                    "latency_type": format!("p99_{of}"),
                    "latency_us": p99_us,
                }
            }));
        }
    }
    updates
}
