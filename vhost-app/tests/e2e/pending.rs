//! Pending messages to a front end arrive, whatever its state was when they became due.

use std::sync::Arc;
use std::thread;

use front_end::features::{DRIVER_FEATURES, RING_PACKED};
use front_end::packed::FIRST_BASE;
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, RawConnection, Request};
use serde_json::json;

use crate::support::disks;
use crate::support::harness::{Vhost, wait_until};

const CONFIG_CHANGE: u32 = 2;
const RESET_DEVICE: u32 = 34;

/// A controller on a disk that grows.
struct Scene {
    vhost: Vhost,
    ram: Arc<GuestRam>,
    mib: u64,
}

impl Scene {
    fn new() -> Self {
        let vhost = Vhost::start(&[]);
        vhost.null("N");
        disks::controller(&vhost, "b", "N");
        Self { vhost, ram: GuestRam::new(&[16 << 20]).unwrap(), mib: 1 }
    }

    fn connect(&self) -> FrontEnd {
        let (socket, ram) = (self.vhost.socket("b"), Arc::clone(&self.ram));
        FrontEnd::connect(&socket, ram, Options::default()).unwrap()
    }

    fn grow(&mut self) {
        self.mib += 1;
        self.vhost.ok("bdev_null_resize", json!({"name": "N", "new_size": self.mib}));
    }

    fn announced(&self, front_end: &mut FrontEnd, channel: &mut RawConnection) {
        assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
        assert_eq!(front_end.config().unwrap().capacity, 2048 * self.mib);
    }
}

/// Nothing was sent so far: the answer to a later request is the first message.
fn nothing_yet(front_end: &mut FrontEnd, channel: &RawConnection) {
    front_end.config().unwrap();
    channel.stream().set_nonblocking(true).unwrap();
    let mut byte = [0];
    let read = std::io::Read::read(&mut channel.stream(), &mut byte);
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    channel.stream().set_nonblocking(false).unwrap();
}

#[test]
fn a_disk_that_grows_before_its_rings_are_started() {
    let mut scene = Scene::new();
    let mut front_end = scene.connect();
    let mut channel = front_end.open_backend_channel().unwrap();
    scene.grow();
    nothing_yet(&mut front_end, &channel);
    let _queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    scene.announced(&mut front_end, &mut channel);
    nothing_yet(&mut front_end, &channel);
}

#[test]
fn a_disk_that_grows_while_its_guest_is_paused() {
    let mut scene = Scene::new();
    let mut front_end = scene.connect();
    let mut channel = front_end.open_backend_channel().unwrap();
    let queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let bases = front_end.stop().unwrap();
    scene.grow();
    scene.grow();
    nothing_yet(&mut front_end, &channel);
    front_end.start(vec![(Arc::clone(queue.ring()), bases[0])]).unwrap();
    scene.announced(&mut front_end, &mut channel);
    nothing_yet(&mut front_end, &channel);
}

#[test]
fn a_disk_that_grows_before_there_is_a_channel() {
    let mut scene = Scene::new();
    let mut front_end = scene.connect();
    let _queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    scene.grow();
    let mut channel = front_end.open_backend_channel().unwrap();
    scene.announced(&mut front_end, &mut channel);
}

#[test]
fn a_disk_that_grows_while_nobody_is_connected() {
    let mut scene = Scene::new();
    scene.connect().disconnect().unwrap();
    scene.grow();
    let mut front_end = scene.connect();
    let mut channel = front_end.open_backend_channel().unwrap();
    let _queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    scene.announced(&mut front_end, &mut channel);
}

/// GET_VRING_BASE is about the ring that was started last, even while an earlier one still drains.
#[test]
fn a_ring_that_is_reset_and_started_and_stopped_while_its_io_hangs() {
    let vhost = Vhost::start(&[]);
    disks::malloc(&vhost, "M", disks::MIB, 512);
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    let socket = disks::controller_of(&vhost, "b", "EE_M", true);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = Options { features: DRIVER_FEATURES | RING_PACKED, ..Options::default() };
    let mut front_end = FrontEnd::connect(&socket, Arc::clone(&ram), options).unwrap();
    let mut queue = front_end.start_any(1, QueueOptions::default()).unwrap().remove(0);
    disks::hold(&vhost, "EE_M", 1000);
    let buffer = ram.alloc(4096, 4096).unwrap();
    for _ in 0..3 {
        queue.submit(&Request::read(0, &[buffer])).unwrap();
    }
    queue.kick().unwrap();
    wait_until("all is held", || disks::in_flight(&vhost, "b") == 3);
    front_end.raw().unwrap().send_message(RESET_DEVICE, 1, &[], &[]).unwrap();
    front_end.start_ring(queue.ring(), FIRST_BASE).unwrap();
    thread::scope(|scope| {
        let stop = scope.spawn(|| front_end.stop_ring(0));
        wait_until("it waits", || disks::sessions(&vhost, "b")[0]["state"] == "quiescing");
        assert!(!stop.is_finished());
        disks::answer(&vhost, "EE_M");
        assert_eq!(stop.join().unwrap().unwrap(), FIRST_BASE, "the new ring has done nothing");
    });
}
