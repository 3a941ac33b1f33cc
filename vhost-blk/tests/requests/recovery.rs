//! Queues that are discarded with I/O in flight, as by a kill, and the queues that continue after
//! them.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bdev::{Bdev, Op};
use vhost_target::queue::Event;
use vhost_target::queue::{QueueState, StartError};

use super::disk::Manual;
use super::scene::{DATA, IN, LAYOUTS, OK, OUT, Scene};

const PIECE: [(u64, u32); 1] = [(DATA, 512)];

fn tracked(packed: bool, size: u16) -> (Scene, Arc<Manual>) {
    let disk = Manual::create();
    let mut scene = Scene::new(packed, size, Arc::clone(&disk) as Arc<dyn Bdev>);
    scene.track(size);
    scene.start().unwrap();
    (scene, disk)
}

/// Simulates a restart: the disk has no I/O in flight.
fn restart(scene: &mut Scene, disk: &Manual) {
    scene.kill();
    disk.state().forget();
    scene.start().unwrap();
}

/// Offers writes to `sectors`.
fn send(scene: &mut Scene, sectors: std::ops::Range<u64>) {
    for sector in sectors {
        scene.send(OUT, sector, &PIECE);
    }
}

/// Returns the sectors of the writes that the disk has seen since the last call.
fn seen(disk: &Manual) -> Vec<u64> {
    std::mem::take(&mut disk.state().seen).into_iter().map(|(_, at, _)| at / 512).collect()
}

/// Returns the numbers of the requests that were completed. Asserts that they succeeded.
fn done(scene: &mut Scene) -> Vec<usize> {
    let answers = scene.answers();
    assert!(answers.iter().all(|&(_, status, _)| status == OK), "{answers:?}");
    answers.into_iter().map(|(n, ..)| n).collect()
}

#[test]
fn requests_in_flight_are_resubmitted_in_order_before_new_ones() {
    for packed in LAYOUTS {
        for indirect in [false, true] {
            let (mut scene, disk) = tracked(packed, 64);
            scene.indirect = indirect;
            send(&mut scene, 0..7);
            scene.settle();
            // They complete out of order, in two batches.
            disk.state().complete(5);
            disk.state().complete(1);
            scene.settle();
            disk.state().complete(2);
            scene.settle();
            assert_eq!(done(&mut scene), [5, 1, 3]);
            disk.state().complete(0); // never seen by the queue
            send(&mut scene, 7..10);
            restart(&mut scene, &disk);
            scene.visit();
            assert_eq!(seen(&disk), [0, 2, 4, 6]);
            assert_eq!(done(&mut scene), [0; 0]);
            scene.settle();
            assert_eq!(seen(&disk), [7, 8, 9]);
            // A second kill, after some requests of each batch have completed.
            disk.state().complete(5);
            disk.state().complete(0);
            scene.settle();
            assert_eq!(done(&mut scene), [8, 0]);
            restart(&mut scene, &disk);
            scene.settle();
            assert_eq!(seen(&disk), [2, 4, 6, 7, 9]);
            disk.state().complete_all();
            scene.settle();
            assert_eq!(done(&mut scene), [2, 4, 6, 7, 9]);
            // Nothing is left for the next process to resubmit.
            restart(&mut scene, &disk);
            scene.settle();
            assert_eq!((seen(&disk), scene.outstanding()), (vec![], 0));
            send(&mut scene, 0..3);
            disk.state().at_once = true;
            scene.settle();
            assert_eq!(done(&mut scene), [10, 11, 12]);
        }
    }
}

#[test]
fn kills_after_every_visit_lose_and_repeat_nothing() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 32);
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
                    scene.send(if below(2) == 0 { IN } else { OUT }, below(64), &PIECE);
                    sent += 1;
                }
            }
            disk.state().room = (below(3) == 0).then_some(below(3) as usize);
            scene.visit();
            let waiting = disk.state().waiting() as u64;
            for left in (1..=waiting).rev().take(below(4) as usize) {
                let nth = below(left) as usize;
                disk.state().complete(nth);
            }
            if below(2) == 0 {
                scene.visit();
            }
            for n in done(&mut scene) {
                came[n] += 1;
            }
            if below(5) == 0 {
                restart(&mut scene, &disk);
            }
        }
        // The driver asserts that no chain is returned twice.
        assert_eq!(came, vec![1; 3000]);
    }
}

#[test]
fn long_chains_are_resubmitted_with_their_data() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        scene.indirect = true;
        let pieces: Vec<_> = (0..1024).map(|n| (DATA + 1024 * n, 512)).collect();
        for _ in 0..6 {
            scene.send(OUT, 0, &pieces);
        }
        scene.settle();
        assert_eq!(disk.state().waiting(), 4);
        for _ in 0..2 {
            restart(&mut scene, &disk);
            scene.settle();
            assert_eq!(disk.state().seen, [(Op::Write, 0, 1024 * 512); 4]);
        }
        for count in [4, 2] {
            disk.state().complete_all();
            scene.settle();
            assert_eq!(done(&mut scene).len(), count);
        }
    }
}

#[test]
fn a_full_channel_delays_resubmission() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        send(&mut scene, 0..5);
        scene.settle();
        send(&mut scene, 5..7);
        restart(&mut scene, &disk);
        disk.state().room = Some(2);
        scene.settle();
        assert_eq!(seen(&disk), [0, 1]);
        disk.state().room = None;
        scene.settle();
        assert_eq!(seen(&disk), [2, 3, 4, 5, 6]);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(done(&mut scene).len(), 7);
    }
}

#[test]
fn a_stop_before_the_first_visit_waits_for_resubmission() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        send(&mut scene, 0..3);
        let position = scene.position();
        scene.settle();
        send(&mut scene, 3..5);
        restart(&mut scene, &disk);
        scene.queue().control().stop();
        disk.state().room = Some(1);
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        disk.state().room = None;
        scene.settle();
        assert_eq!(seen(&disk), [0, 1, 2], "no new request is submitted");
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(scene.queue().control().last_avail(), position);
        assert_eq!(done(&mut scene), [0, 1, 2]);
        // The area is valid for the next process.
        restart(&mut scene, &disk);
        scene.settle();
        assert_eq!(seen(&disk), [3, 4]);
    }
}

#[test]
fn a_reset_drops_requests_that_were_not_resubmitted() {
    for packed in LAYOUTS {
        for begun in [0, 1] {
            let (mut scene, disk) = tracked(packed, 64);
            send(&mut scene, 0..5);
            scene.settle();
            send(&mut scene, 5..7);
            restart(&mut scene, &disk);
            disk.state().room = Some(1);
            for _ in 0..begun {
                scene.visit();
            }
            scene.queue().control().reset();
            disk.state().room = None;
            for _ in 0..2 {
                scene.settle();
                let begun = disk.state().waiting() > 0;
                assert_eq!(scene.queue().control().state() == QueueState::Attached, begun);
                disk.state().complete_all();
            }
            scene.settle();
            assert_eq!(scene.queue().control().state(), QueueState::Stopped);
            // The second request was parked.
            assert_eq!(seen(&disk), (0..2 * begun).collect::<Vec<_>>());
        }
    }
}

/// More requests than a visit takes, none of which is in flight afterwards.
#[test]
fn a_stop_waits_for_resubmissions_of_later_visits() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 256);
        send(&mut scene, 0..40);
        scene.settle();
        restart(&mut scene, &disk);
        disk.state().at_once = true;
        scene.queue().control().stop();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(done(&mut scene), (0..40).collect::<Vec<_>>());
    }
}

/// As for new requests: the limit is the number of bytes that a memory disk has to copy.
#[test]
fn a_visit_is_bounded_in_bytes() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        for _ in 0..8 {
            scene.send(OUT, 0, &[(DATA, 256 << 10)]);
        }
        scene.settle();
        restart(&mut scene, &disk);
        disk.state().at_once = true;
        scene.visit();
        assert_eq!(done(&mut scene), [0, 1, 2]);
        scene.settle();
        assert_eq!(done(&mut scene), [3, 4, 5, 6, 7]);
    }
}

#[test]
fn a_visit_is_bounded_in_pieces() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        scene.indirect = true;
        let pieces: Vec<_> = (0..1024).map(|n| (DATA + 1024 * n, 8)).collect();
        for _ in 0..4 {
            scene.send(OUT, 0, &pieces);
        }
        scene.settle();
        restart(&mut scene, &disk);
        disk.state().at_once = true;
        for n in 0..4 {
            scene.visit();
            assert_eq!(done(&mut scene), [n]);
        }
    }
}

#[test]
fn a_failed_resubmission_is_not_repeated() {
    for packed in LAYOUTS {
        let (mut scene, disk) = tracked(packed, 64);
        send(&mut scene, 0..3);
        scene.settle();
        scene.kill();
        disk.state().forget();
        disk.state().failing = Some(1);
        scene.start().unwrap();
        scene.settle();
        disk.state().complete_all();
        scene.settle();
        let statuses: Vec<_> = scene.answers().iter().map(|&(_, status, _)| status).collect();
        assert_eq!(statuses, [0, 1, 0], "the failed request is answered");
        restart(&mut scene, &disk);
        scene.settle();
        assert_eq!(seen(&disk), [0; 0]);
    }
}

/// With any contents of the area, the queue does not panic, and it can be stopped.
#[test]
fn invalid_contents_of_the_area_break_only_its_queue() {
    for packed in LAYOUTS {
        for seed in 1..400_u64 {
            let (mut scene, disk) = tracked(packed, 16);
            send(&mut scene, 0..5);
            scene.settle();
            let mut word = seed;
            let area = &scene.area.as_ref().unwrap().1;
            let mut bytes = vec![0; 16 * 33];
            area.read_exact_at(&mut bytes, 0).unwrap();
            for (n, byte) in bytes.iter_mut().enumerate() {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                // Version and size mostly stay valid, so that the rest is used.
                let kept = (8..12).contains(&n) && seed % 8 != 0;
                if !kept && (word >> 40) % 8 < seed % 9 {
                    *byte = ((word >> 56) % (1 << (seed % 8 + 1))) as u8;
                }
            }
            area.write_all_at(&bytes, 0).unwrap();
            if seed % 3 > 0 {
                scene.kill();
                disk.state().forget();
                if let Err(error) = scene.start() {
                    assert!(matches!(error, StartError::NoRoom | StartError::Base(_)));
                    continue;
                }
            }
            for _ in 0..20 {
                scene.visit();
                disk.state().complete_all();
            }
            scene.queue().control().stop();
            for _ in 0..20 {
                scene.visit();
                disk.state().complete_all();
            }
            assert_eq!(scene.queue().control().state(), QueueState::Stopped, "seed {seed}");
        }
    }
}

#[test]
fn an_invalid_free_list_breaks_the_queue() {
    let (mut scene, disk) = tracked(true, 16);
    send(&mut scene, 0..2);
    scene.settle();
    // All entries but those of the first two chains are free: their links lead out of the area.
    let area = &scene.area.as_ref().unwrap().1;
    for entry in 6..16 {
        area.write_all_at(&[0xff; 2], 32 + 32 * entry + 2).unwrap();
    }
    send(&mut scene, 2..4);
    scene.settle();
    assert_eq!(scene.queue().control().state(), QueueState::Broken);
    assert!(matches!(scene.events.pop(), Some(Event::Broken(_))));
    assert_eq!(seen(&disk), [0, 1]);
    disk.state().complete_all();
    scene.settle();
    assert_eq!(done(&mut scene), [0, 1], "started requests are answered");
    scene.queue().control().stop();
    scene.settle();
    assert_eq!(scene.queue().control().state(), QueueState::Stopped);
}

#[test]
fn an_area_for_other_rings_is_refused() {
    for packed in LAYOUTS {
        let (mut scene, _disk) = tracked(packed, 64);
        scene.kill();
        scene.track(32);
        assert!(matches!(scene.start(), Err(StartError::NoRoom)));
        scene.track(128);
        scene.start().unwrap();
    }
}

/// GET_VRING_BASE of a ring that has wrapped around, and a queue that starts at that position.
#[test]
fn the_reported_position_is_the_driver_s() {
    for (packed, size) in [(false, 8), (true, 8), (true, 7)] {
        for track in [false, true] {
            let disk = Manual::create();
            disk.state().at_once = true;
            let mut scene = Scene::new(packed, size, Arc::clone(&disk) as Arc<dyn Bdev>);
            if track {
                scene.track(size);
            }
            scene.base = scene.position();
            for round in 0..50_u64 {
                scene.start().unwrap();
                for _ in 0..round % 5 {
                    scene.send(OUT, 0, &PIECE);
                    scene.settle();
                    assert_eq!(done(&mut scene).len(), 1);
                }
                scene.queue().control().stop();
                scene.settle();
                assert_eq!(scene.queue().control().state(), QueueState::Stopped);
                assert_eq!(scene.queue().control().last_avail(), scene.position(), "round {round}");
                scene.base = scene.position();
            }
        }
    }
}
