//! A volume as a bdev.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::{Bdev, Channel, Error, Extent, Features, Qos, Stats, Topology};
use blobstore::{BlobId, Place};
use uuid::Uuid;

use crate::channel::LvolChannel;
use crate::core::Shared;
use crate::store::LvStore;
use crate::table::Entry;
use crate::volume::Volume;

/// SPDK's name for volumes.
pub(crate) const PRODUCT: &str = "Logical Volume";

/// A logical volume.
pub struct LvolDisk {
    pub(crate) shared: Arc<Shared>,
    pub(crate) volume: Arc<Volume>,
    name: String,
    uuid: Uuid,
    /// The store's base, then the external snapshot if there is one.
    pub(crate) bases: Vec<Arc<dyn Bdev>>,
    stats: Stats,
    qos: Qos,
}

impl LvStore {
    /// Makes the bdev of a volume. `base` is the store's, and `external` the external snapshot that
    /// the volume reads from.
    ///
    /// # Errors
    /// ENODEV if the volume does not exist; EINVAL if its external snapshot is missing, or has
    /// larger blocks than the store.
    pub fn disk(
        &self,
        id: BlobId,
        name: String,
        uuid: Uuid,
        base: Arc<dyn Bdev>,
        external: Option<Arc<dyn Bdev>>,
    ) -> Result<Arc<LvolDisk>, Error> {
        let facts = self.facts();
        let none = || Error::NoDevice(format!("{name}: no such volume"));
        let volume = facts.volume(id).ok_or_else(none)?;
        if volume.external.is_some() != external.is_some() {
            return Err(Error::Invalid(format!("{name}: its external snapshot is missing")));
        }
        if external.as_ref().is_some_and(|bdev| bdev.block_size() > facts.store.block_size) {
            let text = format!("{name}: its external snapshot has larger blocks than the store");
            return Err(Error::Invalid(text));
        }
        Ok(Arc::new(LvolDisk {
            shared: Arc::clone(&self.shared),
            volume: Arc::clone(&volume.shared),
            name,
            uuid,
            bases: std::iter::once(base).chain(external).collect(),
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }
}

impl LvolDisk {
    /// The number of its blob.
    #[must_use]
    pub fn id(&self) -> BlobId {
        self.volume.id
    }

    /// Whether channels are open: a controller or a bdev uses it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.volume.channels.load(Ordering::SeqCst) > 0
    }
}

impl Bdev for LvolDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.shared.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.volume.size() / u64::from(self.shared.block_size)
    }

    /// `read_only` changes once, when the volume is made read-only.
    fn features(&self) -> Features {
        let base = self.bases.first().map(|base| base.features()).unwrap_or_default();
        let read_only = base.read_only || self.volume.read_only.load(Ordering::Acquire);
        Features {
            read_only,
            unmap: !read_only,
            write_zeroes: base.write_zeroes && !read_only,
            reset: true,
            ..base
        }
    }

    fn topology(&self) -> Topology {
        self.bases.first().map(|base| base.topology()).unwrap_or_default()
    }

    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        self.bases.clone()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        let size = self.volume.cluster_size;
        let is_allocated = |index| self.volume.table.get(index) != Entry::At(Place::Zeroes);
        let mut index = offset / size;
        let allocated = is_allocated(index);
        let mut end = (index + 1).saturating_mul(size);
        while end < offset.saturating_add(len) && is_allocated(index + 1) == allocated {
            index += 1;
            end = end.saturating_add(size);
        }
        Ok(Extent { len: (end - offset).min(len), allocated })
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let (shared, volume) = (Arc::clone(&self.shared), Arc::clone(&self.volume));
        let disk = Arc::clone(&self) as _;
        Ok(Box::new(LvolChannel::open(disk, shared, volume, &self.bases, depth)?))
    }
}
