//! `bdev_set_qd_sampling_period`: samples of a bdev's queue depth, for `iostat`.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::{Bdev, BdevId};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::Instant;
use tracing::{error, warn};
use vhost_target::ControllerInfo;
use vhost_target::device::Device;

use super::{Answer, App, Methods};
use crate::devices;

/// The shortest period, in microseconds. A sample asks all queues of the bdev, on the thread that
/// serves RPCs.
const PERIOD_MIN_US: u64 = 1000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_set_qd_sampling_period", Phases::Runtime, |app, params| {
        std::future::ready(set_period(&app, &params))
    });
}

/// The bdevs that are sampled.
#[derive(Debug, Default)]
pub(super) struct Samplings {
    rows: BTreeMap<BdevId, Sampling>,
    /// Whether the task that samples them all was started. It never ends.
    has_task: bool,
    /// Notified when a row is added.
    added: Rc<Notify>,
}

/// The samples of one bdev.
#[derive(Debug)]
struct Sampling {
    /// In microseconds.
    period: u64,
    next: Instant,
    /// The last sample. `None` before the first.
    depth: Option<u64>,
    /// The sum of the periods in which I/O was outstanding, in microseconds.
    io_time: u64,
    /// The same sum, each period multiplied by the number of outstanding I/Os.
    weighted_io_time: u64,
}

impl Sampling {
    fn new(period: u64) -> Self {
        let next = after(Instant::now(), period);
        Self { period, next, depth: None, io_time: 0, weighted_io_time: 0 }
    }

    fn add(&mut self, depth: u64, now: Instant) {
        // After a delay of this thread, the missed samples are not made up for.
        self.next = after(now, self.period);
        self.depth = Some(depth);
        if depth > 0 {
            self.io_time = self.io_time.saturating_add(self.period);
            let weighted = self.period.saturating_mul(depth);
            self.weighted_io_time = self.weighted_io_time.saturating_add(weighted);
        }
    }
}

/// A day later at most: the sum must not overflow.
fn after(now: Instant, period: u64) -> Instant {
    now + Duration::from_micros(period).min(Duration::from_secs(24 * 3600))
}

/// Starts to sample a bdev, with another period if it is sampled already, or stops. The sums start
/// from zero.
fn set_period(app: &Rc<App>, params: &Params) -> Answer {
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
    let mut samplings = app.samplings.borrow_mut();
    samplings.rows.retain(|other, _| *other != id && app.bdevs.live(*other).is_some());
    if p.period == 0 {
        return Ok(true.into());
    }
    if p.period < PERIOD_MIN_US {
        warn!("bdev {}: period {} us is too short; using {PERIOD_MIN_US} us", p.name, p.period);
    }
    samplings.rows.insert(id, Sampling::new(p.period.max(PERIOD_MIN_US)));
    samplings.added.notify_one();
    if !std::mem::replace(&mut samplings.has_task, true) {
        spawn_local(sample(Rc::clone(app)));
    }
    Ok(true.into())
}

/// Samples all bdevs of [`Samplings`], and rests ten times as long as that takes, so that it uses a
/// small part of the thread.
async fn sample(app: Rc<App>) {
    let added = Rc::clone(&app.samplings.borrow().added);
    let mut rest = Duration::ZERO;
    loop {
        let next = app.samplings.borrow().rows.values().map(|row| row.next).min();
        match next {
            Some(next) => tokio::select! {
                () = tokio::time::sleep_until(next.max(Instant::now() + rest)) => {}
                () = added.notified() => continue,
            },
            None => {
                added.notified().await;
                continue;
            }
        }
        let now = Instant::now();
        let uses = Uses::of(&app);
        let is_due = |(_, row): &(&BdevId, &Sampling)| row.next <= now;
        let due: Vec<BdevId> =
            app.samplings.borrow().rows.iter().filter(is_due).map(|(id, _)| *id).collect();
        for id in due {
            let depth = app.bdevs.live(id).map(|live| uses.outstanding(&live.bdev));
            let rows = &mut app.samplings.borrow_mut().rows;
            match (rows.get_mut(&id), depth) {
                (Some(row), Some(depth)) => row.add(depth, now),
                (_, None) => drop(rows.remove(&id)),
                (None, _) => {}
            }
        }
        rest = 10 * now.elapsed();
    }
}

/// The I/Os in flight of each controller.
struct Uses(Vec<(Arc<dyn Device>, u64)>);

impl Uses {
    fn of(app: &App) -> Self {
        let controllers = app.control.target().controllers().into_iter();
        let inflight = |c: &ControllerInfo| c.sessions.iter().map(|session| session.inflight).sum();
        let busy = controllers.map(|c| (inflight(&c), c)).filter(|(inflight, _)| *inflight > 0);
        Self(busy.map(|(inflight, c)| (c.device, inflight)).collect())
    }

    /// The I/Os of controllers that have a bdev which is this one or is built on it. Of a controller
    /// with several targets, those of all its targets: they are not counted for each.
    fn outstanding(&self, bdev: &Arc<dyn Bdev>) -> u64 {
        let using = self.0.iter().filter(|(device, _)| devices::uses(device, bdev));
        using.map(|(_, inflight)| inflight).sum()
    }
}

/// What `bdev_get_iostat` shows of a bdev that is sampled.
pub(super) fn describe(app: &App, id: BdevId) -> Map<String, Value> {
    let samplings = app.samplings.borrow();
    let Some(sampling) = samplings.rows.get(&id) else { return Map::new() };
    let fields = [
        ("queue_depth_polling_period", sampling.period),
        ("queue_depth", sampling.depth.unwrap_or(u64::MAX)),
        ("io_time", sampling.io_time),
        ("weighted_io_time", sampling.weighted_io_time),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}
