//! `soak`: random operations on one `vhost`, VMs whose I/O must not be affected, and a check that
//! the process releases all resources.
//!
//! In the order of use: [`heartbeats`] is the unit of waits; [`neighbours`] start; [`world`] runs
//! random operations, with correct [`vm`]s and with [`abuse`] of every socket, while [`new_vms`]
//! connect and disconnect. After each round it releases everything, and the [`footprint`] of the
//! process must be that of the beginning. [`rounds`] only creates and deletes controllers.

mod abuse;
mod footprint;
mod heartbeats;
mod neighbours;
mod new_vms;
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

use crate::footprint::{Footprint, come_back};
use crate::heartbeats::Heartbeats;
use crate::neighbours::Neighbours;
use crate::new_vms::NewVms;
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
/// fds of others. No wait may exceed the limit, which is in heartbeats: a heartbeat is a
/// millisecond plus a hand-over between two threads of this program, while vhost is not stopped.
/// Prints the results; exit status 0 on success.
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
    #[arg(long, value_name = "HEARTBEATS", default_value_t = 1000)]
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
    let heartbeats = Arc::new(Heartbeats::start()?);
    let neighbours = Neighbours::start(&server, seed, &heartbeats.count())?;
    let work = match options.rounds {
        Some(rounds) => rounds::run(&server, rounds, &interrupt),
        None => soak(options, &mut server, &neighbours, seed, &heartbeats, &interrupt),
    };
    progress("");
    let seen = work.and_then(|line| {
        let seen = neighbours.end()?;
        within("a neighbour's request", seen.wait_heartbeats, options)?;
        Ok(format!(
            "{line}\n\
             neighbours: {} requests without errors, each within {} heartbeats (limit {}); {}",
            seen.completed,
            seen.wait_heartbeats,
            options.wait_max,
            longest_iterations(&server)?
        ))
    });
    seen.with_context(|| format!("the last lines of the server's log:\n{}", server.process.log()))
}

fn within(what: &str, heartbeats: u64, options: &Options) -> Result<()> {
    let max = options.wait_max;
    ensure!(heartbeats <= max, "{what} took {heartbeats} heartbeats, more than the limit of {max}");
    Ok(())
}

/// For information only: these times depend on the machine.
fn longest_iterations(server: &Server) -> Result<String> {
    let reactors = server.call("vhost_get_reactor_turns", json!({}))?;
    let of = |reactor: &serde_json::Value| {
        format!("{:.0} µs", reactor["longest_turn_us"].as_f64().unwrap_or(0.0))
    };
    let each: Vec<String> = reactors.as_array().into_iter().flatten().map(of).collect();
    Ok(format!("longest poll iterations of the reactors {}", each.join(" and ")))
}

/// Runs rounds of [`STEPS`] steps until the time is over.
fn soak(
    options: &Options,
    server: &mut Server,
    neighbours: &Neighbours,
    seed: u64,
    heartbeats: &Arc<Heartbeats>,
    interrupt: &Interrupt,
) -> Result<String> {
    NewVms::prepare(server)?;
    let end = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
    let mut world = World::new(server, seed, heartbeats.clone())?;
    let start = Footprint::of(world.server.process.pid())?;
    let (mut before, mut now, mut rounds) = (start, start, 0);
    let mut seen = new_vms::Seen::default();
    let mut slowest = (0, 0, String::new());
    while rounds <= WARM_UP || Instant::now() < end {
        rounds += 1;
        let new_vms = NewVms::start(world.server, heartbeats)?;
        for step in 1..=STEPS {
            interrupt.check()?;
            progress(&format!("round {rounds}, step {step}: {now}"));
            world.step().with_context(|| shown(&world, rounds, step))?;
        }
        seen.add(new_vms.end().with_context(|| shown(&world, rounds, STEPS))?);
        let ended = heartbeats.now();
        world.release().with_context(|| shown(&world, rounds, STEPS))?;
        let released = heartbeats.now();
        neighbours.go_on()?;
        before = if rounds <= WARM_UP { start.with_any_rss() } else { before };
        let waited_for;
        (now, waited_for) =
            come_back(world.server, &before).with_context(|| shown(&world, rounds, STEPS))?;
        let slow = (heartbeats.now() - ended, released - ended, waited_for);
        slowest = slowest.max(slow);
        before = if rounds == WARM_UP { start.with_rss_of(&now) } else { before };
    }
    within("a new VM's session", seen.life_heartbeats, options)?;
    within("an RPC", seen.rpc_heartbeats, options)?;
    let (tally, (step, what)) = (world.tally(), world.slowest());
    let (back, release, waited_for) = slowest;
    Ok(format!(
        "{rounds} rounds of {STEPS} steps ({tally})\n\
         the longest step took {step} heartbeats: {what}; \
         all resources were released within {back} heartbeats, {release} of them in this program; \
         the last to be released: {waited_for}\n\
         at the start {start}; after {WARM_UP} rounds {} MiB; at the end {now}\n\
         new VMs: {} sessions, each within {} heartbeats; an RPC after each, within {}",
        before.rss_mib(),
        seen.lives,
        seen.life_heartbeats,
        seen.rpc_heartbeats
    ))
}

/// The state at a failure, in detail, because it may be hard to reproduce.
fn shown(world: &World<'_>, round: u64, step: usize) -> String {
    let controllers = world.server.call("vhost_get_controller_stats", json!({}));
    let controllers = controllers.map_or_else(|e| e.to_string(), |shown| shown.to_string());
    let recent = world.recent();
    format!("round {round}, step {step}; controllers: {controllers}; the last steps:\n{recent}\n")
}
