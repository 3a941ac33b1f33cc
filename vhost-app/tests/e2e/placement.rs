//! Queues on several cores: shown where they are, and moved by RPC while they are in use.

use std::collections::BTreeMap;

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{self, Launch, Refusal, Vhost};

const QUEUES: usize = 4;

/// A `vhost` with two reactors.
fn start(args: &[&str]) -> Vhost {
    Launch::new().mask(harness::two_cores()).args(args).start()
}

/// A controller on a file, so that I/O is in flight when its queues move.
fn file_controller(vhost: &Vhost) {
    let file = vhost.file("disk", 8 << 20);
    vhost.ok("bdev_uring_create", json!({"name": "F", "filename": file, "block_size": 512}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vhost.0", "dev_name": "F"}));
}

fn connect(vhost: &Vhost) -> (FrontEnd, Load) {
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let mut front_end =
        FrontEnd::connect(&vhost.socket("vhost.0"), ram, Options::default()).unwrap();
    let queues = front_end.start_new(QUEUES, QueueOptions::default()).unwrap();
    // Once each has answered, each is attached.
    let load = Load::start(queues, LoadOptions::default()).unwrap();
    load.wait_for(1000).unwrap();
    (front_end, load)
}

/// How many queues the controller has on each core, told by two methods alike.
fn places(vhost: &Vhost) -> BTreeMap<u64, u64> {
    let controllers = vhost.ok("vhost_get_controller_stats", json!({}));
    let session = &controllers[0]["sessions"][0];
    let mut on = BTreeMap::new();
    for (n, queue) in session["queues"].as_array().unwrap().iter().enumerate() {
        assert_eq!(queue["queue"], n);
        assert!(queue["inflight"].is_u64());
        *on.entry(queue["core"].as_u64().unwrap()).or_default() += 1;
    }
    let reactors = vhost.ok("framework_get_reactors", json!({}))["reactors"].take();
    let has = |reactor: &&Value| {
        let threads = reactor["lw_threads"].as_array().unwrap();
        threads.iter().any(|thread| thread["name"] == "vhost.0")
    };
    let cores: Vec<u64> = reactors
        .as_array()
        .unwrap()
        .iter()
        .filter(has)
        .map(|r| r["lcore"].as_u64().unwrap())
        .collect();
    assert_eq!(cores, on.keys().copied().collect::<Vec<_>>());
    on
}

/// The controller's thread, as `thread_get_stats` shows it.
fn thread(vhost: &Vhost) -> Value {
    let stats = vhost.ok("thread_get_stats", json!({}));
    let threads = stats["threads"].as_array().unwrap();
    threads.iter().find(|thread| thread["name"] == "vhost.0").unwrap().clone()
}

fn end(vhost: Vhost, front_end: FrontEnd, load: Load) {
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    let session = vhost.ok("vhost_get_controller_stats", json!({}))[0]["sessions"][0].take();
    assert_eq!(session["requests"], summary.completed, "none is lost, none is done twice");
    front_end.disconnect().unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vhost.0"}));
    assert_eq!(vhost.stop(), 0);
}

/// Queues go to and fro under load, in each mode of the reactors.
#[test]
fn queues_move_while_they_are_in_use() {
    for args in [&[][..], &["--interrupt-mode"], &["--reactor-idle-us", "20"]] {
        let vhost = start(args);
        file_controller(&vhost);
        let (front_end, load) = connect(&vhost);
        assert_eq!(places(&vhost), BTreeMap::from([(0, 2), (1, 2)]));
        let mut rpc = vhost.connect();
        for n in 0..500 {
            let (queue, core) = (n % QUEUES, n / QUEUES % 2);
            let to = json!({"ctrlr": "vhost.0", "queue": queue, "core": core});
            assert_eq!(rpc.call("vhost_move_queue", to), Ok(json!(true)));
            let shown = rpc.call("vhost_get_controller_stats", json!({})).unwrap();
            assert_eq!(shown[0]["sessions"][0]["queues"][queue]["core"], core);
            if n % 50 == 0 {
                load.wait_for(200).unwrap();
            }
        }
        load.wait_for(1000).unwrap();
        end(vhost, front_end, load);
    }
}

/// SPDK's method, by SPDK's client: a controller's thread goes to other cores, and its queues with it.
#[test]
fn a_controllers_thread_is_moved_by_its_cpumask() {
    let vhost = start(&[]);
    file_controller(&vhost);
    assert_eq!(thread(&vhost)["cpumask"], "3");
    let (front_end, load) = connect(&vhost);
    let id = thread(&vhost)["id"].to_string();
    for (mask, expected) in
        [("0x1", vec![(0, 4)]), ("0x3", vec![(0, 2), (1, 2)]), ("[1]", vec![(1, 4)])]
    {
        vhost.spdk_rpc(&["thread_set_cpumask", "-i", &id, "-m", mask]).unwrap();
        assert_eq!(places(&vhost), BTreeMap::from_iter(expected));
        load.wait_for(500).unwrap();
    }
    assert_eq!(thread(&vhost)["cpumask"], "2");
    let shown = vhost.ok("vhost_get_controller_stats", json!({}));
    assert_eq!(shown[0]["cpumask"], "0x2");
    let saved = vhost.ok("framework_get_config", json!({"name": "vhost_blk"}));
    assert_eq!(saved[0]["params"]["cpumask"], "2");
    let elsewhere = json!({"ctrlr": "vhost.0", "queue": 0, "core": 0});
    let refusal = vhost.err("vhost_move_queue", elsewhere);
    assert_eq!(refusal, Refusal::new(-32602, "Invalid argument"), "not one of its cores");
    end(vhost, front_end, load);
}

#[test]
fn moves_that_cannot_be_are_refused() {
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vhost.0", "dev_name": "N"}));
    let id = thread(&vhost)["id"].as_u64().unwrap();
    let own = harness::core_mask().trim_start_matches("0x");
    for (id, mask, code, text) in [
        (id + 1, own, -32602, format!("Thread {} does not exist", id + 1)),
        (id, "xyz", -32603, "Invalid cpumask xyz".into()),
        (id, "0x100", -32603, format!("No CPU is selected from reactor mask {own}")),
    ] {
        let refusal = vhost.err("thread_set_cpumask", json!({"id": id, "cpumask": mask}));
        assert_eq!(refusal, Refusal::new(code, &text));
    }
    // The thread that serves RPCs has no core here, but scripts set its mask.
    assert_eq!(vhost.ok("thread_set_cpumask", json!({"id": 1, "cpumask": own})), true);
    let undecoded = vhost.err("thread_set_cpumask", json!({"id": id}));
    assert_eq!(undecoded, Refusal::new(-32602, "spdk_json_decode_object failed"));
    assert_eq!(vhost.ok("thread_set_cpumask", json!({"id": id, "cpumask": own})), true);
    let core: u64 = if own == "2" { 1 } else { 0 };
    for (ctrlr, core, text) in [
        ("nope", core, "No such device"),
        ("vhost.0", 99, "Invalid argument"),
        // Nobody is connected.
        ("vhost.0", core, "No such file or directory"),
    ] {
        let to = json!({"ctrlr": ctrlr, "queue": 0, "core": core});
        assert_eq!(vhost.err("vhost_move_queue", to), Refusal::new(-32602, text));
    }
}
