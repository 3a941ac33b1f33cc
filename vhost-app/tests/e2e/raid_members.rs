//! RAID arrays whose members are removed, added or deleted at an awkward time, or lie.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::harness::{Launch, Vhost, wait_until};

fn malloc(vhost: &Vhost, name: &str) {
    let params = json!({"name": name, "num_blocks": 65536, "block_size": 512});
    vhost.ok("bdev_malloc_create", params);
}

fn create(name: &str, level: &str, strip_kb: u64, bases: &[&str], superblock: bool) -> Value {
    json!({
        "name": name, "raid_level": level, "strip_size_kb": strip_kb, "base_bdevs": bases,
        "superblock": superblock,
    })
}

fn array(vhost: &Vhost, name: &str) -> Value {
    let all = vhost.ok("bdev_raid_get_bdevs", json!({"category": "all"}));
    let found = all.as_array().unwrap().iter().find(|array| array["name"] == name);
    found.cloned().unwrap_or(Value::Null)
}

fn remove(vhost: &Vhost, base: &str) {
    assert_eq!(vhost.ok("bdev_raid_remove_base_bdev", json!({"name": base})), true);
}

fn members(vhost: &Vhost) -> Vec<String> {
    let array = array(vhost, "R");
    let bases = array["base_bdevs_list"].as_array().unwrap().iter();
    bases.filter_map(|base| Some(base["name"].as_str()?.to_owned())).collect()
}

/// Slow enough that the rebuild does not end during the test.
fn slow_rebuild(vhost: &Vhost) {
    let options = json!({"process_window_size_kb": 64, "process_max_bandwidth_mb_sec": 1});
    vhost.ok("bdev_raid_set_options", options);
}

/// A stripe of three strips is not a stripe of two: the data would be another.
#[test]
fn the_saved_configuration_of_a_degraded_array_does_not_change_its_layout() {
    let vhost = Vhost::start(&[]);
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name));
    vhost.ok("bdev_raid_create", create("R", "raid5f", 64, &["A", "B", "C", "D"], false));
    let blocks = vhost.bdev("R")["num_blocks"].clone();
    remove(&vhost, "B");
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);
    let vhost = Launch::new().config(&saved).start();
    let array = array(&vhost, "R");
    assert!(array["state"] != "online" || vhost.bdev("R")["num_blocks"] == blocks, "{array}");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn the_saved_configuration_of_a_degraded_mirror_can_be_loaded() {
    let vhost = Vhost::start(&[]);
    ["A", "B"].iter().for_each(|name| malloc(&vhost, name));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "B"], false));
    remove(&vhost, "B");
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);
    let vhost = Launch::new().config(&saved).start();
    assert_ne!(array(&vhost, "R"), Value::Null);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn two_members_that_are_added_at_once_do_not_lose_a_claim() {
    let vhost = Vhost::start(&[]);
    slow_rebuild(&vhost);
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "B"], true));
    remove(&vhost, "B");
    thread::scope(|scope| {
        for base in ["C", "D"] {
            let vhost = &vhost;
            let params = json!({"raid_bdev": "R", "base_bdev": base});
            scope.spawn(move || drop(vhost.rpc("bdev_raid_add_base_bdev", params)));
        }
    });
    for base in members(&vhost) {
        assert_eq!(vhost.bdev(&base)["claimed"], true, "{base}");
    }
    assert_eq!(vhost.stop(), 0);
}

/// A server with a mirror that has a free slot, and a member whose writes hang.
fn with_hanging_member() -> Vhost {
    let vhost = Vhost::start(&[]);
    slow_rebuild(&vhost);
    ["A", "B", "C", "D", "E"].iter().for_each(|name| malloc(&vhost, name));
    vhost.ok("bdev_error_create", json!({"base_name": "B"}));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "EE_B", "C", "E"], true));
    remove(&vhost, "C");
    let hang =
        json!({"name": "EE_B", "io_type": "write", "error_type": "pending", "num": 1_000_000});
    vhost.ok("bdev_error_inject_error", hang);
    vhost
}

/// The thread of the array is busy for 10 s with a member that hangs.
#[test]
fn a_member_that_waits_for_the_thread_keeps_its_claim() {
    let vhost = with_hanging_member();
    thread::scope(|scope| {
        scope.spawn(|| remove(&vhost, "E"));
        thread::sleep(Duration::from_millis(300));
        vhost.ok("bdev_raid_add_base_bdev", json!({"raid_bdev": "R", "base_bdev": "D"}));
    });
    assert!(members(&vhost).contains(&"D".to_owned()));
    assert_eq!(vhost.bdev("D")["claimed"], true);
    assert_eq!(vhost.stop(), 0);
}

/// The same, and the new member is deleted meanwhile.
#[test]
fn a_member_that_is_deleted_while_it_waits_for_the_thread_is_let_go() {
    let vhost = with_hanging_member();
    thread::scope(|scope| {
        scope.spawn(|| remove(&vhost, "E"));
        thread::sleep(Duration::from_millis(300));
        let add =
            || vhost.rpc("bdev_raid_add_base_bdev", json!({"raid_bdev": "R", "base_bdev": "D"}));
        let added = scope.spawn(add);
        thread::sleep(Duration::from_millis(300));
        vhost.ok("bdev_malloc_delete", json!({"name": "D"}));
        assert!(added.join().unwrap().is_err());
    });
    assert!(!members(&vhost).contains(&"D".to_owned()));
    assert_eq!(vhost.stop(), 0);
}

/// A member that was removed, and lacks later writes, is not current when the array returns.
#[test]
fn an_array_without_superblocks_does_not_take_a_stale_member_for_a_current_one() {
    let vhost = Vhost::start(&[]);
    ["A", "C"].iter().for_each(|name| malloc(&vhost, name));
    // The smallest member decides the size, also without it.
    let small = json!({"name": "B", "num_blocks": 32768, "block_size": 512});
    vhost.ok("bdev_malloc_create", small);
    vhost.ok("bdev_raid_create", create("R", "raid5f", 64, &["A", "B", "C"], false));
    let blocks = vhost.bdev("R")["num_blocks"].clone();
    remove(&vhost, "B");
    vhost.ok("bdev_malloc_delete", json!({"name": "C"}));
    wait_until("it is offline", || array(&vhost, "R")["state"] == "offline");
    vhost.ok("bdev_malloc_delete", json!({"name": "B"}));
    ["C", "B"].iter().for_each(|name| malloc(&vhost, name));
    let array = array(&vhost, "R");
    assert_eq!(array["base_bdevs_list"][1]["is_configured"], false, "{array}");
    assert_eq!((&array["state"], &vhost.bdev("R")["num_blocks"]), (&json!("online"), &blocks));
    assert_eq!(vhost.stop(), 0);
}

/// A bdev with a fixed UUID on `M<n>`, whose writes take this time.
fn delay(vhost: &Vhost, n: u32, us: u32) {
    let (name, base) = (format!("D{n}"), format!("M{n}"));
    let uuid = format!("bbbbbbbb-0000-4000-8000-{n:012}");
    let params = json!({
        "name": name, "base_bdev_name": base, "uuid": uuid, "avg_read_latency": 1,
        "p99_read_latency": 1, "avg_write_latency": us, "p99_write_latency": us,
    });
    vhost.ok("bdev_delay_create", params);
}

fn delete_delay(vhost: &Vhost, n: u32) {
    vhost.ok("bdev_delay_delete", json!({"name": format!("D{n}")}));
}

/// A member that was removed before returns while the superblocks of the start are written.
#[test]
fn a_stale_member_that_arrives_during_the_start_is_rebuilt() {
    let vhost = Vhost::start(&[]);
    ["M1", "M2"].iter().for_each(|name| malloc(&vhost, name));
    [1, 2].iter().for_each(|n| delay(&vhost, *n, 1));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["D1", "D2"], true));
    remove(&vhost, "D2");
    vhost.ok("bdev_raid_delete", json!({"name": "R"}));
    [1, 2].iter().for_each(|n| delete_delay(&vhost, *n));
    thread::scope(|scope| {
        scope.spawn(|| delay(&vhost, 1, 1_000_000));
        thread::sleep(Duration::from_millis(500));
        assert_eq!(array(&vhost, "R")["state"], "configuring", "it is starting");
        delay(&vhost, 2, 1);
    });
    wait_until("both are right", || array(&vhost, "R")["num_base_bdevs_operational"] == 2);
    assert_eq!(vhost.stop(), 0);
}

/// A member is deleted while the superblocks of the start are written.
#[test]
fn an_array_whose_start_has_failed_can_start_later() {
    let vhost = Vhost::start(&[]);
    let (delay, delete) = (|n, us| delay(&vhost, n, us), |n| delete_delay(&vhost, n));
    ["M1", "M2"].iter().for_each(|name| malloc(&vhost, name));
    [1, 2].iter().for_each(|n| delay(*n, 1));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["D1", "D2"], true));
    vhost.ok("bdev_raid_delete", json!({"name": "R"}));
    [1, 2].iter().for_each(|n| delete(*n));
    delay(1, 2_000_000);
    thread::scope(|scope| {
        scope.spawn(|| delay(2, 2_000_000));
        thread::sleep(Duration::from_secs(1));
        delete(1);
    });
    delay(1, 1);
    delete(2);
    delay(2, 1);
    assert_eq!(array(&vhost, "R")["state"], "online");
    assert_eq!(vhost.stop(), 0);
}

/// A superblock may say so as well.
#[test]
fn a_strip_of_a_tebibyte_does_not_end_the_process() {
    let vhost = Vhost::start(&[]);
    for name in ["A", "B", "C"] {
        let params = json!({"name": name, "num_blocks": 1_u64 << 36, "block_size": 512});
        vhost.ok("bdev_null_create", params);
    }
    let created = create("R", "raid5f", 1 << 30, &["A", "B", "C"], false);
    let _ = vhost.rpc("bdev_raid_create", created);
    assert_eq!(vhost.stop(), 0);
}

/// CRC32C as SPDK computes it for a superblock.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 }
        })
    })
}

/// The entries of a superblock may be in any order: each says its slot.
#[test]
fn a_stale_member_is_taken_back_whatever_the_order_of_the_superblock_s_table() {
    let vhost = Vhost::start(&[]);
    let add = |n: u32| {
        let name = format!("raid1-degraded-m{n}");
        let packed = Path::new("../raid/tests/images").join(format!("{name}.img.zst"));
        let file = vhost.dir().join(name);
        let status = Command::new("zstd").arg("-dqf").arg(packed).arg("-o").arg(&file).status();
        assert!(status.unwrap().success());
        let mut bytes = fs::read(&file).unwrap();
        let (first, second) = bytes[256..384].split_at_mut(64);
        first.swap_with_slice(second);
        bytes[16..20].fill(0);
        let crc = checksum(&bytes[..384]).to_le_bytes();
        bytes[16..20].copy_from_slice(&crc);
        fs::write(&file, bytes).unwrap();
        let uuid = format!("aaaaaaaa-0000-4000-8000-{n:012}");
        let params =
            json!({"name": format!("F{n}"), "filename": file, "block_size": 512, "uuid": uuid});
        vhost.ok("bdev_aio_create", params);
    };
    add(9);
    let online = array(&vhost, "raid1-degraded");
    assert_eq!(online["state"], "online");
    assert_eq!(online["base_bdevs_list"][1]["name"], "F9");
    add(8);
    wait_until("both are right", || {
        array(&vhost, "raid1-degraded")["num_base_bdevs_operational"] == 2
    });
    assert_eq!(vhost.stop(), 0);
}
