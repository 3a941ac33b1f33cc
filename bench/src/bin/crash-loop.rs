//! `crash-loop`: kills `vhost` repeatedly under a load that checks every request.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::crash::{self, Device, Plan};
use bench::publish::beside;
use clap::Parser;
use front_end::RingLayout;

/// Kill vhost with SIGKILL at random times under load, and restart it with the same configuration,
/// repeatedly. A guest that runs meanwhile checks that each request completes exactly once, and
/// that each read returns the last written data. Prints one line; exit status 0 if no request was
/// lost or duplicated and no data was stale.
#[derive(Debug, Parser)]
#[command(name = "crash-loop", max_term_width = 100)]
struct Options {
    /// Number of kills.
    #[arg(long, value_name = "N", default_value_t = 200)]
    kills: u64,
    /// Use packed rings instead of split rings.
    #[arg(long)]
    packed: bool,
    /// Kill a vhost with a virtio-scsi controller instead of a virtio-blk controller.
    #[arg(long)]
    scsi: bool,
    /// Number of queues.
    #[arg(long, value_name = "N", default_value_t = 2)]
    queues: usize,
    /// Requests in flight on each queue.
    #[arg(long, value_name = "N", default_value_t = 32)]
    depth: u16,
    /// Seed of blocks, kinds of requests, and times of kills.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The vhost to kill [default: the vhost in this program's directory].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// The core of vhost's reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    server_core: usize,
    /// An argument for vhost; repeatable.
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
        device: if options.scsi { Device::Scsi { target: 0 } } else { Device::Blk },
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
