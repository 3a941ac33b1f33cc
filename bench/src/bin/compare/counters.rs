//! Instructions and cycles of a server's thread, by `perf stat`, where the machine counts them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use bench::servers::setpriv;

const EVENTS: &str = "instructions:u,cycles";

/// A way to count.
#[derive(Debug)]
pub(crate) struct Counters {
    output: PathBuf,
}

/// What was counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Counts {
    /// In user mode.
    pub(crate) instructions: f64,
    pub(crate) cycles: f64,
}

impl Counters {
    /// Tries whether this machine counts; why not, if it does not. What is counted goes through a
    /// file in `dir`.
    pub(crate) fn probe(dir: &Path) -> Result<Self, String> {
        let trial = Command::new("perf")
            .args(["stat", "-x", ",", "-e", EVENTS, "--", "true"])
            .stdin(Stdio::null())
            .output();
        let output = trial.map_err(|e| format!("perf: {e}"))?;
        match parse(&String::from_utf8_lossy(&output.stderr)) {
            Some(_) => Ok(Self { output: dir.join("perf-stat") }),
            None => Err("the machine has no counters of instructions and cycles".into()),
        }
    }

    /// A command that runs `program` and counts what the threads `tids` do meanwhile.
    pub(crate) fn around(&self, program: &Path, tids: &[u32]) -> Command {
        let tids: Vec<String> = tids.iter().map(u32::to_string).collect();
        let mut command = setpriv("perf".as_ref());
        command.args(["stat", "-x", ",", "-e", EVENTS, "-t", &tids.join(","), "-o"]);
        command.arg(&self.output).arg("--").arg(program);
        command
    }

    /// What the last such command has counted.
    pub(crate) fn read(&self) -> Result<Counts> {
        let text = std::fs::read_to_string(&self.output).context("perf stat left nothing")?;
        parse(&text).context("perf stat counted nothing")
    }
}

/// Finds both counts in lines of `value,unit,event,…`; a count that is not supported is no number.
fn parse(text: &str) -> Option<Counts> {
    let value = |event: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.split(',');
            let (value, name) = (fields.next()?, fields.nth(1)?);
            (name == event).then(|| value.parse::<f64>().ok()).flatten()
        })
    };
    Some(Counts { instructions: value("instructions:u")?, cycles: value("cycles")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_and_their_absence_is_seen() {
        let text = "# started on Mon\n\n1234,,instructions:u,500,100.00,,\n99,,cycles,5,100.00,,\n";
        assert_eq!(parse(text), Some(Counts { instructions: 1234.0, cycles: 99.0 }));
        let none = "<not supported>,,instructions:u,0,100.00,,\n<not supported>,,cycles,0,,\n";
        assert_eq!(parse(none), None);
    }
}
