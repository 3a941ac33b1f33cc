//! `bdev_aio_*` and `bdev_uring_*`: SPDK's two modules for disks in files and on block devices.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info, warn};

use super::{Engine, FileDisk, FileOptions, Flavour, LeaseState, Service};
use crate::contract::Bdev;
use crate::control::Host;
use crate::control::Live;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, GivenUuid, Method, MethodError, Named, Params, given,
};
use crate::control::module::{BdevModule, Description, Entry};
use crate::error::Error;

/// SPDK's module `aio` or `uring`.
pub(crate) struct Module(pub(crate) Flavour);

impl Flavour {
    fn module(self) -> &'static str {
        match self {
            Self::Aio => "aio",
            Self::Uring => "uring",
            Self::Nvme => "nvme",
        }
    }
}

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        self.0.module()
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        if self.0 == Flavour::Aio {
            return vec![
                Method::parsed("bdev_aio_create", parse_aio, aio_create),
                Method::new("bdev_aio_rescan", |host, params| rescan(host, params, Flavour::Aio)),
                Method::new("bdev_aio_delete", |host, params| life::delete(host, params, "aio")),
            ];
        }
        vec![
            Method::parsed("bdev_uring_create", parse_uring, uring_create),
            Method::new("bdev_uring_rescan", |host, params| rescan(host, params, Flavour::Uring)),
            Method::new("bdev_uring_delete", |host, params| life::delete(host, params, "uring")),
        ]
    }
}

struct FileEntry {
    disk: Arc<FileDisk>,
    params: Map<String, Value>,
}

impl Entry for FileEntry {
    fn module(&self) -> &'static str {
        self.disk.flavour().module()
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let filename = self.disk.filename().display().to_string();
        let mut about = json!({ "filename": filename });
        if self.disk.flavour() == Flavour::Aio {
            about["block_size_override"] = self.disk.block_size_override().into();
            about["readonly"] = self.disk.readonly().into();
            about["fallocate"] = self.disk.fallocate().into();
            let nowait = self.params.get("nowait").is_some_and(|nowait| nowait == true);
            about["nowait"] = nowait.into();
        }
        about["io_path"] = self.disk.service().show();
        show_lease(&mut about, self.disk.lease_state());
        Description::specific(self.module(), about)
    }

    fn config(&self) -> Vec<Call> {
        let is_aio = self.disk.flavour() == Flavour::Aio;
        let method = if is_aio { "bdev_aio_create" } else { "bdev_uring_create" };
        vec![Call { method, params: self.params.clone() }]
    }

    fn each_second(&self) {
        self.disk.check_lease();
    }
}

impl Service {
    /// Shows the way in which a file is served, for `driver_specific`. Not in SPDK.
    #[must_use]
    pub fn show(self) -> Value {
        let Self { engine, direct, nowait, workers } = self;
        json!({
            "engine": engine.name(),
            "direct": direct,
            "nowait": nowait,
            "workers": {
                "max": workers.max,
                "threads": workers.threads,
                "busy": workers.busy,
                "queued": workers.queued,
                "longest_s": workers.longest_s,
            },
        })
    }
}

impl FileDisk {
    /// Logs the way in which it does its I/O.
    pub fn log_service(&self) {
        let (name, file, service) = (self.name(), self.filename().display(), self.service());
        let engine = match service.engine {
            Engine::Aio if self.readonly() || self.is_block_device() => "Linux AIO",
            // Linux AIO blocks in writes to a regular file on a frozen file system.
            Engine::Aio => "Linux AIO for reads, worker threads for writes",
            Engine::IoUring => "io_uring",
            Engine::Threads => "worker threads",
        };
        let cache = if service.direct { "O_DIRECT" } else { "page cache" };
        info!("bdev {name}: opened {file} ({cache}), I/O through {engine}");
    }

    /// Warns of a lock call that takes long. Must be called once a second.
    pub fn check_lease(&self) {
        if self.tick_lease() {
            let filename = self.filename().display();
            warn!(
                "bdev {}: locking or unlocking {filename} takes long; check its file system or \
                 file server; rings of this bdev may wait for it",
                self.name()
            );
        }
    }
}

/// Adds to `module` whether rings may use the file, and the process that they wait for. Not in SPDK.
pub fn show_lease(module: &mut Value, lease: LeaseState) {
    module["lease"] = match lease {
        LeaseState::None => "none",
        LeaseState::Waiting(_) => "waiting",
        LeaseState::Held => "held",
    }
    .into();
    if let LeaseState::Waiting(Some(holder)) = lease {
        module["waits_for"] = holder.to_string().into();
    }
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

/// The options, and `nowait`.
fn parse_aio(params: &Params) -> Result<(FileOptions, bool), MethodError> {
    let p: AioCreate = params.decode(DecodeFailure::INTERNAL)?;
    let options = FileOptions {
        name: p.name,
        filename: p.filename,
        // SPDK's client and its saved configurations give 0 for "the device's own".
        block_size: p.block_size.filter(|size| *size != 0),
        readonly: p.readonly,
        fallocate: p.fallocate,
        uuid: given(p.uuid),
        flavour: Flavour::Aio,
        engine: None,
    };
    options.check().map_err(|e| MethodError::of(params.method(), &e))?;
    Ok((options, p.nowait))
}

async fn aio_create(
    host: Rc<dyn Host>,
    params: Params,
    (options, nowait): (FileOptions, bool),
) -> Answer {
    create(&host, &params, options, nowait).await
}

fn parse_uring(params: &Params) -> Result<FileOptions, MethodError> {
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
    options.check().map_err(|e| {
        error!("{}: {e}", params.method());
        uring_failed()
    })?;
    Ok(options)
}

async fn uring_create(host: Rc<dyn Host>, params: Params, options: FileOptions) -> Answer {
    create(&host, &params, options, false).await.map_err(|_| uring_failed())
}

/// SPDK gives no reason.
fn uring_failed() -> MethodError {
    MethodError::internal("Unable to create URING bdev.")
}

async fn create(
    host: &Rc<dyn Host>,
    params: &Params,
    mut options: FileOptions,
    nowait: bool,
) -> Answer {
    let failed = |e: Error| MethodError::of(params.method(), &e);
    let reserved =
        host.registry().reserve(options.name.clone(), options.uuid).map_err(MethodError::errno)?;
    options.uuid = Some(reserved.uuid);
    let open_file = host.open_file();
    let disk = host.blocking(move || {
        let file = open_file(&options.filename, options.access())?;
        let disk = FileDisk::on(file, options)?;
        if nowait && !disk.is_block_device() {
            let text = format!("nowait on {}: not a block device", disk.filename().display());
            return Err(Error::Unsupported(text));
        }
        Ok(disk)
    });
    let disk = disk.await.map_err(failed)?;
    if host.shares_files() {
        disk.share();
    } else {
        check_alone(&**host, &disk).map_err(failed)?;
    }
    disk.log_service();
    let name = disk.name().to_owned();
    let params = params.as_named(&name, reserved.uuid);
    life::add(host, reserved, Rc::new(FileEntry { disk, params })).await?;
    Ok(name.into())
}

/// Fails if both this disk and another one may write to the same file or block device: two guests
/// that do not know of each other would corrupt each other's data.
///
/// # Errors
/// EBUSY, with the other bdev.
pub fn check_alone(host: &dyn Host, disk: &FileDisk) -> Result<(), Error> {
    let writes_there = |other: &Live| {
        !other.bdev.features().read_only
            && other.bdev.storage().is_some()
            && other.bdev.storage() == disk.storage()
    };
    if disk.readonly() {
        return Ok(());
    }
    match host.registry().all().into_iter().find(writes_there) {
        Some(other) => Err(Error::Busy(format!(
            "bdev {} writes to {} already; start vhost with --share to allow several disks on it",
            other.bdev.name(),
            disk.filename().display()
        ))),
        None => Ok(()),
    }
}

async fn rescan(host: Rc<dyn Host>, params: Params, flavour: Flavour) -> Answer {
    let method = params.method();
    let named: Named = params.decode(DecodeFailure::INTERNAL)?;
    let Some(entry) = host.registry().entry::<FileEntry>(&named.name) else {
        error!("{method}: no aio or uring bdev has this name: {:?}", named.name);
        return Err(MethodError::errno(libc::ENODEV));
    };
    if entry.disk.flavour() != flavour {
        error!("{method}: bdev {:?} is not of this module", named.name);
        return Err(MethodError::errno(libc::ENODEV));
    }
    let disk = Arc::clone(&entry.disk);
    // It may be deleted meanwhile.
    drop(entry);
    let before = disk.num_blocks();
    let scanned = Arc::clone(&disk);
    let now = host.blocking(move || scanned.rescan()).await;
    if matches!(now, Ok(now) if now != before) {
        life::resized(&host, &(Arc::clone(&disk) as _));
    }
    drop(disk);
    // A task may wait for the disk's last user.
    host.released();
    now.map_err(|e| MethodError::of(method, &e))?;
    Ok(true.into())
}
