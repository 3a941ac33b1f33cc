//! The results as Markdown and as JSON.

use std::fmt::Write;

use anyhow::Result;
use bench::Spread;
use bench::markdown::{Table, count, digits, ratio, time};
use bench::servers::{date, machine};
use serde_json::{Value, json};

use crate::Findings;
use crate::aims;
use crate::cells::Cell;
use crate::idle::Modes;
use crate::measure::{Measured, Sample};
use crate::options::Options;
use crate::scsi::Scsi;

/// Limit, in percent, on the time in which other processes keep servers from running.
const QUIET_MAX: f64 = 1.0;

/// The report: machine and options, then the tables.
pub(crate) fn markdown(findings: &Findings, options: &Options) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "## Compared on {}\n", date())?;
    writeln!(text, "{}\n", machine())?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    writeln!(text, "`bench/compare {}`\n", args.join(" "))?;
    let (runs, seconds) = (options.runs(), options.runtime_s());
    writeln!(text, "{runs} alternations, {seconds} s each. Figures are medians. Ratios are those")?;
    writeln!(text, "within one alternation: median (minimum–maximum).\n")?;
    for note in &findings.notes {
        writeln!(text, "- {note}")?;
    }
    if !findings.notes.is_empty() {
        writeln!(text)?;
    }
    let all = || findings.cells.iter().chain(&findings.scsi.cells);
    if all().next().is_some() {
        writeln!(text, "{}\n", conditions(all()))?;
    }
    if !findings.cells.is_empty() {
        writeln!(text, "{}", cells(findings))?;
    }
    for (title, table) in [
        ("Cost of an I/O on a file or device", costs(findings)),
        ("virtio-scsi", scsi(findings)),
        ("With idle controllers", neighbours(findings)),
        ("Idle", idle(findings)),
        ("Failures", findings.failures.table()),
    ] {
        if !table.is_empty() {
            writeln!(text, "### {title}\n\n{table}")?;
        }
    }
    let aims = aims::table(findings, options.results.is_some());
    if !aims.is_empty() {
        writeln!(text, "### Aims\n\n{aims}")?;
    }
    Ok(text)
}

/// How much other processes disturbed the measurement.
fn conditions<'m>(cells: impl Iterator<Item = &'m Measured> + Clone) -> String {
    let alternations = || cells.clone().flat_map(|measured| &measured.alternations);
    let trips = Spread::of(alternations().map(|a| a.round_trip_ns));
    let waits = alternations().flat_map(|a| a.samples.iter().flatten());
    let waits = waits.map(|sample| 100.0 * sample.kept_waiting);
    let (Some(trip), Some(wait)) = (trips, Spread::of(waits)) else { return String::new() };
    let verdict = if wait.median > QUIET_MAX {
        " **The machine was busy: do not rely on these figures.**"
    } else {
        ""
    };
    let Spread { median, min, max } = trip;
    format!(
        "Round trip: {median:.0} ns ({min:.0}–{max:.0}). Other processes kept the servers' polling \
         threads from running for {} % of the time.{verdict}",
        ratio(Some(wait))
    )
}

/// A row for each contender of each cell.
fn cells(findings: &Findings) -> Table {
    let servers = findings.servers.len();
    figures(&findings.contenders(), &findings.cells, |index, cell| {
        index < servers || cell.disk.is_stored()
    })
}

fn scsi(findings: &Findings) -> Table {
    let Scsi { contenders, cells } = &findings.scsi;
    let contenders: Vec<_> = contenders.iter().map(|shown| shown.name.as_str()).collect();
    figures(&contenders, cells, |_, _| true)
}

/// A row for each contender of each cell that it is measured in. The last columns compare the first
/// contender with it.
fn figures(
    contenders: &[&str],
    cells: &[Measured],
    is_measured: impl Fn(usize, &Cell) -> bool,
) -> Table {
    let Some(first) = contenders.first() else { return Table::new(&["cell"]) };
    let [p50_ratio, iops_ratio] = ["p50", "IOPS"].map(|figure| format!("{figure}: {first} ÷ it"));
    let mut table = Table::new(&[
        "cell",
        "server",
        "p50",
        "round trips",
        "p99.9",
        "IOPS",
        &p50_ratio,
        &iops_ratio,
    ]);
    for measured in cells {
        for (index, name) in contenders.iter().enumerate() {
            if !is_measured(index, &measured.cell) {
                continue;
            }
            let median = |spread: Option<Spread>, show: fn(f64) -> String| {
                spread.map_or_else(|| "-".into(), |spread| show(spread.median))
            };
            let mut row = vec![
                measured.cell.to_string(),
                (*name).to_owned(),
                median(measured.of(index, |f| f.p50_ns), time),
                median(measured.trips(index), digits),
                median(measured.of(index, |f| f.p999_ns), time),
                median(measured.of(index, |f| f.iops), count),
            ];
            if index > 0 {
                row.push(ratio(measured.ratio(0, index, |f| f.p50_ns)));
                row.push(ratio(measured.ratio(0, index, |f| f.iops)));
            }
            table.row(row);
        }
    }
    table
}

/// A cost of an I/O: its heading, and its value in a sample.
type Cost = (&'static str, fn(&Sample) -> Option<f64>);

const COSTS: [Cost; 5] = [
    ("CPU ns", |sample| Some(sample.cpu?.as_nanos() as f64)),
    ("busy ns", |sample| Some(sample.busy?.as_nanos() as f64)),
    ("other threads' CPU ns", |sample| Some(sample.others?.as_nanos() as f64)),
    ("instructions", |sample| sample.counts.as_ref()?.first().copied()),
    ("cycles", |sample| sample.counts.as_ref()?.get(1).copied()),
];

/// The costs of an I/O on a file or device, in each server's polling thread and its other threads.
fn costs(findings: &Findings) -> Table {
    let contenders = findings.contenders();
    let Some(first) = contenders.first() else { return Table::new(&["cell"]) };
    let busy_ratio = format!("busy: {first} ÷ it");
    let mut headings = vec!["cell", "server"];
    headings.extend(COSTS.iter().map(|(name, _)| *name));
    headings.extend(["system calls", &busy_ratio]);
    let mut table = Table::new(&headings);
    for measured in &findings.cells {
        for (index, name) in contenders.iter().enumerate() {
            let each = |cost: fn(&Sample) -> Option<f64>| measured.cost(index, cost);
            let median = |(_, cost): &Cost| Some(Spread::of(each(*cost)?)?.median);
            let medians: Vec<Option<f64>> = COSTS.iter().map(median).collect();
            if medians[0].is_none() {
                continue;
            }
            let mut row = vec![measured.cell.to_string(), (*name).to_owned()];
            row.extend(medians.into_iter().map(|m| m.map_or_else(|| "-".into(), count)));
            let calls = measured.syscalls.get(index).copied().flatten();
            row.push(calls.map_or_else(|| "-".into(), |calls| format!("{calls:.3}")));
            if index > 0 {
                row.push(ratio(busy_ratio_of(measured, index)));
            }
            table.row(row);
        }
    }
    table
}

fn busy_ratio_of(measured: &Measured, server: usize) -> Option<Spread> {
    let (_, busy) = COSTS[1];
    let (first, other) = (measured.cost(0, busy)?, measured.cost(server, busy)?);
    Spread::of_ratios(first.into_iter().zip(other))
}

fn neighbours(findings: &Findings) -> Table {
    let mut table = Table::new(&[
        "server",
        "disk",
        "idle",
        "d64 IOPS beside",
        "÷ alone",
        "d1 p50 beside",
        "÷ alone",
    ]);
    for found in &findings.neighbours {
        let beside = |pairs: &[(f64, f64)]| {
            Spread::of(pairs.iter().map(|(beside, _)| *beside)).map_or(0.0, |s| s.median)
        };
        if found.iops.is_empty() {
            let name = found.server.name.clone();
            let count = found.count.to_string();
            table.row(vec![name, found.disk.name().into(), count, "failed".into()]);
            continue;
        }
        table.row(vec![
            found.server.name.clone(),
            found.disk.name().into(),
            found.count.to_string(),
            count(beside(&found.iops)),
            ratio(found.iops_ratio()),
            time(beside(&found.p50_ns)),
            ratio(found.p50_ratio()),
        ]);
    }
    table
}

fn idle(findings: &Findings) -> Table {
    let mut table = Table::new(&[
        "server",
        "mode",
        "disk",
        "idle CPU",
        "p50 after 1 ms, guest polls",
        "guest sleeps",
    ]);
    for modes in &findings.modes {
        let mut start = vec![modes.server.name.clone(), modes.mode.name().into()];
        if modes.unsupported.is_some() {
            start.extend(["all", "not supported"].map(String::from));
            table.row(start);
            continue;
        }
        for disk in &modes.disks {
            let median = |values: &[f64]| {
                Spread::of(values.iter().copied()).map_or("-".into(), |s| time(s.median))
            };
            let mut row = start.clone();
            row.push(disk.disk.name().into());
            row.push(disk.cpu.map_or("-".into(), |share| format!("{} %", digits(share * 100.0))));
            row.extend([median(&disk.polling_ns), median(&disk.sleeping_ns)]);
            table.row(row);
        }
    }
    table
}

/// All results, with the whole output of `vhost-perf` for each run.
pub(crate) fn json(findings: &Findings, options: &Options) -> Value {
    let neighbours = findings.neighbours.iter().map(|found| {
        json!({
            "server": found.server.name, "disk": found.disk.name(), "idle": found.count,
            "iops_beside_alone": found.iops, "p50_ns_beside_alone": found.p50_ns,
        })
    });
    let scsi = findings.scsi.contenders.iter().map(|shown| shown.name.as_str());
    let servers = findings
        .servers
        .iter()
        .map(|spec| json!({"name": spec.name, "program": spec.program, "args": spec.args}));
    json!({
        "date": date(),
        "machine": machine(),
        "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        "runs": options.runs(),
        "runtime_s": options.runtime_s(),
        "notes": findings.notes,
        "servers": servers.collect::<Vec<_>>(),
        "contenders": findings.contenders(),
        "cells": findings.cells.iter().map(cell_json).collect::<Vec<_>>(),
        "scsi_contenders": scsi.collect::<Vec<_>>(),
        "scsi": findings.scsi.cells.iter().map(cell_json).collect::<Vec<_>>(),
        "idle_neighbours": neighbours.collect::<Vec<_>>(),
        "idle": findings.modes.iter().map(modes_json).collect::<Vec<_>>(),
        "failed": findings.failures.json(),
    })
}

fn cell_json(measured: &Measured) -> Value {
    let alternations = measured.alternations.iter().map(|a| {
        let samples: Vec<Value> =
            a.samples.iter().map(|s| s.as_ref().map_or(Value::Null, sample_json)).collect();
        json!({"round_trip_ns": a.round_trip_ns, "servers": samples})
    });
    json!({
        "cell": measured.cell.to_string(),
        "disk": measured.cell.disk.name(),
        "rw": measured.cell.rw.name(),
        "bs": measured.cell.bs.0,
        "depth": measured.cell.depth,
        "queues": measured.cell.queues,
        "alternations": alternations.collect::<Vec<_>>(),
        "syscalls_per_io": measured.syscalls,
    })
}

fn sample_json(sample: &Sample) -> Value {
    json!({
        "cpu_s": sample.cpu.map(|cpu| cpu.as_secs_f64()),
        "busy_s": sample.busy.map(|busy| busy.as_secs_f64()),
        "cpu_of_others_s": sample.others.map(|cpu| cpu.as_secs_f64()),
        "instructions": sample.counts.as_ref().map(|counts| counts[0]),
        "cycles": sample.counts.as_ref().map(|counts| counts[1]),
        "kept_waiting": sample.kept_waiting,
        "perf": sample.figures.raw,
    })
}

fn modes_json(modes: &Modes) -> Value {
    let disks = modes.disks.iter().map(|disk| {
        json!({
            "disk": disk.disk.name(), "idle_cpu": disk.cpu,
            "p50_ns_guest_polls": disk.polling_ns, "p50_ns_guest_sleeps": disk.sleeping_ns,
        })
    });
    json!({
        "server": modes.server.name, "mode": modes.mode.name(),
        "unsupported": modes.unsupported, "disks": disks.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Alternation;
    use crate::perf::Figures;

    #[test]
    fn a_busy_machine_is_reported() {
        let cell = |kept_waiting| {
            let figures =
                Figures { p50_ns: 1.0, p999_ns: 1.0, iops: 1.0, completed: 1.0, raw: Value::Null };
            let samples = vec![Some(Sample { kept_waiting, ..Sample::of(figures) })];
            let alternations = vec![Alternation { round_trip_ns: 125.0, samples }];
            Measured { cell: Cell::subset()[0], alternations, syscalls: vec![] }
        };
        let quiet = conditions([&cell(0.002)].into_iter());
        assert!(quiet.starts_with("Round trip: 125 ns") && quiet.ends_with("% of the time."));
        assert!(conditions([&cell(0.3)].into_iter()).contains("The machine was busy"));
    }
}
