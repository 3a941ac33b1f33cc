//! `vhost_create_blk_controller` and `virtio_blk_*`: virtio-blk controllers.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bdev::ClaimKind;
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use vhost_blk::Blk;
use vhost_target::device::Device;
use vhost_target::{ControllerInfo, ControllerSpec};

use super::vhost::{controller_mask, cores, refused};
use super::{Answer, App, Methods};
use crate::devices::{self, BLK_TRANSPORT as TRANSPORT};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("vhost_create_blk_controller", Phases::Runtime, create);
    methods.add_plain("virtio_blk_create_transport", Phases::Runtime, |_, params| {
        create_transport(params)
    });
    methods.add_plain("virtio_blk_get_transports", Phases::Runtime, get_transports);
}

#[derive(Deserialize)]
struct Create {
    ctrlr: String,
    dev_name: String,
    cpumask: Option<String>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    packed_ring: bool,
    transport: Option<String>,
}

impl Create {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode_relaxed(DecodeFailure::INVALID_ARGUMENT)
    }

    fn check_transport(&self, method: &str) -> Result<(), RpcError> {
        match self.transport.as_deref() {
            Some(other) if !other.eq_ignore_ascii_case(TRANSPORT) => {
                Err(refused(method, libc::EINVAL, format_args!("unknown transport {other:?}")))
            }
            _ => Ok(()),
        }
    }
}

/// Checks those parameters of `vhost_create_blk_controller` that name no other object, as the
/// method does, and the controller's name, as the target does.
pub(super) fn check_create(params: &Params, socket_dir: &Path) -> Result<(), RpcError> {
    let (method, p) = (params.method(), Create::decode(params)?);
    p.check_transport(method)?;
    cores(method, p.cpumask.as_deref())?;
    vhost_target::check_name(&p.ctrlr, &socket_dir.join(&p.ctrlr))
        .map_err(|e| refused(method, e.errno(), e))
}

async fn create(app: Rc<App>, params: Params) -> Answer {
    let (method, p) = (params.method(), Create::decode(&params)?);
    p.check_transport(method)?;
    let Some(bdev) = app.bdevs.bdev(&p.dev_name) else {
        return Err(refused(method, libc::ENODEV, format_args!("unknown bdev {:?}", p.dev_name)));
    };
    let claim = app.bdevs.claim(&bdev, ClaimKind::Served, &p.ctrlr).map_err(|_| {
        let reason = format_args!("bdev {} is claimed by a bdev on top of it", bdev.name());
        refused(method, libc::EPERM, reason)
    })?;
    let cores = cores(method, p.cpumask.as_deref())?;
    let device: Arc<dyn Device> = Blk::new(Arc::clone(&bdev), p.readonly);
    let spec = ControllerSpec {
        socket: app.control.socket_path(&p.ctrlr),
        device: Arc::clone(&device),
        name: p.ctrlr.clone(),
        cores,
        packed_ring: p.packed_ring,
    };
    let created = app.control.create_controller(spec).await;
    if !app.bdevs.holds(&bdev) {
        // The bdev was deleted before the controller existed, so the deletion did not remove it
        // from the controller.
        app.control.change(move |target| devices::remove_bdev(target, &bdev)).await;
        app.control.notify();
    }
    created.map_err(|e| refused(method, e.errno(), e))?;
    // Another client may have deleted it since.
    let controller = app.control.target().controller(&p.ctrlr);
    if let Some(controller) = controller.filter(|c| Arc::ptr_eq(&c.device, &device)) {
        app.served.insert((controller.number, None), claim);
    }
    Ok(true.into())
}

pub(super) fn create_transport(params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: String,
    }
    let p: Request = params.decode_relaxed(DecodeFailure::EINVAL)?;
    let is_ours = p.name.eq_ignore_ascii_case(TRANSPORT);
    Err(RpcError::errno(if is_ours { libc::EEXIST } else { libc::ENOENT }))
}

fn get_transports(_: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: Option<String>,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    if request.name.is_some_and(|name| !name.eq_ignore_ascii_case(TRANSPORT)) {
        return Err(RpcError::errno(libc::ENODEV));
    }
    Ok(json!([{ "name": TRANSPORT }]))
}

/// The call that creates a controller again. A controller whose bdev was removed is left out, as in
/// SPDK.
pub(super) fn config(controller: &ControllerInfo) -> Vec<Value> {
    let Some(blk) = Blk::of(&controller.device) else { return vec![] };
    let Some(bdev) = blk.bdev() else { return vec![] };
    vec![json!({
        "method": "vhost_create_blk_controller",
        "params": {
            "ctrlr": controller.name,
            "dev_name": bdev,
            "cpumask": controller_mask(controller),
            "readonly": blk.read_only(),
            // Not in SPDK, whose saved configurations lose it.
            "packed_ring": controller.packed_ring,
            "transport": TRANSPORT,
        }
    })]
}
