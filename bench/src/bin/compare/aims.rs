//! What was aimed at, held against what was measured.

use bench::Spread;
use bench::markdown::{Table, digits, ratio};
use bench::servers::Kind;

use crate::Findings;
use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::idle::Mode;
use crate::measure::{Measured, Sample};
use crate::perf::Figures;

/// The round trips, in ns, at which aims in round trips were set; between them the nearer counts.
const TRIPS_NS: [f64; 2] = [125.0, 470.0];

/// A table of aims: of each, what was measured, and whether it is reached. What was not measured is
/// left out, or says so if `all` are wanted.
pub(crate) fn table(findings: &Findings, all: bool) -> Table {
    let mut table = Table::new(&["figure", "aim", "measured", "reached"]);
    for aim in aims(findings).into_iter().filter(|aim| all || aim.measured.is_some()) {
        table.row(aim.cells());
    }
    table
}

fn aims(findings: &Findings) -> Vec<Aim> {
    let mut aims = vec![
        latency(findings, DiskKind::Null, [3.0, 2.3]),
        latency_against_qemu(findings),
        latency(findings, DiskKind::Malloc, [4.5, 2.8]),
        throughput(findings, DiskKind::Null, Workload::Randread, 1.1),
        throughput(findings, DiskKind::Malloc, Workload::Randread, 2.0),
        throughput(findings, DiskKind::Malloc, Workload::Randwrite, 2.0),
    ];
    for depth in [1, 64] {
        for kind in [Kind::Spdk, Kind::StorageDaemon] {
            aims.push(file(findings, depth, kind));
        }
        aims.push(file_cost(findings, depth));
    }
    for disk in [DiskKind::Null, DiskKind::Malloc] {
        aims.push(neighbours(findings, disk));
    }
    for mode in [Mode::Interrupt, Mode::Adaptive] {
        aims.push(idle_cpu(findings, mode));
    }
    aims.push(idle_latency(findings));
    aims
}

/// One line of the table.
struct Aim {
    figure: String,
    aim: String,
    /// What was measured in words, and whether that is enough.
    measured: Option<(String, &'static str)>,
}

impl Aim {
    fn cells(self) -> Vec<String> {
        let (measured, reached) = self.measured.unwrap_or(("not measured".into(), "-"));
        vec![self.figure, self.aim, measured, reached.into()]
    }
}

fn yes(reached: bool) -> &'static str {
    if reached { "yes" } else { "no" }
}

fn find(findings: &Findings, disk: DiskKind, rw: Workload, depth: usize) -> Option<&Measured> {
    let wanted = Cell { disk, rw, bs: Size::K4, depth, queues: 1 };
    findings.cells.iter().find(|measured| measured.cell == wanted)
}

/// Index of ours, the first server, and of the one of `kind`.
fn pair(findings: &Findings, kind: Kind) -> Option<(usize, usize)> {
    let ours = findings.servers.first().filter(|spec| spec.kind == Kind::Ours)?;
    let other = findings.servers.iter().position(|spec| spec.kind == kind)?;
    (ours.kind != kind).then_some((0, other))
}

fn latency(findings: &Findings, disk: DiskKind, limits: [f64; 2]) -> Aim {
    let measured = find(findings, disk, Workload::Randread, 1).and_then(|measured| {
        (findings.servers.first()?.kind == Kind::Ours).then_some(())?;
        let trip = Spread::of(measured.alternations.iter().map(|a| a.round_trip_ns))?.median;
        let trips = measured.trips(0)?;
        let limit = limits[nearer(trip)];
        let words = format!("{} at {trip:.0} ns, where the aim is {limit}", ratio(Some(trips)));
        Some((words, yes(trips.median <= limit)))
    });
    let [near, far] = limits;
    Aim {
        figure: format!("{} disk, depth 1, p50 in round trips", disk.name()),
        aim: format!("≤ {near} at about 125 ns, ≤ {far} at about 470 ns"),
        measured,
    }
}

/// Which of [`TRIPS_NS`] is nearer to `trip`, as a factor.
fn nearer(trip: f64) -> usize {
    usize::from(trip * trip > TRIPS_NS[0] * TRIPS_NS[1])
}

fn latency_against_qemu(findings: &Findings) -> Aim {
    let measured = find(findings, DiskKind::Null, Workload::Randread, 1).and_then(|measured| {
        let (ours, qemu) = pair(findings, Kind::StorageDaemon)?;
        let spread = measured.ratio(ours, qemu, |figures| figures.p50_ns)?;
        Some((ratio(Some(spread)), yes(spread.median <= 0.2)))
    });
    let figure = "null disk, depth 1, p50".into();
    Aim { figure, aim: "≤ 0.2 × qemu-storage-daemon".into(), measured }
}

fn iops(figures: &Figures) -> f64 {
    figures.iops
}

fn throughput(findings: &Findings, disk: DiskKind, rw: Workload, least: f64) -> Aim {
    let measured = find(findings, disk, rw, 64).and_then(|measured| {
        let (ours, spdk) = pair(findings, Kind::Spdk)?;
        let spread = measured.ratio(ours, spdk, iops)?;
        Some((ratio(Some(spread)), yes(spread.median >= least)))
    });
    let figure = format!("{} disk, {}, depth 64, IOPS", disk.name(), rw.name());
    Aim { figure, aim: format!("≥ {least} × SPDK"), measured }
}

fn file(findings: &Findings, depth: usize, kind: Kind) -> Aim {
    let measured = find(findings, DiskKind::File, Workload::Randread, depth).and_then(|measured| {
        let (ours, other) = pair(findings, kind)?;
        let spread = measured.ratio(ours, other, iops)?;
        Some((ratio(Some(spread)), not_below(spread)))
    });
    let other = if kind == Kind::Spdk { "SPDK" } else { "qemu-storage-daemon" };
    let figure = format!("file disk, depth {depth}, IOPS");
    Aim { figure, aim: format!("not below {other}"), measured }
}

/// The device is the limit, so that equals lie on either side of 1.
fn not_below(spread: Spread) -> &'static str {
    if spread.median >= 1.0 {
        "yes"
    } else if spread.max >= 1.0 {
        "within the spread"
    } else {
        "no"
    }
}

fn file_cost(findings: &Findings, depth: usize) -> Aim {
    let measured = find(findings, DiskKind::File, Workload::Randread, depth).and_then(|measured| {
        let (ours, spdk) = pair(findings, Kind::Spdk)?;
        let (unit, spread) = cost_ratio(measured, ours, spdk)?;
        Some((format!("{} in {unit}", ratio(Some(spread))), yes(spread.median <= 0.7)))
    });
    let figure = format!("file disk, depth {depth}, reactor CPU per I/O");
    Aim { figure, aim: "≤ 0.7 × SPDK".into(), measured }
}

/// What an I/O costs `of` compared with `to`, by the time that both count as work.
fn cost_ratio(measured: &Measured, of: usize, to: usize) -> Option<(&'static str, Spread)> {
    let busy = |sample: &Sample| Some(sample.busy?.as_secs_f64());
    let (of, to) = (measured.cost(of, busy)?, measured.cost(to, busy)?);
    Some(("busy time", Spread::of_ratios(of.into_iter().zip(to))?))
}

fn neighbours(findings: &Findings, disk: DiskKind) -> Aim {
    let found = findings.neighbours.iter().find(|n| n.server.kind == Kind::Ours && n.disk == disk);
    let measured = found.and_then(|neighbours| {
        let spread = neighbours.iops_ratio()?;
        Some((ratio(Some(spread)), yes(spread.median >= 0.9)))
    });
    let count = found.map_or(255, |neighbours| neighbours.count);
    let figure = format!("{} disk beside {count} idle controllers, depth 64, IOPS", disk.name());
    Aim { figure, aim: "≥ 0.9 × alone".into(), measured }
}

fn ours(findings: &Findings, mode: Mode) -> Option<&crate::idle::Modes> {
    let found = findings.modes.iter().find(|m| m.server.kind == Kind::Ours && m.mode == mode);
    found.filter(|modes| modes.unsupported.is_none())
}

fn idle_cpu(findings: &Findings, mode: Mode) -> Aim {
    let measured = ours(findings, mode).and_then(|modes| {
        let most = modes.disks.iter().map(|disk| disk.cpu).reduce(|a, b| Some(a?.max(b?)))??;
        Some((format!("{} %, the most of all disks", digits(most * 100.0)), yes(most <= 0.02)))
    });
    Aim {
        figure: format!("idle reactor, {} mode, CPU", mode.name()),
        aim: "≤ 2 %".into(),
        measured,
    }
}

fn idle_latency(findings: &Findings) -> Aim {
    let measured = ours(findings, Mode::Adaptive).and_then(|adaptive| {
        let sleeping = ours(findings, Mode::Interrupt)?;
        let later = |disk: &crate::idle::Idleness| adaptive.later_than(sleeping, disk.disk);
        let most = adaptive.disks.iter().map(later).reduce(|a, b| {
            let (a, b) = (a?, b?);
            Some(if a.median > b.median { a } else { b })
        })??;
        let words = format!("+ {} µs, the most of all disks", digits(most.median / 1e3));
        Some((words, yes(most.median <= 10e3)))
    });
    let figure = "depth 1 after idle, adaptive mode, p50".into();
    Aim { figure, aim: "≤ interrupt mode + 10 µs".into(), measured }
}

#[cfg(test)]
mod tests {
    use bench::servers::Spec;
    use serde_json::Value;

    use super::*;
    use crate::measure::Alternation;

    fn findings(kinds: &[Kind], p50_ns: &[f64], trip: f64) -> Findings {
        let sample = |&p50_ns: &f64| Sample {
            figures: Figures { p50_ns, p999_ns: 0.0, iops: 1.0, completed: 1.0, raw: Value::Null },
            cpu: None,
            busy: None,
            counts: None,
            kept_waiting: 0.0,
        };
        let samples = p50_ns.iter().map(sample).map(Some).collect();
        let (disk, rw, bs) = (DiskKind::Null, Workload::Randread, Size::K4);
        Findings {
            servers: kinds.iter().map(|&kind| Spec::new("s", kind, "s")).collect(),
            cells: vec![Measured {
                cell: Cell { disk, rw, bs, depth: 1, queues: 1 },
                alternations: vec![Alternation { round_trip_ns: trip, samples }],
            }],
            ..Findings::default()
        }
    }

    fn reached(aim: Aim) -> String {
        aim.cells().pop().unwrap()
    }

    #[test]
    fn the_aim_in_round_trips_is_that_of_the_nearer_machine() {
        let aim = |p50, trip| {
            reached(latency(&findings(&[Kind::Ours], &[p50], trip), DiskKind::Null, [3.0, 2.3]))
        };
        assert_eq!(aim(2.9 * 130.0, 130.0), "yes");
        assert_eq!(aim(3.1 * 130.0, 130.0), "no");
        assert_eq!(aim(2.9 * 400.0, 400.0), "no");
        assert_eq!(aim(2.2 * 400.0, 400.0), "yes");
    }

    #[test]
    fn ours_is_held_against_the_others() {
        let both = [Kind::Ours, Kind::StorageDaemon];
        let aim = |p50: f64| reached(latency_against_qemu(&findings(&both, &[p50, 10.0], 1.0)));
        assert_eq!(aim(1.9), "yes");
        assert_eq!(aim(2.1), "no");
        let alone = findings(&[Kind::StorageDaemon], &[1.0], 1.0);
        assert_eq!(reached(latency_against_qemu(&alone)), "-");
        assert_eq!(reached(latency(&alone, DiskKind::Null, [3.0, 2.3])), "-", "not ours");
    }

    #[test]
    fn equals_are_within_the_spread() {
        let spread = |min, median, max| Spread { median, min, max };
        assert_eq!(not_below(spread(0.9, 1.0, 1.1)), "yes");
        assert_eq!(not_below(spread(0.9, 0.99, 1.1)), "within the spread");
        assert_eq!(not_below(spread(0.9, 0.95, 0.99)), "no");
    }

    #[test]
    fn what_was_not_measured_says_so() {
        assert!(table(&Findings::default(), false).is_empty());
        let table = table(&Findings::default(), true).to_string();
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows.len(), 17);
        assert!(rows.iter().all(|row| row.contains("| not measured |")), "{table}");
    }
}
