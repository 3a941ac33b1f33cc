//! `vhost-perf`: its figures, what it verifies, and how it ends.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bench::perf::{Plan, Progress};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fixture::Daemon;

/// The program, about to load `socket` as `options` say.
pub(crate) fn command(socket: &Path, options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-perf"));
    command.arg(socket).args(options.split_whitespace());
    command
}

/// Runs it to its end.
pub(crate) fn run(socket: &Path, options: &str) -> Output {
    command(socket, options).output().unwrap()
}

fn figures(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Runs it to an end that it is content with; returns its figures.
fn measure(daemon: &Daemon, options: &str) -> Value {
    let output = run(&daemon.socket(), &format!("{options} --output-format json"));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "no progress in a pipe");
    figures(&output)
}

fn count(figures: &Value, name: &str) -> u64 {
    figures[name].as_u64().unwrap_or_else(|| panic!("{name} in {figures}"))
}

fn number(figures: &Value, name: &str) -> f64 {
    figures[name].as_f64().unwrap_or_else(|| panic!("{name} in {figures}"))
}

/// Latencies whose order is what it must be.
fn assert_latencies(ns: &Value) {
    let names = ["min", "p50", "p90", "p99", "p99.9", "p99.99", "max"];
    let values = names.map(|name| count(ns, name));
    assert!(values.is_sorted() && values[0] > 0, "{ns}");
    let mean = number(ns, "mean");
    assert!(mean >= values[0] as f64 && mean <= values[6] as f64, "{ns}");
}

#[test]
fn the_figures_are_complete_and_agree_with_one_another() {
    let daemon = Daemon::start(2);
    let options = "--rw randrw --iodepth 4 --numjobs 2 --ramp_time 0.1 --runtime 0.55";
    let figures = measure(&daemon, options);
    let completed = count(&figures, "completed");
    let of = |kind: &str| count(&figures[kind], "completed");
    assert_eq!(of("read") + of("write"), completed);
    assert!(of("read") > 0 && of("write") > 0);
    for latencies in [&figures, &figures["read"], &figures["write"]] {
        assert_latencies(&latencies["lat_ns"]);
    }
    assert_eq!([count(&figures, "errors"), count(&figures, "mismatches")], [0, 0]);
    let elapsed = number(&figures, "elapsed_s");
    let iops = number(&figures, "iops");
    assert!(elapsed >= 0.55 && (iops * elapsed / completed as f64 - 1.0).abs() < 1e-6);
    assert!((number(&figures, "bw_bytes") / iops - 4096.0).abs() < 1e-6);

    let timeline = figures["timeline"].as_array().unwrap();
    let starts: Vec<_> = timeline.iter().map(|part| number(part, "at_s")).collect();
    assert!(starts.is_sorted() && starts[0] == 0.0 && starts.len() == 6, "{starts:?}");
    let ends = starts[1..].iter().copied().chain([elapsed]);
    let parts = timeline.iter().zip(starts.iter().zip(ends));
    let sum: f64 = parts.map(|(part, (from, to))| number(part, "iops") * (to - from)).sum();
    assert!((sum / completed as f64 - 1.0).abs() < 1e-3, "{sum} of {completed}");

    let gaps = figures["longest_gaps"].as_array().unwrap();
    let lengths: Vec<_> = gaps.iter().map(|gap| count(gap, "ns")).collect();
    assert!(lengths.len() == 10 && lengths.is_sorted_by(|a, b| a >= b), "{lengths:?}");
    assert_eq!(count(&figures, "longest_gap_ns"), lengths[0]);
    assert_eq!(number(&figures, "longest_gap_at_s"), number(&gaps[0], "at_s"));
    let in_timeline = timeline.iter().map(|part| count(part, "longest_gap_ns")).max();
    assert_eq!(in_timeline, Some(lengths[0]));
    assert_eq!(figures["options"]["rw"], "randrw");
    assert_eq!(figures["options"]["size"], 64 << 20);
}

#[test]
fn every_kind_of_load_works() {
    let daemon = Daemon::start(4);
    for options in [
        "--iodepth 1",
        "--iodepth 64 --rw randwrite --bs 512",
        "--interrupts --event-idx --indirect --iodepth 8 --numjobs 4",
        "--interrupts --rate_iops 500 --iodepth 4",
        "--rw write --bs 1m --iodepth 3 --event-idx",
        "--rw read --bs 3k --iodepth 128 --threads 2 --numjobs 2 --cpus_allowed 0",
        "--rw randrw --rwmixread 30 --verify --iodepth 16 --numjobs 4 --mem-size 16m",
    ] {
        let figures = measure(&daemon, &format!("{options} --runtime 0.2"));
        assert!(count(&figures, "completed") > 0, "{options}");
    }
}

#[test]
fn a_rate_is_kept() {
    let daemon = Daemon::start(2);
    let options = "--rate_iops 400 --numjobs 2 --iodepth 256 --ramp_time 1 --runtime 1";
    // Of each queue, those due between ramp and end, and what of the ramp's has come back late.
    let completed = count(&measure(&daemon, options), "completed");
    assert!((798..1500).contains(&completed), "{completed}");
}

#[test]
fn the_words_for_people_say_the_same() {
    let daemon = Daemon::start(1);
    let output = run(&daemon.socket(), "--runtime 0.2 --rw randwrite --iodepth 2");
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["randwrite, 4 KiB, depth 2, 1 queue", " IOPS, ", "p99.99 ", "longest gap "] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(output.status.success() && output.stderr.is_empty());
}

#[test]
fn a_block_that_was_changed_is_found_by_a_later_run() {
    let daemon = Daemon::start(1);
    let range = "--verify --size 1m --offset 1m --runtime 0.2 --iodepth 4";
    // All blocks, however slow the machine is.
    while count(&measure(&daemon, &format!("{range} --rw write")), "completed") < 256 {}
    measure(&daemon, &format!("{range} --rw read"));
    let disk = std::fs::File::options().write(true).open(daemon.disk()).unwrap();
    disk.write_all_at(&[0xff; 8], (256 + 7) * 4096 + 100).unwrap();
    while {
        let output = run(&daemon.socket(), &format!("{range} --rw read --output-format json"));
        let figures = figures(&output);
        let found = count(&figures, "mismatches") > 0;
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(i32::from(found)), "{told}");
        let place = "block 263 (offset 1077248) version";
        assert_eq!(found, told.contains(place), "{told}");
        assert_eq!(found, figures["first_problem"].as_str().is_some_and(|p| p.contains(place)));
        assert_eq!(count(&figures, "errors"), 0);
        !found
    } {}
}

/// A run that has begun to measure.
struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Running {
    fn start(daemon: &Daemon, options: &str) -> Self {
        let mut child = command(&daemon.socket(), options)
            .args(["--start-line", "--output-format", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert_eq!(line, "started\n");
        Self { child, stderr }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Exit status, figures, and what it has complained of.
    fn finish(self) -> (Option<i32>, Value, String) {
        let output = self.child.wait_with_output().unwrap();
        let complaints: Vec<_> = self.stderr.lines().map(Result::unwrap).collect();
        (output.status.code(), figures(&output), complaints.join("\n"))
    }
}

#[test]
fn an_interrupt_ends_a_run_with_what_there_is() {
    let daemon = Daemon::start(1);
    for signal in [Signal::INT, Signal::TERM] {
        let running = Running::start(&daemon, "--runtime 100000 --iodepth 4");
        running.signal(signal);
        let (code, figures, complaints) = running.finish();
        assert_eq!((code, complaints.as_str()), (Some(0), ""));
        assert!(number(&figures, "elapsed_s") < 100_000.0);
    }
}

#[test]
fn a_run_that_ends_in_its_ramp_has_measured_nothing() {
    let daemon = Daemon::start(1);
    let plan = Plan { ramp: Duration::from_secs(100_000), depth: 4, ..Plan::new(daemon.socket()) };
    let mut told = Vec::new();
    let stop = AtomicBool::new(true);
    let outcome = bench::perf::run(&plan, &stop, &mut |progress| told.push(progress)).unwrap();
    assert_eq!((outcome.all.completed, outcome.elapsed), (0, Duration::ZERO));
    assert_eq!(outcome.iops(), 0.0);
    assert!(outcome.timeline.iter().all(|stretch| stretch.iops == 0.0) && outcome.is_good());
    assert!(outcome.longest_gaps.is_empty());
    assert!(!told.contains(&Progress::Started), "{told:?}");
}

#[test]
fn a_server_that_hangs_is_told_of_and_its_gap_counts() {
    let daemon = Daemon::start(1);
    let running = Running::start(&daemon, "--runtime 0.5 --iodepth 4 --timeout 5");
    daemon.freeze();
    let (code, figures, complaints) = running.finish();
    assert_eq!(code, Some(1));
    assert_eq!(complaints, "vhost-perf: 4 requests have not completed");
    assert_eq!(count(&figures, "outstanding"), 4);
    // It waits for so long after the end before it gives up.
    assert!(count(&figures, "longest_gap_ns") > 5_000_000_000, "{figures}");
}

#[test]
fn a_server_that_goes_away_ends_the_run() {
    let daemon = Daemon::start(1);
    let running = Running::start(&daemon, "--runtime 100000 --iodepth 4");
    daemon.kill();
    let (code, figures, complaints) = running.finish();
    assert_eq!(code, Some(1));
    assert!(complaints.contains("the server closed the connection"), "{complaints}");
    assert_eq!(figures["server_closed"], true);
}

#[test]
fn a_picture_is_well_formed_and_says_what_it_shows() {
    let daemon = Daemon::start(1);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("load.svg");
    let options = format!("--runtime 0.3 --rw randrw --iodepth 4 --plot {}", file.display());
    measure(&daemon, &options);
    let svg = std::fs::read_to_string(&file).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    assert_eq!(document.root_element().tag_name().name(), "svg");
    let words: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
    for wanted in ["randrw (50 % reads)", "Latency by percentile", "99 %", "IOPS", "Longest gap"] {
        assert!(words.iter().any(|word| word.contains(wanted)), "{wanted} in {words:?}");
    }
    let output = run(&daemon.socket(), "--runtime 0.1 --plot /nowhere/load.svg");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.starts_with("vhost-perf: cannot write /nowhere/load.svg: "), "{told}");
}

#[test]
fn the_floor_is_a_time() {
    let floor = |options: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-perf"));
        command.arg("floor").args(options.split_whitespace()).output().unwrap()
    };
    let output = floor("--cpus_allowed 0,1000");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("vhost-perf: cores 0 and 1000: "));
    if std::thread::available_parallelism().unwrap().get() > 1 {
        let figures = figures(&floor("--cpus_allowed 0,1 --output-format json"));
        assert!(number(&figures, "round_trip_ns") > 0.0);
    }
}
