//! A Ceph RBD image as a bdev.

use std::cmp;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bdev::{Bdev, Channel, Error, Features, Qos, Stats, Topology, account_name, checked_size};
use closer::Account;
use uuid::Uuid;

use crate::channel::RbdChannel;
use crate::cluster::Cluster;
use crate::image::{Events, Image, ImageName, Sizes};
use crate::worker::{Shared, Worker};

/// A disk in an RBD image.
///
/// Its channels share one open image: two open images of one process would take the exclusive lock
/// from each other with each write.
#[derive(Debug)]
pub struct RbdDisk {
    name: String,
    uuid: Uuid,
    block_size: u32,
    num_blocks: AtomicU64,
    topology: Topology,
    image_name: ImageName,
    account: Account,
    worker: Worker,
    stats: Stats,
    qos: Qos,
}

/// The longest time that a deletion waits for I/O under way.
const DELETION_LIMIT: Duration = Duration::from_secs(10);

/// The options of [`RbdDisk::open`].
#[derive(Clone, Debug)]
pub struct RbdOptions {
    /// The bdev's name; not empty.
    pub name: String,
    /// The bdev's UUID.
    pub uuid: Uuid,
    /// The image.
    pub image: ImageName,
    /// The bytes in a block: a power of two, 512 or more.
    pub block_size: u32,
}

impl RbdDisk {
    /// Opens an image as a disk. May block for ever.
    ///
    /// # Errors
    /// ENOENT if the pool or the image does not exist; EPERM if the user may not write; ESHUTDOWN if
    /// the cluster has blocklisted this client; [`Error::Invalid`] if the block size is invalid, or
    /// the image is smaller than a block.
    pub fn open(cluster: &Arc<Cluster>, options: RbdOptions) -> Result<Arc<Self>, Error> {
        let RbdOptions { name, uuid, image: image_name, block_size } = options;
        let account = Account::new(account_name(&name));
        let events = Arc::new(Events::default());
        let image = Image::open(cluster, &image_name, &account, &events)?;
        let Sizes { image: size, object } = image.sizes()?;
        checked_size(&name, 1, block_size)?;
        let num_blocks = size / u64::from(block_size);
        let bytes = checked_size(&name, num_blocks, block_size)?;
        let worker = Worker::start(image, bytes, events).map_err(|source| Error::System {
            what: format!("{name}: cannot start a thread"),
            source,
        })?;
        let optimal_io_blocks = u32::try_from(object / u64::from(block_size)).unwrap_or(0);
        Ok(Arc::new(Self {
            name,
            uuid,
            block_size,
            num_blocks: AtomicU64::new(num_blocks),
            topology: Topology { optimal_io_blocks, ..Topology::default() },
            image_name,
            account,
            worker,
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.worker.0
    }

    pub(crate) fn image_name(&self) -> &ImageName {
        &self.image_name
    }

    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.image_name.read_only
    }

    /// Adopts the image's size in bytes. Returns how it compares with the disk's size, which never
    /// shrinks: I/O beyond the end of a smaller image fails.
    pub(crate) fn set_size(&self, bytes: u64) -> cmp::Ordering {
        let now = bytes / u64::from(self.block_size);
        // Relaxed suffices: no other data is published with the number.
        let before = self.num_blocks.fetch_max(now, Ordering::Relaxed);
        self.shared().set_size(now * u64::from(self.block_size));
        now.cmp(&before)
    }
}

impl Bdev for RbdDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "Ceph Rbd Disk"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.num_blocks.load(Ordering::Relaxed)
    }

    fn features(&self) -> Features {
        let writes = !self.is_read_only();
        Features {
            read_only: !writes,
            // librbd's cache completes a write before the cluster has it.
            flush: true,
            unmap: writes,
            write_zeroes: writes,
            reset: true,
            any_alignment: true,
        }
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    /// I/O to a cluster that does not answer never ends.
    fn deletion_limit(&self) -> Option<Duration> {
        Some(DELETION_LIMIT)
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let what = format!("{}: cannot open an I/O path", self.name);
        let shared = Arc::clone(self.shared());
        match RbdChannel::open(self, &shared, depth) {
            Ok(channel) => Ok(Box::new(channel)),
            Err(source) => Err(Error::System { what, source }),
        }
    }
}
