//! Runs the load generator `vhost-perf` and parses its output.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use bench::servers::setpriv;
use serde_json::Value;

use crate::cells::Cell;
use crate::counters::Counters;

/// The parameters of the runs.
#[derive(Clone, Debug)]
pub(crate) struct Perf {
    pub(crate) program: PathBuf,
    pub(crate) core: usize,
    pub(crate) runtime_s: f64,
    pub(crate) ramp_s: f64,
}

/// The results of a run.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    pub(crate) p50_ns: f64,
    pub(crate) p999_ns: f64,
    pub(crate) iops: f64,
    pub(crate) completed: f64,
    /// The whole output.
    pub(crate) raw: Value,
}

impl Perf {
    /// Runs the load of `cell` on the disk of `socket`. With `counters`, counts events of these
    /// threads meanwhile.
    ///
    /// # Errors
    /// The run fails, or has an error or a mismatch.
    pub(crate) fn run(
        &self,
        socket: &Path,
        cell: &Cell,
        extra: &[&str],
        counters: Option<(&Counters, &[u32])>,
    ) -> Result<(Figures, Option<Vec<f64>>)> {
        let mut command = match counters {
            Some((counters, tids)) => counters.around(&self.program, tids),
            None => setpriv(&self.program),
        };
        command
            .arg(socket)
            .args(["--rw", cell.rw.name(), "--bs", &cell.bs.0.to_string()])
            .args(["--iodepth", &cell.depth.to_string(), "--numjobs", &cell.queues.to_string()])
            .args(["--runtime", &self.runtime_s.to_string()])
            .args(["--ramp_time", &self.ramp_s.to_string()])
            .args(["--cpus_allowed", &self.core.to_string(), "--output-format", "json"])
            .args(extra);
        let raw = json_of(command, "vhost-perf")
            .with_context(|| format!("{cell} on {}", socket.display()))?;
        let figures = Figures::read(raw).with_context(|| cell.to_string())?;
        let counts = counters.map(|(counters, _)| counters.read()).transpose()?;
        Ok((figures, counts))
    }

    /// Measures the cache-line round trip between the cores of the load and of the servers.
    ///
    /// # Errors
    /// It cannot be measured.
    pub(crate) fn round_trip_ns(&self, other: usize) -> Result<f64> {
        bench::round_trip_ns(self.core, other)
            .context("cannot measure the round trip between the cores")
    }
}

impl Figures {
    /// Parses the output of `vhost-perf`.
    fn read(raw: Value) -> Result<Self> {
        let number = |value: &Value, name: &str| {
            value.as_f64().with_context(|| format!("vhost-perf printed no {name}"))
        };
        for name in ["errors", "mismatches"] {
            let found = number(&raw[name], name)?;
            ensure!(found == 0.0, "{found} {name}: {}", raw["first_problem"]);
        }
        let completed = number(&raw["completed"], "completed")?;
        ensure!(completed > 0.0, "no request completed");
        Ok(Self {
            p50_ns: number(&raw["lat_ns"]["p50"], "lat_ns.p50")?,
            p999_ns: number(&raw["lat_ns"]["p99.9"], "lat_ns.p99.9")?,
            iops: number(&raw["iops"], "iops")?,
            completed,
            raw,
        })
    }
}

/// Runs `command`, and parses its output as JSON.
pub(crate) fn json_of(mut command: Command, name: &str) -> Result<Value> {
    let output = command.stderr(Stdio::piped()).output();
    let output = output.with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{name}: {}: {}", output.status, words.trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("{name} printed no JSON"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed() -> Value {
        json!({
            "completed": 100, "errors": 0, "mismatches": 0, "iops": 1e6,
            "lat_ns": {"p50": 350, "p99.9": 900}
        })
    }

    #[test]
    fn figures_are_taken_from_the_report() {
        let figures = Figures::read(printed()).unwrap();
        assert_eq!((figures.p50_ns, figures.p999_ns, figures.iops), (350.0, 900.0, 1e6));
    }

    #[test]
    fn a_run_with_errors_or_without_requests_is_refused() {
        for (name, value) in [("errors", 1), ("mismatches", 1), ("completed", 0)] {
            let mut raw = printed();
            raw[name] = value.into();
            assert!(Figures::read(raw).is_err(), "{name}");
        }
        let mut raw = printed();
        raw["lat_ns"] = Value::Null;
        assert!(Figures::read(raw).is_err());
    }
}
