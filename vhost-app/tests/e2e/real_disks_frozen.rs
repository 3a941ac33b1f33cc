//! A file system that is frozen, as backups and snapshots of LVM do it: writes on it wait for the
//! thaw, and nobody else does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::disks;
use crate::support::harness::{Vhost, wait_until};
use crate::support::real_disks::{BLOCK, Begun, DISK_BYTES, Flavour, Guest, Io, Neighbours};

/// ext4 on a loop device, mounted for this test.
struct Mounted {
    dir: TempDir,
    frozen: bool,
}

/// Runs a command that needs rights. `None`, and the test is skipped, if it fails.
#[track_caller]
fn run(command: &mut Command) -> Option<()> {
    let output = match command.output() {
        Ok(output) if output.status.success() => return Some(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(e) => e.to_string(),
    };
    test_report::skipped("block-device", &format!("{command:?}: {output}"));
    None
}

impl Mounted {
    #[track_caller]
    fn new() -> Option<Self> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image.path()))?;
        let dir = TempDir::new().unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(image.path()).arg(dir.path()))?;
        Some(Self { dir, frozen: false })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn set_frozen(&mut self, frozen: bool) {
        let how = if frozen { "--freeze" } else { "--unfreeze" };
        let mut command = Command::new("fsfreeze");
        assert!(command.arg(how).arg(self.dir.path()).status().unwrap().success());
        self.frozen = frozen;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Or whoever waits for it could never be ended.
        if self.frozen {
            self.set_frozen(false);
        }
        let unmounted = Command::new("umount").arg("--lazy").arg(self.dir.path()).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

/// A disk "F" on a file of this file system, and neighbours elsewhere.
struct Scene {
    // Dropped first: the process cannot end before the thaw.
    mounted: Mounted,
    vhost: Vhost,
    neighbours: Neighbours,
    guest: Guest,
}

impl Scene {
    #[track_caller]
    fn new(flavour: Flavour) -> Option<Self> {
        let mounted = Mounted::new()?;
        let file = fs::File::create(mounted.path()).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let vhost = Vhost::start(&[]);
        let neighbours = Neighbours::new(&vhost, flavour);
        flavour.create(&vhost, "F", &mounted.path());
        let mut guest = Guest::on(&vhost, "F");
        guest.goes_on();
        for block in 0..8 {
            guest.run(Io::Write, 200 + block, 0x22);
            guest.run(Io::Write, 300 + block, 0x22);
            guest.run(Io::Write, 400 + block, 0x22);
        }
        Some(Self { mounted, vhost, neighbours, guest })
    }

    /// Requests that wait for the thaw: writes where there are blocks, and where there are none,
    /// and what changes the file's blocks.
    fn begin(&mut self) -> Vec<Begun> {
        let mut begun = vec![];
        for block in 0..8 {
            begun.push(self.guest.begin(Io::Write, 200 + block, 0x33));
            begun.push(self.guest.begin(Io::Write, 1000 + 2 * block, 0x44));
            begun.push(self.guest.begin(Io::Discard, 300 + block, 0));
            begun.push(self.guest.begin(Io::Zeroes, 400 + block, 0));
        }
        begun
    }
}

fn byte(file: &Path, block: u64) -> u8 {
    fs::read(file).unwrap()[usize::try_from(block * BLOCK).unwrap()]
}

fn a_frozen_file_system(flavour: Flavour) {
    let Some(mut scene) = Scene::new(flavour) else { return };
    scene.mounted.set_frozen(true);
    let begun = scene.begin();
    // One of its own flushes among them: it completes now or after the thaw.
    let flush = scene.guest.begin(Io::Flush, 0, 0);
    for _ in 0..3 {
        scene.neighbours.go_on();
        scene.neighbours.others_come_and_go(&scene.vhost);
    }
    let workers = flavour.workers(&scene.vhost, "F");
    assert!(workers.busy >= begun.len() as u64, "{workers:?}");
    let left = disks::in_flight(&scene.vhost, scene.guest.controller());
    assert!(left == begun.len() as u64 || left == begun.len() as u64 + 1, "{left}");
    scene.mounted.set_frozen(false);
    scene.guest.wait_for(&[&begun[..], &[flush]].concat());
    assert!(scene.guest.read(200).iter().all(|byte| *byte == 0x33));
    scene.guest.run(Io::Flush, 0, 0);
    let file = scene.mounted.path();
    for n in 0..8 {
        let [first, second] = [byte(&file, 200 + n), byte(&file, 1000 + 2 * n)];
        assert_eq!((first, second), (0x33, 0x44));
        assert_eq!((byte(&file, 300 + n), byte(&file, 400 + n)), (0, 0));
    }
    wait_until("its threads are free", || flavour.workers(&scene.vhost, "F").busy == 0);
    scene.guest.goes_on();
    let Scene { vhost, neighbours, guest, mounted } = scene;
    guest.leaves(&vhost);
    neighbours.leave(&vhost);
    assert_eq!(vhost.stop(), 0);
    drop(mounted);
}

/// SIGTERM while it is frozen: everything ends but the threads that wait for the thaw.
fn sigterm_on_a_frozen_file_system(flavour: Flavour) {
    let Some(mut scene) = Scene::new(flavour) else { return };
    scene.mounted.set_frozen(true);
    scene.begin();
    scene.neighbours.go_on();
    scene.vhost.signal("TERM");
    wait_until("the end of all but what waits", || scene.vhost.has_ended_but_for_waits());
    assert!(!scene.vhost.rpc_socket().exists() && !scene.vhost.socket("N.vhost").exists());
    scene.mounted.set_frozen(false);
    assert_eq!(scene.vhost.wait(), Some(0));
}

#[test]
fn by_aio() {
    a_frozen_file_system(Flavour::Aio);
}

#[test]
fn by_uring() {
    a_frozen_file_system(Flavour::Uring);
}

#[test]
fn sigterm_by_aio() {
    sigterm_on_a_frozen_file_system(Flavour::Aio);
}

#[test]
fn sigterm_by_uring() {
    sigterm_on_a_frozen_file_system(Flavour::Uring);
}
