//! The command line.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use bench::publish::beside;
use bench::servers::{Kind, Spec};
use clap::{Parser, ValueEnum};

use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::fio::Fio;

/// Compare vhost-user-blk and vhost-user-scsi servers in alternation: vhost, qemu-storage-daemon and
/// SPDK's vhost, and, with --fio, the kernel without a server.
///
/// One server runs at a time; the others are stopped (SIGSTOP). A ratio is that of two runs of one
/// alternation; the median, minimum and maximum of the ratios are printed. The report is printed to
/// standard output as Markdown. All measurements are written to a JSON file, and charts to an SVG
/// file.
#[derive(Debug, Parser)]
#[command(name = "compare", max_term_width = 100)]
pub(crate) struct Options {
    /// This project's vhost; repeatable, to compare builds. The other servers are compared with the
    /// first one [default: the vhost in this program's directory].
    #[arg(long, value_name = "[NAME=]PATH")]
    pub(crate) vhost: Vec<String>,
    /// SPDK's vhost.
    #[arg(long, value_name = "PATH")]
    pub(crate) spdk: Option<PathBuf>,
    /// An argument for SPDK's vhost; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) spdk_arg: Vec<String>,
    /// qemu-storage-daemon; omitted if the program does not exist.
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    pub(crate) qemu: PathBuf,
    /// Omit qemu-storage-daemon.
    #[arg(long)]
    pub(crate) no_qemu: bool,
    /// Omit this project's vhost.
    #[arg(long, conflicts_with = "vhost")]
    no_ours: bool,
    /// Also measure fio on files and devices, with libaio and io_uring, on the servers' core: a
    /// baseline without a server and a guest.
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "fio")]
    pub(crate) fio: Option<PathBuf>,
    /// An argument for fio; repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true, requires = "fio")]
    pub(crate) fio_arg: Vec<String>,
    /// The load generator [default: vhost-perf in this program's directory].
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
    /// Bytes of a request [default: 4k].
    #[arg(long, value_delimiter = ',')]
    pub(crate) bs: Vec<Size>,
    /// Kinds of load [default: randread].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) rw: Vec<Workload>,
    /// Numbers of queues [default: 1].
    #[arg(long, value_delimiter = ',')]
    pub(crate) queues: Vec<usize>,
    /// Measure every cell that the options above select.
    #[arg(long)]
    pub(crate) full: bool,
    /// Measure a few cells in three short runs, as a test of this program.
    #[arg(long, conflicts_with = "full")]
    pub(crate) quick: bool,

    /// Number of alternations [default: 5].
    #[arg(long)]
    pub(crate) runs: Option<usize>,
    /// Seconds of each run [default: 0.4].
    #[arg(long, value_name = "SECONDS")]
    pub(crate) runtime: Option<f64>,
    /// Seconds before each measurement, on disks in memory.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.1)]
    pub(crate) ramp_time: f64,
    /// The core of the load.
    #[arg(long, value_name = "CORE", default_value_t = 0)]
    pub(crate) load_core: usize,
    /// The core of each server's polling thread.
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    pub(crate) server_core: usize,
    /// Directory for the files of aio, uring and block disks; must not be on tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) file_dir: PathBuf,
    /// Device of the block disk; loads that write overwrite its data [default: a loop device over a
    /// file].
    #[arg(long, value_name = "PATH")]
    pub(crate) block_device: Option<PathBuf>,
    /// Size of each file.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub(crate) file_mib: u64,
    /// Number of idle controllers in the case idle-neighbours.
    #[arg(long, value_name = "N", default_value_t = 255)]
    pub(crate) neighbours: usize,

    /// Directory for compare.json and compare.svg [default: the build's directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Also append the report to this file.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "bench/RESULTS.md")]
    pub(crate) results: Option<PathBuf>,
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// Throughput and latency of each cell; on files and devices also CPU time and system calls
    Cells,
    /// Throughput and latency of virtio-scsi controllers of vhost and SPDK, and of vhost's virtio-blk
    /// controllers, on disks in memory
    Scsi,
    /// One busy controller with many connected idle ones, and alone
    IdleNeighbours,
    /// CPU share of an idle reactor in poll mode, interrupt mode and adaptive mode
    IdleCpu,
    /// Latency of a request after a pause, in the same modes
    IdleLatency,
    /// All of these
    All,
}

impl Options {
    /// Whether `case` is selected.
    pub(crate) fn wants(&self, case: Case) -> bool {
        self.cases.iter().any(|&selected| selected == case || selected == Case::All)
    }

    /// Alternations.
    pub(crate) fn runs(&self) -> usize {
        self.runs.unwrap_or(if self.quick { 3 } else { 5 })
    }

    /// Seconds of each run.
    pub(crate) fn runtime_s(&self) -> f64 {
        self.runtime.unwrap_or(if self.quick { 0.1 } else { 0.4 })
    }

    /// The selected disks, or the default.
    pub(crate) fn disks_or(&self, default: &[DiskKind]) -> Vec<DiskKind> {
        if self.disks.is_empty() { default.to_vec() } else { self.disks.clone() }
    }

    /// The selected cells. Without an option that selects cells, a subset.
    ///
    /// # Errors
    /// A depth or a number of queues is out of range.
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
        checked(cells)
    }

    /// The cells of the case scsi: disks in memory.
    ///
    /// # Errors
    /// A depth or a number of queues is out of range.
    pub(crate) fn scsi_cells(&self) -> Result<Vec<Cell>> {
        let disks = [DiskKind::Null, DiskKind::Malloc];
        let mut cells = self.product(&disks, &[1, 64], &[Size::K4], &[Workload::Randread], &[1]);
        cells.retain(|cell| !cell.disk.is_stored());
        checked(cells)
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

    /// The servers, and a note for each server that is omitted. The others are compared with the
    /// first server.
    ///
    /// # Errors
    /// A server on the command line does not exist, there is no server, or two have the same name.
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
        let mut present = Vec::new();
        for spec in specs {
            let is_new = present.iter().all(|s: &Spec| s.name != spec.name);
            ensure!(is_new, "two servers have the name {}", spec.name);
            if is_program(&spec.program) {
                present.push(spec);
                continue;
            }
            let missing = format!("{} does not exist", spec.program.display());
            let named = match spec.kind {
                Kind::Ours => !self.vhost.is_empty(),
                Kind::Spdk => true,
                Kind::StorageDaemon => false,
            };
            ensure!(!named, "{}: {missing}", spec.name);
            notes.push(format!("{} is omitted: {missing}", spec.name));
        }
        if let Some(fio) = &self.fio {
            ensure!(is_program(fio), "--fio: {} does not exist", fio.display());
        }
        if present.is_empty() {
            bail!("no server to measure: {}", notes.join("; "));
        }
        Ok((present, notes))
    }

    /// fio, if it is selected.
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
    /// The path of this program is unknown.
    pub(crate) fn perf(&self) -> Result<PathBuf> {
        Ok(self.perf.clone().map_or_else(|| beside("vhost-perf"), Ok)?)
    }
}

fn selected<'a, T>(given: &'a [T], default: &'a [T]) -> &'a [T] {
    if given.is_empty() { default } else { given }
}

/// Returns `cells`, if servers can serve them.
fn checked(cells: Vec<Cell>) -> Result<Vec<Cell>> {
    let max = bench::servers::QUEUES_MAX;
    for cell in &cells {
        ensure!(cell.depth > 0, "--depths must be at least 1");
        ensure!((1..=max).contains(&cell.queues), "--queues must be between 1 and {max}");
    }
    Ok(cells)
}

/// Whether `program` exists. A name without a directory is looked up in PATH.
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
    fn the_cells_of_scsi_are_disks_in_memory() {
        let names = |args: &[&str]| -> Vec<String> {
            options(args).scsi_cells().unwrap().iter().map(Cell::to_string).collect()
        };
        let expected = [
            "null randread 4k d1 q1",
            "null randread 4k d64 q1",
            "malloc randread 4k d1 q1",
            "malloc randread 4k d64 q1",
        ];
        assert_eq!(names(&["--case", "scsi"]), expected);
        assert_eq!(names(&["--disks", "aio,null", "--depths", "64"]), expected[1..2]);
    }

    #[test]
    fn full_is_every_selected_cell() {
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
    fn disks_on_files_are_named_after_their_engines() {
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
    fn fio_is_optional() {
        assert!(options(&[]).fio().is_none());
        let fio = options(&["--fio", "--fio-arg", "--fixedbufs", "--server-core", "3"]).fio();
        let fio = fio.unwrap();
        assert_eq!((fio.core, fio.args), (3, vec!["--fixedbufs".to_owned()]));
        assert!(options(&["--fio", "/no/such", "--no-ours"]).servers().is_err());
        assert!(Options::try_parse_from(["compare", "--fio-arg", "x"]).is_err());
    }

    #[test]
    fn cells_that_no_server_supports_are_refused() {
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
        assert_eq!(notes, ["qemu is omitted: /no/such does not exist"]);
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
