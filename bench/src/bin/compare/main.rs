//! `compare`: servers of vhost-user-blk disks against one another, in alternation.
//!
//! In the order the data flows: [`options`] says which [`cells`] are to be measured on which
//! servers; [`backing`] makes the files and devices behind their disks; [`measure`] runs [`perf`] on
//! each, one after the other, and [`fio`] without a server; [`idle`] and [`neighbours`] measure what no
//! cell shows; [`report`] makes tables, [`aims`] holds them against what was aimed at, and [`plot`]
//! draws them.

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
mod syscalls;

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
use crate::syscalls::Tracer;

/// All that was measured.
#[derive(Debug, Default)]
struct Findings {
    servers: Vec<Spec>,
    /// Those of fio's engines that take part; contenders after the servers.
    engines: Vec<Engine>,
    /// What was left out, or done in a way that a reader should know.
    notes: Vec<String>,
    cells: Vec<Measured>,
    neighbours: Vec<Neighbours>,
    modes: Vec<Modes>,
    failures: Failures,
}

impl Findings {
    /// Names of all that is compared, in order: servers, then fio's engines.
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
    let idle_disks = if idle { options.disks_or(&DiskKind::USUAL) } else { Vec::new() };
    let kinds: Vec<DiskKind> =
        cells.iter().map(|cell| cell.disk).chain(idle_disks.iter().copied()).collect();
    let (dir, device) = (&options.file_dir, options.block_device.as_deref());
    let backing = Backing::make(&kinds, dir, options.file_mib, device)?;
    if !cells.is_empty() {
        measure_cells(findings, options, &perf, &cells, &backing, interrupt)?;
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
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let (mut counters, mut tracer, mut fio) = (None, None, None);
    if disks.iter().any(|disk| disk.path().is_some()) {
        for index in 0..fleet.len() {
            let server = fleet.get(index);
            for (disk, driver) in &server.drivers {
                findings.notes.push(format!("{}'s {disk} disk: {driver}", server.spec.name));
            }
        }
        counters = Counters::probe(&counters::WORK, dir.path())
            .map_err(|why| findings.notes.push(format!("no instructions per I/O: {why}")))
            .ok();
        match Tracer::probe(dir.path()) {
            Ok(way) => {
                findings.notes.push(format!("system calls per I/O: {}", way.describe()));
                tracer = Some(way);
            }
            Err(why) => findings.notes.push(format!("no system calls per I/O: {why}")),
        }
        fio = options.fio();
        if fio.is_some() {
            findings.engines = Engine::ALL.to_vec();
            findings.notes.push(
                "fio does the I/O itself, on the servers' core, as many requests together as there \
                 is room for; its system calls are those of its engine"
                    .into(),
            );
        }
    }
    let (runs, server_core) = (options.runs(), options.server_core);
    let means = Means { perf, counters, tracer, fio, backing, runs, server_core };
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
        let failures = &mut findings.failures;
        let measured = measure::measure(&mut fleet, &means, cell, failures, interrupt)?;
        findings.cells.push(measured);
    }
    progress("");
    Ok(())
}
