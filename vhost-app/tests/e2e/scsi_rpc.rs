//! virtio-scsi controllers and their targets, as an operator sees them.

use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost, core_mask, wait_until};

const CREATE: &str = "vhost_create_scsi_controller";
const START: &str = "vhost_start_scsi_controller";
const ADD: &str = "vhost_scsi_controller_add_target";
const REMOVE: &str = "vhost_scsi_controller_remove_target";
const DELETE: &str = "vhost_delete_controller";

fn create(vhost: &Vhost, name: &str) {
    assert_eq!(vhost.ok(CREATE, json!({ "ctrlr": name })), true);
}

fn target(controller: &str, number: i64, bdev: &str) -> Value {
    json!({"ctrlr": controller, "scsi_target_num": number, "bdev_name": bdev})
}

#[track_caller]
fn add(vhost: &Vhost, controller: &str, number: i64, bdev: &str) -> Value {
    vhost.ok(ADD, target(controller, number, bdev))
}

fn number(controller: &str, number: i64) -> Value {
    json!({"ctrlr": controller, "scsi_target_num": number})
}

#[track_caller]
fn shown(vhost: &Vhost, controller: &str) -> Value {
    vhost.ok("vhost_get_controllers", json!({ "name": controller }))[0].clone()
}

/// Number, id and bdev of each target.
#[track_caller]
fn targets(vhost: &Vhost, controller: &str) -> Vec<(u64, u64, String)> {
    let shown = shown(vhost, controller);
    let targets = shown["backend_specific"]["scsi"].as_array().unwrap();
    let number = |target: &Value, key: &str| target[key].as_u64().unwrap();
    let bdev = |target: &Value| target["luns"][0]["bdev_name"].as_str().unwrap().to_owned();
    let of = |target| (number(target, "scsi_dev_num"), number(target, "id"), bdev(target));
    targets.iter().map(of).collect()
}

fn saved(vhost: &Vhost) -> Value {
    vhost.ok("framework_get_config", json!({"name": "vhost_scsi"}))
}

/// The answer with SPDK's code for all failures of these methods.
fn refusal(text: &str) -> Refusal {
    Refusal::new(-32602, text)
}

const EINVAL: &str = "Invalid argument";
const EEXIST: &str = "File exists";
const EIO: &str = "Input/output error";
const ENODEV: &str = "No such device";
const ENOSPC: &str = "No space left on device";
const EBUSY: &str = "Device or resource busy";

#[test]
fn the_real_client_drives_every_method() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    let run = |line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        let output = vhost.spdk_rpc(&args).unwrap_or_else(|e| panic!("{line}: {e}"));
        output.trim().to_owned()
    };
    assert_eq!(run("scsi_get_devices"), "[]");
    run(&format!("vhost_create_scsi_controller s.0 --cpumask {} --delay", core_mask()));
    assert_eq!(run("vhost_scsi_controller_add_target s.0 3 M"), "3");
    assert_eq!(run("vhost_scsi_controller_add_target s.0 -1 M"), "0");
    assert!(!vhost.socket("s.0").exists());
    run("vhost_start_scsi_controller s.0");
    assert!(vhost.socket("s.0").exists());
    run("vhost_controller_set_coalescing s.0 20 1000");
    let devices = run("scsi_get_devices").replace(['\n', ' '], "");
    let expected = r#"[{"id":0,"device_name":"Target3"},{"id":1,"device_name":"Target0"}]"#;
    assert_eq!(devices, expected);
    let controllers = run("vhost_get_controllers -n s.0");
    assert!(controllers.contains("\"delay_base_us\": 20"), "{controllers}");
    assert!(run("--plugin vhost_rpc vhost_get_controller_stats -n s.0").contains("num_read_ops"));
    run("vhost_scsi_controller_remove_target s.0 3");
    assert!(vhost.spdk_rpc(&["vhost_scsi_controller_remove_target", "s.0", "3"]).is_err());
    run("vhost_delete_controller s.0");
    assert!(!vhost.socket("s.0").exists());
    assert_eq!(run("scsi_get_devices"), "[]");
    run("bdev_malloc_delete M");
}

/// The commands that the tree of `spdk-cli` has for such controllers.
#[test]
fn spdk_cli_creates_and_deletes_controllers() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    let screen = vhost.spdk_cli(
        "/vhost/scsi create s1\n/vhost/scsi create s2 delay=True\n\
         /vhost/scsi/s1 add_lun 4 M\n/vhost/scsi/s2 add_lun 5 M\n/vhost/scsi/s2 start s2\n\
         /vhost/scsi/s1 set_coalescing 10 1000\nrefresh\nls /vhost\n\
         /vhost/scsi/s1 remove_target 4\n/vhost/scsi delete s1\n/vhost/scsi delete s2\nexit\n",
    );
    assert!(screen.contains("TargetID: 4") && screen.contains("TargetID: 5"), "{screen}");
    assert!(!screen.contains("error response"), "{screen}");
    assert_eq!(vhost.ok("vhost_get_controllers", Value::Null), json!([]));
}

#[test]
fn controllers_are_shown_in_spdks_shape_and_order() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    create(&vhost, "s");
    let expected = |targets: Value| {
        json!({
            "ctrlr": "s",
            "cpumask": core_mask(),
            "delay_base_us": 0,
            "iops_threshold": 60000,
            "socket": vhost.socket("s"),
            "sessions": [],
            "backend_specific": {"scsi": targets},
        })
    };
    let lun = |number: u64, id: u64| {
        json!({"scsi_dev_num": number, "id": id, "target_name": format!("Target {number}"),
            "luns": [{"id": 0, "bdev_name": "M"}]})
    };
    assert_eq!(shown(&vhost, "s").to_string(), expected(json!([])).to_string());
    add(&vhost, "s", 5, "M");
    add(&vhost, "s", 2, "M");
    let both = expected(json!([lun(2, 1), lun(5, 0)]));
    assert_eq!(shown(&vhost, "s").to_string(), both.to_string());
    assert_eq!(vhost.ok("vhost_get_controllers", Value::Null), json!([both]));

    // A bare connection is a session.
    let client = UnixStream::connect(vhost.socket("s")).unwrap();
    wait_until("a session", || shown(&vhost, "s")["sessions"].as_array().unwrap().len() == 1);
    assert_eq!(shown(&vhost, "s")["sessions"][0]["started"], false);
    drop(client);

    let whole = &vhost.ok("vhost_get_controller_stats", json!({"name": "s"}))[0];
    assert_eq!((&whole["started"], &whole["io"]["num_read_ops"]), (&json!(true), &json!(0)));
    let target = &whole["backend_specific"]["scsi"][1];
    assert_eq!((&target["scsi_dev_num"], &target["io"]["failed"]), (&json!(5), &json!(0)));

    // The bdev may be given by its UUID.
    let uuid = vhost.bdev("M")["uuid"].clone();
    add(&vhost, "s", 7, uuid.as_str().unwrap());
    assert_eq!(targets(&vhost, "s")[2], (7, 2, "M".to_owned()));
}

/// Each failure that section 5 of the reference has for SPDK, and what else is refused here.
#[test]
fn failures_have_spdks_codes_and_texts() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.malloc("base");
    vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "base"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "blk", "dev_name": "M"}));
    create(&vhost, "s");
    add(&vhost, "s", 0, "M");
    let long = "n".repeat(108);
    for (method, params, text) in [
        (CREATE, json!({}), EINVAL),
        (CREATE, json!({"ctrlr": "t", "nope": 1}), EINVAL),
        (CREATE, json!({"ctrlr": "t", "delay": 1}), EINVAL),
        (CREATE, json!({"ctrlr": "t", "cpumask": "nope"}), EINVAL),
        (CREATE, json!({"ctrlr": "t", "cpumask": "0xff000000"}), EINVAL),
        (CREATE, json!({"ctrlr": "s"}), EEXIST),
        (CREATE, json!({"ctrlr": "s", "delay": true}), EEXIST),
        (CREATE, json!({"ctrlr": "blk"}), EEXIST),
        (CREATE, json!({"ctrlr": ""}), EIO),
        (CREATE, json!({"ctrlr": "../t"}), EIO),
        (CREATE, json!({"ctrlr": long.as_str()}), EIO),
        (START, json!({}), EINVAL),
        (START, json!({"ctrlr": "s", "nope": 1}), EINVAL),
        (START, json!({"ctrlr": "blk"}), EINVAL),
        (START, json!({"ctrlr": "t"}), ENODEV),
        (ADD, json!({"ctrlr": "s", "scsi_target_num": 1}), EINVAL),
        (ADD, json!({"ctrlr": "s", "bdev_name": "M"}), EINVAL),
        (ADD, json!({"ctrlr": "s", "scsi_target_num": "1", "bdev_name": "M"}), EINVAL),
        (ADD, json!({"ctrlr": "s", "scsi_target_num": 1.5, "bdev_name": "M"}), EINVAL),
        (ADD, target("s", 1 << 32, "M"), EINVAL),
        (ADD, target("s", 8, "M"), EINVAL),
        (ADD, target("s", 256, "M"), EINVAL),
        (ADD, target("s", 1, "nope"), EINVAL),
        (ADD, target("s", 1, "base"), EINVAL),
        (ADD, target("blk", 1, "M"), EINVAL),
        (ADD, target("t", 1, "M"), ENODEV),
        (ADD, target("t", 9, "nope"), ENODEV),
        (ADD, target("s", 0, "M"), EEXIST),
        (ADD, target("s", 0, "nope"), EEXIST),
        (REMOVE, json!({"ctrlr": "s"}), EINVAL),
        (REMOVE, number("s", 8), EINVAL),
        (REMOVE, number("s", 256), EINVAL),
        (REMOVE, number("s", -1), EINVAL),
        (REMOVE, number("blk", 0), EINVAL),
        (REMOVE, number("t", 0), ENODEV),
        (REMOVE, number("s", 1), EBUSY),
        (DELETE, json!({"ctrlr": "t"}), ENODEV),
        ("vhost_create_blk_controller", json!({"ctrlr": "s", "dev_name": "M"}), EEXIST),
        (
            "vhost_controller_set_coalescing",
            json!({"ctrlr": "s", "delay_base_us": 1, "iops_threshold": 1}),
            EINVAL,
        ),
        ("scsi_get_devices", json!({"x": 1}), "scsi_get_devices requires no parameters"),
    ] {
        assert_eq!(vhost.err(method, params.clone()), refusal(text), "{method} {params}");
    }
    (1..8).for_each(|number| _ = add(&vhost, "s", number, "M"));
    assert_eq!(vhost.err(ADD, target("s", -1, "M")), refusal(ENOSPC));
    assert_eq!(vhost.err(ADD, target("s", -9, "nope")), refusal(ENOSPC));
    let internal = vhost.err("vhost_get_controllers", json!({"name": "t"}));
    assert_eq!(internal, Refusal::new(-32603, ENODEV));
    // The socket's directory is gone, or something else is in its place.
    std::fs::create_dir(vhost.socket("dir")).unwrap();
    assert_eq!(vhost.err(CREATE, json!({"ctrlr": "dir"})), refusal(EIO));
    assert_eq!(vhost.err(CREATE, json!({"ctrlr": "none/t"})), refusal(EIO));
    assert_eq!(vhost.ok("vhost_get_controllers", Value::Null).as_array().unwrap().len(), 2);
    // The log has the reasons.
    vhost.wait_for_log("controller blk is not a SCSI controller");
    vhost.wait_for_log("is claimed by a bdev on top of it");
    vhost.wait_for_log("expected a target number from 0 to 7");
}

#[test]
fn a_delayed_controller_gets_its_socket_at_the_start() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    assert_eq!(vhost.ok(CREATE, json!({"ctrlr": "s", "delay": true})), true);
    assert!(!vhost.socket("s").exists());
    assert_eq!(shown(&vhost, "s")["sessions"], json!([]));
    let stats = |vhost: &Vhost| vhost.ok("vhost_get_controller_stats", json!({"name": "s"}));
    assert_eq!(stats(&vhost)[0]["started"], false);
    assert_eq!(vhost.err(CREATE, json!({"ctrlr": "s"})), refusal(EEXIST));
    add(&vhost, "s", -1, "M");
    let coalescing = json!({"ctrlr": "s", "delay_base_us": 5, "iops_threshold": 100});
    vhost.ok("vhost_controller_set_coalescing", coalescing);
    // Unlike in SPDK, the controller stays without targets.
    assert_eq!(vhost.ok(REMOVE, number("s", 0)), true);
    assert_eq!(targets(&vhost, "s"), []);
    add(&vhost, "s", -1, "M");
    // A start that fails can be repeated.
    std::fs::create_dir(vhost.socket("s")).unwrap();
    assert_eq!(vhost.err(START, json!({"ctrlr": "s"})), refusal(EIO));
    std::fs::remove_dir(vhost.socket("s")).unwrap();
    (0..2).for_each(|_| assert_eq!(vhost.ok(START, json!({"ctrlr": "s"})), true));
    assert_eq!(stats(&vhost)[0]["started"], true);
    drop(UnixStream::connect(vhost.socket("s")).unwrap());
    vhost.ok(DELETE, json!({"ctrlr": "s"}));

    // A file at the path of a socket that was never opened is not touched.
    vhost.ok(CREATE, json!({"ctrlr": "s", "delay": true}));
    vhost.file("s", 1);
    add(&vhost, "s", 6, "M");
    vhost.ok(DELETE, json!({"ctrlr": "s"}));
    assert!(vhost.socket("s").exists());
    assert_eq!(vhost.err(START, json!({"ctrlr": "s"})), refusal(ENODEV));
    // The process ends with one that was never started.
    vhost.ok(CREATE, json!({"ctrlr": "t", "delay": true}));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn numbers_and_ids_are_used_again() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.malloc("N");
    create(&vhost, "s");
    create(&vhost, "t");
    (0..8).for_each(|number| assert_eq!(add(&vhost, "s", -1, "M"), number));
    assert_eq!(add(&vhost, "t", 4, "M"), 4);
    assert_eq!(targets(&vhost, "t"), [(4, 8, "M".to_owned())]);
    assert_eq!(vhost.ok(REMOVE, number("s", 5)), true);
    assert_eq!(vhost.ok(REMOVE, number("s", 2)), true);
    assert_eq!(vhost.err(REMOVE, number("s", 2)), refusal(EBUSY));
    assert_eq!(add(&vhost, "s", -7, "N"), 2);
    assert_eq!(targets(&vhost, "s")[2], (2, 2, "N".to_owned()));
    assert_eq!(add(&vhost, "t", 0, "N"), 0);
    assert_eq!(targets(&vhost, "t")[0], (0, 5, "N".to_owned()));
    let devices = vhost.ok("scsi_get_devices", Value::Null);
    let ids: Vec<u64> =
        devices.as_array().unwrap().iter().map(|d| d["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (0..9).collect::<Vec<u64>>());
    assert_eq!(devices[5], json!({"id": 5, "device_name": "Target 0"}));
    // 0 does not wait, and there is nothing to wait for.
    let mut at_once = number("s", 7);
    at_once["timeout_ms"] = 0.into();
    assert_eq!(vhost.ok(REMOVE, at_once), true);
}

/// A claim of each target, which ends with the target.
#[test]
fn a_bdev_is_claimed_while_a_target_shows_it() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    create(&vhost, "s");
    create(&vhost, "t");
    let passthru = json!({"name": "P", "base_bdev_name": "M"});
    let is_claimed = || match vhost.rpc("bdev_passthru_create", passthru.clone()) {
        Ok(_) => {
            vhost.ok("bdev_passthru_delete", json!({"name": "P"}));
            false
        }
        Err(refusal) => {
            assert_eq!(refusal, Refusal::new(-1, "Operation not permitted"));
            true
        }
    };
    assert!(!is_claimed());
    add(&vhost, "s", 0, "M");
    add(&vhost, "s", 1, "M");
    add(&vhost, "t", 0, "M");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "b", "dev_name": "M"}));
    // As in SPDK, it is not shown.
    assert_eq!(vhost.bdev("M")["claimed"], false);
    assert!(is_claimed());
    vhost.ok(REMOVE, number("s", 0));
    vhost.ok(DELETE, json!({"ctrlr": "b"}));
    assert!(is_claimed());
    vhost.ok(DELETE, json!({"ctrlr": "s"}));
    assert!(is_claimed());
    vhost.ok(REMOVE, number("t", 0));
    assert!(!is_claimed());
    // A target that could not be added leaves no claim behind.
    add(&vhost, "t", 0, "M");
    assert_eq!(vhost.err(ADD, target("t", 0, "M")), refusal(EEXIST));
    vhost.ok(DELETE, json!({"ctrlr": "t"}));
    assert!(!is_claimed());
}

#[test]
fn a_deleted_bdev_leaves_its_targets() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.malloc("N");
    create(&vhost, "s");
    for (number, bdev) in [(1, "M"), (2, "N"), (4, "M")] {
        add(&vhost, "s", number, bdev);
    }
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "b", "dev_name": "M"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    assert_eq!(targets(&vhost, "s"), [(2, 1, "N".to_owned())]);
    assert_eq!(shown(&vhost, "b")["backend_specific"]["block"]["bdev"], Value::Null);
    assert_eq!(vhost.err(REMOVE, number("s", 1)), refusal(EBUSY));
    assert_eq!(vhost.err(ADD, target("s", 1, "M")), refusal(EINVAL));
    // A new bdev of this name is another one. Its claim does not end with that of the old one.
    vhost.malloc("M");
    assert_eq!(add(&vhost, "s", -1, "M"), 0);
    assert_eq!(add(&vhost, "s", 1, "M"), 1);
    let passthru = json!({"name": "P", "base_bdev_name": "M"});
    assert_eq!(vhost.err("bdev_passthru_create", passthru.clone()).code, -1);
    vhost.ok(DELETE, json!({"ctrlr": "b"}));
    assert_eq!(vhost.err("bdev_passthru_create", passthru.clone()).code, -1);
    // The bdevs are free when the controller is deleted.
    vhost.ok(DELETE, json!({"ctrlr": "s"}));
    vhost.ok("bdev_passthru_create", passthru);
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "N"}));
    // The wrapper has gone with its base.
    assert!(vhost.bdev_names().is_empty());
}

/// Requests that depend on one another may be sent together, as for controllers of other kinds.
#[test]
fn dependent_requests_of_one_connection_see_one_another() {
    let vhost = Vhost::start(&[]);
    let file = vhost.file("disk", 1 << 20);
    let mut rpc = vhost.connect();
    for (method, params) in [
        ("bdev_aio_create", json!({"name": "A", "filename": file, "block_size": 512})),
        (CREATE, json!({"ctrlr": "s", "delay": true})),
        (ADD, target("s", 3, "A")),
        (START, json!({"ctrlr": "s"})),
        (REMOVE, number("s", 3)),
        (ADD, target("s", 3, "A")),
        (DELETE, json!({"ctrlr": "s"})),
        (CREATE, json!({"ctrlr": "s"})),
        (ADD, target("s", 3, "A")),
        (DELETE, json!({"ctrlr": "s"})),
        ("bdev_aio_delete", json!({"name": "A"})),
    ] {
        rpc.send(method, params);
    }
    for _ in 0..11 {
        let (id, result) = rpc.receive();
        assert!(result.is_ok(), "request {id}: {result:?}");
    }
}

/// The whole configuration, and the section of the SCSI controllers.
fn save(vhost: &Vhost) -> (String, Value) {
    (vhost.spdk_rpc(&["save_config"]).unwrap(), saved(vhost))
}

#[test]
fn a_saved_configuration_creates_the_controllers_again() {
    let mask = &core_mask()[2..];
    let first = Vhost::start(&[]);
    first.malloc("M");
    first.null("N");
    create(&first, "empty");
    first.ok(CREATE, json!({"ctrlr": "full", "packed_ring": true, "cpumask": core_mask()}));
    add(&first, "full", 7, "M");
    add(&first, "full", 0, "N");
    add(&first, "full", 3, "M");
    let coalescing = json!({"ctrlr": "full", "delay_base_us": 20, "iops_threshold": 1000});
    first.ok("vhost_controller_set_coalescing", coalescing.clone());
    first.ok(CREATE, json!({"ctrlr": "waiting", "delay": true}));
    add(&first, "waiting", 1, "M");
    first.ok("vhost_create_blk_controller", json!({"ctrlr": "b", "dev_name": "M"}));
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let packed = json!({"ctrlr": "full", "cpumask": mask, "delay": true, "packed_ring": true});
    let (config, section) = save(&first);
    assert_eq!(
        section,
        json!([
            call(CREATE, json!({"ctrlr": "empty", "cpumask": mask, "delay": true})),
            call(START, json!({"ctrlr": "empty"})),
            call(CREATE, packed),
            call(ADD, target("full", 0, "N")),
            call(ADD, target("full", 3, "M")),
            call(ADD, target("full", 7, "M")),
            call(START, json!({"ctrlr": "full"})),
            call("vhost_controller_set_coalescing", coalescing),
            call(CREATE, json!({"ctrlr": "waiting", "cpumask": mask, "delay": true})),
            call(ADD, target("waiting", 1, "M")),
        ])
    );
    let whole: Value = serde_json::from_str(&config).unwrap();
    let order: Vec<_> = whole["subsystems"].as_array().unwrap()[8..].iter().collect();
    let names: Vec<&Value> = order.iter().map(|section| &section["subsystem"]).collect();
    assert_eq!(names, ["vhost_blk", "scsi", "nbd", "vhost_scsi"]);
    assert_eq!(order[1]["config"], Value::Null);
    assert_eq!(order[0]["config"].as_array().unwrap().len(), 1);

    let checked = Launch::new();
    let path = first.dir().join("config.json");
    std::fs::write(&path, &config).unwrap();
    let checked = checked.args(&["--check", path.to_str().unwrap()]).run_to_end();
    assert_eq!(checked.code, Some(0), "{}", checked.log);

    let check = |vhost: &Vhost, how: &str| {
        assert_eq!(save(vhost), (config.clone(), section.clone()), "{how}");
        let numbers = targets(vhost, "full").into_iter().map(|(number, ..)| number);
        assert_eq!(numbers.collect::<Vec<_>>(), [0, 3, 7], "{how}");
        for (name, listens) in [("full", true), ("empty", true), ("waiting", false)] {
            assert_eq!(vhost.socket(name).exists(), listens, "{how} {name}");
        }
    };
    let restarted = Launch::new().config(&config).start();
    restarted.ok("framework_wait_init", Value::Null);
    check(&restarted, "-c");
    drop(restarted);
    let waiting = Launch::new().args(&["--wait-for-rpc"]).start();
    waiting.spdk_rpc_with_input(&["load_config"], &config).unwrap();
    check(&waiting, "load_config");
    drop(waiting);
    let running = Vhost::start(&[]);
    for section in ["bdev", "vhost_blk", "vhost_scsi"] {
        let config = whole["subsystems"].as_array().unwrap();
        let mut part = config.iter().find(|part| part["subsystem"] == section).unwrap().clone();
        if section == "bdev" {
            // Only a start can take it.
            let calls = part["config"].as_array_mut().unwrap();
            calls.retain(|call| call["method"] != "bdev_set_options");
        }
        running.spdk_rpc_with_input(&["load_subsystem_config"], &part.to_string()).unwrap();
    }
    check(&running, "load_subsystem_config");
}

/// As SPDK's `save_config` writes it, with the methods of section 5 of the reference.
#[test]
fn a_configuration_that_spdk_saved_is_taken() {
    let mask = &core_mask()[2..];
    let malloc = json!({"method": "bdev_malloc_create", "params": {"name": "Malloc0",
        "num_blocks": 2048, "block_size": 512, "physical_block_size": 512,
        "uuid": "b3a1f1d0-7c41-4b4e-9d4b-0a4c1c0f6a11", "optimal_io_boundary": 0,
        "md_size": 0, "dif_type": 0, "dif_is_head_of_md": false, "dif_pi_format": 0}});
    let calls = [
        (CREATE, json!({"ctrlr": "vhost.0", "cpumask": mask, "delay": true})),
        (ADD, target("vhost.0", 0, "Malloc0")),
        (ADD, target("vhost.0", 5, "Malloc0")),
        (START, json!({"ctrlr": "vhost.0"})),
        (
            "vhost_controller_set_coalescing",
            json!({"ctrlr": "vhost.0", "delay_base_us": 1, "iops_threshold": 100}),
        ),
    ];
    let calls = calls.map(|(method, params)| json!({"method": method, "params": params}));
    let config = json!({"subsystems": [
        {"subsystem": "bdev", "config": [malloc, {"method": "bdev_wait_for_examine"}]},
        {"subsystem": "vhost_blk", "config": []},
        {"subsystem": "scsi", "config": null},
        {"subsystem": "nbd", "config": []},
        {"subsystem": "vhost_scsi", "config": calls}]});
    let vhost = Launch::new().config(&config.to_string()).start();
    vhost.ok("framework_wait_init", Value::Null);
    let expected = [(0, 0, "Malloc0".to_owned()), (5, 1, "Malloc0".to_owned())];
    assert_eq!(targets(&vhost, "vhost.0"), expected);
    assert_eq!(shown(&vhost, "vhost.0")["iops_threshold"], 100);
    assert_eq!(saved(&vhost), json!(calls));
    drop(UnixStream::connect(vhost.socket("vhost.0")).unwrap());
}

/// Another client deletes the bdev, or the controller, while targets come and go.
#[test]
fn calls_of_several_clients_leave_nothing_behind() {
    let vhost = Vhost::start(&[]);
    vhost.null("base");
    let file = vhost.file("disk", 1 << 20);
    let aio = json!({"name": "A", "filename": file, "block_size": 512});
    let mut clients: Vec<_> = (0..4).map(|_| vhost.connect()).collect();
    for round in 0..50 {
        vhost.ok("bdev_aio_create", aio.clone());
        vhost.ok(CREATE, json!({"ctrlr": "s", "delay": round % 2 == 0}));
        let calls = [
            (ADD, target("s", -1, "A")),
            (ADD, target("s", 0, "A")),
            (REMOVE, number("s", 0)),
            match round % 3 {
                0 => ("bdev_aio_delete", json!({"name": "A"})),
                1 => (DELETE, json!({"ctrlr": "s"})),
                _ => (START, json!({"ctrlr": "s"})),
            },
        ];
        for (client, (method, params)) in clients.iter_mut().zip(calls) {
            client.send(method, params);
        }
        clients.iter_mut().for_each(|client| _ = client.receive());
        let _ = vhost.rpc(DELETE, json!({"ctrlr": "s"}));
        // Nothing claims it or has it open.
        if round % 3 != 0 {
            vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "A"}));
            vhost.ok("bdev_passthru_delete", json!({"name": "P"}));
            vhost.ok("bdev_aio_delete", json!({"name": "A"}));
        }
        assert_eq!(vhost.bdev_names(), ["base"], "round {round}");
        assert_eq!(vhost.ok("scsi_get_devices", Value::Null), json!([]), "round {round}");
    }
}
