//! A block device that holds back what one process submits to it.
//!
//! It is a loop device. The kernel's block throttling holds the I/O of a control group to a byte per
//! second, which means all of it, and is then told to let it go. What is held stays held when the
//! process has ended. I/O of processes that are not in the group overtakes it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{major, minor};
use tempfile::TempDir;

use crate::servers::{Error, Result};

/// Bytes of the device; the last two blocks are [`SlowDisk::settle`]'s.
const BYTES: u64 = 8 << 20;
const BLOCK: u64 = 4096;

/// The device and the control group.
#[derive(Debug)]
pub struct SlowDisk {
    device: PathBuf,
    /// Its number as control groups write it.
    number: String,
    group: Group,
    /// With its last close the device goes.
    _open: File,
    _backing: TempDir,
}

#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// Of control groups' version 1.
    old: bool,
}

impl SlowDisk {
    /// Makes one.
    ///
    /// # Errors
    /// Why this host has none: no rights, no loop devices, no block throttling.
    pub fn new() -> std::result::Result<Self, String> {
        let group = Group::new()?;
        let backing =
            tempfile::tempdir().map_err(|e| format!("cannot create a temporary directory: {e}"))?;
        let file = backing.path().join("disk");
        let made = File::create(&file).and_then(|file| file.set_len(BYTES));
        made.map_err(|e| format!("cannot create the file of the loop device: {e}"))?;
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(&file))?;
        let device = PathBuf::from(device.trim());
        let open = File::open(&device);
        run(Command::new("losetup").arg("--detach").arg(&device))?;
        let open = open.map_err(|e| format!("{}: {e}", device.display()))?;
        let number = open.metadata().map_err(|e| e.to_string())?.rdev();
        let number = format!("{}:{}", major(number), minor(number));
        let disk = Self { device, number, group, _open: open, _backing: backing };
        disk.hold().and_then(|()| disk.release()).map_err(|e| e.to_string())?;
        Ok(disk)
    }

    /// Its name.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// From now on, what the process submits can be held.
    ///
    /// # Errors
    /// It is gone.
    pub fn enter(&self, pid: u32) -> Result<()> {
        self.group.write("cgroup.procs", &pid.to_string())
    }

    /// Holds what processes of the group submit from now on.
    ///
    /// # Errors
    /// The system refuses.
    pub fn hold(&self) -> Result<()> {
        self.limit("1", "1")
    }

    /// Lets everything go.
    ///
    /// # Errors
    /// The system refuses.
    pub fn release(&self) -> Result<()> {
        self.limit("0", "max")
    }

    fn limit(&self, old: &str, new: &str) -> Result<()> {
        if !self.group.old {
            return self.group.write("io.max", &format!("{} rbps={new} wbps={new}", self.number));
        }
        for kind in ["read", "write"] {
            let name = format!("blkio.throttle.{kind}_bps_device");
            self.group.write(&name, &format!("{} {old}", self.number))?;
        }
        Ok(())
    }

    /// Returns when everything that was held has ended: the kernel keeps the order of a group's
    /// reads, and of its writes, up to the file behind the device.
    ///
    /// # Errors
    /// The device fails.
    pub fn settle(&self) -> Result<()> {
        let script = "echo $$ > \"$1\"/cgroup.procs
            dd if=/dev/zero of=\"$2\" bs=4096 seek=$3 count=1 oflag=direct conv=notrunc,fsync status=none &&
            exec dd if=\"$2\" of=/dev/null bs=4096 skip=$(($3 + 1)) count=1 iflag=direct status=none";
        let mut command = Command::new("sh");
        command.args(["-ec", script, "sh"]).arg(&self.group.path).arg(&self.device);
        command.arg((BYTES / BLOCK - 2).to_string());
        let settled = run(&mut command).map_err(io::Error::other);
        settled.map(drop).map_err(Error::system("cannot wait for the slow disk"))
    }
}

impl Group {
    fn new() -> std::result::Result<Self, String> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("late-io-{}-{number}", std::process::id());
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
        let mounted = |wanted: &dyn Fn(&str, &str, &Path) -> bool| {
            mounts.lines().find_map(|line| {
                let mut words = line.split(' ').skip(1);
                let at = PathBuf::from(words.next()?);
                let (kind, options) = (words.next()?, words.next()?);
                wanted(kind, options, &at).then_some(at)
            })
        };
        let is_old = |kind: &str, options: &str, _: &Path| {
            kind == "cgroup" && options.split(',').any(|option| option == "blkio")
        };
        let is_new = |kind: &str, _: &str, at: &Path| {
            let has_io = || {
                let controllers = fs::read_to_string(at.join("cgroup.controllers"));
                controllers.is_ok_and(|c| c.split_whitespace().any(|c| c == "io"))
            };
            kind == "cgroup2" && has_io()
        };
        let (at, old) = match (mounted(&is_old), mounted(&is_new)) {
            (Some(at), _) => (at, true),
            (None, Some(at)) => (at, false),
            (None, None) => return Err("no control groups for block I/O".into()),
        };
        if !old {
            let enabled = fs::write(at.join("cgroup.subtree_control"), "+io");
            enabled.map_err(|e| format!("cannot enable the io controller: {e}"))?;
        }
        let path = at.join(name);
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path, old })
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, text).map_err(Error::system(format!("{}: {text}", path.display())))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Fails while a process is in it.
        drop(fs::remove_dir(&self.path));
    }
}

/// Runs a command; its output, or why it failed.
fn run(command: &mut Command) -> std::result::Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(format!("{command:?}: {}", text(output.stderr)))
    }
}
