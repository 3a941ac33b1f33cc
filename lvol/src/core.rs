//! What a store's channels, threads and operations share: its metadata, which a lock protects, and
//! the tables of its volumes, which follow from it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Error, Grace, Waker};
use blobstore::lvs::Lvs;
use blobstore::{BlobId, Parent, Place};
use tracing::{error, info, warn};

use crate::device::Base;
use crate::externals::Externals;
use crate::facts::Facts;
use crate::link::Link;
use crate::table::Entry;
use crate::volume::Volume;

/// An error of a store.
pub(crate) fn of(name: &str, e: &blobstore::Error) -> Error {
    Error::of_errno(format!("{name}: {e}"), e.errno())
}

/// The interval at which a thread looks whether earlier I/O has ended.
const GRACE_INTERVAL: Duration = Duration::from_micros(200);
/// The time for which closing a store waits for an operation under way to end by itself.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// What the channels, the threads and the operations of a store share.
pub(crate) struct Shared {
    pub(crate) base_name: String,
    pub(crate) cluster_size: u64,
    pub(crate) block_size: u32,
    pub(crate) core: Mutex<Core>,
    pub(crate) externals: Arc<Externals>,
    pub(crate) grace: Grace,
    /// The channels of all volumes.
    pub(crate) links: Mutex<Vec<Arc<Link>>>,
    /// Wakes the store's thread.
    pub(crate) waker: Waker,
    pub(crate) closed: AtomicBool,
    pub(crate) facts: Mutex<Arc<Facts>>,
    pub(crate) free_clusters: Arc<AtomicU64>,
    pub(crate) opened: Instant,
    /// The second since then in which a failure was logged last.
    pub(crate) warned: AtomicU64,
}

/// Bytes that an operation allocates while it holds the lock once, and the most clusters.
const BATCH_BYTES: u64 = 32 << 20;
const BATCH_MAX: u64 = 1024;

/// Allocates clusters of a volume that its caller found missing. What comes from an external
/// snapshot is read first, without the lock.
pub(crate) fn allocate(
    shared: &Shared,
    mut core: MutexGuard<'_, Core>,
    id: BlobId,
    indices: &[u64],
    external: Option<&[u8]>,
) -> Result<(), Error> {
    let Some(external) = external else { return core.allocate(shared, id, indices) };
    drop(core);
    shared.with_prefetched(external, indices, || {
        let mut core = shared.lock();
        core.mend(shared)?;
        core.allocate_missing(shared, id, indices)
    })
}

/// The largest cluster that is read before it is needed. Larger ones take too much memory.
pub(crate) const PREFETCHED_MAX: u64 = 16 << 20;

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As `lock`. After a while, operations that wait for I/O of guests give up.
    pub(crate) fn lock_to_close(&self) -> MutexGuard<'_, Core> {
        let began = Instant::now();
        while began.elapsed() < CLOSE_LIMIT {
            if let Ok(core) = self.core.try_lock() {
                return core;
            }
            thread::sleep(GRACE_INTERVAL);
        }
        self.closed.store(true, Ordering::SeqCst);
        self.lock()
    }

    pub(crate) fn lock_links(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_facts(&self) -> MutexGuard<'_, Arc<Facts>> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clusters that an operation allocates while it holds the lock once.
    pub(crate) fn batch(&self) -> u64 {
        (BATCH_BYTES / self.cluster_size.max(1)).clamp(1, BATCH_MAX)
    }

    pub(crate) fn name(&self) -> String {
        self.lock_facts().store.name.clone()
    }

    pub(crate) fn of(&self, e: &blobstore::Error) -> Error {
        of(&self.name(), e)
    }

    pub(crate) fn change<T>(
        self: &Arc<Self>,
        touched: &[BlobId],
        operation: impl FnOnce(&mut Lvs<Base>, &Base) -> blobstore::Result<T>,
    ) -> Result<T, Error> {
        self.lock().change(self, touched, operation)
    }

    /// Reads clusters of an external snapshot, and runs an operation that needs them.
    ///
    /// # Errors
    /// The bdev's error, or that of the operation.
    pub(crate) fn with_prefetched<T>(
        &self,
        external: &[u8],
        indices: &[u64],
        operation: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let size = self.cluster_size;
        let offsets = || indices.iter().map(|index| index.saturating_mul(size));
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let read = |offset| self.externals.prefetch(external, offset, len);
        let read = if size <= PREFETCHED_MAX { offsets().try_for_each(read) } else { Ok(()) };
        let result = read.map_err(|e| self.of(&e.into())).and_then(|()| operation());
        offsets().for_each(|offset| self.externals.forget(external, offset));
        result
    }

    /// Ends the store's thread when the channels are closed.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits until all I/O of volumes has ended that began before the tables were changed. The
    /// caller holds the lock.
    ///
    /// # Errors
    /// ENODEV: the store is being closed.
    pub(crate) fn wait_for_io(&self) -> Result<(), Error> {
        let ended = self.grace.wait(|| {
            thread::sleep(GRACE_INTERVAL);
            !self.closed.load(Ordering::Relaxed)
        });
        if ended { Ok(()) } else { Err(Error::NoDevice(self.name())) }
    }
}

/// What the lock protects.
pub(crate) struct Core {
    pub(crate) base: Base,
    /// `None`: it could not be loaded again after a failure, or is closed.
    pub(crate) lvs: Option<Lvs<Base>>,
    pub(crate) volumes: BTreeMap<BlobId, Arc<Volume>>,
    /// When loading failed last.
    pub(crate) failed_at: Option<Instant>,
}

/// The next step of copying what a volume inherits.
pub(crate) struct CopyPlan {
    pub(crate) decouple: bool,
    /// Clusters to allocate; none: only the tie to the parent is left.
    pub(crate) missing: Vec<u64>,
    /// The external snapshot from which they may come.
    pub(crate) external: Option<Vec<u8>>,
}

/// The interval of attempts to load a store again for guests.
const MEND_INTERVAL: Duration = Duration::from_secs(1);

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

    /// Loads the store again if an earlier change has failed. An operation that looks at the store or
    /// at the tables before it changes something calls this first.
    ///
    /// # Errors
    /// It cannot be loaded now. The caller has nothing to look at.
    pub(crate) fn mend(&mut self, shared: &Shared) -> Result<(), Error> {
        if self.lvs.as_ref().is_some_and(|lvs| !lvs.store().failed()) {
            return Ok(());
        }
        if shared.closed.load(Ordering::Relaxed) {
            return Err(self.failed(shared));
        }
        warn!("lvstore {}: loading it again after an error", shared.name());
        // What is in memory may contradict the disk, also if loading fails.
        self.lvs = None;
        let loaded = self.base.run(Lvs::load(self.base.clone(), false));
        match loaded {
            Ok(lvs) => {
                self.lvs = Some(lvs);
                self.failed_at = None;
                self.refresh(shared, None);
                info!("lvstore {}: loaded again", shared.name());
                Ok(())
            }
            Err(e) => {
                self.failed_at = Some(Instant::now());
                error!(
                    "lvstore {}: cannot be loaded again, so allocations and changes fail: {e}",
                    shared.name()
                );
                Err(shared.of(&e))
            }
        }
    }

    /// The next step, of up to `limit` clusters, that makes a volume independent of its parent
    /// (`decouple`), or of all its ancestors. `None`: nothing is left to do.
    pub(crate) fn copy_plan(
        &self,
        id: BlobId,
        decouple: bool,
        from: u64,
        limit: usize,
    ) -> blobstore::Result<Option<CopyPlan>> {
        let store = self.lvs.as_ref().ok_or(blobstore::Error::Failed)?.store();
        let blob = store.blob(id)?;
        let decouple = match blob.parent() {
            _ if blob.flags().read_only() => {
                return Err(blobstore::Error::NotPermitted("the volume is read-only"));
            }
            Parent::None if decouple => {
                return Err(blobstore::Error::Invalid("the volume has no parent"));
            }
            Parent::External(_) => false,
            Parent::None | Parent::Blob(_) => decouple,
        };
        if !decouple && !blob.flags().thin() {
            return Ok(None);
        }
        let needed = match from {
            0 if decouple => store.missing(id, true, 0, usize::MAX)?.len() as u64,
            0 => blob.clusters() - blob.allocated(),
            _ => 0,
        };
        if needed > store.free_clusters() {
            return Err(blobstore::Error::NoSpace("clusters"));
        }
        let missing = store.missing(id, decouple, from, limit)?;
        Ok(Some(CopyPlan { decouple, missing, external: store.external(id)? }))
    }

    /// The same for I/O of guests, whose attempts must not follow one another without end.
    ///
    /// # Errors
    /// As [`Core::mend`].
    pub(crate) fn mend_for_guest(&mut self, shared: &Shared) -> Result<(), Error> {
        if self.failed_at.is_some_and(|time| time.elapsed() < MEND_INTERVAL) {
            return Err(self.failed(shared));
        }
        self.mend(shared)
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

    /// Allocates those of these clusters that the volume does not have: guests may have allocated
    /// some since the caller looked.
    pub(crate) fn allocate_missing(
        &mut self,
        shared: &Shared,
        id: BlobId,
        indices: &[u64],
    ) -> Result<(), Error> {
        let missing: Vec<u64> =
            indices.iter().copied().filter(|index| !self.is_own(id, *index)).collect();
        if missing.is_empty() { Ok(()) } else { self.allocate(shared, id, &missing) }
    }

    /// Returns whether a volume has this cluster itself. The store is in order.
    fn is_own(&self, id: BlobId, index: u64) -> bool {
        let place = self.lvs.as_ref().map(|lvs| lvs.store().resolve(id, index));
        matches!(place, Some(Ok(Place::Own(_))))
    }

    /// Copies the places of some clusters from the store to the volume's table.
    pub(crate) fn republish(&self, id: BlobId, ranges: impl Iterator<Item = std::ops::Range<u64>>) {
        let (Some(lvs), Some(volume)) = (&self.lvs, self.volumes.get(&id)) else { return };
        for index in ranges.flatten() {
            if let Ok(place) = lvs.store().resolve(id, index) {
                volume.table.set(index, place);
            }
        }
    }

    /// The clusters of a range that the volume does not have, up to `limit`. The store is in order.
    pub(crate) fn missing(
        &self,
        id: BlobId,
        range: std::ops::Range<u64>,
        limit: usize,
    ) -> Vec<u64> {
        range.filter(|index| !self.is_own(id, *index)).take(limit).collect()
    }

    /// Gives back clusters of a volume, or makes them read as zeroes if they cannot be given back
    /// and `zero` is set.
    pub(crate) fn release(
        &mut self,
        shared: &Shared,
        id: BlobId,
        ranges: &[std::ops::Range<u64>],
        zero: bool,
    ) -> Result<(), Error> {
        self.mend_for_guest(shared)?;
        let Some(volume) = self.volumes.get(&id).cloned() else {
            return Err(self.failed(shared));
        };
        if !zero && !volume.frees.load(Ordering::Relaxed) {
            return Ok(());
        }
        let all: BTreeSet<u64> = ranges.iter().cloned().flatten().collect();
        let indices: Vec<u64> = all.into_iter().filter(|index| self.is_own(id, *index)).collect();
        if indices.is_empty() {
            return Ok(());
        }
        // From now on, reads see zeroes and writes wait for the store's thread, which is here.
        indices.iter().for_each(|index| volume.table.put(*index, Entry::Leaving));
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
        let ids: BTreeSet<BlobId> = lvs.volumes().map(|volume| volume.blob.id()).collect();
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
        let (base, free) = (&shared.base_name, &shared.free_clusters);
        let facts = Facts::of(lvs, base, shared.block_size, free, &self.volumes);
        *shared.lock_facts() = Arc::new(facts);
    }
}

/// Copies the places of all clusters from the store to the volume's table.
fn publish(lvs: &Lvs<Base>, volume: &Volume, shared: &Shared) {
    let Ok(blob) = lvs.store().blob(volume.id) else { return };
    let places = match lvs.store().places(volume.id) {
        Ok(places) => places.table,
        Err(e) => {
            error!(
                "lvstore on {}: {volume}: cannot read its cluster map, so its I/O fails: {e}",
                shared.base_name
            );
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
            if let Entry::At(Place::Own(cluster)) = self.table.get(index) {
                self.table.set(index, Place::Inherited(cluster));
            }
        }
    }
}
