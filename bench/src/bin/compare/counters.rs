//! Events of a server's threads, such as instructions and cycles, counted by `perf stat` if the
//! machine supports it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use bench::servers::setpriv;

/// Instructions in user mode, and cycles.
pub(crate) const WORK: [&str; 2] = ["instructions:u", "cycles"];

/// Why events cannot be counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CountersError {
    #[error("cannot run perf: {0}")]
    Perf(#[source] std::io::Error),
    #[error("the machine does not count {0}")]
    Unsupported(String),
}

/// Counts some events.
#[derive(Debug)]
pub(crate) struct Counters {
    events: &'static [&'static str],
    output: PathBuf,
}

impl Counters {
    /// Checks that this machine counts `events`. `perf stat` writes the counts to a file in `dir`.
    pub(crate) fn probe(
        events: &'static [&'static str],
        dir: &Path,
    ) -> Result<Self, CountersError> {
        let trial = Command::new("perf")
            .args(["stat", "-x", ",", "-e", &events.join(","), "--", "true"])
            .stdin(Stdio::null())
            .output();
        let output = trial.map_err(CountersError::Perf)?;
        match parse(&String::from_utf8_lossy(&output.stderr), events) {
            Some(_) => Ok(Self { events, output: dir.join("perf-stat") }),
            None => Err(CountersError::Unsupported(events.join(" and "))),
        }
    }

    /// A command that runs `program` and counts the events of the threads `tids` meanwhile.
    pub(crate) fn around(&self, program: &Path, tids: &[u32]) -> Command {
        let tids: Vec<String> = tids.iter().map(u32::to_string).collect();
        let mut command = self.stat();
        command.args(["-t", &tids.join(",")]).arg("--").arg(program);
        command
    }

    /// A command that runs `program` and counts the events of all of its threads.
    pub(crate) fn of(&self, program: &Path) -> Command {
        let mut command = self.stat();
        command.arg("--").arg(program);
        command
    }

    fn stat(&self) -> Command {
        let mut command = setpriv("perf".as_ref());
        command.args(["stat", "-x", ",", "-e", &self.events.join(","), "-o"]).arg(&self.output);
        command
    }

    /// The counts of the last command, in the order of the events.
    pub(crate) fn read(&self) -> Result<Vec<f64>> {
        let text = std::fs::read_to_string(&self.output).context("perf stat wrote no file")?;
        parse(&text, self.events).context("perf stat wrote no counts")
    }
}

/// Parses lines of `value,unit,event,…`. The value of an unsupported event is not a number.
fn parse(text: &str, events: &[&str]) -> Option<Vec<f64>> {
    let value = |event: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.split(',');
            let (value, name) = (fields.next()?, fields.nth(1)?);
            (name == event).then(|| value.parse::<f64>().ok()).flatten()
        })
    };
    events.iter().map(|event| value(event)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_parsed_and_unsupported_events_detected() {
        let text = "# started on Mon\n\n1234,,instructions:u,500,100.00,,\n99,,cycles,5,100.00,,\n";
        assert_eq!(parse(text, &WORK), Some(vec![1234.0, 99.0]));
        let calls = "29,,raw_syscalls:sys_enter,1099298,100.00,,\n";
        assert_eq!(parse(calls, &["raw_syscalls:sys_enter"]), Some(vec![29.0]));
        let none = "<not supported>,,instructions:u,0,100.00,,\n<not supported>,,cycles,0,,\n";
        assert_eq!(parse(none, &WORK), None);
    }
}
