//! A chain in a packed ring must end before descriptors that were not returned to the driver.
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

use std::ops::Range;

use vhost_target::queue::QueueState;

use super::device::TestDevice;
use super::scene::{DATA, Scene};

pub(crate) const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;
/// The address of the data of unterminated chains.
pub(crate) const OTHER: u64 = DATA + 0x80_0000;

/// Creates a scene with a request in the first descriptors, followed by an unterminated chain that
/// fills the ring: it would continue in those descriptors.
pub(crate) fn overlapping<D: TestDevice>() -> Scene<D> {
    let mut scene: Scene<D> = Scene::started(true, SIZE);
    scene.submit_one();
    scene.visit();
    assert_eq!(scene.device.state().waiting(), 1);
    put_unterminated(&scene, scene.places() as u16..SIZE);
    scene
}

/// Makes an unterminated chain available in the descriptors at `positions`.
fn put_unterminated<D: TestDevice>(scene: &Scene<D>, positions: Range<u16>) {
    for position in positions {
        let at = 16 * u64::from(position);
        scene.put(at, &OTHER.to_le_bytes());
        scene.put(at + 8, &16_u32.to_le_bytes());
        scene.put(at + 12, &7_u16.to_le_bytes());
        scene.put(at + 14, &(NEXT | AVAIL).to_le_bytes());
    }
}

/// Ends the chain in the last descriptor of the ring, with a writable buffer.
pub(crate) fn end_chain<D: TestDevice>(scene: &Scene<D>) {
    let last = 16 * u64::from(SIZE - 1);
    scene.put(last + 14, &(AVAIL | WRITE).to_le_bytes());
}

pub(crate) fn a_chain_that_overlaps_one_in_flight_breaks_the_ring<D: TestDevice>() {
    let mut scene = overlapping::<D>();
    scene.visit();
    scene.assert_broken();
    assert_eq!(scene.device.state().waiting(), 1);
    scene.complete_all();
    assert_eq!(scene.done(), [0], "earlier requests are completed");
}

/// A used descriptor that is written and not published does not belong to the driver yet.
pub(crate) fn a_chain_that_overlaps_one_answered_in_the_same_visit_breaks_the_ring<
    D: TestDevice,
>() {
    let mut scene = overlapping::<D>();
    scene.device.state().complete_all();
    scene.visit();
    scene.assert_broken();
    assert_eq!(scene.done(), [0]);
}

/// The opposite case: a chain that fits exactly is accepted.
pub(crate) fn a_chain_that_fits_exactly_is_accepted<D: TestDevice>() {
    let mut scene = overlapping::<D>();
    end_chain(&scene);
    scene.visit();
    assert_eq!(scene.queue().control().state(), QueueState::Attached);
    scene.complete_all();
    scene.complete_all();
    assert_eq!(scene.queue().control().requests().0, 2);
    assert_eq!(scene.queue().control().inflight(), 0);
}

/// The ring breaks at the invalid chain, not at a valid one before it for which the visit had no
/// room.
pub(crate) fn chains_before_an_invalid_one_are_served<D: TestDevice>() {
    let mut scene: Scene<D> = Scene::started(true, SIZE);
    scene.submit_one();
    scene.submit_one();
    put_unterminated(&scene, scene.places() as u16..SIZE);
    scene.device.state().room = Some(0);
    scene.visit();
    if !D::FETCHES_WITHOUT_ROOM {
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
    }
    scene.device.state().room = None;
    scene.settle();
    scene.assert_broken();
    assert_eq!(scene.device.state().waiting(), 2);
    scene.complete_all();
    assert_eq!(scene.done(), [0, 1]);
}
