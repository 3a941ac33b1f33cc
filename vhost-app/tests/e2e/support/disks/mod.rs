//! Disks and controllers for guests, and what can be seen of them from outside.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::harness::{Launch, Vhost, wait_until};

pub(crate) const MIB: usize = 1 << 20;

pub(crate) fn malloc(vhost: &Vhost, name: &str, bytes: usize, block_bytes: usize) {
    let blocks = bytes / block_bytes;
    let params = json!({"name": name, "num_blocks": blocks, "block_size": block_bytes});
    vhost.ok("bdev_malloc_create", params);
}

/// A disk on a host's file of bytes that differ from block to block.
pub(crate) fn aio(vhost: &Vhost, name: &str, bytes: usize) -> PathBuf {
    let file = vhost.dir().join(format!("{name}.img"));
    make_file(&file, bytes);
    aio_on(vhost, name, &file);
    file
}

pub(crate) fn make_file(file: &Path, bytes: usize) {
    let word = |n: usize| (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    fs::write(file, (0..bytes / 8).flat_map(word).collect::<Vec<u8>>()).unwrap();
}

pub(crate) fn aio_on(vhost: &Vhost, name: &str, file: &Path) {
    // Without `fallocate` there is no discard, as in SPDK.
    let params = json!({"name": name, "filename": file, "block_size": 512, "fallocate": true});
    vhost.ok("bdev_aio_create", params);
}

/// The same disk, but every request to it is in flight for 5 ms, so that there is always one, and
/// some for longer, so that others overtake them.
pub(crate) fn slow(vhost: &Vhost, name: &str, base: &str) {
    const MOST_US: u64 = 5_000;
    const SOME_US: u64 = 25_000;
    let params = json!({
        "name": name, "base_bdev_name": base,
        "avg_read_latency": MOST_US, "p99_read_latency": SOME_US,
        "avg_write_latency": MOST_US, "p99_write_latency": SOME_US,
    });
    vhost.ok("bdev_delay_create", params);
}

pub(crate) fn controller(vhost: &Vhost, name: &str, bdev: &str) -> PathBuf {
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": bdev}));
    vhost.socket(name)
}

/// A SCSI controller with these bdevs as its targets, by their numbers.
pub(crate) fn scsi_controller(vhost: &Vhost, name: &str, bdevs: &[(u32, &str)]) -> PathBuf {
    vhost.ok("vhost_create_scsi_controller", json!({"ctrlr": name}));
    for (target, bdev) in bdevs {
        add_target(vhost, name, *target, bdev);
    }
    vhost.socket(name)
}

pub(crate) fn add_target(vhost: &Vhost, controller: &str, target: u32, bdev: &str) {
    let params = json!({"ctrlr": controller, "scsi_target_num": target, "bdev_name": bdev});
    assert_eq!(vhost.ok("vhost_scsi_controller_add_target", params), target);
}

/// Removes a target, which is gone when this returns.
pub(crate) fn remove_target(vhost: &Vhost, controller: &str, target: u32) {
    let params = json!({"ctrlr": controller, "scsi_target_num": target, "timeout_ms": 60_000});
    vhost.ok("vhost_scsi_controller_remove_target", params);
}

/// A controller that offers packed rings, or does not.
pub(crate) fn controller_of(vhost: &Vhost, name: &str, bdev: &str, packed: bool) -> PathBuf {
    let params = json!({"ctrlr": name, "dev_name": bdev, "packed_ring": packed});
    vhost.ok("vhost_create_blk_controller", params);
    vhost.socket(name)
}

/// What the table in `docs/src/front-ends.md` calls such rings.
pub(crate) fn rings(packed: bool) -> &'static str {
    if packed { "packed" } else { "split" }
}

pub(crate) fn sessions(vhost: &Vhost, controller: &str) -> Vec<Value> {
    let shown = vhost.ok("vhost_get_controller_stats", json!({"name": controller}));
    shown[0]["sessions"].as_array().unwrap().clone()
}

/// Waits until a controller has no session, and the process has `fds` open fds again.
pub(crate) fn wait_until_all_is_gone(vhost: &Vhost, controller: &str, fds: usize) {
    wait_until("no session left", || sessions(vhost, controller).is_empty());
    wait_until("no fd left", || vhost.fds() == fds);
}

/// I/O of a controller's guests that has not completed.
pub(crate) fn in_flight(vhost: &Vhost, controller: &str) -> u64 {
    sessions(vhost, controller).iter().map(|s| s["inflight_task_cnt"].as_u64().unwrap()).sum()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

pub(crate) fn file_sha256(file: &Path) -> String {
    sha256(&fs::read(file).unwrap())
}

/// A slow disk on a file that outlives `vhost`, which QEMU finds at `link` whatever directory that
/// has. [`hold`] works on it.
pub(crate) fn start_behind(launch: Launch, link: &Path, file: &Path) -> Vhost {
    let vhost = launch.start();
    aio_on(&vhost, "Aio0", file);
    slow_behind(&vhost, link, "Aio0");
    vhost
}

/// The same on a disk that outlives `vhost` in some other way.
pub(crate) fn slow_behind(vhost: &Vhost, link: &Path, base: &str) {
    slow(vhost, "Slow0", base);
    vhost.ok("bdev_error_create", json!({"base_name": "Slow0"}));
    let packed = json!({"ctrlr": "vhost.0", "dev_name": "EE_Slow0", "packed_ring": true});
    vhost.ok("vhost_create_blk_controller", packed);
    let _ = fs::remove_file(link);
    std::os::unix::fs::symlink(vhost.socket("vhost.0"), link).unwrap();
}

/// An error bdev does not answer the next so many requests.
pub(crate) fn hold(vhost: &Vhost, name: &str, num: u32) {
    hold_some(vhost, name, "all", num);
}

/// Nor does it answer the next so many of this type.
pub(crate) fn hold_some(vhost: &Vhost, name: &str, io_type: &str, num: u32) {
    let error = json!({"name": name, "io_type": io_type, "error_type": "pending", "num": num});
    vhost.ok("bdev_error_inject_error", error);
}

/// It answers what comes, and still holds what it has.
pub(crate) fn heal(vhost: &Vhost, name: &str) {
    let clear = json!({"name": name, "io_type": "clear", "error_type": "pending"});
    vhost.ok("bdev_error_inject_error", clear);
}

/// It answers what comes and what it has held.
pub(crate) fn answer(vhost: &Vhost, name: &str) {
    heal(vhost, name);
    vhost.ok("bdev_error_resume_pending", json!({"name": name}));
}
