//! Rate limits that come, go and are reached while requests are in flight.
//!
//! Most tests first send one request of 1 GiB. At 1 MiB/s it takes 17 minutes to pay its debt, so
//! later requests stay throttled however long the test takes.

use std::sync::Arc;

use bdev::{Bdev, Malloc, MallocOptions, Op, Part, Passthru, RateLimits};

use super::disk::Manual;
use super::scene::{DATA, FLUSH, IN, IOERR, LAYOUTS, OK, OUT, Scene};

const READS: RateLimits = limits(0, 1, 0);
const WRITES: RateLimits = limits(0, 0, 1);
const BOTH: RateLimits = limits(1, 0, 0);
const NONE: RateLimits = limits(0, 0, 0);

const fn limits(rw: u64, r: u64, w: u64) -> RateLimits {
    let (rw_mbytes_per_sec, r_mbytes_per_sec, w_mbytes_per_sec) = (rw, r, w);
    RateLimits { rw_ios_per_sec: 0, rw_mbytes_per_sec, r_mbytes_per_sec, w_mbytes_per_sec }
}

/// One sector of data.
const SECTOR: &[(u64, u32)] = &[(DATA, 512)];

/// A guest and a disk whose I/O completes at once.
fn scene(packed: bool) -> (Scene, Arc<Manual>) {
    let disk = Manual::large();
    disk.state().at_once = true;
    (Scene::started_on(packed, 64, disk.clone()), disk)
}

/// Sets limits on a disk, while the guest's queue runs.
fn limit(scene: &mut Scene, disk: &dyn Bdev, limits: RateLimits) {
    disk.qos().set_limits(limits);
    let memory = Arc::clone(&scene.memory);
    scene.publish(&memory);
    scene.visit();
}

/// Sends a request of so many MiB. All of its pieces are at the same address.
fn exhaust_mib(scene: &mut Scene, kind: u32, mib: usize) {
    scene.indirect = true;
    scene.send(kind, 0, &vec![(DATA + 0x1000, 1 << 20); mib]);
    scene.indirect = false;
    // A long copy takes several visits.
    while scene.answers().is_empty() {
        scene.visit();
    }
}

/// Sends a request of a gigabyte.
fn exhaust(scene: &mut Scene, kind: u32) {
    exhaust_mib(scene, kind, 1024);
}

fn numbers(scene: &mut Scene) -> Vec<usize> {
    scene
        .answers()
        .iter()
        .map(|&(n, status, _)| if status == OK { n } else { usize::MAX })
        .collect()
}

#[test]
fn requests_wait_until_the_limit_goes_and_keep_their_order() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        limit(&mut scene, &*disk, BOTH);
        exhaust(&mut scene, OUT);
        let sent = [(); 3].map(|()| scene.send(OUT, 1, SECTOR));
        let worked = [(); 3].map(|()| scene.visit());
        assert_eq!(worked, [true, false, false]);
        assert_eq!(numbers(&mut scene), [0; 0]);
        assert_eq!(scene.queue().control().inflight(), 3);
        // Setting the same limit again releases nothing.
        limit(&mut scene, &*disk, BOTH);
        assert_eq!(numbers(&mut scene), [0; 0]);
        limit(&mut scene, &*disk, NONE);
        scene.settle();
        assert_eq!(numbers(&mut scene), sent, "{packed}");
        assert_eq!(scene.queue().control().inflight(), 0);
    }
}

#[test]
fn a_limit_of_reads_does_not_hold_writes_up_and_nothing_holds_up_a_flush() {
    for packed in LAYOUTS {
        for (limits, limited, free) in [(READS, IN, OUT), (WRITES, OUT, IN)] {
            let (mut scene, disk) = scene(packed);
            limit(&mut scene, &*disk, limits);
            exhaust(&mut scene, limited);
            let waits = scene.send(limited, 1, SECTOR);
            let passes = [scene.send(free, 2, SECTOR), scene.send(FLUSH, 0, &[])];
            scene.visit();
            assert_eq!(numbers(&mut scene), passes);
            limit(&mut scene, &*disk, NONE);
            scene.settle();
            assert_eq!(numbers(&mut scene), [waits]);
        }
    }
}

/// A memory disk's shortcut is off while a limit applies, and is used again afterwards.
#[test]
fn a_limit_applies_to_disks_that_need_no_channel() {
    const BLOCKS: u64 = 1 << 19;
    for packed in LAYOUTS {
        let options = MallocOptions {
            name: "Malloc0".into(),
            num_blocks: BLOCKS,
            block_size: 512,
            uuid: None,
        };
        let malloc: Arc<dyn Bdev> = Malloc::create(options).unwrap();
        let passthru = Passthru::create("p".into(), Arc::clone(&malloc), None).unwrap();
        let part = Part::create("part".into(), passthru, 0, BLOCKS).unwrap();
        let mut scene = Scene::started_on(packed, 64, part);
        scene.put(DATA, &[7; 512]);
        scene.send(OUT, 1, SECTOR);
        scene.settle();
        assert_eq!(numbers(&mut scene).len(), 1);
        // The limit is on the malloc bdev, two levels below the split part.
        limit(&mut scene, &*malloc, READS);
        exhaust_mib(&mut scene, IN, 256);
        scene.put(DATA, &[0; 512]);
        let read = scene.send(IN, 1, SECTOR);
        scene.visit();
        assert_eq!(numbers(&mut scene), [0; 0]);
        assert_eq!(scene.get(DATA, 1), [0]);
        limit(&mut scene, &*malloc, NONE);
        scene.settle();
        assert_eq!(numbers(&mut scene), [read]);
        assert_eq!(scene.get(DATA, 512), [7; 512]);
    }
}

#[test]
fn a_stop_does_not_wait_for_a_limit_and_the_debt_remains() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        limit(&mut scene, &*disk, BOTH);
        exhaust(&mut scene, OUT);
        let sent = [(); 3].map(|()| scene.send(OUT, 1, SECTOR));
        scene.visit();
        assert_eq!(numbers(&mut scene), [0; 0]);
        scene.queue().control().stop();
        scene.settle();
        assert_eq!(numbers(&mut scene), sent);
        assert_eq!(scene.queue().control().inflight(), 0);
        scene.base = scene.position();
        scene.kill();
        scene.start().unwrap();
        let sent = [(); 3].map(|()| scene.send(OUT, 1, SECTOR));
        scene.visit();
        scene.visit();
        assert_eq!(numbers(&mut scene), [0; 0], "the debt remains after a restart of the queue");
        scene.queue().control().stop();
        scene.settle();
        assert_eq!(numbers(&mut scene), sent[..1], "stops let all requests pass");
    }
}

/// A write that may pass again is submitted although the disk always has completions.
#[test]
fn a_busy_disk_does_not_hold_up_what_waited() {
    for packed in LAYOUTS {
        let disk = Manual::large();
        disk.state().at_once = true;
        let mut scene = Scene::started_on(packed, 256, disk.clone());
        limit(&mut scene, &*disk, WRITES);
        exhaust(&mut scene, OUT);
        let waits = scene.send(OUT, 1, SECTOR);
        scene.visit();
        disk.state().at_once = false;
        scene.indirect = true;
        (0..72).for_each(|_| {
            scene.send(IN, 2, SECTOR);
        });
        let worked = [(); 3].map(|()| scene.visit());
        assert!(worked[0]);
        disk.state().complete_all();
        disk.qos().set_limits(NONE);
        let memory = Arc::clone(&scene.memory);
        scene.publish(&memory);
        scene.visit();
        let writes = disk.state().seen.iter().filter(|io| io.0 == Op::Write).count();
        assert_eq!(writes, 2);
        disk.state().complete_all();
        scene.settle();
        assert!(numbers(&mut scene).contains(&waits));
    }
}

#[test]
fn requests_of_an_abandoned_ring_are_not_started() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        limit(&mut scene, &*disk, BOTH);
        exhaust(&mut scene, OUT);
        scene.send(OUT, 1, SECTOR);
        scene.send(IN, 1, SECTOR);
        scene.visit();
        let before = disk.state().seen.len();
        scene.queue().control().abandon();
        scene.settle();
        assert_eq!(disk.state().seen.len(), before);
        assert_eq!(scene.queue().control().inflight(), 0);
        assert_eq!(scene.answers(), []);
    }
}

#[test]
fn requests_of_a_removed_disk_end_without_waiting() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        limit(&mut scene, &*disk, BOTH);
        exhaust(&mut scene, OUT);
        let waits = scene.send(OUT, 1, SECTOR);
        scene.visit();
        let memory = Arc::clone(&scene.memory);
        scene.publish_removed(&memory);
        let refused = scene.send(OUT, 1, SECTOR);
        scene.settle();
        assert_eq!(scene.answers(), [(waits, OK, 1), (refused, IOERR, 1)]);
    }
}

/// A limited disk that is full takes the oldest request first, and each once.
#[test]
fn requests_that_wait_for_a_limit_may_find_the_disk_full() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        limit(&mut scene, &*disk, BOTH);
        exhaust(&mut scene, OUT);
        let sent = [1, 2, 3].map(|sector| scene.send(OUT, sector, SECTOR));
        scene.visit();
        disk.state().room = Some(1);
        disk.state().at_once = false;
        limit(&mut scene, &*disk, NONE);
        let worked = [(); 2].map(|()| scene.visit());
        assert_eq!(worked, [false; 2]);
        let offsets = || -> Vec<_> { disk.state().seen[1..].iter().map(|io| io.1 / 512).collect() };
        assert_eq!(offsets(), [1]);
        disk.state().room = None;
        scene.visit();
        assert_eq!(offsets(), [1, 2, 3]);
        disk.state().complete_all();
        scene.settle();
        assert_eq!(numbers(&mut scene), sent);
    }
}

#[test]
fn a_write_that_waited_is_flushed_when_it_has_to_be_durable() {
    for packed in LAYOUTS {
        let (mut scene, disk) = scene(packed);
        scene.device.write_through = true;
        limit(&mut scene, &*disk, WRITES);
        exhaust(&mut scene, OUT);
        let waits = scene.send(OUT, 1, SECTOR);
        scene.visit();
        let before = disk.state().seen.len();
        limit(&mut scene, &*disk, NONE);
        scene.settle();
        assert_eq!(numbers(&mut scene), [waits]);
        let ops: Vec<_> = disk.state().seen[before..].iter().map(|io| io.0).collect();
        assert_eq!(ops, [Op::Write, Op::Flush]);
    }
}

/// A sleeping reactor visits the queue again after a slice, although the disk signals nothing.
#[test]
fn a_reactor_that_sleeps_wakes_for_the_next_slice() {
    let disk = Manual::large();
    disk.state().at_once = true;
    // One I/O every 4 slices.
    disk.qos().set_limits(RateLimits { rw_ios_per_sec: 250, ..NONE });
    let mut scene = Scene::on(false, 64, disk);
    let (_reactor, mut stepped) = scene.start_to_sleep();
    let sent = [(); 4].map(|()| scene.send(OUT, 1, SECTOR));
    let (mut answers, mut sleeps) = (vec![], 0);
    while answers.len() < sent.len() {
        sleeps += usize::from(stepped.step());
        answers.extend(numbers(&mut scene));
    }
    assert_eq!(answers, sent);
    assert!(sleeps > 0, "the reactor never slept");
}
