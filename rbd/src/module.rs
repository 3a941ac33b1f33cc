//! `bdev_rbd_*`.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::method::{
    Answer, Call, DecodeFailure, GivenUuid, LocalFuture, Method, MethodError, Named, Params, given,
};
use bdev::module::{BdevModule, Description, Entry};
use bdev::{Aside, Bdev, Error, Host, Registry, checked_size, life};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tracing::{error, info};

use crate::cluster::{Cluster, ClusterOptions, ConfigFile};
use crate::clusters::{Clusters, LIMIT};
use crate::cpus;
use crate::disk::{RbdDisk, RbdOptions};
use crate::image::{Image, ImageName};
use crate::watch;
use crate::worker::Mode;

pub(crate) const NAME: &str = "rbd";
const CREATE: &str = "bdev_rbd_create";
const REGISTER: &str = "bdev_rbd_register_cluster";

/// The maximum number of operations of RPCs on clusters at the same time, including those that hang
/// after their RPC has failed.
const OPERATIONS_MAX: usize = 64;

/// SPDK's module `rbd`.
pub struct RbdModule {
    clusters: Rc<Clusters>,
    operations: Aside,
    /// The number of the next bdev without a name.
    next_number: Cell<u64>,
}

impl Default for RbdModule {
    fn default() -> Self {
        Self {
            clusters: Rc::default(),
            operations: Aside::new("Ceph RBD", OPERATIONS_MAX),
            next_number: Cell::new(0),
        }
    }
}

impl BdevModule for RbdModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let module = || Rc::clone(&self);
        let (one, two, three, four, five) = (module(), module(), module(), module(), module());
        vec![
            Method::new(REGISTER, move |host, params| register(Rc::clone(&one), host, params)),
            Method::new("bdev_rbd_unregister_cluster", move |host, params| {
                unregister(Rc::clone(&two), host, params)
            }),
            Method::new("bdev_rbd_get_clusters_info", move |_, params| {
                get_clusters_info(Rc::clone(&three), params)
            }),
            Method::parsed(CREATE, parse, move |host, params, p| {
                create(Rc::clone(&four), host, params, p)
            }),
            Method::new("bdev_rbd_delete", |host, params| life::delete(host, params, NAME)),
            Method::new("bdev_rbd_resize", move |host, params| {
                resize(Rc::clone(&five), host, params)
            }),
        ]
    }

    fn config(&self) -> Vec<Call> {
        self.clusters.all().into_iter().map(|params| Call { method: REGISTER, params }).collect()
    }
}

impl RbdModule {
    fn next_name(&self, registry: &Registry) -> String {
        loop {
            let number = self.next_number.replace(self.next_number.get() + 1);
            let name = format!("Ceph{number}");
            if !registry.is_taken(&name) {
                return name;
            }
        }
    }
}

/// A disk, and what the module knows of it.
pub(crate) struct RbdEntry {
    module: Rc<RbdModule>,
    disk: Arc<RbdDisk>,
    params: Map<String, Value>,
    /// Seconds until the next attempt to open the image again.
    next_try_s: Cell<u32>,
}

impl RbdEntry {
    /// The registered cluster that it uses, if any.
    fn cluster_name(&self) -> Option<&str> {
        self.params.get("cluster_name").and_then(Value::as_str)
    }
}

impl Entry for RbdEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let mut about = Map::new();
        let mut show = |from: &Map<String, Value>, keys: &[&str]| {
            for key in keys {
                if let Some(value) = from.get(*key) {
                    about.insert((*key).to_owned(), value.clone());
                }
            }
        };
        show(&self.params, &["pool_name", "rbd_name"]);
        match self.cluster_name() {
            Some(name) => {
                let of_cluster = self.module.clusters.params(name).unwrap_or_default();
                show(&of_cluster, &["user_id", "config_param", "config_file", "key_file"]);
            }
            None => show(&self.params, &["user_id", "config"]),
        }
        // Not in SPDK.
        show(&self.params, &["namespace", "timeout"]);
        let state = match self.disk.shared().mode() {
            Mode::Serving => "serving",
            Mode::Reopening => "reopening",
            Mode::Refused | Mode::Ended => "refused",
        };
        about.insert("state".into(), state.into());
        Description::specific(NAME, about.into())
    }

    fn config(&self) -> Vec<Call> {
        vec![Call { method: CREATE, params: self.params.clone() }]
    }

    fn deleting(&self) {
        self.disk.shared().set_deleted();
    }

    fn each_second(&self) {
        if matches!(self.disk.shared().mode(), Mode::Serving | Mode::Ended) {
            return;
        }
        match self.next_try_s.get() {
            0 => {
                self.next_try_s.set(watch::TRY_INTERVAL_S - 1);
                self.disk.shared().events().any.notify_one();
            }
            left => self.next_try_s.set(left - 1),
        }
    }

    fn release(&self) -> Option<LocalFuture<'static, ()>> {
        let image = self.disk.shared().take_image()?;
        let (done, released) = oneshot::channel();
        let close = move || {
            image.close();
            let _ = done.send(());
        };
        std::thread::Builder::new().name("vhost-rbd-close".into()).spawn(close).ok()?;
        Some(Box::pin(async {
            let _ = released.await;
        }))
    }
}

/// Logs the reason of a failure, and returns the error with SPDK's code, which is the same for
/// every failure of this kind.
fn refused(method: &str, e: &Error, errno: i32) -> MethodError {
    error!("{method}: {e}");
    MethodError::errno(errno)
}

#[derive(Deserialize)]
struct Register {
    name: String,
    user_id: Option<String>,
    #[serde(default)]
    config_param: BTreeMap<String, String>,
    config_file: Option<String>,
    key_file: Option<String>,
    core_mask: Option<String>,
}

async fn register(module: Rc<RbdModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    let p: Register = params.decode(DecodeFailure::INTERNAL)?;
    let failed = |e: &Error| refused(REGISTER, e, libc::EPERM);
    let check_name = |name: &str| match module.clusters.is_registered(name) {
        true => Err(failed(&Error::Invalid(format!("a cluster is already registered as {name}")))),
        false if name.is_empty() => Err(failed(&Error::Invalid("the name is empty".into()))),
        false => Ok(()),
    };
    check_name(&p.name)?;
    let cpus = p.core_mask.as_deref().map_or(Ok(vec![]), cpus::parse).map_err(|e| failed(&e))?;
    let options = ClusterOptions {
        name: Some(p.name.clone()),
        user_id: p.user_id,
        file: p.config_file.map_or(ConfigFile::FoundIfAny, ConfigFile::Given),
        options: p.config_param,
        key_file: p.key_file,
        cpus,
        timeout_s: 0,
    };
    let connector = module.clusters.connector(&options);
    let connect = {
        let connector = Arc::clone(&connector);
        move || connector.with(|cluster| Ok(Arc::clone(cluster)))
    };
    let cluster = module.operations.run(&host, LIMIT, connect).await.map_err(|e| failed(&e))?;
    check_name(&p.name)?;
    module.clusters.register(p.name.clone(), options, params.as_given(), cluster);
    Ok(p.name.into())
}

async fn unregister(module: Rc<RbdModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    let Named { name } = params.decode(DecodeFailure::INTERNAL)?;
    let entries = host.registry().entries_of::<RbdEntry>();
    let is_used = entries.iter().any(|(_, entry)| entry.cluster_name() == Some(&name));
    drop(entries);
    if !is_used && module.clusters.unregister(&name) {
        return Ok(true.into());
    }
    error!("{}: no cluster is registered as {name:?}, or bdevs still use it", params.method());
    Err(MethodError::errno(libc::EPERM))
}

async fn get_clusters_info(module: Rc<RbdModule>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INTERNAL)?;
    let show = |mut params: Map<String, Value>| {
        let name = params.shift_remove("name").unwrap_or_default();
        let mut shown = Map::from_iter([("cluster_name".to_owned(), name)]);
        shown.extend(params);
        Value::from(shown)
    };
    let unknown = || MethodError::errno(libc::ENOENT);
    if let Some(name) = wanted.name {
        return module.clusters.params(&name).map(show).ok_or_else(unknown);
    }
    match module.clusters.all() {
        none if none.is_empty() => Err(unknown()),
        all => Ok(all.into_iter().map(show).collect()),
    }
}

#[derive(Deserialize)]
struct Create {
    name: Option<String>,
    user_id: Option<String>,
    pool_name: String,
    rbd_name: String,
    block_size: u32,
    config: Option<BTreeMap<String, String>>,
    cluster_name: Option<String>,
    uuid: Option<GivenUuid>,
    #[serde(default)]
    read_only: bool,
    /// Not in SPDK.
    namespace: Option<String>,
    /// In seconds; 0: I/O waits for ever. Not in SPDK.
    timeout: Option<u32>,
}

impl Create {
    /// Returns the cluster's options.
    fn cluster(&self, clusters: &Clusters) -> Result<ClusterOptions, Error> {
        if let Some(name) = &self.cluster_name {
            if self.timeout.is_some() {
                let text = "timeout and cluster_name exclude each other: register the cluster with \
                            rados_osd_op_timeout and rados_mon_op_timeout instead";
                return Err(Error::Invalid(text.into()));
            }
            return clusters
                .options(name)
                .ok_or_else(|| Error::NoDevice(format!("no cluster is registered as {name}")));
        }
        Ok(ClusterOptions {
            name: None,
            user_id: self.user_id.clone(),
            file: if self.config.is_some() { ConfigFile::None } else { ConfigFile::Found },
            options: self.config.clone().unwrap_or_default(),
            key_file: None,
            cpus: vec![],
            timeout_s: self.timeout.unwrap_or(0),
        })
    }
}

/// Decodes the parameters, and refuses those that are out of range.
fn parse(params: &Params) -> Result<Create, MethodError> {
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    let invalid = |e: Error| refused(CREATE, &e, libc::EINVAL);
    // A bdev without a name gets one when it is created.
    checked_size(p.name.as_deref().unwrap_or(NAME), 1, p.block_size).map_err(invalid)?;
    Ok(p)
}

async fn create(module: Rc<RbdModule>, host: Rc<dyn Host>, params: Params, p: Create) -> Answer {
    let failed = |e: Error| refused(CREATE, &e, libc::EPERM);
    let name = p.name.clone().unwrap_or_else(|| module.next_name(host.registry()));
    let cluster_options = p.cluster(&module.clusters).map_err(failed)?;
    let reserved = host.registry().reserve(name, given(p.uuid)).map_err(MethodError::errno)?;
    let options = RbdOptions {
        name: reserved.name.clone(),
        uuid: reserved.uuid,
        image: ImageName {
            pool: p.pool_name,
            namespace: p.namespace.filter(|namespace| !namespace.is_empty()),
            image: p.rbd_name,
            read_only: p.read_only,
        },
        block_size: p.block_size,
    };
    let connector = module.clusters.connector(&cluster_options);
    let opener = Arc::clone(&connector);
    let open = move || {
        opener.with(|cluster| {
            let disk = RbdDisk::open(cluster, options.clone())?;
            Ok((Arc::clone(cluster), disk))
        })
    };
    // Opening may wait for the cluster.
    params.let_next_start();
    let (cluster, disk) = module.operations.run(&host, LIMIT, open).await.map_err(failed)?;
    module.clusters.connected(&cluster_options, &cluster);
    if !host.shares_files() {
        check_alone(&*host, &disk, &cluster).map_err(failed)?;
    }
    drop(cluster);
    info!("bdev {}: opened the Ceph image {}", disk.name(), disk.image_name());
    let name = disk.name().to_owned();
    let params = params.as_named(&name, reserved.uuid);
    let entry = Rc::new(RbdEntry {
        module: Rc::clone(&module),
        disk: Arc::clone(&disk),
        params,
        next_try_s: Cell::new(0),
    });
    let clusters = Rc::clone(&module.clusters);
    host.spawn(watch::watch(clusters, Rc::clone(&host), &disk, cluster_options, connector));
    drop(disk);
    life::add(&host, reserved, entry).await?;
    Ok(name.into())
}

/// Fails if both this disk and another one may write to the same image.
fn check_alone(host: &dyn Host, disk: &RbdDisk, cluster: &Cluster) -> Result<(), Error> {
    let writes_there = |other: &RbdEntry| {
        let image = other.disk.shared().image();
        !other.disk.is_read_only()
            && other.disk.image_name().is_same_image(disk.image_name())
            && image.is_some_and(|image| image.cluster().fsid == cluster.fsid)
    };
    if disk.is_read_only() {
        return Ok(());
    }
    let others = host.registry().entries_of::<RbdEntry>();
    match others.iter().find(|(_, other)| writes_there(other)) {
        Some((_, other)) => Err(Error::Busy(format!(
            "bdev {} writes to the Ceph image {} already; start vhost with --share to allow \
             several disks on it",
            other.disk.name(),
            disk.image_name()
        ))),
        None => Ok(()),
    }
}

async fn resize(module: Rc<RbdModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Resize {
        name: String,
        /// In MiB.
        new_size: u64,
    }
    const MIB: u64 = 1 << 20;
    let method = params.method();
    let p: Resize = params.decode(DecodeFailure::INTERNAL)?;
    if host.registry().bdev(&p.name).is_none() {
        error!("{method}: no bdev {:?}", p.name);
        return Err(MethodError::errno(libc::ENODEV));
    }
    let invalid = |text: String| refused(method, &Error::Invalid(text), libc::EINVAL);
    let Some(entry) = host.registry().entry::<RbdEntry>(&p.name) else {
        return Err(invalid(format!("bdev {} is not a Ceph RBD disk", p.name)));
    };
    let disk = Arc::clone(&entry.disk);
    // The bdev may be deleted while this waits.
    drop(entry);
    let now = disk.size_bytes() / MIB;
    let bytes = p.new_size.checked_mul(MIB).filter(|bytes| i64::try_from(*bytes).is_ok());
    let Some(bytes) = bytes.filter(|_| p.new_size >= now) else {
        return Err(invalid(format!(
            "bdev {}: cannot resize from {now} MiB to {} MiB: a bdev can only grow, and must have \
             less than 2^63 bytes",
            p.name, p.new_size
        )));
    };
    let Some(image) = disk.shared().image() else {
        return Err(MethodError::errno(libc::ESHUTDOWN));
    };
    params.let_next_start();
    let grow = |image: Arc<Image>| {
        module.operations.run(&host, LIMIT, move || {
            image.resize(bytes)?;
            image.sizes()
        })
    };
    let mut resized = grow(Arc::clone(&image)).await;
    if matches!(&resized, Err(e) if e.errno() == libc::ESHUTDOWN) {
        disk.shared().refused(&image);
        if let Some(image) = reopened(&*host, &disk).await {
            resized = grow(image).await;
        }
    }
    if let Ok(sizes) = &resized {
        watch::adopt_size(&host, &disk, sizes.image);
    }
    drop(disk);
    // A deletion may wait until nobody holds the disk.
    host.released();
    resized.map_err(|e| MethodError::of(method, &e))?;
    Ok(true.into())
}

/// Waits until the image is open again, for some seconds at most.
async fn reopened(host: &dyn Host, disk: &RbdDisk) -> Option<Arc<Image>> {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(100);
    for _ in 0..TRIES {
        if disk.shared().mode() == Mode::Serving {
            return disk.shared().image();
        }
        host.sleep(PAUSE).await;
    }
    None
}
