//! Histograms of latencies, in SPDK's geometry.
//!
//! The counters have one fixed geometry, the finest that an operator can ask for. The histogram that
//! is shown is made of them, so neither a change of the options nor a channel that opens later loses
//! counts.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::Stats;
use crate::io::{OPS, Op};

/// The counters' granularity: each power of two of ticks has 2^7 buckets.
const GRANULARITY: u8 = 7;

/// The last power of two with buckets of its own. Latencies from 2^41 ticks on count in the last
/// bucket: 9 minutes at 4 GHz.
const RANGE_MAX: u32 = 34;

const BUCKETS: usize = ((RANGE_MAX as usize) + 1) << GRANULARITY;

/// What an operator wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramOptions {
    /// The operations that count, a bit for each `Op as u8`.
    pub ops: u8,
    /// Each power of two of ticks has 2^granularity buckets.
    pub granularity: u8,
    /// Shorter latencies, in ticks, count in the first bucket.
    pub min_ticks: u64,
    /// Longer latencies, in ticks, count in the last bucket.
    pub max_ticks: u64,
}

impl HistogramOptions {
    /// The largest granularity.
    pub const GRANULARITY_MAX: u8 = GRANULARITY;

    /// All operations.
    pub const ALL_OPS: u8 = (1 << OPS) - 1;
}

/// The number of the power of two to which a latency belongs.
fn range(granularity: u8, ticks: u64) -> u32 {
    (64 - u32::from(granularity)).saturating_sub(ticks.leading_zeros())
}

/// The bucket of a latency, from the first one of range 0.
fn bucket(granularity: u8, ticks: u64) -> usize {
    let range = range(granularity, ticks);
    let mask = (1_u64 << granularity) - 1;
    let index = (ticks >> range.saturating_sub(1)) & mask;
    // Both fit: there are at most 65 ranges of 2^granularity buckets.
    ((range as usize) << granularity) + usize::try_from(index).unwrap_or(0)
}

/// The shortest latency of a bucket of the counters.
fn start(bucket: usize) -> u64 {
    let (range, index) = (bucket >> GRANULARITY, (bucket & ((1 << GRANULARITY) - 1)) as u64);
    match range {
        0 => index,
        range => (index | 1 << GRANULARITY) << (range - 1),
    }
}

/// Counts, one for each bucket; empty until one is counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts(Vec<u64>);

/// One channel's counters. Only its user counts.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// The operations that count, a bit each; 0 while the histogram is disabled.
    ops: AtomicU8,
    /// Made when the histogram is first enabled, and kept.
    buckets: std::sync::OnceLock<Box<[AtomicU64]>>,
}

impl Recorder {
    /// Allocates, so it is not for reactors.
    pub(super) fn enable(&self, options: &HistogramOptions) {
        self.buckets.get_or_init(|| (0..BUCKETS).map(|_| AtomicU64::new(0)).collect());
        self.ops.store(options.ops, Ordering::Relaxed);
    }

    fn disable(&self) {
        self.ops.store(0, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn is_enabled(&self) -> bool {
        self.ops.load(Ordering::Relaxed) != 0
    }

    /// Counts operations with this latency, if the histogram is enabled for their kind.
    pub(super) fn record(&self, op: Op, count: u64, ticks: u64) {
        if self.ops.load(Ordering::Relaxed) & (1 << (op as u8)) == 0 {
            return;
        }
        // `None` if `enable` runs at this moment.
        let Some(buckets) = self.buckets.get() else { return };
        super::add(&buckets[bucket(GRANULARITY, ticks).min(BUCKETS - 1)], count);
    }

    pub(super) fn add_to(&self, sum: &mut Counts) {
        let Some(buckets) = self.buckets.get() else { return };
        sum.0.resize(BUCKETS, 0);
        for (sum, bucket) in sum.0.iter_mut().zip(buckets) {
            *sum += bucket.load(Ordering::Relaxed);
        }
    }
}

impl Stats {
    /// Enables the histogram of latencies, or changes its options. Counts from before stay if it is
    /// enabled already.
    pub fn enable_histogram(&self, options: HistogramOptions) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.histogram.is_none() {
            inner.reset_latencies = inner.latencies_ever();
        }
        for user in &inner.users {
            user.counters.latencies.enable(&options);
            user.counters.look_at_all();
        }
        inner.histogram = Some(options);
    }

    /// Disables the histogram.
    pub fn disable_histogram(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.users.iter().for_each(|user| user.counters.latencies.disable());
        inner.histogram = None;
    }

    /// Returns the latencies that were counted since the histogram was enabled; `None` while it is
    /// disabled.
    #[must_use]
    pub fn latencies(&self) -> Option<Latencies> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let options = inner.histogram.clone()?;
        Some(Latencies::new(options, inner.latencies_ever(), &inner.reset_latencies))
    }
}

/// A bdev's histogram of latencies.
#[derive(Clone, Debug)]
pub struct Latencies {
    options: HistogramOptions,
    counts: Vec<u64>,
}

impl Latencies {
    /// Those that were counted since `reset`.
    pub(super) fn new(
        options: HistogramOptions,
        Counts(mut counts): Counts,
        reset: &Counts,
    ) -> Self {
        for (count, reset) in counts.iter_mut().zip(&reset.0) {
            *count = count.saturating_sub(*reset);
        }
        Self { options, counts }
    }

    /// The first and the last power of two with buckets of its own.
    #[must_use]
    pub fn ranges(&self) -> (u32, u32) {
        let range = |ticks| range(self.options.granularity, ticks);
        (range(self.options.min_ticks), range(self.options.max_ticks))
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &HistogramOptions {
        &self.options
    }

    /// The number of operations in each bucket of the requested geometry.
    #[must_use]
    pub fn buckets(&self) -> Vec<u64> {
        let granularity = self.options.granularity;
        let (first, last) = self.ranges();
        let ranges = (last.saturating_sub(first) + 1) as usize;
        let mut buckets = vec![0; ranges << granularity];
        let end = buckets.len() - 1;
        let skipped = (first as usize) << granularity;
        for (fine, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let at = bucket(granularity, start(fine)).saturating_sub(skipped).min(end);
            buckets[at] += count;
        }
        buckets
    }

    /// The number of operations whose latency is not longer than this, in ticks. Operations in the
    /// bucket of this latency count only if all of the bucket's latencies fit.
    #[must_use]
    pub fn count_up_to(&self, ticks: u64) -> u64 {
        let fits = |(fine, _): &(usize, &u64)| start(fine + 1) <= ticks.saturating_add(1);
        self.counts.iter().enumerate().take_while(fits).map(|(_, count)| count).sum()
    }

    /// The sum of all latencies, in ticks, as the buckets have it: at most 1 % too small.
    #[must_use]
    pub fn sum_ticks(&self) -> u64 {
        let sums = self.counts.iter().enumerate();
        sums.fold(0, |sum, (fine, count)| sum.saturating_add(start(fine).saturating_mul(*count)))
    }

    /// The number of all operations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qos::QosUser;

    fn options(granularity: u8, min_ticks: u64, max_ticks: u64) -> HistogramOptions {
        HistogramOptions { ops: HistogramOptions::ALL_OPS, granularity, min_ticks, max_ticks }
    }

    #[test]
    fn buckets_are_contiguous_and_start_where_they_say() {
        assert_eq!(bucket(GRANULARITY, 0), 0);
        assert_eq!(bucket(GRANULARITY, u64::MAX), (57 << 7) + 127);
        for bucket in 0..BUCKETS {
            assert_eq!(super::bucket(GRANULARITY, start(bucket)), bucket);
            assert_eq!(super::bucket(GRANULARITY, start(bucket + 1) - 1), bucket);
        }
    }

    /// As in the histogram of SPDK: slot = ((range − first range) << granularity) + index.
    #[test]
    fn counts_are_shown_in_any_geometry() {
        let stats = Stats::default();
        let early = stats.attach(QosUser::new(1));
        stats.enable_histogram(options(7, 2600, 312_000_000_000));
        let late = stats.attach(QosUser::new(2));
        for user in [&early, &late] {
            user.record(Op::Read, 512, 1);
            user.record_batch(Op::Write, 10.try_into().unwrap(), 5120, 30_000);
            user.record(Op::Read, 512, u64::MAX - 1);
        }
        let shown = stats.latencies().unwrap();
        assert_eq!((shown.ranges(), shown.count()), ((5, 32), 24));
        let buckets = shown.buckets();
        assert_eq!((buckets.len(), buckets[0], buckets[buckets.len() - 1]), (28 << 7, 2, 2));
        // 3000 has range 5 and index (3000 >> 4) & 127.
        assert_eq!(buckets[59], 20);
        for granularity in 0..=7 {
            stats.enable_histogram(options(granularity, 0, u64::MAX));
            let shown = stats.latencies().unwrap().buckets();
            assert_eq!(shown.iter().sum::<u64>(), 24);
            assert_eq!(shown[bucket(granularity, 3000)], 20);
        }
    }

    #[test]
    fn borders_count_all_that_is_not_longer() {
        let stats = Stats::default();
        let user = stats.attach(QosUser::new(1));
        stats.enable_histogram(options(7, 0, u64::MAX));
        for ticks in [5, 100, 3000] {
            user.record(Op::Read, 512, ticks);
        }
        let shown = stats.latencies().unwrap();
        assert!((3075..=3105).contains(&shown.sum_ticks()), "{}", shown.sum_ticks());
        let counts = [0, 4, 5, 100, 2999, 3007, u64::MAX].map(|ticks| shown.count_up_to(ticks));
        assert_eq!(counts, [0, 0, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn a_histogram_counts_its_operations_while_it_is_enabled() {
        let stats = Stats::default();
        let user = stats.attach(QosUser::new(1));
        let count = || stats.latencies().map(|latencies| latencies.count());
        user.record(Op::Read, 512, 10);
        assert_eq!(count(), None);
        let writes = HistogramOptions { ops: 1 << (Op::Write as u8), ..options(7, 0, 1 << 30) };
        stats.enable_histogram(writes.clone());
        user.record(Op::Read, 512, 10);
        user.record(Op::Write, 512, 10);
        assert_eq!(count(), Some(1));
        // Enabled once more: the counts stay. They outlive their user.
        stats.enable_histogram(options(7, 0, 1 << 30));
        user.record(Op::Read, 512, 10);
        drop(user);
        let user = stats.attach(QosUser::new(1));
        assert_eq!(count(), Some(2));
        // Enabled after it was disabled: from zero.
        stats.disable_histogram();
        user.record(Op::Read, 512, 10);
        stats.enable_histogram(writes);
        assert_eq!(count(), Some(0));
        user.record(Op::Write, 512, 10);
        assert_eq!(count(), Some(1));
    }
}
