//! Compares the results with the aims.

use bench::Spread;
use bench::markdown::{Table, digits, ratio};
use bench::servers::Kind;

use crate::Findings;
use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::fio::Engine;
use crate::idle::Mode;
use crate::measure::{Controller, Measured, Sample};
use crate::perf::Figures;
use crate::scsi::{Scsi, Shown};

/// The round trips, in ns, for which aims in round trips are defined. The nearest one applies.
const TRIPS_NS: [f64; 2] = [125.0, 470.0];

/// A table of aims: the result of each, and whether the aim is reached. Aims without a result are
/// omitted unless `all` is set.
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
    aims.push(other_build(findings));
    for rw in [Workload::Randread, Workload::Randwrite] {
        aims.push(linux_aio(findings, rw));
    }
    aims.push(io_uring_latency(findings));
    aims.push(io_uring_throughput(findings));
    for depth in [1, 64] {
        aims.push(against_qemu(findings, depth));
    }
    for disk in [DiskKind::Aio, DiskKind::Uring] {
        for (depth, most) in [(1, 0.9), (64, 0.8)] {
            aims.push(cost(findings, disk, depth, Kind::Ours, most));
            aims.push(cost(findings, disk, depth, Kind::Spdk, 0.8));
        }
        aims.push(system_calls(findings, disk));
    }
    for disk in [DiskKind::Null, DiskKind::Malloc] {
        aims.push(neighbours(findings, disk));
    }
    for mode in [Mode::Interrupt, Mode::Adaptive] {
        aims.push(idle_cpu(findings, mode));
    }
    aims.push(idle_latency(findings));
    for disk in [DiskKind::Null, DiskKind::Malloc] {
        for depth in [1, 64] {
            aims.push(scsi(findings, disk, depth, (Kind::Spdk, Controller::Scsi), 1.2));
            aims.push(scsi(findings, disk, depth, (Kind::Ours, Controller::Blk), 0.8));
        }
    }
    aims
}

/// A row of the table.
struct Aim {
    figure: String,
    aim: String,
    /// The result as a text, and whether the aim is reached.
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

/// Compares this project's virtio-scsi, the first contender, with another one.
fn scsi(
    findings: &Findings,
    disk: DiskKind,
    depth: usize,
    (kind, controller): (Kind, Controller),
    least: f64,
) -> Aim {
    let Scsi { contenders, cells } = &findings.scsi;
    let rw = Workload::Randread;
    let wanted = Cell { disk, rw, bs: Size::K4, depth, queues: 1 };
    let measured = cells.iter().find(|measured| measured.cell == wanted).and_then(|measured| {
        contenders.first().filter(|first| first.kind == Kind::Ours)?;
        let is_other = |shown: &Shown| (shown.kind, shown.controller) == (kind, controller);
        let spread = measured.ratio(0, contenders.iter().position(is_other)?, iops)?;
        Some((ratio(Some(spread)), yes(spread.median >= least)))
    });
    let figure = format!("{} disk, depth {depth}, virtio-scsi, IOPS", disk.name());
    let other = if kind == Kind::Spdk { "SPDK's virtio-scsi" } else { "our virtio-blk" };
    Aim { figure, aim: format!("≥ {least} × {other}"), measured }
}

/// The index of this project's vhost, the first server, and that of the server of `kind` that it is
/// compared with. If both are this project's, they are different builds.
fn pair(findings: &Findings, kind: Kind) -> Option<(usize, usize)> {
    findings.servers.first().filter(|spec| spec.kind == Kind::Ours)?;
    let other = findings.servers.iter().skip(1).position(|spec| spec.kind == kind)?;
    Some((0, other + 1))
}

/// The index of this project's vhost, the first server, and that of an engine of fio.
fn with_fio(findings: &Findings, engine: Engine) -> Option<(usize, usize)> {
    findings.servers.first().filter(|spec| spec.kind == Kind::Ours)?;
    let other = findings.engines.iter().position(|&e| e == engine)?;
    Some((0, findings.servers.len() + other))
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

/// The index of the value in [`TRIPS_NS`] that is nearest to `trip` by ratio.
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

fn other_build(findings: &Findings) -> Aim {
    let cell = find(findings, DiskKind::Malloc, Workload::Randread, 64);
    let measured = cell.and_then(|measured| {
        let (ours, before) = pair(findings, Kind::Ours)?;
        let spread = measured.ratio(ours, before, iops)?;
        Some((ratio(Some(spread)), yes(spread.median >= 1.25)))
    });
    let figure = "malloc disk, randread, depth 64, IOPS".into();
    Aim { figure, aim: "≥ 1.25 × the other build".into(), measured }
}

/// Compares with SPDK, or without SPDK, with fio at the same depth.
fn linux_aio(findings: &Findings, rw: Workload) -> Aim {
    let measured = find(findings, DiskKind::Aio, rw, 64).and_then(|measured| {
        let spdk = pair(findings, Kind::Spdk).map(|pair| (pair, "SPDK"));
        let fio = || Some((with_fio(findings, Engine::Libaio)?, "fio"));
        let ((ours, other), name) = spdk.or_else(fio)?;
        let spread = measured.ratio(ours, other, iops)?;
        Some((format!("{} × {name}", ratio(Some(spread))), not_below(spread)))
    });
    let figure = format!("aio disk, {}, depth 64, IOPS", rw.name());
    Aim { figure, aim: "≥ 1 × SPDK's aio, without it fio's libaio".into(), measured }
}

fn io_uring_latency(findings: &Findings) -> Aim {
    let cell = find(findings, DiskKind::Uring, Workload::Randread, 1);
    let measured = cell.and_then(|measured| {
        let (ours, spdk) = pair(findings, Kind::Spdk)?;
        let spread = measured.ratio(ours, spdk, |figures| figures.p50_ns)?;
        Some((ratio(Some(spread)), yes(spread.median <= 0.95)))
    });
    let figure = "uring disk, randread, depth 1, p50".into();
    Aim { figure, aim: "≤ 0.95 × SPDK's uring".into(), measured }
}

/// Compares with SPDK, or without SPDK, with fio. The device may be the bottleneck, so the aim against
/// fio is equality.
fn io_uring_throughput(findings: &Findings) -> Aim {
    let cell = find(findings, DiskKind::Uring, Workload::Randread, 64);
    let measured = cell.and_then(|measured| {
        if let Some((ours, spdk)) = pair(findings, Kind::Spdk) {
            let spread = measured.ratio(ours, spdk, iops)?;
            return Some((format!("{} × SPDK", ratio(Some(spread))), yes(spread.median >= 1.05)));
        }
        let against = |&engine: &Engine| {
            let (ours, fio) = with_fio(findings, engine)?;
            measured.ratio(ours, fio, iops)
        };
        let spreads = Engine::ALL.iter().filter_map(against);
        let best = spreads.min_by(|a, b| a.median.total_cmp(&b.median))?;
        Some((format!("{} × fio's best", ratio(Some(best))), not_below(best)))
    });
    let figure = "uring disk, randread, depth 64, IOPS".into();
    let aim = "≥ 1.05 × SPDK's uring, or equal to fio's best engine".into();
    Aim { figure, aim, measured }
}

fn against_qemu(findings: &Findings, depth: usize) -> Aim {
    let cell = find(findings, DiskKind::Uring, Workload::Randread, depth);
    let measured = cell.and_then(|measured| {
        let (ours, other) = pair(findings, Kind::StorageDaemon)?;
        let spread = measured.ratio(ours, other, iops)?;
        Some((ratio(Some(spread)), not_below(spread)))
    });
    let figure = format!("uring disk, depth {depth}, IOPS");
    Aim { figure, aim: "not below qemu-storage-daemon".into(), measured }
}

/// Whether a ratio is at least 1. The device is the bottleneck, so equal servers vary around 1.
fn not_below(spread: Spread) -> &'static str {
    if spread.median >= 1.0 {
        "yes"
    } else if spread.max >= 1.0 {
        "within the spread"
    } else {
        "no"
    }
}

/// Compares the polling thread's time per read, as the servers count it.
fn cost(findings: &Findings, disk: DiskKind, depth: usize, kind: Kind, most: f64) -> Aim {
    let measured = find(findings, disk, Workload::Randread, depth).and_then(|measured| {
        let (ours, other) = pair(findings, kind)?;
        let busy = |sample: &Sample| Some(sample.busy?.as_secs_f64());
        let (ours, theirs) = (measured.cost(ours, busy)?, measured.cost(other, busy)?);
        let spread = Spread::of_ratios(ours.into_iter().zip(theirs))?;
        Some((ratio(Some(spread)), yes(spread.median <= most)))
    });
    let other = if kind == Kind::Spdk { "SPDK" } else { "the other build" };
    let figure = format!("{} disk, depth {depth}, busy time per I/O", disk.name());
    Aim { figure, aim: format!("≤ {most} × {other}"), measured }
}

fn system_calls(findings: &Findings, disk: DiskKind) -> Aim {
    let measured = find(findings, disk, Workload::Randread, 64).and_then(|measured| {
        findings.servers.first().filter(|spec| spec.kind == Kind::Ours)?;
        let calls = measured.syscalls.first().copied().flatten()?;
        Some((format!("{calls:.3}"), yes(calls <= 0.1)))
    });
    let figure = format!("{} disk, depth 64, system calls per I/O", disk.name());
    Aim { figure, aim: "≤ 0.1".into(), measured }
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

    fn sample(p50_ns: f64) -> Sample {
        let raw = Value::Null;
        Sample::of(Figures { p50_ns, p999_ns: 0.0, iops: 1e9 / p50_ns, completed: 1.0, raw })
    }

    fn findings(kinds: &[Kind], p50_ns: &[f64], trip: f64) -> Findings {
        let (disk, rw, bs) = (DiskKind::Null, Workload::Randread, Size::K4);
        of_cell(kinds, Cell { disk, rw, bs, depth: 1, queues: 1 }, p50_ns, trip)
    }

    fn of_cell(kinds: &[Kind], cell: Cell, p50_ns: &[f64], round_trip_ns: f64) -> Findings {
        let samples = p50_ns.iter().map(|&p50_ns| Some(sample(p50_ns))).collect();
        let alternations = vec![Alternation { round_trip_ns, samples }];
        Findings {
            servers: kinds.iter().map(|&kind| Spec::new("s", kind, "s")).collect(),
            cells: vec![Measured { cell, alternations, syscalls: vec![] }],
            ..Findings::default()
        }
    }

    fn deep(disk: DiskKind) -> Cell {
        Cell { disk, rw: Workload::Randread, bs: Size::K4, depth: 64, queues: 1 }
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
    fn a_build_is_held_against_the_one_before() {
        let aim = |kinds: &[Kind], p50s: &[f64]| {
            reached(other_build(&of_cell(kinds, deep(DiskKind::Malloc), p50s, 1.0)))
        };
        assert_eq!(aim(&[Kind::Ours, Kind::Ours], &[1.0, 1.26]), "yes");
        assert_eq!(aim(&[Kind::Ours, Kind::Ours], &[1.0, 1.24]), "no");
        assert_eq!(aim(&[Kind::Ours, Kind::Spdk], &[1.0, 2.0]), "-");
    }

    #[test]
    fn fio_stands_in_for_spdk() {
        let with = |kinds: &[Kind], disk, p50s: &[f64]| Findings {
            engines: Engine::ALL.to_vec(),
            ..of_cell(kinds, deep(disk), p50s, 1.0)
        };
        let (ours, both) = ([Kind::Ours], [Kind::Ours, Kind::Spdk]);
        let aio = |findings| reached(linux_aio(&findings, Workload::Randread));
        assert_eq!(aio(with(&ours, DiskKind::Aio, &[10.0, 11.0, 9.0])), "yes", "libaio's figure");
        assert_eq!(aio(with(&ours, DiskKind::Aio, &[10.0, 9.0, 11.0])), "no");
        assert_eq!(aio(with(&both, DiskKind::Aio, &[10.0, 11.0, 9.0, 9.0])), "yes", "SPDK's");
        let uring = |findings| reached(io_uring_throughput(&findings));
        assert_eq!(uring(with(&ours, DiskKind::Uring, &[10.0, 11.0, 9.0])), "no", "the best");
        assert_eq!(uring(with(&ours, DiskKind::Uring, &[10.0, 11.0, 10.5])), "yes");
        assert_eq!(uring(with(&both, DiskKind::Uring, &[10.0, 10.2, 11.0, 11.0])), "no", "1.02");
    }

    #[test]
    fn busy_time_and_system_calls_have_limits() {
        let mut found = of_cell(&[Kind::Ours, Kind::Ours], deep(DiskKind::Uring), &[1.0, 1.0], 1.0);
        let busy = |found: &Findings| reached(cost(found, DiskKind::Uring, 64, Kind::Ours, 0.8));
        let calls = |found: &Findings| reached(system_calls(found, DiskKind::Uring));
        assert_eq!((busy(&found), calls(&found)), ("-".into(), "-".into()));
        found.cells[0].syscalls = vec![Some(0.1), Some(0.2)];
        for (index, ns) in [79, 100].into_iter().enumerate() {
            let sample = found.cells[0].alternations[0].samples[index].as_mut().unwrap();
            sample.busy = Some(std::time::Duration::from_nanos(ns));
        }
        assert_eq!((busy(&found), calls(&found)), ("yes".into(), "yes".into()));
        found.cells[0].syscalls[0] = Some(0.11);
        assert_eq!(calls(&found), "no");
    }

    #[test]
    fn equals_are_within_the_spread() {
        let spread = |min, median, max| Spread { median, min, max };
        assert_eq!(not_below(spread(0.9, 1.0, 1.1)), "yes");
        assert_eq!(not_below(spread(0.9, 0.99, 1.1)), "within the spread");
        assert_eq!(not_below(spread(0.9, 0.95, 0.99)), "no");
    }

    #[test]
    fn virtio_scsi_is_held_against_blk_and_spdk() {
        let of_shown = |kind, controller| Shown { name: "s".into(), kind, controller };
        let contenders = vec![
            of_shown(Kind::Ours, Controller::Scsi),
            of_shown(Kind::Spdk, Controller::Scsi),
            of_shown(Kind::Ours, Controller::Blk),
        ];
        let aim = |p50s: &[f64], other, least| {
            let cells = of_cell(&[], deep(DiskKind::Null), p50s, 1.0).cells;
            let scsi = Scsi { contenders: contenders.clone(), cells };
            let findings = Findings { scsi, ..Findings::default() };
            reached(super::scsi(&findings, DiskKind::Null, 64, other, least))
        };
        let (spdk, blk) = ((Kind::Spdk, Controller::Scsi), (Kind::Ours, Controller::Blk));
        assert_eq!(aim(&[10.0, 12.1, 8.1], spdk, 1.2), "yes");
        assert_eq!(aim(&[10.0, 11.9, 8.1], spdk, 1.2), "no");
        assert_eq!(aim(&[10.0, 12.1, 8.1], blk, 0.8), "yes");
        assert_eq!(aim(&[10.0, 12.1, 7.9], blk, 0.8), "no");
    }

    #[test]
    fn what_was_not_measured_says_so() {
        assert!(table(&Findings::default(), false).is_empty());
        let table = table(&Findings::default(), true).to_string();
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows.len(), 36);
        assert!(rows.iter().all(|row| row.contains("| not measured |")), "{table}");
    }
}
