//! `vhost-perf`: a load generator for vhost-user-blk and vhost-user-scsi sockets.

mod args;
mod plot;
mod report;
mod values;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bench::perf::{self, Outcome, Progress};
use bench::{Error, round_trip_ns};
use clap::Parser;
use front_end::Backing;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::args::{Args, Command, FloorArgs, Output};

/// Interval of updates of the progress line.
const REFRESH: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.command {
        Some(Command::Floor(floor)) => print_floor(floor),
        None => load(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vhost-perf: {error}");
        ExitCode::FAILURE
    })
}

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

fn print_floor(args: &FloorArgs) -> AnyResult<ExitCode> {
    let (a, b) = args.cores();
    let ns = round_trip_ns(a, b).map_err(|e| format!("cores {a} and {b}: {e}"))?;
    match args.output_format {
        Output::Normal => print(&format!("cache-line round trip, cores {a} and {b}: {ns:.1} ns"))?,
        Output::Json => print(&serde_json::json!({ "round_trip_ns": ns }).to_string())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn load(args: &Args) -> AnyResult<ExitCode> {
    let plan = args.plan();
    if let Some(file) = &args.plot {
        // Reports an error before the run, not after it.
        let created = std::fs::File::create(file);
        created.map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    }
    let stop = interruptible()?;
    let mut line = ProgressLine::new(args.start_line);
    let outcome = perf::run(&plan, &stop, &mut |progress| line.update(progress));
    line.clear();
    let outcome = outcome.map_err(|error| explain(&plan, &error))?;
    match args.output_format {
        Output::Normal => print(report::text(&plan, &outcome).trim_end())?,
        Output::Json => print(&report::json(&plan, &outcome).to_string())?,
    }
    if let Some(file) = &args.plot {
        plot::draw(&plan, &outcome, file)
            .map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    }
    for problem in problems(&outcome) {
        eprintln!("vhost-perf: {problem}");
    }
    Ok(if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a line. Unlike `println`, returns an error if the disk is full or the pipe is closed.
fn print(text: &str) -> AnyResult<()> {
    writeln!(std::io::stdout().lock(), "{text}").map_err(|e| format!("cannot print: {e}").into())
}

/// A flag that SIGINT or SIGTERM sets. A second signal exits at once.
fn interruptible() -> AnyResult<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: at the first signal the conditional shutdown finds the flag unset.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

/// The first message. A process that is not a vhost-user server does not answer it.
const FIRST_MESSAGE: &str = "GET_FEATURES";

/// The error as a text that says what to do.
fn explain(plan: &perf::Plan, error: &Error) -> String {
    let socket = plan.socket.display();
    match error {
        Error::FrontEnd(error) => explain_front_end(plan, error),
        Error::System { .. } | Error::Core(..) => error.to_string(),
        _ => format!("{socket}: {error}"),
    }
}

fn explain_front_end(plan: &perf::Plan, error: &front_end::Error) -> String {
    use front_end::Error;
    let socket = plan.socket.display();
    match error {
        Error::Connect { .. } | Error::System { .. } => error.to_string(),
        Error::Map(why) if plan.backing == Backing::Hugepages => {
            format!("cannot map guest memory: {why} (are enough hugepages free?)")
        }
        Error::NoRam(_) => format!("{error}: --mem-size is too small for this load"),
        Error::Protocol { message: FIRST_MESSAGE, .. }
        | Error::NoAnswer { message: FIRST_MESSAGE, .. } => {
            format!("{socket}: {error} (not a vhost-user server, or see the server's log)")
        }
        _ => format!("{socket}: {error}"),
    }
}

/// The problems of a run that has ended.
fn problems(outcome: &Outcome) -> Vec<String> {
    let mut problems = Vec::new();
    if outcome.closed {
        problems.push("the server closed the connection before the end".into());
    }
    if outcome.outstanding > 0 {
        problems.push(format!("{} requests have not completed", outcome.outstanding));
    }
    if let Some(first) = &outcome.first_problem {
        let (errors, mismatches) = (outcome.errors, outcome.mismatches);
        problems.push(format!("{errors} errors, {mismatches} mismatches; the first: {first}"));
    }
    if outcome.unsubmitted > 0 {
        let late = outcome.unsubmitted;
        problems.push(format!("the rate was not reached: {late} due requests were not submitted"));
    }
    if problems.is_empty() && outcome.all.completed == 0 {
        problems.push("nothing was measured: no request completed after the ramp time".into());
    }
    problems
}

/// The progress line on the terminal.
struct ProgressLine {
    shown: bool,
    start_line: bool,
    last: (Duration, u64),
}

impl ProgressLine {
    fn new(start_line: bool) -> Self {
        // A script that waits for the start line needs stderr without other text before it.
        let shown = std::io::stderr().is_terminal() && !start_line;
        Self { shown, start_line, last: (Duration::ZERO, 0) }
    }

    fn update(&mut self, progress: Progress) {
        match progress {
            Progress::Started if self.start_line => eprintln!("started"),
            Progress::Running { elapsed, completed } if self.shown => self.show(elapsed, completed),
            _ => {}
        }
    }

    fn show(&mut self, elapsed: Duration, completed: u64) {
        let since = elapsed.saturating_sub(self.last.0);
        if since < REFRESH {
            return;
        }
        let iops = completed.saturating_sub(self.last.1) as f64 / since.as_secs_f64();
        self.last = (elapsed, completed);
        let iops = report::count(iops);
        // The escape sequence erases the rest of a longer line.
        eprint!("\r{:.0} s: {iops} IOPS, {completed} requests\x1b[K", elapsed.as_secs_f64());
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
