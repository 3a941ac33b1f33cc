//! The metrics' names, and their text.

use std::fmt;

use bdev::{Latencies, OPS, Op, OpCounts};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use vhost_target::SessionInfo;
use vhost_target::session::Phase;

use super::snapshot::{ControllerRow, Snapshot};

/// How the metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' text format 0.0.4.
    Prometheus,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Upper borders of the latency histogram's buckets, in seconds: 1 µs to 67 s, each four times the
/// one before.
const BORDERS: [f64; 14] = [
    1e-6, 4e-6, 16e-6, 64e-6, 256e-6, 1024e-6, 4096e-6, 16384e-6, 65536e-6, 0.262144, 1.048576,
    4.194304, 16.777216, 67.108864,
];

/// The operations by their labels.
const OP_NAMES: [(&str, Op); OPS] = [
    ("read", Op::Read),
    ("write", Op::Write),
    ("flush", Op::Flush),
    ("unmap", Op::Unmap),
    ("write_zeroes", Op::WriteZeroes),
];

/// Encodes a snapshot.
///
/// # Errors
/// None with a snapshot of this program: its names of metrics are valid.
pub(super) fn encode(snapshot: &Snapshot, format: Format) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("vhost");
    registry.register_collector(Box::new(Metrics::of(snapshot)));
    let mut text = String::new();
    match format {
        Format::OpenMetrics => text::encode(&mut text, &registry)?,
        Format::Prometheus => prometheus_text::encode(&mut text, &registry)?,
    }
    Ok(text)
}

type Labels = Vec<(&'static str, String)>;

/// The rows of one metric.
#[derive(Debug)]
enum Rows {
    Counts(Vec<(Labels, u64)>),
    Seconds(Vec<(Labels, f64)>),
    Gauges(Vec<(Labels, f64)>),
    Histograms(Vec<(Labels, Histogram)>),
    Info(Labels),
}

#[derive(Debug)]
struct Histogram {
    sum: f64,
    count: u64,
    /// Upper borders, and the number of latencies in each bucket.
    buckets: Vec<(f64, u64)>,
}

/// A metric: its name without prefix, unit and suffix, its description, and its rows.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    rows: Rows,
}

/// All metrics of a snapshot.
#[derive(Debug, Default)]
struct Metrics(Vec<Metric>);

impl Metrics {
    fn of(snapshot: &Snapshot) -> Self {
        let mut metrics = Self::default();
        let version = vec![("version", snapshot.version.to_owned())];
        metrics.add("build", "The program", None, Rows::Info(version));
        metrics.add_reactors(snapshot);
        metrics.add_bdevs(snapshot);
        metrics.add_controllers(snapshot);
        metrics.add_sessions(snapshot);
        metrics.add_methods(snapshot);
        metrics
    }

    fn add(&mut self, name: &'static str, help: &'static str, unit: Option<Unit>, rows: Rows) {
        self.0.push(Metric { name, help, unit, rows });
    }

    fn add_reactors(&mut self, snapshot: &Snapshot) {
        let seconds = |ticks: u64| seconds(ticks, snapshot.ticks_per_second);
        let each = |value: &dyn Fn(&vhost_target::ReactorInfo, f64) -> f64| {
            let row = |(reactor, longest): &(vhost_target::ReactorInfo, f64)| {
                (vec![("core", reactor.core.0.to_string())], value(reactor, *longest))
            };
            snapshot.reactors.iter().map(row).collect::<Vec<_>>()
        };
        let whole = |value: fn(&vhost_target::ReactorInfo) -> u64| {
            let row = |(reactor, _): &(vhost_target::ReactorInfo, f64)| {
                (vec![("core", reactor.core.0.to_string())], value(reactor))
            };
            snapshot.reactors.iter().map(row).collect::<Vec<_>>()
        };
        let busy = each(&|reactor, _| seconds(reactor.busy_ticks));
        let idle = each(&|reactor, _| seconds(reactor.idle_ticks));
        let unit = || Some(Unit::Seconds);
        self.add("reactor_busy", "Time in poll iterations with work", unit(), Rows::Seconds(busy));
        let help = "Time in poll iterations without work, and asleep";
        self.add("reactor_idle", help, unit(), Rows::Seconds(idle));
        let iterations = whole(|reactor| reactor.iterations);
        self.add("reactor_iterations", "Poll iterations", None, Rows::Counts(iterations));
        let sleeps = whole(|reactor| reactor.sleeps);
        self.add("reactor_sleeps", "Sleeps", None, Rows::Counts(sleeps));
        let help = "Longest poll iteration since the start or vhost_get_reactor_turns with reset";
        let longest = each(&|_, longest| longest / 1e6);
        self.add("reactor_longest_iteration", help, unit(), Rows::Gauges(longest));
        let queues = each(&|reactor, _| count(reactor.queues));
        self.add("reactor_queues", "Queues that it serves", None, Rows::Gauges(queues));
    }

    fn add_bdevs(&mut self, snapshot: &Snapshot) {
        let bdevs = snapshot.bdevs.iter();
        let rows: Vec<(Labels, &[OpCounts; OPS])> =
            bdevs.clone().map(|row| (vec![("bdev", row.name.clone())], &row.ops)).collect();
        let help = [
            "Successful I/Os of a bdev",
            "Bytes of the successful I/Os of a bdev",
            "Sum of the latencies of a bdev's I/Os",
        ];
        let names = ["bdev_operations", "bdev_io", "bdev_latency"];
        self.add_counts(names, help, &rows, snapshot.ticks_per_second);
        let kinds = ["failed", "aio_error"];
        let failures = bdevs.clone().flat_map(|row| {
            kinds.iter().zip(row.failures).map(|(kind, failures)| {
                (vec![("bdev", row.name.clone()), ("kind", (*kind).to_owned())], failures)
            })
        });
        let failures = Rows::Counts(failures.collect());
        self.add("bdev_errors", "Failed I/Os of a bdev", None, failures);
        let histograms = bdevs.filter_map(|row| {
            let histogram = histogram(row.latencies.as_ref()?, snapshot.ticks_per_second);
            Some((vec![("bdev", row.name.clone())], histogram))
        });
        let histograms = Rows::Histograms(histograms.collect());
        let help = "Latencies since bdev_enable_histogram, for bdevs whose histogram is enabled";
        self.add("bdev_request_duration", help, Some(Unit::Seconds), histograms);
    }

    /// Operations, bytes and latencies.
    fn add_counts(
        &mut self,
        [operations, bytes, latency]: [&'static str; 3],
        help: [&'static str; 3],
        rows: &[(Labels, &[OpCounts; OPS])],
        ticks_per_second: u64,
    ) {
        let each = |value: fn(&OpCounts) -> u64| -> Vec<(Labels, u64)> {
            let of = |(labels, ops): &(Labels, &[OpCounts; OPS])| {
                let (labels, ops) = (labels.clone(), **ops);
                OP_NAMES.map(|(name, op)| {
                    let mut labels = labels.clone();
                    labels.push(("op", name.to_owned()));
                    (labels, value(&ops[op as usize]))
                })
            };
            rows.iter().flat_map(of).collect()
        };
        let succeeded = each(|counts| counts.count.saturating_sub(counts.errors));
        self.add(operations, help[0], None, Rows::Counts(succeeded));
        let in_bytes = each(|counts| counts.bytes);
        self.add(bytes, help[1], Some(Unit::Bytes), Rows::Counts(in_bytes));
        let ticks = each(|counts| counts.ticks).into_iter();
        let sums = ticks.map(|(labels, ticks)| (labels, seconds(ticks, ticks_per_second)));
        self.add(latency, help[2], Some(Unit::Seconds), Rows::Seconds(sums.collect()));
    }

    fn add_controllers(&mut self, snapshot: &Snapshot) {
        let name = |row: &ControllerRow| vec![("controller", row.name.clone())];
        let rows = snapshot.controllers.iter();
        let counts: Vec<(Labels, &[OpCounts; OPS])> = rows
            .clone()
            .flat_map(|row| row.disks.iter().map(move |disk| (row, disk)))
            .map(|(row, disk)| {
                let mut labels = name(row);
                labels.push(("bdev", disk.bdev.clone()));
                labels.extend(disk.target.map(|number| ("target", number.to_string())));
                (labels, &disk.counts.ops)
            })
            .collect();
        let help = [
            "Successful I/Os of a controller",
            "Bytes of the successful I/Os of a controller",
            "Sum of the latencies of a controller's I/Os",
        ];
        let names = ["controller_operations", "controller_io", "controller_latency"];
        self.add_counts(names, help, &counts, snapshot.ticks_per_second);
        let errors = |row: &ControllerRow| row.counts.ops.iter().map(|op| op.errors).sum();
        let errors = rows.clone().map(|row| (name(row), errors(row))).collect();
        self.add("controller_errors", "Failed I/Os of a controller", None, Rows::Counts(errors));
        let throttled = rows.clone().map(|row| (name(row), row.counts.throttled)).collect();
        let help = "I/Os of a controller that a rate limit held back";
        self.add("controller_throttled", help, None, Rows::Counts(throttled));
        let sessions = rows.clone().map(|row| (name(row), count(row.sessions.len()))).collect();
        let help = "Connections of a controller";
        self.add("controller_sessions", help, None, Rows::Gauges(sessions));
        let states = rows.clone().flat_map(|row| {
            [("open", row.fds), ("closing", row.fds_closing)].map(|(state, fds)| {
                let mut labels = name(row);
                labels.push(("state", state.to_owned()));
                (labels, count(fds))
            })
        });
        let states = Rows::Gauges(states.collect());
        let help = "File descriptors that a controller's front ends have sent";
        self.add("controller_fds", help, None, states);
        let stuck = rows.map(|row| (name(row), f64::from(u8::from(row.fds_stuck)))).collect();
        let help = "1 if a close of such a file descriptor takes long";
        self.add("controller_close_stuck", help, None, Rows::Gauges(stuck));
    }

    fn add_sessions(&mut self, snapshot: &Snapshot) {
        let sessions: Vec<(Labels, &SessionInfo)> = snapshot
            .controllers
            .iter()
            .flat_map(|row| row.sessions.iter().map(move |session| (row, session)))
            .map(|(row, session)| {
                let id = session.id.to_string();
                (vec![("controller", row.name.clone()), ("session", id)], session)
            })
            .collect();
        let rows = sessions.iter();
        let whole = |value: fn(&SessionInfo) -> u64| {
            Rows::Counts(rows.clone().map(|(labels, s)| (labels.clone(), value(s))).collect())
        };
        let gauge = |value: fn(&SessionInfo) -> f64| {
            Rows::Gauges(rows.clone().map(|(labels, s)| (labels.clone(), value(s))).collect())
        };
        self.add("session_requests", "Completed requests", None, whole(|s| s.requests));
        let help = "Requests that were malformed, refused or failed";
        self.add("session_errors", help, None, whole(|s| s.errors));
        let running = |s: &SessionInfo| {
            f64::from(u8::from(matches!(s.phase, Phase::Running | Phase::Quiescing)))
        };
        self.add("session_running", "1 if reactors serve its rings", None, gauge(running));
        let help = "I/Os that have not completed";
        self.add("session_inflight", help, None, gauge(|s| float(s.inflight)));
        let help = "Guest memory that is mapped only for I/O in flight";
        let quarantined = gauge(|s| float(s.quarantined_bytes));
        self.add("session_quarantined", help, Some(Unit::Bytes), quarantined);
        let queues = rows.flat_map(|(labels, session)| {
            session.queues.iter().map(move |queue| {
                let mut labels = labels.clone();
                labels.push(("queue", queue.ring.to_string()));
                labels.push(("core", queue.core.0.to_string()));
                (labels, f64::from(queue.inflight))
            })
        });
        let queues = Rows::Gauges(queues.collect());
        let help = "I/Os of a queue that have not completed, with the core that serves it";
        self.add("queue_inflight", help, None, queues);
    }

    fn add_methods(&mut self, snapshot: &Snapshot) {
        let name = |name: &str| vec![("method", name.to_owned())];
        let methods = snapshot.methods.iter();
        let calls = methods.clone().map(|(method, calls, _)| (name(method), *calls)).collect();
        self.add("rpc_calls", "Calls of an RPC method", None, Rows::Counts(calls));
        let failed = methods.map(|(method, _, failed)| (name(method), *failed)).collect();
        self.add("rpc_errors", "Calls of an RPC method that failed", None, Rows::Counts(failed));
        let stuck = snapshot.stuck_closes.iter();
        let stuck = stuck.map(|(name, fds)| (vec![("account", name.clone())], count(*fds)));
        let help = "File descriptors that wait behind a close that takes long";
        self.add("stuck_closes", help, None, Rows::Gauges(stuck.collect()));
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for Metric { name, help, unit, rows } in &self.0 {
            let unit = unit.as_ref();
            match rows {
                Rows::Counts(rows) => counters(&mut encoder, (name, help, unit), rows)?,
                Rows::Seconds(rows) => counters(&mut encoder, (name, help, unit), rows)?,
                Rows::Gauges(rows) => gauges(&mut encoder, (name, help, unit), rows)?,
                Rows::Histograms(rows) => histograms(&mut encoder, (name, help, unit), rows)?,
                Rows::Info(labels) => {
                    encoder
                        .encode_descriptor(name, help, unit, MetricType::Info)?
                        .encode_info(labels)?;
                }
            }
        }
        Ok(())
    }
}

type Heading<'a> = (&'a str, &'a str, Option<&'a Unit>);

fn counters(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): Heading<'_>,
    rows: &[(Labels, impl EncodeCounterValue)],
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    rows.iter().try_for_each(|(labels, value)| {
        metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)
    })
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): Heading<'_>,
    rows: &[(Labels, impl EncodeGaugeValue)],
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    rows.iter().try_for_each(|(labels, value)| metric.encode_family(labels)?.encode_gauge(value))
}

fn histograms(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): Heading<'_>,
    rows: &[(Labels, Histogram)],
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
    rows.iter().try_for_each(|(labels, Histogram { sum, count, buckets })| {
        metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(*sum, *count, buckets, None)
    })
}

fn histogram(latencies: &Latencies, ticks_per_second: u64) -> Histogram {
    let mut below = 0;
    let mut buckets: Vec<(f64, u64)> = vec![];
    for border in BORDERS {
        let up_to = latencies.count_up_to(ticks(border, ticks_per_second));
        buckets.push((border, up_to - below));
        below = up_to;
    }
    let count = latencies.count();
    buckets.push((f64::MAX, count - below));
    Histogram { sum: seconds(latencies.sum_ticks(), ticks_per_second), count, buckets }
}

#[expect(clippy::cast_precision_loss, reason = "metrics are rounded to 53 bits")]
fn float(number: u64) -> f64 {
    number as f64
}

fn count(number: usize) -> f64 {
    float(number as u64)
}

fn seconds(ticks: u64, ticks_per_second: u64) -> f64 {
    float(ticks) / float(ticks_per_second)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 67 s")]
fn ticks(seconds: f64, ticks_per_second: u64) -> u64 {
    (seconds * float(ticks_per_second)) as u64
}
