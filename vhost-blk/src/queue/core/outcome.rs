//! Counts how a disk's I/Os end, for the operator.

use std::sync::atomic::{AtomicU64, Ordering};

use bdev::{Failure, FailureKind, Op, Status, Tag};

use super::Device;
use crate::queue::Queue;

impl Device {
    /// Counts an I/O that has ended: its tag, operation and length, and how long it took.
    #[inline]
    pub(super) fn count(
        &mut self,
        queue: &Queue,
        (tag, op, len): (u16, Op, u64),
        ticks: u64,
        status: Status,
    ) {
        if status == Status::Ok {
            self.counters.record_batch(op, 1, len, ticks);
        } else {
            self.count_failure(queue, (tag, op, len), ticks, status);
        }
    }

    /// Stores the reason for the control side, which logs it.
    #[cold]
    #[inline(never)]
    fn count_failure(
        &mut self,
        queue: &Queue,
        (tag, op, len): (u16, Op, u64),
        ticks: u64,
        status: Status,
    ) {
        let unsupported = status == Status::Unsupported;
        let errno = if unsupported { libc::EOPNOTSUPP } else { libc::EIO };
        let unknown = Failure { kind: FailureKind::Failed, op, offset: None, len, errno };
        let failure = self.channel.0.failure(Tag(tag)).unwrap_or(unknown);
        self.counters.record_failure(ticks, &failure);
        add(&queue.errors, 1);
    }
}

/// Adds to a counter that only this thread writes.
#[inline]
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed) + count, Ordering::Relaxed);
}
