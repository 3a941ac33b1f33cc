//! `stall`: what one VM's end costs the others, in stretches that are quiet and disturbed in turn.
//!
//! In the order the data flows: [`options`] says which [`cases`] are gone through on which servers,
//! those of [`strangers`] with [`newcomers`] beside them; [`client`] is the neighbours; [`stretch`] is
//! what they, the kernel and the server tell of a stretch; [`report`] makes tables.

mod cases;
mod client;
mod newcomers;
mod options;
mod report;
mod strangers;
mod stretch;

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

use crate::cases::{Case, Event, OTHER, VMS, controller, more_memory};
use crate::client::Clients;
use crate::options::Options;
use crate::stretch::Found;

/// Memory that must be available beside what a case takes.
const SPARE_KIB: u64 = 4 << 20;

/// All that was found.
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
                // Servers are started by a thread that may use every core, as they inherit that.
                let server = serve(&spec, options, &mut findings)?;
                let go =
                    || go_through(&mut findings, options, &server, &events, dir.path(), &interrupt);
                std::thread::scope(|scope| scope.spawn(go).join())
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

/// The same server with the library that makes an unmapping slow when it finds a file in `dir`.
fn slowed(spec: &Spec, dir: &Path) -> Result<Spec> {
    let mut spec = spec.clone();
    for (name, value) in slow_munmap::environment(dir) {
        let value = value.to_str().context("a path that is no UTF-8")?;
        spec.env.push((name.into(), value.into()));
    }
    if spec.kind == Kind::Ours {
        // A directory in which the library cannot rename its files.
        spec.args.push("--no-sandbox".into());
    }
    Ok(spec)
}

/// A server with a disk for each neighbour, and controllers for the VMs that come and go.
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

/// Keeps other processes of this machine off the reactors as far as that goes: they have cores of
/// their own where it matters.
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

/// Goes through `events`, with everything but the reactor on the clients' core.
fn go_through(
    findings: &mut Findings,
    options: &Options,
    server: &Server,
    events: &[Event],
    armory: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    // Threads that are started from here on inherit it.
    pin(options.client_core)?;
    let why_not = |event| no_room(event).or_else(|| foreign(event, server.spec.kind));
    let (events, left_out): (Vec<Event>, Vec<Event>) =
        events.iter().partition(|&&event| why_not(event).is_none());
    for event in left_out {
        let why = why_not(event).unwrap_or_default();
        findings.notes.push(format!("{} is left out: {why}", event.name()));
    }
    progress(&format!("{}: guest memory", server.spec.name));
    // Before the clients start, which would have to wait while the host finds it.
    let more = more_memory(&events)?;
    let sockets: Vec<PathBuf> =
        (0..options.clients).map(|n| server.socket(&neighbour(n))).collect();
    let sockets: Vec<&Path> = sockets.iter().map(PathBuf::as_path).collect();
    let pause = Duration::from_micros(options.pause_us);
    let mut clients = Clients::start(&sockets, options.client_core, pause)?;
    if !clients.real_time {
        findings.notes.push(
            "the neighbours have no real-time priority (chrt refused), so that whatever runs on \
             their core keeps them waiting"
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

/// Disturbed stretches, each with a quiet one of the same length after it.
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
    let (mut pairs, newcomers) = (Vec::new(), event.wants_newcomers());
    for run in 1..=options.runs {
        progress(&format!("{}: {}, {run}/{}", server.spec.name, event.name(), options.runs));
        interrupt.check()?;
        case.prepare()?;
        let start = Instant::now();
        let disturbed = stretch::watch(server, clients, &cores, newcomers, || {
            case.strike()?;
            std::thread::sleep(length.saturating_sub(start.elapsed()));
            Ok(())
        })?;
        // Some events take longer than a stretch should.
        let length = start.elapsed().max(length);
        case.settle()?;
        let quiet = stretch::watch(server, clients, &cores, newcomers, || {
            std::thread::sleep(length);
            Ok(())
        })?;
        pairs.push((quiet, disturbed));
    }
    let (server, case, words) = (server.spec.name.clone(), event.name(), event.words());
    Ok(Found { server, case, words, pairs })
}

/// Why `event` says nothing of such a server.
fn foreign(event: Event, kind: Kind) -> Option<String> {
    (event.wants_newcomers() && kind != Kind::Ours)
        .then(|| "it may stop this server for good".into())
}

/// Why this machine has no room for `event`.
fn no_room(event: Event) -> Option<String> {
    let Event::Table(gib) = event else { return None };
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = available.trim().trim_end_matches(" kB").parse().ok()?;
    let wanted = (gib << 20) + SPARE_KIB;
    (kib < wanted)
        .then(|| format!("{} GiB of memory wanted, {} available", wanted >> 20, kib >> 20))
}
