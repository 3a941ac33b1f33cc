//! The command line: which servers, which cells, how often.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use bench::publish::beside;
use bench::servers::{Kind, Spec};
use clap::{Parser, ValueEnum};

use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::fio::Fio;

/// Compares servers of vhost-user-blk disks: ours, qemu-storage-daemon's and SPDK's, in alternation,
/// and with --fio what the kernel does without any.
///
/// One server runs at a time, the others are stopped (SIGSTOP). Ratios are formed within an
/// alternation, and their median is printed with the least and the greatest. Markdown goes to
/// standard output; everything measured goes to a JSON file, and a picture to an SVG file.
#[derive(Debug, Parser)]
#[command(name = "compare", max_term_width = 100)]
pub(crate) struct Options {
    /// Our vhost; given more than once, builds of it are compared with one another. The first one
    /// is what the others are compared with [default: the one built along with this program].
    #[arg(long, value_name = "[NAME=]PATH")]
    pub(crate) vhost: Vec<String>,
    /// SPDK's vhost.
    #[arg(long, value_name = "PATH")]
    pub(crate) spdk: Option<PathBuf>,
    /// An argument for SPDK's vhost; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) spdk_arg: Vec<String>,
    /// The qemu-storage-daemon; left out if there is none.
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    pub(crate) qemu: PathBuf,
    /// Leave qemu-storage-daemon out.
    #[arg(long)]
    pub(crate) no_qemu: bool,
    /// Leave ours out.
    #[arg(long, conflicts_with = "vhost")]
    no_ours: bool,
    /// Measure fio on files and devices too, by libaio and by io_uring: a floor without server and
    /// guest, on the core of the servers.
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "fio")]
    pub(crate) fio: Option<PathBuf>,
    /// An argument for fio; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true, requires = "fio")]
    pub(crate) fio_arg: Vec<String>,
    /// The load generator [default: vhost-perf beside this program].
    #[arg(long, value_name = "PATH")]
    pub(crate) perf: Option<PathBuf>,

    /// What to measure.
    #[arg(long = "case", value_enum, value_delimiter = ',', default_value = "cells")]
    pub(crate) cases: Vec<Case>,
    /// Disks of the cells [default: null,malloc,aio,uring].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) disks: Vec<DiskKind>,
    /// Requests in flight on each queue [default: 1,64].
    #[arg(long, value_delimiter = ',')]
    pub(crate) depths: Vec<usize>,
    /// Bytes in a request [default: 4k].
    #[arg(long, value_delimiter = ',')]
    pub(crate) bs: Vec<Size>,
    /// Kinds of load [default: randread].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) rw: Vec<Workload>,
    /// Numbers of queues [default: 1].
    #[arg(long, value_delimiter = ',')]
    pub(crate) queues: Vec<usize>,
    /// Every cell, of those that the options above leave.
    #[arg(long)]
    pub(crate) full: bool,
    /// A few cells, three short runs: to see that it works.
    #[arg(long, conflicts_with = "full")]
    pub(crate) quick: bool,

    /// Alternations [default: 5].
    #[arg(long)]
    pub(crate) runs: Option<usize>,
    /// Seconds of each run [default: 0.4].
    #[arg(long, value_name = "SECONDS")]
    pub(crate) runtime: Option<f64>,
    /// Seconds before each run that do not count, on disks in memory.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.1)]
    pub(crate) ramp_time: f64,
    /// The core of the load.
    #[arg(long, value_name = "CORE", default_value_t = 0)]
    pub(crate) load_core: usize,
    /// The core of each server's polling thread.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    pub(crate) server_core: usize,
    /// Where the files behind aio, uring and block disks are made: not on tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) file_dir: PathBuf,
    /// The device behind the block disk; what it holds is overwritten by loads that write [default:
    /// a loop device over a file].
    #[arg(long, value_name = "PATH")]
    pub(crate) block_device: Option<PathBuf>,
    /// The size of each of the files.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub(crate) file_mib: u64,
    /// Idle neighbours of the case idle-neighbours.
    #[arg(long, value_name = "N", default_value_t = 255)]
    pub(crate) neighbours: usize,

    /// Where compare.json and compare.svg go [default: the build's directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Append what is printed to this file too.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "bench/RESULTS.md")]
    pub(crate) results: Option<PathBuf>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// Throughput and latency of each cell; on files and devices CPU time and system calls too.
    Cells,
    /// One busy controller beside many connected idle ones, and alone.
    IdleNeighbours,
    /// CPU share of an idle reactor, polling, in interrupt mode and in adaptive mode.
    IdleCpu,
    /// Latency of a request after a pause, in the same modes.
    IdleLatency,
    /// All of these.
    All,
}

impl Options {
    /// Whether `case` is to be measured.
    pub(crate) fn wants(&self, case: Case) -> bool {
        self.cases.iter().any(|&asked| asked == case || asked == Case::All)
    }

    /// Alternations.
    pub(crate) fn runs(&self) -> usize {
        self.runs.unwrap_or(if self.quick { 3 } else { 5 })
    }

    /// Seconds of each run.
    pub(crate) fn runtime_s(&self) -> f64 {
        self.runtime.unwrap_or(if self.quick { 0.1 } else { 0.4 })
    }

    /// Disks of the special cases: those that were selected.
    pub(crate) fn disks_or(&self, default: &[DiskKind]) -> Vec<DiskKind> {
        if self.disks.is_empty() { default.to_vec() } else { self.disks.clone() }
    }

    /// The cells that are selected: without any option that selects, a subset that says much.
    ///
    /// # Errors
    /// Options that contradict one another.
    pub(crate) fn cells(&self) -> Result<Vec<Cell>> {
        let selective = !self.disks.is_empty()
            || !self.depths.is_empty()
            || !self.bs.is_empty()
            || !self.rw.is_empty()
            || !self.queues.is_empty();
        let cells = if self.full {
            self.product(&DiskKind::USUAL, &Cell::DEPTHS, &Size::ALL, &Workload::ALL, &[1, 4])
        } else if self.quick {
            let disks = [DiskKind::Null, DiskKind::Malloc];
            self.product(&disks, &[1, 64], &[Size::K4], &[Workload::Randread], &[1])
        } else if selective {
            self.product(&DiskKind::USUAL, &[1, 64], &[Size::K4], &[Workload::Randread], &[1])
        } else {
            Cell::subset()
        };
        let most = bench::servers::QUEUES_MAX;
        for cell in &cells {
            ensure!(cell.depth > 0, "a depth is at least 1");
            ensure!((1..=most).contains(&cell.queues), "between 1 and {most} queues");
        }
        Ok(cells)
    }

    fn product(
        &self,
        disks: &[DiskKind],
        depths: &[usize],
        sizes: &[Size],
        workloads: &[Workload],
        queues: &[usize],
    ) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &disk in selected(&self.disks, disks) {
            for &rw in selected(&self.rw, workloads) {
                for &bs in selected(&self.bs, sizes) {
                    for &queues in selected(&self.queues, queues) {
                        for &depth in selected(&self.depths, depths) {
                            cells.push(Cell { disk, rw, bs, depth, queues });
                        }
                    }
                }
            }
        }
        cells
    }

    /// The servers, the one that the others are compared with first, and a note for each that is
    /// left out.
    ///
    /// # Errors
    /// One that was named is not there, or none is, or two have one name.
    pub(crate) fn servers(&self) -> Result<(Vec<Spec>, Vec<String>)> {
        let (mut specs, mut notes) = (Vec::new(), Vec::new());
        for given in &self.vhost {
            let (name, path) = given.split_once('=').unwrap_or(("vhost", given));
            specs.push(Spec::new(name, Kind::Ours, path));
        }
        if self.vhost.is_empty() && !self.no_ours {
            specs.push(Spec::new("vhost", Kind::Ours, beside("vhost")?));
        }
        if let Some(path) = &self.spdk {
            let args: Vec<&str> = self.spdk_arg.iter().map(String::as_str).collect();
            specs.push(Spec::new("SPDK", Kind::Spdk, path).with_args(&args));
        }
        if !self.no_qemu {
            specs.push(Spec::new("qemu", Kind::StorageDaemon, &self.qemu));
        }
        let mut there = Vec::new();
        for spec in specs {
            ensure!(there.iter().all(|s: &Spec| s.name != spec.name), "two named {}", spec.name);
            if is_program(&spec.program) {
                there.push(spec);
                continue;
            }
            let missing = format!("no {}", spec.program.display());
            let named = match spec.kind {
                Kind::Ours => !self.vhost.is_empty(),
                Kind::Spdk => true,
                Kind::StorageDaemon => false,
            };
            ensure!(!named, "{}: {missing}", spec.name);
            notes.push(format!("{} is left out: {missing}", spec.name));
        }
        if let Some(fio) = &self.fio {
            ensure!(is_program(fio), "no {}", fio.display());
        }
        if there.is_empty() {
            bail!("no server to measure: {}", notes.join("; "));
        }
        Ok((there, notes))
    }

    /// fio, if it takes part.
    pub(crate) fn fio(&self) -> Option<Fio> {
        Some(Fio {
            program: self.fio.clone()?,
            core: self.server_core,
            runtime_s: self.runtime_s(),
            args: self.fio_arg.clone(),
        })
    }

    /// The load generator.
    ///
    /// # Errors
    /// This program does not know where it is.
    pub(crate) fn perf(&self) -> Result<PathBuf> {
        Ok(self.perf.clone().map_or_else(|| beside("vhost-perf"), Ok)?)
    }
}

fn selected<'a, T>(given: &'a [T], default: &'a [T]) -> &'a [T] {
    if given.is_empty() { default } else { given }
}

/// Whether `program` is there, on the PATH if it is a mere name.
fn is_program(program: &std::path::Path) -> bool {
    if program.components().count() > 1 {
        return program.is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Options {
        Options::try_parse_from(std::iter::once(&"compare").chain(args)).unwrap()
    }

    fn names(args: &[&str]) -> Vec<String> {
        options(args).cells().unwrap().iter().map(Cell::to_string).collect()
    }

    #[test]
    fn selectors_multiply_and_have_defaults() {
        let all = ["--disks", "null,malloc", "--depths", "1,64", "--bs", "4k", "--rw", "randread"];
        let names = names(&[&all[..], &["--queues", "1"]].concat());
        let expected = [
            "null randread 4k d1 q1",
            "null randread 4k d64 q1",
            "malloc randread 4k d1 q1",
            "malloc randread 4k d64 q1",
        ];
        assert_eq!(names, expected);
        assert_eq!(super::tests::names(&all), expected);
    }

    #[test]
    fn full_is_everything_that_selectors_leave() {
        assert_eq!(names(&["--full"]).len(), 4 * 5 * 2 * 5 * 2);
        assert_eq!(names(&["--full", "--disks", "block", "--bs", "64k"]).len(), 5 * 5 * 2);
        assert_eq!(names(&["--quick"]).len(), 4);
        let subset = names(&[]);
        assert!((15..40).contains(&subset.len()), "{subset:?}");
        let mut once = subset.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), subset.len(), "no cell twice");
    }

    #[test]
    fn disks_on_files_are_named_after_how_they_are_reached() {
        let args = ["--disks", "aio,file,block", "--depths", "64", "--rw", "read,write"];
        let expected = [
            "aio read 4k d64 q1",
            "aio write 4k d64 q1",
            "uring read 4k d64 q1",
            "uring write 4k d64 q1",
            "block read 4k d64 q1",
            "block write 4k d64 q1",
        ];
        assert_eq!(names(&args), expected, "file is uring's name of earlier versions");
    }

    #[test]
    fn fio_takes_part_when_it_is_asked_to() {
        assert!(options(&[]).fio().is_none());
        let fio = options(&["--fio", "--fio-arg", "--fixedbufs", "--server-core", "3"]).fio();
        let fio = fio.unwrap();
        assert_eq!((fio.core, fio.args), (3, vec!["--fixedbufs".to_owned()]));
        assert!(options(&["--fio", "/no/such", "--no-ours"]).servers().is_err());
        assert!(Options::try_parse_from(["compare", "--fio-arg", "x"]).is_err());
    }

    #[test]
    fn what_no_server_can_do_is_refused() {
        assert!(options(&["--queues", "5"]).cells().is_err());
        assert!(options(&["--depths", "0"]).cells().is_err());
        assert!(Options::try_parse_from(["compare", "--bs", "4x"]).is_err());
        assert!(Options::try_parse_from(["compare", "--quick", "--full"]).is_err());
    }

    #[test]
    fn builds_have_names() {
        let me = std::env::current_exe().unwrap();
        let me = me.to_str().unwrap();
        let (new, old) = (format!("new={me}"), format!("old={me}"));
        let args = ["--vhost", &new, "--vhost", &old, "--qemu", "/no/such"];
        let (specs, notes) = options(&args).servers().unwrap();
        let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        assert_eq!(names, ["new", "old"]);
        assert_eq!(notes, ["qemu is left out: no /no/such"]);
        assert!(options(&["--vhost", me, "--spdk", "/no/such"]).servers().is_err(), "named");
        assert!(options(&["--vhost", me, "--vhost", me]).servers().is_err(), "one name twice");
        assert!(options(&["--vhost", "/no/such", "--no-qemu"]).servers().is_err());
    }

    #[test]
    fn all_cases_are_each_case() {
        assert!(options(&[]).wants(Case::Cells) && !options(&[]).wants(Case::IdleCpu));
        let all = options(&["--case", "all"]);
        assert!(all.wants(Case::Cells) && all.wants(Case::IdleLatency));
        assert!(!options(&["--case", "idle-cpu,idle-latency"]).wants(Case::Cells));
    }
}
