//! Boots a real Linux guest in QEMU, types at its console, and talks to its QEMU.
//!
//! ```ignore
//! let mut guest = Guest::boot(GuestOptions::new(&vhost.socket("vhost.0")));
//! assert_eq!(guest.disk("vda").number("queues"), 1);
//! guest.ok("payload 0 16 >/dev/vda");
//! guest.start_io("vda", 0);               // writes and verifies for ever
//! guest.io_goes_on("vda", 0);             // two more passes, from here on
//! guest.qmp("stop", json!({}));
//! guest.kill9();
//! ```
//!
//! The kernel and the image come from `ci/guest-image` by way of `VHOST_KERNEL` and `VHOST_INITRD`;
//! `VHOST_ACCEL` is `kvm` or `tcg`. What the guest understands is in `ci/guest-init`, its machine
//! in `guest_machine` of `ci/lib.sh`. `ci/test-e2e` sets the three; without them this finds what an
//! earlier run of it left.
//!
//! A guest that goes away kills its QEMU by the process's id. [`LIMIT`] ends waits for what never
//! comes, with the end of the console; nothing here asserts on time.
#![expect(clippy::unwrap_used, reason = "a harness fails its test by panicking")]
#![allow(dead_code, reason = "each test uses the part that it needs")]

use std::collections::HashMap;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// After which a wait is given up. A guest boots in 5 s on an idle machine under TCG.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A guest's machine.
pub(crate) struct GuestOptions {
    /// The vhost-user sockets of its disks, `vda` first, each with its number of queues.
    pub(crate) sockets: Vec<(PathBuf, u16)>,
    /// Seconds after which QEMU connects again to a socket that was closed; `None` for never.
    pub(crate) reconnect: Option<u32>,
    /// Whether a reset of the machine boots it again instead of ending QEMU.
    pub(crate) reboots: bool,
    /// Virtual CPUs. A disk has as many queues as it was given, but no more than these.
    pub(crate) cpus: u32,
    /// Its memory.
    pub(crate) memory_mib: u32,
    /// What `ci/guest-init` is to do.
    pub(crate) job: &'static str,
}

impl GuestOptions {
    /// A guest with one disk of one queue, that waits for commands.
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            sockets: vec![(socket.to_owned(), 1)],
            reconnect: None,
            reboots: false,
            cpus: 1,
            memory_mib: 256,
            job: "hold",
        }
    }

    /// Adds a disk.
    pub(crate) fn disk(mut self, socket: &Path, queues: u16) -> Self {
        self.sockets.push((socket.to_owned(), queues));
        self
    }

    fn command(&self, qmp: &Path) -> Command {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let given = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let initrd = given("VHOST_INITRD").map(PathBuf::from);
        let initrd = initrd.unwrap_or_else(|| repository.join("target/ci/initrd"));
        let accel = given("VHOST_ACCEL").unwrap_or_else(|| "tcg".into());
        let memory = self.memory_mib;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-monitor", "none"]);
        qemu.args(["-accel", &accel, "-machine", "q35", "-smp", &self.cpus.to_string()]);
        qemu.args(["-m", &format!("{memory}M"), "-numa", "node,memdev=m"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=m,size={memory}M,share=on")]);
        qemu.arg("-kernel").arg(given("VHOST_KERNEL").map_or_else(newest_kernel, PathBuf::from));
        qemu.arg("-initrd").arg(initrd);
        // Kernel messages would be printed into the middle of lines: only the last words are.
        let rest = "console=ttyS0 panic=-1 quiet loglevel=1 rdinit=/init";
        qemu.args(["-append", &format!("{rest} job={}", self.job)]);
        qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        if !self.reboots {
            qemu.arg("-no-reboot");
        }
        let reconnect = self.reconnect.map_or_else(String::new, |s| format!(",reconnect={s}"));
        for (n, (socket, queues)) in self.sockets.iter().enumerate() {
            let socket = socket.display();
            qemu.args(["-chardev", &format!("socket,id=c{n},path={socket}{reconnect}")]);
            let device = format!("vhost-user-blk-pci,chardev=c{n},num-queues={queues}");
            qemu.args(["-device", &device]);
        }
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped());
        qemu
    }
}

fn newest_kernel() -> PathBuf {
    let files = std::fs::read_dir("/boot").unwrap().map(|entry| entry.unwrap().path());
    let is_kernel = |path: &PathBuf| path.to_string_lossy().ends_with("-cloud-amd64");
    let kernels = files.filter(|path| path.to_string_lossy().contains("vmlinuz-"));
    kernels.filter(is_kernel).max().expect("VHOST_KERNEL is not set; run ci/test-e2e")
}

/// A guest that runs.
pub(crate) struct Guest {
    qemu: Child,
    input: ChildStdin,
    console: Arc<Console>,
    /// Lines of the console before this one have been looked at.
    seen: usize,
    qmp: Qmp,
    _dir: TempDir,
}

/// What a command in the guest came to.
pub(crate) struct Output {
    /// The lines that it printed, and whatever else came meanwhile.
    pub(crate) lines: Vec<String>,
    /// Its exit status.
    pub(crate) rc: i32,
}

/// What the guest's driver made of a disk.
pub(crate) struct Facts(HashMap<String, String>);

impl Facts {
    /// A fact by its name in `ci/guest-init`.
    #[track_caller]
    pub(crate) fn text(&self, name: &str) -> &str {
        &self.0[name]
    }

    /// A fact that is a number.
    #[track_caller]
    pub(crate) fn number(&self, name: &str) -> u64 {
        self.text(name).parse().unwrap()
    }
}

impl Guest {
    /// Starts QEMU. The guest boots meanwhile; [`Guest::wait_ready`] waits for it.
    pub(crate) fn start(options: GuestOptions) -> Self {
        let dir = tempfile::Builder::new().prefix("guest").tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut qemu = options.command(&socket).spawn().expect("qemu-system-x86_64 is installed");
        let console = Console::read(qemu.stdout.take().unwrap());
        let qmp = Qmp::connect(&socket, || matches!(qemu.try_wait(), Ok(None)));
        let qmp = qmp.unwrap_or_else(|e| {
            let _ = qemu.kill();
            let _ = qemu.wait();
            panic!("QEMU's control socket: {e}");
        });
        let input = qemu.stdin.take().unwrap();
        Self { qemu, input, console, seen: 0, qmp, _dir: dir }
    }

    /// Starts QEMU and waits until the guest takes commands.
    pub(crate) fn boot(options: GuestOptions) -> Self {
        let mut guest = Self::start(options);
        guest.wait_ready();
        guest
    }

    /// Waits until the guest takes commands.
    #[track_caller]
    pub(crate) fn wait_ready(&mut self) {
        self.wait_line("ready");
    }

    /// Waits for the next `GUEST: ` line that begins so; what comes after the beginning.
    #[track_caller]
    pub(crate) fn wait_line(&mut self, prefix: &str) -> String {
        let marked = format!("GUEST: {prefix}");
        self.wait_for(&marked, |line| line.strip_prefix(&marked).map(str::to_owned))
    }

    /// Waits for the next line for which `found` gives something.
    #[track_caller]
    pub(crate) fn wait_for<R>(&mut self, what: &str, found: impl Fn(&str) -> Option<R>) -> R {
        let deadline = Instant::now() + LIMIT;
        loop {
            let line = match self.console.line(self.seen, deadline) {
                Ok(line) => line,
                Err(why) => panic!("{why}, no line {what:?}; the console:\n{}", self.tail()),
            };
            self.seen += 1;
            if let Some(result) = found(&line) {
                return result;
            }
        }
    }

    /// Forgets the lines that have come so far.
    pub(crate) fn skip_lines(&mut self) {
        self.seen = self.console.len();
    }

    /// Types a line at the guest's shell.
    pub(crate) fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Runs a command in the guest.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str) -> Output {
        self.skip_lines();
        let from = self.seen;
        self.type_line(command);
        let rc = self.wait_line("rc ").parse().unwrap();
        let mut lines = self.console.lines(from, self.seen - 1);
        // What a load in the background says meanwhile is not the command's.
        lines.retain(|line| !line.starts_with("GUEST: pass ") && !line.starts_with("GUEST: io "));
        Output { lines, rc }
    }

    /// Runs a command in the guest that is to succeed; its output.
    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str) -> String {
        let Output { lines, rc } = self.run(command);
        assert_eq!(rc, 0, "{command}: {}", lines.join("\n"));
        lines.join("\n").trim().to_owned()
    }

    /// What the guest sees of a disk.
    #[track_caller]
    pub(crate) fn disk(&mut self, name: &str) -> Facts {
        let output = self.ok("facts");
        let prefix = format!("GUEST: disk {name} ");
        let facts = output.lines().find_map(|line| line.strip_prefix(&prefix));
        let facts = facts.unwrap_or_else(|| panic!("no {name} in {output}"));
        Facts(facts.split(' ').filter_map(|f| f.split_once('=')).map(owned).collect())
    }

    /// The SHA-256 of a disk, or of its first MiB, as the guest reads it past its page cache.
    #[track_caller]
    pub(crate) fn digest(&mut self, disk: &str, mib: Option<u32>) -> String {
        let output =
            self.ok(&format!("digest {disk} {}", mib.map_or(String::new(), |n| n.to_string())));
        let line = output.lines().find(|line| line.starts_with("GUEST: digest ")).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    }

    /// Has the guest write and verify a MiB of a disk, at `at_mib`, over and over.
    #[track_caller]
    pub(crate) fn start_io(&mut self, disk: &str, at_mib: u32) {
        self.ok(&format!("io {disk} {at_mib} 1 &"));
        self.io_goes_on(disk, at_mib);
    }

    /// Waits for two more passes of [`Guest::start_io`]: the second began after this call.
    #[track_caller]
    pub(crate) fn io_goes_on(&mut self, disk: &str, at_mib: u32) {
        let (pass, failed) = (format!(" {disk} {at_mib}"), format!("GUEST: io {disk} "));
        let before = self.console.lines(0, self.console.len());
        if let Some(line) = before.iter().find(|line| line.starts_with(&failed)) {
            panic!("{line}");
        }
        self.seen = before.len();
        for _ in 0..2 {
            let verdict = self.wait_for(&format!("GUEST: pass N{pass}"), |line| {
                let passed = line.starts_with("GUEST: pass ") && line.ends_with(&pass);
                let fails = || line.starts_with(&failed).then(|| Err(line.to_owned()));
                if passed { Some(Ok(())) } else { fails() }
            });
            verdict.unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// Waits until [`Guest::start_io`] on this disk has got an I/O error.
    #[track_caller]
    pub(crate) fn io_fails(&mut self, disk: &str) {
        let line = self.wait_line(&format!("io {disk} "));
        assert!(line.starts_with("write failed") || line.starts_with("verify failed"), "{line}");
    }

    /// Executes a command of QEMU's; what it returns.
    #[track_caller]
    pub(crate) fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(result) => result,
            Err(e) => panic!("{command}: {e}; the console:\n{}", self.tail()),
        }
    }

    /// QEMU's word for what the machine does: `running`, `paused`, `shutdown`, ….
    #[track_caller]
    pub(crate) fn status(&mut self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Kills QEMU as the kernel would.
    pub(crate) fn kill9(mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }

    /// Has the guest power off and waits for QEMU's end.
    #[track_caller]
    pub(crate) fn power_off(mut self) {
        self.type_line("poweroff -f");
        if let Err(why) = self.console.wait_end(Instant::now() + LIMIT) {
            panic!("{why}; the console:\n{}", self.tail());
        }
        assert!(self.qemu.wait().unwrap().success());
    }

    fn tail(&self) -> String {
        let len = self.console.len();
        self.console.lines(len.saturating_sub(40), len).join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if thread::panicking() {
            eprintln!("---- the end of a guest's console ----\n{}\n----", self.tail());
        }
    }
}

fn owned((name, value): (&str, &str)) -> (String, String) {
    (name.into(), value.into())
}

/// All that a guest has printed, read by a thread of its own so that QEMU never waits for us.
#[derive(Default)]
struct Console {
    printed: Mutex<Printed>,
    more: Condvar,
}

#[derive(Default)]
struct Printed {
    lines: Vec<String>,
    ended: bool,
}

impl Console {
    fn read(output: ChildStdout) -> Arc<Self> {
        let console = Arc::new(Self::default());
        let reader = Arc::clone(&console);
        thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                reader.printed.lock().unwrap().lines.push(text);
                reader.more.notify_all();
            }
            reader.printed.lock().unwrap().ended = true;
            reader.more.notify_all();
        });
        console
    }

    fn len(&self) -> usize {
        self.printed.lock().unwrap().lines.len()
    }

    fn lines(&self, from: usize, to: usize) -> Vec<String> {
        self.printed.lock().unwrap().lines[from..to].to_vec()
    }

    /// Line `n`, when it has come. An error says that it will not.
    fn line(&self, n: usize, deadline: Instant) -> Result<String, &'static str> {
        let there = |printed: &Printed| printed.lines.len() > n;
        self.wait(deadline, there)?;
        self.printed.lock().unwrap().lines.get(n).cloned().ok_or("QEMU has ended")
    }

    fn wait_end(&self, deadline: Instant) -> Result<(), &'static str> {
        self.wait(deadline, |_| false)
    }

    /// Waits for the end of the output, or for `done`.
    fn wait(&self, deadline: Instant, done: impl Fn(&Printed) -> bool) -> Result<(), &'static str> {
        let left = deadline.saturating_duration_since(Instant::now());
        let going_on = |printed: &mut Printed| !printed.ended && !done(printed);
        let printed = self.printed.lock().unwrap();
        let (_printed, result) = self.more.wait_timeout_while(printed, left, going_on).unwrap();
        if result.timed_out() { Err("the guest says nothing more") } else { Ok(()) }
    }
}

/// QEMU's control socket.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path, mut runs: impl FnMut() -> bool) -> std::io::Result<Self> {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= deadline || !runs() => return Err(e),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.message()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn message(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> std::io::Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.0.get_mut(), "{request}")?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                return Err(std::io::Error::other(error.to_string()));
            }
            // Events come in between.
            if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            }
        }
    }
}
