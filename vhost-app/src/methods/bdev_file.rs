//! `bdev_aio_*` and `bdev_uring_*`: disks in files and on block devices.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use bdev::{Bdev, Engine, FileDisk, FileOptions, Flavour};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use tracing::{error, info};

use super::bdev::{Named, delete, tell_of_size};
use super::{Answer, App, GivenUuid, Methods, as_given, bdev_error, blocking, given};
use crate::bdevs::{Disk, Kind};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_aio_create", Phases::Runtime, aio_create);
    methods
        .add("bdev_aio_rescan", Phases::Runtime, |app, params| rescan(app, params, Flavour::Aio));
    methods.add("bdev_aio_delete", Phases::Runtime, |app, params| delete(app, params, Kind::Aio));
    methods.add("bdev_uring_create", Phases::Runtime, uring_create);
    methods.add("bdev_uring_rescan", Phases::Runtime, |app, params| {
        rescan(app, params, Flavour::Uring)
    });
    methods
        .add("bdev_uring_delete", Phases::Runtime, |app, params| delete(app, params, Kind::Uring));
}

#[derive(Deserialize)]
struct AioCreate {
    name: String,
    filename: PathBuf,
    block_size: Option<u32>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    fallocate: bool,
    uuid: Option<GivenUuid>,
    #[serde(default)]
    nowait: bool,
}

async fn aio_create(app: Rc<App>, params: Params) -> Answer {
    let p: AioCreate = params.decode(DecodeFailure::INTERNAL)?;
    let options = FileOptions {
        name: p.name,
        filename: p.filename,
        // SPDK's client and its saved configurations say 0 for "the device's own".
        block_size: p.block_size.filter(|size| *size != 0),
        readonly: p.readonly,
        fallocate: p.fallocate,
        uuid: given(p.uuid),
        flavour: Flavour::Aio,
        engine: None,
    };
    create(&app, &params, options, p.nowait).await
}

async fn uring_create(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct UringCreate {
        name: String,
        filename: PathBuf,
        block_size: Option<u32>,
        uuid: Option<GivenUuid>,
    }
    let p: UringCreate = params.decode(DecodeFailure::INTERNAL)?;
    let options = FileOptions {
        name: p.name,
        filename: p.filename,
        block_size: p.block_size.filter(|size| *size != 0),
        readonly: false,
        fallocate: false,
        uuid: given(p.uuid),
        flavour: Flavour::Uring,
        engine: None,
    };
    // SPDK tells no reason.
    create(&app, &params, options, false)
        .await
        .map_err(|_| RpcError::internal("Unable to create URING bdev."))
}

async fn create(app: &App, params: &Params, mut options: FileOptions, nowait: bool) -> Answer {
    let method = params.method();
    let reserved = app
        .bdevs
        .reserve(Some(options.name.clone()), options.uuid, as_given(params))
        .map_err(RpcError::errno)?;
    options.uuid = Some(reserved.uuid);
    let opener = app.opener.clone();
    let disk = blocking(move || {
        let file = opener.open(&options.filename, options.readonly)?;
        let disk = FileDisk::on(file, options)?;
        if nowait && !disk.is_block_device() {
            let text = format!("nowait on {}, no block device", disk.filename().display());
            return Err(bdev::Error::Unsupported(text));
        }
        Ok(disk)
    });
    let disk = disk.await.map_err(|e| bdev_error(method, &e))?;
    if app.share {
        disk.share();
    } else {
        check_alone(app, &disk).map_err(|e| bdev_error(method, &e))?;
    }
    let (name, file, service) = (disk.name(), disk.filename().display(), disk.service());
    let engine = match service.engine {
        Engine::Aio if disk.readonly() || disk.is_block_device() => "Linux AIO",
        // Linux AIO blocks in writes to a regular file on a frozen file system.
        Engine::Aio => "Linux AIO for reads, worker threads for writes",
        Engine::IoUring => "io_uring",
        Engine::Threads => "worker threads",
    };
    let cache = if service.direct { "O_DIRECT" } else { "page cache" };
    info!("bdev {name}: opened {file} ({cache}), I/O through {engine}");
    let name = disk.name().to_owned();
    reserved.complete(Disk::File(disk));
    Ok(name.into())
}

/// Fails if both this disk and another one may write to the same file or block device: two guests
/// that do not know of each other would destroy each other's data.
fn check_alone(app: &App, disk: &FileDisk) -> Result<(), ::bdev::Error> {
    let writes_there = |other: &&Arc<dyn Bdev>| {
        !other.features().read_only
            && other.storage().is_some()
            && other.storage() == disk.storage()
    };
    if disk.readonly() {
        return Ok(());
    }
    match app.bdevs.all().iter().find(writes_there) {
        Some(other) => Err(::bdev::Error::Busy(format!(
            "bdev {} writes to {} already; start vhost with --share to allow several disks on it",
            other.name(),
            disk.filename().display()
        ))),
        None => Ok(()),
    }
}

async fn rescan(app: Rc<App>, params: Params, flavour: Flavour) -> Answer {
    let method = params.method();
    let named: Named = params.decode(DecodeFailure::INTERNAL)?;
    let Some(Disk::File(disk)) = app.bdevs.disk(&named.name) else {
        error!("{method}: no such bdev of this kind: {:?}", named.name);
        return Err(RpcError::errno(libc::ENODEV));
    };
    if disk.flavour() != flavour {
        error!("{method}: bdev {:?} is of another kind", named.name);
        return Err(RpcError::errno(libc::ENODEV));
    }
    let before = disk.num_blocks();
    let scanned = Arc::clone(&disk);
    let now = blocking(move || scanned.rescan()).await;
    if matches!(now, Ok(now) if now != before) {
        tell_of_size(&app, &(Arc::clone(&disk) as _));
    }
    drop(disk);
    // Somebody may wait for the disk's last user.
    app.control.notify();
    now.map_err(|e| bdev_error(method, &e))?;
    Ok(true.into())
}
