//! `vhost --check` and the RPCs agree on what is refused.

use std::fs;

use serde_json::{Value, json};

use crate::support::harness::Launch;

/// A call, and whether it succeeds.
type Case = (&'static str, Value, bool);

/// `params` with this change.
fn with(mut params: Value, name: &str, value: Value) -> Value {
    params[name] = value;
    params
}

/// Methods that are called before the subsystems are initialised.
fn startup() -> Vec<Case> {
    vec![
        ("bdev_set_options", json!({"bdev_io_pool_size": 511}), false),
        ("bdev_set_options", json!({"bdev_io_cache_size": 40_000}), false),
        ("bdev_set_options", json!({"bdev_io_cache_size": 30_000}), true),
        // Refused together with what was set before.
        ("bdev_set_options", json!({"bdev_io_pool_size": 50_000}), false),
        ("scheduler_set_options", json!({"isolated_core_mask": "zz"}), false),
        ("scheduler_set_options", json!({"scheduling_core": 77}), false),
        ("iobuf_set_options", json!({"small_pool_count": 63}), false),
        ("iobuf_set_options", json!({"small_pool_count": 64}), true),
        ("accel_assign_opc", json!({"opname": "nope", "module": "software"}), false),
    ]
}

fn block_devices() -> Vec<Case> {
    let mut cases = vec![];
    for method in ["bdev_null_create", "bdev_malloc_create"] {
        let good = json!({"name": "X", "num_blocks": 8, "block_size": 512});
        for (name, value) in [
            ("block_size", json!(0)),
            ("block_size", json!(520)),
            ("block_size", json!(256)),
            ("num_blocks", json!(0)),
            ("num_blocks", json!(u64::MAX / 512)),
            ("num_blocks", json!(1.5)),
            ("num_blocks", Value::Null),
            ("name", json!("")),
            ("name", json!("a\0b")),
            ("uuid", json!("1")),
            ("md_size", json!(8)),
            ("dif_type", json!(1)),
            ("physical_block_size", json!(100)),
            ("nope", json!(1)),
        ] {
            cases.push((method, with(good.clone(), name, value), false));
        }
        // The null UUID stands for none.
        let good = with(good, "uuid", json!("00000000-0000-0000-0000-000000000000"));
        let good = with(with(good, "name", json!(method)), "num_blocks", json!(8.0));
        cases.push((method, with(good, "md_size", json!(0)), true));
    }
    let delay = json!({"name": "D", "base_bdev_name": "none", "avg_read_latency": 2,
        "p99_read_latency": 2, "avg_write_latency": 2, "p99_write_latency": 2});
    let file = |name: &str| json!({"name": name, "filename": "disk", "block_size": 512.0});
    let (aio, uring) = (file("A"), file("U"));
    cases.extend([
        ("bdev_malloc_create", json!({"num_blocks": 8, "block_size": 512}), true),
        ("bdev_null_resize", json!({"name": "N", "new_size": 1_u64 << 44}), false),
        ("bdev_null_resize", json!({"name": "N", "new_size": 64}), true),
        ("bdev_aio_create", with(aio.clone(), "block_size", json!(100)), false),
        ("bdev_aio_create", with(aio.clone(), "name", json!("")), false),
        ("bdev_aio_create", with(file("F0"), "block_size", json!(0)), false),
        ("bdev_aio_create", with(file("F1"), "block_size", json!(1 << 21)), false),
        ("bdev_aio_create", with(file("F2"), "filename", json!(".")), false),
        ("bdev_aio_create", with(file("F3"), "filename", json!("/dev/null")), false),
        ("bdev_uring_create", with(uring.clone(), "block_size", json!(513)), false),
        ("bdev_aio_create", aio, true),
        ("bdev_uring_create", with(uring, "filename", json!("disk2")), true),
        ("bdev_delay_create", with(delay.clone(), "p99_read_latency", json!(1)), false),
        ("bdev_delay_create", with(delay.clone(), "p99_write_latency", json!(1)), false),
        ("bdev_delay_create", with(delay.clone(), "name", json!("")), false),
        ("bdev_delay_create", delay, true),
        ("bdev_passthru_create", json!({"name": "", "base_bdev_name": "none"}), false),
        ("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "none"}), true),
        ("bdev_error_create", json!({"base_name": "E", "uuid": "x"}), false),
        ("bdev_error_create", json!({"base_name": "E"}), true),
        (
            "bdev_error_inject_error",
            json!({"name": "EE_E", "io_type": "read", "error_type": "corrupt_data"}),
            false,
        ),
        ("bdev_split_create", json!({"base_bdev": "none", "split_count": 0}), false),
        (
            "bdev_split_create",
            json!({"base_bdev": "none", "split_count": 1, "split_size_mb": 1_u64 << 44}),
            false,
        ),
        ("bdev_split_create", json!({"base_bdev": "none", "split_count": 2}), true),
        ("bdev_delay_delete", json!({"name": "D", "nope": 1}), false),
        ("bdev_delay_delete", json!({"name": "D"}), true),
    ]);
    cases
}

fn limits_and_histograms() -> Vec<Case> {
    let histogram = json!({"name": "N", "enable": true});
    let off = json!({"name": "N", "enable": false, "granularity": 100});
    vec![
        ("bdev_set_qos_limit", json!({"name": "N"}), false),
        ("bdev_set_qos_limit", json!({"name": "N", "rw_ios_per_sec": 0}), true),
        ("bdev_enable_histogram", with(histogram.clone(), "granularity", json!(100)), false),
        ("bdev_enable_histogram", with(histogram.clone(), "min_nsec", json!(u64::MAX)), false),
        ("bdev_enable_histogram", with(histogram.clone(), "opc", json!("nope")), false),
        ("bdev_enable_histogram", with(histogram, "opc", json!("copy")), true),
        ("bdev_enable_histogram", off, true),
    ]
}

fn controllers() -> Vec<Case> {
    let controller = json!({"ctrlr": "c", "dev_name": "N"});
    let create = "vhost_create_blk_controller";
    let coalescing = json!({"ctrlr": "c", "delay_base_us": 1, "iops_threshold": 1000});
    let coalesce = "vhost_controller_set_coalescing";
    vec![
        (create, with(controller.clone(), "transport", json!("nope")), false),
        (create, with(controller.clone(), "cpumask", json!("")), false),
        (create, with(controller.clone(), "cpumask", json!("0")), false),
        (create, with(json!({"ctrlr": "d", "dev_name": "N"}), "cpumask", json!("0xffff")), false),
        (create, with(controller.clone(), "ctrlr", json!("../c")), false),
        (create, with(controller.clone(), "ctrlr", json!("n".repeat(108))), false),
        (create, with(controller.clone(), "readonly", json!(1)), false),
        // As in SPDK, an unknown name is ignored here.
        (create, with(controller, "nope", json!(1)), true),
        (coalesce, with(coalescing.clone(), "iops_threshold", json!(99)), false),
        (coalesce, with(coalescing.clone(), "delay_base_us", json!(u32::MAX)), false),
        (coalesce, coalescing, true),
        ("virtio_blk_create_transport", json!({"name": "vhost_user_blk"}), false),
    ]
}

fn targets() -> Vec<Case> {
    let (create, start) = ("vhost_create_scsi_controller", "vhost_start_scsi_controller");
    let add = "vhost_scsi_controller_add_target";
    let remove = "vhost_scsi_controller_remove_target";
    let target = json!({"ctrlr": "s", "scsi_target_num": 3.0, "bdev_name": "N"});
    let number = |number: Value| json!({"ctrlr": "s", "scsi_target_num": number});
    vec![
        (create, json!({"ctrlr": "s", "cpumask": ""}), false),
        (create, json!({"ctrlr": "u", "cpumask": "0xffff"}), false),
        (create, json!({"ctrlr": "s/../s"}), false),
        (create, json!({"ctrlr": "c"}), false),
        (create, json!({"ctrlr": "s", "nope": 1}), false),
        (create, json!({"ctrlr": "s", "delay": true, "packed_ring": true}), true),
        (create, json!({"ctrlr": "s"}), false),
        (add, with(target.clone(), "ctrlr", json!("c")), false),
        (add, with(target.clone(), "ctrlr", json!("d")), false),
        (add, with(target.clone(), "scsi_target_num", json!(8)), false),
        (add, with(target.clone(), "bdev_name", json!("nope")), false),
        (add, target.clone(), true),
        (add, target.clone(), false),
        (add, with(target.clone(), "scsi_target_num", json!(-1)), true),
        (add, with(target.clone(), "scsi_target_num", json!(0)), false),
        (remove, number(json!(1)), false),
        (remove, number(json!(8)), false),
        (remove, number(json!(-1)), false),
        (remove, with(number(json!(3)), "timeout_ms", json!(0)), true),
        (add, target, true),
        (start, json!({"ctrlr": "c"}), false),
        (start, json!({"ctrlr": "d"}), false),
        (start, json!({"ctrlr": "s"}), true),
        (start, json!({"ctrlr": "s"}), true),
    ]
}

fn other_options() -> Vec<Case> {
    vec![
        ("bdev_examine", json!({"name": "N"}), false),
        ("bdev_nvme_set_options", json!({"bdev_retry_count": -2}), false),
        ("bdev_nvme_set_options", json!({"timeout_us": 5}), true),
        // Fits only with what was set before.
        ("bdev_nvme_set_options", json!({"timeout_admin_us": 5}), true),
        ("framework_set_scheduler", json!({"name": "nope"}), false),
        ("framework_set_scheduler", json!({"name": "static", "load_limit": 1}), false),
        ("framework_set_scheduler", json!({"name": "dynamic", "nope": 1}), true),
        ("log_set_flag", json!({"flag": "nope"}), false),
        ("log_set_flag", json!({"flag": "BDEV*"}), true),
        ("log_set_level", json!({"level": "info"}), false),
        ("thread_set_cpumask", json!({"id": 1, "cpumask": "zz"}), false),
        ("trace_enable_tpoint_group", json!({"name": "nope"}), false),
        ("trace_set_tpoint_mask", json!({"name": "bdev", "tpoint_mask": 1}), true),
    ]
}

#[test]
fn the_check_and_the_rpcs_refuse_the_same_calls() {
    let waiting = Launch::new().args(&["--wait-for-rpc"]).start();
    waiting.file("disk", 1 << 20);
    waiting.file("disk2", 1 << 20);
    let startup = startup();
    let null = json!({"name": "N", "num_blocks": 2048, "block_size": 512});
    let mut runtime = vec![("bdev_null_create", null, true)];
    let more = [block_devices(), limits_and_histograms(), controllers(), targets()];
    for more in more.into_iter().chain([other_options()]) {
        runtime.extend(more);
    }
    let cases: Vec<&Case> = startup.iter().chain(&runtime).collect();

    let entry = |(method, params, _): &&Case| json!({"method": method, "params": params});
    let entries: Vec<Value> = cases.iter().map(entry).collect();
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": entries}]});
    let checked = Launch::new();
    fs::write(checked.dir().join("config.json"), config.to_string()).unwrap();
    for disk in ["disk", "disk2"] {
        fs::write(checked.dir().join(disk), vec![0; 1 << 20]).unwrap();
    }
    let checked = checked.args(&["--check", "config.json"]).run_to_end();
    let place = |n: usize| format!("error: {} (subsystem bdev, entry {}): ", cases[n].0, n + 1);

    let call = |(method, params, _): &Case| waiting.rpc(method, params.clone());
    let mut answers: Vec<_> = startup.iter().map(call).collect();
    waiting.ok("framework_start_init", Value::Null);
    answers.extend(runtime.iter().map(call));
    for (n, ((method, params, good), answer)) in cases.iter().zip(answers).enumerate() {
        assert_eq!(answer.is_ok(), *good, "{method} {params}: {answer:?}");
        let error = checked.log.lines().find_map(|line| line.strip_prefix(&place(n)));
        assert_eq!(error.is_none(), *good, "--check: {method} {params}: {error:?}");
        // An answer's text such as "Invalid argument" is no reason.
        assert_ne!(error, Some("Invalid argument"), "{method} {params}");
    }
    let bad = cases.iter().filter(|(_, _, good)| !good).count();
    assert!(checked.log.contains(&format!(": {bad} errors in")), "{}", checked.log);
    assert_eq!(checked.code, Some(1));
    assert_eq!(waiting.stop(), 0);
}
