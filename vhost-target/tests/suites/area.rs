//! In-flight areas with invalid contents, areas for other rings, and the position that a queue
//! reports.

use std::os::unix::fs::FileExt;

use vhost_target::queue::{QueueState, StartError};

use super::device::{Kind, TestDevice};
use super::recovery::{send, tracked};
use super::scene::{DATA, LAYOUTS, Scene};

/// With any contents of the area, the queue does not panic, and it can be stopped.
pub(crate) fn invalid_contents_of_the_area_break_only_its_queue<D: TestDevice>() {
    for packed in LAYOUTS {
        for seed in 1..400_u64 {
            let mut scene = tracked::<D>(packed, 16);
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
                scene.device.state().forget();
                if let Err(error) = scene.start() {
                    assert!(matches!(error, StartError::NoRoom | StartError::Base(_)));
                    continue;
                }
            }
            for _ in 0..20 {
                scene.visit();
                scene.device.state().complete_all();
            }
            scene.queue().control().stop();
            for _ in 0..20 {
                scene.visit();
                scene.device.state().complete_all();
            }
            assert_eq!(scene.queue().control().state(), QueueState::Stopped, "seed {seed}");
        }
    }
}

pub(crate) fn an_invalid_free_list_breaks_the_queue<D: TestDevice>() {
    let mut scene = tracked::<D>(true, 16);
    send(&mut scene, 0..2);
    scene.settle();
    // All entries but those of the first two chains are free: their links lead out of the area.
    let area = &scene.area.as_ref().unwrap().1;
    for entry in scene.places()..16 {
        area.write_all_at(&[0xff; 2], 32 + 32 * entry + 2).unwrap();
    }
    send(&mut scene, 2..4);
    scene.settle();
    scene.assert_broken();
    assert_eq!(scene.seen(), [0, 1]);
    scene.complete_all();
    assert_eq!(scene.done(), [0, 1], "started requests are answered");
    scene.stop();
}

pub(crate) fn an_area_for_other_rings_is_refused<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene = tracked::<D>(packed, 64);
        scene.kill();
        scene.track(32);
        assert!(matches!(scene.start(), Err(StartError::NoRoom)));
        scene.track(128);
        scene.start().unwrap();
    }
}

/// GET_VRING_BASE of a ring that has wrapped around, and a queue that starts at that position.
pub(crate) fn the_reported_position_is_the_driver_s<D: TestDevice>() {
    for (packed, size) in [(false, 8), (true, 8), (true, 7)] {
        for track in [false, true] {
            let mut scene = Scene::new(packed, size, D::create());
            scene.device.state().at_once = true;
            if track {
                scene.track(size);
            }
            scene.base = scene.position();
            for round in 0..50_u64 {
                scene.start().unwrap();
                for _ in 0..round % 5 {
                    let n = scene.next() as u64;
                    scene.submit(Kind::Write, n, &[(DATA, 512)]);
                    scene.settle();
                    assert_eq!(scene.done().len(), 1);
                }
                scene.stop();
                assert_eq!(scene.queue().control().last_avail(), scene.position(), "round {round}");
                scene.base = scene.position();
            }
        }
    }
}
