//! `vhost-top`: its rates, its screen in tmux, and servers that hang or end.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::{Value, json};

use crate::support::harness::{self, LIMIT, Vhost, program, wait_until};

/// A front end that reads and writes until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(socket: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let ram = GuestRam::new(&[4 << 20]).unwrap();
            let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
            let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
            let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
            let buffer = std::slice::from_ref(&buffer);
            while !stopped.load(Ordering::Relaxed) {
                for request in [Request::read(0, buffer), Request::write(0, buffer)] {
                    assert_eq!(queue.run(&request).unwrap().status, STATUS_OK);
                }
            }
            front_end.disconnect().unwrap();
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_none_or(|ended| ended.is_ok()));
    }
}

/// A server with the controllers `busy`, which has I/O, and `idle`.
fn served() -> (Vhost, Load) {
    let vhost = Vhost::start(&[]);
    for name in ["busy", "idle"] {
        vhost.malloc(&format!("disk-{name}"));
        let params = json!({"ctrlr": name, "dev_name": format!("disk-{name}")});
        vhost.ok("vhost_create_blk_controller", params);
    }
    let load = Load::start(vhost.socket("busy"));
    wait_until("I/O", || {
        let stats = vhost.ok("vhost_get_controller_stats", json!({"name": "busy"}));
        stats[0]["io"]["num_write_ops"].as_u64() > Some(0)
    });
    (vhost, load)
}

fn once(program: &Path, socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.arg("-s").arg(socket).args(["-d", "0.2", "--once"]).args(args);
    command.output().unwrap()
}

#[test]
fn one_table_has_the_rates_of_each_controller() {
    let program = program("vhost-top");
    let (vhost, load) = served();
    vhost.ok("bdev_enable_histogram", json!({"name": "disk-busy", "enable": true}));
    let output = once(&program, &vhost.rpc_socket(), &["--json"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&shown["pid"], &shown["missing_methods"]),
        (&json!(vhost.pid()), &json!([])),
        "{shown}"
    );
    let [busy, idle] = [0, 1].map(|n| &shown["controllers"][n]);
    assert_eq!((&busy["name"], &idle["name"]), (&json!("busy"), &json!("idle")));
    let keys = [
        "read_iops",
        "write_iops",
        "read_bytes_per_s",
        "write_bytes_per_s",
        "latency_us",
        "latency_p50_us",
        "latency_p99_us",
    ];
    for key in keys {
        assert!(busy[key].as_f64() > Some(0.0), "{key}: {shown}");
        assert!(idle[key].as_f64().is_none_or(|rate| rate == 0.0), "{key}: {shown}");
    }
    assert_eq!((&busy["states"], &idle["states"]), (&json!(["running"]), &json!([])));
    assert_eq!((&busy["errors_per_s"], &busy["bdev"]), (&json!(0.0), &json!("disk-busy")));
    let reactor = &shown["reactors"][0];
    assert_eq!(busy["queues"], json!([{"core": reactor["core"], "count": 1}]));
    assert!(reactor["load_percent"].as_f64() > Some(0.0) && reactor["queues"] == 1, "{shown}");
    assert!(reactor["iterations_per_s"].as_f64() > Some(0.0), "{shown}");
    assert_eq!(shown["totals"]["iops"], busy["iops"]);
    let output = once(&program, &vhost.rpc_socket(), &[]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.lines().any(|line| line.starts_with("busy       running ")), "{table}");
    drop(load);
    let nowhere = vhost.dir().join("nowhere");
    let output = once(&program, &nowhere, &[]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.starts_with("vhost-top: cannot connect to "), "{told}");
    assert_eq!(vhost.stop(), 0);
}

/// A shell in a terminal of tmux.
struct Tmux {
    dir: tempfile::TempDir,
}

impl Tmux {
    /// `None`, and the test is skipped, if there is no tmux.
    #[track_caller]
    fn start(width: u16, height: u16) -> Option<Self> {
        if let Err(error) = Command::new("tmux").arg("-V").output() {
            test_report::skipped("tmux", &error.to_string());
            return None;
        }
        let tmux = Self { dir: tempfile::Builder::new().prefix("vt").tempdir().unwrap() };
        let [width, height] = [width, height].map(|n| n.to_string());
        tmux.call(&["-f", "/dev/null", "new-session", "-d", "-x", &width, "-y", &height, "sh"]);
        Some(tmux)
    }

    fn call(&self, args: &[&str]) -> String {
        let socket = self.dir.path().join("tmux");
        let output = Command::new("tmux").arg("-S").arg(socket).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Types a line.
    fn line(&self, text: &str) {
        self.keys(&[text, "Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        self.call(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.call(&["capture-pane", "-p"])
    }

    /// Waits for a screen.
    #[track_caller]
    fn wait(&self, what: &str, is: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let screen = self.screen();
            if is(&screen) {
                return;
            }
            assert!(Instant::now() < deadline, "never came: {what}; the screen:\n{screen}");
            // Each look starts a process.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the screen is the shell's and the terminal has its settings.
    #[track_caller]
    fn is_restored(&self, status: i32) {
        let ended = format!("ended {status}");
        self.wait(&ended, |screen| screen.contains(&ended));
        let flags = self.call(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]);
        assert_eq!(flags.trim(), "0 1");
        self.line("clear; stty -a");
        self.wait("the shell's settings", |screen| {
            let has = |setting| screen.split_whitespace().any(|word| word == setting);
            ["icanon", "echo", "isig", "opost"].into_iter().all(has)
        });
        self.line("clear");
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let socket = self.dir.path().join("tmux");
        let _ = Command::new("tmux").arg("-S").arg(socket).arg("kill-server").output();
    }
}

/// The line that begins with `name`.
fn row<'a>(screen: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let mut lines = screen.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines.find(|words| words.first() == Some(&name))
}

/// The names of the controllers on the screen.
fn names(screen: &str) -> Vec<&str> {
    let words = screen.lines().filter_map(|line| line.split_whitespace().next());
    words.filter(|word| ["busy", "idle"].contains(word)).collect()
}

#[test]
fn the_screen_shows_controllers_and_reactors_and_obeys_keys() {
    let Some(tmux) = Tmux::start(80, 24) else { return };
    let program = program("vhost-top");
    let (vhost, _load) = served();
    let start =
        format!("{} -d 0.2 -s {}; echo ended $?", program.display(), vhost.rpc_socket().display());
    tmux.line(&start);
    tmux.wait("rates", |screen| {
        row(screen, "busy").is_some_and(|words| words[2] != "-" && words[2] != "0")
            && screen.contains("REACTORS 1")
            && screen.contains("controllers 2, sessions 1")
    });
    let screen = tmux.screen();
    assert_eq!(names(&screen), ["busy", "idle"], "{screen}");
    assert!(screen.contains("by IOPS descending"), "{screen}");
    let core = if harness::core_mask() == "0x2" { "1" } else { "0" };
    assert_eq!(row(&screen, core).unwrap()[2], "1", "a queue: {screen}");
    tmux.keys(&["R"]);
    tmux.wait("the reverse order", |s| s.contains("by IOPS asc") && names(s) == ["idle", "busy"]);
    tmux.keys(&["<", "<"]);
    tmux.wait("names from Z to A", |s| s.contains("by CONTROLLER descending"));
    tmux.keys(&["/", "USY", "Enter"]);
    tmux.wait("one controller", |s| s.contains("CONTROLLERS 1 of 2") && names(s) == ["busy"]);
    tmux.keys(&["h"]);
    tmux.wait("a question", |s| s.contains("enable the histogram of disk-busy?"));
    tmux.keys(&["y"]);
    tmux.wait("percentiles", |s| row(s, "busy").is_some_and(|words| words[8] != "-"));
    vhost.ok("bdev_get_histogram", json!({"name": "disk-busy"}));
    tmux.keys(&["r"]);
    tmux.wait("a message", |s| s.contains("longest poll iterations reset"));
    tmux.keys(&["?"]);
    tmux.wait("help", |s| s.contains("Any key returns."));
    tmux.keys(&["x"]);
    tmux.call(&["resize-window", "-x", "200", "-y", "50"]);
    tmux.wait("all columns", |s| s.contains("BDEV") && s.contains("disk-busy"));
    tmux.keys(&["q"]);
    tmux.is_restored(0);
    tmux.line(&format!("NO_COLOR=1 {start}"));
    tmux.wait("a screen", |s| s.contains("REACTORS 1"));
    tmux.keys(&["C-c"]);
    tmux.is_restored(0);
}

#[test]
fn a_server_that_hangs_or_restarts_does_not_end_it() {
    let Some(tmux) = Tmux::start(100, 24) else { return };
    let program = program("vhost-top");
    let (vhost, load) = served();
    let link = tmux.dir.path().join("rpc");
    symlink(vhost.rpc_socket(), &link).unwrap();
    let pid = tmux.dir.path().join("pid");
    tmux.line(&format!(
        "sh -c 'echo $$ >{}; exec {} -d 0.2 -s {}'; echo ended $?",
        pid.display(),
        program.display(),
        link.display()
    ));
    tmux.wait("a controller", |s| names(s) == ["busy", "idle"]);
    // Keys work while the server hangs.
    vhost.signal("STOP");
    tmux.wait("silence", |s| s.contains("no answer from the server for "));
    tmux.keys(&["/", "idle"]);
    tmux.wait("a filter", |s| names(s) == ["idle"]);
    tmux.keys(&["Escape"]);
    let output = once(&program, &vhost.rpc_socket(), &[]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(told, "vhost-top: spdk_get_version: no answer within 5 s\n");
    tmux.wait("the limit", |s| s.contains("disconnected, retrying: "));
    vhost.signal("CONT");
    tmux.wait("an answer", |s| !s.contains("retrying") && !s.contains("no answer"));
    drop(load);
    assert_eq!(vhost.stop(), 0);
    tmux.wait("the end", |s| s.contains("disconnected, retrying: cannot connect"));
    let (other, _load) = served();
    std::fs::remove_file(&link).unwrap();
    symlink(other.rpc_socket(), &link).unwrap();
    let pid_shown = format!("pid {}", other.pid());
    tmux.wait("the new server", |s| {
        s.contains(&pid_shown) && row(s, "busy").is_some_and(|words| words[2] != "-")
    });
    // A signal restores the terminal, too.
    let pid = std::fs::read_to_string(pid).unwrap();
    assert!(Command::new("kill").args(["-s", "TERM", pid.trim()]).status().unwrap().success());
    tmux.is_restored(143);
}

#[test]
fn it_ends_with_its_terminal() {
    let Some(tmux) = Tmux::start(80, 24) else { return };
    let program = program("vhost-top");
    let vhost = Vhost::start(&[]);
    let pid = vhost.dir().join("pid");
    tmux.line(&format!(
        "sh -c 'echo $$ >{}; exec {} -s {}'",
        pid.display(),
        program.display(),
        vhost.rpc_socket().display()
    ));
    tmux.wait("a screen", |s| s.contains("CONTROLLERS 0"));
    let process = Path::new("/proc").join(std::fs::read_to_string(pid).unwrap().trim());
    assert!(process.exists());
    drop(tmux);
    wait_until("the end of vhost-top", || !process.exists());
}
