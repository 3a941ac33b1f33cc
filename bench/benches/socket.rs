//! What a guest gets from the `vhost` binary: latency at depth 1 and throughput at depth 64, of a
//! null and a malloc disk, in nanoseconds and in cache-line round trips of the same run.
//!
//! `cargo bench --bench socket`, after `cargo build --release`. The binary is `$VHOST_BIN`, or
//! `vhost` beside this bench's own directory. Its reactor is on core 1, the load on core 0.
#![expect(clippy::unwrap_used, reason = "a bench ends where something fails")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bench::round_trip::median;
use bench::{
    FrontEnd, GuestRam, Idle, Load, LoadOptions, Options, Queue, QueueOptions, Summary,
    round_trip_ns,
};
use serde_json::{Value, json};

const RUNS: usize = 5;
const LOAD_CORE: usize = 0;
const REACTOR_CORE: usize = 1;
const DISK_BYTES: u64 = 64 << 20;
/// Enough for a p99.9 to rest on a few hundred requests.
const REQUESTS_DEPTH_1: u64 = 200_000;
const REQUESTS_DEPTH_64: u64 = 1_000_000;

fn main() {
    let binary = match std::env::var_os("VHOST_BIN") {
        Some(path) => PathBuf::from(path),
        // This file's program is target/release/deps/socket-…
        None => std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("vhost"),
    };
    if !binary.exists() {
        println!("skipped: no {} (cargo build --release, or set VHOST_BIN)", binary.display());
        return;
    }
    let mut server = Server::start(&binary);
    let blocks = DISK_BYTES / 512;
    let size = json!({"num_blocks": blocks, "block_size": 512});
    let mut disks = ["null", "malloc"].map(|kind| {
        let mut params = size.clone();
        params["name"] = kind.into();
        server.call(&format!("bdev_{kind}_create"), params);
        let controller = format!("{kind}.vhost");
        let params = json!({"ctrlr": controller, "dev_name": kind});
        server.call("vhost_create_blk_controller", params);
        Disk::connect(kind, &server.dir.path().join(controller))
    });
    let mut trips = Vec::new();
    for run in 0..=RUNS {
        // Alternating, as these machines drift: each disk is measured at each time of the day.
        let trip = round_trip_ns(LOAD_CORE, REACTOR_CORE).unwrap();
        for disk in &mut disks {
            disk.measure(run > 0);
        }
        // The first run warms up: memory is touched, the disk's pages are there.
        if run > 0 {
            trips.push(trip);
        }
    }
    let trip = median(trips);
    // On a machine that does something else besides, the figures say little.
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average {}", load.trim());
    println!("medians of {RUNS} runs; random reads of 4 KiB; one round trip is {trip:.0} ns");
    for disk in &disks {
        let [p50, p999] = [&disk.p50, &disk.p999].map(|values| median(values.clone()));
        println!(
            "{:6} depth 1: p50 {p50:.0} ns ({:.1} round trips), p99.9 {p999:.0} ns ({:.1}); \
             depth 64: {:.0} IOPS",
            disk.name,
            p50 / trip,
            p999 / trip,
            median(disk.iops.clone()),
        );
    }
}

/// A disk with a front end of its own, and what was measured.
struct Disk {
    name: &'static str,
    _front_end: FrontEnd,
    queues: Option<Vec<Queue>>,
    p50: Vec<f64>,
    p999: Vec<f64>,
    iops: Vec<f64>,
}

impl Disk {
    fn connect(name: &'static str, socket: &Path) -> Self {
        let ram = GuestRam::new(&[64 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(socket, ram, Options::default()).unwrap();
        let options = QueueOptions { size: 256, ..QueueOptions::default() };
        let queues = Some(front_end.start_new(1, options).unwrap());
        let (p50, p999, iops) = Default::default();
        Self { name, _front_end: front_end, queues, p50, p999, iops }
    }

    fn measure(&mut self, keep: bool) {
        let one = self.load(1, REQUESTS_DEPTH_1);
        let many = self.load(64, REQUESTS_DEPTH_64);
        if keep {
            let mut latencies = one.latencies_ns;
            latencies.sort_unstable();
            self.p50.push(f64::from(latencies[latencies.len() / 2]));
            self.p999.push(f64::from(latencies[latencies.len() * 999 / 1000]));
            self.iops.push(many.completed as f64 / many.elapsed.as_secs_f64());
        }
    }

    fn load(&mut self, depth: usize, requests: u64) -> Summary {
        let options = LoadOptions {
            depth,
            blocks: 0..DISK_BYTES / 4096,
            reads: 100,
            verify: false,
            core: Some(LOAD_CORE),
            idle: Idle::Spin,
            limit: Some(requests),
            latencies: depth == 1,
            ..LoadOptions::default()
        };
        let load = Load::start(self.queues.take().unwrap(), options).unwrap();
        let (summary, queues) = load.finish().unwrap();
        self.queues = Some(queues);
        let bad = (summary.errors, summary.outstanding);
        assert_eq!(bad, (0, 0), "{}: {:?}", self.name, summary.first_problem);
        summary
    }
}

/// A running `vhost`, which ends with this.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
    rpc: BufReader<UnixStream>,
}

impl Server {
    fn start(binary: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("rpc.sock");
        let mut child = Command::new(binary)
            .args(["-m", &format!("{:#x}", 1 << REACTOR_CORE)])
            .arg("-S")
            .arg(dir.path())
            .arg("-r")
            .arg(&socket)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(e) => {
                    assert!(child.try_wait().unwrap().is_none(), "vhost has ended: {e}");
                    assert!(start.elapsed() < bench::LIMIT, "vhost does not answer: {e}");
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        Self { child, dir, rpc: BufReader::new(stream) }
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        writeln!(self.rpc.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.rpc.read_line(&mut line).unwrap();
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        answer["result"].take()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
