//! Requests of a device that is not a disk.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small buffers")]

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost_target::device::DeviceChange;
use vhost_target::session::Phase;

use super::guest::{DATA, DATA_BYTES, World};
use crate::entropy::FILL;

#[test]
fn buffers_are_filled_and_returned() {
    let world = World::new();
    world.controller("c");
    let mut guest = world.connect("c").unwrap();
    guest.start();
    for _ in 0..3 {
        guest.serves();
    }
    let len = DATA_BYTES as u32;
    assert_eq!(guest.used(), [(0, len), (1, len), (2, len)]);
    let mut data = vec![0; 4 * DATA_BYTES as usize];
    guest.ram.read_exact_at(&mut data, DATA).unwrap();
    assert!(data[..3 * DATA_BYTES as usize].iter().all(|byte| *byte == FILL));
    assert!(data[3 * DATA_BYTES as usize..].iter().all(|byte| *byte == 0));
}

/// The device's own eventfd signals the completion of a request.
#[test]
fn requests_end_later_and_a_stop_waits_for_them() {
    let world = World::new();
    let device = world.controller("c");
    device.state().at_once = false;
    let mut guest = world.connect("c").unwrap();
    guest.start();
    guest.offer();
    guest.offer();
    until_in_flight(&world, 2);
    assert_eq!(guest.answered(), 0);
    guest.stop();
    assert_eq!(guest.phase("c"), Some(Phase::Quiescing));
    device.complete();
    world.settle(|| guest.phase("c") == Some(Phase::Suspended));
    assert_eq!(guest.answered(), 2);
    // The reply to GET_VRING_BASE: the position of ring 0 is 2.
    let sent = guest.wire.sent.lock().unwrap();
    assert_eq!(sent[0][12..], [0, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn requests_wait_for_room_in_their_order() {
    let world = World::new();
    let device = world.controller("c");
    device.state().room = Some(1);
    let mut guest = world.connect("c").unwrap();
    for _ in 0..4 {
        guest.offer();
    }
    guest.start();
    super::guest::until(|| guest.answered() == 1);
    for room in 2..=4 {
        device.state().room = Some(1);
        super::guest::until(|| guest.answered() == room);
    }
    assert_eq!(guest.used().iter().map(|used| used.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

/// Counters of a session include its stopped rings.
#[test]
fn counters_include_stopped_rings() {
    let world = World::new();
    world.controller("c");
    let mut guest = world.connect("c").unwrap();
    guest.start();
    guest.serves();
    guest.stop();
    world.settle(|| guest.phase("c") == Some(Phase::Suspended));
    let requests = || world.target.controllers()[0].sessions[0].requests;
    assert_eq!(requests(), 1);
    guest.start();
    guest.serves();
    super::guest::until(|| requests() == 2);
}

/// The requests of a device without a source are answered, and get no bytes.
#[test]
fn a_removed_source_refuses_requests() {
    let world = World::new();
    let (source, device) = world.controller_and_device("c");
    let mut guest = world.connect("c").unwrap();
    guest.start();
    guest.serves();
    device.remove();
    world.target.update_devices(|_| DeviceChange::Removed);
    guest.serves();
    assert_eq!(guest.used(), [(0, DATA_BYTES as u32), (1, 0)]);
    // A queue that is released gives up its stream.
    world.settle(|| Arc::strong_count(&source) == 1);
}

fn until_in_flight(world: &World, count: u64) {
    super::guest::until(|| world.target.controllers()[0].sessions[0].inflight == count);
}
