//! `late-io-loop`: ends `vhost` again and again while its disk is slow.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::late_io::{self, End, Plan, SlowDisk};
use bench::publish::beside;
use clap::Parser;
use front_end::RingLayout;

/// Ends vhost while its disk holds back I/O, starts it again with the same configuration, and lets
/// the I/O go when the next vhost could have overtaken it, again and again. A guest that goes on
/// checks that what it has written and flushed stays, and that nothing is written to its memory after
/// a request has completed. Prints one line; status 0 if all is well. Needs root: it makes a loop
/// device and a control group.
#[derive(Debug, Parser)]
#[command(name = "late-io-loop", max_term_width = 100)]
struct Options {
    /// How often it ends.
    #[arg(long, value_name = "N", default_value_t = 50)]
    rounds: u64,
    /// Packed rings instead of split ones.
    #[arg(long)]
    packed: bool,
    /// SIGTERM instead of SIGKILL.
    #[arg(long)]
    terminate: bool,
    /// The vhost to end [default: the one built along with this program].
    #[arg(long, value_name = "PATH")]
    vhost: Option<PathBuf>,
    /// The core of its reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    server_core: usize,
    /// An argument for it; repeatable. With --share the test must fail.
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
