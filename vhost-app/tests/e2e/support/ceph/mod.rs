//! A real Ceph cluster, as `ci/ceph` starts one: its images, and what can happen to it.
//!
//! ```ignore
//! let Some(cluster) = Cluster::find() else { return };   // VHOST_CEPH is its directory
//! let image = cluster.image(16);                         // in MiB; removed when it is dropped
//! let vhost = cluster.start();
//! image.disk(&vhost, "R", json!({}));                    // bdev_rbd_create
//! let stopped = cluster.stop_osd();                      // continued when it is dropped
//! ```
//!
//! Drop what stops a daemon first, then the `vhost` that uses an image, and then the image.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use front_end::{FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, STATUS_OK, Segment};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Vhost, wait_until};

/// A cluster that runs.
#[derive(Clone)]
pub(crate) struct Cluster {
    dir: PathBuf,
}

impl Cluster {
    /// The cluster of `VHOST_CEPH`. `None`, and the skip is reported, without one.
    #[track_caller]
    pub(crate) fn find() -> Option<Self> {
        let Some(dir) = std::env::var_os("VHOST_CEPH").map(PathBuf::from) else {
            test_report::skipped("ceph", "VHOST_CEPH is not set: see ci/test-ceph");
            return None;
        };
        let cluster = Self { dir };
        // A test that was killed may have left it stopped.
        cluster.signal("osd", "CONT");
        Some(cluster)
    }

    pub(crate) fn dir(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    /// The path of a file in its directory.
    pub(crate) fn file(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// The path of client.admin's configuration.
    pub(crate) fn conf(&self) -> String {
        self.file("ceph.conf")
    }

    /// The options that connect to it without a file, as client.admin or client.guest.
    pub(crate) fn options(&self, user: &str) -> Value {
        let keyring = if user == "admin" { "keyring" } else { "client.guest.keyring" };
        let after = |file: &str, key: &str| {
            let text = fs::read_to_string(self.dir.join(file)).unwrap();
            let value = text.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
            value.trim_start_matches([' ', '=']).to_owned()
        };
        json!({"mon_host": after("ceph.conf", "mon host"), "key": after(keyring, "key")})
    }

    /// A `vhost` that finds it, and leaves cores to its daemons.
    pub(crate) fn launch(&self) -> Launch {
        let args = ["--interrupt-mode", "--ceph-dir", self.dir()];
        Launch::new().args(&args).env("CEPH_CONF", &self.conf())
    }

    pub(crate) fn start(&self) -> Vhost {
        self.launch().start()
    }

    fn try_run(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program).args(["--conf", &self.conf()]).args(args).output().unwrap()
    }

    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.try_run(program, args);
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `ceph`, which is to succeed.
    #[track_caller]
    pub(crate) fn ceph(&self, args: &[&str]) -> String {
        self.run("ceph", args)
    }

    /// Runs `rbd`, which is to succeed.
    #[track_caller]
    pub(crate) fn rbd(&self, args: &[&str]) -> String {
        self.run("rbd", args)
    }

    /// Makes an image of zeroes.
    #[track_caller]
    pub(crate) fn image(&self, mib: u64) -> Image {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.image_in(None, &format!("e2e-{}-{number}", std::process::id()), mib)
    }

    /// Makes an image of this name, in a namespace that exists.
    #[track_caller]
    pub(crate) fn image_in(&self, namespace: Option<&str>, name: &str, mib: u64) -> Image {
        let namespace = namespace.map(str::to_owned);
        let image = Image { cluster: self.clone(), namespace, name: name.to_owned() };
        self.rbd(&["create", &image.path(), "--size", &format!("{mib}M")]);
        image
    }

    fn pid(&self, daemon: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{daemon}.pid"))).unwrap().trim().to_owned()
    }

    fn signal(&self, daemon: &str, name: &str) {
        let pid = self.pid(daemon);
        let _ = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
    }

    /// Stops its one OSD: no I/O is answered.
    pub(crate) fn stop_osd(&self) -> StoppedOsd {
        let guard = StoppedOsd(self.clone());
        self.signal("osd", "STOP");
        let tasks = format!("/proc/{}/task", self.pid("osd"));
        wait_until("the OSD has stopped", || {
            let mut threads = fs::read_dir(&tasks).unwrap().flatten();
            threads.all(|thread| {
                // A thread may end just now.
                let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                status.is_empty() || status.contains("State:\tT")
            })
        });
        guard
    }

    /// Kills its one monitor.
    pub(crate) fn kill_mon(&self) -> KilledMon {
        let guard = KilledMon(self.clone());
        let stat = format!("/proc/{}/stat", self.pid("mon"));
        self.signal("mon", "KILL");
        // Nobody may wait for it: then it stays as a zombie.
        wait_until("the monitor has ended", || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
        guard
    }
}

/// An OSD that is stopped until this is dropped.
pub(crate) struct StoppedOsd(Cluster);

impl Drop for StoppedOsd {
    fn drop(&mut self) {
        self.0.signal("osd", "CONT");
    }
}

/// A monitor that is started again when this is dropped.
pub(crate) struct KilledMon(Cluster);

impl Drop for KilledMon {
    fn drop(&mut self) {
        let ci = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("ci/ceph");
        let started = Command::new(ci).arg("start-mon").arg(&self.0.dir).status();
        if !started.is_ok_and(|status| status.success()) {
            eprintln!("{}: the monitor cannot be started", self.0.dir());
        }
    }
}

/// An image of the pool `rbd`, which is removed when this is dropped.
pub(crate) struct Image {
    cluster: Cluster,
    namespace: Option<String>,
    pub(crate) name: String,
}

/// Who has an image's exclusive lock.
pub(crate) struct Lock {
    id: String,
    locker: String,
    /// The client's address.
    pub(crate) address: String,
}

impl Image {
    /// What `rbd` calls it.
    pub(crate) fn path(&self) -> String {
        let namespace = self.namespace.as_ref().map(|name| format!("{name}/"));
        format!("rbd/{}{}", namespace.unwrap_or_default(), self.name)
    }

    /// The parameters of a disk on it, with blocks of 512 bytes and whatever `more` has.
    pub(crate) fn params(&self, name: &str, more: Value) -> Value {
        let mut params = json!({
            "name": name, "pool_name": "rbd", "rbd_name": self.name, "block_size": 512,
        });
        if let Some(namespace) = &self.namespace {
            params["namespace"] = json!(namespace);
        }
        let Value::Object(more) = more else { panic!("parameters are an object") };
        params.as_object_mut().unwrap().extend(more);
        params
    }

    /// Makes a disk of it.
    #[track_caller]
    pub(crate) fn disk(&self, vhost: &Vhost, name: &str, more: Value) {
        assert_eq!(vhost.ok("bdev_rbd_create", self.params(name, more)), name);
    }

    fn listed(&self, args: &[&str]) -> Value {
        let path = self.path();
        let args = [args, &[&path, "--format", "json"]].concat();
        serde_json::from_str(&self.cluster.rbd(&args)).unwrap()
    }

    /// Who has its exclusive lock.
    pub(crate) fn lock(&self) -> Option<Lock> {
        let locks = self.listed(&["lock", "ls"]);
        let text = |key: &str| locks[0][key].as_str().unwrap().to_owned();
        let (id, locker) = (locks.get(0)?, "locker");
        let id = id["id"].as_str().unwrap().to_owned();
        Some(Lock { id, locker: text(locker), address: text("address") })
    }

    /// Takes the lock from its owner, which the cluster then blocklists.
    pub(crate) fn break_lock(&self) {
        let Lock { id, locker, .. } = self.lock().expect("somebody has the lock");
        self.cluster.rbd(&["lock", "rm", &self.path(), &id, &locker]);
    }

    /// The addresses of the clients that have it open.
    pub(crate) fn watchers(&self) -> Vec<String> {
        let status = self.listed(&["status"]);
        let watchers = status["watchers"].as_array().unwrap().iter();
        watchers.map(|watcher| watcher["address"].as_str().unwrap().to_owned()).collect()
    }

    /// Gives it another size, as another host would.
    pub(crate) fn resize(&self, mib: u64) {
        let size = format!("{mib}M");
        self.cluster.rbd(&["resize", "--no-progress", &self.path(), "--size", &size]);
    }

    /// Whether each of these blocks is full of this byte, in the cluster.
    #[track_caller]
    pub(crate) fn assert_holds(&self, blocks: Range<usize>, byte: u8) {
        let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let to = file.to_str().unwrap();
        // `rbd` creates the file itself.
        fs::remove_file(&file).unwrap();
        self.cluster.rbd(&["export", "--no-progress", &self.path(), to]);
        let bytes = fs::read(&file).unwrap();
        for block in blocks {
            let found = &bytes[block * BLOCK..(block + 1) * BLOCK];
            assert!(found == [byte; BLOCK], "block {block} has {:#x}", found[0]);
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A killed client would keep it for 30 s.
        for address in self.watchers() {
            self.cluster.try_run("ceph", &["osd", "blocklist", "add", &address, "60"]);
        }
        let removed = self.cluster.try_run("rbd", &["rm", "--no-progress", &self.path()]);
        if !removed.status.success() {
            eprintln!("{}: cannot be removed: {removed:?}", self.path());
        }
    }
}

/// Waits until a disk has this `state`.
pub(crate) fn wait_for_state(vhost: &Vhost, name: &str, state: &str) {
    wait_until(&format!("{name} is {state}"), || {
        vhost.bdev(name)["driver_specific"]["rbd"]["state"] == state
    });
}

/// Bytes of a request.
pub(crate) const BLOCK: usize = 4096;
const SECTORS: u64 = BLOCK as u64 / 512;

/// A guest in small, with one queue, whose blocks are full of one byte each.
pub(crate) struct Driver {
    pub(crate) front_end: FrontEnd,
    queue: Queue,
    buffers: Vec<Segment>,
}

impl Driver {
    pub(crate) fn start(socket: &Path) -> Self {
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default()).unwrap();
        let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
        let buffers = (0..32).map(|_| ram.alloc(4096, 4096).unwrap()).collect();
        Self { front_end, queue, buffers }
    }

    /// Submits a write of this byte to each of these blocks.
    pub(crate) fn give(&mut self, blocks: Range<usize>, byte: u8) {
        for (block, buffer) in blocks.zip(&self.buffers) {
            self.queue.ring().ram().write(buffer.gpa, &[byte; BLOCK]).unwrap();
            let sector = block as u64 * SECTORS;
            self.queue.submit(&Request::write(sector, &[*buffer])).unwrap();
        }
        self.queue.kick().unwrap();
    }

    /// Waits until all that was submitted has come back: the statuses.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let count = self.queue.in_flight();
        (0..count).map(|_| self.queue.wait().unwrap().status).collect()
    }

    /// Writes this byte to each of these blocks.
    #[track_caller]
    pub(crate) fn write(&mut self, blocks: Range<usize>, byte: u8) {
        let count = blocks.len();
        self.give(blocks, byte);
        assert_eq!(self.take(), vec![STATUS_OK; count]);
    }

    /// Reads a block: its first byte, which all others are to equal. `None` if it fails.
    pub(crate) fn try_read(&mut self, block: usize) -> Option<u8> {
        let buffer = self.buffers[0];
        let done = self.queue.run(&Request::read(block as u64 * SECTORS, &[buffer])).unwrap();
        let mut bytes = [0; BLOCK];
        self.queue.ring().ram().read(buffer.gpa, &mut bytes).unwrap();
        assert!(done.status != STATUS_OK || bytes == [bytes[0]; BLOCK]);
        (done.status == STATUS_OK).then_some(bytes[0])
    }

    /// The same, when it is to succeed.
    #[track_caller]
    pub(crate) fn read(&mut self, block: usize) -> u8 {
        self.try_read(block).expect("the read succeeds")
    }

    /// Flushes: writes are in the cluster then, unless the status says otherwise.
    pub(crate) fn try_flush(&mut self) -> u8 {
        self.queue.run(&Request::flush()).unwrap().status
    }

    /// Flushes.
    #[track_caller]
    pub(crate) fn flush(&mut self) {
        assert_eq!(self.try_flush(), STATUS_OK);
    }
}
