//! Starts the real `vhost` for a test, talks to it, and ends it.
//!
//! ```ignore
//! use crate::support::harness::Vhost;
//! use serde_json::json;
//!
//! let vhost = Vhost::start(&[]);                  // waits until it answers
//! vhost.ok("bdev_malloc_create", json!({"name": "M0", "num_blocks": 2048, "block_size": 512}));
//! let refusal = vhost.err("bdev_malloc_delete", json!({"name": "nope"}));
//! assert_eq!(refusal.code, -19);
//! vhost.spdk_rpc(&["bdev_get_bdevs"]).unwrap();   // the real client
//! let front_end = front_end::FrontEnd::connect(&vhost.socket("vhost.0"), …);
//! assert_eq!(vhost.stop(), 0);                    // SIGTERM, and its exit code
//! ```
//!
//! Each `Vhost` has a directory of its own with its RPC socket, its vhost sockets and its log, one
//! reactor on core 1 (core 0 if this process may not use core 1), and, if `VHOST_HUGEPAGES` is 0
//! in the environment, `--no-huge -s 256`. Dropping it kills the process by its id; if the test is
//! failing, the end of the log is printed first. [`Vhost::rpc`] and its like take a connection of
//! their own for each call; [`Vhost::connect`] gives one that stays, on which a request may be
//! sent without waiting for its answer. [`Vhost::spdk_rpc`] needs `VHOST_VENV` (`ci/setup` makes
//! `target/venv`, which is the default). For a process that is to end by itself there is
//! [`Launch::run_to_end`].
//!
//! Nothing here asserts on time. [`LIMIT`] ends waits for what never comes.

mod forbid;
pub(crate) mod matrix;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// After which a wait is given up, as what is waited for will not come.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at something that tells nobody when it changes.
const PAUSE: Duration = Duration::from_millis(2);

/// How a `vhost` is to be started.
pub(crate) struct Launch {
    dir: TempDir,
    /// A program that starts it, with arguments.
    through: Vec<String>,
    mask: Option<String>,
    core_locks: bool,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    forbidden: Vec<i64>,
}

/// A `vhost` that runs.
pub(crate) struct Vhost {
    child: Child,
    dir: TempDir,
    status: Option<ExitStatus>,
}

/// What a `vhost` that ended by itself left.
pub(crate) struct Ended {
    /// `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// All that it printed.
    pub(crate) log: String,
}

/// An RPC's error answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: i64,
    pub(crate) message: String,
}

impl Launch {
    /// With the harness's defaults.
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("vh").tempdir().unwrap();
        let (through, args, environment) = (vec![], vec![], vec![]);
        let forbidden = vec![];
        Self { dir, through, mask: None, core_locks: false, args, environment, forbidden }
    }

    /// Starts it through `program`, which must `exec` the command line after its own arguments.
    pub(crate) fn through(mut self, program: &[&str]) -> Self {
        self.through = program.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Adds arguments.
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Takes other cores than the default: `-m`'s argument.
    pub(crate) fn mask(mut self, mask: &str) -> Self {
        self.mask = Some(mask.to_owned());
        self
    }

    /// Lets it lock its cores for other processes to see.
    pub(crate) fn core_locks(mut self) -> Self {
        self.core_locks = true;
        self
    }

    /// Sets an environment variable of the process.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Has these system calls fail with EPERM.
    pub(crate) fn forbid(mut self, calls: &[i64]) -> Self {
        self.forbidden.extend(calls);
        self
    }

    /// Writes `text` to a file and starts with `-c` of it.
    pub(crate) fn config(self, text: &str) -> Self {
        let path = self.dir.path().join("config.json");
        fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap().to_owned();
        self.args(&["-c", &path])
    }

    /// The directory that it runs in.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The command line, with its output in the log.
    fn command(&self) -> Command {
        let dir = self.dir.path();
        let log = File::create(dir.join("vhost.log")).unwrap();
        let mut words =
            self.through.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_vhost")]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        command.current_dir(dir).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        command.arg("-r").arg(dir.join("rpc.sock")).arg("-S").arg(dir);
        let mask = self.mask.clone().unwrap_or_else(|| core_mask().to_owned());
        if !mask.is_empty() {
            command.args(["-m", &mask]);
        }
        command.arg("-u");
        if !self.core_locks {
            command.arg("--disable-cpumask-locks");
        }
        if std::env::var("VHOST_HUGEPAGES").is_ok_and(|v| v == "0") {
            command.args(["--no-huge", "-s", "256"]);
        }
        command.args(&self.args);
        if !self.forbidden.is_empty() {
            forbid::forbid(&mut command, &self.forbidden);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts it and waits until it takes RPC connections. Panics if it ends before.
    pub(crate) fn start(self) -> Vhost {
        self.spawn().until_it_listens()
    }

    /// Starts it and waits for nothing.
    pub(crate) fn spawn(self) -> Vhost {
        let child = self.command().spawn().unwrap();
        Vhost { child, dir: self.dir, status: None }
    }

    /// Starts it and waits for its end.
    pub(crate) fn run_to_end(self) -> Ended {
        let mut vhost = self.spawn();
        let code = vhost.wait();
        Ended { code, log: vhost.log() }
    }
}

impl Vhost {
    /// Starts one with `args` after the harness's own, and waits until it takes connections.
    pub(crate) fn start(args: &[&str]) -> Self {
        Launch::new().args(args).start()
    }

    /// Waits until it takes RPC connections. Panics if it ends before.
    pub(crate) fn until_it_listens(mut self) -> Self {
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(self.rpc_socket()).is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.status = Some(status);
                panic!("vhost ended before it answered: {status}");
            }
            assert!(Instant::now() < deadline, "vhost does not answer");
            thread::sleep(PAUSE);
        }
        self
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its RPC socket.
    pub(crate) fn rpc_socket(&self) -> PathBuf {
        self.dir.path().join("rpc.sock")
    }

    /// Where a controller of this name has its socket.
    pub(crate) fn socket(&self, controller: &str) -> PathBuf {
        self.dir.path().join(controller)
    }

    /// All that it has printed so far. Lines are written a moment after what they tell about: see
    /// [`Vhost::wait_for_log`].
    pub(crate) fn log(&self) -> String {
        let bytes = fs::read(self.dir.path().join("vhost.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until its log has `text`.
    pub(crate) fn wait_for_log(&self, text: &str) {
        wait_until(&format!("{text:?} in the log"), || self.log().contains(text));
    }

    /// A connection to its RPC socket.
    pub(crate) fn connect(&self) -> Rpc {
        Rpc::connect(&self.rpc_socket())
    }

    /// Calls a method on a connection of its own. `Value::Null` means no parameters.
    pub(crate) fn rpc(&self, method: &str, params: Value) -> Result<Value, Refusal> {
        self.connect().call(method, params)
    }

    /// Calls a method that is to succeed.
    #[track_caller]
    pub(crate) fn ok(&self, method: &str, params: Value) -> Value {
        let shown = params.to_string();
        self.rpc(method, params).unwrap_or_else(|e| panic!("{method} {shown}: {e:?}"))
    }

    /// Calls a method that is to fail.
    #[track_caller]
    pub(crate) fn err(&self, method: &str, params: Value) -> Refusal {
        let shown = params.to_string();
        match self.rpc(method, params) {
            Ok(result) => panic!("{method} {shown}: succeeded with {result}"),
            Err(refusal) => refusal,
        }
    }

    /// Makes a malloc disk of 1 MiB.
    #[track_caller]
    pub(crate) fn malloc(&self, name: &str) {
        let params = json!({"name": name, "num_blocks": 2048, "block_size": 512});
        assert_eq!(self.ok("bdev_malloc_create", params), name);
    }

    /// Makes a null disk of 1 MiB.
    #[track_caller]
    pub(crate) fn null(&self, name: &str) {
        let params = json!({"name": name, "num_blocks": 2048, "block_size": 512});
        assert_eq!(self.ok("bdev_null_create", params), name);
    }

    /// What `bdev_get_bdevs` says of a bdev.
    pub(crate) fn bdev(&self, name: &str) -> Value {
        self.ok("bdev_get_bdevs", json!({ "name": name }))[0].take()
    }

    /// The names of all its bdevs, in its order.
    pub(crate) fn bdev_names(&self) -> Vec<String> {
        let bdevs = self.ok("bdev_get_bdevs", Value::Null);
        let name = |bdev: &Value| bdev["name"].as_str().unwrap().to_owned();
        bdevs.as_array().unwrap().iter().map(name).collect()
    }

    /// Makes an empty file of this size in its directory; its path.
    pub(crate) fn file(&self, name: &str, bytes: u64) -> String {
        let path = self.dir().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Runs SPDK's own client. Its output, or its error output if it fails.
    pub(crate) fn spdk_rpc(&self, args: &[&str]) -> Result<String, String> {
        self.spdk_rpc_with_input(args, "")
    }

    /// Like [`Vhost::spdk_rpc`], with something to read (`load_config`).
    pub(crate) fn spdk_rpc_with_input(&self, args: &[&str], input: &str) -> Result<String, String> {
        let mut child = self
            .spdk_client()
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("spdk-rpc: {e}; ci/setup installs it"));
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    /// Types commands into SPDK's `spdk-cli` in a pseudo-terminal, and returns what it shows.
    pub(crate) fn spdk_cli(&self, commands: &str) -> String {
        let (cli, socket) = (venv().join("bin/spdk-cli"), self.rpc_socket());
        let cli = format!("{} -s {}", cli.display(), socket.display());
        let mut terminal = Command::new("script")
            .args(["-qec", &cli, "/dev/null"])
            .env("TERM", "xterm")
            // It keeps a history.
            .env("HOME", self.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        terminal.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
        let output = terminal.wait_with_output().unwrap();
        let screen = String::from_utf8_lossy(&output.stdout);
        // Without the codes for colours.
        let mut parts = screen.split("\x1b[");
        let first = parts.next().unwrap_or_default().to_owned();
        let ends = |c: char| c.is_ascii_alphabetic();
        let screen = parts.fold(first, |screen, part| {
            screen + part.split_once(ends).map_or("", |(_, rest)| rest)
        });
        assert!(output.status.success(), "{:?}:\n{screen}", output.status);
        screen
    }

    /// SPDK's own client, which finds this project's plugin.
    pub(crate) fn spdk_client(&self) -> Command {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut client = Command::new(venv().join("bin/spdk-rpc"));
        client.arg("-s").arg(self.rpc_socket());
        client.env("PYTHONPATH", repository.join("clients")).env("PYTHONDONTWRITEBYTECODE", "1");
        client
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, name: &str) {
        assert!(self.status.is_none(), "it has ended");
        let pid = self.pid().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// Whether SIGSTOP has reached all of its threads.
    pub(crate) fn is_stopped(&self) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut stats = threads.map(|t| fs::read_to_string(t.unwrap().path().join("status")));
        stats.all(|status| status.unwrap().contains("State:\tT"))
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status.is_none()
    }

    /// Whether all has ended that can: a thread that waits for a file system in the kernel cannot
    /// be ended, and the process is not gone before that thread.
    pub(crate) fn has_ended_but_for_waits(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        // The main thread's.
        status.contains("State:\tZ")
    }

    /// Waits for its end: its exit code, `None` if a signal ended it.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + LIMIT;
        while self.is_running() {
            assert!(Instant::now() < deadline, "vhost does not end");
            thread::sleep(PAUSE);
        }
        self.status.unwrap().code()
    }

    /// Sends SIGTERM and waits for its end: its exit code.
    pub(crate) fn stop(mut self) -> i32 {
        self.signal("TERM");
        self.wait().expect("it ends by itself")
    }

    /// Resident memory in kB.
    pub(crate) fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Open file descriptors, once their number stays: a new listener wakes rte_vhost's event thread
    /// by a connection, which that thread takes and closes in its own time.
    pub(crate) fn fds(&self) -> usize {
        let (mut count, mut same) = (0, 0);
        wait_until("a number of fds that stays", || {
            let now = self.fds_now();
            same = if now == count { same + 1 } else { 0 };
            count = now;
            same == 10
        });
        count
    }

    /// Those that are open right now, less EAL's: one for each hugepage that its heap has grown to.
    fn fds_now(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let is_eals = |path: &Path| {
            fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:seg_"))
        };
        fds.filter(|fd| !is_eals(&fd.as_ref().unwrap().path())).count()
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(60)..];
            eprintln!("---- the end of vhost's log ----\n{}\n----", tail.join("\n"));
        }
    }
}

/// A connection to an RPC socket.
pub(crate) struct Rpc {
    stream: BufReader<UnixStream>,
    id: u64,
}

impl Rpc {
    /// Connects. The limit is on each read, so that a lost answer fails the test.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self { stream: BufReader::new(stream), id: 0 }
    }

    /// Sends a request and returns its id. `Value::Null` means no parameters.
    pub(crate) fn send(&mut self, method: &str, params: Value) -> u64 {
        self.id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.id, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        self.send_raw(&request.to_string());
        self.id
    }

    /// Sends any bytes.
    pub(crate) fn send_raw(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next answer as it came.
    pub(crate) fn receive_line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the connection was closed");
        line
    }

    /// The next answer: its id, and its result or error.
    pub(crate) fn receive(&mut self) -> (Value, Result<Value, Refusal>) {
        let mut answer: Value = serde_json::from_str(&self.receive_line()).unwrap();
        let error = &answer["error"];
        let result = if error.is_null() {
            Ok(answer["result"].take())
        } else {
            let code = error["code"].as_i64().unwrap();
            Err(Refusal { code, message: error["message"].as_str().unwrap().to_owned() })
        };
        (answer["id"].take(), result)
    }

    /// Calls a method and waits for its answer; no other may be outstanding.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Result<Value, Refusal> {
        let id = self.send(method, params);
        let (answered, result) = self.receive();
        assert_eq!(answered, id);
        result
    }

    /// Whether an answer can be read at once.
    pub(crate) fn has_answer(&mut self) -> bool {
        if !self.stream.buffer().is_empty() {
            return true;
        }
        self.stream.get_ref().set_nonblocking(true).unwrap();
        let ready = self.stream.fill_buf().is_ok_and(|bytes| !bytes.is_empty());
        self.stream.get_ref().set_nonblocking(false).unwrap();
        ready
    }

    /// All bytes up to the end of the stream.
    pub(crate) fn read_to_end(&mut self) -> String {
        let mut text = String::new();
        self.stream.read_to_string(&mut text).unwrap();
        text
    }
}

/// Where SPDK's clients are installed.
fn venv() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let venv = std::env::var_os("VHOST_VENV").map(PathBuf::from);
    venv.unwrap_or_else(|| repository.join("target/venv"))
}

/// A program of the workspace, built as the server was. Cargo gives a test only the programs of its
/// own package.
pub(crate) fn program(package: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_BIN_EXE_vhost")).parent().unwrap();
    let profile = match dir.file_name().unwrap().to_str().unwrap() {
        "debug" => "dev",
        name => name,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--locked", "-p", package, "--profile", profile]);
    cargo.arg("--target-dir").arg(dir.parent().unwrap());
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap());
    assert!(cargo.status().unwrap().success());
    dir.join(package)
}

/// Waits until `done`, looking now and then; panics with `what` after [`LIMIT`].
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "never came: {what}");
        thread::sleep(PAUSE);
    }
}

/// The mask of cores 0 and 1. A test that asks for it fails where there is one core only: it would
/// show nothing.
#[track_caller]
pub(crate) fn two_cores() -> &'static str {
    let cores = allowed_cores();
    assert!(cores.contains(&0) && cores.contains(&1), "it takes cores 0 and 1, not {cores:?}");
    "0x3"
}

/// The mask of the reactor's core: 1, or 0 where this process may not use 1.
pub(crate) fn core_mask() -> &'static str {
    if allowed_cores().contains(&1) { "0x2" } else { "0x1" }
}

fn allowed_cores() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap();
    let list = line.split_ascii_whitespace().nth(1).unwrap();
    let cores = list.split(',').flat_map(|item| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        first.parse::<usize>().unwrap()..=last.parse().unwrap()
    });
    cores.collect()
}

impl Refusal {
    /// For comparison.
    pub(crate) fn new(code: i64, message: &str) -> Self {
        Self { code, message: message.into() }
    }
}
