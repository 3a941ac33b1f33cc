//! Queues that are discarded with I/O in flight, as by a kill, and the queues that continue after
//! them.
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

use std::ops::Range;

use vhost_target::queue::QueueState;

use super::device::{Kind, Outcome, TestDevice};
use super::scene::{DATA, LAYOUTS, Scene};

/// Creates a scene whose requests in flight are recorded in an area.
pub(super) fn tracked<D: TestDevice>(packed: bool, size: u16) -> Scene<D> {
    let mut scene = Scene::new(packed, size, D::create());
    scene.track(size);
    scene.start().unwrap();
    scene
}

/// Simulates a restart: the device has no I/O in flight.
pub(super) fn restart<D: TestDevice>(scene: &mut Scene<D>) {
    scene.kill();
    scene.device.state().forget();
    scene.start().unwrap();
}

/// Offers writes with these tags.
pub(super) fn send<D: TestDevice>(scene: &mut Scene<D>, tags: Range<u64>) {
    for tag in tags {
        scene.submit(Kind::Write, tag, &[(DATA + 1024 * tag, 512)]);
    }
}

/// Returns 1,024 pieces of `len` bytes, with gaps between them, of the request with this tag.
fn pieces(tag: u64, len: u32) -> Vec<(u64, u32)> {
    (0..1024).map(|n| (DATA + (tag << 20) + 1024 * n, len)).collect()
}

pub(crate) fn requests_in_flight_are_resubmitted_in_order_before_new_ones<D: TestDevice>() {
    for packed in LAYOUTS {
        for indirect in [false, true] {
            let mut scene = tracked::<D>(packed, 64);
            scene.indirect = indirect;
            send(&mut scene, 0..7);
            scene.settle();
            // They complete out of order, in two batches.
            scene.device.state().complete(5);
            scene.device.state().complete(1);
            scene.settle();
            scene.device.state().complete(2);
            scene.settle();
            assert_eq!(scene.done(), [5, 1, 3]);
            scene.device.state().complete(0); // never seen by the queue
            send(&mut scene, 7..10);
            restart(&mut scene);
            scene.visit();
            assert_eq!(scene.seen(), [0, 2, 4, 6]);
            assert_eq!(scene.done(), [0; 0]);
            scene.settle();
            assert_eq!(scene.seen(), [7, 8, 9]);
            // A second kill, after some requests of each batch have completed.
            scene.device.state().complete(5);
            scene.device.state().complete(0);
            scene.settle();
            assert_eq!(scene.done(), [8, 0]);
            restart(&mut scene);
            scene.settle();
            assert_eq!(scene.seen(), [2, 4, 6, 7, 9]);
            scene.complete_all();
            assert_eq!(scene.done(), [2, 4, 6, 7, 9]);
            // Nothing is left for the next process to resubmit.
            restart(&mut scene);
            scene.settle();
            assert_eq!((scene.seen(), scene.outstanding()), (vec![], 0));
            send(&mut scene, 0..3);
            scene.device.state().at_once = true;
            scene.settle();
            assert_eq!(scene.done(), [10, 11, 12]);
        }
    }
}

pub(crate) fn kills_after_every_visit_lose_and_repeat_nothing<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 32);
        let mut came = vec![0; 3000];
        let mut rng = 1_u64;
        let mut below = |n: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (rng >> 33) % n
        };
        let mut sent = 0;
        while came.contains(&0) {
            for _ in 0..below(4) {
                if scene.outstanding() < 10 && sent < came.len() {
                    let kind = if below(2) == 0 { Kind::Read } else { Kind::Write };
                    let tag = scene.next() as u64;
                    scene.submit(kind, tag, &[(DATA + 1024 * tag, 512)]);
                    sent += 1;
                }
            }
            scene.device.state().room = (below(3) == 0).then_some(below(3) as usize);
            scene.visit();
            let waiting = scene.device.state().waiting() as u64;
            for left in (1..=waiting).rev().take(below(4) as usize) {
                let nth = below(left) as usize;
                scene.device.state().complete(nth);
            }
            if below(2) == 0 {
                scene.visit();
            }
            for n in scene.done() {
                came[n] += 1;
            }
            if below(5) == 0 {
                restart(&mut scene);
            }
        }
        // The driver asserts that no chain is returned twice.
        assert_eq!(came, vec![1; 3000]);
    }
}

pub(crate) fn long_chains_are_resubmitted_with_their_data<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        scene.indirect = true;
        for tag in 0..6 {
            scene.submit(Kind::Write, tag, &pieces(tag, 512));
        }
        scene.settle();
        assert_eq!(scene.device.state().waiting(), 4);
        for _ in 0..2 {
            restart(&mut scene);
            scene.settle();
            let seen: Vec<_> = scene.device.state().seen.iter().map(D::seen).collect();
            assert_eq!(seen, [0, 1, 2, 3].map(|tag| (tag, 1024 * 512)));
        }
        for count in [4, 2] {
            scene.complete_all();
            assert_eq!(scene.done().len(), count);
        }
    }
}

pub(crate) fn a_full_channel_delays_resubmission<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        send(&mut scene, 0..5);
        scene.settle();
        send(&mut scene, 5..7);
        restart(&mut scene);
        scene.device.state().room = Some(2);
        scene.settle();
        assert_eq!(scene.seen(), [0, 1]);
        scene.device.state().room = None;
        scene.settle();
        assert_eq!(scene.seen(), [2, 3, 4, 5, 6]);
        scene.complete_all();
        assert_eq!(scene.done().len(), 7);
    }
}

pub(crate) fn a_stop_before_the_first_visit_waits_for_resubmission<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        send(&mut scene, 0..3);
        let position = scene.position();
        scene.settle();
        send(&mut scene, 3..5);
        restart(&mut scene);
        scene.queue().control().stop();
        scene.device.state().room = Some(1);
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        scene.complete_all();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        scene.device.state().room = None;
        scene.settle();
        assert_eq!(scene.seen(), [0, 1, 2], "no new request is submitted");
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        scene.complete_all();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(scene.queue().control().last_avail(), position);
        assert_eq!(scene.done(), [0, 1, 2]);
        // The area is valid for the next process.
        restart(&mut scene);
        scene.settle();
        assert_eq!(scene.seen(), [3, 4]);
    }
}

pub(crate) fn a_reset_drops_requests_that_were_not_resubmitted<D: TestDevice>() {
    for packed in LAYOUTS {
        for begun in [0, 1] {
            let mut scene = tracked::<D>(packed, 64);
            send(&mut scene, 0..5);
            scene.settle();
            send(&mut scene, 5..7);
            restart(&mut scene);
            scene.device.state().room = Some(1);
            for _ in 0..begun {
                scene.visit();
            }
            scene.queue().control().reset();
            scene.device.state().room = None;
            for _ in 0..2 {
                scene.settle();
                let begun = scene.device.state().waiting() > 0;
                assert_eq!(scene.queue().control().state() == QueueState::Attached, begun);
                scene.device.state().complete_all();
            }
            scene.settle();
            assert_eq!(scene.queue().control().state(), QueueState::Stopped);
            // The second request was parked, and the others behind it.
            let begun = if D::FETCHES_WITHOUT_ROOM { 5 * begun } else { 2 * begun };
            assert_eq!(scene.seen(), (0..begun).collect::<Vec<_>>());
        }
    }
}

/// More requests than a visit takes, none of which is in flight afterwards.
pub(crate) fn a_stop_waits_for_resubmissions_of_later_visits<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 256);
        send(&mut scene, 0..40);
        scene.settle();
        restart(&mut scene);
        scene.device.state().at_once = true;
        scene.queue().control().stop();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(scene.done(), (0..40).collect::<Vec<_>>());
    }
}

/// As for new requests: the limit is the number of bytes that a memory disk has to copy.
pub(crate) fn a_visit_is_bounded_in_bytes<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        for tag in 0..8 {
            scene.submit(Kind::Write, tag, &[(DATA + 0x5_0000 * tag, 256 << 10)]);
        }
        scene.settle();
        restart(&mut scene);
        scene.device.state().at_once = true;
        scene.visit();
        assert_eq!(scene.done(), [0, 1, 2]);
        scene.settle();
        assert_eq!(scene.done(), [3, 4, 5, 6, 7]);
    }
}

pub(crate) fn a_visit_is_bounded_in_pieces<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        scene.indirect = true;
        for tag in 0..4 {
            scene.submit(Kind::Write, tag, &pieces(tag, 8));
        }
        scene.settle();
        restart(&mut scene);
        scene.device.state().at_once = true;
        for n in 0..4 {
            scene.visit();
            assert_eq!(scene.done(), [n]);
        }
    }
}

pub(crate) fn a_failed_resubmission_is_not_repeated<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        send(&mut scene, 0..3);
        scene.settle();
        scene.kill();
        scene.device.state().forget();
        scene.device.state().failing = Some(1);
        scene.start().unwrap();
        scene.settle();
        scene.complete_all();
        // The failed request is answered.
        let expected = [Outcome::Done, Outcome::Failed, Outcome::Done];
        assert_eq!(scene.ended_as(&expected), [0, 1, 2]);
        restart(&mut scene);
        scene.settle();
        assert_eq!(scene.seen(), [0; 0]);
    }
}
