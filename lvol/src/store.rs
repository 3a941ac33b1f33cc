//! An open store: its volumes, and the operations of operators on them.
//!
//! One lock protects the store's metadata. Operators' operations run on threads that may block, and
//! the store's own thread ([`crate::thread`]) allocates and releases clusters for guests. Reactors
//! never take the lock: they read each volume's table. An operation that frees clusters first
//! removes them from the tables and waits for a grace period.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use bdev::{Bdev, Error, Grace, Request, Rights, ThreadChannel, Waker};
use blobstore::format::{Clear, PAGE, SuperBlock};
use blobstore::lvs::{Lvs, NewVolume, STORE_TYPE};
use blobstore::store::StoreOptions;
use blobstore::{BlobId, Place};
use uuid::Uuid;

use crate::core::{Core, Shared, allocate, of};
use crate::device::Base;
use crate::facts::Facts;
use crate::table::CLUSTERS_MAX;
use crate::thread as store_thread;

/// An open store. Dropping it does not close it: [`LvStore::close`] does.
pub struct LvStore {
    pub(crate) shared: Arc<Shared>,
}

/// How a store is made.
#[derive(Clone, Debug)]
pub struct NewStore {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// Pages of metadata for each 100 clusters.
    pub pages_per_hundred_clusters: u32,
    /// Bytes of such a page.
    pub page_size: u32,
    /// What is done to the base's content.
    pub clear: Clear,
}

impl LvStore {
    /// Makes a store on a bdev, whose content is lost. Blocks.
    ///
    /// # Errors
    /// EINVAL for a bad name or size; the base's error.
    pub fn create(bdev: &Arc<dyn Bdev>, new: &NewStore) -> Result<Self, Error> {
        let base = Base::open(bdev, Rights::Write)?;
        let options = StoreOptions {
            cluster_size: new.cluster_size,
            pages_per_hundred_clusters: new.pages_per_hundred_clusters,
            page_size: new.page_size,
            clear: new.clear,
            ..StoreOptions::default()
        };
        let made = base.run(Lvs::create(base.clone(), &new.name, new.uuid, options));
        Self::start(bdev, base, made.map_err(|e| of(&new.name, &e))?)
    }

    /// Returns whether a bdev seems to have a store. Reads its first block. Blocks.
    ///
    /// # Errors
    /// The base's error.
    pub fn is_on(bdev: &Arc<dyn Bdev>) -> Result<bool, Error> {
        let mut channel = ThreadChannel::open(bdev, 1, Rights::Read)?;
        let len = PAGE.next_multiple_of(usize::try_from(bdev.block_size()).unwrap_or(PAGE));
        if bdev.size_bytes() < len as u64 {
            return Ok(false);
        }
        let read = channel.run(Request::read(0, len));
        let read = read.map_err(|errno| Error::of_errno(bdev.name(), errno))?;
        let super_block = SuperBlock::decode(&read.bytes()[..PAGE]);
        Ok(super_block.is_ok_and(|super_block| super_block.store_type == STORE_TYPE))
    }

    /// Opens the store of a bdev. Blocks. `None`: there is no store.
    ///
    /// # Errors
    /// The store is damaged, or the base fails.
    pub fn load(bdev: &Arc<dyn Bdev>) -> Result<Option<Self>, Error> {
        let read_only = bdev.features().read_only;
        let base = Base::open(bdev, if read_only { Rights::Read } else { Rights::Write })?;
        match base.run(Lvs::load(base.clone(), read_only)) {
            Ok(lvs) => Self::start(bdev, base, lvs).map(Some),
            Err(blobstore::Error::NotAStore(_) | blobstore::Error::OtherType) => Ok(None),
            Err(e) => Err(of(bdev.name(), &e)),
        }
    }

    fn start(bdev: &Arc<dyn Bdev>, base: Base, lvs: Lvs<Base>) -> Result<Self, Error> {
        let super_block = lvs.store().super_block();
        let system = |source| Error::System { what: bdev.name().to_owned(), source };
        let shared = Arc::new(Shared {
            base_name: bdev.name().to_owned(),
            cluster_size: lvs.store().cluster_size(),
            block_size: super_block.io_unit_size().max(bdev.block_size()),
            externals: Arc::clone(&base.externals),
            core: Mutex::new(Core {
                base,
                lvs: Some(lvs),
                volumes: BTreeMap::new(),
                failed_at: None,
            }),
            grace: Grace::default(),
            links: Mutex::default(),
            waker: Waker::new().map_err(system)?,
            closed: AtomicBool::new(false),
            facts: Mutex::default(),
            free_clusters: Arc::default(),
            opened: Instant::now(),
            warned: AtomicU64::new(u64::MAX),
        });
        {
            let mut core = shared.lock();
            core.refresh(&shared, None);
        }
        store_thread::start(&shared).map_err(system)?;
        Ok(Self { shared })
    }

    /// What is known of it. Does not wait for operations under way.
    #[must_use]
    pub fn facts(&self) -> Arc<Facts> {
        Arc::clone(&self.shared.lock_facts())
    }

    /// Creates a volume. Blocks, as all operations that follow. The clusters of a thick volume are
    /// allocated after it was created, in steps.
    ///
    /// # Errors
    /// EEXIST for a name in use, EINVAL for a bad one or more than 2^26 clusters, ENOSPC; the base's
    /// error.
    pub fn create_volume(&self, new: &NewVolume<'_>) -> Result<BlobId, Error> {
        self.check_size(new.clusters)?;
        let thin = NewVolume { thin: true, ..new.clone() };
        let enough = new.thin || new.clusters <= self.facts().store.free_clusters();
        if !enough {
            return Err(self.shared.of(&blobstore::Error::NoSpace("clusters")));
        }
        let id = self.shared.change(&[], |lvs, base| base.run(lvs.create_volume(thin)))?;
        if new.thin {
            return Ok(id);
        }
        match self.inflate(id) {
            Ok(()) => Ok(id),
            Err(e) => {
                self.delete(id)?;
                Err(e)
            }
        }
    }

    fn check_size(&self, clusters: u64) -> Result<(), Error> {
        if clusters > CLUSTERS_MAX {
            return Err(self.shared.of(&blobstore::Error::Invalid("more than 2^26 clusters")));
        }
        Ok(())
    }

    /// Takes a snapshot. Writes of the volume that would change its clusters wait meanwhile.
    ///
    /// # Errors
    /// As [`LvStore::create_volume`]; EINVAL if the volume is read-only.
    pub fn snapshot(&self, id: BlobId, name: &str, uuid: Uuid) -> Result<BlobId, Error> {
        let mut core = self.shared.lock();
        core.mend(&self.shared)?;
        if let (Some(volume), Some(lvs)) = (core.volumes.get(&id), &core.lvs)
            && lvs.store().blob(id).is_ok_and(blobstore::Blob::writable)
        {
            volume.keep_from_writing();
            self.shared.wait_for_io()?;
        }
        core.change(&self.shared, &[id], |lvs, base| base.run(lvs.snapshot(id, name, uuid)))
    }

    /// Makes a clone of a snapshot.
    ///
    /// # Errors
    /// As [`LvStore::create_volume`]; EINVAL if the volume is not read-only.
    pub fn clone_volume(&self, id: BlobId, name: &str, uuid: Uuid) -> Result<BlobId, Error> {
        self.shared.change(&[], |lvs, base| base.run(lvs.clone_volume(id, name, uuid)))
    }

    /// Makes a clone, of this many clusters, of the bdev with UUID `external`.
    ///
    /// # Errors
    /// As [`LvStore::create_volume`].
    pub fn clone_external(
        &self,
        external: Uuid,
        clusters: u64,
        name: &str,
        uuid: Uuid,
    ) -> Result<BlobId, Error> {
        self.check_size(clusters)?;
        self.shared
            .change(&[], |lvs, base| base.run(lvs.clone_external(external, clusters, name, uuid)))
    }

    /// Renames a volume.
    ///
    /// # Errors
    /// As [`LvStore::create_volume`]; EPERM for a snapshot.
    pub fn rename(&self, id: BlobId, name: &str) -> Result<(), Error> {
        self.shared.change(&[], |lvs, base| base.run(lvs.rename(id, name)))
    }

    /// Renames the store.
    ///
    /// # Errors
    /// EINVAL for a bad name; the base's error.
    pub fn rename_store(&self, name: &str) -> Result<(), Error> {
        self.shared.change(&[], |lvs, base| base.run(lvs.rename_store(name)))
    }

    /// Deletes a volume that has no bdev any more.
    ///
    /// # Errors
    /// ENOENT; EPERM if it has more than one clone; the base's error.
    pub fn delete(&self, id: BlobId) -> Result<(), Error> {
        let mut core = self.shared.lock();
        core.mend(&self.shared)?;
        let touched = core.descendants(id);
        if let Some(volume) = core.volumes.get(&id) {
            volume.clusters.store(0, Ordering::Release);
        }
        // I/O of other volumes too: it may still read clusters that they inherited from this one.
        self.shared.wait_for_io()?;
        core.change(&self.shared, &touched, |lvs, base| base.run(lvs.delete(id)))
    }

    /// Changes the size of a volume, in clusters. A smaller size is refused while channels are open.
    ///
    /// # Errors
    /// EBUSY; EPERM for a snapshot; ENOSPC; the base's error.
    pub fn resize(&self, id: BlobId, clusters: u64) -> Result<(), Error> {
        self.check_size(clusters)?;
        loop {
            let mut core = self.shared.lock();
            core.mend(&self.shared)?;
            let volume = core.volumes.get(&id).map(Arc::clone);
            let old = volume.as_ref().map_or(0, |volume| volume.clusters.load(Ordering::Relaxed));
            if let Some(volume) = volume.filter(|_| clusters < old) {
                if volume.channels.load(Ordering::SeqCst) > 0 {
                    return Err(Error::Busy(format!("{volume}: it is in use")));
                }
                // A channel that is opened from now on does no I/O beyond the new size.
                volume.clusters.store(clusters, Ordering::Release);
                (clusters..old).for_each(|index| volume.table.set(index, Place::Zeroes));
                self.shared.wait_for_io()?;
            }
            let thick = |lvs: &Lvs<Base>| {
                let blob = lvs.store().blob(id);
                blob.is_ok_and(|blob| !blob.flags().thin() && !blob.flags().read_only())
            };
            // In steps, since the clusters are zeroed, and guests may wait for clusters.
            let steps = clusters > old && core.lvs.as_ref().is_some_and(thick);
            if let Some(lvs) = core.lvs.as_ref().filter(|_| steps)
                && clusters - old > lvs.store().free_clusters()
            {
                return Err(self.shared.of(&blobstore::Error::NoSpace("clusters")));
            }
            let next = if steps { clusters.min(old + self.shared.batch()) } else { clusters };
            core.change(&self.shared, &[id], |lvs, base| {
                base.run(lvs.store_mut().resize(id, next))
            })?;
            if next == clusters {
                return Ok(());
            }
        }
    }

    /// Makes a volume read-only, for ever.
    ///
    /// # Errors
    /// The base's error.
    pub fn set_read_only(&self, id: BlobId) -> Result<(), Error> {
        let mut core = self.shared.lock();
        core.mend(&self.shared)?;
        if let Some(volume) = core.volumes.get(&id) {
            volume.read_only.store(true, Ordering::Release);
            volume.keep_from_writing();
            self.shared.wait_for_io()?;
        }
        core.change(&self.shared, &[id], |lvs, base| base.run(lvs.store_mut().set_read_only(id)))
    }

    /// Allocates all clusters of a volume and makes it independent of its parent. Guests' I/O and
    /// other operations go on.
    ///
    /// # Errors
    /// ENOSPC; EPERM for a snapshot; the base's error.
    pub fn inflate(&self, id: BlobId) -> Result<(), Error> {
        self.copy_from_parent(id, false)
    }

    /// Copies what a volume inherits from its parent, and makes it a clone of that one's parent.
    ///
    /// # Errors
    /// EINVAL if it has no parent; otherwise as [`LvStore::inflate`].
    pub fn decouple(&self, id: BlobId) -> Result<(), Error> {
        self.copy_from_parent(id, true)
    }

    fn copy_from_parent(&self, id: BlobId, decouple: bool) -> Result<(), Error> {
        let mut from = 0;
        let limit = usize::try_from(self.shared.batch()).unwrap_or(1);
        loop {
            let mut core = self.shared.lock();
            core.mend(&self.shared)?;
            let Some(plan) =
                core.copy_plan(id, decouple, from, limit).map_err(|e| self.shared.of(&e))?
            else {
                return Ok(());
            };
            if let Some(last) = plan.missing.last() {
                from = last + 1;
                let external = plan.external.as_deref();
                allocate(&self.shared, core, id, &plan.missing, external)?;
                // Guests that wait for a cluster come first.
                thread::yield_now();
                continue;
            }
            let touched = core.descendants(id);
            let mut stale = false;
            let ended = core.change(&self.shared, &touched, |lvs, base| {
                let store = lvs.store_mut();
                let ended = if plan.decouple {
                    base.run(store.decouple_end(id))
                } else {
                    base.run(store.inflate_end(id))
                };
                stale = ended == Err(blobstore::Error::Stale);
                ended
            });
            if !stale {
                return ended;
            }
            // A guest has given clusters back meanwhile.
            from = 0;
        }
    }

    /// Makes a snapshot the parent of a volume of the same size.
    ///
    /// # Errors
    /// EINVAL if it is none; EEXIST if it is the parent already.
    pub fn set_parent(&self, id: BlobId, parent: BlobId) -> Result<(), Error> {
        self.shared.change(&[id], |lvs, base| base.run(lvs.store_mut().set_parent(id, parent)))
    }

    /// Makes the bdev with UUID `external` the parent of a volume.
    ///
    /// # Errors
    /// EINVAL if the volume is not thin; EEXIST if it is the parent already.
    pub fn set_external_parent(&self, id: BlobId, external: Uuid) -> Result<(), Error> {
        let mut name = external.to_string().into_bytes();
        name.push(0);
        self.shared
            .change(&[id], |lvs, base| base.run(lvs.store_mut().set_external_parent(id, name)))
    }

    /// Makes use of a base that has grown.
    ///
    /// # Errors
    /// ENOSPC if the store's masks have no room for it; the base's error.
    pub fn grow(&self) -> Result<(), Error> {
        self.shared.change(&[], |lvs, base| base.run(lvs.store_mut().grow()))
    }

    /// Lets volumes read from the bdev of an external snapshot, which they name by `id`. Waits for
    /// no operation under way.
    ///
    /// # Errors
    /// As [`Bdev::open`].
    pub fn add_external(&self, id: Vec<u8>, bdev: &Arc<dyn Bdev>) -> Result<(), Error> {
        self.shared.externals.add(id, bdev)
    }

    /// Returns whether it uses this bdev as an external snapshot.
    #[must_use]
    pub fn has_external(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.shared.externals.has(bdev)
    }

    /// Lets go of a bdev that is an external snapshot. Waits for no operation under way.
    pub fn remove_external(&self, bdev: &Arc<dyn Bdev>) {
        self.shared.externals.remove(|external| Arc::ptr_eq(external, bdev));
    }

    /// Writes what marks the store as clean, and closes it: its volumes' I/O to clusters that they
    /// have goes on, other I/O fails.
    ///
    /// # Errors
    /// The base's error: the store is closed, and not marked as clean.
    pub fn close(&self) -> Result<(), Error> {
        self.shut_down(|mut lvs, base| base.run(lvs.store_mut().unload()))
    }

    /// Deletes the store with all its volumes, which have no bdevs any more.
    ///
    /// # Errors
    /// The base's error.
    pub fn destroy(&self) -> Result<(), Error> {
        self.shut_down(|lvs, base| base.run(lvs.into_store().destroy()).map(drop))
    }

    fn shut_down(
        &self,
        end: impl FnOnce(Lvs<Base>, &Base) -> blobstore::Result<()>,
    ) -> Result<(), Error> {
        let mut core = self.shared.lock_to_close();
        let mended = core.mend(&self.shared);
        let ended = core.lvs.take().map(|lvs| end(lvs, &core.base));
        core.base.close();
        drop(core);
        self.shared.close();
        mended?;
        ended.unwrap_or(Ok(())).map_err(|e| self.shared.of(&e))
    }
}

impl Drop for LvStore {
    fn drop(&mut self) {
        // The store's thread closes the base.
        self.shared.close();
    }
}
