//! The task of each disk that reacts to changes of its image, and opens it again when the cluster
//! has blocklisted its client.

use std::cell::{Cell, RefCell};
use std::cmp;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use bdev::method::LocalFuture;
use bdev::{Aside, Bdev, Error, Host, life};
use tracing::{error, info, warn};

use crate::cluster::ClusterOptions;
use crate::clusters::{Clusters, Connector, LIMIT};
use crate::disk::RbdDisk;
use crate::image::{Events, Image, Owner};
use crate::worker::Mode;

/// Adopts the size of a disk's image, in bytes, and tells the disk's users if it has grown.
pub(crate) fn adopt_size(host: &Rc<dyn Host>, disk: &Arc<RbdDisk>, size: u64) {
    match disk.set_size(size) {
        cmp::Ordering::Greater => life::resized(host, &(Arc::clone(disk) as _)),
        cmp::Ordering::Equal => {}
        cmp::Ordering::Less => error!(
            "bdev {}: the Ceph image {} shrank to {size} bytes; the bdev keeps its size, and I/O \
             beyond the image's end fails",
            disk.name(),
            disk.image_name()
        ),
    }
}

/// Returns the task. It ends when the disk is freed, and holds the disk only while it changes it.
pub(crate) fn watch(
    clusters: Rc<Clusters>,
    host: Rc<dyn Host>,
    disk: &Arc<RbdDisk>,
    cluster: ClusterOptions,
    connector: Arc<Connector>,
) -> LocalFuture<'static, ()> {
    let watcher = Watcher {
        clusters,
        host,
        cluster,
        connector,
        events: Arc::clone(disk.shared().events()),
        // One: while an operation on this disk hangs, further ones are refused.
        operations: Aside::new(bdev::account_name(disk.name()), 1),
        disk: Arc::downgrade(disk),
        attempts: Cell::new(0),
        reported: RefCell::default(),
    };
    Box::pin(watcher.run())
}

struct Watcher {
    clusters: Rc<Clusters>,
    host: Rc<dyn Host>,
    cluster: ClusterOptions,
    connector: Arc<Connector>,
    events: Arc<Events>,
    operations: Aside,
    disk: Weak<RbdDisk>,
    /// Attempts to open the image again, since it was open last.
    attempts: Cell<u64>,
    /// Why the image could not be opened again, as logged last.
    reported: RefCell<String>,
}

impl Watcher {
    async fn run(self) {
        loop {
            self.events.any.notified().await;
            if self.events.has_ended() {
                return;
            }
            if matches!(self.mode(), Some(Mode::Reopening | Mode::Refused)) {
                self.reopen().await;
            }
            if self.events.take_changed() && self.mode() == Some(Mode::Serving) {
                self.refresh_size().await;
            }
        }
    }

    /// The disk's mode; `None` if the disk is deleted.
    fn mode(&self) -> Option<Mode> {
        self.with_disk(|disk| disk.shared().mode())
    }

    /// Calls `f` with the disk, unless it is deleted.
    fn with_disk<R>(&self, f: impl FnOnce(&Arc<RbdDisk>) -> R) -> Option<R> {
        let disk = self.disk.upgrade()?;
        let result = f(&disk);
        drop(disk);
        // A deletion may wait until nobody holds the disk.
        self.host.released();
        Some(result)
    }

    async fn refresh_size(&self) {
        let Some(Some(image)) = self.with_disk(|disk| disk.shared().image()) else { return };
        let asked = Arc::clone(&image);
        match self.operations.run(&self.host, LIMIT, move || asked.sizes()).await {
            Ok(sizes) => drop(self.with_disk(|disk| adopt_size(&self.host, disk, sizes.image))),
            Err(e) if e.errno() == libc::ESHUTDOWN => {
                self.with_disk(|disk| disk.shared().refused(&image));
            }
            Err(e) => {
                self.with_disk(|disk| warn!("bdev {}: {e}", disk.name()));
            }
        }
    }

    /// Opens the image with a new client. I/O goes on unless another client owns the image by now.
    async fn reopen(&self) {
        let Some((name, image_name, account, shared)) = self.with_disk(|disk| {
            let shared = Arc::clone(disk.shared());
            (disk.name().to_owned(), disk.image_name().clone(), disk.account().clone(), shared)
        }) else {
            return;
        };
        let Some(former) = shared.image().map(|image| image.cluster().address.clone()) else {
            return;
        };
        if self.attempts.replace(self.attempts.get() + 1) == 0 {
            warn!("bdev {name}: the Ceph cluster has blocklisted this client; connecting again");
        }
        let connector = Arc::clone(&self.connector);
        let (events, waits_for_cluster) = (Arc::clone(&self.events), self.cluster.timeout_s == 0);
        // Runs to its end also after the limit: who has owned the image can be found out only once,
        // as this breaks the lock.
        let open = move || {
            let opened = connector.with(|cluster| {
                let opened = Image::open(cluster, &image_name, &account, &events)?;
                Ok((Arc::clone(cluster), opened.sizes()?, opened))
            });
            let (cluster, sizes, opened) = opened.inspect_err(|_| {
                let mode = if waits_for_cluster { Mode::Reopening } else { Mode::Refused };
                shared.set_mode(mode);
            })?;
            let owner =
                if image_name.read_only { Owner::Former } else { opened.owner_since(&former) };
            if let Owner::Other(owner) = owner {
                shared.set_mode(Mode::Refused);
                let text = format!("the client {owner} has taken over the Ceph image {image_name}");
                return Err(Error::Busy(text));
            }
            shared.adopt(opened, sizes.image, owner == Owner::Former);
            info!("bdev {name}: connected to the Ceph cluster again");
            // Another host may have resized the image.
            events.report_change();
            Ok(cluster)
        };
        match self.operations.run(&self.host, LIMIT, open).await {
            Ok(cluster) => {
                self.clusters.connected(&self.cluster, &cluster);
                self.reported.take();
                self.attempts.set(0);
            }
            // An earlier attempt is still under way.
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) => self.report(&e),
        }
    }

    /// Logs why the image is not open, once for each reason.
    fn report(&self, e: &Error) {
        let text = e.to_string();
        let Some((name, mode)) =
            self.with_disk(|disk| (disk.name().to_owned(), disk.shared().mode()))
        else {
            return;
        };
        if self.reported.replace(text.clone()) != text {
            let what = if mode == Mode::Reopening { "waits" } else { "fails" };
            error!(
                "bdev {name}: cannot open the image again, and its I/O {what}: {text}; trying \
                 again every {TRY_INTERVAL_S} s"
            );
        }
    }
}

/// The interval of attempts to open an image again.
pub(crate) const TRY_INTERVAL_S: u32 = 5;
