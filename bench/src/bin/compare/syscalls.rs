//! System calls of a server's threads, counted in separate runs, because counting slows them down.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::servers::setpriv;
use rustix::process::{Pid, Signal, kill_process};

use crate::cells::Cell;
use crate::counters::{Counters, CountersError};
use crate::perf::Perf;

/// All system calls, by the tracepoint at their entry.
const ALL: [&str; 1] = ["raw_syscalls:sys_enter"];
/// The tracepoints of the system calls of fio's engines, in the order of [`ENGINE_CALLS`].
const OF_ENGINES: [&str; 3] = [
    "syscalls:sys_enter_io_submit",
    "syscalls:sys_enter_io_getevents",
    "syscalls:sys_enter_io_uring_enter",
];
const ENGINE_CALLS: [&str; 3] = ["io_submit", "io_getevents", "io_uring_enter"];

/// Limit on the time that strace takes to attach.
const ATTACH_MAX: Duration = Duration::from_secs(10);

/// A method of counting system calls.
#[derive(Debug)]
pub(crate) enum Tracer {
    /// `perf stat` on tracepoints, which takes about 0.1 µs per call.
    Perf { all: Counters, of_engines: Counters },
    /// `strace -c`, which stops the thread at each call for longer than an I/O takes. This changes
    /// the sizes of batches, and so the calls per I/O.
    Strace { output: PathBuf },
}

/// Why no method works on this machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TracerError {
    #[error("{0}; strace is not permitted to trace")]
    Denied(CountersError),
    #[error("{0}; cannot run strace: {1}")]
    NoStrace(CountersError, #[source] std::io::Error),
}

impl Tracer {
    /// Selects the first method that works on this machine. It writes its counts to files in `dir`.
    pub(crate) fn probe(dir: &Path) -> Result<Self, TracerError> {
        let perf = Counters::probe(&ALL, dir)
            .and_then(|all| Ok(Self::Perf { all, of_engines: Counters::probe(&OF_ENGINES, dir)? }));
        let why = match perf {
            Ok(perf) => return Ok(perf),
            Err(why) => why,
        };
        let output = dir.join("strace");
        let trial = Command::new("strace")
            .args(["-c", "-o"])
            .arg(&output)
            .arg("true")
            .stderr(Stdio::null())
            .status();
        match trial {
            Ok(status) if status.success() => Ok(Self::Strace { output }),
            Ok(_) => Err(TracerError::Denied(why)),
            Err(e) => Err(TracerError::NoStrace(why, e)),
        }
    }

    /// A description for the report.
    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::Perf { .. } => "perf stat on tracepoints, in a separate run",
            Self::Strace { .. } => {
                "strace -c, in a separate run, which stops the thread at each call and changes the \
                 sizes of batches"
            }
        }
    }

    /// System calls per I/O of the threads `tids` of process `pid` under the load of `cell`.
    ///
    /// # Errors
    /// The load fails, or they cannot be counted.
    pub(crate) fn calls_per_io(
        &self,
        (pid, tids): (u32, &[u32]),
        perf: &Perf,
        socket: &Path,
        cell: &Cell,
    ) -> Result<f64> {
        match self {
            Self::Perf { all, .. } => {
                let (figures, counts) = perf.run(socket, cell, &[], Some((all, tids)))?;
                let calls: f64 = counts.into_iter().flatten().sum();
                Ok(calls / figures.completed)
            }
            Self::Strace { output } => {
                let strace = Strace::attach(output, pid, tids)?;
                let result = perf.run(socket, cell, &[], None);
                strace.end()?;
                let (figures, _) = result?;
                Ok(parse(&fs::read_to_string(output)?, |_| true) / figures.completed)
            }
        }
    }

    /// A command that runs `program` and counts the system calls of all of its threads.
    pub(crate) fn of(&self, program: &Path) -> Command {
        match self {
            Self::Perf { of_engines, .. } => of_engines.of(program),
            Self::Strace { output } => {
                let mut command = setpriv("strace".as_ref());
                command.args(["-f", "-c", "-o"]).arg(output).arg(program);
                command
            }
        }
    }

    /// The number of system calls `names`, which are among [`ENGINE_CALLS`], in the last command.
    ///
    /// # Errors
    /// There are no counts.
    pub(crate) fn count_of(&self, names: &[&str]) -> Result<f64> {
        match self {
            Self::Perf { of_engines, .. } => {
                let counts = of_engines.read()?;
                let named =
                    ENGINE_CALLS.iter().zip(counts).filter(|(name, _)| names.contains(name));
                Ok(named.map(|(_, count)| count).sum())
            }
            Self::Strace { output } => {
                Ok(parse(&fs::read_to_string(output)?, |name| names.contains(&name)))
            }
        }
    }
}

/// A `strace` that is attached to threads. Dropping it kills strace; the threads continue.
#[derive(Debug)]
struct Strace {
    child: Child,
}

impl Strace {
    fn attach(output: &Path, pid: u32, tids: &[u32]) -> Result<Self> {
        let mut command = setpriv("strace".as_ref());
        command.args(["-c", "-o"]).arg(output);
        for tid in tids {
            command.args(["-p", &tid.to_string()]);
        }
        let child = command.stderr(Stdio::null()).spawn().context("cannot start strace")?;
        let mut strace = Self { child };
        let start = Instant::now();
        while !tids.iter().all(|&tid| is_traced(pid, tid)) {
            ensure!(strace.child.try_wait()?.is_none(), "strace cannot attach");
            ensure!(start.elapsed() < ATTACH_MAX, "timed out waiting for strace to attach");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(strace)
    }

    /// Makes strace detach and write its counts.
    fn end(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::INT)?;
        self.child.wait().map(drop).context("cannot wait for strace")
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn is_traced(pid: u32, tid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|tracer| tracer.trim() != "0")
}

/// Sums the calls whose name is `selected` in the table of `strace -c`. Its columns are: share,
/// seconds, microseconds per call, calls, errors if there were any, name.
fn parse(text: &str, selected: impl Fn(&str) -> bool) -> f64 {
    let calls = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let name = fields.last().filter(|name| **name != "total" && selected(name));
        name.and(fields.get(3)?.parse::<f64>().ok())
    };
    text.lines().filter_map(calls).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_strace_is_added_up() {
        let text = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 90.00    0.000900           9       100         7 io_submit
 10.00    0.000100           2        50           write
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           6       150         7 total
";
        assert_eq!(parse(text, |_| true), 150.0);
        assert_eq!(parse(text, |name| name == "io_submit"), 100.0);
        assert_eq!(parse("strace: Process 7 detached\n", |_| true), 0.0);
    }

    #[test]
    fn each_call_of_an_engine_has_its_tracepoint() {
        for (call, tracepoint) in ENGINE_CALLS.iter().zip(OF_ENGINES) {
            assert_eq!(tracepoint, format!("syscalls:sys_enter_{call}"));
        }
    }
}
