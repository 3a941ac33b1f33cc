//! The state of the process at one time, as plain data.

use bdev::{FAILURE_KINDS, Latencies, OPS, OpCounts, UserCounts};
use reactor::ticks_per_second;
use rpc::Registry;
use vhost_blk::Blk;
use vhost_target::{ControllerInfo, ReactorInfo, SessionInfo};

use crate::cli::VERSION;
use crate::methods::App;

/// Rows that are taken before other tasks of the thread run.
const SLICE: usize = 16;

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
    /// The bdev that it was created with, which may have been removed.
    pub(super) bdev: String,
    pub(super) counts: UserCounts,
    pub(super) fds: usize,
    pub(super) fds_closing: usize,
    pub(super) fds_stuck: bool,
    pub(super) sessions: Vec<SessionInfo>,
}

impl From<ControllerInfo> for ControllerRow {
    fn from(controller: ControllerInfo) -> Self {
        let blk = Blk::of(&controller.device);
        Self {
            bdev: blk.map(Blk::bdev_configured).unwrap_or_default().to_owned(),
            counts: blk.map(Blk::counts).unwrap_or_default(),
            name: controller.name,
            fds: controller.fds,
            fds_closing: controller.fds_closing,
            fds_stuck: controller.fds_stuck,
            sessions: controller.sessions,
        }
    }
}

impl Snapshot {
    /// Takes it. Lets other tasks run after some rows, so the rows are not of one instant.
    pub(super) async fn take(app: &App, registry: &Registry) -> Self {
        let target = app.control.target();
        let longest = target.longest_iterations(false).into_iter();
        let longest: Vec<f64> = longest.map(|(_, us, _)| us).collect();
        let mut bdevs = vec![];
        for (n, id) in app.bdevs.ids().into_iter().enumerate() {
            if let Some(live) = app.bdevs.live(id) {
                // To sum up histograms takes long.
                if live.bdev.stats().has_histogram() {
                    tokio::task::yield_now().await;
                }
                let stats = live.bdev.stats();
                bdevs.push(BdevRow {
                    name: live.bdev.name().to_owned(),
                    ops: stats.ever(),
                    failures: stats.failures_ever(),
                    latencies: stats.latencies(),
                });
            }
            pause(n).await;
        }
        let mut controllers = vec![];
        for (n, controller) in target.controllers().into_iter().enumerate() {
            controllers.push(controller.into());
            pause(n).await;
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

async fn pause(row: usize) {
    if row % SLICE == SLICE - 1 {
        tokio::task::yield_now().await;
    }
}
