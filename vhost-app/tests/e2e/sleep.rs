//! Reactors that sleep: no kick is lost, no completion either, and an idle one takes no time.

use std::fs;
use std::time::Instant;

use bench::{Idle, Load, LoadOptions};
use front_end::{AnyQueue, FrontEnd, GuestRam, Options, Queue, QueueOptions, Request};
use serde_json::json;

use crate::support::harness::{Vhost, wait_until};

/// Times that a reactor goes to sleep in one test, at least; there are four such tests.
const SWITCHES: u64 = 250_000;
/// Requests between two reads of that number.
const AT_ONCE: usize = 10_000;
/// The longest pause, in iterations of an empty loop: some microseconds.
const PAUSE_MAX: u32 = 300;

fn connect(vhost: &Vhost, controller: &str, event_idx: bool) -> (FrontEnd, Vec<Queue>) {
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut options = Options::default();
    if !event_idx {
        options.features &= !(1 << 29); // VIRTIO_RING_F_EVENT_IDX
    }
    let mut front_end = FrontEnd::connect(&vhost.socket(controller), ram, options).unwrap();
    let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    (front_end, queues)
}

fn null_controller(vhost: &Vhost) {
    vhost.null("Null0");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vhost.0", "dev_name": "Null0"}));
}

fn sleeps(vhost: &Vhost) -> u64 {
    vhost.ok("vhost_get_reactor_turns", json!({}))[0]["sleeps"].as_u64().unwrap()
}

/// Runs `requests` at `depth`. A lost kick or completion leaves some outstanding.
fn run(queues: Vec<impl Into<AnyQueue>>, depth: usize, requests: u64, idle: Idle) -> Vec<AnyQueue> {
    let options = LoadOptions {
        depth,
        blocks: 0..256,
        reads: 100,
        verify: false,
        core: Some(0),
        idle,
        limit: Some(requests),
        ..LoadOptions::default()
    };
    let (summary, queues) = Load::start(queues, options).unwrap().finish().unwrap();
    assert_eq!((summary.completed, summary.outstanding), (requests, 0));
    assert_eq!(summary.errors, 0, "{:?}", summary.first_problem);
    queues
}

/// A guest whose requests come one at a time, after pauses of every length around the one after
/// which the reactor goes to sleep.
fn switches(args: &[&str], event_idx: bool) {
    let vhost = Vhost::start(args);
    null_controller(&vhost);
    let (front_end, mut queues) = connect(&vhost, "vhost.0", event_idx);
    let buffer = queues[0].ring().ram().alloc(4096, 4096).unwrap();
    let mut pauses = (0..PAUSE_MAX).cycle();
    while sleeps(&vhost) < SWITCHES {
        for pause in pauses.by_ref().take(AT_ONCE) {
            queues[0].submit(&Request::read(0, &[buffer])).unwrap();
            queues[0].kick().unwrap();
            let submitted = Instant::now();
            while queues[0].poll().unwrap().is_none() {
                assert!(submitted.elapsed() < front_end::LIMIT, "a kick was lost");
            }
            (0..pause).for_each(|_| std::hint::spin_loop());
        }
    }
    drop(front_end);
}

#[test]
fn no_kick_is_lost_in_interrupt_mode() {
    switches(&["--interrupt-mode"], false);
}

#[test]
fn no_kick_is_lost_in_interrupt_mode_with_event_idx() {
    switches(&["--interrupt-mode"], true);
}

#[test]
fn no_kick_is_lost_in_adaptive_mode() {
    switches(&["--reactor-idle-us", "2"], false);
}

#[test]
fn no_kick_is_lost_in_adaptive_mode_with_event_idx() {
    switches(&["--reactor-idle-us", "2"], true);
}

/// Each kind of disk signals completions differently: an io_uring's fd, a time, and work that
/// continues by itself.
#[test]
fn no_completion_is_lost() {
    for args in [["--interrupt-mode", "-d"], ["--reactor-idle-us", "20"]] {
        let vhost = Vhost::start(&args);
        let file = vhost.file("disk", 4 << 20);
        vhost.ok("bdev_uring_create", json!({"name": "file", "filename": file, "block_size": 512}));
        vhost.malloc("Malloc0");
        let delay = json!({"name": "delay", "base_bdev_name": "Malloc0", "avg_read_latency": 50,
            "p99_read_latency": 100, "avg_write_latency": 50, "p99_write_latency": 100});
        vhost.ok("bdev_delay_create", delay);
        let mut front_ends = vec![];
        for disk in ["file", "delay"] {
            let name = format!("{disk}.vhost");
            vhost.ok("vhost_create_blk_controller", json!({"ctrlr": name, "dev_name": disk}));
            let (front_end, queues) = connect(&vhost, &name, true);
            front_ends.push(front_end);
            let queues = run(queues, 1, 2_000, Idle::Sleep);
            run(queues, 8, 20_000, Idle::Sleep);
        }
    }
}

/// A reactor that has nothing to do does nothing: its thread is not run at all.
#[test]
fn an_idle_reactor_sleeps_and_stays_asleep() {
    for args in [["--interrupt-mode", "-d"], ["--reactor-idle-us", "20"]] {
        let vhost = Vhost::start(&args);
        null_controller(&vhost);
        let (mut front_end, queues) = connect(&vhost, "vhost.0", true);
        let queues = run(queues, 8, 10_000, Idle::Sleep);
        let tid = vhost.ok("framework_get_reactors", json!({}))["reactors"][0]["tid"].clone();
        let status = |field: &str| {
            let path = format!("/proc/{}/task/{tid}/status", vhost.pid());
            let status = fs::read_to_string(path).unwrap();
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        wait_until("it sleeps", || status("State:") == "S");
        // Once asleep, it is woken by nobody but a kick or a change.
        let switches = || status("voluntary_ctxt_switches:").parse::<u64>().unwrap();
        let before = switches();
        for _ in 0..200 {
            let reactors = vhost.ok("framework_get_reactors", json!({}));
            assert_eq!(reactors["reactors"][0]["in_interrupt"], true, "{reactors}");
            assert_eq!(switches(), before, "an idle reactor was run");
        }
        front_end.change_call_fd(0).unwrap();
        let queues = run(queues, 1, 10, Idle::Sleep);
        assert!(switches() > before);
        drop(queues);
        assert_eq!(front_end.stop().unwrap().len(), 1);
    }
}
