//! The task of each disk that reacts to changes of its image, and opens it again when the cluster
//! refuses its client.

use std::cmp;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use bdev::method::LocalFuture;
use bdev::{Aside, Bdev, Error, Host, life};
use tracing::{error, info, warn};

use crate::cluster::ClusterOptions;
use crate::clusters::{Clusters, LIMIT};
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
) -> LocalFuture<'static, ()> {
    let watcher = Watcher {
        clusters,
        host,
        cluster,
        events: Arc::clone(disk.shared().events()),
        // One: while an operation on this disk hangs, further ones are refused.
        operations: Aside::new(bdev::account_name(disk.name()), 1),
        disk: Arc::downgrade(disk),
    };
    Box::pin(watcher.run())
}

struct Watcher {
    clusters: Rc<Clusters>,
    host: Rc<dyn Host>,
    cluster: ClusterOptions,
    events: Arc<Events>,
    operations: Aside,
    disk: Weak<RbdDisk>,
}

impl Watcher {
    async fn run(self) {
        loop {
            self.events.any.notified().await;
            if self.events.has_ended() {
                return;
            }
            if self.mode().is_some_and(|mode| mode != Mode::Serving) {
                self.reopen().await;
            }
            if self.events.take_changed() {
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
        // A task may wait for the disk's last user.
        self.host.released();
        Some(result)
    }

    async fn refresh_size(&self) {
        let Some(Some(image)) = self.with_disk(|disk| disk.shared().image()) else { return };
        match self.operations.run(&self.host, LIMIT, move || image.sizes()).await {
            Ok(sizes) => drop(self.with_disk(|disk| adopt_size(&self.host, disk, sizes.image))),
            Err(e) => warn!("{e}"),
        }
    }

    /// Opens the image with a client that the cluster accepts. I/O goes on unless another client
    /// owns the image by now.
    async fn reopen(&self) {
        let Some((name, image, account, former)) = self.with_disk(|disk| {
            let name = disk.name().to_owned();
            warn!("bdev {name}: the Ceph cluster has blocklisted this client; connecting again");
            let former = disk.shared().image().map(|image| image.cluster().address.clone());
            (name, disk.image_name().clone(), disk.account().clone(), former.unwrap_or_default())
        }) else {
            return;
        };
        let connect = self.clusters.connector(self.cluster.clone());
        let events = Arc::clone(&self.events);
        let open = move || {
            let cluster = connect()?;
            let opened = Image::open(&cluster, &image, &account, &events)?;
            let owner = if image.read_only { Owner::Former } else { opened.owner_since(&former) };
            if let Owner::Other(owner) = owner {
                let text = format!("the client {owner} has taken over the Ceph image {image}");
                return Err(Error::Busy(text));
            }
            Ok((cluster, opened, owner == Owner::Former))
        };
        match self.operations.run(&self.host, LIMIT, open).await {
            Ok((cluster, opened, resubmits)) => {
                self.clusters.put(&self.cluster, &cluster);
                self.with_disk(|disk| disk.shared().adopt(opened, resubmits));
                info!("bdev {name}: connected to the Ceph cluster again");
            }
            Err(e) => {
                // Without a timeout, I/O waits for an absent cluster; but not for another client.
                let waits = self.cluster.timeout_s == 0 && !matches!(e, Error::Busy(_));
                let what = if waits { "waits" } else { "fails" };
                error!("bdev {name}: cannot open the image again, and its I/O {what}: {e}");
                let mode = if waits { Mode::Reopening } else { Mode::Refused };
                self.with_disk(|disk| disk.shared().set_mode(mode));
            }
        }
    }
}
