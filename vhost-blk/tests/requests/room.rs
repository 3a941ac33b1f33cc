//! A chain in a packed ring must end before descriptors that were not returned to the driver.

use std::ops::Range;
use std::sync::Arc;

use vhost_target::queue::Event;
use vhost_target::queue::QueueState;

use super::disk::Manual;
use super::scene::{DATA, IN, OK, Scene, UNSUPP};

const SIZE: u16 = 8;
const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;

/// Creates a scene with a read in the first three descriptors, followed by an unterminated chain
/// that fills the ring: it would continue in those three.
fn overlapping() -> (Scene, Arc<Manual>) {
    let disk = Manual::create();
    let mut scene = Scene::started(true, SIZE, disk.clone());
    scene.send(IN, 0, &[(DATA, 512)]);
    scene.visit();
    assert_eq!(disk.state().waiting(), 1);
    put_unterminated(&scene, 3..SIZE);
    (scene, disk)
}

/// Makes an unterminated chain available in the descriptors at `positions`.
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
fn a_chain_that_overlaps_one_in_flight_breaks_the_ring() {
    let (mut scene, disk) = overlapping();
    scene.visit();
    assert_broken(&mut scene);
    assert_eq!(disk.state().waiting(), 1);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(scene.answers(), [(0, OK, 513)], "earlier requests are completed");
}

/// A used descriptor that is written and not published does not belong to the driver yet.
#[test]
fn a_chain_that_overlaps_one_answered_in_the_same_visit_breaks_the_ring() {
    let (mut scene, disk) = overlapping();
    disk.state().complete_all();
    scene.visit();
    assert_broken(&mut scene);
    assert_eq!(scene.answers(), [(0, OK, 513)]);
}

/// The opposite case: a chain that fits exactly is accepted.
#[test]
fn a_chain_that_fits_exactly_is_accepted() {
    let (mut scene, disk) = overlapping();
    let last = 16 * u64::from(SIZE - 1);
    scene.put(last + 14, &(AVAIL | 2).to_le_bytes());
    scene.visit();
    assert_eq!(scene.queue().control().state(), QueueState::Attached);
    assert_eq!(scene.queue().control().requests(), (1, 1), "it counts as an error");
    // Its status byte is the first of its last descriptor.
    assert_eq!(scene.get(DATA + 15, 1), [UNSUPP]);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(scene.queue().control().requests(), (2, 1));
}

/// The ring breaks at the invalid chain, not at a valid one before it for which the visit had no
/// room.
#[test]
fn chains_before_an_invalid_one_are_served() {
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
