//! `bdev_set_qd_sampling_period`: samples of a bdev's queue depth, for `iostat`.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::{Bdev, BdevId};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::task::{JoinHandle, spawn_local};
use tracing::{error, warn};
use vhost_blk::Blk;

use super::{Answer, App, Methods};

/// The shortest period, in microseconds. A sample asks all queues of the bdev, on the thread that
/// serves RPCs.
const PERIOD_MIN_US: u64 = 1000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_set_qd_sampling_period", Phases::Runtime, set_period);
}

/// The bdevs that are sampled.
pub(super) type Samplings = BTreeMap<BdevId, Sampling>;

/// The samples of one bdev.
#[derive(Debug)]
pub(super) struct Sampling {
    /// In microseconds.
    period: u64,
    /// The last sample. `None` before the first.
    depth: Option<u64>,
    /// The sum of the periods in which I/O was outstanding, in microseconds.
    io_time: u64,
    /// The same sum, each period multiplied by the number of outstanding I/Os.
    weighted_io_time: u64,
    task: JoinHandle<()>,
}

impl Sampling {
    fn add(&mut self, depth: u64) {
        self.depth = Some(depth);
        if depth > 0 {
            self.io_time = self.io_time.saturating_add(self.period);
            let weighted = self.period.saturating_mul(depth);
            self.weighted_io_time = self.weighted_io_time.saturating_add(weighted);
        }
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts to sample a bdev, with another period if it is sampled already, or stops. The sums start
/// from zero.
async fn set_period(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: String,
        /// In microseconds; 0 stops.
        period: u64,
    }
    let p: Request = params.decode(DecodeFailure::INTERNAL)?;
    let id = app.bdevs.id(&p.name).ok_or_else(|| {
        error!("bdev_set_qd_sampling_period: no bdev {:?}", p.name);
        RpcError::errno(libc::ENODEV)
    })?;
    drop(app.samplings.borrow_mut().remove(&id));
    if p.period == 0 {
        return Ok(true.into());
    }
    if p.period < PERIOD_MIN_US {
        warn!("bdev {}: period {} us is too short; using {PERIOD_MIN_US} us", p.name, p.period);
    }
    let period = p.period.max(PERIOD_MIN_US);
    let task = spawn_local(sample(Rc::clone(&app), id, Duration::from_micros(period)));
    let sampling = Sampling { period, depth: None, io_time: 0, weighted_io_time: 0, task };
    app.samplings.borrow_mut().insert(id, sampling);
    Ok(true.into())
}

/// Samples a bdev until it is deleted. Does not keep it open between two samples.
async fn sample(app: Rc<App>, id: BdevId, period: Duration) {
    let mut ticks = tokio::time::interval(period);
    // After a delay of this thread, the missed samples are not made up for.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick comes at once.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let Some(live) = app.bdevs.live(id) else { break };
        let depth = outstanding(&app, &live.bdev);
        if let Some(sampling) = app.samplings.borrow_mut().get_mut(&id) {
            sampling.add(depth);
        }
    }
    // It aborts this task, which has ended.
    drop(app.samplings.borrow_mut().remove(&id));
}

/// The I/Os of controllers whose bdev is this one or is built on it.
fn outstanding(app: &App, bdev: &Arc<dyn Bdev>) -> u64 {
    let controllers = app.control.target().controllers().into_iter();
    let using = controllers.filter(|c| Blk::of(&c.device).is_some_and(|blk| blk.uses(bdev)));
    using.flat_map(|controller| controller.sessions).map(|session| session.inflight).sum()
}

/// What `bdev_get_iostat` shows of a bdev that is sampled.
pub(super) fn describe(app: &App, id: BdevId) -> Map<String, Value> {
    let samplings = app.samplings.borrow();
    let Some(sampling) = samplings.get(&id) else { return Map::new() };
    let fields = [
        ("queue_depth_polling_period", sampling.period),
        ("queue_depth", sampling.depth.unwrap_or(u64::MAX)),
        ("io_time", sampling.io_time),
        ("weighted_io_time", sampling.weighted_io_time),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}
