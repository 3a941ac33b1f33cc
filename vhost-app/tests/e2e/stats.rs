//! Statistics, histograms and notifications, with a front end that does I/O.

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost, wait_until};

/// Reads and writes of 4 KiB through a controller, with one connection.
fn io(vhost: &Vhost, controller: &str, reads: u64, writes: u64) {
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let socket = vhost.socket(controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    for _ in 0..reads {
        let read = Request::read(0, std::slice::from_ref(&buffer));
        assert_eq!(queue.run(&read).unwrap().status, STATUS_OK);
    }
    for _ in 0..writes {
        let write = Request::write(0, std::slice::from_ref(&buffer));
        assert_eq!(queue.run(&write).unwrap().status, STATUS_OK);
    }
    front_end.disconnect().unwrap();
}

fn controller(vhost: &Vhost, name: &str, bdev: &str) {
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": bdev}));
}

fn iostat(vhost: &Vhost, name: &str) -> Value {
    vhost.ok("bdev_get_iostat", json!({"names": [name]}))["bdevs"][0].clone()
}

#[test]
fn latencies_have_extremes_and_counters_outlive_their_connections() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    controller(&vhost, "c", "M");
    let none = iostat(&vhost, "M");
    assert_eq!(
        (&none["max_read_latency_ticks"], &none["min_read_latency_ticks"]),
        (&json!(0), &json!(0))
    );
    io(&vhost, "c", 10, 3);
    io(&vhost, "c", 5, 0);
    let stat = iostat(&vhost, "M");
    assert_eq!((&stat["num_read_ops"], &stat["num_write_ops"]), (&json!(15), &json!(3)));
    let number = |name: &str| stat[name].as_u64().unwrap();
    let [min, max, sum] =
        ["min_read_latency_ticks", "max_read_latency_ticks", "read_latency_ticks"].map(number);
    assert!(0 < min && min <= max && max <= sum, "{stat}");
    assert!(15 * min <= sum && sum <= 15 * max, "{stat}");
    // The answer shows what was before the reset.
    let shown = vhost.ok("bdev_get_iostat", json!({"names": ["M"], "reset_mode": "maxmin"}));
    assert_eq!(shown["bdevs"][0]["max_read_latency_ticks"], max);
    let after = iostat(&vhost, "M");
    assert_eq!((&after["max_read_latency_ticks"], &after["num_read_ops"]), (&json!(0), &json!(15)));
    vhost.ok("bdev_reset_iostat", json!({"name": "M"}));
    assert_eq!(iostat(&vhost, "M")["num_read_ops"], 0);
}

#[test]
fn channels_add_up_to_their_bdev() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    ["a", "b"].into_iter().for_each(|name| controller(&vhost, name, "M"));
    let channels = || {
        let shown = vhost.ok("bdev_get_iostat", json!({"names": ["M"], "per_channel": true}));
        assert_eq!(shown["name"], "M");
        shown["channels"].as_array().unwrap().clone()
    };
    assert!(channels().is_empty());
    // Two queues of one controller are one channel, as they are one thread in SPDK.
    let mut lives = vec![];
    for (name, queues) in [("a", 2), ("b", 1)] {
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let mut front_end =
            FrontEnd::connect(&vhost.socket(name), ram, Options::default()).unwrap();
        let mut queues = front_end.start_new(queues, QueueOptions::default()).unwrap();
        for queue in &mut queues {
            let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
            assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
        }
        lives.push((front_end, queues));
    }
    let stats = vhost.ok("thread_get_stats", Value::Null);
    let thread = |name: &str| {
        let threads = stats["threads"].as_array().unwrap();
        threads.iter().find(|thread| thread["name"] == name).unwrap()["id"].clone()
    };
    let mut shown: Vec<_> =
        channels().iter().map(|c| (c["thread_id"].clone(), c["num_read_ops"].clone())).collect();
    shown.sort_by_key(|(id, _)| id.as_u64());
    assert_eq!(shown, [(thread("a"), json!(2)), (thread("b"), json!(1))]);
    assert_eq!(iostat(&vhost, "M")["num_read_ops"], 3);
    for params in [json!({"per_channel": true}), json!({"per_channel": true, "names": ["M", "M"]})]
    {
        assert_eq!(vhost.err("bdev_get_iostat", params), Refusal::new(-22, "Invalid argument"));
    }
    // Reactors' time is divided among their controllers.
    let busy = |name: &str| {
        let stats = vhost.ok("thread_get_stats", Value::Null);
        let threads = stats["threads"].as_array().unwrap().clone();
        threads.iter().find(|thread| thread["name"] == name).unwrap()["busy"].as_u64().unwrap()
    };
    assert!(busy("a") > 0 && busy("b") > 0);
}

#[test]
fn a_histogram_counts_what_connects_later_too() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    controller(&vhost, "c", "M");
    let enable = |params: Value| {
        let mut all = json!({"name": "M", "enable": true});
        all.as_object_mut().unwrap().extend(params.as_object().unwrap().clone());
        vhost.rpc("bdev_enable_histogram", all)
    };
    let get = || vhost.rpc("bdev_get_histogram", json!({"name": "M"}));
    assert_eq!(get(), Err(Refusal::new(-12, "Cannot allocate memory")));
    assert_eq!(enable(json!({"opc": "nope"})), Err(Refusal::new(-32603, "Invalid Io type")));
    assert_eq!(enable(json!({"granularity": 8})).unwrap_err().code, -22);
    assert_eq!(enable(json!({})), Ok(json!(true)));
    io(&vhost, "c", 20, 5);
    let shown = get().unwrap();
    for key in ["histogram", "granularity", "min_range", "max_range", "tsc_rate"] {
        assert!(!shown[key].is_null(), "{shown}");
    }
    assert_eq!(total(&shown), 25);
    let borders = json!({"name": "M", "borders": [0, 120_000_000]});
    let counts = vhost.ok("bdev_get_histogram_borders", borders);
    assert_eq!(counts, json!({"borders_count": [0, 25, 25]}));
    // Saved with the options that are not the defaults.
    assert_eq!(enable(json!({"opc": "write", "min_nsec": 500})), Ok(json!(true)));
    let call = json!({"method": "bdev_enable_histogram",
        "params": {"name": "M", "enable": true, "opc": "write", "min_nsec": 500}});
    let saved = vhost.ok("framework_get_config", json!({"name": "bdev"}));
    assert!(saved.as_array().unwrap().contains(&call), "{saved}");
    let loaded = Launch::new().config(&vhost.spdk_rpc(&["save_config"]).unwrap()).start();
    loaded.ok("framework_wait_init", Value::Null);
    assert_eq!(
        loaded.spdk_rpc(&["save_config"]).unwrap(),
        vhost.spdk_rpc(&["save_config"]).unwrap()
    );
    drop(loaded);
    io(&vhost, "c", 20, 5);
    assert_eq!(total(&get().unwrap()), 30, "the counts stay, and reads count no more");
    let disable = json!({"name": "M", "enable": false});
    assert_eq!(vhost.ok("bdev_enable_histogram", disable), true);
    assert!(get().is_err());
    let unknown = json!({"name": "nope", "enable": true});
    assert_eq!(vhost.err("bdev_enable_histogram", unknown).code, -19);
}

/// The sum of the counters of a histogram, which are base64 of little-endian numbers.
fn total(shown: &Value) -> u64 {
    use base64::Engine;
    let text = shown["histogram"].as_str().unwrap();
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    let ranges = shown["max_range"].as_u64().unwrap() - shown["min_range"].as_u64().unwrap() + 1;
    assert_eq!(bytes.len() as u64, (ranges << shown["granularity"].as_u64().unwrap()) * 8);
    bytes.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).sum()
}

#[test]
fn the_queue_depth_is_sampled() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    controller(&vhost, "c", "EE_M");
    let period = |us: u64| {
        vhost.ok("bdev_set_qd_sampling_period", json!({"name": "M", "period": us}));
    };
    assert!(iostat(&vhost, "M")["queue_depth"].is_null());
    period(1000);
    wait_until("a sample", || iostat(&vhost, "M")["queue_depth"] == 0);
    let stat = iostat(&vhost, "M");
    assert_eq!((&stat["queue_depth_polling_period"], &stat["io_time"]), (&json!(1000), &json!(0)));
    let pending = json!({"name": "EE_M", "io_type": "all", "error_type": "pending", "num": 2});
    vhost.ok("bdev_error_inject_error", pending);
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    for _ in 0..2 {
        queue.submit(&Request::read(0, std::slice::from_ref(&buffer))).unwrap();
    }
    queue.kick().unwrap();
    wait_until("two outstanding", || iostat(&vhost, "M")["queue_depth"] == 2);
    wait_until("time with I/O", || iostat(&vhost, "M")["weighted_io_time"].as_u64() > Some(4000));
    let stat = iostat(&vhost, "M");
    let number = |name: &str| stat[name].as_u64().unwrap();
    assert!(number("io_time") % 1000 == 0 && number("weighted_io_time") <= 2 * number("io_time"));
    period(0);
    assert!(iostat(&vhost, "M")["queue_depth"].is_null());
    // A sampled bdev can be deleted.
    period(1000);
    vhost.ok("bdev_error_delete", json!({"name": "EE_M"}));
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn bdevs_that_come_go_and_change_are_notified() {
    let vhost = Vhost::start(&[]);
    let types =
        ["fsdev_register", "fsdev_unregister", "bdev_register", "bdev_unregister", "bdev_resize"];
    assert_eq!(vhost.ok("notify_get_types", Value::Null), json!(types));
    let from = |id: u64| {
        let all = vhost.ok("notify_get_notifications", json!({"id": id}));
        let all = all.as_array().unwrap().iter();
        all.map(|n| format!("{} {} {}", n["id"], n["type"], n["ctx"]).replace('"', ""))
            .collect::<Vec<_>>()
    };
    assert!(from(0).is_empty());
    vhost.null("N");
    vhost.ok("bdev_error_create", json!({"base_name": "N"}));
    assert_eq!(from(0), ["0 bdev_register N", "1 bdev_register EE_N"]);
    vhost.ok("bdev_null_resize", json!({"name": "N", "new_size": 32}));
    let mut told = from(2);
    told.sort_by_key(|line| line.contains("EE_N"));
    assert_eq!(
        told.iter().map(|line| &line[2..]).collect::<Vec<_>>(),
        ["bdev_resize N", "bdev_resize EE_N"]
    );
    vhost.ok("bdev_null_delete", json!({"name": "N"}));
    let mut told = from(4);
    told.sort_by_key(|line| line.contains("EE_N"));
    assert_eq!(
        told.iter().map(|line| &line[2..]).collect::<Vec<_>>(),
        ["bdev_unregister N", "bdev_unregister EE_N"]
    );
    let first = vhost.ok("notify_get_notifications", json!({"max": 1}));
    assert_eq!(first, json!([{"type": "bdev_register", "ctx": "N", "id": 0}]));
    assert!(from(6).is_empty());
    // The oldest of more than 1024 are forgotten, and the ids go on.
    for _ in 0..520 {
        vhost.null("N");
        vhost.ok("bdev_null_delete", json!({"name": "N"}));
    }
    let all = from(0);
    assert_eq!((all.len(), all[0].split(' ').next()), (1024, Some("22")));
    let bad = json!({"id": -1});
    assert_eq!(
        vhost.err("notify_get_notifications", bad),
        Refusal::new(-32602, "Invalid argument")
    );
}
