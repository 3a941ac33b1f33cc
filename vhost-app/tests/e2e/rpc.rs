//! The RPC methods of the real binary, over raw sockets and through SPDK's own client.

use front_end::{FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, STATUS_OK, Segment};
use serde_json::{Value, json};

use crate::support::harness::{self, Launch, Refusal, Vhost, core_mask, wait_until};

const MIB: u64 = 1 << 20;

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_real_client_drives_every_method() {
    let vhost = Vhost::start(&[]);
    let aio = vhost.file("aio", 2 * MIB);
    let uring = vhost.file("uring", 4 * MIB);
    let run = |line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        let output = vhost.spdk_rpc(&args).unwrap_or_else(|e| panic!("{line}: {e}"));
        output.trim().to_owned()
    };
    let mask = core_mask();
    assert!(run("rpc_get_methods").contains("vhost_create_blk_controller"));
    assert!(run("spdk_get_version").contains("SPDK v26.09-pre"));
    assert_eq!(run("framework_wait_init"), "");
    assert!(run("framework_get_reactors").contains("lw_threads"));
    assert!(run("framework_get_subsystems").contains("vhost_blk"));
    assert!(run("framework_get_config bdev").contains("bdev_set_options"));
    assert!(run("thread_get_stats").contains("app_thread"));
    assert_eq!(run("log_get_level"), "\"NOTICE\"");
    run("log_set_level ERROR");
    assert_eq!(run("log_get_level"), "\"ERROR\"");
    assert_eq!(run("log_get_print_level"), "\"INFO\"");
    run("log_set_print_level DEBUG");
    assert_eq!(run("log_get_print_level"), "\"DEBUG\"");
    run("log_set_flag vhost_ring");
    assert!(run("log_get_flags").contains("\"vhost_ring\": true"));
    run("log_clear_flag vhost_ring");
    assert_eq!(run("bdev_malloc_create 1 512"), "Malloc0");
    assert_eq!(run("bdev_malloc_create 1 4096 -b M1 --physical-block-size 4096"), "M1");
    assert_eq!(run("bdev_null_create N0 8 4096"), "N0");
    run("bdev_null_resize N0 16");
    assert_eq!(run(&format!("bdev_aio_create {aio} A0 512")), "A0");
    assert_eq!(run(&format!("bdev_uring_create {uring} U0 4096")), "U0");
    run("bdev_aio_rescan A0");
    run("bdev_uring_rescan U0");
    run("bdev_delay_create -b Malloc0 -d D0 -r 1 --nine-nine-read-latency 2 -w 3 \
         --nine-nine-write-latency 4");
    run("bdev_delay_update_latency D0 p99_write 99");
    run("bdev_error_create M1");
    run("bdev_error_inject_error EE_M1 read failure -n 3");
    run("bdev_error_resume_pending EE_M1");
    assert_eq!(run("bdev_passthru_create -b A0 -p P0"), "P0");
    assert_eq!(run("bdev_split_create N0 2 -s 4"), "N0p0 N0p1");
    let all = ["Malloc0", "M1", "N0", "A0", "U0", "D0", "EE_M1", "P0", "N0p0", "N0p1"];
    assert_eq!(vhost.bdev_names(), all);
    assert!(run("bdev_get_bdevs -b D0").contains("\"p99_write_latency\": 99"));
    assert!(run("bdev_get_bdevs -b N0").contains("\"num_blocks\": 4096"));
    assert!(run("bdev_get_iostat --names A0").contains("bytes_read"));
    run("bdev_reset_iostat");
    assert_eq!(run("bdev_wait_for_examine"), "");
    run(&format!("vhost_create_blk_controller c.0 D0 --cpumask {mask} -r"));
    run("vhost_create_blk_controller c.1 U0 -p --transport VHOST_USER_BLK");
    run("vhost_controller_set_coalescing c.0 20 1000");
    let shown = run("vhost_get_controllers -n c.0");
    assert!(shown.contains("\"delay_base_us\": 20") && shown.contains("\"readonly\": true"));
    assert!(run("virtio_blk_get_transports").contains("vhost_user_blk"));
    assert!(vhost.spdk_rpc(&["virtio_blk_create_transport", "vhost_user_blk"]).is_err());
    run("vhost_delete_controller c.0");
    run("vhost_delete_controller c.1");
    run("bdev_passthru_delete P0");
    run("bdev_split_delete N0");
    run("bdev_delay_delete D0");
    run("bdev_error_delete EE_M1");
    run("bdev_uring_delete U0");
    run("bdev_aio_delete A0");
    run("bdev_null_delete N0");
    run("bdev_malloc_delete M1");
    run("bdev_malloc_delete Malloc0");
    assert!(vhost.bdev_names().is_empty());
    let mut vhost = vhost;
    vhost.spdk_rpc(&["spdk_kill_instance", "SIGTERM"]).unwrap();
    assert_eq!(vhost.wait(), Some(0));
}

#[test]
fn controllers_and_bdevs_are_shown_in_spdks_shape_and_order() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M0");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "z", "dev_name": "M0"}));
    // Unknown names are ignored in this one method, and a disk goes by its UUID too.
    let uuid = vhost.bdev("M0")["uuid"].clone();
    let upper = uuid.as_str().unwrap().to_uppercase();
    let params = json!({"ctrlr": "a", "dev_name": upper, "readonly": true, "more": [1]});
    vhost.ok("vhost_create_blk_controller", params);
    let mask = core_mask();
    let expected = |name: &str, readonly: bool| {
        json!({
            "ctrlr": name,
            "cpumask": mask,
            "delay_base_us": 0,
            "iops_threshold": 60000,
            "socket": vhost.socket(name),
            "sessions": [],
            "backend_specific": {
                "block": {"readonly": readonly, "bdev": "M0", "transport": "vhost_user_blk"}
            }
        })
    };
    let shown = vhost.ok("vhost_get_controllers", json!({}));
    assert_eq!(shown, json!([expected("a", true), expected("z", false)]));
    assert_eq!(shown.to_string(), json!([expected("a", true), expected("z", false)]).to_string());
    assert!(vhost.socket("a").exists() && vhost.socket("z").exists());

    // A bare connection is a session.
    let client = std::os::unix::net::UnixStream::connect(vhost.socket("z")).unwrap();
    harness::wait_until("a session", || {
        let z = vhost.ok("vhost_get_controllers", json!({"name": "z"}));
        z[0]["sessions"].as_array().unwrap().len() == 1
    });
    let session = &vhost.ok("vhost_get_controllers", json!({"name": "z"}))[0]["sessions"][0];
    assert_eq!(keys(session), ["vid", "id", "name", "started", "max_queues", "inflight_task_cnt"]);
    assert_eq!(session["started"], false);
    let whole = &vhost.ok("vhost_get_controller_stats", json!({"name": "z"}))[0];
    assert_eq!(keys(&whole["fds"]), ["open", "closing", "stuck"]);
    let mut more = keys(&whole["sessions"][0]).split_off(keys(session).len());
    more.sort_unstable();
    assert_eq!(more, ["errors", "quarantined_bytes", "queues", "requests", "state"]);
    assert_eq!(whole["sessions"][0]["state"], "negotiating");
    assert_eq!(session["name"], format!("zs{}", session["vid"]));
    drop(client);

    let bdev = &vhost.ok("bdev_get_bdevs", Value::Null)[0];
    assert_eq!(
        keys(bdev),
        [
            "name",
            "aliases",
            "product_name",
            "block_size",
            "num_blocks",
            "preferred_write_alignment",
            "preferred_write_granularity",
            "optimal_write_size",
            "preferred_unmap_alignment",
            "preferred_unmap_granularity",
            "uuid",
            "numa_id",
            "assigned_rate_limits",
            "claimed",
            "zoned",
            "supported_io_types",
            "driver_specific"
        ]
    );
    assert_eq!(bdev["aliases"], json!([uuid]));
    assert_eq!(
        keys(&bdev["supported_io_types"]),
        [
            "read",
            "write",
            "unmap",
            "flush",
            "reset",
            "nvme_admin",
            "nvme_io",
            "nvme_io_md",
            "write_zeroes",
            "zcopy",
            "get_zone_info",
            "zone_management",
            "zone_append",
            "compare",
            "compare_and_write",
            "abort",
            "seek_hole",
            "seek_data",
            "copy",
            "nvme_iov_md",
            "nvme_nssr",
            "write_uncorrectable"
        ]
    );
    let iostat = vhost.ok("bdev_get_iostat", json!({"names": ["M0"]}));
    assert_eq!(keys(&iostat), ["tick_rate", "ticks", "bdevs"]);
    assert_eq!(
        keys(&iostat["bdevs"][0]),
        [
            "name",
            "bytes_read",
            "num_read_ops",
            "bytes_written",
            "num_write_ops",
            "bytes_unmapped",
            "num_unmap_ops",
            "bytes_copied",
            "num_copy_ops",
            "read_latency_ticks",
            "max_read_latency_ticks",
            "min_read_latency_ticks",
            "write_latency_ticks",
            "max_write_latency_ticks",
            "min_write_latency_ticks",
            "unmap_latency_ticks",
            "max_unmap_latency_ticks",
            "min_unmap_latency_ticks",
            "copy_latency_ticks",
            "max_copy_latency_ticks",
            "min_copy_latency_ticks",
            "io_error"
        ]
    );
    let subsystems = vhost.ok("framework_get_subsystems", Value::Null);
    let order: Vec<&str> =
        subsystems.as_array().unwrap().iter().map(|s| s["subsystem"].as_str().unwrap()).collect();
    let spdks = "scheduler sock iobuf keyring vmd fsdev accel bdev vhost_blk scsi nbd vhost_scsi";
    assert_eq!(order.join(" "), spdks);
    assert_eq!(
        keys(&vhost.ok("framework_get_reactors", json!({}))),
        ["tick_rate", "pid", "reactors", "stuck_closes"]
    );
}

#[test]
fn wrappers_wait_for_their_base_and_go_with_it() {
    let vhost = Vhost::start(&[]);
    // The wrappers' UUIDs are derived from that of their base.
    let malloc = json!({"name": "M", "num_blocks": 2048, "block_size": 512,
        "uuid": "12345678-1234-4234-8234-123456789abc"});
    let delay = json!({"name": "D", "base_bdev_name": "EE_M", "avg_read_latency": 1,
        "p99_read_latency": 2, "avg_write_latency": 3, "p99_write_latency": 4});
    assert_eq!(vhost.ok("bdev_delay_create", delay.clone()), "D");
    assert_eq!(vhost.ok("bdev_error_create", json!({"base_name": "M"})), true);
    assert!(vhost.bdev_names().is_empty());
    assert_eq!(vhost.err("bdev_delay_create", delay.clone()).code, -17);
    assert_eq!(vhost.err("bdev_error_create", json!({"base_name": "M"})).code, -17);

    vhost.ok("bdev_malloc_create", malloc.clone());
    let mut all = vhost.bdev_names();
    all.sort();
    assert_eq!(all, ["D", "EE_M", "M"]);
    let shown = vhost.ok("bdev_get_bdevs", json!({"name": "D"}));
    assert_eq!(shown[0]["num_blocks"], 2048);
    assert_eq!(shown[0]["claimed"], false);
    assert_eq!(shown[0]["driver_specific"]["delay"]["base_bdev_name"], "EE_M");
    let base = vhost.ok("bdev_get_bdevs", json!({"name": "M"}));
    assert_eq!(
        (&base[0]["claimed"], &base[0]["claim_type"]),
        (&json!(true), &json!("exclusive_write"))
    );
    // One wrapper each.
    let mut second = delay;
    (second["name"], second["base_bdev_name"]) = (json!("D2"), json!("M"));
    assert_eq!(vhost.err("bdev_delay_create", second), Refusal::new(-1, "Operation not permitted"));

    // All go with the base; the delay comes back with it, as in SPDK.
    let uuid = shown[0]["uuid"].clone();
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    assert!(vhost.bdev_names().is_empty());
    vhost.ok("bdev_malloc_create", malloc);
    assert_eq!(vhost.bdev_names(), ["M"]);
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    assert_eq!(vhost.bdev("D")["uuid"], uuid);
    vhost.ok("bdev_delay_delete", json!({"name": "D"}));
    vhost.ok("bdev_error_delete", json!({"name": "EE_M"}));
    assert_eq!(vhost.bdev("M")["claimed"], false);
}

#[test]
fn a_request_waits_for_a_bdev_and_holds_nobody_up() {
    let vhost = Vhost::start(&[]);
    let mut waiting = vhost.connect();
    let id = waiting.send("bdev_get_bdevs", json!({"name": "later", "timeout": 60_000}));
    // The same connection goes on too.
    waiting.send("spdk_get_version", Value::Null);
    assert_ne!(waiting.receive().0, id);
    vhost.null("other");
    assert!(!waiting.has_answer());
    vhost.null("later");
    let (answered, result) = waiting.receive();
    assert_eq!(answered, id);
    assert_eq!(result.unwrap()[0]["name"], "later");
}

#[test]
fn names_are_made_up_and_reserved_while_a_disk_is_made() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("Malloc1");
    let anonymous = json!({"num_blocks": 8, "block_size": 512});
    assert_eq!(vhost.ok("bdev_malloc_create", anonymous.clone()), "Malloc0");
    assert_eq!(vhost.ok("bdev_malloc_create", anonymous.clone()), "Malloc2");
    // Both are begun before either is done: one read of the socket holds them.
    let mut client = vhost.connect();
    let request = |id: u32| {
        json!({"jsonrpc": "2.0", "id": id, "method": "bdev_malloc_create",
            "params": {"name": "twice", "num_blocks": 65536, "block_size": 512}})
    };
    client.send_raw(&format!("{}{}", request(1), request(2)));
    let mut answers = [client.receive(), client.receive()];
    answers.sort_by_key(|(id, _)| id.as_u64());
    assert_eq!(answers[0].1, Ok(json!("twice")));
    assert_eq!(answers[1].1, Err(Refusal::new(-17, "File exists")));
}

#[test]
fn a_removed_disk_leaves_its_controller() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M0");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "M0"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "M0"}));
    let shown = vhost.ok("vhost_get_controllers", json!({"name": "c"}));
    assert_eq!(shown[0]["backend_specific"]["block"]["bdev"], Value::Null);
    let saved = vhost.ok("framework_get_config", json!({"name": "vhost_blk"}));
    assert_eq!(saved, json!([]));
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
}

#[test]
fn a_file_that_grows_is_seen_and_one_that_shrinks_is_refused() {
    let vhost = Vhost::start(&[]);
    for (kind, name) in [("aio", "A"), ("uring", "U")] {
        let path = vhost.file(name, MIB);
        let create = json!({"name": name, "filename": path, "block_size": 512});
        vhost.ok(&format!("bdev_{kind}_create"), create);
        let rescan = format!("bdev_{kind}_rescan");
        let blocks = || vhost.bdev(name)["num_blocks"].clone();
        vhost.file(name, 2 * MIB);
        assert_eq!(vhost.ok(&rescan, json!({"name": name})), true);
        assert_eq!(blocks(), 4096);
        vhost.file(name, MIB);
        let refusal = vhost.err(&rescan, json!({"name": name}));
        assert_eq!(refusal, Refusal::new(-16, "Device or resource busy"));
        assert_eq!(blocks(), 4096);
    }
}

/// A front end with one queue, and a buffer of 4 KiB in its memory.
fn front_end(vhost: &Vhost, controller: &str) -> (FrontEnd, Queue, Segment) {
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let socket = vhost.socket(controller);
    let mut front_end = FrontEnd::connect(&socket, ram.clone(), Options::default()).unwrap();
    let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    (front_end, queue, ram.alloc(4096, 4096).unwrap())
}

#[test]
fn counters_of_bdevs_and_sessions_count_what_guests_do() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "EE_M"}));
    let (front_end, mut queue, buffer) = front_end(&vhost, "c");
    let read = Request::read(0, std::slice::from_ref(&buffer));
    let write = Request::write(8, std::slice::from_ref(&buffer));
    for request in [&read, &read, &write] {
        assert_eq!(queue.run(request).unwrap().status, STATUS_OK);
    }
    let failure = json!({"name": "EE_M", "io_type": "read", "error_type": "failure"});
    vhost.ok("bdev_error_inject_error", failure);
    assert_ne!(queue.run(&read).unwrap().status, STATUS_OK);

    let iostat = |params: Value| vhost.ok("bdev_get_iostat", params)["bdevs"][0].clone();
    let counted = iostat(json!({"names": ["EE_M"], "reset_mode": "error"}));
    let numbers = ["num_read_ops", "bytes_read", "num_write_ops", "bytes_written"];
    assert_eq!(numbers.map(|n| counted[n].as_u64().unwrap()), [2, 8192, 1, 4096]);
    assert_eq!(counted["io_error"], json!({"failed": 1}));
    let counted = iostat(json!({"names": ["EE_M"], "reset_mode": "none"}));
    assert_eq!((&counted["num_read_ops"], &counted["io_error"]), (&json!(2), &json!({})));
    vhost.ok("bdev_reset_iostat", json!({"name": "EE_M"}));
    assert_eq!(iostat(json!({"names": ["EE_M"]}))["num_read_ops"], 0);

    let shown = vhost.ok("vhost_get_controller_stats", json!({"name": "c"}));
    let session = &shown[0]["sessions"][0];
    assert_eq!((&session["state"], &session["started"]), (&json!("running"), &json!(true)));
    assert_eq!((&session["requests"], &session["max_queues"]), (&json!(4), &json!(1)));
    assert_eq!(session["inflight_task_cnt"], 0);
    front_end.disconnect().unwrap();
}

#[test]
fn deleting_an_error_bdev_fails_what_it_kept_pending() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "EE_M"}));
    let (front_end, mut queue, buffer) = front_end(&vhost, "c");
    let pending = json!({"name": "EE_M", "io_type": "all", "error_type": "pending", "num": 9});
    vhost.ok("bdev_error_inject_error", pending);
    queue.submit(&Request::read(0, std::slice::from_ref(&buffer))).unwrap();
    queue.kick().unwrap();
    harness::wait_until("the request in flight", || {
        let shown = vhost.ok("vhost_get_controllers", json!({"name": "c"}));
        shown[0]["sessions"][0]["inflight_task_cnt"] == 1
    });
    vhost.ok("bdev_error_delete", json!({"name": "EE_M"}));
    assert_ne!(queue.wait().unwrap().status, STATUS_OK);
    // What it was on is as before.
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "d", "dev_name": "M"}));
    front_end.disconnect().unwrap();
}

/// A part's blocks are those of its base from its offset on, through a passthru bdev as well.
#[test]
fn parts_and_passthru_bdevs_serve_guests_their_range_of_the_base() {
    let vhost = Vhost::start(&[]);
    let split = json!({"base_bdev": "M", "split_count": 2});
    assert_eq!(vhost.ok("bdev_split_create", split.clone()), json!([]));
    vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "Mp1"}));
    vhost.malloc("M");
    assert_eq!(vhost.bdev_names(), ["Mp0", "Mp1", "P", "M"]);
    let exists = "Failed to create 2 split bdevs from 'M': File exists";
    assert_eq!(vhost.err("bdev_split_create", split), Refusal::new(-32602, exists));
    for (name, product, about) in [
        ("Mp1", "Split Disk", json!({"split": {"base_bdev": "M", "offset_blocks": 1024}})),
        ("P", "passthru", json!({"passthru": {"name": "P", "base_bdev_name": "Mp1"}})),
    ] {
        let shown = vhost.bdev(name);
        assert_eq!((&shown["product_name"], &shown["num_blocks"]), (&json!(product), &json!(1024)));
        assert_eq!(shown["driver_specific"], about);
    }
    let run = |bdev: &str, write: bool, sector, bytes: [u8; 4096]| {
        vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": bdev}));
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let buffer = [ram.alloc(4096, 4096).unwrap()];
        ram.write(buffer[0].gpa, &bytes).unwrap();
        let socket = vhost.socket("c");
        let mut front_end = FrontEnd::connect(&socket, ram.clone(), Options::default()).unwrap();
        let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
        let request = if write { Request::write } else { Request::read };
        let status = queue.run(&request(sector, &buffer)).unwrap().status;
        let mut data = [0; 4096];
        ram.read(buffer[0].gpa, &mut data).unwrap();
        front_end.disconnect().unwrap();
        vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
        (status, data)
    };
    let (write, read, none) = (true, false, [1; 4096]);
    assert_eq!(run("P", write, 16, [7; 4096]).0, STATUS_OK);
    assert_ne!(run("P", write, 1020, [7; 4096]).0, STATUS_OK, "past the end");
    assert_eq!(run("Mp0", read, 16, none), (STATUS_OK, [0; 4096]));
    vhost.ok("bdev_passthru_delete", json!({"name": "P"}));
    vhost.ok("bdev_split_delete", json!({"base_bdev": "M"}));
    assert_eq!(run("M", read, 1024 + 16, none), (STATUS_OK, [7; 4096]));
}

/// One of everything, in another order than that of the dependencies.
fn populate(vhost: &Vhost) {
    let aio = vhost.file("aio", 2 * MIB);
    let uring = vhost.file("uring", 4 * MIB);
    let delay = json!({"name": "D0", "base_bdev_name": "M0", "avg_read_latency": 1,
        "p99_read_latency": 2, "avg_write_latency": 3, "p99_write_latency": 4});
    vhost.ok("bdev_delay_create", delay);
    let plain = json!({"num_blocks": 2048, "block_size": 4096, "physical_block_size": 4096,
        "optimal_io_boundary": 8, "numa_id": -1, "md_size": 0, "dif_type": 0});
    assert_eq!(vhost.ok("bdev_malloc_create", plain), "Malloc0");
    vhost.malloc("M0");
    let hints = json!({"name": "N0", "num_blocks": 2048, "block_size": 512,
        "preferred_write_alignment": 8, "optimal_write_size": 16});
    vhost.ok("bdev_null_create", hints);
    vhost.ok("bdev_null_resize", json!({"name": "N0", "new_size": 64}));
    let aio = json!({"name": "A0", "filename": aio, "block_size": 512, "readonly": true,
        "fallocate": true});
    vhost.ok("bdev_aio_create", aio);
    vhost.ok("bdev_uring_create", json!({"name": "U0", "filename": uring, "block_size": 4096}));
    let update = json!({"delay_bdev_name": "D0", "latency_type": "p99_read", "latency_us": 77});
    vhost.ok("bdev_delay_update_latency", update);
    vhost.ok("bdev_error_create", json!({"base_name": "A0"}));
    vhost.ok("bdev_error_create", json!({"base_name": "not there"}));
    let mask = core_mask();
    let packed = json!({"ctrlr": "c.1", "dev_name": "D0", "cpumask": mask, "packed_ring": true});
    vhost.ok("vhost_create_blk_controller", packed);
    let read_only = json!({"ctrlr": "c.0", "dev_name": "EE_A0", "readonly": true});
    vhost.ok("vhost_create_blk_controller", read_only);
    let coalescing = json!({"ctrlr": "c.1", "delay_base_us": 1, "iops_threshold": 100});
    vhost.ok("vhost_controller_set_coalescing", coalescing);
}

/// All that an operator sees of a target, less its directory.
fn seen(vhost: &Vhost) -> Value {
    json!(
        [vhost.ok("bdev_get_bdevs", Value::Null), vhost.ok("vhost_get_controllers", Value::Null),]
    )
}

#[test]
fn a_saved_configuration_gives_the_same_target_back() {
    let first = Vhost::start(&[]);
    populate(&first);
    let saved = first.spdk_rpc(&["save_config"]).unwrap();
    let config: Value = serde_json::from_str(&saved).unwrap();
    let bdev = &config["subsystems"][7];
    assert_eq!(bdev["subsystem"], "bdev");
    let entries = bdev["config"].as_array().unwrap();
    assert_eq!(entries[0]["method"], "bdev_set_options");
    assert_eq!(entries.last().unwrap(), &json!({"method": "bdev_wait_for_examine"}));
    let vhost_blk = &config["subsystems"][8]["config"];
    assert_eq!(vhost_blk[1]["params"]["packed_ring"], true);
    assert_eq!(vhost_blk[1]["params"]["cpumask"], &core_mask()[2..]);

    // The sockets of both are relative to their own directories; the files are the first's.
    let here = |vhost: &Vhost, value: Value| {
        value.to_string().replace(vhost.dir().to_str().unwrap(), "DIR")
    };
    let before = seen(&first);
    let expected = {
        // The files stay where they are.
        let mut expected = before;
        for controller in expected[1].as_array_mut().unwrap() {
            let socket = controller["socket"].as_str().unwrap();
            controller["socket"] = here(&first, json!(socket)).trim_matches('"').into();
        }
        expected
    };
    let check = |vhost: &Vhost, how: &str| {
        let mut now = seen(vhost);
        for controller in now[1].as_array_mut().unwrap() {
            let socket = controller["socket"].as_str().unwrap();
            controller["socket"] = here(vhost, json!(socket)).trim_matches('"').into();
        }
        assert_eq!(now, expected, "{how}");
        assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved, "{how}");
    };

    let restarted = Launch::new().config(&saved).start();
    check(&restarted, "-c");
    drop(restarted);

    let waiting = Launch::new().args(&["--wait-for-rpc"]).start();
    waiting.spdk_rpc_with_input(&["load_config"], &saved).unwrap();
    check(&waiting, "load_config into a waiting target");

    // A running target takes it too, but for what only a start can take.
    let running = Vhost::start(&[]);
    let without_options = saved.replace("bdev_set_options", "bdev_wait_for_examine");
    let mut without_options: Value = serde_json::from_str(&without_options).unwrap();
    without_options["subsystems"][7]["config"].as_array_mut().unwrap().remove(0);
    running.spdk_rpc_with_input(&["load_config"], &without_options.to_string()).unwrap();
    check(&running, "load_config into a running target");
}

/// Physical blocks and I/O sizes that `spdk-rpc` gives reach a front end, also through wrappers,
/// after a resize, and from a saved configuration.
#[test]
fn the_topology_that_an_operator_gives_reaches_front_ends() {
    const TOPOLOGY: u64 = 1 << 10;
    let first = Vhost::start(&[]);
    for line in [
        "bdev_malloc_create -b plain 1 512",
        "bdev_malloc_create -b malloc 1 512 -p 4096 -o 256",
        "bdev_malloc_create -b odd 1 512 -p 4096 -o 12",
        "bdev_malloc_create -b below 1 4096 --physical-block-size 512 --optimal-io-boundary 3",
        "bdev_null_create null 1 4096 -p 16384 -g 8 -s 32",
        "bdev_error_create malloc",
        "bdev_delay_create -b EE_malloc -d wrapped -r 1 --nine-nine-read-latency 1 -w 1 \
         --nine-nine-write-latency 1",
    ] {
        let args: Vec<&str> = line.split_whitespace().collect();
        first.spdk_rpc(&args).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    first.wait_for_log("odd: optimal I/O size 12 is inconsistent: guests get 0");
    first.wait_for_log("below: physical block size 512 is inconsistent: guests get 4096");
    // The exponent of a physical block, the smallest I/O and the best, in blocks.
    let expected = [
        ("plain", (0, 1, 0)),
        ("wrapped", (3, 8, 256)),
        ("odd", (3, 8, 0)),
        ("below", (0, 1, 3)),
        ("null", (2, 8, 32)),
    ];
    let check = |vhost: &Vhost, how: &str| {
        for (name, topology) in expected {
            let ram = GuestRam::new(&[1 << 20]).unwrap();
            let options = Options::default();
            let mut front_end = FrontEnd::connect(&vhost.socket(name), ram, options).unwrap();
            assert_ne!(front_end.features() & TOPOLOGY, 0, "{how} {name}");
            let config = front_end.config().unwrap();
            let told = (config.physical_block_exp, config.min_io_size, config.opt_io_size);
            assert_eq!((told, config.alignment_offset), (topology, 0), "{how} {name}");
        }
    };
    for (name, _) in expected {
        first.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": name}));
    }
    check(&first, "as made");
    first.ok("bdev_null_resize", json!({"name": "null", "new_size": 2}));
    check(&first, "resized");
    let saved = first.spdk_rpc(&["save_config"]).unwrap();
    let restarted = Launch::new().config(&saved).start();
    restarted.ok("framework_wait_init", Value::Null);
    check(&restarted, "-c");
    // SPDK shows no physical blocks.
    let shown = first.ok("bdev_get_bdevs", json!({"name": "malloc"}));
    assert!(!shown.to_string().contains("physical"), "{shown}");
    assert_eq!(first.bdev("null")["optimal_write_size"], 32);
}

#[test]
fn a_thousand_rounds_leave_nothing_behind() {
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    vhost.null("B");
    let mut client = vhost.connect();
    let mut round = |n: u32| {
        let mut call = |method: &str, params: Value| client.call(method, params).unwrap();
        let disk = json!({"name": "M", "num_blocks": 4096, "block_size": 512});
        call("bdev_malloc_create", disk);
        let dev = if n.is_multiple_of(2) { "M" } else { "N" };
        call("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": dev}));
        call("bdev_error_create", json!({"base_name": "B"}));
        if n.is_multiple_of(3) {
            call("bdev_malloc_delete", json!({"name": "M"}));
            call("vhost_delete_controller", json!({"ctrlr": "c"}));
        } else {
            call("vhost_delete_controller", json!({"ctrlr": "c"}));
            call("bdev_malloc_delete", json!({"name": "M"}));
        }
        call("bdev_error_delete", json!({"name": "EE_B"}));
    };
    (0..100).for_each(&mut round);
    let (rss, fds) = (vhost.rss_kib(), vhost.fds());
    (100..1000).for_each(&mut round);
    // Some are closed by threads of their own, a moment later; so may one have been that counted above.
    wait_until("no more fds than after 100 rounds", || vhost.fds() <= fds);
    // Pages come and go with allocations of the moment, and with the heaps of threads; a leak of 600
    // bytes a round would show.
    let now = vhost.rss_kib();
    assert!(now <= rss + 512, "{rss} kB after 100 rounds, {now} kB after 1000");
    assert_eq!(vhost.bdev_names(), ["N", "B"]);
}
