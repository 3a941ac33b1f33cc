//! `bdev_*` for bdevs of every kind: show them, examine them, save them.

use std::rc::Rc;
use std::time::Duration;

use bdev::method::Call;
use bdev::{BdevId, ClaimKind, Host, life};
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

use super::bdev_show::describe;
use super::{Answer, App, Methods, bdev_histogram, bdev_qos};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_get_bdevs", Phases::Runtime, get_bdevs);
    methods.add("bdev_wait_for_examine", Phases::Runtime, wait_for_examine);
    methods.add("bdev_examine", Phases::Runtime, examine);
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
            all.extend(show(&app, id));
            pace.spend(BDEV_VALUES).await;
        }
        return Ok(all.into());
    };
    let limit = Duration::from_millis(wanted.timeout.unwrap_or(0));
    let id = match app.bdevs.id(&name) {
        Some(id) => Some(id),
        None if limit.is_zero() => None,
        None => {
            params.let_next_start();
            tokio::select! {
                id = wait_for(&app, &name, limit) => id,
                () = params.client().gone() => None,
            }
        }
    };
    let shown = id.and_then(|id| show(&app, id)).ok_or_else(|| {
        error!("bdev_get_bdevs: no bdev {name:?}");
        RpcError::errno(if limit.is_zero() { libc::ENODEV } else { libc::ETIMEDOUT })
    })?;
    Ok(json!([shown]))
}

fn show(app: &App, id: BdevId) -> Option<Value> {
    let live = app.bdevs.live(id)?;
    Some(describe(&live, app.bdevs.alias(id).as_deref(), app.bdevs.claim_type(id)))
}

/// Waits until a bdev of this name is there, for `limit` at most.
async fn wait_for(app: &App, name: &str, limit: Duration) -> Option<BdevId> {
    let mut changed = app.bdevs_changed.subscribe();
    let wait = async {
        loop {
            if let Some(id) = app.bdevs.id(name) {
                return id;
            }
            // The sender lives as long as `app`.
            let _ = changed.changed().await;
        }
    };
    crate::active_time::timeout(limit, wait).await
}

async fn wait_for_examine(app: Rc<App>, params: Params) -> Answer {
    params.none("bdev_wait_for_examine requires no parameters")?;
    params.let_next_start();
    let mut changed = app.bdevs_changed.subscribe();
    while app.bdevs.is_examining() {
        let _ = changed.changed().await;
    }
    Ok(true.into())
}

/// Why `bdev_examine` is refused, unless `bdev_set_options` has set `bdev_auto_examine` to false.
pub(crate) const EXAMINED_BY_THEMSELVES: &str = "bdevs are examined by themselves";

async fn examine(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let Named { name } = params.decode(DecodeFailure::PARAMS)?;
    if app.bdevs.auto_examine() {
        error!("bdev_examine: {EXAMINED_BY_THEMSELVES}");
        return Err(RpcError::errno(libc::EINVAL));
    }
    refuse_if_served(&app, params.method(), &name)?;
    app.bdevs.examine(&name).map_err(|errno| {
        error!("bdev_examine: {name:?} was already given");
        RpcError::errno(errno)
    })?;
    let host: Rc<dyn Host> = app;
    life::settle(&host).await;
    Ok(true.into())
}

/// Fails if there is such a bdev and a controller serves it. What comes to life on it would write
/// to the same blocks, and the controller of such a configuration could not be created when it is
/// loaded.
fn refuse_if_served(app: &App, method: &str, name: &str) -> Result<(), RpcError> {
    let Some(bdev) = app.bdevs.bdev(name) else { return Ok(()) };
    match app.bdevs.claim(&bdev, ClaimKind::WriteExclusive, method) {
        Err(other) if other.kind == ClaimKind::Served => {
            error!("{method}: bdev {} is served by controller {}", bdev.name(), other.owner);
            Err(RpcError::errno(libc::EPERM))
        }
        _ => Ok(()),
    }
}

/// The entries of `save_config` that make the devices again.
pub(super) async fn config(app: &App, pace: &mut Pace) -> Vec<Value> {
    let mut entries = vec![app.options.borrow().bdev.config()];
    let examine = |name| json!({ "method": "bdev_examine", "params": { "name": name } });
    entries.extend(app.bdevs.examined().into_iter().map(examine));
    entries.extend(app.options.borrow().kept.config("bdev"));
    let entry = |call: Call| json!({ "method": call.method, "params": call.params });
    entries.extend(app.modules.iter().flat_map(|module| module.config()).map(entry));
    for id in app.bdevs.ids() {
        entries.extend(app.bdevs.config(id).into_iter().map(entry));
        pace.spend(CONFIG_VALUES).await;
    }
    for id in app.bdevs.ids() {
        if let Some(live) = app.bdevs.live(id) {
            entries.extend(bdev_qos::config(&*live.bdev));
            entries.extend(bdev_histogram::config(app, id, &*live.bdev));
        }
        pace.spend(CONFIG_VALUES).await;
    }
    entries.push(json!({ "method": "bdev_wait_for_examine" }));
    entries
}

/// JSON values in a device's part of a configuration, approximately.
const CONFIG_VALUES: usize = 12;
