//! I/O counters of a device. Each user writes its own counters, and readers add them up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::failure::{FAILURE_KINDS, Failure, FirstFailure};
use crate::io::{OPS, Op};

/// A device's I/O counters, summed over all its users.
///
/// A user (a virtqueue) takes its [`Counters`] with [`Stats::attach`], not on a reactor, and then
/// counts without read-modify-write instructions.
#[derive(Debug, Default)]
pub struct Stats {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    users: Vec<Arc<Counters>>,
    /// The counts of users that are gone.
    gone: [OpCounts; OPS],
    /// The counts of all users at the last reset.
    reset: [OpCounts; OPS],
    /// The same two counts for failures, by kind.
    gone_failures: [u64; FAILURE_KINDS],
    reset_failures: [u64; FAILURE_KINDS],
    /// The first failure of users that are gone, since the last report.
    gone_first: Option<Failure>,
    /// The number of failures up to the last report.
    reported: u64,
}

/// One user's counters. Only that user writes them.
#[derive(Debug, Default)]
pub struct Counters {
    ops: [OpCounters; OPS],
    failures: [AtomicU64; FAILURE_KINDS],
    first: FirstFailure,
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
    /// Completed operations, including failed ones.
    pub count: u64,
    /// Bytes of the successful operations.
    pub bytes: u64,
    /// Failed operations.
    pub errors: u64,
    /// Sum of the latencies, in ticks of the time-stamp counter.
    pub ticks: u64,
}

impl Stats {
    /// Adds counters for a new user. They count as long as the user keeps them.
    #[must_use]
    pub fn attach(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.fold_gone();
        inner.users.push(Arc::clone(&counters));
        counters
    }

    /// Returns the totals since the last [`Stats::reset`], indexed by `Op as usize`.
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

    /// Returns the failures since the last reset, indexed by [`crate::FailureKind`] as usize.
    #[must_use]
    pub fn failures(&self) -> [u64; FAILURE_KINDS] {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let ever = inner.failures_ever();
        std::array::from_fn(|kind| ever[kind].saturating_sub(inner.reset_failures[kind]))
    }

    /// Returns the first failure of one of the users, and the number of all failures, since the
    /// last call that returned `Some`.
    pub fn report_failures(&self) -> Option<(Failure, u64)> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let firsts: Vec<_> = inner.users.iter().filter_map(|user| user.first.take()).collect();
        let first = inner.gone_first.take().or(firsts.first().copied())?;
        let ever: u64 = inner.failures_ever().iter().sum();
        // A failure may have been counted before the last report and stored after it.
        let count = (ever - inner.reported).max(1);
        inner.reported = ever;
        Some((first, count))
    }

    /// Starts counting from zero.
    pub fn reset(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reset = inner.ever();
        inner.reset_failures = inner.failures_ever();
    }

    /// Sets the failure counters to zero.
    pub fn reset_failures(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reset_failures = inner.failures_ever();
    }
}

impl Inner {
    fn ever(&self) -> [OpCounts; OPS] {
        self.users.iter().fold(self.gone, |mut sum, user| {
            user.add_to(&mut sum);
            sum
        })
    }

    fn failures_ever(&self) -> [u64; FAILURE_KINDS] {
        self.users.iter().fold(self.gone_failures, |mut sum, user| {
            user.add_failures_to(&mut sum);
            sum
        })
    }

    /// Moves the counts of users that have dropped their counters into `gone`.
    fn fold_gone(&mut self) {
        let Self { users, gone, gone_failures, gone_first, .. } = self;
        users.retain(|user| {
            let live = Arc::strong_count(user) > 1;
            if !live {
                user.add_to(gone);
                user.add_failures_to(gone_failures);
                *gone_first = gone_first.or_else(|| user.first.take());
            }
            live
        });
    }
}

impl Counters {
    /// Counts one failed operation, which took `ticks`.
    #[cold]
    pub fn record_failure(&self, ticks: u64, failure: &Failure) {
        let counters = &self.ops[failure.op as usize];
        add(&counters.count, 1);
        add(&counters.ticks, ticks);
        add(&counters.errors, 1);
        add(&self.failures[failure.kind as usize], 1);
        self.first.leave(failure);
    }

    /// Counts `count` successful operations with a total of `bytes` and `ticks`.
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

    fn add_failures_to(&self, sum: &mut [u64; FAILURE_KINDS]) {
        for (sum, count) in sum.iter_mut().zip(&self.failures) {
            *sum += count.load(Ordering::Relaxed);
        }
    }
}

/// Relaxed suffices: each counter has one writer, and readers need no order among the counters.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::FailureKind;

    #[test]
    fn counts_outlive_their_user_and_a_reset() {
        let stats = Stats::default();
        let user = stats.attach();
        user.record_batch(Op::Read, 1, 4096, 10);
        user.record_failure(30, &failure(0));
        drop(user);
        let user = stats.attach();
        user.record_batch(Op::Read, 1, 512, 5);
        let read = stats.totals()[Op::Read as usize];
        assert_eq!(read, OpCounts { count: 3, bytes: 4608, errors: 1, ticks: 45 });
        stats.reset();
        assert_eq!(stats.totals()[Op::Read as usize], OpCounts::default());
        user.record_batch(Op::Read, 1, 512, 7);
        assert_eq!(stats.totals()[Op::Read as usize].count, 1);
    }

    fn failure(offset: u64) -> Failure {
        let (kind, errno) = (FailureKind::Aio, libc::ENOSPC);
        Failure { kind, op: Op::Read, offset: Some(offset), len: 4096, errno }
    }

    #[test]
    fn failures_are_counted_by_kind_and_the_first_is_reported() {
        let stats = Stats::default();
        assert_eq!(stats.report_failures(), None);
        let (one, other) = (stats.attach(), stats.attach());
        (1..4).for_each(|offset| other.record_failure(1, &failure(offset)));
        one.record_failure(1, &Failure { kind: FailureKind::Failed, ..failure(9) });
        assert_eq!(stats.failures(), [1, 3]);
        let first = Failure { kind: FailureKind::Failed, ..failure(9) };
        assert_eq!(stats.report_failures(), Some((first, 4)));
        assert_eq!(stats.report_failures(), None);
        // The failure of a user that is gone is still reported, and counted once.
        other.record_failure(1, &failure(5));
        drop(other);
        let _another = stats.attach();
        assert_eq!(stats.report_failures(), Some((failure(5), 1)));
        assert_eq!(stats.report_failures(), None);
        assert_eq!(stats.failures(), [1, 4]);
        // A reset clears the counters, and keeps failures that are not reported yet.
        one.record_failure(1, &failure(6));
        stats.reset_failures();
        assert_eq!(stats.failures(), [0, 0]);
        assert_eq!(
            stats.totals()[Op::Read as usize].errors,
            6,
            "the operations' error counter is not reset"
        );
        assert_eq!(stats.report_failures(), Some((failure(6), 1)));
        one.record_failure(1, &failure(7));
        assert_eq!((stats.failures(), stats.totals()[Op::Read as usize].errors), ([0, 1], 7));
        stats.reset();
        assert_eq!((stats.failures(), stats.totals()[Op::Read as usize].errors), ([0, 0], 0));
    }
}
