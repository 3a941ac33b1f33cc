//! Servers for tests: `nbdkit`, `qemu-nbd` and `qemu-storage-daemon`, each on a Unix socket in a
//! directory of its own.
#![allow(dead_code, reason = "each test uses the part that it needs")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use bdev_conformance::SIZE;
use nbd::{NbdDisk, NbdOptions, NbdUri};
use tempfile::TempDir;

/// A server's program and its arguments. `SOCKET` and `IMAGE` in them are paths in the server's
/// directory.
#[derive(Clone, Debug)]
pub(crate) struct Program(pub(crate) Vec<String>);

impl Program {
    fn new(words: &[&str]) -> Self {
        Self(words.iter().map(|word| (*word).to_owned()).collect())
    }

    /// A disk in memory. `args`: filters and other options; `parameters`: of the filters.
    pub(crate) fn nbdkit(args: &[&str], parameters: &[&str]) -> Self {
        let size = SIZE.to_string();
        let fixed = ["nbdkit", "-f", "-U", "SOCKET"];
        Self::new(&[&fixed[..], args, &["memory", &size], parameters].concat())
    }

    /// A disk in a file, which outlives the server.
    pub(crate) fn nbdkit_file(args: &[&str], parameters: &[&str]) -> Self {
        let fixed = ["nbdkit", "-f", "-U", "SOCKET"];
        Self::new(&[&fixed[..], args, &["file", "IMAGE"], parameters].concat())
    }

    pub(crate) fn qemu_nbd(args: &[&str]) -> Self {
        let fixed = ["qemu-nbd", "-k", "SOCKET", "-f", "raw", "-t", "--discard=unmap"];
        Self::new(&[&fixed[..], args, &["IMAGE"]].concat())
    }

    pub(crate) fn storage_daemon() -> Self {
        Self::new(&[
            "qemu-storage-daemon",
            "--blockdev",
            "driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename=IMAGE",
            "--nbd-server",
            "addr.type=unix,addr.path=SOCKET,max-connections=0",
            "--export",
            "nbd,id=e,node-name=disk,name=disk,writable=on",
        ])
    }
}

/// A server that is killed when it is dropped.
pub(crate) struct Server {
    child: Option<Child>,
    dir: TempDir,
    program: Program,
}

impl Server {
    /// Starts a server. `None`, and the test is skipped, if it is not installed.
    #[track_caller]
    pub(crate) fn new(program: Program) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let image = std::fs::File::create(dir.path().join("image")).unwrap();
        image.set_len(SIZE).unwrap();
        let name = &program.0[0];
        if Command::new(name).arg("--version").stdout(Stdio::null()).status().is_err() {
            test_report::skipped(name, "it is not installed: see ci/setup");
            return None;
        }
        let mut server = Self { child: None, dir, program };
        server.start();
        Some(server)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the program, and waits until it listens.
    pub(crate) fn start(&mut self) {
        let path = |name: &str| self.dir.path().join(name).to_str().unwrap().to_owned();
        let (socket, image) = (path("socket"), path("image"));
        let words = self.program.0.iter();
        let words: Vec<_> =
            words.map(|word| word.replace("SOCKET", &socket).replace("IMAGE", &image)).collect();
        let _ = std::fs::remove_file(&socket);
        let child = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).spawn().unwrap();
        self.child = Some(child);
        while !listens(Path::new(&socket)) {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert_eq!(ended, None, "{:?} has ended", self.program);
            std::thread::yield_now();
        }
    }

    /// Kills the program.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends a signal to the program, by its name.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.as_ref().unwrap().id().to_string();
        let done = Command::new("kill").args(["-s", name, &id]).status().unwrap();
        assert!(done.success());
    }

    /// Whether the program has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Waits until the program has ended by itself.
    pub(crate) fn wait_for_its_end(mut self) {
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
    }

    pub(crate) fn connect(&self, export: &str) -> Arc<NbdDisk> {
        NbdDisk::connect(options(&self.socket(), export)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Options of a disk that waits for its server for ever, with one connection for each of three
/// rings.
pub(crate) fn options(socket: &Path, export: &str) -> NbdOptions {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    NbdOptions {
        name: "d".into(),
        uri: NbdUri::parse(&uri).unwrap(),
        block_size: None,
        readonly: false,
        uuid: None,
        reconnect_delay: None,
        reconnect_interval: std::time::Duration::from_millis(1),
        connections: 3,
    }
}

/// Whether a process listens on this socket.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(path) && line.split(' ').any(|word| word == ACCEPTS))
}
