//! Discards and write-zeroes of several ranges.

use std::sync::Arc;

use bdev::{Bdev, Op};

use super::disk::{Manual, SECTORS};
use super::scene::{Answer, DATA, DISCARD, IN, IOERR, LAYOUTS, OK, Scene, UNSUPP, WRITE_ZEROES};

/// How the disk completes I/O.
#[derive(Clone, Copy, Debug)]
struct Pace {
    at_once: bool,
    /// Whether the channel is full each time that an I/O has ended.
    full: bool,
}

const PACES: [Pace; 4] = [
    Pace { at_once: true, full: false },
    Pace { at_once: true, full: true },
    Pace { at_once: false, full: false },
    Pace { at_once: false, full: true },
];

/// Visits until `count` requests have been answered.
fn answers(scene: &mut Scene, disk: &Manual, pace: Pace, count: usize) -> Vec<Answer> {
    let mut answers = vec![];
    for visit in 0..200 {
        disk.state().room = pace.full.then_some(visit % 2);
        scene.visit();
        disk.state().complete_all();
        answers.extend(scene.answers());
        if answers.len() == count {
            break;
        }
    }
    disk.state().room = None;
    scene.settle();
    answers.extend(scene.answers());
    assert_eq!(scene.queue().control().inflight(), 0, "{pace:?}");
    answers
}

fn in_every_case(mut test: impl FnMut(&mut Scene, &Manual, Pace)) {
    for packed in LAYOUTS {
        for pace in PACES {
            let disk = Manual::create();
            disk.state().at_once = pace.at_once;
            let mut scene = Scene::started_on(packed, 64, Arc::clone(&disk) as Arc<dyn Bdev>);
            test(&mut scene, &disk, pace);
        }
    }
}

/// Returns the I/Os that the disk has seen since the last call, in sectors.
fn seen(disk: &Manual) -> Vec<(Op, u64, u64)> {
    let seen = std::mem::take(&mut disk.state().seen);
    seen.into_iter().map(|(op, offset, len)| (op, offset / 512, len / 512)).collect()
}

const KINDS: [(u32, Op); 2] = [(DISCARD, Op::Unmap), (WRITE_ZEROES, Op::WriteZeroes)];

/// Returns ranges that differ in place and length and are not sorted.
fn ranges(count: usize) -> Vec<(u64, u32, u32)> {
    (0_u32..).take(count).map(|n| ((u64::from(n) * 37 + 5) % 101, n + 1, 0)).collect()
}

#[test]
fn all_ranges_are_done_in_order_and_answered_once() {
    in_every_case(|scene, disk, pace| {
        for (kind, op) in KINDS {
            for count in 1..=16 {
                let ranges = ranges(count);
                let n = scene.send_ranges(kind, &ranges);
                assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)], "{count}, {pace:?}");
                let want: Vec<_> =
                    ranges.iter().map(|&(sector, len, _)| (op, sector, len.into())).collect();
                assert_eq!(seen(disk), want, "{pace:?}");
            }
        }
    });
}

#[test]
fn an_invalid_range_refuses_the_request() {
    in_every_case(|scene, disk, pace| {
        let bad = [
            (DISCARD, (SECTORS, 1, 0), IOERR),
            (DISCARD, (u64::MAX, 1, 0), IOERR),
            (DISCARD, (0, u32::MAX, 0), IOERR),
            (DISCARD, (0, 1, 1), UNSUPP),
            (WRITE_ZEROES, (SECTORS - 1, 2, 0), IOERR),
            (WRITE_ZEROES, (0, 1, 2), UNSUPP),
        ];
        for (kind, range, want) in bad {
            for at in [0, 1, 7, 15] {
                let mut ranges = ranges(16);
                ranges[at] = range;
                let n = scene.send_ranges(kind, &ranges);
                assert_eq!(answers(scene, disk, pace, 1), [(n, want, 1)], "{range:?} at {at}");
            }
        }
        let n = scene.send_ranges(DISCARD, &ranges(17));
        assert_eq!(answers(scene, disk, pace, 1), [(n, IOERR, 1)]);
        assert_eq!(seen(disk), [], "no range was submitted");
        // The ranges of a refused request are not used by the next request in the same slot.
        let n = scene.send_ranges(DISCARD, &[(9, 1, 0)]);
        assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)]);
        assert_eq!(seen(disk), [(Op::Unmap, 9, 1)]);
    });
}

#[test]
fn empty_ranges_are_skipped() {
    in_every_case(|scene, disk, pace| {
        for (kind, op) in KINDS {
            let n = scene.send_ranges(kind, &[(3, 0, 0), (4, 0, 0)]);
            assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)]);
            assert_eq!(seen(disk), []);
            let n = scene.send_ranges(kind, &[(3, 0, 0), (4, 2, 0), (SECTORS, 0, 0), (8, 1, 0)]);
            assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)]);
            assert_eq!(seen(disk), [(op, 4, 2), (op, 8, 1)]);
        }
    });
}

#[test]
fn after_a_failure_the_remaining_ranges_are_not_done() {
    in_every_case(|scene, disk, pace| {
        for (kind, op) in KINDS {
            for failing in 0..4 {
                disk.state().failing = Some(failing);
                let ranges = ranges(4);
                let n = scene.send_ranges(kind, &ranges);
                assert_eq!(answers(scene, disk, pace, 1), [(n, IOERR, 1)], "{failing}, {pace:?}");
                let want = ranges[..=failing].iter().map(|&(at, len, _)| (op, at, len.into()));
                assert_eq!(seen(disk), want.collect::<Vec<_>>());
                disk.state().failing = None;
                // The next request does not submit them either.
                let n = scene.send_ranges(kind, &[(50, 1, 0)]);
                assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)]);
                assert_eq!(seen(disk), [(op, 50, 1)]);
            }
        }
    });
}

#[test]
fn concurrent_requests_keep_their_own_ranges() {
    in_every_case(|scene, disk, pace| {
        let mut want = vec![];
        for n in 0..4 {
            want.push((scene.send_ranges(DISCARD, &ranges(3 + n)), OK, 1));
            want.push((scene.send(IN, 0, &[(DATA, 512)]), OK, 513));
            want.push((scene.send_ranges(WRITE_ZEROES, &ranges(16)), OK, 1));
        }
        let mut answers = answers(scene, disk, pace, want.len());
        answers.sort_unstable();
        assert_eq!(answers, want, "{pace:?}");
        assert_eq!(seen(disk).len(), 3 + 4 + 5 + 6 + 4 + 4 * 16);
    });
}

#[test]
fn a_stop_waits_for_all_ranges() {
    in_every_case(|scene, disk, pace| {
        let n = scene.send_ranges(DISCARD, &ranges(5));
        disk.state().room = Some(1);
        scene.visit();
        scene.queue().control().stop();
        assert_eq!(answers(scene, disk, pace, 1), [(n, OK, 1)]);
        assert_eq!(seen(disk).len(), 5);
        assert_eq!(scene.queue().control().state(), vhost_target::queue::QueueState::Stopped);
    });
}
