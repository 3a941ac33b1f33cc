//! A store's metadata, which its lock protects, and the tables that follow from it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::Error;
use blobstore::lvs::Lvs;
use blobstore::{BlobId, Parent, Place};
use tracing::{error, info, warn};

use crate::device::Base;
use crate::facts::{Facts, StoreFacts, VolumeFacts};
use crate::store::Shared;
use crate::volume::Volume;

/// What the lock protects.
pub(crate) struct Core {
    pub(crate) base: Base,
    /// `None`: it could not be loaded again after a failure, or is closed.
    pub(crate) lvs: Option<Lvs<Base>>,
    pub(crate) volumes: BTreeMap<BlobId, Arc<Volume>>,
}

impl Core {
    /// Runs an operation. Then, also if it has failed, the tables of the volumes `touched` are
    /// those of the store.
    pub(crate) fn change<T>(
        &mut self,
        shared: &Shared,
        touched: &[BlobId],
        operation: impl FnOnce(&mut Lvs<Base>, &Base) -> blobstore::Result<T>,
    ) -> Result<T, Error> {
        let result = self.attempt(shared, operation);
        self.refresh(shared, Some(touched));
        result
    }

    /// Runs an operation. If it leaves the store in disorder, loads the store again.
    fn attempt<T>(
        &mut self,
        shared: &Shared,
        operation: impl FnOnce(&mut Lvs<Base>, &Base) -> blobstore::Result<T>,
    ) -> Result<T, Error> {
        self.mend(shared)?;
        let Some(lvs) = &mut self.lvs else { return Err(self.failed(shared)) };
        let result = operation(lvs, &self.base);
        shared.free_clusters.store(lvs.store().free_clusters(), Ordering::Relaxed);
        if lvs.store().failed() {
            // It logs an error.
            let _ = self.mend(shared);
        }
        result.map_err(|e| shared.of(&e))
    }

    /// Loads the store again if an earlier change has failed.
    fn mend(&mut self, shared: &Shared) -> Result<(), Error> {
        if self.lvs.as_ref().is_some_and(|lvs| !lvs.store().failed()) {
            return Ok(());
        }
        if shared.closed.load(Ordering::Relaxed) {
            return Err(self.failed(shared));
        }
        warn!("lvstore {}: it is loaded again after an error", shared.name());
        // What is in memory is of no use any more, also if loading fails.
        self.lvs = None;
        let loaded = self.base.run(Lvs::load(self.base.clone(), false));
        match loaded {
            Ok(lvs) => {
                self.lvs = Some(lvs);
                self.refresh(shared, None);
                info!("lvstore {}: it is in order", shared.name());
                Ok(())
            }
            Err(e) => {
                error!("lvstore {}: cannot be loaded again: {e}", shared.name());
                Err(shared.of(&e))
            }
        }
    }

    pub(crate) fn failed(&self, shared: &Shared) -> Error {
        shared.of(&blobstore::Error::Failed)
    }

    /// A volume and all that inherit from it, directly or not.
    pub(crate) fn descendants(&self, id: BlobId) -> Vec<BlobId> {
        let Some(lvs) = &self.lvs else { return vec![id] };
        let mut all = vec![id];
        let mut next = 0;
        while let Some(parent) = all.get(next) {
            let clones: Vec<BlobId> = lvs.store().clones(*parent).collect();
            all.extend(clones.into_iter().filter(|clone| !all.contains(clone)).collect::<Vec<_>>());
            next += 1;
        }
        all
    }

    /// Allocates clusters of a volume.
    pub(crate) fn allocate(
        &mut self,
        shared: &Shared,
        id: BlobId,
        indices: &[u64],
    ) -> Result<(), Error> {
        let allocated =
            self.attempt(shared, |lvs, base| base.run(lvs.store_mut().allocate(id, indices)))?;
        if let Some(volume) = self.volumes.get(&id) {
            for (index, cluster) in indices.iter().zip(allocated) {
                volume.table.set(*index, Place::Own(cluster));
                volume.allocated.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Makes entries of a volume's table what the store says.
    pub(crate) fn republish(&self, id: BlobId, ranges: impl Iterator<Item = std::ops::Range<u64>>) {
        let (Some(lvs), Some(volume)) = (&self.lvs, self.volumes.get(&id)) else { return };
        for index in ranges.flatten() {
            if let Ok(place) = lvs.store().resolve(id, index) {
                volume.table.set(index, place);
            }
        }
    }

    /// The clusters of a range that the volume does not have, up to `limit`.
    pub(crate) fn missing(
        &self,
        id: BlobId,
        range: std::ops::Range<u64>,
        limit: usize,
    ) -> Vec<u64> {
        let Some(lvs) = &self.lvs else { return vec![] };
        let is_own = |index: &u64| matches!(lvs.store().resolve(id, *index), Ok(Place::Own(_)));
        range.filter(|index| !is_own(index)).take(limit).collect()
    }

    /// Gives back clusters of a volume, or makes them read as zeroes if they cannot be given back
    /// and `zero` is set.
    pub(crate) fn release(
        &mut self,
        shared: &Shared,
        id: BlobId,
        range: std::ops::Range<u64>,
        zero: bool,
    ) -> Result<(), Error> {
        let (Some(lvs), Some(volume)) = (&self.lvs, self.volumes.get(&id)) else {
            return Err(self.failed(shared));
        };
        let volume = Arc::clone(volume);
        if !zero && !volume.frees.load(Ordering::Relaxed) {
            return Ok(());
        }
        let is_own = |index: &u64| matches!(lvs.store().resolve(id, *index), Ok(Place::Own(_)));
        let indices: Vec<u64> = range.filter(is_own).collect();
        // From now on, reads see zeroes and writes wait for the store's thread, which is here.
        indices.iter().for_each(|index| volume.table.set(*index, Place::Zeroes));
        let released = shared.wait_for_io().and_then(|()| {
            self.attempt(shared, |lvs, base| base.run(lvs.store_mut().release(id, &indices)))
        });
        if let Some(lvs) = &self.lvs {
            for index in indices {
                let place = lvs.store().resolve(id, index).unwrap_or(Place::Zeroes);
                volume.table.set(index, place);
            }
            let allocated = lvs.store().blob(id).map_or(0, blobstore::Blob::allocated);
            volume.allocated.store(allocated, Ordering::Relaxed);
        }
        released.map(drop)
    }

    /// Publishes the state of the store: for reactors the tables of the volumes `touched`, of new
    /// ones, or of all; and what operators see.
    pub(crate) fn refresh(&mut self, shared: &Shared, touched: Option<&[BlobId]>) {
        let Some(lvs) = &self.lvs else { return };
        let ids: Vec<BlobId> = lvs.volumes().map(|volume| volume.blob.id()).collect();
        self.volumes.retain(|id, volume| {
            let kept = ids.contains(id);
            if !kept {
                volume.clusters.store(0, Ordering::Release);
            }
            kept
        });
        for id in ids {
            let known = self.volumes.contains_key(&id);
            let volume = self.volumes.entry(id);
            let volume = volume.or_insert_with(|| Volume::new(id, shared.cluster_size));
            if !known || touched.is_none_or(|touched| touched.contains(&id)) {
                publish(lvs, volume, shared);
            }
        }
        shared.free_clusters.store(lvs.store().free_clusters(), Ordering::Relaxed);
        let facts = Facts {
            store: StoreFacts::of(lvs, shared),
            volumes: lvs
                .volumes()
                .filter_map(|volume| {
                    let shared = Arc::clone(self.volumes.get(&volume.blob.id())?);
                    Some(VolumeFacts::of(lvs, &volume, shared))
                })
                .collect(),
        };
        *shared.lock_facts() = Arc::new(facts);
    }
}

/// Makes a volume's table what the store says.
fn publish(lvs: &Lvs<Base>, volume: &Volume, shared: &Shared) {
    let Ok(blob) = lvs.store().blob(volume.id) else { return };
    let places = match lvs.store().places(volume.id) {
        Ok(places) => places.table,
        Err(e) => {
            error!("lvstore {}: {volume}: it is not served: {e}", shared.base_name);
            vec![]
        }
    };
    for (index, place) in (0..).zip(&places) {
        volume.table.set(index, Place::decode(*place));
    }
    // What was cut off must not reappear when it grows again.
    let old = volume.clusters.load(Ordering::Relaxed);
    (places.len() as u64..old).for_each(|index| volume.table.set(index, Place::Zeroes));
    volume.allocated.store(blob.allocated(), Ordering::Relaxed);
    volume.read_only.store(!blob.writable(), Ordering::Release);
    volume.frees.store(blob.flags().thin() && blob.parent() == Parent::None, Ordering::Relaxed);
    // Release: a reactor that sees the size sees the entries.
    volume.clusters.store(places.len() as u64, Ordering::Release);
}

impl Volume {
    /// Makes writes to its clusters wait for the store's thread. Reads go on.
    pub(crate) fn keep_from_writing(&self) {
        for index in 0..self.clusters.load(Ordering::Relaxed) {
            if let Place::Own(cluster) = self.table.get(index) {
                self.table.set(index, Place::Inherited(cluster));
            }
        }
    }
}
