//! A guest with a verifying load on a bdev, for tests of engines.

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::json;

use crate::support::harness::{Vhost, wait_until};

/// A guest that writes, reads and compares, with `queues` queues.
pub(crate) fn guest(vhost: &Vhost, bdev: &str, queues: usize) -> (FrontEnd, Load) {
    let controller = format!("of-{bdev}");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": controller, "dev_name": bdev}));
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let socket = vhost.socket(&controller);
    let mut front_end = FrontEnd::connect(&socket, ram, Options::default()).unwrap();
    let queues = front_end.start_any(queues, QueueOptions::default()).unwrap();
    let options = LoadOptions { blocks: 0..256, ..LoadOptions::default() };
    (front_end, Load::start(queues, options).unwrap())
}

/// Reads and writes that a bdev has completed.
pub(crate) fn done(vhost: &Vhost, name: &str) -> u64 {
    let answer = vhost.ok("bdev_get_iostat", json!({ "names": [name] }));
    let number = |key: &str| answer["bdevs"][0][key].as_u64().unwrap();
    number("num_read_ops") + number("num_write_ops")
}

/// Waits until a bdev has completed some hundred more I/Os.
pub(crate) fn goes_on(vhost: &Vhost, name: &str) {
    let before = done(vhost, name);
    wait_until("the load goes on", || done(vhost, name) > before + 500);
}

/// Ends it without a problem.
pub(crate) fn end((front_end, load): (FrontEnd, Load)) {
    let (summary, _) = load.stop().unwrap();
    assert_eq!(summary.first_problem, None);
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    front_end.disconnect().unwrap();
}
