//! A device that takes long to open, or never opens, delays only its own guest.

use std::sync::atomic::Ordering;

use vhost_target::Verdict;
use vhost_target::protocol::request;
use vhost_target::session::{DRAIN_LIMIT_S, Phase};

use super::guest::{World, until};
use crate::wire::NoSockets;

/// Ticks after which an opening has surely timed out.
const TICKS: u64 = DRAIN_LIMIT_S + 2;

#[test]
fn a_hanging_opening_delays_only_its_guest() {
    let world = World::new();
    let (slow, _quick) = (world.controller("slow"), world.controller("quick"));
    slow.openings().hang = true;
    let mut waits = world.connect("slow").unwrap();
    waits.start();
    waits.offer();
    until(|| slow.openings().count == 1);
    assert_eq!(waits.phase("slow"), Some(Phase::Starting));
    // Another guest connects, is served, and disconnects.
    let mut guest = world.connect("quick").unwrap();
    guest.start();
    guest.serves();
    guest.stop();
    world.settle(|| guest.phase("quick") == Some(Phase::Suspended));
    world.target.closed(guest.id);
    // The operator's methods work for both controllers.
    world.target.set_coalescing("slow", 1, 1000).unwrap();
    world.target.begin_delete("quick", false).unwrap().finish(&NoSockets);
    // The front end's own messages are handled, and are in effect when the ring starts.
    waits.tell(request::SET_VRING_CALL, &[1 << 8], None);
    assert_eq!(waits.answered(), 0);
    slow.open();
    until(|| waits.answered() == 1);
}

#[test]
fn its_guest_can_disconnect_and_its_controller_can_be_deleted() {
    let world = World::new();
    let slow = world.controller("slow");
    slow.openings().hang = true;
    let guest = world.connect("slow").unwrap();
    guest.start();
    until(|| slow.openings().count == 1);
    world.target.closed(guest.id);
    assert_eq!(world.target.connections(), 0, "no connection is left");
    let deletion = world.target.begin_delete("slow", false).unwrap();
    assert_eq!(deletion.progress().connected, 0);
    deletion.finish(&NoSockets);
    assert!(world.target.controllers().is_empty());
    slow.open();
    until(|| slow.openings().count == 0);
}

#[test]
fn a_ring_that_is_stopped_during_its_opening_replies_afterwards() {
    let world = World::new();
    let slow = world.controller("slow");
    slow.openings().hang = true;
    let mut guest = world.connect("slow").unwrap();
    guest.offer();
    guest.start();
    until(|| slow.openings().count == 1);
    guest.stop();
    assert_eq!(guest.phase("slow"), Some(Phase::Quiescing));
    assert!(guest.wire.sent.lock().unwrap().is_empty());
    slow.open();
    world.settle(|| guest.wire.sent.lock().unwrap().len() == 1);
    assert_eq!(guest.phase("slow"), Some(Phase::Suspended));
    assert_eq!(guest.answered(), 0, "the ring was never served");
}

/// The result of an earlier opening is dropped: only the last one is for the ring.
#[test]
fn a_ring_that_was_reset_and_started_again_opens_again() {
    let world = World::new();
    let slow = world.controller("slow");
    slow.openings().hang = true;
    let mut guest = world.connect("slow").unwrap();
    guest.start();
    until(|| slow.openings().count == 1);
    guest.tell(request::RESET_DEVICE, &[], None);
    guest.start();
    guest.offer();
    slow.open();
    until(|| guest.answered() == 1);
    assert_eq!(slow.openings().count, 0);
}

#[test]
fn an_opening_that_takes_too_long_ends_the_connection() {
    let world = World::new();
    let slow = world.controller("slow");
    slow.openings().hang = true;
    let guest = world.connect("slow").unwrap();
    guest.start();
    until(|| slow.openings().count == 1);
    (0..TICKS - 2).for_each(|_| world.target.tick());
    assert_eq!(guest.wire.ended.load(Ordering::Relaxed), 0);
    (0..2).for_each(|_| world.target.tick());
    assert_eq!(guest.wire.ended.load(Ordering::Relaxed), 1);
    world.target.closed(guest.id);
    // The front end may reconnect while the first opening still hangs.
    let mut again = world.connect("slow").unwrap();
    again.start();
    again.offer();
    until(|| slow.openings().count == 2);
    slow.open();
    until(|| again.answered() == 1);
}

#[test]
fn an_opening_that_fails_ends_the_connection() {
    let world = World::new();
    let device = world.controller("c");
    device.openings().fail = true;
    let guest = world.connect("c").unwrap();
    guest.start();
    until(|| guest.wire.ended.load(Ordering::Relaxed) == 1);
    assert_eq!(guest.phase("c"), Some(Phase::Suspended));
}

/// Each opening that hangs occupies a thread. The number of such threads per controller is limited.
#[test]
fn hanging_openings_are_bounded() {
    let world = World::new();
    let slow = world.controller("slow");
    slow.openings().hang = true;
    let mut taken = 0;
    while let Some(guest) = world.connect("slow") {
        guest.start();
        taken += 1;
        until(|| slow.openings().count == taken);
        world.target.closed(guest.id);
    }
    assert_eq!(taken, 16);
    slow.open();
    until(|| slow.openings().count == 0);
    let mut guest = None;
    until(|| {
        guest = guest.take().or_else(|| world.connect("slow"));
        guest.is_some()
    });
    let mut guest = guest.unwrap();
    guest.start();
    guest.serves();
    assert!(matches!(guest.send(request::GET_VRING_BASE, &[0], None), Verdict::Deferred));
}
