//! Runs fio on the file or device directly: the kernel's performance on one core, without a server
//! and a guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::servers::setpriv;
use serde_json::Value;

use crate::cells::Cell;
use crate::measure::Sample;
use crate::perf::{Figures, json_of};
use crate::syscalls::Tracer;

/// An I/O engine of fio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Libaio,
    IoUring,
}

impl Engine {
    pub(crate) const ALL: [Self; 2] = [Self::Libaio, Self::IoUring];

    /// fio's name.
    fn name(self) -> &'static str {
        match self {
            Self::Libaio => "libaio",
            Self::IoUring => "io_uring",
        }
    }

    /// Its name in tables.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Libaio => "fio libaio",
            Self::IoUring => "fio io_uring",
        }
    }

    /// The system calls that it makes for I/O.
    fn calls(self) -> &'static [&'static str] {
        match self {
            Self::Libaio => &["io_submit", "io_getevents"],
            Self::IoUring => &["io_uring_enter"],
        }
    }
}

/// The parameters of the runs.
#[derive(Clone, Debug)]
pub(crate) struct Fio {
    pub(crate) program: PathBuf,
    /// The core of the servers' polling threads.
    pub(crate) core: usize,
    pub(crate) runtime_s: f64,
    pub(crate) args: Vec<String>,
}

impl Fio {
    /// Runs the load of `cell` on `path` with `engine`.
    ///
    /// # Errors
    /// fio or an I/O fails.
    pub(crate) fn run(&self, engine: Engine, cell: &Cell, path: &Path) -> Result<Sample> {
        let mut command = setpriv(&self.program);
        self.complete(&mut command, engine, cell, path);
        read(json_of(command, "fio")?).with_context(|| cell.to_string())
    }

    /// Counts the system calls of the engine per I/O.
    ///
    /// # Errors
    /// As [`Fio::run`], or they cannot be counted.
    pub(crate) fn calls_per_io(
        &self,
        engine: Engine,
        cell: &Cell,
        path: &Path,
        tracer: &Tracer,
    ) -> Result<f64> {
        let mut command = tracer.of(&self.program);
        self.complete(&mut command, engine, cell, path);
        let completed = read(json_of(command, "fio")?)?.figures.completed;
        Ok(tracer.count_of(engine.calls())? / completed)
    }

    /// Adds fio's arguments. Like a guest's driver, fio submits as many requests together as the
    /// depth allows, and takes all completions together.
    fn complete(&self, command: &mut Command, engine: Engine, cell: &Cell, path: &Path) {
        let Cell { rw, bs, depth, queues, .. } = cell;
        command
            .args(["--name=floor", "--output-format=json", "--direct=1", "--allow_file_create=0"])
            .args(["--thread", "--group_reporting", "--time_based", "--norandommap"])
            .args([
                "--lat_percentiles=1",
                "--percentile_list=50:99.9",
                "--iodepth_batch_complete_min=1",
            ])
            .arg(format!("--filename={}", path.display().to_string().replace(':', "\\:")))
            .arg(format!("--ioengine={}", engine.name()))
            .arg(format!("--rw={}", rw.name()))
            .arg(format!("--bs={}", bs.0))
            .args([format!("--iodepth={depth}"), format!("--iodepth_batch_submit={depth}")])
            .arg(format!("--iodepth_batch_complete_max={depth}"))
            .arg(format!("--numjobs={queues}"))
            .arg(format!("--runtime={:.0}ms", self.runtime_s * 1e3))
            .arg(format!("--cpus_allowed={}", self.core))
            .args(&self.args);
    }
}

/// Parses the output of fio.
fn read(raw: Value) -> Result<Sample> {
    let job = &raw["jobs"][0];
    let number = |value: &Value, name: &str| {
        value.as_f64().with_context(|| format!("fio printed no {name}"))
    };
    let error = number(&job["error"], "error")?;
    ensure!(error == 0.0, "fio ended with error {error}");
    let both = |name| {
        Ok::<_, anyhow::Error>([
            number(&job["read"][name], name)?,
            number(&job["write"][name], name)?,
        ])
    };
    let [reads, writes] = both("total_ios")?;
    let completed = reads + writes;
    ensure!(completed > 0.0, "no request completed");
    // With mixed requests, the latency of the more frequent kind.
    let latency = &job[if reads >= writes { "read" } else { "write" }]["lat_ns"]["percentile"];
    let figures = Figures {
        p50_ns: number(&latency["50.000000"], "median latency")?,
        p999_ns: number(&latency["99.900000"], "latency")?,
        iops: both("iops")?.iter().sum(),
        completed,
        raw: Value::Null,
    };
    let share = (number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?) / 100.0;
    let cpu = share * number(&job["job_runtime"], "job_runtime")? / 1e3;
    let cpu = Some(Duration::from_secs_f64(cpu));
    Ok(Sample { cpu, ..Sample::of(Figures { raw, ..figures }) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cells::{DiskKind, Size, Workload};

    fn printed() -> Value {
        let side = |ios: u32, p50: u32| {
            let percentile = json!({"50.000000": p50, "99.900000": 900});
            json!({"total_ios": ios, "iops": f64::from(ios) * 2.0, "lat_ns": {"percentile": percentile}})
        };
        json!({"jobs": [{
            "error": 0, "job_runtime": 500, "usr_cpu": 10.0, "sys_cpu": 50.0,
            "read": side(100, 350), "write": side(300, 250),
        }]})
    }

    #[test]
    fn figures_are_taken_from_what_fio_prints() {
        let Sample { figures, cpu, .. } = read(printed()).unwrap();
        assert_eq!((figures.iops, figures.completed), (800.0, 400.0));
        assert_eq!((figures.p50_ns, figures.p999_ns), (250.0, 900.0));
        assert_eq!(cpu, Some(Duration::from_millis(300)));
    }

    #[test]
    fn a_run_that_failed_or_has_no_requests_is_refused() {
        let mut failed = printed();
        failed["jobs"][0]["error"] = 5.into();
        assert!(read(failed).is_err());
        let mut idle = printed();
        for side in ["read", "write"] {
            idle["jobs"][0][side]["total_ios"] = 0.into();
        }
        assert!(read(idle).is_err());
        assert!(read(json!({})).is_err());
    }

    #[test]
    fn the_cell_is_what_fio_is_asked_for() {
        let program = "fio".into();
        let fio = Fio { program, core: 1, runtime_s: 0.4, args: vec!["--fixedbufs".into()] };
        let (disk, rw, bs) = (DiskKind::Aio, Workload::Randwrite, Size::K4);
        let cell = Cell { disk, rw, bs, depth: 64, queues: 4 };
        let mut command = Command::new("fio");
        fio.complete(&mut command, Engine::IoUring, &cell, "/a:b".as_ref());
        let args: Vec<&str> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        for wanted in [
            "--filename=/a\\:b",
            "--ioengine=io_uring",
            "--rw=randwrite",
            "--bs=4096",
            "--iodepth=64",
            "--iodepth_batch_submit=64",
            "--numjobs=4",
            "--runtime=400ms",
            "--cpus_allowed=1",
            "--fixedbufs",
        ] {
            assert!(args.contains(&wanted), "{wanted}: {args:?}");
        }
    }
}
