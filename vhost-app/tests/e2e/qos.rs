//! Rate limits: set by RPC, shown, saved, applied to guests that do I/O, shared fairly.

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost};

fn set(vhost: &Vhost, limits: Value) {
    assert_eq!(vhost.ok("bdev_set_qos_limit", limits), true);
}

fn shown(vhost: &Vhost, name: &str) -> Value {
    vhost.bdev(name)["assigned_rate_limits"].clone()
}

/// Starts a guest with `queues` queues, which uses the blocks from `first` on.
fn guest(vhost: &Vhost, controller: &str, queues: usize, first: u64) -> (FrontEnd, Load) {
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_any(queues, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: first..first + 256, ..LoadOptions::default() };
    (front_end, Load::start(queues, options).unwrap())
}

fn end(front_end: FrontEnd, load: Load) {
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    front_end.disconnect().unwrap();
}

/// Reads and writes of a bdev, and the time of the answer in milliseconds.
fn counts(vhost: &Vhost, name: &str) -> (u64, u64) {
    let answer = vhost.ok("bdev_get_iostat", json!({ "names": [name] }));
    let number = |value: &Value| value.as_u64().unwrap();
    let bdev = &answer["bdevs"][0];
    let ops = number(&bdev["num_read_ops"]) + number(&bdev["num_write_ops"]);
    (ops, number(&answer["ticks"]) / (number(&answer["tick_rate"]) / 1000))
}

#[test]
fn limits_are_checked_shown_and_saved_as_in_spdk() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M0");
    for (params, refusal) in [
        (json!({"name": "M0"}), Refusal::new(-22, "No rate limits specified")),
        (json!({"name": "M1", "rw_ios_per_sec": 1}), Refusal::new(-19, "No such device")),
        (json!({"name": "M1"}), Refusal::new(-19, "No such device")),
        (
            json!({"name": "M0", "rw_ios_per_sec": -1}),
            Refusal::new(-32603, "spdk_json_decode_object failed"),
        ),
        (json!({"rw_ios_per_sec": 1}), Refusal::new(-32603, "spdk_json_decode_object failed")),
        (
            json!({"name": "M0", "rw_ios": 1}),
            Refusal::new(-32603, "spdk_json_decode_object failed"),
        ),
    ] {
        assert_eq!(vhost.err("bdev_set_qos_limit", params), refusal);
    }
    let limits = |ios, rw, r, w| {
        json!({"rw_ios_per_sec": ios, "rw_mbytes_per_sec": rw, "r_mbytes_per_sec": r,
               "w_mbytes_per_sec": w})
    };
    let saved = || vhost.spdk_rpc(&["save_subsystem_config", "-n", "bdev"]).unwrap();
    assert_eq!(shown(&vhost, "M0"), limits(0, 0, 0, 0));
    set(&vhost, json!({"name": "M0", "r_mbytes_per_sec": 0}));
    assert!(!saved().contains("bdev_set_qos_limit"));
    vhost.spdk_rpc(&["bdev_set_qos_limit", "M0", "--rw-ios-per-sec", "1500"]).unwrap();
    set(&vhost, json!({"name": "M0", "w_mbytes_per_sec": 7}));
    assert_eq!(shown(&vhost, "M0"), limits(1500, 0, 0, 7));
    set(&vhost, json!({"name": "M0", "rw_ios_per_sec": 0, "rw_mbytes_per_sec": u64::MAX}));
    assert_eq!(shown(&vhost, "M0"), limits(0, (1_u64 << 44) - 1, 0, 7));
    set(&vhost, json!({"name": "M0", "rw_ios_per_sec": 5, "rw_mbytes_per_sec": 0}));
    let config = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);
    let launch = Launch::new();
    let again = launch.config(&config).start();
    assert_eq!(shown(&again, "M0"), limits(5, 0, 0, 7));
    assert_eq!(again.spdk_rpc(&["save_config"]).unwrap(), config);
    assert_eq!(again.stop(), 0);
}

/// Two guests, one of which has four queues and so four times as much I/O in flight.
#[test]
fn guests_of_one_bdev_get_the_same_rate_and_no_more_than_the_limit_together() {
    for args in [&[][..], &["--interrupt-mode"]] {
        let vhost = Vhost::start(args);
        let options = json!({"name": "M0", "num_blocks": 4096, "block_size": 512});
        vhost.ok("bdev_malloc_create", options);
        for controller in ["vhost.0", "vhost.1"] {
            let params = json!({"ctrlr": controller, "dev_name": "M0"});
            vhost.ok("vhost_create_blk_controller", params);
        }
        set(&vhost, json!({"name": "M0", "rw_ios_per_sec": 2000}));
        let (one, other) = (guest(&vhost, "vhost.0", 1, 0), guest(&vhost, "vhost.1", 4, 256));
        // From here on, both have started.
        [&one.1, &other.1].into_iter().for_each(|load| load.wait_for(1).unwrap());
        let ((ops, begun), before) =
            (counts(&vhost, "M0"), [&one, &other].map(|g| g.1.completed()));
        one.1.wait_for(1000).unwrap();
        let after = [&one, &other].map(|guest| guest.1.completed());
        let (ops, ended) = (counts(&vhost, "M0").0 - ops, counts(&vhost, "M0").1);
        let of = [after[0] - before[0], after[1] - before[1]];
        let share = of[0] as f64 / (of[0] + of[1]) as f64;
        assert!((0.45..=0.55).contains(&share), "{of:?}");
        // At most two I/Os per slice, and one more slice at each end of the measurement.
        assert!(ops <= 2 * (ended - begun + 2), "{ops} in {} ms", ended - begun);
        end(one.0, one.1);
        end(other.0, other.1);
        assert_eq!(vhost.stop(), 0);
    }
}

/// Limits are set, changed and removed, on a bdev and on its base, while a guest verifies what it
/// reads.
#[test]
fn limits_change_under_load_and_hold_nothing_up() {
    for disk in ["malloc", "uring"] {
        let vhost = Vhost::start(&[]);
        if disk == "malloc" {
            vhost.malloc("B");
        } else {
            let file = vhost.file("disk", 8 << 20);
            vhost
                .ok("bdev_uring_create", json!({"name": "B", "filename": file, "block_size": 512}));
        }
        vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "B"}));
        vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vhost.0", "dev_name": "P"}));
        let (front_end, load) = guest(&vhost, "vhost.0", 2, 0);
        for n in 0..60 {
            let name = ["B", "P"][n / 2 % 2];
            let limits = [
                json!({"name": name, "rw_ios_per_sec": 10_000}),
                json!({"name": name, "rw_ios_per_sec": 0, "r_mbytes_per_sec": 4}),
                json!({"name": name, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 4}),
                json!({"name": name, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0}),
            ];
            set(&vhost, limits[n % 4].clone());
            load.wait_for(100).unwrap();
        }
        // From here on, the guest's requests wait.
        set(&vhost, json!({"name": "B", "rw_ios_per_sec": 1}));
        vhost.ok("bdev_get_bdevs", json!({"name": "P"}));
        // The load ends only when its requests have come back: the removal releases them.
        set(&vhost, json!({"name": "B", "rw_ios_per_sec": 0}));
        end(front_end, load);
        vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
        assert_eq!(vhost.stop(), 0);
    }
}

/// With a limit of one I/O per second, the 29 waiting requests would take half a minute.
#[test]
fn a_limit_holds_up_neither_a_stop_nor_a_delete() {
    let vhost = Vhost::start(&[]);
    for (bdev, controller) in [("M0", "vhost.0"), ("M1", "vhost.1"), ("M2", "vhost.2")] {
        vhost.malloc(bdev);
        vhost.ok("vhost_create_blk_controller", json!({"ctrlr": controller, "dev_name": bdev}));
        set(&vhost, json!({"name": bdev, "rw_ios_per_sec": 1}));
    }
    let submit = |controller: &str| {
        let ram = GuestRam::new(&[32 << 20]).unwrap();
        let socket = vhost.socket(controller);
        let mut front_end = FrontEnd::connect(&socket, ram.clone(), Options::default()).unwrap();
        let mut queue = front_end.start_any(1, QueueOptions::default()).unwrap().remove(0);
        let data = [ram.alloc(4096, 4096).unwrap()];
        for sector in 0..30 {
            queue.submit(&front_end::Request::write(8 * sector, &data)).unwrap();
        }
        queue.kick().unwrap();
        queue.wait().unwrap();
        (front_end, queue)
    };
    // A stop of the ring: all are answered first.
    let (mut front_end, mut queue) = submit("vhost.0");
    front_end.stop().unwrap();
    for _ in 1..30 {
        assert_eq!(queue.poll().unwrap().unwrap().status, front_end::STATUS_OK);
    }
    // A bdev that is deleted.
    let (_other, mut queue) = submit("vhost.1");
    vhost.ok("bdev_malloc_delete", json!({"name": "M1"}));
    for _ in 1..30 {
        assert_eq!(queue.wait().unwrap().status, front_end::STATUS_OK);
    }
    // A controller that is deleted by force.
    let _third = submit("vhost.2");
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.2", "force": true}));
    drop(front_end);
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
    assert_eq!(vhost.stop(), 0);
}
