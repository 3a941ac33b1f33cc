//! I/O counters of a device. Each user writes its own counters, and readers add them up.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::failure::{FAILURE_KINDS, Failure, FirstFailure};
use crate::io::{OPS, Op};
use crate::qos::QosUser;

mod counts;
mod extremes;
mod histogram;
mod sums;

pub use counts::{OpCounts, UserCounts};
pub use histogram::{HistogramOptions, Latencies};
pub use sums::Sums;

use extremes::Extremes;
use histogram::{Counts, Recorder};

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
    users: Vec<Attached>,
    /// The counts of users that are gone.
    gone: [OpCounts; OPS],
    /// The counts of all users at the last reset.
    reset: [OpCounts; OPS],
    /// The counts of channels that are gone, for users that are not.
    gone_users: HashMap<QosUser, UserCounts>,
    /// The same two counts for failures, by kind.
    gone_failures: [u64; FAILURE_KINDS],
    reset_failures: [u64; FAILURE_KINDS],
    /// The first failure of users that are gone, since the last report.
    gone_first: Option<Failure>,
    /// The number of failures up to the last report.
    reported: u64,
    /// The options of the histogram, while it is enabled.
    histogram: Option<HistogramOptions>,
    /// The histogram of users that are gone, and that of all users when it was enabled.
    gone_latencies: Counts,
    reset_latencies: Counts,
}

#[derive(Debug)]
struct Attached {
    user: QosUser,
    counters: Arc<Counters>,
    /// Its counts at the last reset.
    reset: [OpCounts; OPS],
    /// Its counts need not outlive it.
    forgotten: bool,
}

/// One user's counters. Only that user writes them.
#[derive(Debug, Default)]
pub struct Counters {
    ops: [OpCounters; OPS],
    failures: [AtomicU64; FAILURE_KINDS],
    first: FirstFailure,
    throttled: AtomicU64,
    latencies: Recorder,
}

#[derive(Debug, Default)]
struct OpCounters {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    ticks: AtomicU64,
    extremes: Extremes,
}

impl Stats {
    /// Adds counters for a new channel of a user. They count as long as they are kept.
    #[must_use]
    pub fn attach(&self, user: QosUser) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.fold_gone();
        if let Some(options) = &inner.histogram {
            counters.latencies.enable(options);
        }
        inner.users.push(Attached {
            user,
            counters: Arc::clone(&counters),
            reset: Default::default(),
            forgotten: false,
        });
        counters
    }

    /// Returns the totals since the last [`Stats::reset`], indexed by `Op as usize`.
    #[must_use]
    pub fn totals(&self) -> [OpCounts; OPS] {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let ever = inner.ever();
        std::array::from_fn(|op| ever[op].since(&inner.reset[op]))
    }

    /// Returns the totals since the last reset for each channel that is open, with its user.
    #[must_use]
    pub fn per_channel(&self) -> Vec<(QosUser, [OpCounts; OPS])> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.fold_gone();
        let counts = |attached: &Attached| {
            let mut sum = Default::default();
            attached.counters.add_to(&mut sum);
            (attached.user, std::array::from_fn(|op| sum[op].since(&attached.reset[op])))
        };
        inner.users.iter().map(counts).collect()
    }

    /// Returns what a user has done, also through channels that are gone.
    #[must_use]
    pub fn of_user(&self, user: QosUser) -> UserCounts {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = inner.gone_users.get(&user).copied().unwrap_or_default();
        for attached in inner.users.iter().filter(|attached| attached.user == user) {
            attached.counters.add_to_user(&mut sum);
        }
        sum
    }

    /// Forgets a user, which opens no channel any more. Its counts stay in the totals.
    pub fn forget(&self, user: QosUser) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.gone_users.remove(&user);
        let its = inner.users.iter_mut().filter(|attached| attached.user == user);
        its.for_each(|attached| attached.forgotten = true);
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
        let firsts: Vec<_> =
            inner.users.iter().filter_map(|user| user.counters.first.take()).collect();
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
        for attached in &mut inner.users {
            attached.reset = Default::default();
            attached.counters.add_to(&mut attached.reset);
        }
        inner.reset_extremes();
    }

    /// Forgets the shortest and the longest latencies.
    pub fn reset_extremes(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reset_extremes();
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
            user.counters.add_to(&mut sum);
            sum
        })
    }

    fn failures_ever(&self) -> [u64; FAILURE_KINDS] {
        self.users.iter().fold(self.gone_failures, |mut sum, user| {
            user.counters.add_failures_to(&mut sum);
            sum
        })
    }

    fn latencies_ever(&self) -> Counts {
        self.users.iter().fold(self.gone_latencies.clone(), |mut sum, user| {
            user.counters.latencies.add_to(&mut sum);
            sum
        })
    }

    fn reset_extremes(&mut self) {
        for gone in &mut self.gone {
            (gone.min_ticks, gone.max_ticks) = (None, 0);
        }
        let counters = self.users.iter().flat_map(|user| &user.counters.ops);
        counters.for_each(|counters| counters.extremes.reset());
    }

    /// Moves the counts of users that have dropped their counters into `gone`.
    fn fold_gone(&mut self) {
        let Self { users, gone, gone_users, gone_failures, gone_first, gone_latencies, .. } = self;
        users.retain(|Attached { user: number, counters: user, forgotten, .. }| {
            let live = Arc::strong_count(user) > 1;
            if !live {
                user.add_to(gone);
                if !forgotten {
                    user.add_to_user(gone_users.entry(*number).or_default());
                }
                user.add_failures_to(gone_failures);
                user.latencies.add_to(gone_latencies);
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

    /// Counts a successful operation of `bytes` that took `ticks`.
    #[inline]
    pub fn record(&self, op: Op, bytes: u64, ticks: u64) {
        self.record_batch(op, NonZeroU64::MIN, bytes, ticks);
    }

    /// Counts `count` successful operations with a total of `bytes` and `ticks`.
    #[inline]
    pub fn record_batch(&self, op: Op, count: NonZeroU64, bytes: u64, ticks: u64) {
        let counters = &self.ops[op as usize];
        add(&counters.count, count.get());
        add(&counters.ticks, ticks);
        add(&counters.bytes, bytes);
        let latency = if count == NonZeroU64::MIN { ticks } else { ticks / count };
        if counters.extremes.wants(latency) {
            self.look_at(op, count.get(), latency);
        }
    }

    /// Counts an I/O that a rate limit holds back.
    #[cold]
    pub fn record_throttled(&self) {
        add(&self.throttled, 1);
    }

    /// Counts a latency that changes the extremes or goes to the histogram.
    #[cold]
    #[inline(never)]
    fn look_at(&self, op: Op, count: u64, latency: u64) {
        self.ops[op as usize].extremes.extend(latency, || self.latencies.is_enabled());
        self.latencies.record(op, count, latency);
    }

    /// Makes the user look at all latencies, after the histogram was enabled.
    fn look_at_all(&self) {
        self.ops.iter().for_each(|counters| counters.extremes.want_all());
    }

    fn add_to(&self, sum: &mut [OpCounts; OPS]) {
        for (sum, counters) in sum.iter_mut().zip(&self.ops) {
            let (min_ticks, max_ticks) = counters.extremes.get();
            sum.add(&OpCounts {
                count: counters.count.load(Ordering::Relaxed),
                bytes: counters.bytes.load(Ordering::Relaxed),
                errors: counters.errors.load(Ordering::Relaxed),
                ticks: counters.ticks.load(Ordering::Relaxed),
                min_ticks,
                max_ticks,
            });
        }
    }

    fn add_to_user(&self, sum: &mut UserCounts) {
        self.add_to(&mut sum.ops);
        sum.throttled += self.throttled.load(Ordering::Relaxed);
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
        let user = stats.attach(QosUser::new(1));
        user.record(Op::Read, 4096, 10);
        user.record_failure(30, &failure(0));
        drop(user);
        let user = stats.attach(QosUser::new(1));
        user.record(Op::Read, 512, 5);
        let read = stats.totals()[Op::Read as usize];
        let (min_ticks, max_ticks) = (Some(5), 10);
        let expected =
            OpCounts { count: 3, bytes: 4608, errors: 1, ticks: 45, min_ticks, max_ticks };
        assert_eq!(read, expected);
        stats.reset();
        assert_eq!(stats.totals()[Op::Read as usize], OpCounts::default());
        user.record(Op::Read, 512, 7);
        assert_eq!(stats.totals()[Op::Read as usize].count, 1);
    }

    #[test]
    fn extremes_are_those_of_successful_operations_since_their_reset() {
        let stats = Stats::default();
        let (one, other) = (stats.attach(QosUser::new(1)), stats.attach(QosUser::new(2)));
        let read = || {
            let read = stats.totals()[Op::Read as usize];
            (read.min_ticks, read.max_ticks)
        };
        assert_eq!(read(), (None, 0));
        one.record(Op::Read, 512, 7);
        other.record_batch(Op::Read, n(4), 2048, 42);
        one.record_failure(1000, &failure(0));
        assert_eq!(read(), (Some(7), 10));
        drop(other);
        let _another = stats.attach(QosUser::new(2));
        assert_eq!(read(), (Some(7), 10));
        stats.reset_extremes();
        assert_eq!(read(), (None, 0));
        assert_eq!(stats.totals()[Op::Read as usize].count, 6, "the counts stay");
        one.record(Op::Read, 512, 8);
        assert_eq!(read(), (Some(8), 8));
    }

    #[test]
    fn each_channel_has_counts_of_its_own() {
        let stats = Stats::default();
        let (one, other) = (stats.attach(QosUser::new(1)), stats.attach(QosUser::new(2)));
        one.record_batch(Op::Write, n(2), 1024, 20);
        other.record(Op::Write, 512, 5);
        stats.reset();
        one.record_batch(Op::Write, n(3), 1536, 9);
        let counts = |per_channel: Vec<(QosUser, [OpCounts; OPS])>| -> Vec<(QosUser, u64)> {
            per_channel
                .into_iter()
                .map(|(user, ops)| (user, ops[Op::Write as usize].count))
                .collect()
        };
        assert_eq!(counts(stats.per_channel()), [(QosUser::new(1), 3), (QosUser::new(2), 0)]);
        drop(one);
        assert_eq!(counts(stats.per_channel()), [(QosUser::new(2), 0)]);
        assert_eq!(stats.totals()[Op::Write as usize].count, 3);
    }

    #[test]
    fn what_a_user_has_done_outlives_its_channels_but_not_itself() {
        let (stats, user) = (Stats::default(), QosUser::new(1));
        let one = stats.attach(user);
        one.record(Op::Read, 512, 5);
        one.record_throttled();
        drop(one);
        let other = stats.attach(user);
        other.record(Op::Read, 512, 5);
        stats.reset();
        let counts = stats.of_user(user);
        assert_eq!((counts.ops[Op::Read as usize].count, counts.throttled), (2, 1));
        assert_eq!(stats.of_user(QosUser::new(2)), UserCounts::default());
        // Its last channel may be closed later.
        stats.forget(user);
        drop(other);
        let _another = stats.attach(QosUser::new(2));
        assert_eq!(stats.of_user(user), UserCounts::default());
    }

    fn n(count: u64) -> NonZeroU64 {
        NonZeroU64::new(count).unwrap()
    }

    fn failure(offset: u64) -> Failure {
        let (kind, errno) = (FailureKind::Aio, libc::ENOSPC);
        Failure { kind, op: Op::Read, offset: Some(offset), len: 4096, errno }
    }

    #[test]
    fn failures_are_counted_by_kind_and_the_first_is_reported() {
        let stats = Stats::default();
        assert_eq!(stats.report_failures(), None);
        let (one, other) = (stats.attach(QosUser::new(1)), stats.attach(QosUser::new(1)));
        (1..4).for_each(|offset| other.record_failure(1, &failure(offset)));
        one.record_failure(1, &Failure { kind: FailureKind::Failed, ..failure(9) });
        assert_eq!(stats.failures(), [1, 3]);
        let first = Failure { kind: FailureKind::Failed, ..failure(9) };
        assert_eq!(stats.report_failures(), Some((first, 4)));
        assert_eq!(stats.report_failures(), None);
        // The failure of a user that is gone is still reported, and counted once.
        other.record_failure(1, &failure(5));
        drop(other);
        let _another = stats.attach(QosUser::new(1));
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
