//! `nbdkit` as a server of one disk in a file.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::harness::wait_until;

/// A server of an image in a directory of its own.
pub(crate) struct Nbdkit {
    child: Child,
    dir: TempDir,
    /// The TCP port; `None`: it listens on a Unix socket.
    port: Option<u16>,
}

impl Nbdkit {
    /// Starts a server on a Unix socket.
    pub(crate) fn unix(bytes: u64) -> Self {
        Self::start(bytes, None)
    }

    /// Starts a server on a TCP port of the loopback interface.
    pub(crate) fn tcp(bytes: u64) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self::start(bytes, Some(free.port()))
    }

    fn start(bytes: u64, port: Option<u16>) -> Self {
        let dir = TempDir::new().unwrap();
        let image = std::fs::File::create(dir.path().join("image")).unwrap();
        image.set_len(bytes).unwrap();
        Self { child: serve(&dir, port), dir, port }
    }

    /// The address of its export.
    pub(crate) fn uri(&self) -> String {
        match self.port {
            Some(port) => format!("nbd://127.0.0.1:{port}/disk"),
            None => format!("nbd+unix:///disk?socket={}", socket(&self.dir).display()),
        }
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, on the same image and address.
    pub(crate) fn serve_again(&mut self) {
        self.child = serve(&self.dir, self.port);
    }

    /// Stops or continues its process.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(dir: &TempDir) -> PathBuf {
    dir.path().join("socket")
}

fn serve(dir: &TempDir, port: Option<u16>) -> Child {
    let socket = socket(dir);
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("nbdkit");
    command.arg("-f").stdin(Stdio::null());
    match port {
        Some(port) => command.args(["-i", "127.0.0.1", "-p", &port.to_string()]),
        None => command.arg("-U").arg(&socket),
    };
    let child = command.arg("file").arg(dir.path().join("image")).spawn();
    let child = child.expect("nbdkit, which ci/setup installs");
    wait_until("nbdkit listens", || match port {
        Some(port) => TcpStream::connect(("127.0.0.1", port)).is_ok(),
        None => std::os::unix::net::UnixStream::connect(&socket).is_ok(),
    });
    child
}
