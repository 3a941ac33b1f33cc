//! RAID arrays: SPDK's answers, arrays that SPDK has written, members that fail or go away under
//! verifying load, rebuilds, and restarts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::harness::{Launch, Refusal, Vhost, wait_until};
use crate::support::verified_load::{end, goes_on, guest};

const MB: u64 = 1 << 20;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn sha256(vhost: &Vhost, bdev: &str) -> String {
    let (socket, copy) = (vhost.dir().join(format!("{bdev}.nbd")), vhost.dir().join(bdev));
    let device = format!("unix:{}", socket.display());
    vhost.ok("nbd_start_disk", json!({"bdev_name": bdev, "nbd_device": device}));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    vhost.ok("nbd_stop_disk", json!({"nbd_device": device}));
    run("sha256sum", &[copy.to_str().unwrap()])[..64].to_owned()
}

fn uuid(n: u32) -> String {
    format!("aaaaaaaa-0000-4000-8000-{n:012}")
}

fn malloc(vhost: &Vhost, name: &str, mb: u64) {
    let params = json!({"name": name, "num_blocks": mb * 2048, "block_size": 512});
    vhost.ok("bdev_malloc_create", params);
}

fn create(name: &str, level: &str, strip_kb: u64, bases: &[&str], superblock: bool) -> Value {
    json!({
        "name": name, "raid_level": level, "strip_size_kb": strip_kb, "base_bdevs": bases,
        "superblock": superblock,
    })
}

fn arrays(vhost: &Vhost, category: &str) -> Value {
    vhost.ok("bdev_raid_get_bdevs", json!({"category": category}))
}

fn array(vhost: &Vhost, name: &str) -> Value {
    let all = arrays(vhost, "all");
    let found = all.as_array().unwrap().iter().find(|array| array["name"] == name);
    found.cloned().unwrap_or(Value::Null)
}

fn wait_for_members(vhost: &Vhost, name: &str, count: u64) {
    wait_until("the array has its members", || {
        let array = array(vhost, name);
        array["num_base_bdevs_operational"] == count && array["process"].is_null()
    });
}

/// A file of this size, as a bdev with a fixed UUID.
fn file(vhost: &Vhost, path: &Path, n: u32, block_size: u64) {
    let name = format!("F{n}");
    let params = json!({
        "name": name, "filename": path, "block_size": block_size, "uuid": uuid(n),
        "fallocate": true,
    });
    assert_eq!(vhost.ok("bdev_aio_create", params), name);
}

fn add(vhost: &Vhost, array: &str, base: &str) -> Result<Value, Refusal> {
    vhost.rpc("bdev_raid_add_base_bdev", json!({"raid_bdev": array, "base_bdev": base}))
}

fn remove(vhost: &Vhost, base: &str) -> Result<Value, Refusal> {
    vhost.rpc("bdev_raid_remove_base_bdev", json!({"name": base}))
}

#[test]
fn answers_are_spdks() {
    let vhost = Vhost::start(&[]);
    let refused = |name: &str, code: i64, why: &str| {
        Refusal::new(code, &format!("Failed to create RAID bdev {name}: {why}"))
    };
    let err = |params: Value| vhost.err("bdev_raid_create", params);
    let parse = || Refusal::new(-32700, "spdk_json_decode_object failed");
    assert_eq!(err(json!({"name": "R"})), parse());
    assert_eq!(err(create("R", "raid7", 64, &["A", "B"], false)), parse());
    assert_eq!(vhost.err("bdev_raid_delete", json!({})), parse());
    assert_eq!(vhost.err("bdev_raid_get_bdevs", json!({"category": "x"})), parse());
    let add_parse = Refusal::new(-32603, "spdk_json_decode_object failed");
    assert_eq!(vhost.err("bdev_raid_add_base_bdev", json!({})), add_parse);
    for bad in [
        create("R", "raid0", 0, &["A"], false),
        create("R", "raid0", 48, &["A"], false),
        create("R", "raid1", 64, &["A", "B"], false),
        create("R", "raid1", 0, &["A"], false),
        create("R", "raid5f", 64, &["A", "B"], false),
    ] {
        assert_eq!(err(bad), refused("R", -22, "Invalid argument"));
    }
    let gone = Refusal::new(-19, "raid bdev R not found");
    assert_eq!(vhost.err("bdev_raid_delete", json!({"name": "R"})), gone);
    let window = json!({"process_window_size_kb": 0});
    let invalid = Refusal::new(-22, "Invalid argument");
    assert_eq!(vhost.err("bdev_raid_set_options", window), invalid);
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name, 8));
    malloc(&vhost, "small", 2);
    assert_eq!(vhost.ok("bdev_raid_create", create("R", "1", 0, &["A", "B"], true)), true);
    assert_eq!(err(create("R", "raid0", 64, &["C"], false)), refused("R", -17, "File exists"));
    assert_eq!(err(create("A", "raid0", 64, &["C"], false)), refused("A", -17, "File exists"));
    let claimed = err(create("S", "raid0", 64, &["A", "C"], false));
    assert_eq!(claimed, refused("S", -1, "Operation not permitted"));
    let twice = err(create("S", "raid0", 64, &["C", "C"], false));
    assert_eq!(twice, refused("S", -1, "Operation not permitted"));
    let shown = array(&vhost, "R");
    let uuid_of = |name: &str| vhost.bdev(name)["uuid"].clone();
    let base = |name: &str| {
        json!({
            "name": name, "uuid": uuid_of(name), "is_configured": true, "data_offset": 2048,
            "data_size": 14336,
        })
    };
    let mut expected = json!({
        "name": "R", "uuid": uuid_of("R"), "strip_size_kb": 0, "state": "online",
        "raid_level": "raid1", "superblock": true, "num_base_bdevs": 2,
        "num_base_bdevs_discovered": 2, "num_base_bdevs_operational": 2,
        "base_bdevs_list": [base("A"), base("B")],
    });
    assert_eq!(shown, expected);
    let bdev = vhost.bdev("R");
    expected.as_object_mut().unwrap().remove("name");
    assert_eq!(bdev["driver_specific"]["raid"], expected);
    assert_eq!(
        (&bdev["product_name"], &bdev["num_blocks"]),
        (&json!("Raid Volume"), &json!(14336))
    );
    let none = Refusal::new(-19, "raid bdev X is not found in config");
    assert_eq!(add(&vhost, "X", "C"), Err(none));
    let text = "Failed to add base bdev C to RAID bdev R: Invalid argument";
    assert_eq!(add(&vhost, "R", "C"), Err(Refusal::new(-22, text)), "no slot is free");
    let text = "Failed to remove base bdev from raid bdev";
    assert_eq!(remove(&vhost, "C"), Err(Refusal::new(-19, text)));
    assert_eq!(remove(&vhost, "A"), Ok(json!(true)));
    let text = "Failed to add base bdev small to RAID bdev R: Invalid argument";
    assert_eq!(add(&vhost, "R", "small"), Err(Refusal::new(-22, text)), "too small");
    assert_eq!(array(&vhost, "R")["base_bdevs_list"][0]["name"], Value::Null);
    // A superblock of another array: with and without one of its own.
    assert_eq!(vhost.ok("bdev_raid_delete", json!({"name": "R"})), true);
    for superblock in [false, true] {
        let foreign = err(create("S", "raid0", 64, &["A", "C"], superblock));
        assert_eq!(foreign, refused("S", -17, "File exists"));
    }
    assert_eq!(vhost.stop(), 0);
}

/// #3497: an array that waits for a member never comes up with an empty one.
#[test]
fn an_array_waits_for_its_members_and_for_no_others() {
    let vhost = Vhost::start(&[]);
    malloc(&vhost, "A", 8);
    assert_eq!(vhost.ok("bdev_raid_create", create("R", "raid0", 64, &["A", "B"], false)), true);
    assert_eq!(arrays(&vhost, "online"), json!([]));
    let waits = &arrays(&vhost, "configuring")[0];
    assert_eq!(waits["uuid"], "00000000-0000-0000-0000-000000000000");
    assert_eq!(
        (&waits["state"], &waits["num_base_bdevs_discovered"]),
        (&json!("configuring"), &json!(1))
    );
    malloc(&vhost, "C", 8);
    assert_eq!(add(&vhost, "R", "C").unwrap_err().code, -22);
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert!(saved.contains("bdev_raid_create"), "{saved}");
    malloc(&vhost, "B", 8);
    assert_eq!(array(&vhost, "R")["state"], "online");
    assert_eq!(vhost.bdev("R")["num_blocks"], 32768);
    // A member goes: the array is offline, and online again when it is back.
    vhost.ok("bdev_malloc_delete", json!({"name": "B"}));
    wait_until("it is offline", || array(&vhost, "R")["state"] == "offline");
    assert!(!vhost.bdev_names().contains(&"R".to_owned()));
    assert_eq!(add(&vhost, "R", "C").unwrap_err().code, -22);
    malloc(&vhost, "B", 8);
    wait_until("it is online", || array(&vhost, "R")["state"] == "online");
    // A waiting array lets go of a member that is deleted.
    vhost.ok("bdev_malloc_delete", json!({"name": "B"}));
    wait_until("it is offline", || array(&vhost, "R")["state"] == "offline");
    vhost.ok("bdev_malloc_delete", json!({"name": "A"}));
    assert_eq!(array(&vhost, "R")["num_base_bdevs_discovered"], 0);
    assert_eq!(vhost.ok("bdev_raid_delete", json!({"name": "R"})), true);
    assert_eq!(arrays(&vhost, "all"), json!([]));
    assert_eq!(vhost.stop(), 0);
}

/// Unpacks an image that SPDK has written.
fn image(dir: &Path, name: &str) -> PathBuf {
    let packed = Path::new("../raid/tests/images").join(format!("{name}.img.zst"));
    let file = dir.join(name);
    run("zstd", &["-dqf", packed.to_str().unwrap(), "-o", file.to_str().unwrap()]);
    file
}

#[test]
fn arrays_of_spdk_read_as_recorded_again_and_again() {
    let dir = TempDir::new().unwrap();
    let of = |names: &[&str]| -> Vec<PathBuf> {
        names.iter().map(|name| image(dir.path(), name)).collect()
    };
    let sets = [
        (
            "raid0",
            512,
            of(&["raid0-m1", "raid0-m2"]),
            1,
            "1fe17e050a025f4a7273edd21f34c038bb2ab6c4aa424e43d29081af53e1d362",
        ),
        (
            "concat",
            4096,
            of(&["concat-m3", "concat-m4", "concat-m5"]),
            3,
            "433c47ddf6849ad36786d3379a8a96d5e3784e81e90316ab6f4cc49a2bc62156",
        ),
        (
            "raid1",
            512,
            of(&["raid1-m6", "raid1-m7"]),
            6,
            "5d2ffd23a9e14a37b38457f7481519d5dfc7b75ea09cdbbc38ec947d3bcf0e71",
        ),
    ];
    for round in 0..2 {
        let vhost = Vhost::start(&[]);
        for (name, block_size, files, first, sha) in &sets {
            for (n, path) in (*first..).zip(files) {
                assert_ne!(array(&vhost, name)["state"], "online", "{name}");
                file(&vhost, path, n, *block_size);
            }
            assert_eq!(array(&vhost, name)["state"], "online", "{name} in round {round}");
            assert_eq!(sha256(&vhost, name), *sha, "{name} in round {round}");
            // The format's sequence number counts the starts.
            let written = fs::read(&files[0]).unwrap()[128];
            assert_eq!(u32::from(written), 2 + round, "{name}");
        }
        assert!(!vhost.spdk_rpc(&["save_config"]).unwrap().contains("bdev_raid_create"));
        assert_eq!(vhost.stop(), 0);
    }
}

const DEGRADED: &str = "d698791462c77b95e09ef1507a3481bc96458460759f84091787d1ab62ebec08";

/// The stale member never counts, in whatever order the members come.
#[test]
fn a_stale_member_is_left_out_or_rebuilt() {
    let dir = TempDir::new().unwrap();
    let both = || (image(dir.path(), "raid1-degraded-m8"), image(dir.path(), "raid1-degraded-m9"));
    // The stale one alone: it waits for the other.
    let (stale, good) = both();
    let vhost = Vhost::start(&[]);
    file(&vhost, &stale, 8, 512);
    assert_eq!(array(&vhost, "raid1-degraded")["state"], "configuring");
    file(&vhost, &good, 9, 512);
    let shown = array(&vhost, "raid1-degraded");
    assert_eq!(
        (&shown["state"], &shown["num_base_bdevs_discovered"]),
        (&json!("online"), &json!(1))
    );
    assert_eq!(sha256(&vhost, "raid1-degraded"), DEGRADED);
    assert_eq!(add(&vhost, "raid1-degraded", "F8"), Ok(json!(true)));
    wait_for_members(&vhost, "raid1-degraded", 2);
    assert_eq!(remove(&vhost, "F9"), Ok(json!(true)));
    assert_eq!(sha256(&vhost, "raid1-degraded"), DEGRADED, "from the rebuilt member");
    assert_eq!(vhost.stop(), 0);
    // The good one first: the stale one is taken back by itself.
    let (stale, good) = both();
    let vhost = Vhost::start(&[]);
    file(&vhost, &good, 9, 512);
    assert_eq!(array(&vhost, "raid1-degraded")["state"], "online");
    file(&vhost, &stale, 8, 512);
    wait_for_members(&vhost, "raid1-degraded", 2);
    vhost.ok("bdev_aio_delete", json!({"name": "F9"}));
    assert_eq!(sha256(&vhost, "raid1-degraded"), DEGRADED, "from the rebuilt member");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn members_fail_and_leave_and_are_rebuilt_under_load() {
    let vhost = Vhost::start(&[]);
    vhost.ok("bdev_raid_set_options", json!({"process_window_size_kb": 64}));
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name, 8));
    vhost.ok("bdev_error_create", json!({"base_name": "B"}));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "EE_B"], true));
    let load = guest(&vhost, "R", 2);
    goes_on(&vhost, "R");
    let fail =
        json!({"name": "EE_B", "io_type": "write", "error_type": "failure", "num": 1_000_000});
    vhost.ok("bdev_error_inject_error", fail);
    wait_until("the member is out", || array(&vhost, "R")["num_base_bdevs_operational"] == 1);
    goes_on(&vhost, "R");
    wait_until("the member is free", || vhost.bdev("EE_B")["claimed"] == false);
    vhost.ok("bdev_error_delete", json!({"name": "EE_B"}));
    assert_eq!(add(&vhost, "R", "C"), Ok(json!(true)));
    wait_for_members(&vhost, "R", 2);
    goes_on(&vhost, "R");
    // A member vanishes.
    vhost.ok("bdev_malloc_delete", json!({"name": "A"}));
    assert_eq!(array(&vhost, "R")["num_base_bdevs_operational"], 1);
    goes_on(&vhost, "R");
    assert_eq!(add(&vhost, "R", "D"), Ok(json!(true)));
    wait_for_members(&vhost, "R", 2);
    assert_eq!(remove(&vhost, "C"), Ok(json!(true)));
    goes_on(&vhost, "R");
    end(load);
    // The last one takes the array with it.
    assert_eq!(remove(&vhost, "D"), Ok(json!(true)));
    assert!(!vhost.bdev_names().contains(&"R".to_owned()));
    assert_eq!(arrays(&vhost, "all"), json!([]));
    assert_eq!(vhost.stop(), 0);
}

/// A rebuild shows its progress, and another one has to wait.
#[test]
fn a_rebuild_shows_its_progress_and_ends_with_its_target() {
    let vhost = Vhost::start(&[]);
    let options = json!({"process_window_size_kb": 64, "process_max_bandwidth_mb_sec": 1});
    vhost.ok("bdev_raid_set_options", options);
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name, 16));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "B", "C"], false));
    assert_eq!(remove(&vhost, "A"), Ok(json!(true)));
    assert_eq!(remove(&vhost, "B"), Ok(json!(true)));
    assert_eq!(add(&vhost, "R", "D"), Ok(json!(true)));
    let process = || array(&vhost, "R")["process"].clone();
    wait_until("it has begun", || process()["progress"]["blocks"].as_u64() > Some(0));
    let shown = process();
    assert_eq!((&shown["type"], &shown["target"]), (&json!("rebuild"), &json!("D")));
    assert!(shown["progress"]["percent"].as_u64().unwrap() < 100);
    assert_eq!(add(&vhost, "R", "A"), Err(Refusal::new(-1, "Operation not permitted")));
    // The saved configuration names no member that is not right, and keeps its slot.
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    let saved: Value = serde_json::from_str(&saved).unwrap();
    let calls = saved["subsystems"].as_array().unwrap().iter();
    let calls = calls.flat_map(|subsystem| subsystem["config"].as_array().into_iter().flatten());
    let call = calls.clone().find(|call| call["method"] == "bdev_raid_create").unwrap();
    assert_eq!(
        call["params"]["base_bdevs"],
        json!(["removed_base_bdev_0", "removed_base_bdev_1", "C"])
    );
    vhost.ok("bdev_malloc_delete", json!({"name": "D"}));
    wait_until("the rebuild has ended", || process().is_null());
    assert_eq!(array(&vhost, "R")["num_base_bdevs_discovered"], 1);
    vhost.ok("bdev_raid_delete", json!({"name": "R"}));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn an_array_on_files_is_found_again_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let paths: Vec<PathBuf> = (1..=3).map(|n| dir.path().join(n.to_string())).collect();
    paths.iter().for_each(|path| fs::File::create(path).unwrap().set_len(8 * MB).unwrap());
    let vhost = Vhost::start(&[]);
    (1..=2).zip(&paths).for_each(|(n, path)| file(&vhost, path, n, 512));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["F1", "F2"], true));
    let load = guest(&vhost, "R", 1);
    goes_on(&vhost, "R");
    // The first member goes; what is written from now on is on the second only.
    vhost.ok("bdev_aio_delete", json!({"name": "F1"}));
    goes_on(&vhost, "R");
    end(load);
    let sha = sha256(&vhost, "R");
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "of-R"}));
    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);

    let vhost = Launch::new().config(&saved).start();
    wait_until("the array is there", || array(&vhost, "R")["state"] == "online");
    assert_eq!(array(&vhost, "R")["num_base_bdevs_operational"], 1);
    assert_eq!(sha256(&vhost, "R"), sha);
    // The old first member is stale: it is rebuilt.
    file(&vhost, &paths[0], 1, 512);
    wait_for_members(&vhost, "R", 2);
    vhost.ok("bdev_aio_delete", json!({"name": "F2"}));
    assert_eq!(sha256(&vhost, "R"), sha);
    // Deleted, the array is found again with its members; cleared, it is not.
    vhost.ok("bdev_raid_delete", json!({"name": "R"}));
    vhost.ok("bdev_aio_delete", json!({"name": "F1"}));
    file(&vhost, &paths[0], 1, 512);
    assert_eq!(array(&vhost, "R")["state"], "online", "#3306");
    vhost.ok("bdev_raid_delete", json!({"name": "R", "clear_sb": true}));
    vhost.ok("bdev_aio_delete", json!({"name": "F1"}));
    file(&vhost, &paths[0], 1, 512);
    assert_eq!(arrays(&vhost, "all"), json!([]));
    assert!(fs::read(&paths[0]).unwrap()[..4096].iter().all(|byte| *byte == 0));
    // The second still says that it belongs to the array, which waits for nobody else.
    file(&vhost, &paths[1], 2, 512);
    assert_eq!(vhost.ok("bdev_raid_create", create("S", "raid0", 4, &["F1"], true)), true);
    assert_eq!(vhost.stop(), 0);
}

const PARITY: &str = "257a9c5f0c8688361128e322919c1f59146118d4a229e5de6f2f69e0ba11b955";

/// One member of four is missing, and another one is lost after the first is rebuilt.
#[test]
fn an_array_of_spdk_with_parity_reads_as_recorded_without_any_one_member() {
    let dir = TempDir::new().unwrap();
    let vhost = Vhost::start(&[]);
    for n in [13, 11, 14] {
        assert_eq!(arrays(&vhost, "online"), json!([]));
        file(&vhost, &image(dir.path(), &format!("raid5f-m{n}")), n, 512);
    }
    let shown = array(&vhost, "raid5f");
    assert_eq!(
        (&shown["state"], &shown["num_base_bdevs_operational"]),
        (&json!("online"), &json!(3))
    );
    assert_eq!(sha256(&vhost, "raid5f"), PARITY, "degraded");
    // The member was removed before the end: it is taken back with a rebuild.
    file(&vhost, &image(dir.path(), "raid5f-m12"), 12, 512);
    wait_for_members(&vhost, "raid5f", 4);
    for n in [14, 11, 13] {
        assert_eq!(remove(&vhost, &format!("F{n}")), Ok(json!(true)));
        assert_eq!(sha256(&vhost, "raid5f"), PARITY, "without member {n}");
        // A second loss takes the array offline.
        assert_eq!(add(&vhost, "raid5f", &format!("F{n}")), Ok(json!(true)));
        wait_for_members(&vhost, "raid5f", 4);
    }
    let bdev = vhost.bdev("raid5f");
    assert_eq!(bdev["supported_io_types"]["unmap"], false, "E8: a discard is refused");
    assert_eq!(remove(&vhost, "F11"), Ok(json!(true)));
    assert_eq!(remove(&vhost, "F12"), Ok(json!(true)));
    wait_until("it is offline", || array(&vhost, "raid5f")["state"] == "offline");
    assert_eq!(vhost.stop(), 0);
}

/// A member that does not answer holds up its array only, until it is deleted.
#[test]
fn a_member_that_hangs_is_deleted_and_the_array_goes_on() {
    let vhost = Vhost::start(&[]);
    ["A", "B", "C", "D"].iter().for_each(|name| malloc(&vhost, name, 8));
    vhost.ok("bdev_error_create", json!({"base_name": "B"}));
    vhost.ok("bdev_raid_create", create("R", "raid1", 0, &["A", "EE_B"], true));
    vhost.ok("bdev_raid_create", create("S", "raid1", 0, &["C", "D"], true));
    let (load, other) = (guest(&vhost, "R", 2), guest(&vhost, "S", 1));
    goes_on(&vhost, "R");
    let hang =
        json!({"name": "EE_B", "io_type": "write", "error_type": "pending", "num": 1_000_000});
    vhost.ok("bdev_error_inject_error", hang);
    goes_on(&vhost, "S");
    vhost.ok("bdev_error_delete", json!({"name": "EE_B"}));
    goes_on(&vhost, "R");
    assert_eq!(array(&vhost, "R")["num_base_bdevs_operational"], 1);
    assert_eq!(add(&vhost, "R", "B"), Ok(json!(true)));
    wait_for_members(&vhost, "R", 2);
    goes_on(&vhost, "R");
    end(load);
    end(other);
    assert_eq!(vhost.stop(), 0);
}
