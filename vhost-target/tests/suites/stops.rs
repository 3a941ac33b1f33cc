//! Queues that stop, are abandoned, get other memory, or lose their device, while requests are in
//! flight.

use std::sync::Arc;

use guest_memory::GuestMemory;
use vhost_target::queue::{Event, QueueId, QueueState};

use super::calls::called;
use super::device::{Outcome, TestDevice};
use super::scene::{ADDRS, LAYOUTS, Scene};

const SIZE: u16 = 16;
/// The contents of a ring that the next user has written.
const OTHER: u8 = 0xee;

/// Returns the address and the length of what a queue writes when it completes requests.
fn used_part(packed: bool) -> (u64, usize) {
    if packed { (ADDRS.desc, 16 * SIZE as usize) } else { (ADDRS.used, 6 + 8 * SIZE as usize) }
}

/// Returns the contents of the memory that the device writes for a request.
fn answer<D: TestDevice>(scene: &Scene<D>, n: usize) -> Vec<Vec<u8>> {
    let written = D::written(scene.sent(n));
    written.into_iter().map(|(gpa, len)| scene.get(gpa, len as usize)).collect()
}

pub(crate) fn stopping_waits_for_io_and_reports_the_index<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::new(packed, SIZE, D::create());
        scene.base = scene.position();
        scene.start().unwrap();
        scene.submit_one();
        scene.submit_one();
        let position = scene.position();
        scene.visit();
        scene.queue().control().stop();
        scene.submit_one();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        assert!(scene.events.pop().is_none());
        scene.device.state().complete_all();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        let reported = scene.queue().control().last_avail();
        assert_eq!(reported, position, "the third request was not fetched");
        assert_eq!(scene.seen(), [0, 1]);
        assert!(matches!(scene.events.pop(), Some(Event::Drained(QueueId(1)))));
        scene.visit();
        assert!(scene.events.pop().is_none(), "the event is sent once");
        assert_eq!(scene.done(), [0, 1]);
        // The next queue continues there.
        scene.base = position;
        scene.start().unwrap();
        scene.visit();
        assert_eq!(scene.seen(), [2]);
        scene.complete_all();
        assert_eq!(scene.done(), [2]);
    }
}

pub(crate) fn an_abandoned_queue_does_not_access_its_ring<D: TestDevice>() {
    for packed in LAYOUTS {
        for (abandoned, adopts) in [(false, true), (true, true), (true, false)] {
            let mut scene: Scene<D> = Scene::started(packed, SIZE);
            scene.submit_one();
            scene.visit();
            // The next user of the ring has written this.
            let (gpa, len) = used_part(packed);
            scene.put(gpa, &vec![OTHER; len]);
            let memory = Arc::clone(&scene.memory);
            let before = adopts.then(|| scene.publish(&memory));
            if abandoned {
                scene.queue().control().abandon();
            } else {
                scene.queue().control().stop();
            }
            scene.device.state().complete_all();
            scene.visit();
            assert_eq!(scene.queue().control().state(), QueueState::Stopped);
            let untouched = scene.get(gpa, len).iter().all(|byte| *byte == OTHER);
            assert_eq!(untouched, abandoned, "a new view: {adopts}, packed: {packed}");
            assert!(
                before.is_none_or(|view| view.try_free().is_none()),
                "the view is not used any more"
            );
        }
    }
}

/// One request is in flight, one is parked, and one is in the ring.
pub(crate) fn an_abandoned_queue_forgets_all_requests<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        scene.device.state().room = Some(1);
        scene.submit_some(3);
        scene.visit();
        let others = u32::from(D::FETCHES_WITHOUT_ROOM);
        assert_eq!(scene.queue().control().inflight(), 2 + others);
        scene.queue().control().abandon();
        scene.device.state().room = None;
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        assert_eq!(scene.queue().control().inflight(), 1, "only the parked request has ended");
        scene.device.state().complete_all();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(scene.queue().control().inflight(), 0);
        assert_eq!((scene.seen(), scene.take()), (vec![0], vec![]));
        assert!(matches!(scene.events.pop(), Some(Event::Drained(QueueId(1)))));
    }
}

pub(crate) fn a_drain_event_is_sent_later_if_the_event_queue_is_full<D: TestDevice>() {
    let mut scene: Scene<D> = Scene::started(false, SIZE);
    while scene.events.push(Event::Broken(QueueId(9))).is_ok() {}
    scene.queue().control().stop();
    scene.visit();
    assert_eq!(scene.queue().control().state(), QueueState::Stopped);
    scene.visit();
    while let Some(event) = scene.events.pop() {
        assert!(matches!(event, Event::Broken(QueueId(9))));
    }
    scene.visit();
    assert!(matches!(scene.events.pop(), Some(Event::Drained(QueueId(1)))));
}

pub(crate) fn a_full_channel_delays_and_loses_nothing<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        scene.device.state().room = Some(0);
        scene.device.state().failing = Some(0);
        scene.submit_one();
        let second = scene.submit_one();
        let before = answer(&scene, second);
        scene.visit();
        let inflight = scene.queue().control().inflight();
        // The first is parked, and the second is behind it or not fetched.
        let fetched = if D::FETCHES_WITHOUT_ROOM { 2 } else { 1 };
        assert_eq!(inflight, fetched);
        scene.queue().control().stop();
        scene.visit();
        let state = scene.queue().control().state();
        assert_eq!(state, QueueState::Attached, "a parked request is in flight");
        scene.device.state().room = None;
        scene.visit();
        assert_eq!(scene.device.state().waiting(), fetched as usize);
        scene.device.state().complete_all();
        scene.visit();
        if D::FETCHES_WITHOUT_ROOM {
            assert_eq!(scene.ended_as(&[Outcome::Failed, Outcome::Done]), [0, second]);
        } else {
            assert_eq!(scene.ended_as(&[Outcome::Failed]), [0]);
            assert_eq!(scene.outstanding(), 1);
            assert!(answer(&scene, second) == before, "the second was not touched");
        }
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
    }
}

pub(crate) fn requests_that_wait_for_room_keep_their_order<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, 64);
        scene.device.state().room = Some(0);
        scene.submit_some(5);
        for n in 0..5 {
            scene.settle();
            assert_eq!(scene.device.state().seen.len(), n);
            scene.device.state().room = Some(1);
        }
        scene.settle();
        assert_eq!(scene.seen(), [0, 1, 2, 3, 4]);
        scene.complete_all();
        assert_eq!(scene.done(), [0, 1, 2, 3, 4]);
    }
}

/// Each request is returned once, in the order in which the device ends them.
pub(crate) fn requests_end_in_any_order<D: TestDevice>() {
    for packed in LAYOUTS {
        for indirect in [false, true] {
            let mut scene: Scene<D> = Scene::started(packed, 64);
            scene.indirect = indirect;
            for round in 0..20 {
                let first = scene.next();
                scene.submit_some(5);
                scene.settle();
                for nth in [3, 0, 1] {
                    scene.device.state().complete(nth);
                }
                scene.settle();
                assert_eq!(scene.done(), [3, 0, 2].map(|n| first + n), "round {round}");
                scene.complete_all();
                assert_eq!(scene.done(), [1, 4].map(|n| first + n), "round {round}");
            }
            assert_eq!(scene.queue().control().requests(), (100, 0));
        }
    }
}

pub(crate) fn memory_outlives_the_io_that_uses_it<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        scene.submit_one();
        scene.visit();
        let old = Arc::downgrade(&scene.memory);
        let bytes = scene.memory.size_bytes();
        let new = scene.remapped();
        let retired = scene.publish(&new);
        let before = std::mem::replace(&mut scene.memory, new);
        let retired = retired.try_free().expect("freed although the reactor may use it");
        if !packed {
            scene.put(ADDRS.avail + 2, &1_u16.to_le_bytes());
        }
        scene.visit();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        let retired = retired.try_free().expect("freed although an I/O uses its memory");
        assert_eq!(scene.queue().control().quarantined_bytes(), bytes);
        scene.device.state().complete_all();
        scene.visit();
        // The device's part of the answer goes into the memory that the request came from, the used
        // element into the new ring.
        assert_answered_in(&mut scene, &before);
        scene.drop_driver();
        drop(before);
        assert!(old.upgrade().is_some());
        assert!(retired.try_free().is_none());
        assert!(old.upgrade().is_none(), "the memory is unmapped now");
        assert_eq!(scene.queue().control().quarantined_bytes(), 0);
    }
}

/// Asserts that request 0 has a used element in the scene's memory, and its answer in `memory`.
fn assert_answered_in<D: TestDevice>(scene: &mut Scene<D>, memory: &Arc<GuestMemory>) {
    let len = if scene.packed {
        // The descriptor was returned: both flags have the value of the first round.
        let desc = scene.get(ADDRS.desc, 16);
        assert_eq!(u16::from_le_bytes([desc[14], desc[15]]) & 0x8080, 0x8080);
        u32::from_le_bytes([desc[8], desc[9], desc[10], desc[11]])
    } else {
        assert_eq!(scene.get(ADDRS.used + 2, 2), [1, 0]);
        let element = scene.get(ADDRS.used + 4, 8);
        u32::from_le_bytes([element[4], element[5], element[6], element[7]])
    };
    let sent = scene.sent(0).clone();
    scene.device.check_answer(memory, &sent, len, Outcome::Done);
}

pub(crate) fn a_new_view_causes_one_call<D: TestDevice>() {
    for packed in LAYOUTS {
        let (mut scene, eventfd) = called::<D>(packed);
        scene.start().unwrap();
        scene.visit();
        assert_eq!(eventfd.take(), 1, "at the start");
        scene.visit();
        assert_eq!(eventfd.take(), 0);
        let memory = Arc::clone(&scene.memory);
        let retired = scene.publish(&memory);
        scene.visit();
        assert_eq!(eventfd.take(), 1, "the previous fd may have been signalled last");
        scene.visit();
        assert!(retired.try_free().is_none());
    }
}

pub(crate) fn a_batch_causes_one_call<D: TestDevice>() {
    for packed in LAYOUTS {
        let (mut scene, eventfd) = called::<D>(packed);
        scene.start().unwrap();
        scene.visit();
        eventfd.take();
        scene.submit_some(4);
        scene.visit();
        assert_eq!(eventfd.take(), 1);
        // NO_INTERRUPT, or RING_EVENT_FLAGS_DISABLE behind the position.
        let at = if packed { ADDRS.avail + 2 } else { ADDRS.avail };
        scene.put(at, &1_u16.to_le_bytes());
        scene.submit_one();
        scene.visit();
        assert_eq!(eventfd.take(), 0);
        assert_eq!(scene.done(), [0, 1, 2, 3, 4]);
    }
}

pub(crate) fn a_removed_device_fails_requests_and_is_released<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        scene.submit_one();
        scene.visit();
        let memory = Arc::clone(&scene.memory);
        let _retired = scene.publish_removed(&memory);
        scene.submit_one();
        scene.visit();
        assert_eq!(scene.ended_as(&[Outcome::Refused]), [1]);
        assert!(scene.events.pop().is_none(), "I/O is in flight on the channel");
        scene.device.state().complete_all();
        scene.visit();
        assert_eq!(scene.done(), [0]);
        assert!(matches!(scene.events.pop(), Some(Event::Released(QueueId(1), _))));
        scene.submit_one();
        scene.visit();
        assert_eq!(scene.ended_as(&[Outcome::Refused]), [2]);
        assert_eq!(scene.queue().control().requests(), (3, 2));
    }
}
