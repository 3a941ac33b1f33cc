//! I/O counters of a device: each user writes its own, readers add them up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::io::{OPS, Op, Status};

/// A device's I/O counters, over all its users.
///
/// A user (a virtqueue) takes its [`Counters`] with [`Stats::attach`] off the reactors and then
/// counts without read-modify-write instructions.
#[derive(Debug, Default)]
pub struct Stats {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    users: Vec<Arc<Counters>>,
    /// What users that are gone had counted.
    gone: [OpCounts; OPS],
    /// What all had counted at the last reset.
    reset: [OpCounts; OPS],
}

/// One user's counters. Only that user calls [`Counters::record`].
#[derive(Debug, Default)]
pub struct Counters {
    ops: [OpCounters; OPS],
}

#[derive(Debug, Default)]
struct OpCounters {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    ticks: AtomicU64,
}

/// Totals of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Operations completed, the failed ones included.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Sum of their latencies, in ticks of the time-stamp counter.
    pub ticks: u64,
}

impl Stats {
    /// Counters for a new user. They count for as long as the user keeps them.
    #[must_use]
    pub fn attach(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.fold_gone();
        inner.users.push(Arc::clone(&counters));
        counters
    }

    /// Totals since the last [`Stats::reset`], indexed by `Op as usize`.
    #[must_use]
    pub fn totals(&self) -> [OpCounts; OPS] {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut totals = inner.ever();
        for (total, reset) in totals.iter_mut().zip(&inner.reset) {
            total.count = total.count.saturating_sub(reset.count);
            total.bytes = total.bytes.saturating_sub(reset.bytes);
            total.errors = total.errors.saturating_sub(reset.errors);
            total.ticks = total.ticks.saturating_sub(reset.ticks);
        }
        totals
    }

    /// Starts counting from zero.
    pub fn reset(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reset = inner.ever();
    }
}

impl Inner {
    fn ever(&self) -> [OpCounts; OPS] {
        self.users.iter().fold(self.gone, |mut sum, user| {
            user.add_to(&mut sum);
            sum
        })
    }

    /// Moves the counts of users that dropped their counters into `gone`.
    fn fold_gone(&mut self) {
        let Self { users, gone, .. } = self;
        users.retain(|user| {
            let live = Arc::strong_count(user) > 1;
            if !live {
                user.add_to(gone);
            }
            live
        });
    }
}

impl Counters {
    /// Counts one operation that has ended after `ticks`.
    #[inline]
    pub fn record(&self, op: Op, bytes: u64, ticks: u64, status: Status) {
        if status == Status::Ok {
            self.record_batch(op, 1, bytes, ticks);
        } else {
            let counters = &self.ops[op as usize];
            add(&counters.count, 1);
            add(&counters.ticks, ticks);
            add(&counters.errors, 1);
        }
    }

    /// Counts `count` operations that have succeeded, of `bytes` and `ticks` in all.
    #[inline]
    pub fn record_batch(&self, op: Op, count: u64, bytes: u64, ticks: u64) {
        let counters = &self.ops[op as usize];
        add(&counters.count, count);
        add(&counters.ticks, ticks);
        add(&counters.bytes, bytes);
    }

    fn add_to(&self, sum: &mut [OpCounts; OPS]) {
        for (sum, counters) in sum.iter_mut().zip(&self.ops) {
            sum.count += counters.count.load(Ordering::Relaxed);
            sum.bytes += counters.bytes.load(Ordering::Relaxed);
            sum.errors += counters.errors.load(Ordering::Relaxed);
            sum.ticks += counters.ticks.load(Ordering::Relaxed);
        }
    }
}

/// Relaxed: each counter has this one writer, and readers want no order among them.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_outlive_their_user_and_a_reset() {
        let stats = Stats::default();
        let user = stats.attach();
        user.record(Op::Read, 4096, 10, Status::Ok);
        user.record(Op::Read, 4096, 30, Status::IoError);
        drop(user);
        let user = stats.attach();
        user.record(Op::Read, 512, 5, Status::Ok);
        let read = stats.totals()[Op::Read as usize];
        assert_eq!(read, OpCounts { count: 3, bytes: 4608, errors: 1, ticks: 45 });
        stats.reset();
        assert_eq!(stats.totals()[Op::Read as usize], OpCounts::default());
        user.record(Op::Read, 512, 7, Status::Ok);
        assert_eq!(stats.totals()[Op::Read as usize].count, 1);
    }
}
