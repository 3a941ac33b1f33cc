//! What an operator's tools send: requests in one write, the requests of `spdk_top`, and `spdk-cli`.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{self, Vhost};

/// Sends bytes in one write, and reads this many JSON values.
fn exchange(vhost: &Vhost, sent: &str, answers: usize) -> Vec<Value> {
    let mut client = UnixStream::connect(vhost.rpc_socket()).unwrap();
    client.write_all(sent.as_bytes()).unwrap();
    let (mut bytes, mut part) = (vec![], [0; 65536]);
    loop {
        let values = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>();
        let values: Vec<Value> = values.map_while(Result::ok).collect();
        if values.len() == answers {
            return values;
        }
        let count = client.read(&mut part).unwrap();
        assert!(count > 0, "the connection ended after {values:?}");
        bytes.extend_from_slice(&part[..count]);
    }
}

fn request(id: u64, method: &str, params: Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
}

/// Requests that depend on one another succeed when they are sent together: each sees the effects
/// of those before it.
#[test]
fn dependent_requests_may_be_sent_together() {
    let vhost = Vhost::start(&[]);
    let file = vhost.file("aio", 1 << 20);
    let requests = |n: u64| {
        let (controller, disk, wrapper) = (format!("c{n}"), format!("A{n}"), format!("P{n}"));
        let passthru = json!({"name": wrapper, "base_bdev_name": disk});
        [
            request(
                1,
                "bdev_aio_create",
                json!({"name": disk, "filename": file, "block_size": 512}),
            ),
            request(2, "bdev_passthru_create", passthru),
            request(
                3,
                "vhost_create_blk_controller",
                json!({"ctrlr": controller, "dev_name": wrapper}),
            ),
            request(
                4,
                "vhost_controller_set_coalescing",
                json!({"ctrlr": controller, "delay_base_us": 10, "iops_threshold": 1000}),
            ),
            request(5, "vhost_get_controllers", json!({"name": controller})),
            request(6, "vhost_delete_controller", json!({"ctrlr": controller})),
            request(
                7,
                "vhost_create_blk_controller",
                json!({"ctrlr": controller, "dev_name": wrapper}),
            ),
            request(8, "vhost_delete_controller", json!({"ctrlr": controller})),
            request(9, "bdev_passthru_delete", json!({"name": wrapper})),
            request(10, "bdev_aio_delete", json!({"name": disk})),
        ]
    };
    let check = |answers: &[Value]| {
        let mut ids: Vec<u64> = answers.iter().map(|a| a["id"].as_u64().unwrap()).collect();
        // Two deletions may end in any order.
        ids[8..].sort_unstable();
        assert_eq!(ids, (1..=10).collect::<Vec<_>>());
        for answer in answers {
            assert!(answer["error"].is_null(), "{answer}");
        }
        assert_eq!(answers[4]["result"][0]["delay_base_us"], 10);
    };
    let pipelined: String = requests(0).iter().map(Value::to_string).collect();
    check(&exchange(&vhost, &pipelined, 10));
    let batch = Value::from(requests(1).to_vec()).to_string();
    check(exchange(&vhost, &batch, 1)[0].as_array().unwrap());
    assert!(vhost.bdev_names().is_empty());
}

/// A deletion that waits for its front end does not hold up the requests behind it.
#[test]
fn a_deletion_that_waits_lets_the_next_request_start() {
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "N"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, Options::default()).unwrap();
    let _queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    let delete =
        request(1, "vhost_delete_controller", json!({"ctrlr": "c", "timeout_ms": 3_600_000}));
    let sent =
        [delete, request(2, "spdk_get_version", Value::Null)].map(|r| r.to_string()).concat();
    let mut client = UnixStream::connect(vhost.rpc_socket()).unwrap();
    client.write_all(sent.as_bytes()).unwrap();
    let mut values = serde_json::Deserializer::from_reader(client).into_iter::<Value>();
    assert_eq!(values.next().unwrap().unwrap()["id"], 2);
    front_end.disconnect().unwrap();
    let deleted = values.next().unwrap().unwrap();
    assert_eq!((&deleted["id"], &deleted["result"]), (&json!(1), &json!(true)));
}

fn keys(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Each object has these keys and no other, as decoders of SPDK refuse unknown keys.
#[track_caller]
fn has_keys(objects: &Value, expected: &str) {
    let objects = objects.as_array().unwrap();
    assert!(!objects.is_empty());
    for object in objects {
        assert_eq!(keys(object), expected.split(' ').collect(), "{object}");
    }
}

/// The exchange of `spdk_top` of SPDK 26.09-pre, recorded: its requests, in its order on one
/// connection, and what its decoders take.
#[test]
fn spdk_top_is_answered_as_its_decoders_want() {
    let vhost = Vhost::start(&[]);
    vhost.malloc("M");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "M"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, Options::default()).unwrap();
    let mut queues = front_end.start_new(2, QueueOptions::default()).unwrap();
    for queue in &mut queues {
        let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
        queue.run(&front_end::Request::read(0, &[buffer])).unwrap();
    }
    let refresh = ["thread_get_stats", "thread_get_pollers", "framework_get_reactors"];
    let start = ["framework_wait_init", "framework_get_reactors"];
    let mut methods: Vec<&str> = start.into_iter().chain(refresh).collect();
    (0..2).for_each(|_| methods.extend(refresh.iter().chain(&["framework_get_scheduler"])));
    let mut rpc = vhost.connect();
    for method in methods {
        let shown = rpc.call(method, Value::Null).unwrap();
        match method {
            "framework_wait_init" => assert_eq!(shown, true),
            "framework_get_scheduler" => assert!(shown["scheduler_period"].is_u64(), "{shown}"),
            "thread_get_stats" => {
                assert_eq!(keys(&shown), BTreeSet::from(["tick_rate", "threads"]));
                has_keys(
                    &shown["threads"],
                    "name id cpumask busy idle active_pollers_count timed_pollers_count \
                     paused_pollers_count",
                );
            }
            "framework_get_reactors" => {
                let expected = "lcore numa_id tid busy idle in_interrupt irq sys usr lw_threads";
                has_keys(&shown["reactors"], expected);
                has_keys(&shown["reactors"][0]["lw_threads"], "name id cpumask elapsed");
            }
            _ => {
                has_keys(&shown["threads"], "name id active_pollers timed_pollers paused_pollers");
                let of = |name: &str| {
                    let threads = shown["threads"].as_array().unwrap();
                    threads.iter().find(|thread| thread["name"] == name).unwrap()
                };
                has_keys(&of("c")["active_pollers"], "name id state run_count busy_count");
                assert_eq!(of("c")["active_pollers"].as_array().unwrap().len(), 2);
                let timed = "name id state run_count busy_count period_ticks";
                has_keys(&of("app_thread")["timed_pollers"], timed);
            }
        }
    }
    // The main core only.
    let stats = vhost.ok("thread_get_stats", Value::Null);
    assert_eq!(stats["threads"][0]["cpumask"], stats["threads"][1]["cpumask"]);
    let moved = json!({"id": 1, "cpumask": harness::core_mask()});
    assert_eq!(vhost.ok("thread_set_cpumask", moved), true);
    let channels = vhost.ok("thread_get_io_channels", Value::Null);
    let expected = json!({"name": "c", "io_channels": [{"name": "bdev_M", "ref": 2}]});
    assert!(channels["threads"].as_array().unwrap().contains(&expected), "{channels}");
}

/// An entry is not larger than SPDK's, of about 350 bytes, for clients with a small buffer.
#[test]
fn controllers_of_four_queues_are_shown_in_few_bytes() {
    const CONTROLLERS: usize = 22;
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    let mut lives = vec![];
    for n in 0..CONTROLLERS {
        let name = format!("vm-{n}");
        vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": "N"}));
        let ram = GuestRam::new(&[4 << 20]).unwrap();
        let socket = vhost.socket(&name);
        let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
        let queues = front_end.start_new(4, QueueOptions::default()).unwrap();
        lives.push((front_end, queues));
    }
    let shown = vhost.ok("vhost_get_controllers", Value::Null);
    let sessions = shown.as_array().unwrap().iter();
    assert_eq!(sessions.filter(|c| c["sessions"][0]["max_queues"] == 4).count(), CONTROLLERS);
    let answer = json!({"jsonrpc": "2.0", "id": 1, "result": shown}).to_string();
    assert!(answer.len() <= 8192, "{} bytes", answer.len());
}

/// `spdk-cli` in a pseudo-terminal: every command of its tree that has a counterpart here.
#[test]
fn spdk_cli_works_in_a_terminal() {
    let vhost = Vhost::start(&[]);
    let (aio, uring) = (vhost.file("aio", 2 << 20), vhost.file("uring", 2 << 20));
    let saved = vhost.dir().join("saved.json");
    let mask = harness::core_mask();
    let commands = format!(
        "/bdevs/malloc create 8 512 M1\n/bdevs/malloc create 8 512 M2\n\
         /bdevs/malloc create 8 512 M3\n/bdevs/null create N 16 512\n\
         /bdevs/aio create A {aio} 512\n/bdevs/uring create {uring} U 512\n\
         /bdevs/error create M1\n/bdevs/split_disk bdev_split_create M2 2\n\
         /vhost/block create c1 N {mask}\n/vhost/block create c2 A\n\
         /vhost/block/c1 set_coalescing 10 1000\nrefresh\nls\n\
         /vhost/block/c1 show_details\nsave_config {saved}\n\
         /vhost/block delete c1\n/bdevs/error delete EE_M1\n\
         /bdevs/split_disk bdev_split_delete M2\n\
         /bdevs/malloc delete M1\n/bdevs/null delete N\n/bdevs/uring delete U\n\
         /vhost/block delete c2\n/bdevs/aio delete A\n/bdevs/malloc delete_all\nls\nexit\n",
        aio = aio,
        uring = uring,
        saved = saved.display(),
    );
    let screen = vhost.spdk_cli(&commands);
    for part in [
        "malloc ",
        "[Bdevs: 3]",
        "EE_M1",
        "uring ",
        "\"iops_threshold\": 1000",
        "\"delay_base_us\": 10",
        "c2",
    ] {
        assert!(screen.contains(part), "{part:?} is not on the screen:\n{screen}");
    }
    assert!(!screen.contains("error response"), "{screen}");
    assert!(std::fs::read_to_string(&saved).unwrap().contains("bdev_uring_create"));
    assert!(vhost.bdev_names().is_empty(), "{screen}");
    assert_eq!(vhost.ok("vhost_get_controllers", Value::Null), json!([]));
}
