//! Logical volumes: the volumes of stores that SPDK has written are served, changed and left in
//! order; snapshots, clones and resizes beside guests' I/O; SPDK's answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::harness::{Launch, Refusal, Vhost, program, two_cores, wait_until};
use crate::support::verified_load;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{program} {args:?}: {error}{text}");
    text
}

/// The directory with the images that SPDK has written.
fn images() -> PathBuf {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/images");
    std::env::var("VHOST_IMAGES").unwrap_or_else(|_| path.to_owned()).into()
}

fn truth() -> Value {
    serde_json::from_slice(&fs::read(images().join("truth.json")).unwrap()).unwrap()
}

/// Unpacks an image.
fn image(dir: &Path, name: &str) -> PathBuf {
    let (packed, file) = (images().join(format!("{name}.img.zst")), dir.join(name));
    run("zstd", &["-dqf", packed.to_str().unwrap(), "-o", file.to_str().unwrap()]);
    file
}

/// Fails if the store in a file has contradictions.
fn check(file: &Path) {
    run(program("vhost-lvs").to_str().unwrap(), &["check", file.to_str().unwrap()]);
}

/// Makes a bdev of a file.
fn disk(vhost: &Vhost, name: &str, file: &Path, block_size: u64) {
    let params = json!({"name": name, "filename": file, "block_size": block_size});
    assert_eq!(vhost.ok("bdev_uring_create", params), name);
}

/// The SHA-256 of a bdev's content.
fn sha256(vhost: &Vhost, bdev: &str) -> String {
    let socket = vhost.dir().join("nbd");
    let device = format!("unix:{}", socket.display());
    vhost.ok("nbd_start_disk", json!({"bdev_name": bdev, "nbd_device": device}));
    let copy = vhost.dir().join("copy");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    vhost.ok("nbd_stop_disk", json!({"nbd_device": device}));
    let hash = run("sha256sum", &[copy.to_str().unwrap()])[..64].to_owned();
    fs::remove_file(copy).unwrap();
    hash
}

/// What `bdev_lvol_get_lvols` shows of a volume.
fn volume(vhost: &Vhost, name: &str) -> Value {
    let all = vhost.ok("bdev_lvol_get_lvols", Value::Null);
    let found = all.as_array().unwrap().iter().find(|volume| volume["name"] == name);
    found.unwrap_or_else(|| panic!("no volume {name}: {all}")).clone()
}

fn free_clusters(vhost: &Vhost) -> u64 {
    vhost.ok("bdev_lvol_get_lvstores", Value::Null)[0]["free_clusters"].as_u64().unwrap()
}

/// Compares the only store with what is recorded of an image.
fn compare(vhost: &Vhost, name: &str, truth: &Value) {
    let store = vhost.ok("bdev_lvol_get_lvstores", Value::Null)[0].clone();
    for field in ["free_clusters", "total_data_clusters", "uuid", "cluster_size"] {
        assert_eq!(store[field], truth[field], "{name}: {field}");
    }
    assert_eq!((&store["name"], &store["base_bdev"]), (&truth["lvstore"], &json!("base")));
    let wanted = truth["lvols"].as_object().unwrap();
    let shown = vhost.ok("bdev_lvol_get_lvols", Value::Null);
    assert_eq!(shown.as_array().unwrap().len(), wanted.len(), "{name}: {shown}");
    for (lvol, wanted) in wanted {
        let shown = volume(vhost, lvol);
        assert_eq!(shown["uuid"], wanted["uuid"], "{name}: {lvol}");
        // What the clone took over goes back to the snapshot, unlike with SPDK.
        let repaired = (name, lvol.as_str()) == ("lvs-snaprm-kept", "v");
        let allocated = &wanted["num_allocated_clusters"];
        let allocated = if repaired { &json!(2) } else { allocated };
        assert_eq!(&shown["num_allocated_clusters"], allocated, "{name}: {lvol}");
        assert_eq!(shown["is_thin_provisioned"], wanted["thin"], "{name}: {lvol}");
        assert_eq!(shown["is_clone"], json!(!wanted["parent"].is_null()), "{name}: {lvol}");
        assert_eq!(shown["is_degraded"], false, "{name}: {lvol}");
        let alias = shown["alias"].as_str().unwrap();
        let bdev = vhost.bdev(alias);
        assert_eq!((&bdev["name"], &bdev["aliases"]), (&wanted["uuid"], &json!([alias])));
        let size = bdev["num_blocks"].as_u64().unwrap() * bdev["block_size"].as_u64().unwrap();
        let clusters = wanted["clusters"].as_u64().unwrap();
        assert_eq!(size, clusters * truth["cluster_size"].as_u64().unwrap(), "{name}: {lvol}");
        // An empty disk cannot be exported.
        if size > 0 {
            assert_eq!(sha256(vhost, alias), wanted["sha256"], "{name}: {lvol}");
        }
    }
}

#[test]
fn every_store_that_spdk_has_written_is_served_and_left_in_order() {
    let (dir, truth) = (TempDir::new().unwrap(), truth());
    let stores = truth.as_object().unwrap().iter().filter(|(_, truth)| !truth["lvols"].is_null());
    let mut count = 0;
    for (name, truth) in stores {
        let file = image(dir.path(), name);
        // The store is found when its disk comes: also at the second start.
        for _ in 0..2 {
            let vhost = Vhost::start(&[]);
            if name == "lvs-esnap" {
                let base = image(dir.path(), "lvs-esnap-base");
                vhost.ok(
                    "bdev_aio_create",
                    json!({
                        "name": "external", "filename": base, "block_size": 512,
                        "uuid": "33333333-4444-4555-8666-777777777777",
                    }),
                );
            }
            disk(&vhost, "base", &file, truth["block_size"].as_u64().unwrap());
            compare(&vhost, name, truth);
            assert_eq!(vhost.stop(), 0);
        }
        check(&file);
        fs::remove_file(file).unwrap();
        count += 1;
    }
    assert_eq!(count, 15);
}

/// Starts a server with a store of 64 KiB clusters on a file, and returns the file.
fn with_store(dir: &TempDir, mib: u64) -> (Vhost, PathBuf) {
    let file = dir.path().join("disk");
    fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
    let vhost = Vhost::start(&["-m", two_cores()]);
    disk(&vhost, "base", &file, 512);
    let params = json!({"bdev_name": "base", "lvs_name": "lvs", "cluster_sz": 65536});
    vhost.ok("bdev_lvol_create_lvstore", params);
    (vhost, file)
}

fn create(vhost: &Vhost, name: &str, mib: u64, thin: bool) -> String {
    let params = json!({
        "lvs_name": "lvs", "lvol_name": name, "size_in_mib": mib, "thin_provision": thin,
    });
    vhost.ok("bdev_lvol_create", params).as_str().unwrap().to_owned()
}

#[test]
fn snapshots_clones_and_inflation_beside_a_guest_lose_nothing() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 256);
    let uuid = create(&vhost, "v", 16, true);
    let guest = verified_load::guest(&vhost, &uuid, 2);
    for n in 0..8 {
        verified_load::goes_on(&vhost, &uuid);
        let params = json!({"lvol_name": "lvs/v", "snapshot_name": format!("s{n}")});
        vhost.ok("bdev_lvol_snapshot", params);
    }
    let clone = json!({"snapshot_name": "lvs/s7", "clone_name": "c"});
    let clone = vhost.ok("bdev_lvol_clone", clone).as_str().unwrap().to_owned();
    let other = verified_load::guest(&vhost, &clone, 1);
    verified_load::goes_on(&vhost, &clone);
    vhost.ok("bdev_lvol_decouple_parent", json!({"name": "lvs/c"}));
    assert_eq!(volume(&vhost, "c")["is_clone"], true, "of s6 now");
    verified_load::goes_on(&vhost, &clone);
    vhost.ok("bdev_lvol_inflate", json!({"name": "lvs/c"}));
    let inflated = volume(&vhost, "c");
    assert_eq!(
        (&inflated["is_clone"], &inflated["is_thin_provisioned"]),
        (&json!(false), &json!(false))
    );
    assert_eq!(inflated["num_allocated_clusters"], 256);
    // The clusters of each snapshot go to the one after it.
    for n in 0..8 {
        vhost.ok("bdev_lvol_delete", json!({"name": format!("lvs/s{n}")}));
        verified_load::goes_on(&vhost, &uuid);
    }
    verified_load::goes_on(&vhost, &clone);
    verified_load::end(other);
    verified_load::end(guest);
    assert_eq!(volume(&vhost, "v")["is_clone"], false);
    let before: Vec<String> = ["lvs/v", "lvs/c"].map(|name| sha256(&vhost, name)).into();
    assert_eq!(vhost.stop(), 0);
    check(&file);

    let vhost = Vhost::start(&[]);
    disk(&vhost, "base", &file, 512);
    let after: Vec<String> = ["lvs/v", "lvs/c"].map(|name| sha256(&vhost, name)).into();
    assert_eq!(before, after);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_killed_server_s_volumes_are_recovered() {
    let dir = TempDir::new().unwrap();
    let (mut vhost, file) = with_store(&dir, 64);
    let uuid = create(&vhost, "v", 16, true);
    let guest = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    vhost.ok("bdev_lvol_snapshot", json!({"lvol_name": "lvs/v", "snapshot_name": "s"}));
    verified_load::goes_on(&vhost, &uuid);
    vhost.signal("KILL");
    vhost.wait();
    drop(guest);
    check(&file);
    // Found from the configuration, too.
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_uring_create",
         "params": {"name": "base", "filename": file, "block_size": 512}},
    ]}]});
    let vhost = Launch::new().config(&config.to_string()).start();
    assert_eq!(vhost.bdev_names().len(), 3);
    let (clone, snapshot) = (volume(&vhost, "v"), volume(&vhost, "s"));
    assert_eq!((&clone["is_clone"], &snapshot["is_snapshot"]), (&json!(true), &json!(true)));
    let again = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    verified_load::end(again);
    assert!(!vhost.spdk_rpc(&["save_config"]).unwrap().contains("bdev_lvol_"), "as in SPDK");
    assert_eq!(vhost.stop(), 0);
    check(&file);
}

#[test]
fn discards_give_clusters_back_and_deleted_data_does_not_reappear() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let free = free_clusters(&vhost);
    create(&vhost, "v", 16, true);
    let export = |name: &str| {
        let device = format!("unix:{}", vhost.dir().join("x").display());
        vhost.ok("nbd_start_disk", json!({"bdev_name": name, "nbd_device": device}));
        format!("nbd+unix:///?socket={}", vhost.dir().join("x").display())
    };
    let stop = || {
        let device = format!("unix:{}", vhost.dir().join("x").display());
        vhost.ok("nbd_stop_disk", json!({"nbd_device": device}));
    };
    let uri = export("lvs/v");
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 0 1M", &uri]);
    assert_eq!(free_clusters(&vhost), free - 16);
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 4k 1000k", &uri]);
    assert_eq!(free_clusters(&vhost), free - 2, "14 whole clusters, and parts of two");
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x5a 0 4k", "-c", "read -P 0 64k 896k", &uri]);
    stop();
    vhost.ok("bdev_lvol_delete", json!({"name": "lvs/v"}));
    assert_eq!(free_clusters(&vhost), free);
    // A block of each cluster of a new volume is written; the rest is not the old data.
    create(&vhost, "w", 16, true);
    let uri = export("lvs/w");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 512", "-c", "read -P 0 512 65024", &uri]);
    stop();
    assert_eq!(vhost.stop(), 0);
    check(&file);
}

#[test]
fn a_guest_sees_a_volume_grow_and_a_volume_in_use_does_not_shrink() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let uuid = create(&vhost, "v", 4, false);
    let guest = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    let resize =
        |mib: u64| vhost.rpc("bdev_lvol_resize", json!({"name": uuid, "size_in_mib": mib}));
    assert_eq!(resize(8), Ok(json!(true)));
    verified_load::goes_on(&vhost, &uuid);
    let busy = Refusal::new(-32602, "Device or resource busy");
    assert_eq!(resize(2), Err(busy));
    let blocks = |vhost: &Vhost| vhost.bdev(&uuid)["num_blocks"].clone();
    assert_eq!(blocks(&vhost), 8 << 11, "nothing has changed");
    verified_load::goes_on(&vhost, &uuid);
    verified_load::end(guest);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": format!("of-{uuid}")}));
    wait_until("the channels are closed", || resize(2) == Ok(json!(true)));
    assert_eq!(blocks(&vhost), 2 << 11);
    assert_eq!(resize(1 << 44), Err(Refusal::new(-22, "Invalid argument")));
    assert_eq!(vhost.stop(), 0);
    check(&file);
}

#[test]
fn a_removed_disk_takes_its_volumes_and_is_left_in_order() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let uuid = create(&vhost, "v", 16, true);
    let guest = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    vhost.ok("bdev_uring_delete", json!({"name": "base"}));
    assert_eq!(vhost.bdev_names(), Vec::<String>::new());
    assert_eq!(vhost.ok("bdev_lvol_get_lvstores", Value::Null), json!([]));
    drop(guest);
    check(&file);
    disk(&vhost, "base", &file, 512);
    assert_eq!(vhost.bdev_names(), ["base", &uuid]);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn clones_of_other_bdevs_read_them_and_wait_for_them() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let base = dir.path().join("external");
    fs::write(&base, vec![0x77; 4 << 20]).unwrap();
    let uuid = "33333333-4444-4555-8666-777777777777";
    let external = || {
        vhost.ok(
            "bdev_aio_create",
            json!({
                "name": "external", "filename": base, "block_size": 512, "uuid": uuid,
            }),
        )
    };
    external();
    let params = json!({"bdev": "external", "lvs_name": "lvs", "clone_name": "c"});
    let clone = vhost.ok("bdev_lvol_clone_bdev", params).as_str().unwrap().to_owned();
    let hash = &run("sha256sum", &[base.to_str().unwrap()])[..64];
    assert_eq!(sha256(&vhost, "lvs/c"), hash);
    let shown = vhost.ok("bdev_get_bdevs", json!({"name": "external"}));
    assert_eq!(shown[0]["claim_type"], "read_many_write_none");
    let params = json!({"ctrlr": "x", "dev_name": "external"});
    let refused = vhost.err("vhost_create_blk_controller", params);
    assert_eq!(refused, Refusal::new(-32602, "Operation not permitted"));
    let specific = |vhost: &Vhost| vhost.bdev(&clone)["driver_specific"]["lvol"].clone();
    assert_eq!(specific(&vhost)["external_snapshot_name"], uuid);
    // Without it, the volume has no bdev.
    vhost.ok("bdev_aio_delete", json!({"name": "external"}));
    assert_eq!(vhost.bdev_names(), ["base"]);
    assert_eq!(volume(&vhost, "c")["is_degraded"], true);
    external();
    assert_eq!(volume(&vhost, "c")["is_degraded"], false);
    let guest = verified_load::guest(&vhost, &clone, 1);
    verified_load::goes_on(&vhost, &clone);
    verified_load::end(guest);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": format!("of-{clone}")}));
    vhost.ok("bdev_lvol_inflate", json!({"name": clone}));
    assert_eq!(volume(&vhost, "c")["is_esnap_clone"], false);
    assert_eq!(vhost.stop(), 0);
    check(&file);
}

#[test]
fn shallow_copies_have_what_the_snapshot_itself_has() {
    let dir = TempDir::new().unwrap();
    let (vhost, _file) = with_store(&dir, 64);
    let uuid = create(&vhost, "v", 4, true);
    let guest = verified_load::guest(&vhost, &uuid, 1);
    verified_load::goes_on(&vhost, &uuid);
    verified_load::end(guest);
    vhost.ok("bdev_lvol_snapshot", json!({"lvol_name": "lvs/v", "snapshot_name": "s"}));
    vhost.ok("bdev_malloc_create", json!({"name": "M", "num_blocks": 8192, "block_size": 512}));
    let start = |from: &str, to: &str| {
        let params = json!({"src_lvol_name": from, "dst_bdev_name": to});
        vhost.rpc("bdev_lvol_start_shallow_copy", params)
    };
    let check = |id: u32| vhost.rpc("bdev_lvol_check_shallow_copy", json!({"operation_id": id}));
    let ended = |id: u32| {
        let mut answer = Value::Null;
        wait_until("the copy ends", || {
            answer = check(id).unwrap();
            answer["state"] != "in progress"
        });
        answer
    };
    assert_eq!(start("lvs/v", "x"), Err(Refusal::new(-32602, "No such device")));
    assert_eq!(start("lvs/v", "M"), Ok(json!({"operation_id": 1})));
    assert_eq!(ended(1)["error"], "Operation not permitted", "the volume can be written");
    assert_eq!(start("lvs/s", "M"), Ok(json!({"operation_id": 2})));
    let answer = ended(2);
    let allocated = volume(&vhost, "s")["num_allocated_clusters"].clone();
    assert_eq!((&answer["state"], &answer["copied_clusters"]), (&json!("complete"), &allocated));
    assert_eq!(check(2), Err(Refusal::new(-19, "No such device")), "it was reported");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn spdk_s_answers() {
    let dir = TempDir::new().unwrap();
    let (vhost, _file) = with_store(&dir, 64);
    let (none, exists) = (Refusal::new(-19, "No such device"), Refusal::new(-17, "File exists"));
    let invalid = Refusal::new(-22, "Invalid argument");
    let late = |text: &str| Refusal::new(-32602, text);
    let decode = Refusal::new(-32603, "spdk_json_decode_object failed");
    let new_store = |bdev: &str, name: &str| {
        vhost.err("bdev_lvol_create_lvstore", json!({"bdev_name": bdev, "lvs_name": name}))
    };
    vhost.malloc("M");
    assert_eq!(new_store("x", "y"), none);
    assert_eq!(new_store("base", "y"), Refusal::new(-1, "Operation not permitted"));
    assert_eq!(new_store("M", "lvs"), exists);
    assert_eq!(new_store("M", ""), invalid);
    assert_eq!(new_store("M", &"n".repeat(64)), invalid);
    assert_eq!(vhost.err("bdev_lvol_create_lvstore", json!({"bdev_name": "M"})), decode);

    create(&vhost, "v", 1, false);
    let new = |params: Value| vhost.err("bdev_lvol_create", params);
    let size = 1;
    assert_eq!(new(json!({"lvol_name": "w", "size_in_mib": size})), invalid);
    let twice = json!({"lvol_name": "v", "size_in_mib": size, "lvs_name": "lvs"});
    assert_eq!(new(twice), exists);
    let none_of_it = json!({"lvol_name": "w", "size_in_mib": size, "lvs_name": "x"});
    assert_eq!(new(none_of_it), none);
    let large = json!({"lvol_name": "w", "size_in_mib": 1000, "lvs_name": "lvs"});
    assert_eq!(new(large), late("No space left on device"));

    let snapshot = |of: &str, name: &str| {
        vhost.rpc("bdev_lvol_snapshot", json!({"lvol_name": of, "snapshot_name": name}))
    };
    let clone = |of: &str, name: &str| {
        vhost.rpc("bdev_lvol_clone", json!({"snapshot_name": of, "clone_name": name}))
    };
    assert_eq!(snapshot("lvs/x", "s"), Err(none.clone()));
    assert_eq!(snapshot("lvs/v", "v"), Err(late("File exists")));
    assert_eq!(clone("lvs/v", "c"), Err(late("Invalid argument")));
    snapshot("lvs/v", "s").unwrap();
    assert_eq!(snapshot("lvs/s", "t"), Err(late("Invalid argument")));
    clone("lvs/s", "c").unwrap();
    let delete = |name: &str| vhost.rpc("bdev_lvol_delete", json!({"name": name}));
    assert_eq!(delete("lvs/s"), Err(Refusal::new(-32603, "Operation not permitted")));
    assert_eq!(delete("lvs/x"), Err(none.clone()));
    assert_eq!(delete("M"), Err(none.clone()));

    let rename = |old: &str, new: &str| {
        vhost.rpc("bdev_lvol_rename", json!({"old_name": old, "new_name": new}))
    };
    assert_eq!(rename("lvs/s", "t"), Err(late("Operation not permitted")));
    assert!(vhost.rpc("bdev_get_bdevs", json!({"name": "lvs/s"})).is_ok(), "it keeps its alias");
    assert_eq!(rename("lvs/v", "c"), Err(late("File exists")));
    assert_eq!(rename("lvs/v", ""), Err(late("Invalid argument")));
    assert_eq!(rename("lvs/v", "a/b"), Ok(json!(true)));
    assert!(vhost.rpc("bdev_get_bdevs", json!({"name": "lvs/a/b"})).is_ok());
    let rename_store = |old: &str, new: &str| {
        let params = json!({"old_name": old, "new_name": new});
        vhost.rpc("bdev_lvol_rename_lvstore", params)
    };
    assert_eq!(rename_store("x", "y"), Err(Refusal::new(-2, "Lvol store x not found")));
    assert_eq!(rename_store("lvs", "lvs"), Ok(json!(true)));
    assert_eq!(rename_store("lvs", "other"), Ok(json!(true)));
    assert!(vhost.rpc("bdev_get_bdevs", json!({"name": "other/a/b"})).is_ok());
    assert_eq!(vhost.err("bdev_get_bdevs", json!({"name": "lvs/a/b"})), none);

    let decouple = |name: &str| vhost.rpc("bdev_lvol_decouple_parent", json!({"name": name}));
    assert_eq!(decouple("other/c"), Ok(json!(true)));
    assert_eq!(decouple("other/c"), Err(late("Invalid argument")), "it has no parent now");
    assert_eq!(vhost.ok("bdev_lvol_set_read_only", json!({"name": "other/c"})), true);
    let io = &vhost.bdev("other/c")["supported_io_types"];
    assert_eq!((&io["write"], &io["unmap"]), (&json!(false), &json!(false)));
    let params = json!({"bdev": "other/c", "lvs_name": "other", "clone_name": "d"});
    let text = "bdev is an lvol in same lvs as clone; use bdev_lvol_clone instead";
    assert_eq!(vhost.err("bdev_lvol_clone_bdev", params), late(text));

    for method in ["bdev_lvol_delete_lvstore", "bdev_lvol_grow_lvstore"] {
        assert_eq!(vhost.err(method, json!({})), decode);
        assert_eq!(vhost.err(method, json!({"lvs_name": "x"})), none);
    }
    assert_eq!(vhost.ok("bdev_lvol_grow_lvstore", json!({"lvs_name": "other"})), true);
    let both = json!({"uuid": "x", "lvs_name": "other"});
    assert_eq!(vhost.err("bdev_lvol_get_lvstores", both), invalid);
    assert_eq!(vhost.ok("bdev_lvol_delete_lvstore", json!({"lvs_name": "other"})), true);
    assert_eq!(vhost.bdev_names(), ["base", "M"]);
    assert_eq!(vhost.bdev("base")["claimed"], false);
    assert_eq!(vhost.stop(), 0);
}

/// Names that are taken, and bdevs on bdevs: what cannot be done leaves nothing half-done.
#[test]
fn what_is_refused_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let exists = Refusal::new(-32602, "File exists");
    let none = Refusal::new(-19, "No such device");
    let uuid = create(&vhost, "v", 1, true);
    // Another bdev has the alias that a volume would have.
    vhost.malloc("lvs/x");
    vhost.malloc("other/v");
    let new = json!({"lvol_name": "x", "size_in_mib": 1, "lvs_name": "lvs"});
    assert_eq!(vhost.err("bdev_lvol_create", new), Refusal::new(-17, "File exists"));
    let snapshot = json!({"lvol_name": uuid, "snapshot_name": "x"});
    assert_eq!(vhost.err("bdev_lvol_snapshot", snapshot), exists);
    let rename = json!({"old_name": "lvs/v", "new_name": "x"});
    assert_eq!(vhost.err("bdev_lvol_rename", rename), exists);
    let rename = json!({"old_name": "lvs", "new_name": "other"});
    assert_eq!(vhost.err("bdev_lvol_rename_lvstore", rename), exists);
    let volumes = vhost.ok("bdev_lvol_get_lvols", Value::Null);
    assert_eq!((volumes.as_array().unwrap().len(), &volumes[0]["alias"]), (1, &json!("lvs/v")));

    // A volume cannot read from what is built on it.
    let passthru = json!({"base_bdev_name": "lvs/v", "name": "P"});
    vhost.ok("bdev_passthru_create", passthru);
    for parent in ["P", "lvs/v"] {
        let set = json!({"lvol_name": uuid, "parent_name": parent});
        let refused = vhost.err("bdev_lvol_set_parent_bdev", set);
        assert_eq!(refused, Refusal::new(-32602, "Invalid argument"));
    }
    vhost.ok("bdev_passthru_delete", json!({"name": "P"}));

    // More clusters than a table has.
    let large = json!({"name": uuid, "size_in_mib": 5 << 20});
    let refused = vhost.err("bdev_lvol_resize", large);
    assert_eq!(refused, Refusal::new(-32602, "Invalid argument"));

    // A store inside a volume takes no name, and is not found.
    create(&vhost, "w", 8, false);
    let inner = json!({"bdev_name": "lvs/w", "lvs_name": "inner", "cluster_sz": 65536});
    vhost.ok("bdev_lvol_create_lvstore", inner);
    assert_eq!(vhost.stop(), 0);
    check(&file);
    let vhost = Vhost::start(&[]);
    disk(&vhost, "base", &file, 512);
    let inner = json!({"lvs_name": "inner"});
    assert_eq!(vhost.err("bdev_lvol_get_lvstores", inner), none);
    assert_eq!(vhost.stop(), 0);
}

/// A volume whose external snapshot is exchanged reads the new one, and the old one is free.
#[test]
fn external_snapshots_are_exchanged_and_let_go_of() {
    let dir = TempDir::new().unwrap();
    let (vhost, file) = with_store(&dir, 64);
    let uuids = ["33333333-4444-4555-8666-777777777777", "33333333-4444-4555-8666-888888888888"];
    for (name, (uuid, byte)) in ["A", "B"].into_iter().zip(uuids.into_iter().zip([0x0a, 0x0b])) {
        let path = dir.path().join(name);
        fs::write(&path, vec![byte; 1 << 20]).unwrap();
        vhost.ok(
            "bdev_aio_create",
            json!({
                "name": name, "filename": path, "block_size": 512, "uuid": uuid,
            }),
        );
    }
    let clone = json!({"bdev": "A", "lvs_name": "lvs", "clone_name": "c"});
    vhost.ok("bdev_lvol_clone_bdev", clone);
    let hash = |byte: &str| {
        let path = dir.path().join(byte);
        run("sha256sum", &[path.to_str().unwrap()])[..64].to_owned()
    };
    assert_eq!(sha256(&vhost, "lvs/c"), hash("A"));
    let set = json!({"lvol_name": "lvs/c", "parent_name": "B"});
    wait_until("the export has closed its channels", || {
        vhost.rpc("bdev_lvol_set_parent_bdev", set.clone()).is_ok()
    });
    assert_eq!(sha256(&vhost, "lvs/c"), hash("B"));
    let claimed = |name: &str| vhost.bdev(name)["claimed"].clone();
    assert_eq!((claimed("A"), claimed("B")), (json!(false), json!(true)));
    vhost.ok("bdev_aio_delete", json!({"name": "A"}));
    vhost.ok("bdev_lvol_delete", json!({"name": "lvs/c"}));
    vhost.ok("bdev_aio_delete", json!({"name": "B"}));
    assert_eq!(vhost.stop(), 0);
    check(&file);
}
