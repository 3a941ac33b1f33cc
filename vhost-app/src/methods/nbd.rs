//! Exports of bdevs over NBD: `nbd_start_disk`, `nbd_stop_disk`, `nbd_get_disks`.
//!
//! SPDK exports to the kernel (`/dev/nbdN`). Here, `nbd_device` can also be `unix:PATH`: then
//! clients such as `qemu-img` connect to a socket, and no kernel module is needed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ::bdev::{Access, Bdev, Claim, ClaimKind};
use nbd_server::{Export, StartError};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{error, info, warn};

use super::{Answer, App, Methods, blocking};
use crate::active_time;
use crate::control::Control;

/// Limit on the wait for the I/O of a stopped export.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Begins the `nbd_device` of an export on a Unix socket.
const SOCKET: &str = "unix:";

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("nbd_start_disk", Phases::Runtime, start);
    methods.add("nbd_stop_disk", Phases::Runtime, stop);
    methods.add_plain("nbd_get_disks", Phases::Runtime, get);
}

/// The exports, in the order of their start.
#[derive(Default)]
pub(crate) struct Exports {
    started: RefCell<Vec<Rc<Exported>>>,
    /// The devices of exports that are being started.
    starting: RefCell<Vec<String>>,
}

/// Reserves a device while its export is being started.
struct Reserved<'a> {
    exports: &'a Exports,
    device: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.exports.starting.borrow_mut().retain(|device| *device != self.device);
    }
}

struct Exported {
    /// The device's path, or [`SOCKET`] and the socket's path as the operator gave it.
    device: String,
    bdev_name: String,
    readonly: bool,
    export: Export,
    /// Held until the last I/O has ended.
    _claim: Claim,
}

impl Exports {
    fn named(&self, device: &str) -> Option<Rc<Exported>> {
        self.started.borrow().iter().find(|one| one.device == device).cloned()
    }

    /// Reserves a device. `None` if it is in use.
    fn reserve(&self, device: &str) -> Option<Reserved<'_>> {
        let mut starting = self.starting.borrow_mut();
        if self.named(device).is_some() || starting.iter().any(|other| other == device) {
            return None;
        }
        starting.push(device.to_owned());
        Some(Reserved { exports: self, device: device.to_owned() })
    }

    /// Stops the exports of a bdev that is being removed. They release it when their I/O has ended.
    pub(super) fn remove_bdev(&self, bdev: &Arc<dyn Bdev>) {
        let (gone, stay) =
            self.started.take().into_iter().partition(|one| one.export.exports(bdev));
        self.started.replace(stay);
        for export in Vec::<Rc<Exported>>::into_iter(gone) {
            info!("NBD export {}: bdev {} was removed", export.device, export.bdev_name);
            export.export.stop();
        }
    }

    /// Stops all exports, at the end of the process. The future ends when their sockets are removed
    /// and their I/O has ended.
    pub(crate) async fn stop_all(&self, control: &Control) {
        let mut changed = control.changed();
        let exports = self.started.take();
        exports.iter().for_each(|one| one.export.stop());
        while !exports.iter().all(|one| one.export.has_ended()) {
            let _ = changed.changed().await;
        }
    }

    /// The calls of `save_config`.
    pub(super) fn config(&self) -> Vec<Value> {
        let entry = |one: &Rc<Exported>| {
            let mut params = json!({ "bdev_name": one.bdev_name, "nbd_device": one.device });
            if one.readonly {
                params["readonly"] = true.into();
            }
            json!({ "method": "nbd_start_disk", "params": params })
        };
        self.started.borrow().iter().map(entry).collect()
    }
}

#[derive(Deserialize)]
struct Start {
    bdev_name: String,
    nbd_device: Option<String>,
    /// Not in SPDK: refuse writes.
    #[serde(default)]
    readonly: bool,
}

/// The way to export.
enum Way {
    Socket(PathBuf),
    Device(PathBuf),
}

async fn start(app: Rc<App>, params: Params) -> Answer {
    let p: Start = params.decode(DecodeFailure::INTERNAL)?;
    let failed = |errno, text: String| {
        error!("nbd_start_disk: {text}");
        RpcError::errno(errno)
    };
    let Some(bdev) = app.bdevs.bdev(&p.bdev_name) else {
        return Err(failed(libc::ENODEV, format!("unknown bdev {:?}", p.bdev_name)));
    };
    let way = way(&app, p.nbd_device.as_deref())?;
    let device = match (&way, p.nbd_device) {
        (Way::Socket(_), Some(given)) => given,
        (Way::Socket(path) | Way::Device(path), _) => path.display().to_string(),
    };
    let Some(_reserved) = app.exports.reserve(&device) else {
        return Err(failed(libc::EBUSY, format!("{device}: the device is in use")));
    };
    let claim = app.bdevs.claim(&bdev, ClaimKind::Served, &device).map_err(|_| {
        failed(libc::EPERM, format!("bdev {} is claimed by a bdev on top of it", bdev.name()))
    })?;
    let bdev_name = bdev.name().to_owned();
    let on_end = app.control.notifier();
    let (on_bound, opener, readonly) = (app.control.on_bound(), app.opener.clone(), p.readonly);
    let exported = Arc::clone(&bdev);
    let started = blocking(move || match way {
        Way::Socket(path) => {
            let on_bound = |path: &Path| on_bound(path);
            Export::start(exported, readonly, &path, on_bound, on_end)
                .map_err(|e| (e.errno(), e.to_string()))
        }
        Way::Device(path) => {
            let file =
                opener.open(&path, Access::ReadWrite).map_err(|e| (e.errno(), e.to_string()))?;
            let started = Export::start_kernel(exported, readonly, file, on_end);
            started.map_err(|e| (e.errno(), hint(&e)))
        }
    });
    let export = match started.await {
        Ok(export) => export,
        // SPDK's code for an address in use.
        Err((libc::EADDRINUSE, text)) => return Err(failed(libc::EBUSY, text)),
        Err((errno, text)) => return Err(failed(errno, text)),
    };
    let exported = Exported { device, bdev_name, readonly: p.readonly, export, _claim: claim };
    if !app.bdevs.holds(&bdev) {
        // The bdev was deleted meanwhile; the deletion did not see the export.
        exported.export.stop();
        drop(bdev);
        app.control.notify();
        return Err(failed(libc::ENODEV, format!("bdev {} was deleted", exported.bdev_name)));
    }
    info!("NBD export {}: bdev {}", exported.device, exported.bdev_name);
    let device = exported.device.clone();
    app.exports.started.borrow_mut().push(Rc::new(exported));
    Ok(device.into())
}

/// Adds to an error of the kernel's driver what an operator can do.
fn hint(e: &StartError) -> String {
    match e.errno() {
        libc::EPERM | libc::EACCES => format!(
            "{e}; the kernel's driver needs CAP_SYS_ADMIN and --no-sandbox; an export on a socket \
             (nbd_device unix:PATH) needs neither"
        ),
        _ => e.to_string(),
    }
}

/// Returns the way that `nbd_device` names.
fn way(app: &App, device: Option<&str>) -> Result<Way, RpcError> {
    let no_device = |text: String| RpcError::new(-i64::from(libc::ENODEV), text);
    let Some(device) = device else {
        let free = nbd_server::first_free_device(Path::new("/sys/block"), Path::new("/dev"));
        return free.map(Way::Device).ok_or_else(|| {
            error!(
                "nbd_start_disk: the kernel has no free NBD device; load its module nbd, or export \
                 on a socket (nbd_device unix:PATH)"
            );
            no_device("nbd device not found".into())
        });
    };
    if let Some(path) = device.strip_prefix(SOCKET).filter(|path| !path.is_empty()) {
        let path = Path::new(path);
        let path = if path.is_absolute() {
            path.to_owned()
        } else {
            // As a controller's socket.
            app.control.socket_path(&path.display().to_string())
        };
        return Ok(Way::Socket(path));
    }
    let number = device.strip_prefix("/dev/nbd").unwrap_or_default();
    if number.is_empty() || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(no_device(format!("illegal nbd device {device}")));
    }
    Ok(Way::Device(device.into()))
}

#[derive(Deserialize)]
struct Named {
    nbd_device: String,
}

async fn stop(app: Rc<App>, params: Params) -> Answer {
    let Named { nbd_device } = params.decode(DecodeFailure::INTERNAL)?;
    let Some(export) = app.exports.named(&nbd_device) else {
        return Err(RpcError::errno(libc::ENODEV));
    };
    app.exports.started.borrow_mut().retain(|one| !Rc::ptr_eq(one, &export));
    export.export.stop();
    params.let_next_start();
    let mut changed = app.control.changed();
    // A task of its own, which also holds the claim: the I/O may never end.
    let ended = tokio::task::spawn_local(async move {
        while !export.export.has_ended() {
            let _ = changed.changed().await;
        }
    });
    if active_time::timeout(STOP_LIMIT, ended).await.is_none() {
        let limit = STOP_LIMIT.as_secs();
        warn!(
            "NBD export {nbd_device}: stopped, but its bdev has not answered I/O for {limit} s; \
             it is released when that I/O has ended"
        );
    }
    Ok(true.into())
}

#[derive(Deserialize)]
struct Get {
    nbd_device: Option<String>,
}

fn get(app: &App, params: &Params) -> Answer {
    let wanted = match params.json() {
        None => None,
        Some(_) => params.decode::<Get>(DecodeFailure::INTERNAL)?.nbd_device,
    };
    let exports = app.exports.started.borrow();
    let shown: Vec<Value> = exports
        .iter()
        .filter(|one| wanted.as_ref().is_none_or(|name| *name == one.device))
        .map(|one| {
            let mut shown = json!({ "nbd_device": one.device, "bdev_name": one.bdev_name });
            if one.device.starts_with(SOCKET) {
                // Not in SPDK.
                shown["clients"] = one.export.clients().into();
            }
            shown
        })
        .collect();
    match wanted {
        Some(_) if shown.is_empty() => Err(RpcError::errno(libc::ENODEV)),
        _ => Ok(shown.into()),
    }
}
