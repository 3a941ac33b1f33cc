//! The disk under test, and what the test that makes it must guarantee.

use std::any::Any;
use std::sync::Arc;

use bdev::Bdev;

/// Bytes in each disk: several times what a memory disk copies at once.
pub const SIZE: u64 = 4 << 20;

/// A disk and what it needs. Each check gets a fresh one, and so does each seed of the random
/// model.
///
/// Who makes it must guarantee:
///
/// - The disk has [`SIZE`] bytes, which nobody else reads or writes. Checks may run at the same time,
///   each on its own disk.
/// - Its features include `write_zeroes`. `flush` and `unmap` may be missing: the operation is then
///   [`Unsupported`](bdev::Status::Unsupported).
/// - If `keeps` is set, every byte is zero at first. An unmapped byte reads as it was before or as
///   zero, so an unmap may be rounded inwards, or do nothing. If `unmapped_is_noise` is set, it has
///   any value.
/// - If `keeps` is not set, a read leaves the guest's memory as it was.
/// - The number of other references to `disk` does not change during a check, as the checks count
///   references.
pub struct Fixture {
    /// The disk.
    pub disk: Arc<dyn Bdev>,
    /// Reads return what was written.
    pub keeps: bool,
    /// Unmapped bytes have any value.
    pub unmapped_is_noise: bool,
    /// What is dropped after the disk: a directory, a loop device, the owner of a remote image. The
    /// disk's own threads may still be closing the disk then.
    pub below: Option<Box<dyn Any>>,
}

impl Fixture {
    /// A disk that keeps what is written to it, and needs nothing else.
    pub fn of(disk: Arc<dyn Bdev>) -> Self {
        Self { disk, keeps: true, unmapped_is_noise: false, below: None }
    }

    /// A disk that keeps what is written to it, with something that is dropped after the disk.
    pub fn on(disk: Arc<dyn Bdev>, below: impl Any) -> Self {
        Self { below: Some(Box::new(below)), ..Self::of(disk) }
    }
}
