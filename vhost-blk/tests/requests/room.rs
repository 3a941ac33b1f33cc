//! A chain in a packed ring ends before descriptors that the driver has not got back.

use std::ops::Range;
use std::sync::Arc;

use vhost_target::queue::Event;
use vhost_target::queue::QueueState;

use super::disk::Manual;
use super::scene::{DATA, IN, OK, Scene, UNSUPP};

const SIZE: u16 = 8;
const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;

/// A read in the first three descriptors, and then a chain that fills the ring and is unterminated:
/// it would continue in those three.
fn overlapping() -> (Scene, Arc<Manual>) {
    let disk = Manual::create();
    let mut scene = Scene::started(true, SIZE, disk.clone());
    scene.send(IN, 0, &[(DATA, 512)]);
    scene.visit();
    assert_eq!(disk.state().waiting(), 1);
    put_unterminated(&scene, 3..SIZE);
    (scene, disk)
}

/// Makes a chain without an end available in the descriptors at `positions`.
fn put_unterminated(scene: &Scene, positions: Range<u16>) {
    for position in positions {
        let at = 16 * u64::from(position);
        scene.put(at, &DATA.to_le_bytes());
        scene.put(at + 8, &16_u32.to_le_bytes());
        scene.put(at + 12, &7_u16.to_le_bytes());
        scene.put(at + 14, &(NEXT | AVAIL).to_le_bytes());
    }
}

fn assert_broken(scene: &mut Scene) {
    assert_eq!(scene.queue().control().state(), QueueState::Broken);
    assert!(matches!(scene.events.pop(), Some(Event::Broken(_))));
}

#[test]
fn a_chain_that_runs_into_one_in_flight_breaks_the_ring() {
    let (mut scene, disk) = overlapping();
    scene.visit();
    assert_broken(&mut scene);
    assert_eq!(disk.state().waiting(), 1);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(scene.answers(), [(0, OK, 513)], "what it had before comes back");
}

/// A used descriptor that is written and not published is not the driver's yet.
#[test]
fn so_does_one_that_runs_into_what_is_answered_in_the_same_visit() {
    let (mut scene, disk) = overlapping();
    disk.state().complete_all();
    scene.visit();
    assert_broken(&mut scene);
    assert_eq!(scene.answers(), [(0, OK, 513)]);
}

/// The opposite case: a chain that fits exactly is taken.
#[test]
fn a_chain_as_long_as_the_room_is_taken() {
    let (mut scene, disk) = overlapping();
    let last = 16 * u64::from(SIZE - 1);
    scene.put(last + 14, &(AVAIL | 2).to_le_bytes());
    scene.visit();
    assert_eq!(scene.queue().control().state(), QueueState::Attached);
    assert_eq!(scene.queue().control().requests(), (1, 1), "it is no request");
    // Its status byte is the first of its last descriptor.
    assert_eq!(scene.get(DATA + 15, 1), [UNSUPP]);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(scene.queue().control().requests(), (2, 1));
}

/// The ring breaks at the invalid chain, not at a valid one in front of it for which the visit had no
/// room.
#[test]
fn what_precedes_an_invalid_chain_is_served_before_the_ring_breaks() {
    let disk = Manual::create();
    let mut scene = Scene::started(true, SIZE, disk.clone());
    scene.send(IN, 0, &[(DATA, 512)]);
    scene.send(IN, 8, &[(DATA, 512)]);
    put_unterminated(&scene, 6..SIZE);
    disk.state().room = Some(0);
    scene.visit();
    assert_eq!(scene.queue().control().state(), QueueState::Attached);
    disk.state().room = None;
    scene.settle();
    assert_broken(&mut scene);
    assert_eq!(disk.state().waiting(), 2);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(scene.answers(), [(0, OK, 513), (1, OK, 513)]);
}
