//! `qemu-storage-daemon` as a vhost-user server of one disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::harness::wait_until;

/// A server of an image in a directory of its own.
pub(crate) struct StorageDaemon {
    child: Child,
    dir: TempDir,
    format: &'static str,
}

impl StorageDaemon {
    /// Starts a server of a new image in this format. A server of qcow2 that is killed loses what was
    /// not flushed.
    pub(crate) fn start(format: &'static str, bytes: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(dir.path().join("image"))
            .arg(bytes.to_string())
            .status();
        assert!(made.unwrap().success());
        Self { child: serve(dir.path(), format), dir, format }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
    }

    /// Sets the size of a raw image. The server does not run.
    pub(crate) fn resize(&self, bytes: u64) {
        let image = File::options().write(true).open(self.dir.path().join("image"));
        image.unwrap().set_len(bytes).unwrap();
    }

    /// Starts it again, on the same image and socket.
    pub(crate) fn serve_again(&mut self) {
        self.child = serve(self.dir.path(), self.format);
    }

    /// Stops or continues its process.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(dir: &Path, format: &str) -> Child {
    let (image, socket) = (dir.join("image"), dir.join("socket"));
    let (image, path) = (image.display(), socket.display());
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver={format},node-name=d,discard=unmap,file.driver=file,file.filename={image}"
        ))
        .arg("--export")
        .arg(format!("vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={path}"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the storage daemon listens", || listens(&socket));
    child
}

/// Whether a process listens on this socket. A connection to find out would be the server's only one.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(path) && line.split(' ').any(|word| word == ACCEPTS))
}
