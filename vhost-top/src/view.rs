//! What is shown: the rates between two samples. `--json` prints this as it is.

use serde::Serialize;

use crate::number::to_f64;
use crate::sample::{Controller, Reactor, Sample, Session};

/// One display. Rates are absent if there is no earlier sample of the same process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct View {
    pub(crate) version: String,
    pub(crate) pid: Option<u64>,
    /// The time between the two samples.
    pub(crate) interval_s: Option<f64>,
    /// Methods that the server does not have.
    pub(crate) missing_methods: Vec<&'static str>,
    pub(crate) totals: Totals,
    pub(crate) reactors: Vec<ReactorRow>,
    pub(crate) controllers: Vec<ControllerRow>,
    /// The accounts of which a file descriptor takes long to close.
    pub(crate) stuck_closes: Vec<String>,
}

/// Sums over all controllers.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Totals {
    pub(crate) controllers: usize,
    pub(crate) sessions: usize,
    #[serde(flatten)]
    pub(crate) rates: Rates,
    pub(crate) inflight: u64,
    pub(crate) quarantined_bytes: u64,
}

/// Per second, over the interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Rates {
    pub(crate) iops: Option<f64>,
    pub(crate) read_iops: Option<f64>,
    pub(crate) write_iops: Option<f64>,
    /// Unmap, write-zeroes and flush.
    pub(crate) other_iops: Option<f64>,
    pub(crate) read_bytes_per_s: Option<f64>,
    pub(crate) write_bytes_per_s: Option<f64>,
    /// Requests that were malformed, refused or failed.
    pub(crate) errors_per_s: Option<f64>,
    /// Requests that a rate limit has held back.
    pub(crate) throttled_per_s: Option<f64>,
}

/// A reactor.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ReactorRow {
    pub(crate) core: u64,
    pub(crate) load_percent: Option<f64>,
    /// SPDK's server does not tell.
    pub(crate) queues: Option<usize>,
    pub(crate) sleeps_per_s: Option<f64>,
    pub(crate) iterations_per_s: Option<f64>,
    /// The longest poll iteration since the last reset.
    pub(crate) longest_us: Option<f64>,
    /// What happened in it.
    pub(crate) causes: Vec<String>,
}

/// A controller.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ControllerRow {
    pub(crate) name: String,
    /// One for each session.
    pub(crate) states: Vec<String>,
    #[serde(flatten)]
    pub(crate) rates: Rates,
    /// Mean of reads and writes that completed in the interval.
    pub(crate) latency_us: Option<f64>,
    /// From its bdev's histogram, of the interval.
    pub(crate) latency_p50_us: Option<f64>,
    pub(crate) latency_p99_us: Option<f64>,
    pub(crate) inflight: u64,
    pub(crate) quarantined_bytes: u64,
    pub(crate) queues: Vec<Placement>,
    pub(crate) bdev: Option<String>,
    /// Whether the bdev's histogram is enabled.
    pub(crate) histogram: bool,
}

/// Queues on a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Placement {
    pub(crate) core: u64,
    pub(crate) count: usize,
}

impl View {
    /// The differences of two samples.
    pub(crate) fn new(before: Option<&Sample>, now: &Sample) -> Self {
        // The counters of another process have nothing to do with these.
        let before = before.filter(|before| before.reactors.pid == now.reactors.pid);
        let seconds = before.map(|before| now.at.duration_since(before.at).as_secs_f64());
        let seconds = seconds.filter(|seconds| *seconds > 0.0);
        let before = before.filter(|_| seconds.is_some());
        let controllers: Vec<ControllerRow> =
            now.controllers.iter().map(|c| controller_row(c, before, now, seconds)).collect();
        let reactor = |reactor: &Reactor| reactor_row(reactor, before, now, seconds);
        Self {
            version: now.version.clone(),
            pid: now.reactors.pid,
            interval_s: seconds,
            missing_methods: now.missing.clone(),
            totals: totals(&controllers, seconds.is_some()),
            reactors: now.reactors.reactors.iter().map(reactor).collect(),
            controllers,
            stuck_closes: now
                .reactors
                .stuck_closes
                .iter()
                .map(|stuck| stuck.name.clone())
                .collect(),
        }
    }
}

fn totals(controllers: &[ControllerRow], known: bool) -> Totals {
    let sum = |of: fn(&Rates) -> Option<f64>| {
        known.then(|| controllers.iter().filter_map(|c| of(&c.rates)).sum())
    };
    Totals {
        controllers: controllers.len(),
        sessions: controllers.iter().map(|c| c.states.len()).sum(),
        rates: Rates {
            iops: sum(|r| r.iops),
            read_iops: sum(|r| r.read_iops),
            write_iops: sum(|r| r.write_iops),
            other_iops: sum(|r| r.other_iops),
            read_bytes_per_s: sum(|r| r.read_bytes_per_s),
            write_bytes_per_s: sum(|r| r.write_bytes_per_s),
            errors_per_s: sum(|r| r.errors_per_s),
            throttled_per_s: sum(|r| r.throttled_per_s),
        },
        inflight: controllers.iter().map(|c| c.inflight).sum(),
        quarantined_bytes: controllers.iter().map(|c| c.quarantined_bytes).sum(),
    }
}

fn reactor_row(
    reactor: &Reactor,
    before: Option<&Sample>,
    now: &Sample,
    seconds: Option<f64>,
) -> ReactorRow {
    let core = reactor.lcore;
    let earlier = before.and_then(|b| b.reactors.reactors.iter().find(|r| r.lcore == core));
    let load_percent = earlier.and_then(|earlier| {
        let busy = to_f64(since(reactor.busy, earlier.busy));
        let whole = busy + to_f64(since(reactor.idle, earlier.idle));
        (whole > 0.0).then(|| 100.0 * busy / whole)
    });
    let of = |sample: &Sample| sample.iterations.iter().find(|i| i.lcore == core).cloned();
    let iterations = of(now);
    let counters = iterations.as_ref().zip(before.and_then(of));
    let per_s = |now: u64, before: u64| seconds.map(|s| to_f64(since(now, before)) / s);
    let queues = now.controllers.iter().flat_map(|c| &c.sessions).flat_map(|s| &s.queues);
    ReactorRow {
        core,
        load_percent,
        queues: now.has_stats().then(|| queues.filter(|queue| queue.core == core).count()),
        sleeps_per_s: counters.as_ref().and_then(|(n, b)| per_s(n.sleeps, b.sleeps)),
        iterations_per_s: counters.as_ref().and_then(|(n, b)| per_s(n.iterations, b.iterations)),
        longest_us: iterations.as_ref().map(|i| i.longest_us),
        causes: iterations.map(|i| i.causes).unwrap_or_default(),
    }
}

/// What a counter has counted. One that has fallen has started from zero.
fn since(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn controller_row(
    controller: &Controller,
    before: Option<&Sample>,
    now: &Sample,
    seconds: Option<f64>,
) -> ControllerRow {
    // One that did not exist then has counted since.
    let earlier = before.map(|before| {
        before.controllers.iter().find(|c| c.name == controller.name).cloned().unwrap_or_default()
    });
    let sessions = &controller.sessions;
    let io = earlier.as_ref().map(|earlier| controller.io.since(&earlier.io));
    let latency_us = io.filter(|io| io.reads + io.writes > 0).map(|io| {
        let ticks = to_f64(io.read_latency_ticks) + to_f64(io.write_latency_ticks);
        ticks / to_f64(io.reads + io.writes) / to_f64(now.reactors.tick_rate) * 1e6
    });
    let bdev = controller.bdev();
    let histogram = bdev.and_then(|bdev| now.histograms.get(bdev));
    let old = bdev.zip(before).and_then(|(bdev, before)| before.histograms.get(bdev));
    let counted = before.and(histogram).map(|histogram| histogram.since(old));
    let percentile = |percent| counted.as_ref().and_then(|counted| counted.percentile_us(percent));
    ControllerRow {
        name: controller.name.clone(),
        states: sessions.iter().map(state).collect(),
        rates: rates(controller, earlier.as_ref(), seconds),
        latency_us: latency_us.filter(|us| us.is_finite()),
        latency_p50_us: percentile(50.0),
        latency_p99_us: percentile(99.0),
        inflight: sessions.iter().map(|s| s.inflight).sum(),
        quarantined_bytes: sessions.iter().map(|s| s.quarantined_bytes).sum(),
        queues: placement(sessions),
        bdev: bdev.map(str::to_owned),
        histogram: histogram.is_some(),
    }
}

fn rates(controller: &Controller, earlier: Option<&Controller>, seconds: Option<f64>) -> Rates {
    let Some((earlier, seconds)) = earlier.zip(seconds) else { return Rates::default() };
    let io = controller.io.since(&earlier.io);
    let errors = controller.sessions.iter().map(|session| {
        let old = earlier.sessions.iter().find(|old| old.id == session.id);
        since(session.errors, old.map_or(0, |old| old.errors))
    });
    // The sessions count more kinds, the controller those of connections that have ended.
    let errors = errors.sum::<u64>().max(io.failed);
    let per_s = |count: u64| Some(to_f64(count) / seconds);
    let others = io.unmaps + io.write_zeroes + io.flushes;
    Rates {
        iops: per_s(io.reads + io.writes + others),
        read_iops: per_s(io.reads),
        write_iops: per_s(io.writes),
        other_iops: per_s(others),
        read_bytes_per_s: per_s(io.bytes_read),
        write_bytes_per_s: per_s(io.bytes_written),
        errors_per_s: per_s(errors),
        throttled_per_s: per_s(io.throttled),
    }
}

/// SPDK's server has no states.
fn state(session: &Session) -> String {
    let plain = if session.started { "started" } else { "stopped" };
    session.state.clone().unwrap_or_else(|| plain.to_owned())
}

fn placement(sessions: &[Session]) -> Vec<Placement> {
    let mut placement: Vec<Placement> = vec![];
    for queue in sessions.iter().flat_map(|session| &session.queues) {
        match placement.iter_mut().find(|place| place.core == queue.core) {
            Some(place) => place.count += 1,
            None => placement.push(Placement { core: queue.core, count: 1 }),
        }
    }
    placement.sort_by_key(|place| place.core);
    placement
}

#[cfg(test)]
#[path = "view/tests.rs"]
pub(crate) mod tests;
