//! A qemu-storage-daemon that exports one disk, and ends with the test.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use front_end::{FrontEnd, GuestRam, Options};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A disk of 64 MiB, all zero, behind a daemon.
pub(crate) struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    /// Starts it with `queues` queues.
    pub(crate) fn start(queues: u16) -> Self {
        Self::start_with(queues, "writable=on")
    }

    /// Starts it with `queues` queues and another option of its export.
    pub(crate) fn start_with(queues: u16, option: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        Self { child: spawn(dir.path(), queues, option), dir }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// The file behind the disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Stops it where it is, as a server that hangs.
    pub(crate) fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).unwrap();
    }

    /// Ends it, whatever it is doing.
    pub(crate) fn kill(&self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed()).unwrap()
    }

    pub(crate) fn connect(&self, ram: &Arc<GuestRam>, options: Options) -> FrontEnd {
        FrontEnd::connect(&self.socket(), ram.clone(), options).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Its socket listens before it runs, so nobody has to wait for it.
fn spawn(dir: &Path, queues: u16, option: &str) -> Child {
    let listener = UnixListener::bind(dir.join("sock")).unwrap();
    let disk = dir.join("disk");
    let disk = format!("driver=file,node-name=disk,discard=unmap,filename={}", disk.display());
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,{option},num-queues={queues},\
         addr.type=fd,addr.str=0"
    );
    Command::new("qemu-storage-daemon")
        .args(["--blockdev", &disk, "--export", &export])
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .expect("qemu-storage-daemon is on the PATH: ci/setup installs it (qemu-utils)")
}
