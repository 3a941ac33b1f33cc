//! `crash-loop`: kills `vhost` again and again under a load that checks every request.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::crash::{self, Plan};
use bench::publish::beside;
use clap::Parser;
use front_end::RingLayout;

/// Kills vhost with SIGKILL at random points under load and starts it again with the same
/// configuration, again and again. A guest that goes on meanwhile checks that each of its requests
/// comes back exactly once, and that each read has what was written last. Prints one line; status
/// 0 if nothing was lost, duplicated or stale.
#[derive(Debug, Parser)]
#[command(name = "crash-loop", max_term_width = 100)]
struct Options {
    /// How often it is killed.
    #[arg(long, value_name = "N", default_value_t = 200)]
    kills: u64,
    /// Packed rings instead of split ones.
    #[arg(long)]
    packed: bool,
    /// Queues.
    #[arg(long, value_name = "N", default_value_t = 2)]
    queues: usize,
    /// Requests in flight on each queue.
    #[arg(long, value_name = "N", default_value_t = 32)]
    depth: u16,
    /// Chooses blocks, kinds, and when to kill.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The vhost to kill [default: the one built along with this program].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// The core of its reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    server_core: usize,
    /// An argument for it; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    arg: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let vhost = match options.vhost.map_or_else(|| beside("vhost"), Ok) {
        Ok(vhost) => vhost,
        Err(error) => {
            eprintln!("crash-loop: {error}");
            return ExitCode::FAILURE;
        }
    };
    let rings = if options.packed { RingLayout::Packed } else { RingLayout::Split };
    let plan = Plan {
        args: options.arg,
        core: options.server_core,
        rings,
        queues: options.queues,
        depth: options.depth,
        kills: options.kills,
        seed: options.seed,
        ..Plan::new(vhost)
    };
    let kind = if options.packed { "packed" } else { "split" };
    match crash::run(&plan) {
        Ok(toll) => {
            println!("crash-loop: {kind}: {toll}");
            if toll.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("crash-loop: {kind}: {error}");
            ExitCode::FAILURE
        }
    }
}
