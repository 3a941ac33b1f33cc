//! `compare`: servers of vhost-user-blk disks against one another, in alternation.
//!
//! In the order the data flows: [`options`] says which [`cells`] are to be measured on which
//! servers; [`measure`] runs [`perf`] on each, one after the other; [`idle`] and [`neighbours`]
//! measure what no cell shows; [`report`] makes tables, [`aims`] holds them against what was
//! aimed at, and [`plot`] draws them.

mod aims;
mod cells;
mod counters;
mod failures;
mod idle;
mod measure;
mod neighbours;
mod options;
mod perf;
mod plot;
mod report;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bench::publish::{append, beside, progress, save};
use bench::servers::{Disk, Interrupt, Kind, Spec};
use clap::Parser;

use crate::cells::{Cell, DiskKind};
use crate::counters::Counters;
use crate::failures::Failures;
use crate::idle::Modes;
use crate::measure::{Fleet, Measured};
use crate::neighbours::Neighbours;
use crate::options::{Case, Options};
use crate::perf::Perf;

/// All that was measured.
#[derive(Debug, Default)]
struct Findings {
    servers: Vec<Spec>,
    /// What was left out, or done in a way that a reader should know.
    notes: Vec<String>,
    cells: Vec<Measured>,
    neighbours: Vec<Neighbours>,
    modes: Vec<Modes>,
    failures: Failures,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let (servers, notes) = options.servers()?;
    let mut findings = Findings { servers, notes, ..Findings::default() };
    let found = find(&mut findings, options, &interrupt);
    interrupt.check()?;
    if let Err(error) = &found {
        findings.notes.push(format!("not measured to the end: {error:#}"));
    }
    let text = report::markdown(&findings, options)?;
    print!("{text}");
    let out = match &options.out {
        Some(dir) => dir.clone(),
        // target/release/compare → target/compare
        None => beside("../compare")?,
    };
    save(&out.join("compare.json"), &report::json(&findings, options).to_string())?;
    if !findings.cells.is_empty() {
        save(&out.join("compare.svg"), &plot::svg(&findings)?)?;
    }
    found?;
    if let Some(path) = &options.results {
        append(path, &text)?;
    }
    let ours = findings.failures.ours();
    if !ours.is_empty() {
        bail!("{}", ours.join("\n"));
    }
    Ok(())
}

/// Measures what `options` ask for.
fn find(findings: &mut Findings, options: &Options, interrupt: &Interrupt) -> Result<()> {
    let perf = Perf {
        program: options.perf()?,
        core: options.load_core,
        runtime_s: options.runtime_s(),
        ramp_s: options.ramp_time,
    };
    let cells = if options.wants(Case::Cells) { options.cells()? } else { Vec::new() };
    let idle = options.wants(Case::IdleCpu) || options.wants(Case::IdleLatency);
    let idle_disks = if idle { options.disks_or(&DiskKind::ALL) } else { Vec::new() };
    let needs_file = cells.iter().any(|cell| cell.disk == DiskKind::File)
        || idle_disks.contains(&DiskKind::File);
    let file =
        needs_file.then(|| measure::data_file(&options.file_dir, options.file_mib)).transpose()?;
    let path = file.as_ref().map_or(Path::new(""), |file| file.path());
    if !cells.is_empty() {
        measure_cells(findings, options, &perf, &cells, path, interrupt)?;
    }
    if options.wants(Case::IdleNeighbours) {
        neighbours::measure(findings, options, &perf, interrupt)?;
    }
    if idle {
        let disks: Vec<Disk> = idle_disks.iter().map(|disk| disk.disk(path)).collect();
        idle::measure(findings, options, &perf, &disks, interrupt)?;
    }
    Ok(())
}

fn measure_cells(
    findings: &mut Findings,
    options: &Options,
    perf: &Perf,
    cells: &[Cell],
    file: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut disks: Vec<Disk> = Vec::new();
    for cell in cells {
        let disk = cell.disk.disk(file);
        if !disks.contains(&disk) {
            disks.push(disk);
        }
    }
    let mut fleet = Fleet::start(&findings.servers, options.server_core, &disks)?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let counters = if disks.iter().any(|disk| matches!(disk, Disk::File(_))) {
        for index in 0..fleet.len() {
            let server = fleet.get(index);
            let note = format!("{}'s file disk: {}", server.spec.name, server.file_driver);
            findings.notes.push(note);
        }
        Counters::probe(dir.path())
            .map_err(|why| findings.notes.push(format!("no instructions per I/O: {why}")))
            .ok()
    } else {
        None
    };
    if findings.servers.iter().any(|spec| spec.kind == Kind::StorageDaemon)
        && disks.contains(&Disk::Malloc)
    {
        findings.notes.push(
            "qemu has no disk in memory: its malloc is null-co with read-zeroes=on, which fills \
             the guest's buffer on a read and does nothing on a write"
                .into(),
        );
    }
    for (done, &cell) in cells.iter().enumerate() {
        progress(&format!("{}/{}: {cell}", done + 1, cells.len()));
        let counters = counters.as_ref();
        let failures = &mut findings.failures;
        let measured =
            measure::measure(&mut fleet, perf, cell, options, counters, failures, interrupt)?;
        findings.cells.push(measured);
    }
    progress("");
    Ok(())
}
