//! `bdev_*` for devices of every kind, and what the files for each kind share.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::Bdev;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

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

async fn get_bdevs(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
        /// In milliseconds.
        timeout: Option<u64>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    let Some(name) = wanted.name else {
        return Ok(app.bdevs.all_shown().iter().map(describe).collect());
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
    app.bdevs.examine(&named.name);
    Ok(true.into())
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
    devices.iter().for_each(|bdev| app.control.target().remove_bdev(bdev));
    for bdev in devices {
        app.control.remove_bdev(bdev).await;
    }
    Ok(true.into())
}

/// Tells guests that a device and what is on it have another size.
pub(super) fn tell_of_size(app: &App, bdev: &Arc<dyn Bdev>) {
    for bdev in app.bdevs.with_uppers(bdev) {
        app.control.target().bdev_resized(&bdev);
    }
}

/// The entries of `save_config` that make the devices again.
pub(super) fn config(app: &App) -> Vec<Value> {
    let options = app.options.borrow().bdev.config();
    let devices = app
        .bdevs
        .config()
        .into_iter()
        .map(|(kind, params)| json!({ "method": kind.create_method(), "params": params }));
    std::iter::once(options)
        .chain(devices)
        .chain([json!({ "method": "bdev_wait_for_examine" })])
        .collect()
}
