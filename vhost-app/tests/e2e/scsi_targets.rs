//! Targets that come and go while a guest runs, as the operator sees it: waits, claims, counters.

use std::io::{Read, Write};
use std::net::TcpStream;

use front_end::scsi::{
    Command, CommandQueue, ControlQueue, DRIVER_FEATURES, EventQueue, Layout, Tmf, cdb, code, kind,
    lun, subtype,
};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Segment};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost, wait_until};

const ADD: &str = "vhost_scsi_controller_add_target";
const REMOVE: &str = "vhost_scsi_controller_remove_target";
const DELETE: &str = "vhost_delete_controller";
const BLOCK: u32 = 512;

/// A guest with a queue of commands.
struct Guest {
    front_end: FrontEnd,
    control: ControlQueue,
    events: EventQueue,
    commands: CommandQueue,
    data: Segment,
    sent: u64,
    /// Unit attentions that reads have met.
    attentions: u64,
}

/// A sense key.
const UNIT_ATTENTION: u8 = 6;

impl Guest {
    fn connect(vhost: &Vhost, controller: &str) -> Self {
        let ram = GuestRam::new(&[8 << 20]).unwrap();
        let options = Options { features: DRIVER_FEATURES, ..Options::default() };
        let socket = vhost.socket(controller);
        let mut front_end = FrontEnd::connect(&socket, ram.clone(), options).unwrap();
        let queues = QueueOptions { size: 16, ..QueueOptions::default() };
        let control = ControlQueue::new(&ram, queues, (true, false)).unwrap();
        let mut events = EventQueue::new(&ram, queues, (true, false)).unwrap();
        let commands = CommandQueue::new(&ram, 2, queues, (true, false), 1024).unwrap();
        let rings = [control.ring(), events.ring(), commands.ring()];
        front_end.start(rings.map(|ring| (ring.clone(), 0)).into()).unwrap();
        (0..4).for_each(|_| _ = events.post().unwrap());
        let data = ram.alloc(8 * BLOCK, 4096).unwrap();
        let mut guest = Self { front_end, control, events, commands, data, sent: 0, attentions: 0 };
        // Until the queue runs, targets are added for it without an event.
        assert_eq!(guest.meet(6), code::BAD_TARGET);
        guest
    }

    /// Reads `blocks` blocks, at most 8, and returns the response and the status. Reads again after
    /// a unit attention.
    fn read(&mut self, target: u8, blocks: u16) -> (u8, u8) {
        let data = [Segment::new(self.data.gpa, u32::from(blocks) * BLOCK)];
        loop {
            self.sent += 1;
            let command = Command::new(lun(target, 0), self.sent, cdb::read(0, blocks));
            let response = self.commands.run(&command.with_data_in(&data)).unwrap().response;
            if response.sense().is_none_or(|(key, ..)| key != UNIT_ATTENTION) {
                return (response.response, response.status);
            }
            self.attentions += 1;
        }
    }

    /// Submits a read of one block, whose completion is not waited for.
    fn submit_read(&mut self, target: u8) {
        self.sent += 1;
        let data = [Segment::new(self.data.gpa, BLOCK)];
        let command = Command::new(lun(target, 0), self.sent, cdb::read(0, 1));
        self.commands.submit(&command.with_data_in(&data), Layout::Separate).unwrap();
        self.commands.kick().unwrap();
    }

    /// Sends TEST UNIT READY until there is no unit attention, and returns the response.
    fn meet(&mut self, target: u8) -> u8 {
        loop {
            self.sent += 1;
            let command = Command::new(lun(target, 0), self.sent, cdb::test_unit_ready());
            let response = self.commands.run(&command).unwrap().response;
            if response.sense().is_none() {
                return response.response;
            }
        }
    }

    /// Submits LOGICAL UNIT RESET.
    fn submit_reset(&mut self, target: u8) {
        let subtype = subtype::LOGICAL_UNIT_RESET;
        self.control.submit(&Tmf { subtype, lun: lun(target, 0), tag: 0 }).unwrap();
        self.control.kick().unwrap();
    }

    /// Waits for an event: its kind, the target, and the reason.
    fn event(&mut self) -> (u32, u8, u32) {
        let event = self.events.wait().unwrap();
        self.events.post().unwrap();
        (event.event, event.lun[1], event.reason)
    }
}

const GOOD: (u8, u8) = (code::OK, 0);
const ADDED: fn(u8) -> (u32, u8, u32) = |target| (kind::TRANSPORT_RESET, target, kind::RESCAN);
const REMOVED: fn(u8) -> (u32, u8, u32) = |target| (kind::TRANSPORT_RESET, target, kind::REMOVED);

fn target(number: i64, bdev: &str) -> Value {
    json!({"ctrlr": "s", "scsi_target_num": number, "bdev_name": bdev})
}

fn number(number: i64, timeout_ms: u64) -> Value {
    json!({"ctrlr": "s", "scsi_target_num": number, "timeout_ms": timeout_ms})
}

fn busy() -> Refusal {
    Refusal::new(-32602, "Device or resource busy")
}

/// A server with a controller `s` and the malloc bdevs `M` and `N`.
fn scene() -> Vhost {
    let vhost = Launch::new().args(&["--metrics", "127.0.0.1:0"]).start();
    vhost.malloc("M");
    vhost.malloc("N");
    vhost.ok("vhost_create_scsi_controller", json!({"ctrlr": "s"}));
    vhost
}

/// Makes this many reads of a new bdev `EE_E` stay in flight, until they are resumed.
fn hold_reads(vhost: &Vhost, count: u32) {
    vhost.malloc("E");
    vhost.ok("bdev_error_create", json!({"base_name": "E"}));
    let pending = json!({"name": "EE_E", "io_type": "read", "error_type": "pending", "num": count});
    vhost.ok("bdev_error_inject_error", pending);
}

fn inflight(vhost: &Vhost) -> Value {
    let shown = vhost.ok("vhost_get_controllers", json!({"name": "s"}));
    shown[0]["sessions"][0]["inflight_task_cnt"].clone()
}

fn is_claimed(vhost: &Vhost, bdev: &str) -> bool {
    let params = json!({"name": "P", "base_bdev_name": bdev});
    let created = vhost.rpc("bdev_passthru_create", params);
    if created.is_ok() {
        vhost.ok("bdev_passthru_delete", json!({"name": "P"}));
    }
    created.is_err()
}

#[test]
fn targets_come_and_go_while_a_guest_runs() {
    let vhost = scene();
    let mut guest = Guest::connect(&vhost, "s");
    vhost.ok(ADD, target(0, "M"));
    assert_eq!(guest.event(), ADDED(0));
    assert_eq!(guest.read(0, 8), GOOD);
    vhost.ok(ADD, target(7, "N"));
    assert_eq!(guest.event(), ADDED(7));
    assert_eq!(guest.read(7, 1), GOOD);
    for round in 0..20 {
        let bdev = if round % 2 == 0 { "N" } else { "M" };
        assert_eq!(vhost.ok(REMOVE, number(0, 60_000)), true);
        assert_ne!(guest.read(0, 1), GOOD);
        assert_eq!(vhost.ok(ADD, target(0, bdev)), 0, "the number is free at once");
        assert_eq!(guest.read(0, 1), GOOD, "the target is there when the call answers");
        assert_eq!(guest.read(7, 1), GOOD);
    }
    vhost.ok("bdev_malloc_delete", json!({"name": "N"}));
    assert_ne!(guest.read(7, 1), GOOD);
    assert_eq!(guest.read(0, 1), GOOD);
    vhost.ok(REMOVE, number(0, 60_000));
    assert!(!is_claimed(&vhost, "M"));
    guest.front_end.disconnect().unwrap();
    vhost.ok(DELETE, json!({"ctrlr": "s"}));
}

/// The removal goes on when the call has given up; the others are not held up.
#[test]
fn a_target_with_io_in_flight_is_removed_when_that_has_ended() {
    let vhost = scene();
    hold_reads(&vhost, 2);
    vhost.ok(ADD, target(3, "EE_E"));
    vhost.ok(ADD, target(0, "M"));
    let mut guest = Guest::connect(&vhost, "s");
    assert_eq!(guest.meet(3), code::OK);
    guest.submit_read(3);
    wait_until("a read in flight", || inflight(&vhost) == 1);
    assert_eq!(vhost.err(REMOVE, number(3, 10)), busy());
    vhost.wait_for_log("target 3 still has I/O in flight after 10 ms");
    assert_eq!(guest.event(), REMOVED(3));
    assert_eq!(vhost.err(REMOVE, number(3, 0)), busy());
    assert_eq!(vhost.err(ADD, target(3, "M")), Refusal::new(-32602, "File exists"));
    assert_eq!(vhost.ok(ADD, target(-1, "M")), 1, "the numbers 0 and 3 are in use");
    let shown = vhost.ok("vhost_get_controllers", json!({"name": "s"}));
    assert_eq!(shown[0]["backend_specific"]["scsi"].as_array().unwrap().len(), 2);
    assert!(is_claimed(&vhost, "EE_E"), "its I/O may still write");

    // A call that waits lets the others of its connection start.
    vhost.ok(ADD, target(4, "EE_E"));
    assert_eq!((guest.event(), guest.event()), (ADDED(1), ADDED(4)));
    assert_eq!(guest.meet(4), code::OK);
    guest.submit_read(4);
    wait_until("two reads in flight", || inflight(&vhost) == 2);
    let mut rpc = vhost.connect();
    let waiting = rpc.send(REMOVE, number(4, 3_600_000));
    rpc.send("spdk_get_version", Value::Null);
    assert_ne!(rpc.receive().0, waiting);
    assert!(!rpc.has_answer());
    vhost.ok("bdev_error_resume_pending", json!({"name": "EE_E"}));
    assert_eq!(rpc.receive(), (waiting.into(), Ok(json!(true))));
    (0..2).for_each(|_| assert!(guest.commands.wait().unwrap().response.is_good()));
    wait_until("the number 3 to be free", || vhost.rpc(ADD, target(3, "N")).is_ok());
    wait_until("the release of the claim", || !is_claimed(&vhost, "EE_E"));
    assert_eq!(guest.read(3, 1), GOOD);
}

/// A target hangs, and a reset waits for it. Neither its guest's other targets, nor other guests,
/// nor the operator waits.
#[test]
fn nobody_waits_for_a_target_that_hangs() {
    let vhost = scene();
    hold_reads(&vhost, 1);
    vhost.ok(ADD, target(0, "M"));
    vhost.ok(ADD, target(1, "EE_E"));
    let controller = |name: &str| {
        vhost.ok("vhost_create_scsi_controller", json!({ "ctrlr": name }));
        let target = json!({"ctrlr": name, "scsi_target_num": 0, "bdev_name": "N"});
        vhost.ok(ADD, target);
    };
    controller("t");
    let (mut guest, mut other) = (Guest::connect(&vhost, "s"), Guest::connect(&vhost, "t"));
    assert_eq!(guest.meet(1), code::OK);
    guest.submit_read(1);
    wait_until("a read in flight", || inflight(&vhost) == 1);
    guest.submit_reset(1);
    wait_until("the reset", || inflight(&vhost) == 2);
    for _ in 0..5 {
        assert_eq!((guest.read(0, 8), other.read(0, 8)), (GOOD, GOOD));
        vhost.ok(ADD, target(2, "N"));
        assert_eq!(guest.event(), ADDED(2));
        assert_eq!(guest.read(2, 1), GOOD);
        vhost.ok(REMOVE, number(2, 60_000));
        assert_eq!(guest.event(), REMOVED(2));
        other.submit_reset(0);
        assert_eq!(other.control.wait().unwrap().response, code::OK);
        controller("u");
        let mut third = Guest::connect(&vhost, "u");
        assert_eq!(third.read(0, 1), GOOD);
        third.front_end.disconnect().unwrap();
        vhost.ok(DELETE, json!({"ctrlr": "u"}));
    }
    assert_eq!(inflight(&vhost), 2);
    assert_eq!(guest.control.poll().unwrap(), None, "its read may still write memory");
    vhost.ok("bdev_error_resume_pending", json!({"name": "EE_E"}));
    assert_eq!(guest.control.wait().unwrap().response, code::OK);
    assert!(guest.commands.poll().unwrap().unwrap().response.is_good(), "answered before");
}

#[test]
fn deletions_have_to_wait_for_the_guest_and_then_free_all_bdevs() {
    let vhost = scene();
    hold_reads(&vhost, 1);
    for (n, bdev) in [(0, "M"), (1, "EE_E"), (2, "N")] {
        vhost.ok(ADD, target(n, bdev));
    }
    let mut guest = Guest::connect(&vhost, "s");
    assert_eq!(guest.meet(1), code::OK);
    guest.submit_read(1);
    wait_until("a read in flight", || inflight(&vhost) == 1);
    let delete = |more: Value| {
        let mut params = json!({"ctrlr": "s", "timeout_ms": 10});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vhost.rpc(DELETE, params)
    };
    assert_eq!(delete(json!({})), Err(busy()));
    let shown = vhost.ok("vhost_get_controllers", json!({"name": "s"}));
    let targets = &shown[0]["backend_specific"]["scsi"];
    assert_eq!(targets.as_array().unwrap().len(), 3, "a deletion that fails removes nothing");
    assert_eq!(delete(json!({"force": true})), Ok(json!(true)));
    assert_eq!(vhost.ok("scsi_get_devices", Value::Null), json!([]));
    ["M", "N"].iter().for_each(|bdev| assert!(!is_claimed(&vhost, bdev)));
    vhost.ok("bdev_error_resume_pending", json!({"name": "EE_E"}));
    for bdev in ["M", "N"] {
        vhost.ok("bdev_malloc_delete", json!({ "name": bdev }));
    }
    vhost.ok("bdev_error_delete", json!({"name": "EE_E"}));
    assert_eq!(vhost.bdev_names(), ["E"]);
    assert_eq!(vhost.stop(), 0);
}

fn metrics(vhost: &Vhost) -> String {
    vhost.wait_for_log("metrics: http://");
    let log = vhost.log();
    let address = log.split_once("metrics: http://").unwrap().1.split('/').next().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: vhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn what_a_guest_does_is_counted_by_target() {
    let vhost = scene();
    // Two targets on one bdev.
    for (n, bdev) in [(0, "M"), (1, "N"), (5, "M")] {
        vhost.ok(ADD, target(n, bdev));
    }
    let mut guest = Guest::connect(&vhost, "s");
    for (target, count) in [(0, 3), (1, 5), (5, 7)] {
        (0..count).for_each(|_| assert_eq!(guest.read(target, 8), GOOD));
    }
    let reads = |shown: &Value| shown["io"]["num_read_ops"].as_u64().unwrap();
    let stats = || vhost.ok("vhost_get_controller_stats", json!({"name": "s"}))[0].clone();
    let shown = stats();
    let targets = shown["backend_specific"]["scsi"].as_array().unwrap();
    assert_eq!(targets.iter().map(reads).collect::<Vec<_>>(), [3, 5, 7]);
    assert_eq!((reads(&shown), &shown["io"]["bytes_read"]), (15, &json!(15 * 4096)));

    let all = metrics(&vhost);
    for (labels, count) in [
        (r#"operations_total{controller="s",bdev="M",target="0",op="read"}"#, 3),
        (r#"operations_total{controller="s",bdev="N",target="1",op="read"}"#, 5),
        (r#"operations_total{controller="s",bdev="M",target="5",op="read"}"#, 7),
        (r#"errors_total{controller="s"}"#, 0),
    ] {
        let line = format!("vhost_controller_{labels} {count}");
        assert!(all.lines().any(|other| other == line), "{line} is not in\n{all}");
    }

    // One channel of the controller at each bdev, as SPDK has one for each thread.
    let thread = |shown: &Value| {
        let threads = shown["threads"].as_array().unwrap();
        threads.iter().find(|thread| thread["name"] == "s").unwrap().clone()
    };
    let id = thread(&vhost.ok("thread_get_stats", Value::Null))["id"].clone();
    let channels = vhost.ok("bdev_get_iostat", json!({"names": ["M"], "per_channel": true}));
    let channels = channels["channels"].as_array().unwrap();
    assert_eq!(channels.len(), 1);
    assert_eq!((&channels[0]["thread_id"], &channels[0]["num_read_ops"]), (&id, &json!(10)));
    // The event queue has none.
    let channels = thread(&vhost.ok("thread_get_io_channels", Value::Null));
    let expected = json!([{"name": "bdev_M", "ref": 2}, {"name": "bdev_N", "ref": 1}]);
    assert_eq!(channels["io_channels"], expected);

    // Counters of the controller do not fall when a target is removed.
    vhost.ok(REMOVE, number(5, 60_000));
    let shown = stats();
    assert_eq!(reads(&shown), 15);
    assert_eq!(shown["backend_specific"]["scsi"].as_array().unwrap().len(), 2);
    assert!(!metrics(&vhost).contains(r#"target="5""#));
}

/// Limits apply at once, and a new size reaches the guest.
#[test]
fn limits_and_sizes_reach_targets() {
    let vhost = scene();
    vhost.null("Z");
    vhost.ok(ADD, target(2, "Z"));
    let mut guest = Guest::connect(&vhost, "s");
    assert_eq!(guest.read(2, 1), GOOD);
    vhost.ok("bdev_null_resize", json!({"name": "Z", "new_size": 8}));
    let (event, number, _) = guest.event();
    assert_eq!((event, number), (kind::PARAM_CHANGE, 2));
    let before = guest.attentions;
    assert_eq!(guest.read(2, 1), GOOD);
    assert_eq!(guest.attentions, before + 1);
    vhost.ok("bdev_set_qos_limit", json!({"name": "Z", "rw_ios_per_sec": 1000}));
    (0..50).for_each(|_| assert_eq!(guest.read(2, 1), GOOD));
    let throttled = || {
        let shown = vhost.ok("vhost_get_controller_stats", json!({"name": "s"}));
        shown[0]["backend_specific"]["scsi"][0]["io"]["throttled"].as_u64().unwrap()
    };
    assert!(throttled() > 0);
    vhost.ok("bdev_set_qos_limit", json!({"name": "Z", "rw_ios_per_sec": 0}));
    let before = throttled();
    (0..50).for_each(|_| assert_eq!(guest.read(2, 1), GOOD));
    assert_eq!(throttled(), before);
}
