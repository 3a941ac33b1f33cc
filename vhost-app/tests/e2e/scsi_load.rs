//! The load of `vhost-perf` on virtio-scsi controllers.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bench::Idle;
use bench::perf::{self, Device, Order, Outcome, Plan};
use front_end::RingLayout;
use serde_json::json;

use crate::support::harness::Vhost;

const BLOCKS: u64 = 8192;
const CONTROLLER: &str = "s.0";

/// A server with a controller whose target 3 shows a memory disk with blocks of `block_size`.
fn vhost(block_size: u32) -> Vhost {
    let vhost = Vhost::start(&[]);
    let disk = json!({"name": "M", "num_blocks": BLOCKS, "block_size": block_size});
    vhost.ok("bdev_malloc_create", disk);
    vhost.ok("vhost_create_scsi_controller", json!({"ctrlr": CONTROLLER, "packed_ring": true}));
    add(&vhost, 3, "M");
    vhost
}

fn add(vhost: &Vhost, target: u8, bdev: &str) {
    let target = json!({"ctrlr": CONTROLLER, "scsi_target_num": target, "bdev_name": bdev});
    vhost.ok("vhost_scsi_controller_add_target", target);
}

fn plan(socket: PathBuf, target: u8) -> Plan {
    let runtime = Duration::from_millis(100);
    Plan { device: Device::Scsi { target }, runtime, ..Plan::new(socket) }
}

fn run(plan: &Plan) -> bench::Result<Outcome> {
    perf::run(plan, &AtomicBool::new(false), &mut |_| {})
}

fn refusal(plan: &Plan) -> String {
    run(plan).unwrap_err().to_string()
}

#[test]
fn every_kind_of_load_works() {
    for block_size in [512, 4096] {
        let vhost = vhost(block_size);
        let plain = plan(vhost.socket(CONTROLLER), 3);
        let mixed = Plan { reads: 50, depth: 16, ..plain.clone() };
        let verified = Plan { verify: true, queues: 2, ..mixed.clone() };
        let packed = Plan { rings: RingLayout::Packed, ..verified.clone() };
        for plan in [
            plain.clone(),
            mixed,
            verified.clone(),
            Plan { indirect: true, event_idx: true, ..verified },
            packed.clone(),
            Plan { indirect: true, event_idx: true, ..packed },
            Plan { block_bytes: 64 << 10, order: Order::Sequential, reads: 0, ..plain.clone() },
            Plan { idle: Idle::Sleep, rate: Some(2000.0), depth: 4, ..plain.clone() },
            Plan { offset: 1 << 20, size: Some(1 << 20), depth: 64, ..plain },
        ] {
            let outcome = run(&plan).unwrap();
            assert!(outcome.is_good() && outcome.all.completed > 0, "{plan:?}: {outcome:?}");
            assert_eq!(outcome.disk_bytes, BLOCKS * u64::from(block_size));
        }
    }
}

#[test]
fn a_later_run_finds_what_an_earlier_one_has_written() {
    let vhost = vhost(512);
    let of = |target, reads| {
        let (verify, order, size) = (true, Order::Sequential, Some(64 << 10));
        let plan = plan(vhost.socket(CONTROLLER), target);
        run(&Plan { reads, verify, order, size, ..plan }).unwrap()
    };
    while of(3, 0).all.completed < 16 {}
    assert!(of(3, 100).is_good());
    vhost.malloc("other");
    add(&vhost, 4, "other");
    let outcome = of(4, 100);
    assert!(outcome.mismatches > 0, "{outcome:?}");
    let problem = outcome.first_problem.unwrap();
    assert!(problem.ends_with("does not contain the pattern"), "{problem}");
}

#[test]
fn a_failure_has_response_status_and_sense_key() {
    let vhost = vhost(512);
    vhost.malloc("B");
    vhost.ok("bdev_error_create", json!({"base_name": "B"}));
    add(&vhost, 5, "EE_B");
    let fault = json!({"name": "EE_B", "io_type": "read", "error_type": "failure", "num": 1});
    vhost.ok("bdev_error_inject_error", fault);
    let outcome = run(&plan(vhost.socket(CONTROLLER), 5)).unwrap();
    assert_eq!(outcome.errors, 1);
    let problem = outcome.first_problem.unwrap();
    let how = "completed with response 0, status 2, sense key 3";
    assert!(problem.starts_with("a read at byte ") && problem.ends_with(how), "{problem}");
}

#[test]
fn an_invalid_plan_is_refused_with_the_reason() {
    let vhost = vhost(4096);
    let socket = vhost.socket(CONTROLLER);
    let plain = plan(socket.clone(), 3);
    assert_eq!(refusal(&plan(socket, 5)), "the controller has no target 5");
    assert_eq!(
        refusal(&Plan { block_bytes: 512, ..plain.clone() }),
        "the disk has blocks of 4096 bytes: block size 512 and offset 0 must be multiples of it"
    );
    assert!(refusal(&Plan { device: Device::Blk, ..plain }).contains("the configuration space"));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "b.0", "dev_name": "M"}));
    let refused = refusal(&plan(vhost.socket("b.0"), 0));
    let expected =
        "TEST UNIT READY completed without a response: is this a virtio-scsi controller?";
    assert_eq!(refused, expected);
    let file = vhost.file("disk", 1 << 20);
    let file = json!({"name": "F", "filename": file, "block_size": 512, "readonly": true});
    vhost.ok("bdev_aio_create", file);
    add(&vhost, 0, "F");
    let refused = refusal(&Plan { reads: 0, ..plan(vhost.socket(CONTROLLER), 0) });
    assert_eq!(refused, "the disk is read-only, but the load writes");
}
