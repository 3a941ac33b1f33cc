//! A user of a bdev: one controller, or one target of a controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bdev::{Bdev, QosUser, UserCounts, with_bases};

/// A user of a bdev's rate limits and counters. Its counters are forgotten when it is dropped.
pub struct User {
    bdev: Arc<dyn Bdev>,
    id: QosUser,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "User({})", self.bdev.name())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.bdev.stats().forget(self.id);
    }
}

impl User {
    /// Creates a user. Each call creates a separate one.
    #[must_use]
    pub fn new(bdev: Arc<dyn Bdev>) -> Self {
        static USERS: AtomicU32 = AtomicU32::new(1);
        let id = QosUser::new(USERS.fetch_add(1, Ordering::Relaxed));
        Self { bdev, id }
    }

    /// Returns the bdev.
    #[must_use]
    pub fn bdev(&self) -> &Arc<dyn Bdev> {
        &self.bdev
    }

    /// Returns its identity for the bdev's rate limits and counters.
    #[must_use]
    pub fn id(&self) -> QosUser {
        self.id
    }

    /// Returns what its queues have done at the bdev.
    #[must_use]
    pub fn counts(&self) -> UserCounts {
        self.bdev.stats().of_user(self.id)
    }
}

/// Returns whether a bdev is `base` or is built on it.
#[must_use]
pub fn uses(bdev: &Arc<dyn Bdev>, base: &Arc<dyn Bdev>) -> bool {
    with_bases(bdev).iter().any(|below| Arc::ptr_eq(below, base))
}

/// Returns whether a bdev, or one that it is built on, has rate limits.
#[must_use]
pub fn is_limited(bdev: &dyn Bdev) -> bool {
    !bdev.qos().limits().is_unlimited() || bdev.bases().iter().any(|base| is_limited(&**base))
}
