//! What the channels, the threads and the operations of a store share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Error, Grace, Waker};
use blobstore::BlobId;
use blobstore::lvs::Lvs;

use crate::core::Core;
use crate::device::Base;
use crate::externals::Externals;
use crate::facts::Facts;
use crate::store::of;
use crate::thread::Link;

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

/// Clusters that an operation allocates while it holds the lock once.
pub(crate) const BATCH: usize = 32;

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
        // Guests may have allocated some meanwhile.
        let still = |index: &u64| !core.missing(id, *index..*index + 1, 1).is_empty();
        let indices: Vec<u64> = indices.iter().copied().filter(still).collect();
        if indices.is_empty() { Ok(()) } else { core.allocate(shared, id, &indices) }
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
