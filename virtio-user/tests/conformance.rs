//! The suite of bdevs, on disks that `qemu-storage-daemon` serves.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use bdev::{Bdev, Op, Status};
use bdev_conformance::{Driver, Fixture, SIZE, conformance, pattern};
use tempfile::TempDir;
use virtio_user::{VirtioDisk, VirtioOptions};

/// A server of a file in a directory of its own.
struct Server {
    child: Child,
    dir: TempDir,
    format: &'static str,
    options: &'static str,
}

impl Server {
    /// Starts a server of a new image of [`SIZE`] bytes in this format. `options` are those of the
    /// export. `None`, and the test is skipped, without `qemu-storage-daemon`.
    #[track_caller]
    fn new(format: &'static str, options: &'static str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        let make = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg(SIZE.to_string())
            .status();
        if !make.is_ok_and(|status| status.success()) {
            test_report::skipped("qemu-img", "qemu-img cannot make an image");
            return None;
        }
        Some(Self { child: serve(dir.path(), format, options), dir, format, options })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Kills the server and starts another one.
    fn restart(&mut self) {
        self.stop();
        self.child = serve(self.dir.path(), self.format, self.options);
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
    }

    fn connect(&self, queues: u16, queue_size: u16) -> Arc<VirtioDisk> {
        let options = VirtioOptions { name: "d".into(), socket: self.socket(), queues, queue_size };
        VirtioDisk::connect(options).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(dir: &Path, format: &str, options: &str) -> Child {
    let (image, socket) = (dir.join("image"), dir.join("socket"));
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver={format},node-name=disk,discard=unmap,file.driver=file,file.locking=off,\
             file.filename={}",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={}{options}",
            socket.display()
        ))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while !listens(&socket) {
        std::thread::yield_now();
    }
    child
}

/// Whether a process listens on this socket. A connection to find out would be the server's only one.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(path) && line.split(' ').any(|word| word == ACCEPTS))
}

fn disk(format: &'static str, options: &'static str, size: u16) -> Option<Fixture> {
    let server = Server::new(format, options)?;
    Some(Fixture::on(server.connect(4, size), server))
}

conformance! {
    qcow2_512 => disk("qcow2", ",writable=on", 256);
    raw_4096_of_two_queues => disk("raw", ",writable=on,logical-block-size=4096,num-queues=2", 512);
    raw_in_a_ring_of_one_request => disk("raw", ",writable=on", 4);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let Some(server) = Server::new("raw", "") else { return };
    let disk: Arc<dyn Bdev> = server.connect(1, 64);
    assert!(disk.features().read_only && !disk.features().unmap);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.read(0, 512), (vec![0; 512], Status::Ok));
}

/// Requests that were in flight, and those of the time without a server, are done by the next one.
#[test]
fn io_goes_on_with_the_next_server() {
    let Some(mut server) = Server::new("raw", ",writable=on") else { return };
    let connected = server.connect(1, 64);
    let disk: Arc<dyn Bdev> = Arc::clone(&connected) as _;
    let mut driver = Driver::new(&disk, 16);
    let block = |n: u64| pattern(n, 4096);
    for n in 0..8 {
        assert_eq!(driver.write(n * 4096, &block(n)), Status::Ok);
    }
    server.stop();
    while connected.is_connected() {
        std::thread::yield_now();
    }
    for n in 8..16 {
        let mut memory = bdev_conformance::Memory::plain(4096);
        memory.fill(&block(n));
        let write = bdev_conformance::Request::rw(Op::Write, n * 4096, memory);
        let tag = driver.free_tag().unwrap();
        assert!(matches!(driver.submit(tag, write), Ok(None)));
    }
    assert!(driver.visit().is_empty());
    server.child = serve(server.dir.path(), server.format, server.options);
    let mut ended = 0;
    while ended < 8 {
        let done = driver.visit();
        assert!(done.iter().all(|(_, status)| *status == Status::Ok));
        ended += done.len();
    }
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::IoError, "unflushed writes may be lost");
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
    server.restart();
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok, "all writes were flushed");
    for n in 0..16 {
        assert_eq!(driver.read(n * 4096, 4096), (block(n), Status::Ok), "{n}");
    }
}

#[test]
fn what_is_no_server_has_an_error() {
    let dir = TempDir::new().unwrap();
    let errno = |socket: PathBuf, queue_size| {
        let options = VirtioOptions { name: "d".into(), socket, queues: 1, queue_size };
        VirtioDisk::connect(options).unwrap_err().errno()
    };
    assert_eq!(errno(dir.path().join("nope"), 64), libc::ENOENT);
    assert_eq!(errno(dir.path().join("nope"), 65), libc::EINVAL);
    let silent = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let closes = std::thread::spawn(move || drop(silent.accept().unwrap()));
    assert_eq!(errno(dir.path().join("socket"), 64), libc::EIO);
    closes.join().unwrap();
}
