//! All methods of SPDK's `vhost`: each is implemented, or kept, or answers as an SPDK without such
//! objects does, or does not exist here. And all methods refuse bad input.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::support::harness::{Launch, Refusal, Vhost};

/// SPDK's methods, what they do here, and their parameters.
const METHODS: &str = include_str!("../../src/methods/schema.tsv");

/// Options that have an effect.
const EFFECTIVE: [&str; 3] =
    ["bdev_nvme_set_hotplug", "bdev_nvme_set_options", "bdev_raid_set_options"];

/// Options that are saved, most without effect: with parameters, and where a saved configuration has
/// them.
fn kept() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        ("scheduler", "scheduler_set_options", json!({"isolated_core_mask": "4"})),
        ("scheduler", "framework_set_scheduler", json!({"name": "dynamic", "period": 500_000})),
        ("sock", "sock_set_default_impl", json!({"impl_name": "posix"})),
        (
            "sock",
            "sock_impl_set_options",
            json!({"impl_name": "posix", "recv_buf_size": 4096, "enable_quickack": true}),
        ),
        (
            "iobuf",
            "iobuf_set_options",
            json!({"small_pool_count": 64, "large_pool_count": 8, "small_bufsize": 4096,
                "large_bufsize": 8192, "enable_numa": true}),
        ),
        (
            "accel",
            "accel_set_options",
            json!({"small_cache_size": 1, "large_cache_size": 2, "task_count": 3,
                "sequence_count": 4, "buf_count": 5}),
        ),
        ("vmd", "vmd_enable", json!({})),
        (
            "fsdev",
            "fsdev_set_opts",
            json!({"fsdev_io_pool_size": 1000, "fsdev_io_cache_size": 100}),
        ),
        ("accel", "accel_assign_opc", json!({"opname": "copy", "module": "software"})),
        ("accel", "accel_set_driver", json!({"name": "x"})),
        ("accel", "ioat_scan_accel_module", json!({})),
        ("accel", "ae4dma_scan_accel_module", json!({})),
        ("bdev", "bdev_raid_set_options", json!({"process_window_size_kb": 1024})),
        (
            "bdev",
            "bdev_nvme_set_options",
            json!({"timeout_us": 1, "ctrlr_loss_timeout_sec": -1, "reconnect_delay_sec": 1,
                "dhchap_digests": ["sha256"], "multipath_opts": {"policy": "active_active"}}),
        ),
        ("bdev", "bdev_nvme_set_hotplug", json!({"enable": true, "period_us": 100_000})),
        ("bdev", "bdev_virtio_blk_set_hotplug", json!({"enable": false})),
    ]
}

/// Options that are kept but not saved, as in SPDK.
fn unsaved() -> Vec<(&'static str, Value)> {
    vec![
        ("framework_monitor_context_switch", json!({"enabled": true})),
        ("trace_enable_tpoint_group", json!({"name": "bdev"})),
        ("trace_set_tpoint_mask", json!({"name": "sock", "tpoint_mask": 3})),
        ("trace_clear_tpoint_mask", json!({"name": "sock", "tpoint_mask": 1})),
        ("trace_disable_tpoint_group", json!({"name": "bdev"})),
        ("trace_clear", Value::Null),
    ]
}

/// What an SPDK without objects of these kinds answers.
fn empty() -> Vec<(&'static str, Value, Result<Value, Refusal>)> {
    let refused = |code, text: &str| Err(Refusal::new(code, text));
    let x = || json!({"name": "x"});
    vec![
        ("bdev_nvme_get_discovery_info", Value::Null, Ok(json!([]))),
        ("bdev_nvme_get_io_paths", Value::Null, Ok(json!({"poll_groups": []}))),
        ("bdev_nvme_get_mdns_discovery_info", Value::Null, refused(-95, "Operation not supported")),
        (
            "bdev_nvme_get_path_iostat",
            x(),
            refused(-1, "RPC not enabled if enable_io_path_stat is false"),
        ),
        ("bdev_nvme_get_transport_statistics", Value::Null, Ok(json!({"poll_groups": []}))),
        ("bdev_virtio_scsi_get_devices", Value::Null, Ok(json!([]))),
        ("framework_get_governor", Value::Null, Ok(json!({}))),
        ("framework_get_pci_devices", Value::Null, Ok(json!([]))),
        ("keyring_get_keys", Value::Null, Ok(json!([]))),
    ]
}

/// The state of components that do not exist here, with a key that clients read.
const STATE: [(&str, &str); 8] = [
    ("accel_get_module_info", "/1/supported ops/16"),
    ("accel_get_opc_assignments", "/dix_verify"),
    ("accel_get_stats", "/operations"),
    ("framework_get_scheduler", "/scheduler_period"),
    ("fsdev_get_opts", "/fsdev_io_pool_size"),
    ("iobuf_get_stats", "/1/large_pool/cache_size"),
    ("sock_get_default_impl", "/impl_name"),
    ("trace_get_info", "/bdev/tpoint_mask"),
];

/// A server that waits for `framework_start_init`.
fn waiting() -> Vhost {
    Launch::new().args(&["--wait-for-rpc"]).start()
}

fn methods(vhost: &Vhost) -> BTreeSet<String> {
    let names = vhost.ok("rpc_get_methods", json!({}));
    names.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

/// Name and kind of each of SPDK's methods.
fn kinds() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = METHODS.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| {
        let mut words = line.split('\t');
        (words.next().unwrap(), words.next().unwrap())
    })
}

#[test]
fn each_method_of_spdk_is_explained() {
    let vhost = waiting();
    let here = methods(&vhost);
    let kept = kept();
    let kept = kept.iter().map(|(_, method, _)| *method);
    let kept: BTreeSet<&str> = kept.filter(|method| !EFFECTIVE.contains(method)).collect();
    let unsaved: BTreeSet<&str> = unsaved().iter().map(|(method, _)| *method).collect();
    let mut empty: BTreeSet<&str> = empty().iter().map(|(method, ..)| *method).collect();
    empty.extend(STATE.map(|(method, _)| method));
    empty.extend(["sock_impl_get_options", "trace_get_tpoint_group_mask"]);
    let mut counts = BTreeMap::<&str, u32>::new();
    for (name, kind) in kinds() {
        let tested = [("kept", &kept), ("unsaved", &unsaved), ("empty", &empty)];
        if ["optional", "engine", "own"].contains(&kind) {
            assert!(here.contains(name), "{name}");
            continue;
        }
        for (group, methods) in tested {
            assert_eq!(methods.contains(name), kind == group, "{name} is tested as {group}");
        }
        assert_eq!(here.contains(name), kind != "absent", "{name} is {kind}");
        if kind == "absent" {
            assert_eq!(vhost.err(name, Value::Null).code, -32601, "{name}");
        }
        *counts.entry(kind).or_default() += 1;
    }
    println!("SPDK's methods: {counts:?}");
    assert_eq!(counts.values().sum::<u32>(), 185);
}

/// The options are in the saved configuration, and one that is loaded gives the same one again.
#[test]
fn options_without_effect_are_kept_and_saved() {
    let (first, all) = (waiting(), kept());
    let phase = |vhost: &Vhost, kept: &[(&str, &str, Value)]| {
        let now: BTreeSet<String> =
            serde_json::from_value(vhost.ok("rpc_get_methods", json!({"current": true}))).unwrap();
        for (_, method, params) in kept.iter().filter(|(_, method, _)| now.contains(*method)) {
            assert_eq!(vhost.ok(method, params.clone()), true, "{method}");
        }
    };
    phase(&first, &all);
    first.ok("framework_start_init", Value::Null);
    phase(&first, &all);
    for (subsystem, method, params) in &all {
        let saved = first.ok("framework_get_config", json!({"name": subsystem}));
        let call = match params.as_object().unwrap().is_empty() {
            true => json!({"method": method}),
            false => json!({"method": method, "params": params}),
        };
        assert!(saved.as_array().unwrap().contains(&call), "{method}: {saved}");
    }
    let saved = first.spdk_rpc(&["save_config"]).unwrap();
    // With the client, before the start and while it runs, and with -c.
    let second = waiting();
    second.spdk_rpc_with_input(&["load_config"], &saved).unwrap();
    assert_eq!(second.spdk_rpc(&["save_config"]).unwrap(), saved, "load_config");
    let third = Launch::new().config(&saved).start();
    third.ok("framework_wait_init", Value::Null);
    assert_eq!(third.spdk_rpc(&["save_config"]).unwrap(), saved, "-c");
    // Parameters that are not given keep their values.
    third.ok("bdev_raid_set_options", json!({"process_max_bandwidth_mb_sec": 7}));
    let config = third.ok("framework_get_config", json!({"name": "bdev"}));
    let merged = json!({"process_window_size_kb": 1024, "process_max_bandwidth_mb_sec": 7});
    let call = json!({"method": "bdev_raid_set_options", "params": merged});
    assert!(config.as_array().unwrap().contains(&call), "{config}");
    // Getters show them.
    let shown = third.ok("framework_get_scheduler", Value::Null);
    assert_eq!(
        shown,
        json!({"scheduler_name": "dynamic", "scheduler_period": 500_000,
            "isolated_core_mask": "4", "scheduling_core": shown["scheduling_core"],
            "load_limit": 20, "core_limit": 80, "core_busy": 95})
    );
    let shown = third.ok("sock_impl_get_options", json!({"impl_name": "posix"}));
    assert_eq!(
        (&shown["recv_buf_size"], &shown["send_buf_size"]),
        (&json!(4096), &json!(2_097_152))
    );
    assert_eq!(third.ok("fsdev_get_opts", Value::Null)["fsdev_io_pool_size"], 1000);
}

#[test]
fn getters_answer_as_spdk_does_without_such_objects() {
    let vhost = Vhost::start(&[]);
    for (method, params, expected) in empty() {
        assert_eq!(vhost.rpc(method, params.clone()), expected, "{method} {params}");
    }
    for (method, key) in STATE {
        let shown = vhost.ok(method, Value::Null);
        assert!(shown.pointer(key).is_some(), "{method}: {shown}");
    }
    for (method, params) in unsaved() {
        vhost.ok(method, params);
    }
    let trace = vhost.ok("trace_get_info", Value::Null);
    assert_eq!(
        (&trace["tpoint_group_mask"], &trace["sock"]["tpoint_mask"]),
        (&json!("0x8000"), &json!("0x2"))
    );
    let groups = vhost.ok("trace_get_tpoint_group_mask", Value::Null);
    assert_eq!(groups["sock"], json!({"enabled": true, "mask": "0x8000", "tpoints": []}));
    assert_eq!(
        vhost.err("trace_enable_tpoint_group", json!({"name": "nope"})),
        Refusal::new(-32602, "Invalid parameters")
    );
}

/// A parameter of SPDK's schema.
struct Parameter {
    name: &'static str,
    of: &'static str,
    required: bool,
}

impl Parameter {
    fn parse(text: &'static str) -> Self {
        let (name, of) = text.split_once(':').unwrap();
        let stripped = of.strip_prefix('*');
        Self { name, of: stripped.unwrap_or(of), required: stripped.is_some() }
    }

    /// A value of its type.
    fn good(&self) -> Value {
        match self.of {
            "boolean" => json!(false),
            "string" => json!("x"),
            "uuid" => json!("12345678-1234-4234-8234-123456789abc"),
            "array" | "strings" => json!([]),
            of if of.starts_with("object(") => json!({}),
            of if of.starts_with("one(") => {
                let first = of.trim_start_matches("one(").split(['|', ')']).next().unwrap();
                json!(first)
            }
            _ => json!(1),
        }
    }

    /// Values that are not of its type, or out of its range.
    fn bad(&self) -> Vec<Value> {
        let mut bad = vec![Value::Null, json!({"a": 1})];
        match self.of {
            "boolean" => bad.extend([json!(1), json!("true")]),
            "string" | "uuid" => bad.extend([json!(1), json!(["x"])]),
            "array" | "strings" => bad.extend([json!(1), json!("x")]),
            of if of.starts_with("object(") => bad.push(json!([])),
            of if of.starts_with("one(") => bad.extend([json!(-77), json!("no such name")]),
            of => {
                bad.extend([json!("1"), json!(1.5), json!(1e30)]);
                if let Some(bits) = of.strip_prefix("uint") {
                    bad.push(json!(-1));
                    let bits: u32 = bits.parse().unwrap();
                    bad.extend(1_u64.checked_shl(bits).filter(|_| bits < 64).map(Value::from));
                } else {
                    bad.push(json!(1_u64 << 32));
                }
            }
        }
        bad
    }
}

/// Methods that ignore their parameters, as in SPDK.
const IGNORES_ALL: [&str; 5] = [
    "accel_get_stats",
    "bdev_wait_for_examine",
    "framework_wait_init",
    "iobuf_get_stats",
    "keyring_get_keys",
];

/// Methods that ignore unknown parameters, as in SPDK.
const IGNORES_UNKNOWN: [&str; 3] =
    ["framework_set_scheduler", "vhost_create_blk_controller", "virtio_blk_create_transport"];

/// What a method answers to bad parameters, each time the same.
fn refuses(vhost: &Vhost, method: &str, parameters: &[Parameter]) -> Vec<String> {
    let sample = || -> Map<String, Value> {
        let required = parameters.iter().filter(|p| p.required);
        required.map(|p| (p.name.to_owned(), p.good())).collect()
    };
    let mut cases: Vec<Map<String, Value>> = vec![];
    if !IGNORES_UNKNOWN.contains(&method) {
        let mut extra = sample();
        extra.insert("no_such_parameter".into(), json!(1));
        cases.push(extra);
    }
    for p in parameters {
        if p.required {
            let mut missing = sample();
            missing.remove(p.name);
            cases.push(missing);
        }
        for value in p.bad() {
            let mut bad = sample();
            bad.insert(p.name.into(), value);
            cases.push(bad);
        }
    }
    let mut answers = BTreeMap::new();
    for params in cases {
        let answer = match vhost.rpc(method, Value::from(params.clone())) {
            Ok(result) => format!("{result}"),
            Err(refusal) => format!("{refusal:?}"),
        };
        answers.entry(answer).or_insert_with(|| json!(params).to_string());
    }
    let differ = answers.len() > 1 || answers.keys().any(|answer| !answer.starts_with("Refusal"));
    let shown = answers.iter().map(|(answer, params)| format!("{method} {params}: {answer}"));
    if differ { shown.collect() } else { vec![] }
}

/// Each parameter of each method: missing, unknown, of another type, out of range. The answer is
/// always the same error, and nothing changes.
#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let (starting, running) = (waiting(), Vhost::start(&[]));
    let current = |vhost: &Vhost| -> BTreeSet<String> {
        serde_json::from_value(vhost.ok("rpc_get_methods", json!({"current": true}))).unwrap()
    };
    let (at_start, later) = (current(&starting), current(&running));
    let save = |vhost: &Vhost| vhost.spdk_rpc(&["save_config"]).unwrap();
    let before = save(&running);
    let mut problems = vec![];
    for line in METHODS.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split('\t');
        let method = words.next().unwrap();
        let _kind = words.next();
        let parameters: Vec<Parameter> = words.map(Parameter::parse).collect();
        let vhost = match (later.contains(method), at_start.contains(method)) {
            (true, _) => &running,
            (false, true) => &starting,
            (false, false) => continue,
        };
        if IGNORES_ALL.contains(&method) || method == "framework_start_init" {
            continue;
        }
        problems.extend(refuses(vhost, method, &parameters));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert_eq!(save(&running), before);
    starting.ok("framework_start_init", Value::Null);
    assert_eq!(save(&starting), before);
}

/// SPDK's log flags, all of them, as patterns whose case is ignored.
#[test]
fn log_flags_match_as_spdks() {
    let vhost = waiting();
    let flags = vhost.ok("log_get_flags", Value::Null);
    assert_eq!(flags.as_object().unwrap().len(), 72);
    assert!(flags.as_object().unwrap().keys().is_sorted());
    let set = || -> Vec<String> {
        let flags = vhost.ok("log_get_flags", Value::Null);
        let set = flags.as_object().unwrap().iter().filter(|(_, set)| **set == json!(true));
        set.map(|(name, _)| name.clone()).collect()
    };
    vhost.ok("log_set_flag", json!({"flag": "VHOST_[BR]*"}));
    assert_eq!(set(), ["vhost_blk", "vhost_blk_data", "vhost_ring", "vhost_rpc"]);
    vhost.ok("log_clear_flag", json!({"flag": "All"}));
    assert!(set().is_empty());
    let refused = Refusal::new(-32602, "invalid log flag");
    assert_eq!(vhost.err("log_set_flag", json!({"flag": "vhost_nope*"})), refused);
    let started = Launch::new().args(&["-L", "vhost*", "-L", "NVME", "-L", "all"]).start();
    assert_eq!(started.ok("log_get_flags", Value::Null)["vmd"], true);
    assert_eq!(Launch::new().args(&["-L", "nope"]).run_to_end().code, Some(2));
}

/// Another process may take the cores while the locks are given up.
#[test]
fn core_locks_are_given_up_and_taken_again() {
    let first = Launch::new().core_locks().start();
    let second = || Launch::new().core_locks().args(&["--wait-for-rpc"]);
    assert_eq!(second().run_to_end().code, Some(1));
    (0..2).for_each(|_| assert_eq!(first.ok("framework_disable_cpumask_locks", Value::Null), true));
    let other = second().start();
    let refusal = first.err("framework_enable_cpumask_locks", Value::Null);
    assert!(refusal.message.starts_with("Failed to claim CPU core: "), "{refusal:?}");
    other.ok("framework_disable_cpumask_locks", Value::Null);
    (0..2).for_each(|_| assert_eq!(first.ok("framework_enable_cpumask_locks", Value::Null), true));
    assert_eq!(other.err("framework_enable_cpumask_locks", Value::Null).code, -32603);
    assert_eq!(other.stop(), 0);
    assert_eq!(second().run_to_end().code, Some(1), "the first has the locks");
    assert_eq!(first.stop(), 0);
}

/// A configuration with every section, as SPDK saves it, and one that cannot be loaded.
#[test]
fn a_configuration_is_checked_without_loading_it() {
    let vhost = waiting();
    let now: BTreeSet<String> =
        serde_json::from_value(vhost.ok("rpc_get_methods", json!({"current": true}))).unwrap();
    for (_, method, params) in kept().into_iter().filter(|(_, method, _)| now.contains(*method)) {
        vhost.ok(method, params);
    }
    vhost.ok("framework_start_init", Value::Null);
    let disk = vhost.file("disk", 1 << 20);
    vhost.ok("bdev_aio_create", json!({"name": "F", "filename": disk, "block_size": 512}));
    vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "F"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "P"}));
    vhost.ok("vhost_create_scsi_controller", json!({"ctrlr": "s"}));
    let target = json!({"ctrlr": "s", "scsi_target_num": 4, "bdev_name": "P"});
    vhost.ok("vhost_scsi_controller_add_target", target);
    let path = vhost.dir().join("config.json");
    let mut saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    let check = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Launch::new().args(&["--check", path.to_str().unwrap()]).run_to_end()
    };
    // The disk is in use by this process, which the check does not disturb.
    let good = check(&saved);
    assert_eq!(good.code, Some(0), "{}", good.log);
    assert!(good.log.contains("scheduler_set_options (subsystem scheduler"), "{}", good.log);
    assert!(good.log.contains("is kept, but has no effect"), "{}", good.log);
    saved = saved.replace("\"dev_name\": \"P\"", "\"dev_name\": \"Q\"");
    let bad = check(&saved);
    assert_eq!(bad.code, Some(1), "{}", bad.log);
    assert!(bad.log.contains(
        "error: vhost_create_blk_controller (subsystem vhost_blk, entry 1): there is no bdev Q"
    ));
    assert_eq!(check("{").code, Some(1));
    assert_eq!(vhost.stop(), 0);
}
