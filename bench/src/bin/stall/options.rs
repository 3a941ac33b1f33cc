//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bench::publish::beside;
use bench::servers::{Kind, Spec};
use clap::Parser;

use crate::cases::Event;

/// Measures what one VM's end, and other things that happen to it, cost its neighbours.
///
/// Neighbours read at depth 1 from disks on the same reactor. Stretches in which nothing happens
/// alternate with stretches in which another VM is connected, loaded, killed, deleted, and so on.
/// Markdown goes to standard output, every stretch to a JSON file. On two cores the server's
/// threads that are not reactors share the clients' core, as does whatever makes things happen;
/// the case "control" shows what that alone costs.
#[derive(Debug, Parser)]
#[command(name = "stall", max_term_width = 100)]
pub(crate) struct Options {
    /// Our vhost [default: the one built along with this program].
    #[arg(long, value_name = "PATH")]
    pub(crate) vhost: Option<PathBuf>,
    /// SPDK's vhost, to go through the same.
    #[arg(long, value_name = "PATH")]
    pub(crate) spdk: Option<PathBuf>,
    /// An argument for SPDK's vhost; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) spdk_arg: Vec<String>,
    /// Cases, by name [default: all].
    #[arg(long = "case", value_name = "NAMES", value_delimiter = ',', value_parser = event)]
    pub(crate) cases: Vec<Event>,
    /// Pairs of stretches.
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: usize,
    /// Seconds of a stretch.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub(crate) length: f64,
    /// Neighbours; they share a thread.
    #[arg(long, default_value_t = 4)]
    pub(crate) clients: usize,
    /// Pause between two rounds of requests, in which others may run on the clients' core.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) pause_us: u64,
    /// The core of the neighbours, and of what disturbs them.
    #[arg(long, value_name = "CORE", default_value_t = 0)]
    pub(crate) client_core: usize,
    /// The core of the reactor.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    pub(crate) server_core: usize,
    /// Where stall.json goes [default: the build's directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Append what is printed to this file too.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "bench/RESULTS.md")]
    pub(crate) results: Option<PathBuf>,
}

impl Options {
    /// The cases to go through.
    pub(crate) fn events(&self) -> &[Event] {
        if self.cases.is_empty() { &Event::ALL } else { &self.cases }
    }

    /// The servers, ours first.
    ///
    /// # Errors
    /// One of them is not there.
    pub(crate) fn servers(&self) -> Result<Vec<Spec>> {
        let ours = self.vhost.clone().map_or_else(|| beside("vhost"), Ok)?;
        let mut specs = vec![Spec::new("vhost", Kind::Ours, ours)];
        if let Some(path) = &self.spdk {
            let args: Vec<&str> = self.spdk_arg.iter().map(String::as_str).collect();
            specs.push(Spec::new("SPDK", Kind::Spdk, path).with_args(&args));
        }
        for spec in &specs {
            let there = Path::new(&spec.program).is_file();
            ensure!(there, "{}: no {}", spec.name, spec.program.display());
        }
        Ok(specs)
    }
}

fn event(name: &str) -> Result<Event, String> {
    let names = || Event::ALL.map(Event::name).join(", ");
    Event::ALL
        .into_iter()
        .find(|event| event.name() == name)
        .ok_or_else(|| format!("one of {}", names()))
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
