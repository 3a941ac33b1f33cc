//! GUID partition tables: the partitions of disks that SPDK has written are served, come and go
//! with their disk, and are found again after a restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::harness::{Launch, Vhost};
use crate::support::slow_files::{Kind, Op, SlowFiles};

/// The disk, its partitions, and the logical volume in the last one.
const BDEVS: [&str; 5] = ["A", "Ap1", "Ap2", "Ap5", "896d3a7c-0fa3-4152-9247-04b482271379"];
/// The contents of the first two partitions, as recorded with the images.
const SHA256: [(&str, &str); 2] = [
    ("Ap1", "cdb59ae1be011ab6d2e019533c6abca34735433642b0d25bf532763a8b97ab36"),
    ("Ap2", "034129701741352676d40351c6dec0b1e31950dbced962d425bc2ee684a10e55"),
];

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Unpacks an image that SPDK has written.
fn image(dir: &Path, name: &str) -> PathBuf {
    let packed = Path::new("../bdev/tests/images").join(name);
    let file = dir.join(name).with_extension("");
    run("zstd", &["-dqf", packed.to_str().unwrap(), "-o", file.to_str().unwrap()]);
    file
}

fn create(vhost: &Vhost, file: &Path) {
    let params = json!({"name": "A", "filename": file, "block_size": 512});
    assert_eq!(vhost.ok("bdev_uring_create", params), "A");
}

/// Exports a bdev, and returns its URI.
fn export(vhost: &Vhost, bdev: &str) -> String {
    let socket = vhost.dir().join(format!("{bdev}.nbd"));
    let device = format!("unix:{}", socket.display());
    vhost.ok("nbd_start_disk", json!({"bdev_name": bdev, "nbd_device": device}));
    format!("nbd+unix:///?socket={}", socket.display())
}

fn sha256(vhost: &Vhost, bdev: &str) -> String {
    let (uri, copy) = (export(vhost, bdev), vhost.dir().join(bdev));
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    run("sha256sum", &[copy.to_str().unwrap()])[..64].to_owned()
}

#[test]
fn spdk_s_partitions_read_as_recorded_from_either_table() {
    let dir = TempDir::new().unwrap();
    for name in ["gpt.img.zst", "gpt-backup.img.zst"] {
        let vhost = Vhost::start(&[]);
        create(&vhost, &image(dir.path(), name));
        assert_eq!(vhost.bdev_names(), BDEVS);
        for (bdev, expected) in SHA256 {
            assert_eq!(sha256(&vhost, bdev), expected, "{name}: {bdev}");
        }
        let shown = vhost.bdev("Ap2");
        assert_eq!(shown["product_name"], "GPT Disk");
        assert_eq!(shown["uuid"], "aaaaaaaa-2222-4222-8222-222222222222");
        assert_eq!(shown["aliases"], json!(["aaaaaaaa-2222-4222-8222-222222222222"]));
        assert_eq!(shown["num_blocks"], 4095);
        let disk = vhost.bdev("A");
        assert_eq!(
            (&disk["claimed"], &disk["claim_type"]),
            (&json!(true), &json!("exclusive_write"))
        );
        let split = json!({"base_bdev": "A", "split_count": 2});
        assert_eq!(vhost.err("bdev_split_create", split).code, -32602);
        assert_eq!(vhost.stop(), 0);
    }
}

#[test]
fn writes_stay_within_their_partition() {
    let dir = TempDir::new().unwrap();
    let vhost = Vhost::start(&[]);
    let file = image(dir.path(), "gpt.img.zst");
    let before = fs::read(&file).unwrap();
    create(&vhost, &file);
    let source = vhost.dir().join("source");
    fs::write(&source, vec![0xA5; 4095 * 512]).unwrap();
    let (source, uri) = (source.to_str().unwrap(), export(&vhost, "Ap2"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    assert_eq!(vhost.stop(), 0);
    let after = fs::read(&file).unwrap();
    let part = 6144 * 512..(6144 + 4095) * 512;
    assert!(after[part.clone()].iter().all(|byte| *byte == 0xA5));
    assert!(after[..part.start] == before[..part.start], "the blocks before it");
    assert!(after[part.end..] == before[part.end..], "the blocks after it");
}

/// Writes and reads back through a controller.
fn serves(vhost: &Vhost, controller: &str) {
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_any(1, QueueOptions::default()).unwrap();
    let load = Load::start(queues, LoadOptions { blocks: 0..256, ..LoadOptions::default() });
    let (summary, _) = load.unwrap().stop().unwrap();
    assert_eq!((summary.first_problem, summary.errors, summary.mismatches), (None, 0, 0));
    front_end.disconnect().unwrap();
}

#[test]
fn partitions_go_with_their_disk_and_return_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let vhost = Vhost::start(&[]);
    let file = image(dir.path(), "gpt.img.zst");
    create(&vhost, &file);
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "Ap1"}));
    serves(&vhost, "c");
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    vhost.ok("bdev_uring_delete", json!({"name": "A"}));
    assert!(vhost.bdev_names().is_empty());
    let shown = vhost.ok("vhost_get_controllers", json!({"name": "c"}));
    assert_eq!(shown[0]["backend_specific"]["block"]["bdev"], Value::Null);
    create(&vhost, &file);
    assert_eq!(vhost.bdev_names(), BDEVS);
    assert_eq!(vhost.stop(), 0);

    let vhost = Launch::new().config(&saved).start();
    assert_eq!(vhost.bdev_names(), BDEVS);
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    serves(&vhost, "c");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_disk_that_does_not_answer_holds_up_nobody_else() {
    let dir = TempDir::new().unwrap();
    let vhost = Vhost::start(&[]);
    let Some(files) = SlowFiles::mount(&[("disk", Kind::Direct, 8 << 20)]) else { return };
    let params = json!({"name": "F", "filename": files.path("disk"), "block_size": 512});
    vhost.ok("bdev_aio_create", params);
    files.hold("disk", Op::Read);
    let mut other = vhost.connect();
    other.send("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "F"}));
    files.wait_for_held("disk", Op::Read, 1);
    create(&vhost, &image(dir.path(), "gpt.img.zst"));
    assert!(vhost.bdev_names().contains(&"Ap1".to_owned()));
    assert!(!other.has_answer(), "it is still examined");
    assert_eq!(other.receive().1, Ok(json!("P")));
    vhost.wait_for_log("has not answered in 5 s");
    // Another bdev on the same device is not waited for again.
    vhost.ok("bdev_split_create", json!({"base_bdev": "P", "split_count": 1}));
    vhost.wait_for_log("an earlier read of its device has not ended");
    files.release("disk", Op::Read);
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    drop(files);
    assert_eq!(vhost.stop(), 0);
}
