//! Metrics over HTTP, as Prometheus reads them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::{Value, json};

use crate::support::harness::{self, Launch, Vhost, wait_until};

/// The address that vhost has logged.
fn address(vhost: &Vhost) -> String {
    vhost.wait_for_log("metrics: http://");
    let log = vhost.log();
    let (_, rest) = log.split_once("metrics: http://").unwrap();
    rest.split('/').next().unwrap().to_owned()
}

fn read_all(mut stream: impl Read + Write, head: &str) -> String {
    write!(stream, "{head}\r\nHost: vhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The body of a GET request.
fn get(address: &str, more: &str) -> String {
    let head = format!("GET /metrics HTTP/1.1{more}");
    let text = read_all(TcpStream::connect(address).unwrap(), &head);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    body.to_owned()
}

/// The samples by name and labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// A controller on a malloc bdev, with a connection that has read and written.
fn scene(vhost: &Vhost, reads: u64) -> FrontEnd {
    vhost.malloc("M");
    vhost.ok("bdev_enable_histogram", json!({"name": "M", "enable": true}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "M"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    for _ in 0..reads {
        let read = Request::read(0, std::slice::from_ref(&buffer));
        assert_eq!(queue.run(&read).unwrap().status, STATUS_OK);
    }
    assert_eq!(queue.run(&Request::write(0, &[buffer])).unwrap().status, STATUS_OK);
    front_end
}

#[test]
fn metrics_tell_what_the_rpcs_tell() {
    let vhost = Launch::new().args(&["--metrics", "127.0.0.1:0"]).start();
    let address = address(&vhost);
    let front_end = scene(&vhost, 10);
    assert!(vhost.rpc("bdev_get_bdevs", json!({"name": "nope"})).is_err());
    let text = get(&address, "");
    let all = samples(&text);
    let value = |name: &str| *all.get(name).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    for (name, expected) in [
        (r#"vhost_bdev_operations_total{bdev="M",op="read"}"#, 10.0),
        (r#"vhost_bdev_io_bytes_total{bdev="M",op="write"}"#, 4096.0),
        (r#"vhost_bdev_errors_total{bdev="M",kind="failed"}"#, 0.0),
        (r#"vhost_bdev_request_duration_seconds_count{bdev="M"}"#, 11.0),
        (r#"vhost_bdev_request_duration_seconds_bucket{bdev="M",le="+Inf"}"#, 11.0),
        (r#"vhost_controller_operations_total{controller="c",bdev="M",op="write"}"#, 1.0),
        (r#"vhost_controller_throttled_total{controller="c"}"#, 0.0),
        (r#"vhost_controller_sessions{controller="c"}"#, 1.0),
        (r#"vhost_rpc_errors_total{method="bdev_get_bdevs"}"#, 1.0),
        (r#"vhost_rpc_calls_total{method="bdev_enable_histogram"}"#, 1.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let core = harness::core_mask() == "0x2";
    let core = if core { "1" } else { "0" };
    assert!(value(&format!("vhost_reactor_busy_seconds_total{{core=\"{core}\"}}")) > 0.0);
    assert!(value(&format!("vhost_reactor_iterations_total{{core=\"{core}\"}}")) > 0.0);
    assert!(value(r#"vhost_bdev_latency_seconds_total{bdev="M",op="read"}"#) > 0.0);
    // Counters do not fall at a reset of the statistics, nor when the connection ends.
    let sessions = |all: &BTreeMap<String, f64>| {
        all.iter().filter(|(name, _)| name.starts_with("vhost_session_requests_total")).count()
    };
    assert_eq!(sessions(&all), 1);
    vhost.ok("bdev_reset_iostat", json!({"name": "M"}));
    front_end.disconnect().unwrap();
    wait_until("no session", || sessions(&samples(&get(&address, ""))) == 0);
    let later = samples(&get(&address, ""));
    for (name, before) in all.iter().filter(|(name, _)| name.contains("_total{")) {
        if !name.starts_with("vhost_session_") {
            assert!(later[name] >= *before, "{name}");
        }
    }
    // OpenMetrics for those who take it.
    let open_metrics = get(&address, "\r\nAccept: application/openmetrics-text; version=1.0.0");
    assert!(open_metrics.ends_with("# EOF\n"));
    let not_found = read_all(TcpStream::connect(&address).unwrap(), "GET / HTTP/1.1");
    assert!(not_found.starts_with("HTTP/1.1 404 "), "{not_found}");
    let refused = read_all(TcpStream::connect(&address).unwrap(), "POST /metrics HTTP/1.1");
    assert!(refused.starts_with("HTTP/1.1 405 "), "{refused}");
    assert_eq!(vhost.stop(), 0);
}

/// Clients that send nothing, half a request or nonsense, or do not read their answers, hold up
/// neither the RPC nor other readers.
#[test]
fn clients_that_hang_hold_up_nobody_else() {
    let vhost = Launch::new().args(&["--metrics", ":0"]).start();
    let address = address(&vhost);
    let mut idle: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(&address).unwrap()).collect();
    idle[0].write_all(b"GET /metrics HT").unwrap();
    let mut nonsense = TcpStream::connect(&address).unwrap();
    nonsense.write_all(&[0xff; 100]).unwrap();
    let mut answer = vec![];
    nonsense.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400 "));
    vhost.ok("spdk_get_version", Value::Null);
    assert!(get(&address, "").contains("vhost_build_info"));
    // Twice as many as are served at a time. The oldest ones give way.
    idle.extend((0..124).map(|_| {
        let mut client = TcpStream::connect(&address).unwrap();
        client.write_all(b"GET /metrics HT").unwrap();
        client
    }));
    vhost.ok("spdk_get_version", Value::Null);
    let begun = Instant::now();
    assert!(get(&address, "").contains("vhost_build_info"));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let is_open = |client: &TcpStream| {
        client.set_nonblocking(true).unwrap();
        let read = (&*client).read(&mut [0; 1]);
        matches!(read, Err(e) if e.kind() == ErrorKind::WouldBlock)
    };
    let open: Vec<bool> = idle.iter().map(is_open).collect();
    assert_eq!(open, [vec![false; 65], vec![true; 63]].concat());
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn metrics_on_a_unix_socket_and_bad_addresses() {
    let launch = Launch::new();
    let path = launch.dir().join("metrics.sock");
    let vhost = launch.args(&["--metrics", path.to_str().unwrap()]).start();
    let text = read_all(UnixStream::connect(&path).unwrap(), "GET /metrics HTTP/1.1");
    assert!(text.contains("vhost_build_info"), "{text}");
    assert_eq!(vhost.stop(), 0);
    for (address, code) in [("nonsense", 2), ("localhost:9100", 2), ("/no/such/dir/m", 1)] {
        let ended = Launch::new().args(&["--metrics", address]).run_to_end();
        assert_eq!(ended.code, Some(code), "{address}: {}", ended.log);
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = Launch::new().args(&["--metrics", &address]).run_to_end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.log.contains(&format!("cannot listen on http://{address}")), "{}", ended.log);
}

/// Whether a program is here. A test that needs it is skipped otherwise.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        test_report::skipped("prometheus", &format!("no program {program}"));
    }
    found
}

#[test]
fn promtool_finds_no_fault() {
    if !has("promtool") {
        return;
    }
    let vhost = Launch::new().args(&["--metrics", ":0"]).start();
    let _front_end = scene(&vhost, 3);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(get(&address(&vhost), "").as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

/// A process that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn prometheus_reads_the_metrics() {
    if !has("prometheus") {
        return;
    }
    let vhost = Launch::new().args(&["--metrics", ":0"]).start();
    let _front_end = scene(&vhost, 7);
    let config = vhost.dir().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: vhost\n    \
         static_configs: [{{targets: ['{}']}}]\n",
        address(&vhost)
    );
    fs::write(&config, text).unwrap();
    // Free a moment ago.
    let web = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let log = fs::File::create(vhost.dir().join("prometheus.log")).unwrap();
    let _prometheus = Server(
        Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", vhost.dir().join("data").display()))
            .arg(format!("--web.listen-address={web}"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap(),
    );
    let query = |expression: &str| -> Option<String> {
        let stream = TcpStream::connect(&web).ok()?;
        let head = format!("GET /api/v1/query?query={expression} HTTP/1.0");
        let text = read_all(stream, &head);
        let answer: Value = serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()?;
        answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    };
    let seen = |expression: &str, expected: &str| {
        let what = format!("{expression} is {expected}");
        wait_until(&what, || query(expression).is_some_and(|value| value == expected));
    };
    seen("vhost_bdev_operations_total%7Bop%3D%22read%22%7D", "7");
    seen("vhost_bdev_request_duration_seconds_count", "8");
    seen("up", "1");
}

#[test]
fn the_dashboard_uses_existing_metrics() {
    let vhost = Launch::new().args(&["--metrics", ":0"]).start();
    let _front_end = scene(&vhost, 1);
    let text = get(&address(&vhost), "");
    let dashboard = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/grafana/vhost.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(dashboard).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() >= 8);
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let expression = target["expr"].as_str().unwrap();
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("vhost_")) {
            assert!(
                text.contains(&format!("\n{name}")) || text.contains(&format!(" {name} ")),
                "{name}"
            );
        }
    }
}
