//! `stall`: measures how the exit of a VM and other events delay the I/O of other VMs, in
//! alternating quiet and disturbed stretches.
//!
//! In the order of the data flow: [`options`] selects the [`event`]s and the servers; [`cases`]
//! make an event happen repeatedly, those of [`untrusted_clients`] and
//! [`hung_engine`] while [`new_vms`] run;
//! [`client`] is the neighbours; [`stretch`] collects the data of the neighbours, the kernel and
//! the server in one stretch; [`report`] makes tables.

mod cases;
mod client;
mod event;
mod hung_engine;
mod new_vms;
mod options;
mod report;
mod stretch;
mod untrusted_clients;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::pin::pin;
use bench::publish::{append, beside, progress, save};
use bench::servers::{Interrupt, Kind, Server, Spec};
use clap::Parser;
use front_end::GuestRam;

use crate::cases::{Case, OTHER, VMS, controller, more_memory};
use crate::client::Clients;
use crate::event::Event;
use crate::options::Options;
use crate::stretch::Found;

/// Memory that must be available besides the memory of a case.
const SPARE_KIB: u64 = 4 << 20;

/// All results.
#[derive(Debug, Default)]
struct Findings {
    notes: Vec<String>,
    found: Vec<Found>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stall: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut findings = Findings::default();
    let servers = options.servers()?;
    let dir = tempfile::Builder::new().prefix("stall").tempdir()?;
    for spec in &servers {
        let (slow, plain): (Vec<Event>, Vec<Event>) =
            options.events().iter().partition(|event| event.wants_slow_unmap());
        for (events, spec) in [(plain, spec.clone()), (slow, slowed(spec, dir.path())?)] {
            if !events.is_empty() {
                // This thread may use every core, which the servers inherit. The measuring thread
                // is pinned.
                let server = serve(&spec, options, &mut findings)?;
                let measure =
                    || measure(&mut findings, options, &server, &events, dir.path(), &interrupt);
                std::thread::scope(|scope| scope.spawn(measure).join())
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
        }
    }
    progress("");
    let text = report::markdown(&findings, options)?;
    print!("{text}");
    let out = match &options.out {
        Some(dir) => dir.clone(),
        // target/release/stall → target/stall
        None => beside("../stall")?,
    };
    save(&out.join("stall.json"), &report::json(&findings, options).to_string())?;
    if let Some(path) = &options.results {
        append(path, &text)?;
    }
    Ok(())
}

/// The same server with the library that delays an unmapping when there is a file in `dir`.
fn slowed(spec: &Spec, dir: &Path) -> Result<Spec> {
    let mut spec = spec.clone();
    for (name, value) in slow_munmap::environment(dir) {
        let value = value.to_str().context("a path that is no UTF-8")?;
        spec.env.push((name.into(), value.into()));
    }
    if spec.kind == Kind::Ours {
        // In the sandbox, the library cannot rename its files in the directory.
        spec.args.push("--no-sandbox".into());
    }
    Ok(spec)
}

/// Starts a server with a disk for each neighbour, and controllers for the other VMs.
fn serve(spec: &Spec, options: &Options, findings: &mut Findings) -> Result<Server> {
    let server = Server::start(spec, options.server_core, &[])?;
    for n in 0..options.clients {
        let name = neighbour(n);
        server.bdev("malloc", &name)?;
        server.controller(&name, &name)?;
    }
    server.bdev("malloc", OTHER)?;
    prefer(&server, findings);
    for n in 0..VMS {
        server.controller(&controller(n), OTHER)?;
    }
    Ok(server)
}

/// Raises the priority of the reactors over other processes of this machine.
fn prefer(server: &Server, findings: &mut Findings) {
    let tids = server.workers.iter().map(u32::to_string);
    let mut renice = Command::new("renice");
    renice.args(["-n", "-20", "-p"]).args(tids).stdout(Stdio::null()).stderr(Stdio::null());
    if !renice.status().is_ok_and(|status| status.success()) {
        let name = &server.spec.name;
        findings.notes.push(format!("{name}'s reactors share their core (renice refused)"));
    }
}

fn neighbour(n: usize) -> String {
    format!("neighbour.{n}")
}

/// Measures `events`, with all threads of this program on the clients' core.
fn measure(
    findings: &mut Findings,
    options: &Options,
    server: &Server,
    events: &[Event],
    armory: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    // Threads that start later inherit the affinity.
    pin(options.client_core)?;
    let why_not = |event| no_room(event).or_else(|| foreign(event, server.spec.kind));
    let (events, left_out): (Vec<Event>, Vec<Event>) =
        events.iter().partition(|&&event| why_not(event).is_none());
    for event in left_out {
        let why = why_not(event).unwrap_or_default();
        findings.notes.push(format!("{} is omitted: {why}", event.name()));
    }
    progress(&format!("{}: guest memory", server.spec.name));
    // Before the clients start, because allocating it delays them.
    let more = more_memory(&events)?;
    let sockets: Vec<PathBuf> =
        (0..options.clients).map(|n| server.socket(&neighbour(n))).collect();
    let sockets: Vec<&Path> = sockets.iter().map(PathBuf::as_path).collect();
    let pause = Duration::from_micros(options.pause_us);
    let mut clients = Clients::start(&sockets, options.client_core, pause)?;
    if !clients.real_time {
        findings.notes.push(
            "the neighbours have no real-time priority (chrt refused), so other threads on their \
             core delay them"
                .into(),
        );
    }
    for event in events {
        let found = pairs(options, server, &mut clients, event, armory, more.clone(), interrupt)
            .with_context(|| format!("{} on {}", event.name(), server.spec.name))?;
        findings.found.push(found);
    }
    clients.stop()
}

/// Measures disturbed stretches, each followed by a quiet one of the same length.
fn pairs(
    options: &Options,
    server: &Server,
    clients: &mut Clients,
    event: Event,
    armory: &Path,
    more: Option<Arc<GuestRam>>,
    interrupt: &Interrupt,
) -> Result<Found> {
    let length = Duration::from_secs_f64(options.length);
    let cores = [options.client_core, options.server_core];
    let mut case = Case::new(event, server, armory.to_owned(), length, more)?;
    let (mut pairs, new_vms) = (Vec::new(), event.wants_new_vms());
    for run in 1..=options.runs {
        progress(&format!("{}: {}, {run}/{}", server.spec.name, event.name(), options.runs));
        interrupt.check()?;
        case.prepare()?;
        let start = Instant::now();
        let disturbed = stretch::watch(server, clients, &cores, new_vms, || {
            case.strike()?;
            std::thread::sleep(length.saturating_sub(start.elapsed()));
            Ok(())
        })?;
        // Some events take longer than the configured length.
        let length = start.elapsed().max(length);
        case.settle()?;
        let quiet = stretch::watch(server, clients, &cores, new_vms, || {
            std::thread::sleep(length);
            Ok(())
        })?;
        pairs.push((quiet, disturbed));
    }
    let (server, case, words) = (server.spec.name.clone(), event.name(), event.words());
    Ok(Found { server, case, words, pairs })
}

/// Why `event` cannot be measured on a server of this kind.
fn foreign(event: Event, kind: Kind) -> Option<String> {
    if event == Event::EngineHang && kind != Kind::Ours {
        return Some("this server has no NBD client".into());
    }
    (event.wants_new_vms() && kind != Kind::Ours)
        .then(|| "it may block this server for ever".into())
}

/// Why this machine has not enough memory for `event`.
fn no_room(event: Event) -> Option<String> {
    let Event::Table(gib) = event else { return None };
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = available.trim().trim_end_matches(" kB").parse().ok()?;
    let needed = (gib << 20) + SPARE_KIB;
    (kib < needed).then(|| {
        format!("it needs {} GiB of memory, but {} GiB are available", needed >> 20, kib >> 20)
    })
}
