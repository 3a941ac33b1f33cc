//! `late-io-loop`: ends `vhost` repeatedly while its disk is slow.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::late_io::{self, End, Plan, SlowDisk};
use bench::publish::beside;
use clap::Parser;
use front_end::RingLayout;

/// End vhost while its disk delays I/O, restart it with the same configuration, and let the I/O
/// complete when the next vhost could have overtaken it, repeatedly. A guest that runs meanwhile
/// checks that flushed data stays, and that its memory does not change after a request has
/// completed. Prints one line; exit status 0 on success. Needs root, to create a loop device and a
/// control group.
#[derive(Debug, Parser)]
#[command(name = "late-io-loop", max_term_width = 100)]
struct Options {
    /// Number of rounds.
    #[arg(long, value_name = "N", default_value_t = 50)]
    rounds: u64,
    /// Use packed rings instead of split rings.
    #[arg(long)]
    packed: bool,
    /// End vhost with SIGTERM instead of SIGKILL.
    #[arg(long)]
    terminate: bool,
    /// The vhost to end [default: the vhost in this program's directory].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// The core of vhost's reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    server_core: usize,
    /// An argument for vhost; repeatable. With --share, the test must fail.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    arg: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let failed = |error: &dyn std::fmt::Display| {
        eprintln!("late-io-loop: {error}");
        ExitCode::FAILURE
    };
    let vhost = match options.vhost.map_or_else(|| beside("vhost"), Ok) {
        Ok(vhost) => vhost,
        Err(error) => return failed(&error),
    };
    let disk = match SlowDisk::new() {
        Ok(disk) => disk,
        Err(reason) => return failed(&reason),
    };
    let plan = Plan {
        vhost,
        args: options.arg,
        core: options.server_core,
        rings: if options.packed { RingLayout::Packed } else { RingLayout::Split },
        end: if options.terminate { End::Terminate } else { End::Kill },
        rounds: options.rounds,
    };
    match late_io::run(&plan, &disk) {
        Ok(toll) => {
            println!("late-io-loop: {:?}, {:?}: {toll}", plan.rings, plan.end);
            if toll.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failed(&error),
    }
}
