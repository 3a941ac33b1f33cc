//! What operators see of a store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blobstore::lvs::{self, Lvs};
use blobstore::{BlobId, Parent};
use uuid::Uuid;

use crate::device::Base;
use crate::volume::Volume;

/// A store and its volumes, at one time.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The store.
    pub store: StoreFacts,
    /// Its volumes, by the number of their blob.
    pub volumes: Vec<VolumeFacts>,
}

/// A store.
#[derive(Clone, Debug, Default)]
pub struct StoreFacts {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The name of the bdev that it is on.
    pub base: String,
    /// Clusters for data.
    pub data_clusters: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// The size in bytes up to which it can grow.
    pub max_growable_size: u64,
    free_clusters: Arc<AtomicU64>,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct VolumeFacts {
    /// The number of its blob.
    pub id: BlobId,
    /// Its name. A volume whose metadata has no valid name gets the number of its blob.
    pub name: String,
    /// Its identity, if its metadata has one.
    pub uuid: Option<Uuid>,
    /// Its size in clusters.
    pub clusters: u64,
    /// Whether clusters are allocated when they are first written.
    pub thin: bool,
    /// Whether its data cannot be changed.
    pub read_only: bool,
    /// The volume that it is a clone of.
    pub parent: Option<BlobId>,
    /// Its clones.
    pub clones: Vec<BlobId>,
    /// Whether it is a clone of an external snapshot.
    pub external_clone: bool,
    /// The external snapshot that it reads from, directly or not: the UUID of a bdev.
    pub external: Option<Vec<u8>>,
    pub(crate) shared: Arc<Volume>,
}

impl StoreFacts {
    fn of(lvs: &Lvs<Base>, base: &str, block_size: u32, free: &Arc<AtomicU64>) -> Self {
        let store = lvs.store();
        Self {
            name: lvs.name().to_owned(),
            uuid: lvs.uuid(),
            base: base.to_owned(),
            data_clusters: store.data_clusters(),
            free_clusters: Arc::clone(free),
            block_size,
            cluster_size: store.cluster_size(),
            max_growable_size: store.super_block().max_growable_size(),
        }
    }
}

impl StoreFacts {
    /// Clusters that no volume has, at present.
    #[must_use]
    pub fn free_clusters(&self) -> u64 {
        self.free_clusters.load(Ordering::Relaxed)
    }
}

impl VolumeFacts {
    fn of(lvs: &Lvs<Base>, volume: &lvs::Volume<'_>, shared: Arc<Volume>) -> Self {
        let blob = volume.blob;
        let (parent, external_clone) = match blob.parent() {
            Parent::Blob(parent) => (Some(parent), false),
            Parent::External(_) => (None, true),
            Parent::None => (None, false),
        };
        Self {
            id: blob.id(),
            name: volume.name.map_or_else(|| format!("{:#x}", blob.id().0), str::to_owned),
            uuid: volume.uuid,
            clusters: blob.clusters(),
            thin: blob.flags().thin(),
            read_only: !blob.writable(),
            parent,
            clones: vec![],
            external_clone,
            external: lvs.store().external(blob.id()).ok().flatten(),
            shared,
        }
    }

    /// Clusters of its own, at present.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.shared.allocated.load(Ordering::Relaxed)
    }

    /// Whether it is a read-only volume with clones.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        self.read_only && !self.clones.is_empty()
    }

    /// The bdev's UUID that its external snapshot is named by.
    #[must_use]
    pub fn external_uuid(&self) -> Option<Uuid> {
        let id = self.external.as_deref()?;
        let text = id.split(|byte| *byte == 0).next()?;
        Uuid::try_parse(std::str::from_utf8(text).ok()?).ok()
    }
}

impl Facts {
    pub(crate) fn of(
        lvs: &Lvs<Base>,
        base: &str,
        block_size: u32,
        free: &Arc<AtomicU64>,
        volumes: &BTreeMap<BlobId, Arc<Volume>>,
    ) -> Self {
        let shown = lvs.volumes().filter_map(|volume| {
            let id = volume.blob.id();
            Some((id, VolumeFacts::of(lvs, &volume, Arc::clone(volumes.get(&id)?))))
        });
        let mut shown: BTreeMap<BlobId, VolumeFacts> = shown.collect();
        let clones: Vec<(BlobId, BlobId)> =
            shown.values().filter_map(|volume| Some((volume.parent?, volume.id))).collect();
        for (parent, clone) in clones {
            if let Some(parent) = shown.get_mut(&parent) {
                parent.clones.push(clone);
            }
        }
        let store = StoreFacts::of(lvs, base, block_size, free);
        Self { store, volumes: shown.into_values().collect() }
    }

    /// The volume with this number.
    #[must_use]
    pub fn volume(&self, id: BlobId) -> Option<&VolumeFacts> {
        let at = self.volumes.binary_search_by_key(&id, |volume| volume.id).ok()?;
        self.volumes.get(at)
    }
}
