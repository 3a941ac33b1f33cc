//! The storage that a device's requests access.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use bdev::Bdev;
use vhost_target::device::{Granted, Lease, StorageId, StorageUse};

/// Returns the storage that I/O of a bdev accesses. `writes`: whether the guest may write.
#[must_use]
pub fn storage_use(bdev: &Arc<dyn Bdev>, writes: bool) -> StorageUse {
    let mut storage = StorageUse { writes, ..StorageUse::default() };
    // A bdev may grow: the range of a complete bdev has no end.
    let mut left = vec![(Arc::clone(bdev), 0..u64::MAX)];
    while let Some((bdev, bytes)) = left.pop() {
        match bdev.bases() {
            bases if bases.is_empty() => {
                let place = bdev.storage().map(|storage| storage_id(storage, bytes.clone()));
                storage.storages.extend(place);
                storage.storages.push(identity(&bdev, bytes));
                let lease = bdev.lease().filter(|_| writes);
                storage.leases.extend(lease.map(|lease| Arc::new(BdevLease(lease)) as _));
            }
            bases => left.extend(bases.into_iter().map(|base| {
                let bytes = range_on_base(&*bdev, &*base, &bytes);
                (base, bytes)
            })),
        }
    }
    storage
}

/// Returns the bytes of a base that accesses to `bytes` of the bdev use.
fn range_on_base(bdev: &dyn Bdev, base: &dyn Bdev, bytes: &Range<u64>) -> Range<u64> {
    let Some(offset) = bdev.base_offset() else { return 0..u64::MAX };
    // A bdev as large as its base may grow with it.
    let is_part = bdev.size_bytes() < base.size_bytes();
    let end = if is_part { bytes.end.min(bdev.size_bytes()) } else { bytes.end };
    offset.saturating_add(bytes.start)..offset.saturating_add(end)
}

/// Returns the identity of a bdev without a base.
fn identity(bdev: &Arc<dyn Bdev>, bytes: Range<u64>) -> StorageId {
    let address = Arc::as_ptr(bdev).cast::<()>() as u64;
    // A weak reference keeps the address from being reused.
    let keeps: Arc<dyn Any + Send + Sync> = Arc::new(Arc::downgrade(bdev));
    StorageId { kind: "bdev", number: (address, 0), bytes, keeps: Some(keeps) }
}

/// Returns the identity of the place where a bdev stores its data. Several bdevs may use the same
/// file.
fn storage_id(storage: bdev::Storage, bytes: Range<u64>) -> StorageId {
    let (kind, number) = match storage {
        bdev::Storage::File { device, inode } => ("file", (device, inode)),
        bdev::Storage::BlockDevice(number) => ("block device", (number, 0)),
    };
    StorageId { kind, number, bytes, keeps: None }
}

/// Adapts a bdev's lease to the target's trait.
#[derive(Debug)]
struct BdevLease(Arc<dyn bdev::Lease>);

impl Lease for BdevLease {
    fn add_user(&self, granted: &Granted) -> bool {
        self.0.add_user(granted)
    }
    fn remove_user(&self) {
        self.0.remove_user();
    }
    fn is_held(&self) -> bool {
        self.0.is_held()
    }
}
