//! Time in which the process was stopped, by SIGSTOP, a debugger or a frozen control group, does
//! not count towards its time limits.

use std::thread;
use std::time::Duration;

use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use serde_json::json;

use crate::support::disks;
use crate::support::harness::{Launch, Vhost, wait_until};

/// Longer than every limit below.
const STOPPED: Duration = Duration::from_secs(2);

/// Stops the process for [`STOPPED`] and runs something meanwhile.
fn stop(vhost: &Vhost, meanwhile: impl FnOnce()) {
    vhost.signal("STOP");
    wait_until("it stands still", || vhost.is_stopped());
    meanwhile();
    thread::sleep(STOPPED);
    vhost.signal("CONT");
}

fn connect(vhost: &Vhost) -> FrontEnd {
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    FrontEnd::connect(&vhost.socket("b"), ram, Options::default()).unwrap()
}

/// I/O that completes just after the stop was within the limit.
#[test]
fn a_drain() {
    let vhost = Launch::new().args(&["--drain-limit", "1"]).start();
    disks::malloc(&vhost, "M", disks::MIB, 512);
    let latency_us = 2_500_000;
    let delay = json!({
        "name": "D", "base_bdev_name": "M",
        "avg_read_latency": latency_us, "p99_read_latency": latency_us,
        "avg_write_latency": 0, "p99_write_latency": 0,
    });
    vhost.ok("bdev_delay_create", delay);
    disks::controller(&vhost, "b", "D");
    let mut front_end = connect(&vhost);
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    queue.submit(&Request::read(0, &[buffer])).unwrap();
    queue.kick().unwrap();
    wait_until("it is in flight", || disks::in_flight(&vhost, "b") == 1);
    thread::scope(|scope| {
        let drain = scope.spawn(|| front_end.stop());
        wait_until("it waits", || disks::sessions(&vhost, "b")[0]["state"] == "quiescing");
        stop(&vhost, || ());
        assert_eq!(drain.join().unwrap().expect("an answer, not the connection's end"), [1]);
    });
    assert_eq!(queue.wait().unwrap().status, STATUS_OK);
}

/// The front end that a deletion waits for disconnects in time, but while the process is stopped.
#[test]
fn a_deletion() {
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    disks::controller(&vhost, "b", "N");
    let mut front_end = connect(&vhost);
    let _queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    let mut client = vhost.connect();
    client.send("vhost_delete_controller", json!({"ctrlr": "b", "timeout_ms": 1500}));
    wait_until("it is under way", || {
        FrontEnd::connect(
            &vhost.socket("b"),
            GuestRam::new(&[1 << 20]).unwrap(),
            Options::default(),
        )
        .is_err()
    });
    stop(&vhost, || front_end.kill());
    assert_eq!(client.receive().1, Ok(json!(true)));
}
