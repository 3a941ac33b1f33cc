//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bench::publish::beside;
use bench::servers::{Kind, Spec};
use clap::Parser;

use crate::event::Event;

/// Measure how the exit of a VM, and other events, delay the I/O of its neighbours.
///
/// Neighbours read at depth 1 from disks on the same reactor. Quiet stretches alternate with
/// stretches in which another VM is connected, loaded, killed, deleted, and so on. The report is
/// printed to standard output as Markdown, and every stretch is written to a JSON file. On two
/// cores, the server's threads that are not reactors share the clients' core with this program's
/// events; the case "control" shows the cost of that alone.
#[derive(Debug, Parser)]
#[command(name = "stall", max_term_width = 100)]
pub(crate) struct Options {
    /// This project's vhost [default: the vhost in this program's directory].
    #[arg(long, value_name = "PATH")]
    pub(crate) vhost: Option<PathBuf>,
    /// SPDK's vhost, to measure it, too.
    #[arg(long, value_name = "PATH")]
    pub(crate) spdk: Option<PathBuf>,
    /// An argument for SPDK's vhost; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) spdk_arg: Vec<String>,
    /// Cases, by name [default: all].
    #[arg(long = "case", value_name = "NAMES", value_delimiter = ',', value_parser = event)]
    pub(crate) cases: Vec<Event>,
    /// Number of pairs of stretches for each case.
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: usize,
    /// Seconds of a stretch.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub(crate) length: f64,
    /// Number of neighbours, which share a thread.
    #[arg(long, default_value_t = 4)]
    pub(crate) clients: usize,
    /// Microseconds between two rounds of requests, in which other threads may run on the clients'
    /// core.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) pause_us: u64,
    /// The core of the neighbours and of the events.
    #[arg(long, value_name = "CORE", default_value_t = 0)]
    pub(crate) client_core: usize,
    /// The core of the reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    pub(crate) server_core: usize,
    /// Directory for stall.json [default: the build's directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Also append the report to this file.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "bench/RESULTS.md")]
    pub(crate) results: Option<PathBuf>,
}

impl Options {
    /// The selected cases.
    pub(crate) fn events(&self) -> &[Event] {
        if self.cases.is_empty() { &Event::ALL } else { &self.cases }
    }

    /// The servers, this project's vhost first.
    ///
    /// # Errors
    /// One of them does not exist.
    pub(crate) fn servers(&self) -> Result<Vec<Spec>> {
        let ours = self.vhost.clone().map_or_else(|| beside("vhost"), Ok)?;
        let mut specs = vec![Spec::new("vhost", Kind::Ours, ours)];
        if let Some(path) = &self.spdk {
            let args: Vec<&str> = self.spdk_arg.iter().map(String::as_str).collect();
            specs.push(Spec::new("SPDK", Kind::Spdk, path).with_args(&args));
        }
        for spec in &specs {
            let is_present = Path::new(&spec.program).is_file();
            ensure!(is_present, "{}: {} does not exist", spec.name, spec.program.display());
        }
        Ok(specs)
    }
}

/// A name that is not that of a case.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("expected one of {}", Event::ALL.map(Event::name).join(", "))]
struct UnknownCase;

fn event(name: &str) -> Result<Event, UnknownCase> {
    Event::ALL.into_iter().find(|event| event.name() == name).ok_or(UnknownCase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_selected_by_name() {
        let options =
            |args: &[&str]| Options::try_parse_from(std::iter::once(&"stall").chain(args));
        let all = options(&[]).unwrap();
        assert_eq!(all.events(), Event::ALL);
        let two = options(&["--case", "killed,table-8g"]).unwrap();
        assert_eq!(two.events(), [Event::Killed, Event::Table(8)]);
        assert!(options(&["--case", "nothing"]).is_err());
    }
}
