//! Logical volumes on a device that hangs or fails: only what needs the device waits, and the store
//! is in order afterwards.

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{Vhost, two_cores, wait_until};
use crate::support::slow_files::{Kind, Op, SlowFiles};
use crate::support::verified_load;

fn store(vhost: &Vhost, base: &str) {
    let params = json!({"bdev_name": base, "lvs_name": "lvs", "cluster_sz": 65536});
    vhost.ok("bdev_lvol_create_lvstore", params);
}

fn create(vhost: &Vhost, name: &str) -> String {
    let params = json!({
        "lvs_name": "lvs", "lvol_name": name, "size_in_mib": 8, "thin_provision": true,
    });
    vhost.ok("bdev_lvol_create", params).as_str().unwrap().to_owned()
}

fn count(vhost: &Vhost, bdev: &str, key: &str) -> u64 {
    vhost.ok("bdev_get_iostat", json!({"names": [bdev]}))["bdevs"][0][key].as_u64().unwrap()
}

/// A store on a file whose flushes hang, with a volume that has its clusters and one that has none.
fn hanging(files: &SlowFiles) -> (Vhost, String, String) {
    let vhost = Vhost::start(&["-m", two_cores()]);
    let params = json!({"name": "F", "filename": files.path("disk"), "block_size": 512});
    vhost.ok("bdev_uring_create", params);
    store(&vhost, "F");
    let (full, empty) = (create(&vhost, "full"), create(&vhost, "empty"));
    vhost.malloc("M");
    (vhost, full, empty)
}

#[test]
fn an_allocating_write_whose_device_hangs_holds_up_nobody_else() {
    let Some(files) = SlowFiles::mount(&[("disk", Kind::Direct, 64 << 20)]) else { return };
    let (vhost, full, empty) = hanging(&files);
    let guest = verified_load::guest(&vhost, &full, 1);
    let neighbour = verified_load::guest(&vhost, "M", 1);
    // The load uses the first MiB.
    wait_until("the volume has its clusters", || {
        let bdev = vhost.ok("bdev_get_bdevs", json!({"name": full}));
        bdev[0]["driver_specific"]["lvol"]["num_allocated_clusters"] == 16
    });
    verified_load::end(guest);
    // Reads: the file system lets writes of a file wait for its flush.
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(&format!("of-{full}"));
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_any(1, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: 0..256, reads: 100, verify: false, ..Default::default() };
    let reader = Load::start(queues, options).unwrap();
    files.hold("disk", Op::Fsync);
    let waiting = verified_load::guest(&vhost, &empty, 1);
    files.wait_for_held("disk", Op::Fsync, 1);
    verified_load::goes_on(&vhost, "M");
    let reads = count(&vhost, &full, "num_read_ops");
    wait_until("clusters are read", || count(&vhost, &full, "num_read_ops") > reads + 200);
    assert_eq!(count(&vhost, &empty, "num_write_ops"), 0);
    // What is shown needs no device; neither do other bdevs.
    assert_eq!(vhost.ok("bdev_lvol_get_lvols", Value::Null).as_array().unwrap().len(), 2);
    assert_eq!(vhost.ok("bdev_lvol_get_lvstores", Value::Null)[0]["name"], "lvs");
    vhost.null("N");
    vhost.ok("bdev_null_delete", json!({"name": "N"}));
    // An operation on the store waits; other clients' calls do not.
    let mut other = vhost.connect();
    other.send("bdev_lvol_snapshot", json!({"lvol_name": "lvs/full", "snapshot_name": "s"}));
    verified_load::goes_on(&vhost, "M");
    assert!(!other.has_answer());
    files.release("disk", Op::Fsync);
    assert!(other.receive().1.is_ok());
    for (bdev, guest) in [("M", neighbour), (&empty, waiting)] {
        verified_load::goes_on(&vhost, bdev);
        verified_load::end(guest);
    }
    let (summary, _) = reader.stop().unwrap();
    assert_eq!((summary.first_problem, summary.errors), (None, 0));
    front_end.disconnect().unwrap();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn the_process_ends_while_a_store_s_device_hangs() {
    let Some(files) = SlowFiles::mount(&[("disk", Kind::Direct, 64 << 20)]) else { return };
    let (mut vhost, full, _) = hanging(&files);
    let guest = verified_load::guest(&vhost, &full, 1);
    verified_load::goes_on(&vhost, &full);
    files.hold("disk", Op::Fsync);
    let mut client = vhost.connect();
    client.send("bdev_lvol_snapshot", json!({"lvol_name": "lvs/full", "snapshot_name": "s"}));
    files.wait_for_held("disk", Op::Fsync, 1);
    vhost.signal("TERM");
    wait_until("it has ended", || vhost.has_ended_but_for_waits());
    files.release("disk", Op::Fsync);
    assert_eq!(vhost.wait(), Some(0));
    drop(guest);
}

#[test]
fn a_store_is_loaded_again_after_a_failed_write_of_its_metadata() {
    let vhost = Vhost::start(&["-m", two_cores()]);
    vhost.ok("bdev_malloc_create", json!({"name": "M", "num_blocks": 1 << 17, "block_size": 512}));
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    let params = json!({"bdev_name": "EE_M", "lvs_name": "lvs", "cluster_sz": 65536});
    vhost.ok("bdev_lvol_create_lvstore", params);
    let params = json!({
        "lvs_name": "lvs", "lvol_name": "v", "size_in_mib": 1, "thin_provision": true,
    });
    let uuid = vhost.ok("bdev_lvol_create", params).as_str().unwrap().to_owned();
    let inject = |num: u32| {
        let params = json!({
            "name": "EE_M", "io_type": "write", "error_type": "failure", "num": num,
        });
        vhost.ok("bdev_error_inject_error", params);
    };
    for n in 1..6 {
        inject(n);
        let params = json!({"lvol_name": "lvs/v", "snapshot_name": format!("s{n}")});
        assert!(vhost.rpc("bdev_lvol_snapshot", params.clone()).is_err(), "{n} failures");
        // The rest of the failures meet the recovery, and then the next attempts.
        wait_until("a snapshot is taken", || {
            vhost.rpc("bdev_lvol_snapshot", params.clone()).is_ok()
        });
    }
    let guest = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    verified_load::end(guest);
    let names = vhost.ok("bdev_lvol_get_lvols", Value::Null);
    assert_eq!(names.as_array().unwrap().len(), 6, "{names}");
    assert_eq!(vhost.stop(), 0);
}
