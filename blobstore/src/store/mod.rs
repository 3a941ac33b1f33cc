//! A store in memory, and the operations that change it.
//!
//! `load` reads a store, `recover` finishes what a power cut has interrupted, `create` makes,
//! grows and unloads stores. `persist` writes a blob in an order that survives power cuts; `change`
//! and `snapshot` have the operations on blobs, `allocate` those on single clusters, `inflate`
//! copies inherited clusters. `place` answers where a cluster of a blob is read.

mod allocate;
mod blob;
mod change;
mod create;
mod inflate;
mod load;
mod persist;
mod place;
mod recover;
mod snapshot;

use std::collections::BTreeMap;

pub use self::allocate::{Claim, Claimed, Wanted};
pub use self::blob::{Blob, Parent};
pub use self::change::NewBlob;
pub use self::create::StoreOptions;
pub use self::load::LoadOptions;
pub use self::place::{Place, Places};
pub use self::recover::Interrupted;

use crate::bits::Bits;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, SuperBlock};

/// A blob that cannot be read. Its pages and the clusters that are known stay reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Its number.
    pub id: BlobId,
    /// What is wrong.
    pub reason: &'static str,
    /// The snapshot that it depends on, if that much can be read.
    pub(super) parent: Option<BlobId>,
    pub(super) pages: Vec<u32>,
    pub(super) clusters: Vec<u32>,
}

/// An open blobstore on a device.
///
/// An operation is a future. If it is dropped before its end, or fails after its first write, the
/// state in memory and that on the device may differ: from then on, changes fail with
/// [`Error::Failed`] until the store is loaded again; what is on the device is consistent at each
/// point. An error that is found before the first write, such as a bad parameter or a lack of
/// space, changes nothing. Reading the maps is always permitted.
#[derive(Debug)]
pub struct Store<D> {
    device: D,
    super_block: SuperBlock,
    /// Bytes of the store, also if the super block leaves them to the device.
    size: u64,
    /// Metadata pages in use.
    pages: Bits,
    /// Clusters in use, or claimed.
    clusters: Bits,
    /// Free clusters that are known to read as zeroes.
    zeroed: Bits,
    blobs: BTreeMap<BlobId, Blob>,
    broken: Vec<Broken>,
    interrupted: Vec<Interrupted>,
    /// Clusters of claims that are neither committed nor given back.
    claimed: usize,
    /// A blob and indices whose clusters are in its map, while what is on the disk is not known to
    /// refer to them: the caller would lose what it writes there.
    unwritten: Option<(BlobId, Vec<u64>)>,
    /// Grows with each change that makes claims invalid.
    epoch: u64,
    /// A change has begun and not ended.
    changing: bool,
    read_only: bool,
}

impl<D: Device> Store<D> {
    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, without the store.
    pub fn into_device(self) -> D {
        self.device
    }

    /// The super block.
    pub fn super_block(&self) -> &SuperBlock {
        &self.super_block
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        u64::from(self.super_block.cluster_size)
    }

    /// The offset of a cluster on the device, in bytes.
    pub fn offset(&self, cluster: u64) -> u64 {
        cluster.saturating_mul(self.cluster_size())
    }

    /// Clusters that no blob uses.
    pub fn free_clusters(&self) -> u64 {
        self.clusters.zeroes() as u64
    }

    /// Clusters that can hold data.
    pub fn data_clusters(&self) -> u64 {
        (self.clusters.len() as u64).saturating_sub(self.super_block.metadata_clusters())
    }

    /// Metadata pages in use, and all.
    pub fn metadata_pages(&self) -> (u64, u64) {
        ((self.pages.len() - self.pages.zeroes()) as u64, self.pages.len() as u64)
    }

    /// A blob.
    pub fn blob(&self, id: BlobId) -> Result<&Blob> {
        self.blobs.get(&id).ok_or(Error::NotFound)
    }

    /// All blobs that can be read, by number.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.blobs.values()
    }

    /// Blobs that cannot be read.
    pub fn broken(&self) -> &[Broken] {
        &self.broken
    }

    /// Snapshots and deletions of snapshots that had been interrupted when the store was loaded.
    pub fn interrupted(&self) -> &[Interrupted] {
        &self.interrupted
    }

    /// The clones of a snapshot that can be read.
    pub fn clones(&self, id: BlobId) -> impl Iterator<Item = BlobId> {
        let of = Parent::Blob(id);
        self.blobs.values().filter(move |blob| blob.parent() == of).map(|blob| blob.id)
    }

    /// Whether the store must be loaded again before it can be changed.
    pub fn failed(&self) -> bool {
        self.changing
    }

    fn blob_mut(&mut self, id: BlobId) -> Result<&mut Blob> {
        self.blobs.get_mut(&id).ok_or(Error::NotFound)
    }

    /// A blob whose metadata may be changed.
    fn changeable(&self, id: BlobId) -> Result<&Blob> {
        let blob = self.blob(id)?;
        match (blob.damage, blob.flags.read_only()) {
            (Some(damage), _) => Err(Error::NotPermitted(damage)),
            (None, true) => Err(Error::NotPermitted("the blob is read-only")),
            (None, false) => Ok(blob),
        }
    }

    /// Whether changes are possible at all.
    fn ready(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        if self.changing { Err(Error::Failed) } else { Ok(()) }
    }

    /// Begins a change: all earlier writes are durable, and the super block says that the masks
    /// are not valid. Without a call of [`Self::end`], no other change can begin.
    async fn begin(&mut self) -> Result<()> {
        self.ready()?;
        self.changing = true;
        self.barrier().await?;
        if self.super_block.clean {
            self.super_block.clean = false;
            if self.super_block.size == 0 {
                self.super_block.size = self.size;
            }
            self.write_super_block().await?;
        }
        Ok(())
    }

    fn end(&mut self) {
        self.unwritten = None;
        self.changing = false;
    }
}
