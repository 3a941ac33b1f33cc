//! `bdev_virtio_attach_controller` and `bdev_virtio_detach_controller`.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use bdev::method::{Answer, Call, DecodeFailure, Method, MethodError, Named, Params};
use bdev::module::{BdevModule, Description, Entry};
use bdev::{Aside, Bdev, Error, Host, life};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info};

use crate::connection::LIMIT;
use crate::disk::{VirtioDisk, VirtioOptions};
use crate::size::Size;

const NAME: &str = "virtio";
const ATTACH: &str = "bdev_virtio_attach_controller";

/// The maximum number of attempts to connect at the same time, including those that hang after
/// their RPC has failed.
const CONNECTING_MAX: usize = 64;

/// SPDK's module `virtio`, for other vhost-user servers of disks.
pub struct VirtioModule {
    connecting: Aside,
}

impl Default for VirtioModule {
    fn default() -> Self {
        Self { connecting: Aside::new("vhost-user servers", CONNECTING_MAX) }
    }
}

impl BdevModule for VirtioModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(ATTACH, parse, move |host, params, options| {
                attach(Rc::clone(&self), host, params, options)
            }),
            Method::new("bdev_virtio_detach_controller", detach),
        ]
    }
}

struct VirtioEntry {
    disk: Arc<VirtioDisk>,
    params: Map<String, Value>,
    queues: u16,
    queue_size: u16,
}

impl Entry for VirtioEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let about = json!({
            "vq_count": self.queues,
            "vq_size": self.queue_size,
            "type": "user",
            "socket": self.disk.socket(),
            // Not in SPDK.
            "connected": self.disk.is_connected(),
        });
        Description::specific(NAME, about)
    }

    fn config(&self) -> Vec<Call> {
        vec![Call { method: ATTACH, params: self.params.clone() }]
    }

    fn deleting(&self) {
        self.disk.end();
    }
}

#[derive(Deserialize)]
struct Attach {
    name: String,
    trtype: String,
    traddr: String,
    dev_type: String,
    vq_count: Option<u32>,
    vq_size: Option<u32>,
}

/// SPDK's default number of queues, and of entries in each.
const VQ_COUNT: u16 = 1;
const VQ_SIZE: u16 = 512;

/// SPDK's error for every failure to attach.
const FAILED: DecodeFailure = DecodeFailure { code: -32602, text: "Invalid argument" };

fn failed(e: &Error) -> MethodError {
    error!("{ATTACH}: {e}");
    MethodError { code: FAILED.code, text: FAILED.text.to_owned() }
}

/// Decodes the parameters, and refuses those that are out of range.
fn parse(params: &Params) -> Result<VirtioOptions, MethodError> {
    let p: Attach = params.decode(FAILED)?;
    let unsupported = |what: String| failed(&Error::Unsupported(what));
    if p.trtype != "user" {
        return Err(unsupported(format!("trtype {}: expected user", p.trtype)));
    }
    if p.dev_type != "blk" {
        return Err(unsupported(format!("dev_type {}: expected blk", p.dev_type)));
    }
    let number = |given: Option<u32>, default: u16| {
        given.map_or(Ok(default), |given| {
            u16::try_from(given).map_err(|_| {
                failed(&Error::Invalid(format!("vq_count or vq_size {given} is above 65535")))
            })
        })
    };
    let options = VirtioOptions {
        queues: number(p.vq_count, VQ_COUNT)?,
        queue_size: number(p.vq_size, VQ_SIZE)?,
        name: p.name,
        socket: PathBuf::from(p.traddr),
    };
    options.check().map_err(|e| failed(&e))?;
    Ok(options)
}

async fn attach(
    module: Rc<VirtioModule>,
    host: Rc<dyn Host>,
    params: Params,
    options: VirtioOptions,
) -> Answer {
    let VirtioOptions { queues, queue_size, .. } = options;
    let reserved =
        host.registry().reserve(options.name.clone(), None).map_err(MethodError::errno)?;
    // Connecting may wait for the server.
    params.let_next_start();
    let connect = move || VirtioDisk::connect(options);
    let disk = module.connecting.run(&host, LIMIT, connect).await.map_err(|e| failed(&e))?;
    let name = disk.name().to_owned();
    info!("bdev {name}: connected to {}", disk.socket().display());
    let params = params.as_given();
    let size = Arc::clone(disk.size());
    let growth = tell_of_growth(Rc::clone(&host), Arc::downgrade(&disk), size);
    let entry = Rc::new(VirtioEntry { disk, params, queues, queue_size });
    life::add(&host, reserved, entry).await?;
    host.spawn(Box::pin(growth));
    Ok(json!([name]))
}

/// Tells the users of a disk when it has grown, until it is deleted. Holds it only while it does so.
async fn tell_of_growth(host: Rc<dyn Host>, disk: Weak<VirtioDisk>, size: Arc<Size>) {
    while size.grown().await {
        let Some(disk) = disk.upgrade() else { return };
        let disk: Arc<dyn Bdev> = disk;
        life::resized(&host, &disk);
        drop(disk);
        // A deletion may wait until nobody holds the disk.
        host.released();
    }
}

async fn detach(host: Rc<dyn Host>, params: Params) -> Answer {
    let Named { name } = params.decode(DecodeFailure::INTERNAL)?;
    let Some(id) =
        host.registry().id(&name).filter(|_| host.registry().entry::<VirtioEntry>(&name).is_some())
    else {
        error!("{}: no virtio bdev has the name {name:?}", params.method());
        return Err(MethodError::errno(libc::ENODEV));
    };
    life::remove(&host, &params, &[id]).await;
    Ok(true.into())
}
