//! Targets that come, go and change while guests run, and the events that tell of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bdev::{Bdev, Op, RateLimits};
use front_end::scsi::{CHANGE, Command, Event, HOTPLUG, Layout, cdb, code, kind, lun};
use vhost_scsi::{AddError, RemoveError, bdev_resized, limits_changed, remove_bdev};
use vhost_target::{Core, Mode};

use super::data_path::malloc;
use super::disk::TestDisk;
use super::world::{Guest, Scene, Vm, World};

const BLOCK: usize = 512;

fn post(vm: &mut Vm, count: usize) {
    (0..count).for_each(|_| _ = vm.events.post().unwrap());
}

fn event(event: u32, target: u8, reason: u32) -> Event {
    Event { event, lun: [1, target, 0, 0, 0, 0, 0, 0], reason, used_len: 16 }
}

fn added(target: u8) -> Event {
    event(kind::TRANSPORT_RESET, target, kind::RESCAN)
}

fn removed(target: u8) -> Event {
    event(kind::TRANSPORT_RESET, target, kind::REMOVED)
}

fn resized(target: u8) -> Event {
    event(kind::PARAM_CHANGE, target, 0x092a)
}

fn disk(name: &str) -> Arc<TestDisk> {
    TestDisk::create(name, 64)
}

#[test]
fn added_and_removed_targets_are_reported_and_served() {
    for packed in [false, true] {
        let guest = Guest { queues: 3, packed, ..Guest::default() };
        let mut scene = Scene::empty(2, guest);
        post(&mut scene.vm, 8);
        for round in 0..5 {
            let target = round * 3 % 8;
            let inquiry = cdb::inquiry(None, 36);
            let (response, _) = scene.command(target, inquiry, &[], 36);
            assert_eq!(response.response, code::BAD_TARGET);
            scene.add(target, &malloc("m", 512, 64));
            assert_eq!(scene.vm.take_events(), [added(target)]);
            scene.good(target, inquiry, &[], 36);
            scene.vm.attentions(&mut scene.world, target);
            for queue in 0..3 {
                let tag = scene.vm.write(queue, target, 1);
                assert!(scene.wait(tag).response.is_good());
            }
            scene.scsi.remove_target(&scene.world.target, target).unwrap();
            scene.world.settle();
            assert_eq!(scene.vm.take_events(), [removed(target)]);
            let (response, _) = scene.command(target, inquiry, &[], 36);
            assert_eq!(response.response, code::BAD_TARGET);
            let scsi = Arc::clone(&scene.scsi);
            scene.world.until("the number is free", || scsi.is_free(target));
            post(&mut scene.vm, 2);
        }
    }
}

#[test]
fn io_in_flight_of_a_removed_target_ends_well() {
    let mut scene = Scene::empty(2, Guest { queues: 2, ..Guest::default() });
    let (leaving, other) = (disk("leaving"), disk("other"));
    post(&mut scene.vm, 8);
    scene.add(1, &(Arc::clone(&leaving) as _));
    scene.add(2, &(Arc::clone(&other) as _));
    scene.vm.attentions(&mut scene.world, 1);
    scene.vm.attentions(&mut scene.world, 2);
    leaving.state().holds = true;
    leaving.state().room = Some(3);
    // Two in flight, one between two I/Os, and one that waits for room.
    let mut tags = vec![scene.vm.write(0, 1, 1), scene.vm.write(1, 1, 1)];
    let out = [scene.vm.buffer(&[1; 2 * BLOCK])];
    let verify = Command::new(lun(1, 0), 0, cdb::write_and_verify(0, 8, 2)).with_data_out(&out);
    tags.push(scene.vm.submit(0, verify, Layout::Separate));
    scene.world.settle();
    tags.push(scene.vm.write(0, 1, 1));
    scene.world.settle();
    assert_eq!(scene.vm.take_events(), [added(1), added(2)]);
    scene.scsi.remove_target(&scene.world.target, 1).unwrap();
    assert!(matches!(
        scene.scsi.remove_target(&scene.world.target, 1),
        Err(RemoveError::Absent(1))
    ));
    scene.world.settle();
    assert_eq!(scene.vm.take_events(), [removed(1)], "told before the I/O has ended");
    let (response, _) = scene.command(1, cdb::read(0, 1), &[], BLOCK);
    assert_eq!(response.response, code::BAD_TARGET, "no new command");
    assert!(!scene.scsi.is_free(1));
    let again = scene.scsi.add_target(&scene.world.target, Some(1), &(Arc::clone(&other) as _));
    assert!(matches!(again, Err(AddError::Exists(1))), "{again:?}");
    scene.good(2, cdb::write(0, 1), &[1; BLOCK], 0);
    assert!(tags.iter().all(|tag| scene.vm.answer(*tag).is_none()));
    assert_eq!(leaving.state().channels, 2);
    leaving.state().room = None;
    leaving.state().release();
    for tag in tags {
        assert!(scene.wait(tag).response.is_good());
    }
    let scsi = Arc::clone(&scene.scsi);
    scene.world.until("the number is free", || scsi.is_free(1));
    let (channels, wrong) = {
        let state = leaving.state();
        (state.channels, state.wrong.clone())
    };
    assert_eq!((channels, wrong), (0, None));
    scene.add(1, &(leaving as _));
    scene.vm.attentions(&mut scene.world, 1);
    scene.good(1, cdb::write(0, 1), &[1; BLOCK], 0);
}

/// Neither the removal nor the addition of a target waits for I/O of another one.
#[test]
fn a_target_is_removed_while_another_one_hangs() {
    let mut scene = Scene::empty(1, Guest { queues: 2, ..Guest::default() });
    let hanging = disk("hanging");
    scene.add(0, &(Arc::clone(&hanging) as _));
    scene.add(1, &(disk("other") as _));
    scene.vm.attentions(&mut scene.world, 0);
    scene.vm.attentions(&mut scene.world, 1);
    hanging.state().holds = true;
    let tag = scene.vm.write(0, 0, 1);
    scene.world.settle();
    scene.scsi.remove_target(&scene.world.target, 1).unwrap();
    let scsi = Arc::clone(&scene.scsi);
    scene.world.until("the number is free", || scsi.is_free(1));
    scene.add(1, &(disk("third") as _));
    scene.add(5, &(disk("fourth") as _));
    scene.vm.attentions(&mut scene.world, 5);
    scene.good(5, cdb::write(0, 1), &[1; BLOCK], 0);
    // The bdev is free, too.
    let bdev = disk("fifth");
    scene.add(6, &(Arc::clone(&bdev) as _));
    scene.scsi.remove_target(&scene.world.target, 6).unwrap();
    scene.world.until("the bdev is free", || Arc::strong_count(&bdev) == 1);
    hanging.state().release();
    assert!(scene.wait(tag).response.is_good());
}

#[test]
fn events_are_sent_only_if_they_were_negotiated() {
    for (without, expected) in [
        (HOTPLUG, vec![resized(0)]),
        (CHANGE, vec![added(0), removed(0)]),
        (HOTPLUG | CHANGE, vec![]),
    ] {
        let mut scene = Scene::empty(1, Guest { without, ..Guest::default() });
        post(&mut scene.vm, 8);
        let disk = disk("d");
        scene.add(0, &(Arc::clone(&disk) as _));
        disk.resize(65);
        bdev_resized(&scene.world.target, &(Arc::clone(&disk) as _));
        scene.world.settle();
        scene.scsi.remove_target(&scene.world.target, 0).unwrap();
        scene.world.settle();
        assert_eq!(scene.vm.take_events(), expected, "{without:x}");
    }
}

/// Without buffers, events wait. Several of one kind and target are one.
#[test]
fn no_event_is_lost_without_buffers() {
    let mut scene = Scene::empty(2, Guest::default());
    let [a, b, c] = ["a", "b", "c"].map(disk);
    scene.add(0, &(Arc::clone(&a) as _));
    scene.add(7, &(Arc::clone(&b) as _));
    for _ in 0..3 {
        a.resize(a.num_blocks() + 1);
        bdev_resized(&scene.world.target, &(Arc::clone(&a) as _));
    }
    scene.scsi.remove_target(&scene.world.target, 7).unwrap();
    scene.world.settle();
    let scsi = Arc::clone(&scene.scsi);
    scene.world.until("the number is free", || scsi.is_free(7));
    scene.add(7, &(Arc::clone(&c) as _));
    scene.world.settle();
    post(&mut scene.vm, 2);
    scene.world.settle();
    let mut events = scene.vm.take_events();
    assert_eq!(events.len(), 2);
    post(&mut scene.vm, 8);
    scene.world.settle();
    events.extend(scene.vm.take_events());
    // A removal comes before an addition: what is there in the end is found.
    let count = |event| events.iter().filter(|other| **other == event).count();
    let counts = [added(0), resized(0), removed(7), added(7)].map(count);
    assert_eq!((counts, events.len()), ([1; 4], 4), "{events:?}");
    let at = |event| events.iter().position(|other| *other == event).unwrap();
    assert!(at(removed(7)) < at(added(7)) && at(added(0)) < at(resized(0)));
}

#[test]
fn a_buffer_that_is_too_short_loses_no_event() {
    for packed in [false, true] {
        let mut scene = Scene::empty(1, Guest { packed, ..Guest::default() });
        scene.vm.events.post_bytes(15).unwrap();
        post(&mut scene.vm, 1);
        scene.add(3, &(disk("d") as _));
        let events = scene.vm.take_events();
        assert_eq!(events.iter().map(|event| event.used_len).collect::<Vec<_>>(), [0, 16]);
        assert_eq!(events[1], added(3));
    }
}

#[test]
fn a_target_that_cannot_be_opened_is_not_added() {
    let mut scene = Scene::empty(1, Guest { queues: 2, ..Guest::default() });
    post(&mut scene.vm, 2);
    let target = Arc::clone(&scene.world.target);
    let disk = disk("d");
    disk.state().open_fails = true;
    let result = scene.scsi.add_target(&target, Some(2), &(Arc::clone(&disk) as _));
    assert!(matches!(result, Err(AddError::Open(_))), "{result:?}");
    scene.world.settle();
    assert_eq!(scene.vm.take_events(), []);
    assert!(scene.scsi.is_free(2) && scene.scsi.targets().is_empty());
    disk.state().open_fails = false;
    for (number, expected) in [(Some(2), 2), (None, 0), (None, 1), (None, 3)] {
        let added = scene.scsi.add_target(&target, number, &(Arc::clone(&disk) as _)).unwrap();
        assert_eq!(added, expected);
    }
    let result = scene.scsi.add_target(&target, Some(8), &(Arc::clone(&disk) as _));
    assert!(matches!(result, Err(AddError::Number)));
    (4..8).for_each(|_| _ = scene.scsi.add_target(&target, None, &(disk.clone() as _)).unwrap());
    let result = scene.scsi.add_target(&target, None, &(Arc::clone(&disk) as _));
    assert!(matches!(result, Err(AddError::NoSpace)));
    assert!(matches!(scene.scsi.remove_target(&target, 8), Err(RemoveError::Number)));
    // All of them show the same disk.
    scene.world.settle();
    for number in 0..8 {
        scene.vm.attentions(&mut scene.world, number);
        scene.good(number, cdb::write(number.into(), 1), &[number + 1; BLOCK], 0);
    }
    let blocks: Vec<_> = disk.state().data.chunks(BLOCK).take(8).map(|block| block[0]).collect();
    assert_eq!(blocks, (1..9).collect::<Vec<_>>());
}

/// Targets of a guest that starts later are not told: it looks for them.
#[test]
fn a_guest_that_starts_gets_no_event_of_the_past() {
    let mut world = World::new(1);
    let scsi = world.controller("c");
    let mut vm = Vm::connect(&world, "c", Guest::default());
    scsi.add_target(&world.target, Some(0), &(disk("d") as _)).unwrap();
    vm.start_all();
    post(&mut vm, 4);
    world.settle();
    assert_eq!(vm.take_events(), []);
    vm.good(&mut world, 0, cdb::inquiry(None, 36), &[], 36);
    scsi.add_target(&world.target, Some(1), &(disk("e") as _)).unwrap();
    world.settle();
    assert_eq!(vm.take_events(), [added(1)]);
}

#[test]
fn removing_a_bdev_removes_all_its_targets() {
    let mut world = World::new(1);
    let disk = disk("d");
    let mut vms: Vec<_> = ["a", "b"]
        .iter()
        .map(|name| {
            let scsi = world.controller(name);
            for number in [0, 4] {
                scsi.add_target(&world.target, Some(number), &(Arc::clone(&disk) as _)).unwrap();
            }
            scsi.add_target(&world.target, Some(5), &malloc("m", 512, 64)).unwrap();
            let mut vm = Vm::started(&mut world, name, Guest::default());
            post(&mut vm, 4);
            for target in [0, 4, 5] {
                vm.attentions(&mut world, target);
            }
            (scsi, vm)
        })
        .collect();
    disk.state().holds = true;
    let tags: Vec<_> = vms.iter_mut().map(|(_, vm)| vm.write(0, 4, 1)).collect();
    world.settle();
    remove_bdev(&world.target, &(Arc::clone(&disk) as _));
    world.settle();
    disk.state().release();
    for ((scsi, vm), tag) in vms.iter_mut().zip(tags) {
        assert!(vm.wait(&mut world, tag).response.is_good());
        world.settle();
        assert_eq!(vm.take_events(), [removed(0), removed(4)]);
        let (response, _) = vm.command(&mut world, 0, cdb::read(0, 1), &[], BLOCK);
        assert_eq!(response.response, code::BAD_TARGET);
        vm.good(&mut world, 5, cdb::read(0, 1), &[], BLOCK);
        assert_eq!(scsi.targets().len(), 1);
    }
    world.until("the bdev is free", || Arc::strong_count(&disk) == 1);
}

/// Each nexus gets an event and a unit attention for a new size.
#[test]
fn every_nexus_is_told_of_a_new_size() {
    let mut world = World::new(1);
    let disk = disk("d");
    let mut vms: Vec<_> = ["a", "a", "b"]
        .iter()
        .enumerate()
        .map(|(n, name)| {
            if n != 1 {
                let scsi = world.controller(name);
                scsi.add_target(&world.target, Some(2), &(Arc::clone(&disk) as _)).unwrap();
            }
            let mut vm = Vm::started(&mut world, name, Guest::default());
            post(&mut vm, 4);
            vm.attentions(&mut world, 2);
            vm
        })
        .collect();
    disk.resize(100);
    bdev_resized(&world.target, &(Arc::clone(&disk) as _));
    world.settle();
    for vm in &mut vms {
        assert_eq!(vm.take_events(), [resized(2)]);
        let (response, _) = vm.command(&mut world, 2, cdb::write(99, 1), &[1; BLOCK], 0);
        assert_eq!(response.sense(), Some((6, 0x2a, 9)), "nothing is written");
        vm.good(&mut world, 2, cdb::write(99, 1), &[1; BLOCK], 0);
        let capacity = vm.good(&mut world, 2, cdb::read_capacity(32), &[], 32);
        assert_eq!(capacity[..8], 99_u64.to_be_bytes());
    }
    // A disk that has become smaller.
    disk.resize(10);
    bdev_resized(&world.target, &(Arc::clone(&disk) as _));
    world.settle();
    assert_eq!(vms[0].attentions(&mut world, 2), [(0x2a, 9)]);
    let (response, _) = vms[0].command(&mut world, 2, cdb::read(10, 1), &[], BLOCK);
    assert_eq!(response.sense(), Some((5, 0x21, 0)));
}

#[test]
fn rate_limits_of_a_target_slow_it_and_no_other() {
    let guest = Guest { queues: 2, size: 256, ..Guest::default() };
    let (mut scene, limited) = Scene::of(64, guest);
    scene.add(1, &malloc("m", 512, 64));
    scene.vm.attentions(&mut scene.world, 1);
    let set = |scene: &mut Scene, rw_ios_per_sec| {
        limited.qos().set_limits(RateLimits { rw_ios_per_sec, ..RateLimits::default() });
        limits_changed(&scene.world.target, &(Arc::clone(&limited) as _));
        scene.world.settle();
    };
    set(&mut scene, 1000);
    let tags: Vec<_> = (0..80).map(|n| scene.vm.write(n % 2, 0, 1)).collect();
    scene.world.settle();
    let passed = limited.state().seen.len();
    assert!(passed < 80, "{passed}");
    for _ in 0..10 {
        scene.good(1, cdb::write(0, 1), &[1; BLOCK], 0);
    }
    // They pass in time, or when the limit is removed.
    scene.wait(tags[0]);
    set(&mut scene, 0);
    for tag in &tags[1..] {
        assert!(scene.wait(*tag).response.is_good());
    }
    // A queue that stops does not wait for limits.
    set(&mut scene, 1000);
    let tags: Vec<_> = (0..80).map(|_| scene.vm.write(0, 0, 1)).collect();
    scene.world.settle();
    scene.vm.stop_all(&mut scene.world);
    for tag in tags {
        let answer = scene.vm.answer(tag);
        assert!(answer.is_none_or(|done| done.response.is_good()));
    }
}

/// Sleeping reactors wake for targets that come, for their I/O, and for events.
#[test]
fn sleeping_reactors_wake_for_new_targets() {
    let mut world = World::in_mode(2, Mode::Sleep { after_us: 0 });
    let scsi = world.controller("c");
    let mut vm = Vm::started(&mut world, "c", Guest { queues: 2, ..Guest::default() });
    post(&mut vm, 8);
    fn sleep(world: &mut World) {
        for _ in 0..1000 {
            world.step();
            if world.asleep == [true, true] {
                return;
            }
        }
        panic!("a reactor does not sleep");
    }
    sleep(&mut world);
    world.step();
    assert_eq!(world.asleep, [true, true], "nothing wakes them");
    let disk = disk("d");
    scsi.add_target(&world.target, Some(4), &(Arc::clone(&disk) as _)).unwrap();
    sleep(&mut world);
    assert_eq!(vm.take_events(), [added(4)]);
    vm.attentions(&mut world, 4);
    disk.state().holds = true;
    for queue in [0, 1] {
        let tag = vm.write(queue, 4, 1);
        sleep(&mut world);
        assert_eq!((vm.answer(tag), disk.state().flying()), (None, 1), "the kick has woken it");
        // The channel of a target that was added later wakes it.
        disk.state().complete_all();
        sleep(&mut world);
        assert!(vm.answer(tag).unwrap().response.is_good());
    }
    // A second target on the same reactors, and the removal of the first.
    let second = super::disk::TestDisk::create("e", 64);
    scsi.add_target(&world.target, Some(5), &(Arc::clone(&second) as _)).unwrap();
    sleep(&mut world);
    scsi.remove_target(&world.target, 4).unwrap();
    sleep(&mut world);
    assert_eq!(vm.take_events(), [added(5), removed(4)]);
    world.until("the number is free", || scsi.is_free(4));
    // A function, whose barrier each reactor reaches.
    sleep(&mut world);
    vm.manage(front_end::scsi::subtype::LOGICAL_UNIT_RESET, lun(5, 0), 0);
    assert_eq!(vm.managed(&mut world).response, code::OK);
}

/// A reactor that waits for room of a channel sleeps meanwhile.
#[test]
fn a_reactor_sleeps_while_a_channel_is_full() {
    let mut world = World::in_mode(1, Mode::Sleep { after_us: 0 });
    let scsi = world.controller("c");
    let disk = disk("d");
    scsi.add_target(&world.target, Some(0), &(Arc::clone(&disk) as _)).unwrap();
    let mut vm = Vm::started(&mut world, "c", Guest::default());
    vm.attentions(&mut world, 0);
    disk.state().room = Some(0);
    let tag = vm.write(0, 0, 1);
    let mut slept = 0;
    for _ in 0..100 {
        world.step();
        slept += usize::from(world.asleep[0]);
    }
    assert!(slept > 50, "{slept}");
    disk.state().room = None;
    assert!(vm.wait(&mut world, tag).response.is_good());
}

/// Queues move between reactors with targets, I/O in flight, and functions.
#[test]
fn queues_move_between_reactors() {
    for mode in [Mode::Poll, Mode::Sleep { after_us: 0 }] {
        let mut world = World::in_mode(3, mode);
        let scsi = world.controller("c");
        let disk = disk("d");
        scsi.add_target(&world.target, Some(0), &(Arc::clone(&disk) as _)).unwrap();
        let mut vm = Vm::started(&mut world, "c", Guest { queues: 2, ..Guest::default() });
        post(&mut vm, 8);
        vm.attentions(&mut world, 0);
        disk.state().holds = true;
        for round in 0..24 {
            let tags = [0, 1].map(|queue| vm.write(queue, 0, 1));
            world.step();
            if round % 3 == 0 {
                vm.manage(front_end::scsi::subtype::ABORT_TASK_SET, lun(0, 0), 0);
            }
            if round % 4 == 1 {
                scsi.add_target(&world.target, Some(1), &malloc("m", 512, 64)).unwrap();
            }
            let (ring, core) = (round % 4, Core((round / 4 + round) % 3));
            let moving = world.target.begin_move("c", None, ring, core).unwrap();
            let mut moved = moving.is_none();
            for _ in 0..1000 {
                if !moved {
                    let result = world.target.end_move(moving.as_ref().unwrap());
                    moved = result.map(|result| result.unwrap()).is_some();
                }
                world.step();
            }
            assert!(moved);
            disk.state().complete_all();
            for tag in tags {
                let response = vm.wait(&mut world, tag).response;
                assert!(response.is_good() || response.response == code::ABORTED);
            }
            if round % 3 == 0 {
                assert_eq!(vm.managed(&mut world).response, code::OK);
            }
            if round % 4 == 1 {
                world.settle();
                assert_eq!(vm.take_events(), [added(1)], "round {round}");
                post(&mut vm, 1);
                vm.attentions(&mut world, 1);
                vm.good(&mut world, 1, cdb::write(0, 1), &[1; BLOCK], 0);
                scsi.remove_target(&world.target, 1).unwrap();
                world.until("the number is free", || scsi.is_free(1));
                world.settle();
                assert_eq!(vm.take_events(), [removed(1)], "round {round}");
                post(&mut vm, 1);
            }
        }
    }
}

/// A guest that looks for a target as soon as it is told of it finds it, with any queue.
#[test]
fn every_queue_finds_a_target_after_its_event() {
    const QUEUES: usize = 60;
    let mut world = World::new(2);
    let scsi = world.controller("c");
    let bdev = malloc("m", 512, 64);
    let guest = Guest { queues: QUEUES, size: 16, ..Guest::default() };
    let mut vm = Vm::started(&mut world, "c", guest);
    post(&mut vm, 8);
    let target = Arc::clone(&world.target);
    let (seen, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let reactors = std::mem::take(&mut world.reactors);
    thread::scope(|scope| {
        for mut reactor in reactors {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    reactor.step();
                }
            });
        }
        // The guest, which is told and looks in rounds of its own.
        let guest = scope.spawn(|| {
            let to = [vm.zeroed(36)];
            let inquiry = Command::new(lun(0, 0), 0, cdb::inquiry(None, 36)).with_data_in(&to);
            for round in 0..50 {
                while vm.events.ring().used_index() == vm.events.base() {
                    thread::yield_now();
                }
                // The queue whose reactor gets its new view last.
                let tag = vm.submit(QUEUES - 1, inquiry, Layout::Separate);
                let done = loop {
                    match vm.answer(tag) {
                        Some(done) => break done,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(done.response.response, code::OK, "round {round}");
                assert_eq!(vm.take_events(), [added(0)]);
                vm.events.post().unwrap();
                seen.fetch_add(1, Ordering::Relaxed);
                while vm.events.ring().used_index() == vm.events.base() {
                    thread::yield_now();
                }
                assert_eq!(vm.take_events(), [removed(0)]);
                vm.events.post().unwrap();
                seen.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut told = 0;
        while !guest.is_finished() {
            if seen.load(Ordering::Relaxed) == told && (told % 2 == 1 || scsi.is_free(0)) {
                match told % 2 {
                    0 => _ = scsi.add_target(&target, Some(0), &bdev).unwrap(),
                    _ => scsi.remove_target(&target, 0).unwrap(),
                }
                told += 1;
            }
            target.process_events();
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// A forced deletion of the controller while a disk hangs.
#[test]
fn a_controller_is_deleted_while_a_disk_hangs() {
    let (mut scene, hanging) = Scene::of(64, Guest { queues: 2, ..Guest::default() });
    scene.add(1, &(disk("other") as _));
    hanging.state().holds = true;
    scene.vm.write(0, 0, 1);
    scene.world.settle();
    hanging.state().room = Some(0);
    scene.vm.write(0, 0, 1);
    scene.vm.write(1, 0, 1);
    scene.vm.manage(front_end::scsi::subtype::LOGICAL_UNIT_RESET, lun(0, 0), 0);
    scene.world.settle();
    let deletion = scene.world.target.begin_delete("c", true).unwrap();
    deletion.finish(&super::wire::NoSockets);
    scene.world.settle();
    scene.vm.take_all();
    assert_eq!(hanging.state().take_seen(), [(Op::Write, 512, 512)]);
    // Another controller serves the other disk meanwhile.
    let scsi = scene.world.controller("c");
    scsi.add_target(&scene.world.target, Some(0), &(disk("third") as _)).unwrap();
    let mut vm = Vm::started(&mut scene.world, "c", Guest::default());
    vm.attentions(&mut scene.world, 0);
    vm.good(&mut scene.world, 0, cdb::write(0, 1), &[1; BLOCK], 0);
    hanging.state().release();
    let target = Arc::clone(&scene.world.target);
    scene.world.until("the connection is gone", || target.connections() == 1);
    let Scene { world, scsi, .. } = scene;
    drop(scsi);
    let mut world = world;
    world.until("the bdev is free", || Arc::strong_count(&hanging) == 1);
    assert_eq!(hanging.state().wrong, None);
}
