//! Boots a real Linux guest in QEMU, types at its console, and talks to its QEMU.
//!
//! ```ignore
//! let mut guest = Guest::boot(GuestOptions::new(&vhost.socket("vhost.0")));
//! assert_eq!(guest.disk("vda").number("queues"), 1);
//! guest.ok("payload 0 16 >/dev/vda");
//! guest.start_io("vda", 0);               // writes and verifies for ever, eight at a time
//! guest.io_goes_on("vda", 0);             // two more passes, from here on
//! guest.qmp("stop", json!({}));
//! guest.unplug("d0");                     // the first disk's device
//! guest.kill9();
//! ```
//!
//! The kernel and the image come from `ci/guest-image` by way of `VHOST_KERNEL` and `VHOST_INITRD`;
//! `VHOST_ACCEL` is `kvm` or `tcg`. What the guest understands is in `ci/guest-init`, its machine
//! in `guest_machine` of `ci/lib.sh`. `ci/test-e2e` sets the three; without them this finds what an
//! earlier run of it left.
//!
//! A guest that goes away kills its QEMU by the process's id. [`LIMIT`] ends waits for what never
//! comes, with the end of the console; nothing here asserts on time. [`kernel_panics`] counts guests
//! that have died of themselves.

pub(crate) mod boot;
pub(crate) mod deaths;
mod qmp;

use std::collections::HashMap;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use qmp::Qmp;
use serde_json::{Value, json};
use tempfile::TempDir;

/// After which a wait is given up. A guest boots in 5 s on an idle machine under TCG.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// VIRTIO_F_RING_PACKED.
pub(crate) const RING_PACKED: usize = 34;

/// Words for the kernel of each guest. Kernel messages would be printed into the middle of lines:
/// only the last words are. Under TCG on a busy machine the kernel takes a timer that is late for a
/// broken one.
const KERNEL_WORDS: &str = "console=ttyS0 panic=-1 quiet loglevel=1 no_timer_check rdinit=/init";

/// What a kernel says that dies.
const KERNEL_PANIC: &str = "Kernel panic - ";

/// Consoles that have said it.
static KERNEL_PANICS: AtomicUsize = AtomicUsize::new(0);

/// How many guests' kernels have died so far, of those that were dropped and those that are waited for.
pub(crate) fn kernel_panics() -> usize {
    KERNEL_PANICS.load(Ordering::Relaxed)
}

/// A guest's machine.
pub(crate) struct GuestOptions {
    /// The vhost-user sockets of its disks, `vda` first, each with its number of queues.
    pub(crate) sockets: Vec<(PathBuf, u16)>,
    /// The vhost-user socket of its SCSI controller, whose id in QEMU is `scsi`.
    pub(crate) scsi: Option<PathBuf>,
    /// More properties of the SCSI controller.
    pub(crate) scsi_properties: &'static str,
    /// Seconds after which QEMU connects again to a socket that was closed; `None` for never.
    pub(crate) reconnect: Option<u32>,
    /// Whether a reset of the machine boots it again instead of ending QEMU.
    pub(crate) reboots: bool,
    /// Virtual CPUs. A disk has as many queues as it was given, but no more than these.
    pub(crate) cpus: u32,
    /// Its memory.
    pub(crate) memory_mib: u32,
    /// Slots for memory that is plugged in later.
    pub(crate) memory_slots: u32,
    /// What `ci/guest-init` is to do. `None`: the firmware boots what is on a disk.
    pub(crate) job: Option<&'static str>,
    /// More words for the kernel.
    pub(crate) kernel_words: &'static str,
    /// More properties of each disk.
    pub(crate) disk_properties: &'static str,
    /// More arguments for QEMU.
    pub(crate) arguments: &'static [&'static str],
}

/// An environment variable that is set to something.
fn given(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// What the guest's processors are made of: `kvm` or `tcg`.
pub(crate) fn accel() -> String {
    given("VHOST_ACCEL").unwrap_or_else(|| "tcg".into())
}

/// The major version of QEMU.
pub(crate) fn qemu_major() -> u32 {
    let output = Command::new("qemu-system-x86_64").arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let version = text.split_once("version ").expect("it says its version").1;
    version.split('.').next().unwrap().parse().unwrap()
}

impl GuestOptions {
    /// A guest with one disk of one queue, that waits for commands.
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            sockets: vec![(socket.to_owned(), 1)],
            scsi: None,
            scsi_properties: "",
            reconnect: None,
            reboots: false,
            cpus: 1,
            memory_mib: 256,
            memory_slots: 0,
            job: Some("hold"),
            kernel_words: "",
            disk_properties: "",
            arguments: &[],
        }
    }

    /// The same guest, but its disks are the targets of a SCSI controller.
    pub(crate) fn scsi(socket: &Path) -> Self {
        Self { sockets: vec![], scsi: Some(socket.to_owned()), ..Self::new(socket) }
    }

    /// Adds a disk.
    pub(crate) fn disk(mut self, socket: &Path, queues: u16) -> Self {
        self.sockets.push((socket.to_owned(), queues));
        self
    }

    fn command(&self, qmp: &Path) -> Command {
        let accel = accel();
        let memory = self.memory_mib;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-monitor", "none"]);
        qemu.args(["-accel", &accel, "-machine", "q35", "-smp", &self.cpus.to_string()]);
        let room = match self.memory_slots {
            0 => String::new(),
            slots => format!(",slots={slots},maxmem=4G"),
        };
        qemu.args(["-m", &format!("{memory}M{room}"), "-numa", "node,memdev=m"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=m,size={memory}M,share=on")]);
        if let Some(job) = self.job {
            let (kernel, initrd) = kernel_and_initrd();
            qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
            qemu.args(["-append", &format!("{KERNEL_WORDS} {} job={job}", self.kernel_words)]);
        }
        qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        if !self.reboots {
            qemu.arg("-no-reboot");
        }
        let reconnect = self.reconnect.map_or_else(String::new, |s| format!(",reconnect={s}"));
        for (n, (socket, queues)) in self.sockets.iter().enumerate() {
            let socket = socket.display();
            qemu.args(["-chardev", &format!("socket,id=c{n},path={socket}{reconnect}")]);
            let device = format!("vhost-user-blk-pci,id=d{n},chardev=c{n},num-queues={queues}");
            qemu.args(["-device", &format!("{device}{}", self.disk_properties)]);
        }
        if let Some(socket) = &self.scsi {
            qemu.args(["-chardev", &format!("socket,id=scsi,path={}", socket.display())]);
            let device = "vhost-user-scsi-pci,id=scsi,chardev=scsi";
            qemu.args(["-device", &format!("{device}{}", self.scsi_properties)]);
        }
        qemu.args(self.arguments);
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped());
        qemu
    }
}

/// The kernel and the initramfs of the test guest.
fn kernel_and_initrd() -> (PathBuf, PathBuf) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let kernel = given("VHOST_KERNEL").map_or_else(newest_kernel, PathBuf::from);
    let initrd = given("VHOST_INITRD").map(PathBuf::from);
    (kernel, initrd.unwrap_or_else(|| repository.join("target/ci/initrd")))
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
    /// The line of the console from which on a load has to go well.
    loads: HashMap<String, usize>,
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
        Self { qemu, input, console, seen: 0, loads: HashMap::new(), qmp, _dir: dir }
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

    /// The name of the disk that is target `target` of the SCSI controller, when it is there.
    #[track_caller]
    pub(crate) fn scsi_disk(&mut self, target: u32) -> String {
        self.ok(&format!("scsi_disk {target}"))
    }

    /// Waits until the guest has dropped the disk of a target.
    #[track_caller]
    pub(crate) fn no_scsi_disk(&mut self, target: u32) {
        self.ok(&format!("no_scsi_disk {target}"));
    }

    /// Whether a disk's driver and device have agreed on a virtio feature.
    #[track_caller]
    pub(crate) fn has_feature(&mut self, disk: &str, bit: usize) -> bool {
        let column = bit + 1;
        self.ok(&format!("cut -c {column} /sys/block/{disk}/device/features")) == "1"
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
        self.loads.insert(format!("{disk} {at_mib}"), self.console.len());
        self.ok(&format!("io {disk} {at_mib} 1 &"));
        self.io_goes_on(disk, at_mib);
    }

    /// Waits for two more passes of [`Guest::start_io`]: the second began after this call.
    #[track_caller]
    pub(crate) fn io_goes_on(&mut self, disk: &str, at_mib: u32) {
        self.skip_lines();
        let passed = format!(" {disk} {at_mib}");
        for _ in 0..2 {
            self.wait_for_io(disk, at_mib, |line| {
                line.starts_with("GUEST: pass ") && line.ends_with(&passed)
            });
        }
    }

    /// Ends [`Guest::start_io`], which verifies all that it has written.
    #[track_caller]
    pub(crate) fn finish_io(&mut self, disk: &str, at_mib: u32) {
        let from = self.console.len();
        self.ok(&format!("touch /tmp/stop.{disk}"));
        // The load may end before the command does.
        let answered = std::mem::replace(&mut self.seen, from);
        let done = format!("GUEST: io {disk} {at_mib} done");
        self.wait_for_io(disk, at_mib, |line| line == done);
        self.seen = self.seen.max(answered);
        self.ok(&format!("rm /tmp/stop.{disk}"));
    }

    /// Waits for a line of a load's. That it has failed, then or before, fails the test.
    #[track_caller]
    fn wait_for_io(&mut self, disk: &str, at_mib: u32, found: impl Fn(&str) -> bool) {
        let (load, failed) =
            (format!("{disk} {at_mib}"), format!("GUEST: io {disk} {at_mib} failed"));
        let from = self.loads.get(&load).copied().unwrap_or_default();
        let before = self.console.lines(from, self.seen);
        if let Some(line) = before.iter().find(|line| line.starts_with(&failed)) {
            panic!("{line}");
        }
        let verdict = self.wait_for(&format!("GUEST: … {load}"), |line| {
            let fails = || line.starts_with(&failed).then(|| Err(line.to_owned()));
            if found(line) { Some(Ok(())) } else { fails() }
        });
        verdict.unwrap_or_else(|e| panic!("{e}"));
    }

    /// Waits until [`Guest::start_io`] on this disk has got an I/O error.
    #[track_caller]
    pub(crate) fn io_fails(&mut self, disk: &str) {
        let line = self.wait_line(&format!("io {disk} "));
        assert!(line.contains(" failed: writing") || line.contains(" failed: reading"), "{line}");
    }

    /// Executes a command of QEMU's; what it returns.
    #[track_caller]
    pub(crate) fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(result) => result,
            Err(e) => panic!("{command}: {e}; the console:\n{}", self.tail()),
        }
    }

    /// Sends a command of QEMU's whose answer may take long; [`Guest::qmp_answer`] waits for it.
    pub(crate) fn qmp_send(&mut self, command: &str, arguments: Value) {
        self.qmp.send(command, arguments).unwrap();
    }

    /// Whether what was sent has been answered by now.
    pub(crate) fn qmp_has_answer(&mut self) -> bool {
        self.qmp.has_answer().unwrap()
    }

    /// The answer to what was sent.
    #[track_caller]
    pub(crate) fn qmp_answer(&mut self) -> Value {
        self.qmp.answer().unwrap_or_else(|e| panic!("{e}; the console:\n{}", self.tail()))
    }

    /// Waits for the next of QEMU's events for whose name and data `found` gives something. Those
    /// that came before it are forgotten.
    #[track_caller]
    pub(crate) fn wait_event<R>(
        &mut self,
        what: &str,
        found: impl Fn(&str, &Value) -> Option<R>,
    ) -> R {
        loop {
            match self.qmp.event() {
                Ok((name, data)) => {
                    if let Some(result) = found(&name, &data) {
                        return result;
                    }
                }
                Err(e) => panic!("{e}, no event of {what}; the console:\n{}", self.tail()),
            }
        }
    }

    /// Asks the guest for a device, again whenever it says no, and waits until QEMU has it.
    #[track_caller]
    pub(crate) fn unplug(&mut self, device: &str) {
        for _ in 0..100 {
            self.qmp("device_del", json!({"id": device}));
            let gone = self.wait_event(&format!("{device}'s end"), |name, data| {
                let its = data["device"] == device;
                let ends = name == "DEVICE_DELETED" || name == "MEM_UNPLUG_ERROR";
                (its && ends).then(|| name == "DEVICE_DELETED")
            });
            if gone {
                return;
            }
        }
        panic!("the guest keeps {device}; the console:\n{}", self.tail());
    }

    /// QEMU's word for what the machine does: `running`, `paused`, `shutdown`, ….
    #[track_caller]
    pub(crate) fn status(&mut self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Moves its state into a file, which ends its QEMU.
    #[track_caller]
    pub(crate) fn save(mut self, file: &Path) {
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.qmp("migrate-set-capabilities", events);
        self.qmp("migrate", json!({"uri": format!("exec:cat >{}", file.display())}));
        self.wait_migrated();
        self.qmp("quit", json!({}));
        assert!(self.qemu.wait().unwrap().success());
    }

    /// Starts a guest that goes on from what [`Guest::save`] has written.
    #[track_caller]
    pub(crate) fn restore(options: GuestOptions, file: &Path) -> Self {
        let mut guest = Self::start(GuestOptions { arguments: &["-incoming", "defer"], ..options });
        guest.qmp("migrate-incoming", json!({"uri": format!("exec:cat {}", file.display())}));
        guest.wait_event("the guest's start", |name, _| (name == "RESUME").then_some(()));
        guest
    }

    /// Waits for the end of a migration, whose events are on.
    #[track_caller]
    fn wait_migrated(&mut self) {
        let status = self.wait_event("the migration's end", |name, data| {
            let status = data["status"].as_str()?;
            let ends = name == "MIGRATION" && ["completed", "failed"].contains(&status);
            ends.then(|| status.to_owned())
        });
        assert_eq!(status, "completed", "{}", self.qmp("query-migrate", json!({})));
    }

    /// Goes on in `next`, which waits for a migration; both QEMUs reach `socket`. Does `meanwhile`
    /// once it is under way.
    #[track_caller]
    pub(crate) fn migrate(
        mut self,
        mut next: Self,
        socket: &Path,
        meanwhile: impl FnOnce(),
    ) -> Self {
        let uri = json!({"uri": format!("unix:{}", socket.display())});
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.qmp("migrate-set-capabilities", events);
        next.qmp("migrate-incoming", uri.clone());
        self.qmp("migrate", uri);
        meanwhile();
        self.wait_migrated();
        next.wait_event("the guest's start", |name, _| (name == "RESUME").then_some(()));
        self.qmp("quit", json!({}));
        assert!(self.qemu.wait().unwrap().success());
        next
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

    /// The console's last lines, after the one in which the kernel has said why it dies: what it
    /// calls at that time may take many.
    fn tail(&self) -> String {
        let lines = self.console.lines(0, self.console.len());
        let (before, tail) = lines.split_at(lines.len().saturating_sub(40));
        let died = before.iter().find(|line| line.contains(KERNEL_PANIC));
        died.into_iter().chain(tail).map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        // All that it has said is read now.
        let _ = self.console.wait_end(Instant::now() + LIMIT);
        if thread::panicking() {
            eprintln!("---- the end of a guest's console ----\n{}\n----", self.tail());
        }
    }
}

/// How often a test does what it does: `VHOST_CYCLES`, or as often as CI has the time for.
pub(crate) fn cycles(in_ci: usize) -> usize {
    env::var("VHOST_CYCLES").map_or(in_ci, |n| n.parse().unwrap())
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
            let mut died = false;
            while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if !died && text.contains(KERNEL_PANIC) {
                    died = true;
                    KERNEL_PANICS.fetch_add(1, Ordering::Relaxed);
                }
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
