//! `compare`: compares vhost-user-blk and vhost-user-scsi servers in alternation.
//!
//! In the order of the data flow: [`options`] selects the [`cells`] and the servers; [`backing`]
//! creates the files and devices of their disks; [`measure`] runs [`perf`] on each server, one
//! after the other, and [`fio`] without a server; [`idle`], [`neighbours`] and [`scsi`] measure what
//! cells do not show; [`report`] makes tables, [`aims`] compares the results with the aims, and [`plot`]
//! draws charts.

mod aims;
mod backing;
mod cells;
mod counters;
mod failures;
mod fio;
mod idle;
mod measure;
mod neighbours;
mod options;
mod perf;
mod plot;
mod report;
mod scsi;
mod syscalls;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bench::publish::{append, beside, progress, save};
use bench::servers::{Disk, Interrupt, Kind, Spec};
use clap::Parser;

use crate::backing::Backing;
use crate::cells::{Cell, DiskKind};
use crate::counters::Counters;
use crate::failures::Failures;
use crate::fio::Engine;
use crate::idle::Modes;
use crate::measure::{Fleet, Means, Measured};
use crate::neighbours::Neighbours;
use crate::options::{Case, Options};
use crate::perf::Perf;
use crate::scsi::Scsi;
use crate::syscalls::Tracer;

/// All results.
#[derive(Debug, Default)]
struct Findings {
    servers: Vec<Spec>,
    /// The engines of fio that are measured. In the list of contenders, they follow the servers.
    engines: Vec<Engine>,
    /// Notes for the report, such as omissions.
    notes: Vec<String>,
    cells: Vec<Measured>,
    neighbours: Vec<Neighbours>,
    modes: Vec<Modes>,
    scsi: Scsi,
    failures: Failures,
}

impl Findings {
    /// Names of all contenders: servers, then fio's engines.
    fn contenders(&self) -> Vec<&str> {
        let servers = self.servers.iter().map(|spec| spec.name.as_str());
        servers.chain(self.engines.iter().map(|engine| engine.title())).collect()
    }
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
        findings.notes.push(format!("the measurement failed before its end: {error:#}"));
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

/// Measures the selected cases.
fn find(findings: &mut Findings, options: &Options, interrupt: &Interrupt) -> Result<()> {
    let perf = Perf {
        program: options.perf()?,
        core: options.load_core,
        runtime_s: options.runtime_s(),
        ramp_s: options.ramp_time,
    };
    let cells = if options.wants(Case::Cells) { options.cells()? } else { Vec::new() };
    let idle = options.wants(Case::IdleCpu) || options.wants(Case::IdleLatency);
    let idle_disks = if idle { options.disks_or(&DiskKind::USUAL) } else { Vec::new() };
    let kinds: Vec<DiskKind> =
        cells.iter().map(|cell| cell.disk).chain(idle_disks.iter().copied()).collect();
    let (dir, device) = (&options.file_dir, options.block_device.as_deref());
    let backing = Backing::make(&kinds, dir, options.file_mib, device)?;
    if !cells.is_empty() {
        measure_cells(findings, options, &perf, &cells, &backing, interrupt)?;
    }
    if options.wants(Case::Scsi) {
        let means = means(options, &perf, &backing);
        scsi::measure(findings, options, &means, &options.scsi_cells()?, interrupt)?;
    }
    if options.wants(Case::IdleNeighbours) {
        neighbours::measure(findings, options, &perf, interrupt)?;
    }
    if idle {
        let disks: Vec<Disk> = idle_disks.iter().map(|&kind| backing.disk(kind)).collect();
        idle::measure(findings, options, &perf, &disks, interrupt)?;
    }
    Ok(())
}

/// The tools and parameters of a measurement without costs.
fn means<'a>(options: &Options, perf: &'a Perf, backing: &'a Backing) -> Means<'a> {
    let (runs, server_core) = (options.runs(), options.server_core);
    let (counters, tracer, fio) = (None, None, None);
    Means { perf, counters, tracer, fio, backing, runs, server_core }
}

fn measure_cells(
    findings: &mut Findings,
    options: &Options,
    perf: &Perf,
    cells: &[Cell],
    backing: &Backing,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut disks: Vec<Disk> = Vec::new();
    for cell in cells {
        let disk = backing.disk(cell.disk);
        if !disks.contains(&disk) {
            disks.push(disk);
        }
    }
    let mut fleet = Fleet::start(&findings.servers, options.server_core, &disks)?;
    let dir = tempfile::tempdir().context("cannot create a directory")?;
    let mut means = means(options, perf, backing);
    if disks.iter().any(|disk| disk.path().is_some()) {
        add_costs(&mut means, findings, options, &fleet, dir.path());
    }
    if findings.servers.iter().any(|spec| spec.kind == Kind::StorageDaemon)
        && disks.contains(&Disk::Malloc)
    {
        findings.notes.push(
            "qemu has no memory disk: its malloc is null-co with read-zeroes=on, which fills the \
             guest's buffer on a read and does nothing on a write"
                .into(),
        );
    }
    for (done, &cell) in cells.iter().enumerate() {
        progress(&format!("{}/{}: {cell}", done + 1, cells.len()));
        let failures = &mut findings.failures;
        let contenders = measure::contenders(&fleet, &means, cell);
        let measured = measure::measure(&mut fleet, &means, cell, contenders, failures, interrupt)?;
        findings.cells.push(measured);
    }
    progress("");
    Ok(())
}

/// Adds fio and the counters of instructions and system calls, which are measured on files and
/// devices.
fn add_costs(
    means: &mut Means<'_>,
    findings: &mut Findings,
    options: &Options,
    fleet: &Fleet,
    dir: &Path,
) {
    for index in 0..fleet.len() {
        let server = fleet.get(index);
        for (disk, driver) in &server.drivers {
            findings.notes.push(format!("{}'s {disk} disk: {driver}", server.spec.name));
        }
    }
    match Counters::probe(&counters::WORK, dir) {
        Ok(counters) => means.counters = Some(counters),
        Err(why) => findings.notes.push(format!("no instructions per I/O: {why}")),
    }
    match Tracer::probe(dir) {
        Ok(tracer) => {
            findings.notes.push(format!("system calls per I/O: {}", tracer.describe()));
            means.tracer = Some(tracer);
        }
        Err(why) => findings.notes.push(format!("no system calls per I/O: {why}")),
    }
    means.fio = options.fio();
    if means.fio.is_some() {
        findings.engines = Engine::ALL.to_vec();
        findings.notes.push(
            "fio does the I/O itself, on the servers' core, and submits as many requests together \
             as the depth allows; its system calls are those of its engine"
                .into(),
        );
    }
}
