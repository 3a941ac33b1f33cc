//! The state of the process at one time, as plain data.

use std::collections::HashMap;

use bdev::{FAILURE_KINDS, Latencies, Live, OPS, OpCounts, Sums, UserCounts};
use reactor::ticks_per_second;
use rpc::{Pace, Registry};
use vhost_target::{ControllerInfo, ReactorInfo, SessionInfo};

use crate::cli::VERSION;
use crate::devices::{self, Disk};
use crate::methods::App;

/// The work of a row without its channels, in JSON values, the unit of [`Pace`].
const ROW_VALUES: usize = 5;

/// The work of the histogram of one channel, which has thousands of counters, in the same unit.
const HISTOGRAM_VALUES: usize = 50;

/// The number of channels that a search compares in the time of one JSON value.
const CHANNELS_PER_VALUE: usize = 40;

/// The state of the process at one time.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) version: &'static str,
    pub(super) ticks_per_second: u64,
    /// With the longest poll iteration in microseconds.
    pub(super) reactors: Vec<(ReactorInfo, f64)>,
    pub(super) bdevs: Vec<BdevRow>,
    pub(super) controllers: Vec<ControllerRow>,
    /// Name, calls and failed calls of each method that was called.
    pub(super) methods: Vec<(&'static str, u64, u64)>,
    /// Name of the account, and its file descriptors that wait.
    pub(super) stuck_closes: Vec<(String, usize)>,
}

#[derive(Debug)]
pub(super) struct BdevRow {
    pub(super) name: String,
    pub(super) ops: [OpCounts; OPS],
    pub(super) failures: [u64; FAILURE_KINDS],
    /// If its histogram is enabled.
    pub(super) latencies: Option<Latencies>,
}

#[derive(Debug)]
pub(super) struct ControllerRow {
    pub(super) name: String,
    pub(super) disks: Vec<Disk>,
    /// Of its disks, also of those that were removed.
    pub(super) counts: UserCounts,
    pub(super) fds: usize,
    pub(super) fds_closing: usize,
    pub(super) fds_stuck: bool,
    pub(super) sessions: Vec<SessionInfo>,
}

impl From<ControllerInfo> for ControllerRow {
    fn from(controller: ControllerInfo) -> Self {
        Self {
            disks: devices::disks(&controller.device),
            counts: devices::counts(&controller.device),
            name: controller.name,
            fds: controller.fds,
            fds_closing: controller.fds_closing,
            fds_stuck: controller.fds_stuck,
            sessions: controller.sessions,
        }
    }
}

impl Snapshot {
    /// Takes it. Lets other tasks run after some work, so the rows are not of one instant.
    pub(super) async fn take(app: &App, registry: &Registry) -> Self {
        let target = app.control.target();
        let longest = target.longest_iterations(false).into_iter();
        let longest: Vec<f64> = longest.map(|(_, us, _)| us).collect();
        let (mut pace, mut bdevs, mut channels) = (Pace::local(), vec![], HashMap::new());
        for id in app.bdevs.ids() {
            // The bdev is not held while other tasks run.
            let begun = app.bdevs.live(id).map(|Live { bdev, .. }| {
                let (name, sums) = (bdev.name().to_owned(), bdev.stats().sums());
                (name, sums)
            });
            pace.spend(ROW_VALUES).await;
            if let Some((name, sums)) = begun {
                channels.insert(name.clone(), sums.left());
                bdevs.push(BdevRow::of(name, sums, &mut pace).await);
            }
        }
        let mut controllers = vec![];
        for controller in target.controllers() {
            let queues: usize = controller.sessions.iter().map(|s| s.queues.len()).sum();
            let row = ControllerRow::from(controller);
            // The making of the row has searched all channels of its bdevs.
            let channels_of = |disk: &Disk| channels.get(&disk.bdev).copied().unwrap_or(0);
            let sought = row.disks.iter().map(channels_of).sum::<usize>() / CHANNELS_PER_VALUE;
            controllers.push(row);
            pace.spend(ROW_VALUES + queues + sought).await;
        }
        Self {
            version: VERSION,
            ticks_per_second: ticks_per_second(),
            reactors: target.reactors().into_iter().zip(longest).collect(),
            bdevs,
            controllers,
            methods: registry.calls(),
            stuck_closes: closer::stuck().into_iter().map(|s| (s.name, s.waiting)).collect(),
        }
    }
}

impl BdevRow {
    async fn of(name: String, mut sums: Sums, pace: &mut Pace) -> Self {
        let values = if sums.has_histogram() { HISTOGRAM_VALUES } else { 1 };
        while sums.add_channel() {
            pace.spend(values).await;
        }
        Self { name, ops: sums.ops, failures: sums.failures, latencies: sums.latencies() }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use bdev::{HistogramOptions, Op, QosUser, Stats};

    use super::*;

    /// How often other tasks run while a bdev of 1,000 channels is summed up.
    async fn pauses(stats: &Stats) -> usize {
        let channels: Vec<_> = (0..1000).map(|_| stats.attach(QosUser::new(1))).collect();
        channels.iter().for_each(|channel| channel.record(Op::Read, 512, 9));
        let (mut pauses, mut pace) = (0, Pace::local());
        let mut row = pin!(BdevRow::of("B".into(), stats.sums(), &mut pace));
        let row = std::future::poll_fn(|context| {
            let polled = row.as_mut().poll(context);
            pauses += usize::from(polled.is_pending());
            polled
        });
        let row = row.await;
        assert_eq!(row.ops[Op::Read as usize].count, 1000);
        assert_eq!(row.latencies.map(|latencies| latencies.count()).unwrap_or(1000), 1000);
        pauses
    }

    #[tokio::test]
    async fn channels_and_histograms_count_as_work() {
        assert_eq!(pauses(&Stats::default()).await, 1);
        let stats = Stats::default();
        stats.enable_histogram(HistogramOptions {
            ops: HistogramOptions::ALL_OPS,
            granularity: 7,
            min_ticks: 0,
            max_ticks: u64::MAX,
        });
        assert_eq!(pauses(&stats).await, 50);
    }
}
