//! `soak`: random operations on one `vhost`, VMs whose I/O must not be affected, and a check that
//! the process releases all resources.
//!
//! In the order of use: [`beats`] is the unit of waits; [`neighbours`] start; [`world`] runs random
//! operations, with correct [`vm`]s and with [`abuse`] of every socket, while [`newcomers`] connect
//! and disconnect. After each round it releases everything, and the [`footprint`] of the process
//! must be that of the beginning. [`rounds`] only creates and deletes controllers.
#![warn(clippy::cast_possible_truncation)]

mod abuse;
mod beats;
mod footprint;
mod neighbours;
mod newcomers;
mod rounds;
mod vm;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use bench::publish::{beside, progress};
use bench::servers::{Interrupt, Kind, Server, Spec};
use clap::Parser;
use serde_json::json;

use crate::beats::Beats;
use crate::footprint::{Footprint, come_back};
use crate::neighbours::Neighbours;
use crate::newcomers::Newcomers;
use crate::world::World;

/// Steps of a round. After a round, the process must have released its resources.
const STEPS: usize = 250;
/// Rounds before the memory in use is recorded.
const WARM_UP: u64 = 2;

/// Run random operations of clients, guests and disks on one vhost for some minutes.
///
/// Meanwhile, two VMs verify every block, and a third one connects and disconnects repeatedly.
/// Every 250 steps, everything is released, and the process must not have more resources than at
/// the start: fds, threads (two more may be idle), mappings of files, anonymous mappings (64 more),
/// and memory (32 MiB more than after the first two rounds). It must not report I/O, sessions or
/// fds of others. No wait may exceed the limit, which is in beats: a beat is a millisecond plus a
/// hand-over between two threads of this program, while vhost is not stopped. Prints the results;
/// exit status 0 on success.
#[derive(Debug, Parser)]
#[command(name = "soak", max_term_width = 100)]
struct Options {
    /// Minutes to run; at least three rounds run.
    #[arg(default_value_t = 1.0)]
    minutes: f64,
    /// Seed of the operations [default: the current time].
    #[arg(long)]
    seed: Option<u64>,
    /// Only create and delete a controller this many times.
    #[arg(long, value_name = "N", conflicts_with = "minutes")]
    rounds: Option<u64>,
    /// Limit on a VM's request, on a VM's connection to its disconnection, and on an RPC.
    #[arg(long, value_name = "BEATS", default_value_t = 1000)]
    wait_max: u64,
    /// The vhost to test [default: the vhost in this program's directory].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// An argument for vhost; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    arg: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let by_clock = || SystemTime::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
    let seed = options.seed.unwrap_or_else(by_clock);
    eprintln!("soak: seed {seed}");
    match run(&options, seed) {
        Ok(line) => {
            println!("soak: seed {seed}: {line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            progress("");
            eprintln!("soak: seed {seed} FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, seed: u64) -> Result<String> {
    let interrupt = Interrupt::install()?;
    let vhost = options.vhost.clone().map_or_else(|| beside("vhost"), Ok)?;
    let mut spec = Spec::new("vhost", Kind::Ours, vhost);
    // Later arguments override these. The reactors sleep, because clients and server share the
    // cores.
    spec.args = ["-m", "0x3", "--interrupt-mode"].map(String::from).into();
    spec.args.extend(options.arg.iter().cloned());
    let mut server = Server::start(&spec, 0, &[])?;
    let beats = Arc::new(Beats::start()?);
    let neighbours = Neighbours::start(&server, seed, &beats.count())?;
    let work = match options.rounds {
        Some(rounds) => rounds::run(&server, rounds, &interrupt),
        None => soak(options, &mut server, &neighbours, seed, &beats, &interrupt),
    };
    progress("");
    let seen = work.and_then(|line| {
        let seen = neighbours.end()?;
        within("a neighbour's request", seen.wait_beats, options)?;
        Ok(format!(
            "{line}\nneighbours: {} requests without errors, each within {} beats (limit {}); {}",
            seen.completed,
            seen.wait_beats,
            options.wait_max,
            longest_turns(&server)?
        ))
    });
    seen.with_context(|| format!("the last lines of the server's log:\n{}", server.process.log()))
}

fn within(what: &str, beats: u64, options: &Options) -> Result<()> {
    let max = options.wait_max;
    ensure!(beats <= max, "{what} took {beats} beats, more than the limit of {max}");
    Ok(())
}

/// For information only: these times depend on the machine.
fn longest_turns(server: &Server) -> Result<String> {
    let turns = server.call("vhost_get_reactor_turns", json!({}))?;
    let of = |turn: &serde_json::Value| {
        format!("{:.0} µs", turn["longest_turn_us"].as_f64().unwrap_or(0.0))
    };
    let each: Vec<String> = turns.as_array().into_iter().flatten().map(of).collect();
    Ok(format!("longest poll iterations of the reactors {}", each.join(" and ")))
}

/// Runs rounds of [`STEPS`] steps until the time is over.
fn soak(
    options: &Options,
    server: &mut Server,
    neighbours: &Neighbours,
    seed: u64,
    beats: &Arc<Beats>,
    interrupt: &Interrupt,
) -> Result<String> {
    Newcomers::prepare(server)?;
    let end = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
    let mut world = World::new(server, seed, beats.clone())?;
    let start = Footprint::of(world.server.process.pid())?;
    let (mut before, mut now, mut rounds) = (start, start, 0);
    let mut seen = newcomers::Seen::default();
    let mut slowest = (0, 0, String::new());
    while rounds <= WARM_UP || Instant::now() < end {
        rounds += 1;
        let newcomers = Newcomers::start(world.server, beats)?;
        for step in 1..=STEPS {
            interrupt.check()?;
            progress(&format!("round {rounds}, step {step}: {now}"));
            world.step().with_context(|| shown(&world, rounds, step))?;
        }
        seen.add(newcomers.end().with_context(|| shown(&world, rounds, STEPS))?);
        let ended = beats.now();
        world.release().with_context(|| shown(&world, rounds, STEPS))?;
        let released = beats.now();
        neighbours.go_on()?;
        before = if rounds <= WARM_UP { start.with_any_rss() } else { before };
        let waited_for;
        (now, waited_for) =
            come_back(world.server, &before).with_context(|| shown(&world, rounds, STEPS))?;
        let slow = (beats.now() - ended, released - ended, waited_for);
        slowest = slowest.max(slow);
        before = if rounds == WARM_UP { start.with_rss_of(&now) } else { before };
    }
    within("a newcomer's session", seen.life_beats, options)?;
    within("an RPC", seen.rpc_beats, options)?;
    let (tally, (step, what)) = (world.tally(), world.slowest());
    let (back, release, waited_for) = slowest;
    Ok(format!(
        "{rounds} rounds of {STEPS} steps ({tally})\nthe longest step took {step} beats: {what}; \
         all resources were released within {back} beats, {release} of them in this program; the \
         last to be released: {waited_for}\n\
         at the start {start}; after {WARM_UP} rounds {} MiB; at the end {now}\n\
         newcomers: {} sessions, each within {} beats; an RPC after each, within {}",
        before.rss_mib(),
        seen.lives,
        seen.life_beats,
        seen.rpc_beats
    ))
}

/// The state at a failure, in detail, because it may be hard to reproduce.
fn shown(world: &World<'_>, round: u64, step: usize) -> String {
    let controllers = world.server.call("vhost_get_controllers", json!({}));
    let controllers = controllers.map_or_else(|e| e.to_string(), |shown| shown.to_string());
    let recent = world.recent();
    format!("round {round}, step {step}; controllers: {controllers}; the last steps:\n{recent}\n")
}
