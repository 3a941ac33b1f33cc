//! Chains of up to 1,024 pieces of data, as Windows' driver sends them.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small buffers")]

use std::sync::Arc;

use bdev::{Bdev, Malloc, MallocOptions, Null, NullOptions, Op};
use vhost_target::queue::QueueState;
use virtqueue::Buffer;

use super::disk::{Manual, SECTORS};
use super::scene::{DATA, IN, IOERR, LAYOUTS, OK, OUT, Scene, UNTOUCHED};

/// Long chains that a queue may have in flight.
const LONG_CHAINS: usize = 4;
/// Pieces of a chain that is long, but several of which fit into a visit.
const PIECES: u32 = 140;

fn malloc() -> Arc<dyn Bdev> {
    let options =
        MallocOptions { name: "Malloc0".into(), num_blocks: SECTORS, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

/// Returns pieces of one sector each, with gaps between them.
fn pieces(at: u64, count: u32) -> Vec<(u64, u32)> {
    (0..u64::from(count)).map(|n| (at + 1024 * n, 512)).collect()
}

/// Creates a scene whose requests use the ring itself, which is large, or indirect tables larger
/// than it.
fn long(packed: bool, indirect: bool, bdev: Arc<dyn Bdev>) -> Scene {
    let mut scene = Scene::started_on(packed, if indirect { 64 } else { 2048 }, bdev);
    scene.indirect = indirect;
    scene
}

fn in_every_case(mut test: impl FnMut(bool, bool)) {
    for packed in LAYOUTS {
        test(packed, false);
        test(packed, true);
    }
}

#[test]
fn data_in_a_thousand_pieces_is_written_and_read_back() {
    in_every_case(|packed, indirect| {
        let mut scene = long(packed, indirect, malloc());
        let (from, to) = (pieces(DATA, 1024), pieces(DATA + 0x40_0000, 1024));
        for (n, &(gpa, len)) in from.iter().enumerate() {
            scene.put(gpa, &vec![(n % 251) as u8; len as usize]);
        }
        for round in 0..10 {
            to.iter().for_each(|&(gpa, _)| scene.put(gpa, &[0xff; 1024]));
            let write = scene.send(OUT, round, &from);
            scene.settle();
            assert_eq!(scene.answers(), [(write, OK, 1)]);
            let read = scene.send(IN, round, &to);
            scene.settle();
            assert_eq!(scene.answers(), [(read, OK, 1024 * 512 + 1)]);
            for (n, &(gpa, len)) in to.iter().enumerate() {
                let mut want = vec![(n % 251) as u8; len as usize];
                want.extend([0xff; 512]);
                assert_eq!(scene.get(gpa, 1024), want, "piece {n}");
            }
        }
    });
}

#[test]
fn longer_chains_are_answered_with_errors() {
    for packed in LAYOUTS {
        // In the ring, pieces are counted: 1,034 with header and status.
        let mut scene = long(packed, false, malloc());
        for (count, want) in
            [(1025, (OK, 1)), (1032, (OK, 1)), (1033, (IOERR, 1)), (2000, (IOERR, 1))]
        {
            let n = scene.send(OUT, 0, &pieces(DATA, count));
            scene.settle();
            assert_eq!(scene.answers(), [(n, want.0, want.1)], "{count}, packed: {packed}");
        }
        // In a table, descriptors are counted before any of them is read.
        let mut scene = long(packed, true, malloc());
        let n = scene.send(OUT, 0, &pieces(DATA, 1025));
        scene.settle();
        assert_eq!(scene.answers(), [(n, UNTOUCHED, 0)]);
        assert_eq!(scene.queue().control().requests(), (1, 1));
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
    }
}

#[test]
fn requests_with_too_much_data_are_answered_with_errors() {
    for packed in LAYOUTS {
        let options =
            NullOptions { name: "n".into(), num_blocks: 4 << 21, block_size: 512, uuid: None };
        let mut scene = long(packed, false, Null::create(options).unwrap());
        // All pieces are at the same address.
        let mib = |count| vec![(DATA, 1 << 20); count];
        for kind in [IN, OUT] {
            let most = scene.send(kind, 0, &mib(1024));
            scene.settle();
            let written = if kind == IN { (1 << 30) + 1 } else { 1 };
            assert_eq!(scene.answers(), [(most, OK, written)]);
            let more = scene.send(kind, 0, &[&mib(1024)[..], &[(DATA, 512)]].concat());
            scene.settle();
            assert!(matches!(scene.answers()[..], [(n, IOERR, _)] if n == more));
        }
    }
}

/// Offers long (`true`) and short writes, each at its own sector.
fn offer(scene: &mut Scene, kinds: &[bool]) -> Vec<usize> {
    let send = |(n, &long): (usize, &bool)| {
        let count = if long { PIECES } else { 1 };
        scene.send(OUT, 200 * n as u64, &pieces(DATA, count))
    };
    kinds.iter().enumerate().map(send).collect()
}

/// Returns the requests that the disk has seen since the last call, by their index in [`offer`].
fn seen(disk: &Manual) -> Vec<u64> {
    let seen = std::mem::take(&mut disk.state().seen);
    seen.into_iter().map(|(_, offset, _)| offset / 512 / 200).collect()
}

#[test]
fn further_long_chains_wait_for_room_and_delay_later_requests() {
    in_every_case(|packed, indirect| {
        let disk = Manual::create();
        let mut scene = long(packed, indirect, Arc::clone(&disk) as Arc<dyn Bdev>);
        for _ in 0..3 {
            let kinds = [true, false, true, true, true, false, true, false, true];
            let sent = offer(&mut scene, &kinds);
            scene.settle();
            assert_eq!(
                seen(&disk),
                [0, 1, 2, 3, 4, 5],
                "four long requests, and the short ones between them"
            );
            disk.state().complete(1);
            scene.settle();
            assert_eq!(scene.answers(), [(sent[1], OK, 1)]);
            assert_eq!(seen(&disk), [0; 0], "a short request frees no room for a long one");
            disk.state().complete(2);
            scene.settle();
            assert_eq!(scene.answers(), [(sent[3], OK, 1)]);
            assert_eq!(seen(&disk), [6, 7]);
            disk.state().complete_all();
            scene.settle();
            assert_eq!(seen(&disk), [8]);
            disk.state().complete_all();
            scene.settle();
            let mut answers = scene.answers();
            answers.sort_unstable();
            let want = [0, 2, 4, 5, 6, 7, 8].map(|n| (sent[n], OK, 1));
            assert_eq!(answers, want);
        }
    });
}

#[test]
fn a_reactor_sleeps_while_a_long_chain_waits_for_room() {
    in_every_case(|packed, indirect| {
        let disk = Manual::create();
        let size = if indirect { 64 } else { 2048 };
        let mut scene = Scene::on(packed, size, Arc::clone(&disk) as Arc<dyn Bdev>);
        scene.indirect = indirect;
        let (reactor, mut steps) = scene.start_to_sleep();
        let mut settle = || assert!((0..100).any(|_| steps.step()), "the reactor does not sleep");
        settle();
        let sent = offer(&mut scene, &[true; LONG_CHAINS + 1]);
        reactor.wake();
        settle();
        assert_eq!(seen(&disk), [0, 1, 2, 3]);
        disk.state().complete(0);
        reactor.wake();
        settle();
        assert_eq!(seen(&disk), [4]);
        disk.state().complete_all();
        reactor.wake();
        settle();
        assert_eq!(scene.answers().len(), sent.len());
    });
}

/// Checks that the queue has room for as many long chains as before.
fn assert_room(scene: &mut Scene, disk: &Manual, after: &str) {
    seen(disk);
    offer(scene, &[true; LONG_CHAINS + 1]);
    scene.settle();
    assert_eq!(disk.state().waiting(), LONG_CHAINS, "after {after}");
    for _ in 0..2 {
        disk.state().complete_all();
        scene.settle();
    }
    assert_eq!(scene.answers().len(), LONG_CHAINS + 1, "after {after}");
    assert_eq!(scene.outstanding(), 0);
}

#[test]
fn room_is_freed_however_a_request_ends() {
    in_every_case(|packed, indirect| {
        let disk = Manual::create();
        let mut scene = long(packed, indirect, Arc::clone(&disk) as Arc<dyn Bdev>);
        let many = pieces(DATA, PIECES);
        // Answered without I/O: an unknown type, a sector beyond the disk, too little data, no
        // header, no place for a status.
        for _ in 0..2 * LONG_CHAINS {
            scene.send(99, 0, &many);
            scene.send(OUT, SECTORS, &many);
            scene.send(OUT, 0, &[&many[..], &[(DATA, 1)]].concat());
            let piece = |write| move |&(gpa, _): &_| Buffer { gpa, len: 1, write };
            scene.send_raw(&many[..].iter().map(piece(false)).collect::<Vec<_>>());
            let mut backwards: Vec<_> = many[..].iter().map(piece(true)).collect();
            backwards.extend(many.iter().map(piece(false)));
            scene.send_raw(&backwards);
            scene.settle();
            assert_eq!(scene.answers().len(), 5);
        }
        assert_eq!(seen(&disk), [0; 0]);
        assert_room(&mut scene, &disk, "refusals");
        // Too many pieces.
        for _ in 0..2 * LONG_CHAINS {
            scene.send(OUT, 0, &pieces(DATA, 1033));
            scene.settle();
            assert_eq!(scene.answers().len(), 1);
        }
        assert_room(&mut scene, &disk, "chains that are too long");
        // The disk fails.
        for _ in 0..2 * LONG_CHAINS {
            disk.state().failing = Some(0);
            disk.state().seen.clear();
            let n = scene.send(OUT, 0, &many);
            scene.settle();
            disk.state().complete_all();
            scene.settle();
            assert_eq!(scene.answers(), [(n, IOERR, 1)]);
        }
        disk.state().failing = None;
        assert_room(&mut scene, &disk, "I/O that failed");
        // The channel is full: the first request is parked, the later ones are not taken from the
        // ring.
        for _ in 0..LONG_CHAINS {
            seen(&disk);
            disk.state().room = Some(1);
            offer(&mut scene, &[true, true, true, false, true]);
            scene.settle();
            assert_eq!(disk.state().waiting(), 1);
            disk.state().room = None;
            scene.settle();
            assert_eq!(seen(&disk), [0, 1, 2, 3, 4]);
            disk.state().complete_all();
            scene.settle();
            assert_eq!(scene.answers().len(), 5);
        }
        assert_room(&mut scene, &disk, "a full channel");
    });
}

#[test]
fn a_stop_waits_for_taken_requests() {
    in_every_case(|packed, indirect| {
        let disk = Manual::create();
        let mut scene = long(packed, indirect, Arc::clone(&disk) as Arc<dyn Bdev>);
        offer(&mut scene, &[true; LONG_CHAINS]);
        let position = scene.position();
        offer(&mut scene, &[true, false]);
        scene.settle();
        scene.queue().control().stop();
        scene.visit();
        assert_eq!(scene.queue().control().state(), QueueState::Attached);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert_eq!(scene.queue().control().last_avail(), position);
        assert_eq!((scene.answers().len(), scene.outstanding()), (LONG_CHAINS, 2));
        // The next process that uses the ring takes the rest.
        scene.base = position;
        scene.start().unwrap();
        scene.settle();
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.outstanding(), scene.answers().len());
        assert!(disk.state().seen.iter().all(|&(op, ..)| op == Op::Write));
    });
}
