//! `soak`: one `vhost` that anything may happen to, two VMs that must not notice it, and a look at
//! whether all comes back.
//!
//! In the order of use: [`neighbours`] start; [`world`] does things at random, with [`vm`]s as they
//! should be and with [`abuse`] of every socket; after each round it lets go of everything, and the
//! [`footprint`] of the process must be what it was at the beginning.

mod abuse;
mod footprint;
mod neighbours;
mod rounds;
mod vm;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use bench::LIMIT;
use bench::publish::{beside, progress};
use bench::servers::{Interrupt, Kind, Server, Spec};
use clap::Parser;

use crate::footprint::Footprint;
use crate::neighbours::Neighbours;
use crate::world::World;

/// What is done before the process must have come back to where it was.
const STEPS: usize = 250;
/// Rounds before the memory in use is taken for what is to stay.
const WARM_UP: u64 = 2;

/// Does everything to one vhost that clients, guests and disks may do, at random, for some minutes.
///
/// Two VMs that check every block run beside it. After every 250 steps everything is let go, and
/// the process must hold what it held at the start: fds, threads (two more may be idle), mappings
/// of files, anonymous mappings (32 more), and memory (32 MiB more than after the first two
/// rounds). Prints a line; status 0 if all came back and the VMs noticed nothing.
#[derive(Debug, Parser)]
#[command(name = "soak", max_term_width = 100)]
struct Options {
    /// How long.
    #[arg(default_value_t = 1.0)]
    minutes: f64,
    /// Chooses what happens [default: by the clock].
    seed: Option<u64>,
    /// Create and delete a controller this many times instead, if the minutes are enough for it.
    #[arg(long, value_name = "N")]
    rounds: Option<u64>,
    /// The longest time in which none of a VM's requests may complete, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    gap_max: f64,
    /// The vhost [default: the one built along with this program].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// An argument for it; repeatable.
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
            eprintln!("soak: seed {seed} FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, seed: u64) -> Result<String> {
    let interrupt = Interrupt::install()?;
    let vhost = options.vhost.clone().map_or_else(|| beside("vhost"), Ok)?;
    let mut spec = Spec::new("vhost", Kind::Ours, vhost);
    // The last of each counts. The reactors sleep, as clients and server share these cores.
    spec.args = ["-m", "0x3", "--interrupt-mode"].map(String::from).into();
    spec.args.extend(options.arg.iter().cloned());
    let mut server = Server::start(&spec, 0, &[])?;
    let neighbours = Neighbours::start(&server, seed)?;
    let end = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
    let work = match options.rounds {
        Some(rounds) => rounds::run(&server, rounds, end, &interrupt),
        None => soak(&mut server, &neighbours, seed, end, &interrupt),
    };
    progress("");
    let seen = work.and_then(|line| Ok((line, neighbours.end(gap_max(options))?)));
    let (line, seen) =
        seen.with_context(|| format!("the end of the server's log:\n{}", server.process.log()))?;
    let (completed, gap) = (seen.completed, seen.longest_gap);
    Ok(format!("{line}; neighbours: {completed} requests, all right, longest gap {gap:.1?}"))
}

fn gap_max(options: &Options) -> Duration {
    Duration::from_secs_f64(options.gap_max)
}

/// Rounds of [`STEPS`] steps until `end`.
fn soak(
    server: &mut Server,
    neighbours: &Neighbours,
    seed: u64,
    end: Instant,
    interrupt: &Interrupt,
) -> Result<String> {
    let mut world = World::new(server, seed)?;
    let start = Footprint::of(world.server.process.pid())?;
    let (mut before, mut now, mut rounds) = (start, start, 0);
    while rounds <= WARM_UP || Instant::now() < end {
        rounds += 1;
        for step in 1..=STEPS {
            interrupt.check()?;
            progress(&format!("round {rounds}, step {step}: {now}"));
            world.step().with_context(|| shown(&world, rounds, step))?;
        }
        world.release().with_context(|| shown(&world, rounds, STEPS))?;
        neighbours.go_on()?;
        if rounds <= WARM_UP {
            before = start.with_any_rss();
        }
        now = come_back(&world, &before).with_context(|| shown(&world, rounds, STEPS))?;
        if rounds <= WARM_UP {
            before = start.with_rss_of(&now);
        }
    }
    let tally = world.tally();
    Ok(format!("{rounds} rounds of {STEPS} steps ({tally}); at the start {before}; at the end {now}"))
}

fn shown(world: &World<'_>, round: u64, step: usize) -> String {
    format!("round {round}, step {step}; the last steps:\n{}\n", world.recent())
}

/// Waits until the process holds no more than `before`.
fn come_back(world: &World<'_>, before: &Footprint) -> Result<Footprint> {
    let start = Instant::now();
    loop {
        let alone = world.is_alone();
        let now = Footprint::of(world.server.process.pid())?;
        let mut wrong = now.grown(before);
        wrong.extend(alone.err().map(|error| error.to_string()));
        if wrong.is_empty() {
            return Ok(now);
        }
        if start.elapsed() > LIMIT {
            bail!("not come back after {LIMIT:?}: {}", wrong.join("; "));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
