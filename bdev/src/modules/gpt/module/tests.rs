use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::control::method::MethodError;
use crate::control::test_host::{TestHost, run};

/// Unpacks an image that SPDK has written (16 MiB, three partitions of its types).
fn image(dir: &Path, name: &str) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(name);
    let file = dir.join(name).with_extension("");
    let status = Command::new("zstd").arg("-dqf").arg(packed).arg("-o").arg(&file).status();
    assert!(status.unwrap().success());
    file
}

fn aio(host: &Rc<TestHost>, name: &str, file: &Path) {
    let params = json!({ "name": name, "filename": file, "block_size": 512 });
    assert_eq!(host.call("bdev_aio_create", params), Ok(name.into()));
}

fn delete(host: &Rc<TestHost>, name: &str) {
    assert_eq!(host.call("bdev_aio_delete", json!({ "name": name })), Ok(true.into()));
}

#[test]
fn the_partitions_of_spdk_s_images_are_shown_as_in_spdk() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["gpt.img.zst", "gpt-backup.img.zst"] {
        let host = TestHost::new([]);
        aio(&host, "A", &image(dir.path(), name));
        assert_eq!(host.names(), ["A", "Ap1", "Ap2", "Ap5"]);
        let bdev = |name| host.registry().bdev(name).unwrap();
        let blocks = ["Ap1", "Ap2", "Ap5"].map(|name| bdev(name).num_blocks());
        assert_eq!(blocks, [4096, 4095, 4096]);
        assert_eq!(bdev("aaaaaaaa-2222-4222-8222-222222222222").name(), "Ap2");
        assert_eq!(bdev("Ap2").product_name(), "GPT Disk");
        let about = host.driver_specific("Ap2");
        let gpt = about["gpt"].as_object().unwrap();
        let fields: Vec<_> = gpt.keys().map(String::as_str).collect();
        let expected = [
            "base_bdev",
            "offset_blocks",
            "partition_table_guid",
            "partition_type_guid",
            "unique_partition_guid",
            "partition_name",
        ];
        assert_eq!(fields, expected);
        assert_eq!((&gpt["base_bdev"], &gpt["offset_blocks"]), (&json!("A"), &json!(6144)));
        assert_eq!(gpt["partition_type_guid"], "7c5222bd-8f5d-4087-9c00-bf9843c7b58c");
        assert_eq!(gpt["unique_partition_guid"], "aaaaaaaa-2222-4222-8222-222222222222");
        assert_eq!(host.claim_type("A"), Some("exclusive_write"));
        assert_eq!(host.config().len(), 1, "examine finds the partitions again");
        let denied = host.call("bdev_error_create", json!({ "base_name": "A" }));
        assert_eq!(denied, Err(MethodError::errno(libc::EPERM)));
    }
}

#[test]
fn partitions_come_and_go_with_their_base() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "gpt.img.zst");
    let host = TestHost::new([]);
    // It waits for the partition.
    let passthru = json!({ "name": "P", "base_bdev_name": "Ap1" });
    host.call("bdev_passthru_create", passthru).unwrap();
    for _ in 0..2 {
        aio(&host, "A", &file);
        assert_eq!(host.names(), ["P", "A", "Ap1", "Ap2", "Ap5"]);
        delete(&host, "A");
        assert!(host.names().is_empty());
    }
    assert_eq!(host.retired.borrow()[..5], ["P", "Ap1", "Ap2", "Ap5", "A"]);
}

#[test]
fn a_base_in_use_keeps_its_partitions_to_itself() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "gpt.img.zst");
    let host = TestHost::new([]);
    host.call("bdev_error_create", json!({ "base_name": "A" })).unwrap();
    aio(&host, "A", &file);
    // The partitions are those of the bdev that is not in use.
    assert_eq!(host.names(), ["EE_A", "A", "EE_Ap1", "EE_Ap2", "EE_Ap5"]);
    host.call("bdev_error_delete", json!({ "name": "EE_A" })).unwrap();
    assert_eq!(host.names(), ["A", "Ap1", "Ap2", "Ap5"]);
}

#[test]
fn a_partition_whose_name_or_uuid_is_taken_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let (file, same) = (image(dir.path(), "gpt.img.zst"), image(dir.path(), "gpt-backup.img.zst"));
    let host = TestHost::new([]);
    host.null("Ap2", 2);
    aio(&host, "A", &file);
    assert_eq!(host.names(), ["Ap2", "A", "Ap1", "Ap5"]);
    // Of the second disk, one UUID is free.
    aio(&host, "B", &same);
    assert_eq!(host.names(), ["Ap2", "A", "Ap1", "Ap5", "B", "Bp2"]);
    delete(&host, "B");
    delete(&host, "A");
    aio(&host, "B", &same);
    assert_eq!(host.names(), ["Ap2", "B", "Bp1", "Bp2", "Bp5"]);
}

#[test]
fn partitions_are_not_looked_for_in_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "gpt.img.zst");
    let inner = std::fs::read(&file).unwrap();
    let host = TestHost::new([]);
    aio(&host, "A", &file);
    // The partition is the whole of a smaller disk, whose boot record fits any size.
    let part = host.registry().bdev("Ap1").unwrap();
    assert!(is_on_partition(&part) && !is_on_partition(&part.bases()[0]));
    drop(part);
    delete(&host, "A");
    let mut outer = inner.clone();
    outer[2048 * 512..][..4096 * 512].copy_from_slice(&inner[..4096 * 512]);
    outer[2048 * 512 + 458..][..4].fill(0xFF);
    std::fs::write(&file, outer).unwrap();
    aio(&host, "A", &file);
    assert_eq!(host.names(), ["A", "Ap1", "Ap2", "Ap5"]);
    let split = json!({ "base_bdev": "Ap1", "split_count": 1 });
    host.call("bdev_split_create", split).unwrap();
    assert_eq!(host.names().len(), 5);
}

#[test]
fn a_device_without_an_answer_is_waited_for_once() {
    let host = TestHost::new([]);
    host.null("A", 1);
    host.call("bdev_error_create", json!({ "base_name": "A" })).unwrap();
    let pending = json!({ "name": "EE_A", "io_type": "read", "error_type": "pending", "num": 9 });
    host.call("bdev_error_inject_error", pending).unwrap();
    let module = Module { limit: Duration::ZERO, ..Module::default() };
    let error_disk = host.registry().bdev("EE_A").unwrap();
    let device = host.registry().bdev("A").unwrap();
    let as_host = Rc::clone(&host) as Rc<dyn Host>;
    assert!(!module.unanswered.has_device_of(&device));
    run(module.examine(&as_host, &error_disk)).unwrap();
    assert!(
        module.unanswered.has_device_of(&device) && module.unanswered.has_device_of(&error_disk)
    );
    host.null("B", 2);
    assert!(!module.unanswered.has_device_of(&host.registry().bdev("B").unwrap()));
    // A read that is skipped does not hang.
    let module = Module { limit: Duration::MAX, ..module };
    run(module.examine(&as_host, &error_disk)).unwrap();
    drop((error_disk, device));
    let deleted = host.begin("bdev_error_delete", json!({ "name": "EE_A" }));
    let mut deleted = std::pin::pin!(deleted);
    while run(deleted.as_mut()).is_none() {
        std::thread::yield_now();
    }
    assert_eq!(module.unanswered.len(), 1);
    // The thread of the reads ends soon.
    while module.unanswered.has_device_of(&host.registry().bdev("A").unwrap()) {
        std::thread::yield_now();
    }
    assert_eq!(module.unanswered.len(), 0);
}
