//! `vhost_*_scsi_controller`, `vhost_scsi_*` and `scsi_*`: virtio-scsi controllers and their
//! targets.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bdev::ClaimKind;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::task::spawn_local;
use tracing::error;
use vhost_scsi::{AddError, RemoveError, Scsi, TARGETS_MAX};
use vhost_target::device::Device;
use vhost_target::{ControllerInfo, ControllerSpec, Error};

use super::served::{Adding, Place};
use super::vhost::{controller_mask, cores, limit, refused};
use super::{Answer, App, Methods, Startup};
use crate::{active_time, devices};

/// Default of `timeout_ms` of `vhost_scsi_controller_remove_target`.
const REMOVE_TIMEOUT_MS: u64 = 5000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("vhost_create_scsi_controller", Phases::Runtime, create);
    methods.add("vhost_start_scsi_controller", Phases::Runtime, start);
    methods.add("vhost_scsi_controller_add_target", Phases::Runtime, add_target);
    methods.add("vhost_scsi_controller_remove_target", Phases::Runtime, remove_target);
    methods.add("scsi_get_devices", Phases::Runtime, get_devices);
}

#[derive(Deserialize)]
struct Create {
    ctrlr: String,
    cpumask: Option<String>,
    /// The socket is opened by `vhost_start_scsi_controller`.
    #[serde(default)]
    delay: bool,
    /// Not in SPDK.
    #[serde(default)]
    packed_ring: bool,
}

impl Create {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INVALID_ARGUMENT)
    }
}

/// Checks the parameters of `vhost_create_scsi_controller` as the method and the target do.
pub(super) fn check_create(params: &Params, socket_dir: &Path) -> Result<(), RpcError> {
    let (method, p) = (params.method(), Create::decode(params)?);
    cores(method, p.cpumask.as_deref())?;
    vhost_target::check_name(&p.ctrlr, &socket_dir.join(&p.ctrlr))
        .map_err(|e| refused(method, e.errno(), e))
}

async fn create(app: Rc<App>, params: Params) -> Answer {
    let (method, p) = (params.method(), Create::decode(&params)?);
    let spec = ControllerSpec {
        socket: app.control.socket_path(&p.ctrlr),
        device: Scsi::new(&p.ctrlr, &app.scsi_units),
        cores: cores(method, p.cpumask.as_deref())?,
        name: p.ctrlr,
        packed_ring: p.packed_ring,
    };
    let (name, is_loading) = (spec.name.clone(), *app.startup.borrow() != Startup::Running);
    let created = if p.delay || is_loading {
        app.control.target().create_delayed_controller(spec)
    } else {
        app.control.create_controller(spec).await
    };
    created.map_err(|e| refused(method, e.errno(), e))?;
    let mut loaded = app.loaded.borrow_mut();
    // An earlier one of this name was deleted.
    loaded.retain(|other| *other != name);
    if is_loading && !p.delay {
        loaded.push(name);
    }
    Ok(true.into())
}

/// Opens the sockets of the controllers that the configuration has created without `delay`. Had they
/// been open earlier, a front end that reconnects after a crash could get BAD_TARGET for targets that
/// the configuration adds after the controller.
///
/// # Errors
/// The first error, which is logged like all others. The other sockets are open.
pub(crate) async fn start_loaded(app: &App) -> Result<(), Error> {
    let mut result = Ok(());
    for name in app.loaded.take() {
        match app.control.start_controller(name.clone()).await {
            // It was deleted again.
            Ok(()) | Err(Error::NoController(_)) => {}
            Err(e) => {
                error!("controller {name}: cannot open its socket: {e}");
                result = result.and(Err(e));
            }
        }
    }
    result
}

async fn start(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Start {
        ctrlr: String,
    }
    let (method, p) = (params.method(), params.decode::<Start>(DecodeFailure::INVALID_ARGUMENT)?);
    Controller::find(&app, method, &p.ctrlr)?;
    let started = app.control.start_controller(p.ctrlr).await;
    started.map_err(|e| refused(method, e.errno(), e))?;
    Ok(true.into())
}

/// A controller that has a virtio-scsi device.
struct Controller {
    name: String,
    number: u64,
    device: Arc<dyn Device>,
}

impl Controller {
    fn find(app: &App, method: &str, name: &str) -> Result<Self, RpcError> {
        let Some(ControllerInfo { name, number, device, .. }) =
            app.control.target().controller(name)
        else {
            let reason = format_args!("controller {name} does not exist");
            return Err(refused(method, libc::ENODEV, reason));
        };
        if Scsi::of(&device).is_none() {
            let reason = format_args!("controller {name} is not a SCSI controller");
            return Err(refused(method, libc::EINVAL, reason));
        }
        Ok(Self { name, number, device })
    }

    fn scsi(&self) -> &Scsi {
        scsi(&self.device)
    }

    fn place(&self, target: u8) -> Place {
        (self.number, Some(target))
    }

    fn exists(&self, app: &App) -> bool {
        let controller = app.control.target().controller(&self.name);
        controller.is_some_and(|controller| controller.number == self.number)
    }

    /// Reserves the place of a new target: this one, or the first that is free.
    fn reserve<'a>(&self, app: &'a App, wanted: Option<u8>) -> Result<(u8, Adding<'a>), AddError> {
        let is_free =
            |number| self.scsi().is_free(number) && !app.served.is_adding(self.place(number));
        let number = match wanted {
            Some(number) if is_free(number) => number,
            Some(number) => return Err(AddError::Exists(number)),
            None => (0..).take(TARGETS_MAX).find(|n| is_free(*n)).ok_or(AddError::NoSpace)?,
        };
        Ok((number, app.served.begin(self.place(number))))
    }
}

fn scsi(device: &Arc<dyn Device>) -> &Scsi {
    Scsi::of(device).expect("the kind of a controller's device was checked and does not change")
}

#[derive(Deserialize)]
struct AddTarget {
    ctrlr: String,
    /// Less than 0: the first that is free.
    scsi_target_num: i32,
    bdev_name: String,
}

impl AddTarget {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INVALID_ARGUMENT)
    }

    fn number(&self) -> Result<Option<u8>, AddError> {
        if self.scsi_target_num < 0 {
            return Ok(None);
        }
        target_number(self.scsi_target_num.unsigned_abs()).map(Some).ok_or(AddError::Number)
    }
}

fn target_number(number: u32) -> Option<u8> {
    u8::try_from(number).ok().filter(|number| usize::from(*number) < TARGETS_MAX)
}

fn not_added(method: &str, e: AddError) -> RpcError {
    let errno = match &e {
        AddError::Number | AddError::Blocks(_) | AddError::Removed(_) => libc::EINVAL,
        AddError::Exists(_) => libc::EEXIST,
        AddError::NoSpace => libc::ENOSPC,
        AddError::Open(e) => e.errno(),
    };
    refused(method, errno, e)
}

/// Checks the parameters of `vhost_scsi_controller_add_target` that name no other object.
pub(super) fn check_add(params: &Params) -> Result<(), RpcError> {
    let number = AddTarget::decode(params)?.number();
    number.map(drop).map_err(|e| not_added(params.method(), e))
}

/// Adds a target, and answers its number when all running guests can use it.
async fn add_target(app: Rc<App>, params: Params) -> Answer {
    let (method, p) = (params.method(), AddTarget::decode(&params)?);
    let controller = Controller::find(&app, method, &p.ctrlr)?;
    // In SPDK's order: a place that is used is noticed before a bdev that does not exist.
    let reserved = p.number().and_then(|wanted| controller.reserve(&app, wanted));
    let (number, _adding) = reserved.map_err(|e| not_added(method, e))?;
    let unusable = |reason: &str| {
        refused(method, libc::EINVAL, format_args!("bdev {:?} {reason}", p.bdev_name))
    };
    let bdev = app.bdevs.bdev(&p.bdev_name).ok_or_else(|| unusable("does not exist"))?;
    let claim = app
        .bdevs
        .claim(&bdev, ClaimKind::Served, &p.ctrlr)
        .map_err(|_| unusable("is claimed by a bdev on top of it"))?;
    let (device, shown) = (Arc::clone(&controller.device), Arc::clone(&bdev));
    let added = app
        .control
        .change(move |target| scsi(&device).add_target(target, Some(number), &shown))
        .await;
    let is_held = app.bdevs.holds(&bdev);
    if !is_held {
        // The bdev was deleted, perhaps before the controller showed it. This reference may be the
        // last, and to free a disk's memory may take long.
        app.control.change(move |target| devices::remove_bdev(target, &bdev)).await;
        app.control.notify();
    }
    added.map_err(|e| not_added(method, e))?;
    if !is_held {
        return Err(unusable("was deleted"));
    }
    if !controller.exists(&app) {
        let reason = format_args!("controller {} was deleted", p.ctrlr);
        return Err(refused(method, libc::ENODEV, reason));
    }
    app.served.insert(controller.place(number), claim);
    Ok(number.into())
}

#[derive(Deserialize)]
struct RemoveTarget {
    ctrlr: String,
    scsi_target_num: u32,
    /// Not in SPDK: limit on the wait for queues that use the target; 0 does not wait.
    timeout_ms: Option<u64>,
}

impl RemoveTarget {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INVALID_ARGUMENT)
    }

    fn number(&self, method: &str) -> Result<u8, RpcError> {
        let number = target_number(self.scsi_target_num);
        number.ok_or_else(|| refused(method, libc::EINVAL, RemoveError::Number))
    }
}

/// Checks the parameters of `vhost_scsi_controller_remove_target`.
pub(super) fn check_remove(params: &Params) -> Result<(), RpcError> {
    RemoveTarget::decode(params)?.number(params.method()).map(drop)
}

/// Removes a target, and answers when no queue uses it any more.
async fn remove_target(app: Rc<App>, params: Params) -> Answer {
    let (method, p) = (params.method(), RemoveTarget::decode(&params)?);
    let controller = Controller::find(&app, method, &p.ctrlr)?;
    let number = p.number(method)?;
    let busy = |reason: String| refused(method, libc::EBUSY, reason);
    if app.served.is_adding(controller.place(number)) {
        return Err(busy(format!("target {number} is being added")));
    }
    // Before other calls run, which may add another target to the place once it is free.
    let claim = app.served.remove(controller.place(number));
    let device = Arc::clone(&controller.device);
    app.control
        .change(move |target| scsi(&device).remove_target(target, number))
        .await
        .map_err(|e| busy(e.to_string()))?;
    // Free, or used by another target since.
    let is_removed = move |controller: &Controller| {
        let scsi = controller.scsi();
        scsi.is_free(number) || scsi.targets().iter().any(|target| target.number == number)
    };
    if is_removed(&controller) {
        let device = Arc::clone(&controller.device);
        app.control.change(move |target| scsi(&device).target_released(target)).await;
        return Ok(true.into());
    }
    params.let_next_start();
    let limit = limit(p.timeout_ms, REMOVE_TIMEOUT_MS);
    // A task of its own, which also holds the claim: the I/O may never end.
    let released = spawn_local(async move {
        app.control.until(|| is_removed(&controller)).await;
        // The leases of its bdev are given up.
        let device = Arc::clone(&controller.device);
        app.control.change(move |target| scsi(&device).target_released(target)).await;
        drop(claim);
    });
    match active_time::timeout(limit, released).await {
        Some(_) => Ok(true.into()),
        None => Err(busy(format!(
            "controller {}: target {number} still has I/O in flight after {} ms; guests do not \
             see it any more, and it is removed when that I/O has ended",
            p.ctrlr,
            limit.as_millis()
        ))),
    }
}

/// JSON values of a SCSI device.
const DEVICE_VALUES: usize = 4;

async fn get_devices(app: Rc<App>, params: Params) -> Answer {
    params.none("scsi_get_devices requires no parameters")?;
    let (mut pace, mut all) = (params.pace(), vec![]);
    for controller in app.control.target().controllers() {
        let targets = Scsi::of(&controller.device).map(Scsi::targets).unwrap_or_default();
        pace.spend(1 + targets.len() * DEVICE_VALUES).await;
        all.extend(targets.into_iter().map(|target| (target.device, target.number)));
    }
    all.sort_unstable();
    let describe = |(id, number)| json!({ "id": id, "device_name": devices::target_name(number) });
    Ok(all.into_iter().map(describe).collect())
}

/// The calls that create a controller again, in SPDK's order. Guests can connect to it when it has
/// all its targets.
pub(super) fn config(controller: &ControllerInfo) -> Vec<Value> {
    let Some(scsi) = Scsi::of(&controller.device) else { return vec![] };
    let ctrlr = &controller.name;
    let call = |method: &str, params: Value| json!({ "method": method, "params": params });
    let mut create = json!({
        "ctrlr": ctrlr,
        "cpumask": controller_mask(controller),
        "delay": true,
    });
    if controller.packed_ring {
        // SPDK refuses it.
        create["packed_ring"] = true.into();
    }
    let mut calls = vec![call("vhost_create_scsi_controller", create)];
    calls.extend(scsi.targets().into_iter().map(|target| {
        let params = json!({
            "ctrlr": ctrlr,
            "scsi_target_num": target.number,
            "bdev_name": target.bdev,
        });
        call("vhost_scsi_controller_add_target", params)
    }));
    // Unlike SPDK, a controller that waits to be started waits again.
    if !controller.delayed {
        calls.push(call("vhost_start_scsi_controller", json!({ "ctrlr": ctrlr })));
    }
    calls
}
