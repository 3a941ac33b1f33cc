//! What the RPC methods refuse: with SPDK's code and text, the reason in the log, nothing half-made.

use std::fs;

use serde_json::{Value, json};

use crate::support::harness::{Refusal, Vhost};

const MIB: u64 = 1 << 20;

/// Each call must fail with this answer.
fn all_refused(vhost: &Vhost, cases: &[(&str, Value, i64, &str)]) {
    for (method, params, code, message) in cases {
        let refusal = vhost.err(method, params.clone());
        assert_eq!(refusal, Refusal::new(*code, message), "{method} {params}");
    }
}

#[test]
fn controllers_are_refused_with_spdks_codes_and_nothing_half_made() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M0");
    vhost.malloc("Claimed");
    vhost.ok("bdev_error_create", json!({"base_name": "Claimed"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "taken", "dev_name": "M0"}));
    fs::write(vhost.socket("file"), "mine").unwrap();
    let create = "vhost_create_blk_controller";
    let with = |name: &str, value: Value| {
        let mut params = json!({"ctrlr": "c", "dev_name": "M0"});
        params[name] = value;
        params
    };
    // The directory alone may make the path too long; this does.
    let long = "n".repeat(108);
    all_refused(
        &vhost,
        &[
            (create, json!({}), -32602, "Invalid argument"),
            (create, json!({"ctrlr": "c"}), -32602, "Invalid argument"),
            (create, with("readonly", json!("yes")), -32602, "Invalid argument"),
            (create, with("transport", json!("x")), -32602, "Invalid argument"),
            (create, with("dev_name", json!("nope")), -32602, "No such device"),
            (create, with("dev_name", json!("Claimed")), -32602, "Operation not permitted"),
            (create, with("cpumask", json!("")), -32602, "Invalid argument"),
            (create, with("cpumask", json!("0x0")), -32602, "Invalid argument"),
            (create, with("cpumask", json!("zz")), -32602, "Invalid argument"),
            (create, with("cpumask", json!("0xffff")), -32602, "Invalid argument"),
            (create, with("cpumask", json!("[0-1]")), -32602, "Invalid argument"),
            (create, with("ctrlr", json!("taken")), -32602, "File exists"),
            (create, with("ctrlr", json!("")), -32602, "Input/output error"),
            (create, with("ctrlr", json!(".")), -32602, "Input/output error"),
            (create, with("ctrlr", json!("../x")), -32602, "Input/output error"),
            (create, with("ctrlr", json!("no/such/dir")), -32602, "Input/output error"),
            (create, with("ctrlr", json!("file")), -32602, "Input/output error"),
            (create, with("ctrlr", json!(long)), -32602, "Input/output error"),
            ("vhost_delete_controller", json!({"ctrlr": "c"}), -32602, "No such device"),
            ("vhost_delete_controller", json!({}), -32602, "Invalid argument"),
            (
                "vhost_delete_controller",
                json!({"ctrlr": "taken", "x": 1}),
                -32602,
                "Invalid argument",
            ),
            ("vhost_get_controllers", json!({"name": "c"}), -32603, "No such device"),
            ("vhost_get_controllers", json!({"nam": "c"}), -32603, "Invalid argument"),
            (
                "vhost_controller_set_coalescing",
                json!({"ctrlr": "c", "delay_base_us": 1, "iops_threshold": 1000}),
                -32602,
                "No such device",
            ),
            (
                "vhost_controller_set_coalescing",
                json!({"ctrlr": "taken", "delay_base_us": 1, "iops_threshold": 99}),
                -32602,
                "Invalid argument",
            ),
            (
                "vhost_controller_set_coalescing",
                json!({"ctrlr": "taken", "delay_base_us": 4_000_000_000u32, "iops_threshold": 1000}),
                -32602,
                "Invalid argument",
            ),
            ("virtio_blk_create_transport", json!({"name": "Vhost_User_Blk"}), -17, "File exists"),
            (
                "virtio_blk_create_transport",
                json!({"name": "vfio_user_blk"}),
                -2,
                "No such file or directory",
            ),
            ("virtio_blk_create_transport", json!({}), -22, "Invalid argument"),
            ("virtio_blk_get_transports", json!({"name": "x"}), -19, "No such device"),
            ("virtio_blk_get_transports", json!({"x": 1}), -32602, "Invalid parameters"),
        ],
    );
    let shown = vhost.ok("vhost_get_controllers", Value::Null);
    assert_eq!(shown.as_array().unwrap().len(), 1);
    assert_eq!(fs::read_to_string(vhost.socket("file")).unwrap(), "mine");
    vhost.wait_for_log("cpumask");
    vhost.wait_for_log(&long);
    // Names are free again after what was refused.
    vhost.ok(create, json!({"ctrlr": "c", "dev_name": "M0", "packed_ring": true}));
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    assert!(!vhost.socket("c").exists());
}

#[test]
fn bdevs_are_refused_with_spdks_codes_and_nothing_half_made() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M0");
    vhost.null("N0");
    let uuid = vhost.bdev("M0")["uuid"].clone();
    let odd = vhost.file("odd", MIB + 1);
    let good = vhost.file("good", MIB);
    let missing = vhost.dir().join("missing");
    let decode = "spdk_json_decode_object failed";
    let malloc_with = |name: &str, value: Value| {
        let mut params = json!({"name": "x", "num_blocks": 8, "block_size": 512});
        params[name] = value;
        params
    };
    let aio = |filename: &str, block_size: u32| json!({"name": "x", "filename": filename, "block_size": block_size});
    let delay = |name: &str, base: &str, p99: u32| {
        json!({"name": name, "base_bdev_name": base, "avg_read_latency": 5, "p99_read_latency": p99,
            "avg_write_latency": 5, "p99_write_latency": 5})
    };
    let (c, n, a, u) =
        ("bdev_malloc_create", "bdev_null_create", "bdev_aio_create", "bdev_uring_create");
    let uring = "Unable to create URING bdev.";
    let inject = "bdev_error_inject_error";
    let broken = json!({"name": "EE_x", "io_type": "read", "error_type": "failure"});
    all_refused(
        &vhost,
        &[
            (c, json!({}), -32603, decode),
            (c, malloc_with("what", json!(1)), -32603, decode),
            (c, malloc_with("uuid", json!("1234")), -32603, decode),
            (c, malloc_with("num_blocks", json!(-1)), -32603, decode),
            (c, malloc_with("num_blocks", json!(0)), -22, "Invalid argument"),
            (c, malloc_with("block_size", json!(513)), -22, "Invalid argument"),
            (c, malloc_with("name", json!("")), -22, "Invalid argument"),
            (c, malloc_with("md_size", json!(8)), -22, "Invalid argument"),
            (c, malloc_with("dif_type", json!(1)), -22, "Invalid argument"),
            (c, malloc_with("physical_block_size", json!(100)), -22, "Invalid argument"),
            (c, malloc_with("physical_block_size", json!(1000)), -22, "Invalid argument"),
            (c, malloc_with("physical_block_size", json!(-512)), -32603, decode),
            (c, malloc_with("physical_block_size", json!(1u64 << 32)), -32603, decode),
            (c, malloc_with("optimal_io_boundary", json!("8")), -32603, decode),
            (n, malloc_with("physical_block_size", json!(513)), -22, "Invalid argument"),
            (n, malloc_with("optimal_io_boundary", json!(8)), -32603, decode),
            (c, malloc_with("name", json!("M0")), -17, "File exists"),
            (c, malloc_with("uuid", uuid.clone()), -17, "File exists"),
            (c, malloc_with("name", uuid.clone()), -17, "File exists"),
            (c, malloc_with("num_blocks", json!(1u64 << 40)), -12, "Cannot allocate memory"),
            (n, json!({"name": "x", "num_blocks": 0, "block_size": 512}), -22, "Invalid argument"),
            (n, json!({"name": "N0", "num_blocks": 8, "block_size": 512}), -17, "File exists"),
            (a, json!({"name": "x"}), -32603, decode),
            (a, aio(missing.to_str().unwrap(), 512), -2, "No such file or directory"),
            (a, aio(vhost.dir().to_str().unwrap(), 512), -21, "Is a directory"),
            (a, aio(&odd, 512), -22, "Invalid argument"),
            (a, aio(&good, 100), -22, "Invalid argument"),
            (a, json!({"name": "x", "filename": good}), -22, "Invalid argument"),
            (
                a,
                json!({"name": "x", "filename": good, "block_size": 512, "nowait": true}),
                -95,
                "Operation not supported",
            ),
            (a, json!({"name": "M0", "filename": good, "block_size": 512}), -17, "File exists"),
            (u, aio(missing.to_str().unwrap(), 512), -32603, uring),
            (u, json!({"name": "M0", "filename": good, "block_size": 512}), -32603, uring),
            ("bdev_delay_create", delay("d", "M0", 4), -22, "Invalid argument"),
            ("bdev_delay_create", delay("N0", "M0", 5), -17, "File exists"),
            ("bdev_error_create", json!({}), -32602, decode),
            ("bdev_malloc_delete", json!({"name": "x"}), -19, "No such device"),
            ("bdev_malloc_delete", json!({"name": "N0"}), -19, "No such device"),
            ("bdev_null_delete", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_aio_delete", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_uring_delete", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_delay_delete", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_error_delete", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_aio_rescan", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_uring_rescan", json!({"name": "x"}), -19, "No such device"),
            ("bdev_null_resize", json!({"name": "x", "new_size": 1}), -19, "No such device"),
            ("bdev_null_resize", json!({"name": "M0", "new_size": 1}), -22, "Invalid argument"),
            ("bdev_null_resize", json!({"name": "N0", "new_size": 0}), -22, "Invalid argument"),
            (
                "bdev_delay_update_latency",
                json!({"delay_bdev_name": "M0", "latency_type": "avg_read", "latency_us": 1}),
                -32602,
                "The requested bdev does not exist.",
            ),
            (inject, broken.clone(), -19, "No such device"),
            (
                inject,
                json!({"name": "EE_x", "io_type": "x", "error_type": "failure"}),
                -32602,
                decode,
            ),
            ("bdev_error_resume_pending", json!({"name": "M0"}), -19, "No such device"),
            ("bdev_get_bdevs", json!({"name": "x"}), -19, "No such device"),
            ("bdev_get_bdevs", json!({"name": "x", "timeout": 1}), -110, "Connection timed out"),
            ("bdev_get_bdevs", json!({"what": 1}), -32603, decode),
            ("bdev_get_iostat", json!({"names": ["M0", "x"]}), -19, "No such device"),
            ("bdev_get_iostat", json!({"name": "M0"}), -32603, decode),
            ("bdev_get_iostat", json!({"per_channel": true}), -22, "Invalid argument"),
            ("bdev_reset_iostat", json!({"name": "x"}), -19, "No such device"),
            (
                "bdev_wait_for_examine",
                json!({"x": 1}),
                -32602,
                "bdev_wait_for_examine requires no parameters",
            ),
        ],
    );
    assert_eq!(vhost.bdev_names(), ["M0", "N0"]);
    for text in ["md_size 8", "dif_type 1", "missing", "odd", "562949953421312"] {
        vhost.wait_for_log(text);
    }
}

#[test]
fn attaching_an_nvme_controller_is_refused_with_spdks_codes() {
    let vhost = Vhost::start(&[]);
    let attach = "bdev_nvme_attach_controller";
    let invalid = "Invalid argument";
    let with = |more: Value| {
        let mut params = json!({"name": "N", "trtype": "PCIe", "traddr": "ffff:ff:1f.7"});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        params
    };
    let long = "7".repeat(33);
    all_refused(
        &vhost,
        &[
            (attach, json!({"name": "N"}), -32603, "spdk_json_decode_object failed"),
            (attach, with(json!({"multipath": "x"})), -32603, "spdk_json_decode_object failed"),
            (attach, with(json!({"max_bdevs": 0})), -22, "max_bdevs cannot be zero"),
            (attach, with(json!({"name": ""})), -22, invalid),
            (attach, with(json!({"trtype": "x"})), -22, "Failed to parse trtype: x"),
            (attach, with(json!({"adrfam": "x"})), -22, "Failed to parse adrfam: x"),
            (attach, with(json!({"trsvcid": long})), -22, &format!("trsvcid too long: {long}")),
            (
                attach,
                with(json!({"num_io_queues": 0})),
                -22,
                "num_io_queues out of bounds, min: 1 max: 65536",
            ),
            (attach, with(json!({"reconnect_delay_sec": 1})), -22, invalid),
            (attach, with(json!({"trtype": "TCP", "trsvcid": "1"})), -22, invalid),
            (attach, with(json!({"psk": "key"})), -126, "Required key not available"),
            (attach, with(json!({})), -19, "No such device"),
            ("bdev_nvme_detach_controller", json!({"name": "N"}), -19, "No such device"),
            ("bdev_nvme_reset_controller", json!({"name": "N"}), -19, "No such device"),
            ("bdev_nvme_get_controllers", json!({"name": "N"}), -22, "Controller N does not exist"),
            (
                "bdev_nvme_get_controller_health_info",
                json!({"name": "N"}),
                -32603,
                "Device not found",
            ),
        ],
    );
    vhost.wait_for_log("no PCI device has the address ffff:ff:1f.7");
    assert_eq!(vhost.ok("bdev_nvme_get_controllers", json!({})), json!([]));
}

/// A time-out that is not given is that of `bdev_nvme_set_options`.
#[test]
fn time_outs_of_an_nvme_controller_fit_the_options() {
    let vhost = Vhost::start(&[]);
    let options = json!({"ctrlr_loss_timeout_sec": 10, "reconnect_delay_sec": 2});
    vhost.ok("bdev_nvme_set_options", options);
    let attach = |more: Value| {
        let mut params = json!({"name": "N", "trtype": "PCIe", "traddr": "ffff:ff:1f.7"});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vhost.err("bdev_nvme_attach_controller", params).code
    };
    assert_eq!(attach(json!({"fast_io_fail_timeout_sec": 5})), -19);
    assert_eq!(attach(json!({"fast_io_fail_timeout_sec": 11})), -22);
    assert_eq!(attach(json!({"ctrlr_loss_timeout_sec": 1})), -22);
}

#[test]
fn other_methods_are_refused_with_spdks_codes() {
    let vhost = Vhost::start(&[]);
    all_refused(
        &vhost,
        &[
            ("bdev_nvme_start_discovery", json!({}), -32601, "Method not found"),
            ("framework_get_config", json!({"name": "x"}), -32602, "Subsystem 'x' not found"),
            ("framework_get_config", json!({}), -32602, "Invalid arguments"),
            (
                "framework_get_reactors",
                json!({"x": 1}),
                -32602,
                "`framework_get_reactors` requires no arguments",
            ),
            ("spdk_kill_instance", json!({"sig_name": "SIGSEGV"}), -32602, "Invalid parameters"),
            ("log_set_level", json!({"level": "notice"}), -32603, "spdk_json_decode_object failed"),
            ("log_set_print_level", json!({}), -32603, "spdk_json_decode_object failed"),
            ("log_set_flag", json!({"flag": "x"}), -32602, "invalid log flag"),
        ],
    );
    let refusal = vhost.err("framework_start_init", Value::Null);
    assert_eq!(refusal.code, -1);
    assert!(refusal.message.starts_with("Method may only be called before framework"));
}
