//! I/O errors of a disk, as the real `vhost` reports them to the operator.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use front_end::{FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, Segment};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::{Value, json};

use crate::support::harness::Vhost;

const DISK_BYTES: u64 = 8 << 20;
const BLOCK: u64 = 4096;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// A guest with a disk on a file.
struct Scene {
    vhost: Vhost,
    _front_end: FrontEnd,
    queue: Queue,
    data: Segment,
    /// Requests that completed with an error.
    failed: u64,
}

impl Scene {
    /// `method`: "bdev_aio_create" or "bdev_uring_create".
    fn new(method: &str, file: &Path) -> Self {
        // The full file system has no path but /proc/PID/fd of this process, which the sandbox refuses.
        let vhost = Vhost::start(&["--no-sandbox"]);
        vhost.ok(method, json!({"name": "Disk0", "filename": file, "block_size": 512}));
        vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "a", "dev_name": "Disk0"}));
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let data = ram.alloc(BLOCK.try_into().unwrap(), BLOCK).unwrap();
        let mut front_end = FrontEnd::connect(&vhost.socket("a"), ram, Options::default()).unwrap();
        let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
        Self { vhost, _front_end: front_end, queue, data, failed: 0 }
    }

    fn run(&mut self, request: impl FnOnce(&[Segment]) -> Request<'_>) -> u8 {
        let data = [self.data];
        let status = self.queue.run(&request(&data)).unwrap().status;
        self.failed += u64::from(status != OK);
        status
    }

    fn write(&mut self, block: u64) -> u8 {
        self.run(|data| Request::write(block * BLOCK / 512, data))
    }

    fn read(&mut self, block: u64) -> u8 {
        self.run(|data| Request::read(block * BLOCK / 512, data))
    }

    fn iostat(&self) -> Value {
        self.vhost.ok("bdev_get_iostat", json!({"names": ["Disk0"]}))["bdevs"][0].clone()
    }

    /// Lines of the log about the disk.
    fn lines(&self) -> Vec<String> {
        let log = self.vhost.log();
        log.lines().filter(|line| line.contains("bdev Disk0: ")).map(str::to_owned).collect()
    }

    /// The operator sees the number of errors, and that the write at `first` was the first of them.
    #[track_caller]
    fn is_known(&self, kind: &str, first: u64, why: &str) {
        let io_error = &self.iostat()["io_error"];
        assert_eq!(*io_error, json!({kind: self.failed}), "and no other kind");
        let shown = self.vhost.ok("vhost_get_controller_stats", json!({"name": "a"}));
        assert_eq!(shown[0]["sessions"][0]["errors"], self.failed);
        let text = format!("ERROR*: bdev Disk0: write of 4096 bytes at offset {first}: {why}");
        self.vhost.wait_for_log(&text);
    }
}

/// A path by which other processes can open the file.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd()).into()
}

/// A sparse file on a file system of 1 MiB; `None`, with the reason logged, if there can be none.
fn on_a_small_file_system() -> Option<File> {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "small"])
        .arg(dir.path())
        .output()
        .unwrap();
    if !mount.status.success() {
        let reason = String::from_utf8_lossy(&mount.stderr);
        test_report::skipped("mount", &format!("no file system of a limited size: {reason}"));
        return None;
    }
    let file = File::options().create_new(true).read(true).write(true).open(dir.path().join("f"));
    // It exists for as long as the file is open.
    assert!(Command::new("umount").arg("--lazy").arg(dir.path()).status().unwrap().success());
    let file = file.unwrap();
    file.set_len(DISK_BYTES).unwrap();
    Some(file)
}

fn a_full_file_system_is_named(method: &str, kind: &str) {
    let Some(file) = on_a_small_file_system() else { return };
    let mut scene = Scene::new(method, &path_of(&file));
    // A part of the file system is metadata.
    let first = (0..).find(|&block| scene.write(block) == IOERR).unwrap();
    assert!((100..=256).contains(&first), "{first} blocks were written");
    let more = (first + 1..600).filter(|&block| scene.write(block) == IOERR).count() as u64;
    assert_eq!(more, 600 - first - 1);
    assert_eq!((scene.read(0), scene.read(first)), (OK, OK), "others go on");
    let why = "No space left on device (os error 28)";
    scene.is_known(kind, first * BLOCK, why);
    let stat = scene.iostat();
    assert_eq!((&stat["num_write_ops"], &stat["num_read_ops"]), (&json!(first), &json!(2)));
    // 600 errors do not make 600 lines. The next report counts all of them.
    assert!(scene.lines().len() < 10, "{:#?}", scene.lines());
    // Only the error counters are reset.
    scene.vhost.ok("bdev_reset_iostat", json!({"name": "Disk0", "mode": "error"}));
    let stat = scene.iostat();
    assert_eq!((&stat["io_error"], &stat["num_write_ops"]), (&json!({}), &json!(first)));
    assert_eq!(scene.write(first), IOERR);
    assert_eq!(scene.iostat()["io_error"], json!({kind: 1}));
    assert_eq!(scene.vhost.stop(), 0);
}

#[test]
fn a_full_file_system_is_named_by_aio() {
    a_full_file_system_is_named("bdev_aio_create", "aio_error");
}

#[test]
fn a_full_file_system_is_named_by_uring() {
    a_full_file_system_is_named("bdev_uring_create", "failed");
}

/// Wrappers pass the reason on.
#[test]
fn the_reason_passes_through_wrappers() {
    let memfd = memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let file = File::from(memfd);
    file.set_len(DISK_BYTES).unwrap();
    let vhost = Vhost::start(&["--no-sandbox"]);
    let params = json!({"name": "Base0", "filename": path_of(&file), "block_size": 512});
    vhost.ok("bdev_aio_create", params);
    let latency = json!({
        "name": "Delay0", "base_bdev_name": "Base0", "avg_read_latency": 1, "p99_read_latency": 1,
        "avg_write_latency": 1, "p99_write_latency": 1,
    });
    vhost.ok("bdev_delay_create", latency);
    vhost.ok("bdev_error_create", json!({"base_name": "Delay0"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "a", "dev_name": "EE_Delay0"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let data = [ram.alloc(512, 512).unwrap()];
    let mut front_end = FrontEnd::connect(&vhost.socket("a"), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    assert_eq!(queue.run(&Request::write(0, &data)).unwrap().status, OK);
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    assert_eq!(queue.run(&Request::write(8, &data)).unwrap().status, IOERR);
    vhost.wait_for_log(
        "bdev EE_Delay0: write of 512 bytes at offset 4096: Operation not permitted (os error 1)",
    );
    let io_error = || {
        let stat = vhost.ok("bdev_get_iostat", json!({"names": ["EE_Delay0"]}));
        stat["bdevs"][0]["io_error"].clone()
    };
    assert_eq!(io_error(), json!({"aio_error": 1}));
    let error = json!({"name": "EE_Delay0", "io_type": "read", "error_type": "failure", "num": 2});
    vhost.ok("bdev_error_inject_error", error);
    for _ in 0..2 {
        assert_eq!(queue.run(&Request::read(8, &data)).unwrap().status, IOERR);
    }
    assert_eq!(io_error(), json!({"failed": 2, "aio_error": 1}));
    assert_eq!(vhost.stop(), 0);
}
