//! Writes that are durable when they are answered.

use std::sync::Arc;

use bdev::{Bdev, Op};
use vhost_target::queue::QueueState;

use super::disk::Manual;
use super::scene::{DATA, DISCARD, FLUSH, IN, IOERR, LAYOUTS, OK, OUT, Scene, WRITE_ZEROES};

fn in_every_case(mut test: impl FnMut(&mut Scene, &Manual)) {
    for packed in LAYOUTS {
        let disk = Manual::create();
        let mut scene = Scene::on(packed, 64, Arc::clone(&disk) as Arc<dyn Bdev>);
        scene.device.write_through = true;
        scene.start().unwrap();
        test(&mut scene, &disk);
    }
}

fn ops(disk: &Manual) -> Vec<Op> {
    std::mem::take(&mut disk.state().seen).into_iter().map(|(op, ..)| op).collect()
}

const PIECE: [(u64, u32); 1] = [(DATA, 512)];

#[test]
fn a_write_completes_after_its_flush() {
    in_every_case(|scene, disk| {
        let n = scene.send(OUT, 0, &PIECE);
        scene.settle();
        disk.state().complete_all();
        scene.settle();
        assert_eq!(ops(disk), [Op::Write, Op::Flush]);
        assert_eq!(scene.answers(), [], "the flush is in flight");
        assert_eq!(scene.queue().control().inflight(), 1);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.answers(), [(n, OK, 1)]);
        assert_eq!(ops(disk), []);
        disk.state().at_once = true;
        let n = scene.send(OUT, 0, &PIECE);
        scene.settle();
        assert_eq!(ops(disk), [Op::Write, Op::Flush]);
        assert_eq!(scene.answers(), [(n, OK, 1)]);
    });
}

/// Write-zeroes are writes, too. A discard writes no data that could be lost.
#[test]
fn write_zeroes_are_flushed_after_their_last_range() {
    in_every_case(|scene, disk| {
        let ranges = [(1, 1, 0), (5, 2, 0)];
        for at_once in [false, true] {
            disk.state().at_once = at_once;
            for (kind, op, flushes) in [(WRITE_ZEROES, Op::WriteZeroes, 1), (DISCARD, Op::Unmap, 0)]
            {
                let n = scene.send_ranges(kind, &ranges);
                for _ in 0..4 {
                    scene.settle();
                    disk.state().complete_all();
                }
                assert_eq!(scene.answers(), [(n, OK, 1)]);
                let mut want = vec![op; 2];
                want.extend(vec![Op::Flush; flushes]);
                assert_eq!(ops(disk), want);
            }
        }
    });
}

#[test]
fn a_failure_is_reported_and_ends_the_request() {
    in_every_case(|scene, disk| {
        for at_once in [false, true] {
            disk.state().at_once = at_once;
            for (failing, want) in [(0, &[Op::Write][..]), (1, &[Op::Write, Op::Flush])] {
                disk.state().failing = Some(failing);
                let n = scene.send(OUT, 0, &PIECE);
                for _ in 0..3 {
                    scene.settle();
                    disk.state().complete_all();
                }
                assert_eq!(scene.answers(), [(n, IOERR, 1)]);
                assert_eq!(ops(disk), want);
                assert_eq!(scene.queue().control().inflight(), 0);
            }
        }
    });
}

#[test]
fn other_requests_are_not_flushed() {
    in_every_case(|scene, disk| {
        disk.state().at_once = true;
        scene.send(IN, 0, &PIECE);
        scene.send(FLUSH, 0, &[]);
        scene.settle();
        assert_eq!(scene.answers().len(), 2);
        assert_eq!(ops(disk), [Op::Read, Op::Flush]);
    });
}

#[test]
fn a_flush_without_room_is_retried() {
    in_every_case(|scene, disk| {
        let n = scene.send(OUT, 0, &PIECE);
        disk.state().room = Some(1);
        scene.settle();
        disk.state().complete_all();
        scene.settle();
        assert_eq!(ops(disk), [Op::Write]);
        scene.queue().control().stop();
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        disk.state().room = None;
        scene.settle();
        assert_eq!((ops(disk), scene.answers()), (vec![Op::Flush], vec![]));
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.answers(), [(n, OK, 1)]);
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
    });
}

/// Requests in flight are not affected when the guest switches its cache.
#[test]
fn a_change_applies_to_later_writes() {
    in_every_case(|scene, disk| {
        scene.send(OUT, 0, &PIECE);
        scene.settle();
        scene.device.write_through = false;
        let memory = Arc::clone(&scene.memory);
        let _retired = scene.publish(&memory);
        scene.send(OUT, 0, &PIECE);
        scene.settle();
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.answers().len(), 1);
        assert_eq!(ops(disk), [Op::Write, Op::Write, Op::Flush]);
        disk.state().complete_all();
        scene.settle();
        assert_eq!((scene.answers().len(), ops(disk)), (1, vec![]));
    });
}
