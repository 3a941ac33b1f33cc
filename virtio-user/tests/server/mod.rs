//! `qemu-storage-daemon` as a server of one disk.
#![allow(dead_code, reason = "each test uses the part that it needs")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use bdev_conformance::SIZE;
use tempfile::TempDir;
use virtio_user::{VirtioDisk, VirtioOptions};

/// A server of a file in a directory of its own.
pub(crate) struct Server {
    child: Child,
    dir: TempDir,
    format: &'static str,
    options: &'static str,
}

impl Server {
    /// Starts a server of a new image of [`SIZE`] bytes in this format. `options` are those of the
    /// export. `None`, and the test is skipped, without `qemu-storage-daemon`.
    #[track_caller]
    pub(crate) fn new(format: &'static str, options: &'static str) -> Option<Self> {
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

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Kills the server and starts another one.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.serve();
    }

    /// Starts it on the same image.
    pub(crate) fn serve(&mut self) {
        self.child = serve(self.dir.path(), self.format, self.options);
    }

    pub(crate) fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
    }

    pub(crate) fn connect(&self, queues: u16, queue_size: u16) -> Arc<VirtioDisk> {
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
