//! The sums over all channels of a bdev, in steps.

use std::sync::{Arc, PoisonError};

use super::histogram::Counts;
use super::{Counters, HistogramOptions, Latencies, OpCounts, Stats};
use crate::failure::FAILURE_KINDS;
use crate::io::OPS;

/// What a bdev's channels have done since it was created. The channels are added one at a time: a
/// bdev may have thousands of them, and with a histogram each has thousands of counters.
///
/// It holds the counters of channels, but not the bdev.
#[derive(Debug)]
pub struct Sums {
    /// Totals, indexed by `Op as usize`. No reset changes them, except for the extremes.
    pub ops: [OpCounts; OPS],
    /// Failures, indexed by [`crate::FailureKind`] as usize. No reset changes them.
    pub failures: [u64; FAILURE_KINDS],
    histogram: Option<Histogram>,
    /// The channels that are not added yet.
    channels: Vec<Arc<Counters>>,
}

#[derive(Debug)]
struct Histogram {
    options: HistogramOptions,
    sum: Counts,
    /// The counts when the histogram was enabled.
    reset: Counts,
}

impl Sums {
    /// Adds the next channel. Returns false if there is none.
    pub fn add_channel(&mut self) -> bool {
        let Some(channel) = self.channels.pop() else { return false };
        channel.add_to(&mut self.ops);
        channel.add_failures_to(&mut self.failures);
        if let Some(histogram) = &mut self.histogram {
            channel.latencies.add_to(&mut histogram.sum);
        }
        true
    }

    /// Returns the number of channels that are not added yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.channels.len()
    }

    /// Returns whether the histogram is enabled.
    #[must_use]
    pub fn has_histogram(&self) -> bool {
        self.histogram.is_some()
    }

    /// Returns the latencies that were counted since the histogram was enabled; `None` if it is
    /// disabled.
    #[must_use]
    pub fn latencies(self) -> Option<Latencies> {
        let Histogram { options, sum, reset } = self.histogram?;
        Some(Latencies::new(options, sum, &reset))
    }
}

impl Stats {
    /// Begins to sum up what all channels have done. The sums keep the counters of channels that
    /// are dropped meanwhile.
    #[must_use]
    pub fn sums(&self) -> Sums {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let histogram = inner.histogram.clone().map(|options| Histogram {
            options,
            sum: inner.gone_latencies.clone(),
            reset: inner.reset_latencies.clone(),
        });
        Sums {
            ops: inner.gone,
            failures: inner.gone_failures,
            histogram,
            channels: inner.users.iter().map(|user| Arc::clone(&user.counters)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Failure, FailureKind};
    use crate::io::Op;
    use crate::qos::QosUser;

    fn summed(stats: &Stats) -> Sums {
        let mut sums = stats.sums();
        while sums.add_channel() {}
        sums
    }

    fn count(sums: Sums) -> (u64, u64, Option<u64>) {
        let (read, failures) = (sums.ops[Op::Read as usize].count, sums.failures.iter().sum());
        (read, failures, sums.latencies().map(|latencies| latencies.count()))
    }

    #[test]
    fn channels_are_summed_up_with_those_that_are_gone_and_whatever_was_reset() {
        let stats = Stats::default();
        let [one, other] = [1, 2].map(|user| stats.attach(QosUser::new(user)));
        one.record(Op::Read, 512, 10);
        let options = HistogramOptions {
            ops: HistogramOptions::ALL_OPS,
            granularity: 7,
            min_ticks: 0,
            max_ticks: u64::MAX,
        };
        assert_eq!(count(summed(&stats)), (1, 0, None));
        stats.enable_histogram(options);
        one.record(Op::Read, 512, 10);
        other.record(Op::Read, 512, 10);
        let failure =
            Failure { op: Op::Read, offset: None, len: 512, kind: FailureKind::Failed, errno: 5 };
        other.record_failure(1, &failure);
        assert_eq!(count(summed(&stats)), (4, 1, Some(2)));
        stats.reset();
        // A channel that goes while it is summed up counts once, then and later.
        let mut sums = stats.sums();
        assert_eq!(sums.left(), 2);
        drop(other);
        let _another = stats.attach(QosUser::new(3));
        while sums.add_channel() {}
        assert_eq!(count(sums), (4, 1, Some(2)));
        assert_eq!(count(summed(&stats)), (4, 1, Some(2)));
        let _another = stats.attach(QosUser::new(3));
        assert_eq!(count(summed(&stats)), (4, 1, Some(2)));
    }
}
