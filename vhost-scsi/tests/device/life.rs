//! Front ends that stop, crash, migrate and reset, with all kinds of queues.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use front_end::scsi::{Command, Event, Layout, cdb, code, kind, lun, subtype};
use vhost_target::Verdict;
use vhost_target::protocol::request;

use super::disk::{TestDisk, lock};
use super::world::{Guest, LOG_ALL, Scene, Vm, World};

const BLOCK: usize = 512;
const PAGE: u64 = 4096;

/// Starts another process that serves the same guest.
fn restart(vm: &mut Vm) -> (World, Arc<TestDisk>) {
    let mut world = World::new(2);
    let disk = TestDisk::create("disk", 64);
    let scsi = world.controller("c");
    scsi.add_target(&world.target, Some(0), &(Arc::clone(&disk) as _)).unwrap();
    vm.reconnect(&world, "c");
    world.step();
    (world, disk)
}

/// A process that is killed: its requests are resubmitted, and each is answered once.
#[test]
fn requests_outlive_a_killed_process() {
    for packed in [false, true] {
        for indirect in [false, true] {
            let guest = Guest { queues: 2, tracked: true, packed, indirect, ..Guest::default() };
            let (mut scene, disk) = Scene::of(64, guest);
            scene.vm.write(0, 0, 1);
            scene.world.settle();
            disk.state().holds = true;
            let mut tags: Vec<_> = (0..6).map(|n| scene.vm.write(n % 2, 0, n as u32)).collect();
            scene.world.settle();
            disk.state().complete(2);
            scene.world.settle();
            // One whose completion nobody has seen, and one that nobody has taken.
            disk.state().complete(0);
            tags.push(scene.vm.write(1, 0, 9));
            scene.vm.manage(subtype::LOGICAL_UNIT_RESET, lun(0, 0), 0);
            let Scene { world: killed, mut vm, .. } = scene;
            let (mut world, disk) = restart(&mut vm);
            let mut attentions = 0;
            for tag in tags {
                let response = vm.wait(&mut world, tag).response;
                // The nexus is a new one, whose reservations are gone.
                attentions += usize::from(response.sense().is_some_and(|(key, ..)| key == 6));
                let reset = response.response == code::RESET;
                assert!(response.is_good() || reset || response.status == 2, "{response:?}");
            }
            assert!(attentions <= 1);
            assert_eq!(vm.managed(&mut world).response, code::OK);
            vm.attentions(&mut world, 0);
            vm.good(&mut world, 0, cdb::write(5, 1), &[3; BLOCK], 0);
            assert_eq!(disk.state().wrong, None);
            // The killed process is not stepped after the kill, so its I/O never completes.
            drop(killed);
        }
    }
}

/// A function that the killed process had taken is answered by the next one.
#[test]
fn functions_outlive_a_killed_process() {
    for packed in [false, true] {
        let guest = Guest { tracked: true, packed, ..Guest::default() };
        let (mut scene, disk) = Scene::of(64, guest);
        disk.state().holds = true;
        let tag = scene.vm.write(0, 0, 1);
        scene.world.settle();
        scene.vm.manage(subtype::LOGICAL_UNIT_RESET, lun(0, 0), 0);
        scene.world.settle();
        let Scene { world: killed, mut vm, .. } = scene;
        let (mut world, disk) = restart(&mut vm);
        assert_eq!(vm.managed(&mut world).response, code::OK);
        assert!(vm.answer(tag).is_some(), "answered before the function");
        assert_eq!(disk.state().flying(), 0);
        drop(killed);
    }
}

/// A buffer that an earlier process had taken: what happened meanwhile was not told.
#[test]
fn a_taken_event_buffer_says_that_events_were_missed() {
    let (mut scene, _disk) = Scene::of(64, Guest { tracked: true, ..Guest::default() });
    // The event of the target that was added.
    scene.vm.events.post().unwrap();
    scene.world.settle();
    assert_eq!(scene.vm.take_events().len(), 1);
    let head = scene.vm.events.post().unwrap().0;
    scene.vm.events.post().unwrap();
    scene.world.settle();
    let Scene { world: killed, mut vm, .. } = scene;
    // SPDK takes buffers when they are posted. The second part of the area is the event queue's.
    let part = (16 + 16 * u64::from(vm.guest.size)).next_multiple_of(64);
    let entry = part + 16 + 16 * u64::from(head);
    vm.area().write_all_at(&[1], entry).unwrap();
    let (mut world, _disk) = restart(&mut vm);
    world.settle();
    let missed = kind::NO_EVENT | kind::MISSED;
    let expected = Event { event: missed, lun: [0; 8], reason: 0, used_len: 16 };
    assert_eq!(vm.take_events(), [expected]);
    drop(killed);
}

/// The pages that are written for answers of all queues are marked.
#[test]
fn pages_of_all_queues_are_marked() {
    for packed in [false, true] {
        let (mut scene, _disk) = Scene::of(64, Guest { packed, ..Guest::default() });
        scene.vm.begin_log();
        scene.world.settle();
        let marked = |scene: &Scene, gpa: u64| scene.vm.is_marked(gpa);
        let rings: Vec<_> =
            [scene.vm.control.ring(), scene.vm.events.ring(), scene.vm.queues[0].ring()]
                .map(|ring| ring.addrs()[if packed { 0 } else { 2 }])
                .into();
        scene.vm.clear_log();
        let to = [scene.vm.ram.alloc(4 * PAGE as u32, PAGE).unwrap()];
        let inquiry = Command::new(lun(0, 0), 0, cdb::inquiry(None, 96)).with_data_in(&to);
        assert!(scene.run(inquiry).response.is_good());
        assert!(marked(&scene, to[0].gpa) && !marked(&scene, to[0].gpa + PAGE));
        assert!(marked(&scene, rings[2]));
        let read = Command::new(lun(0, 0), 0, cdb::read(0, 16)).with_data_in(&to);
        scene.vm.clear_log();
        assert!(scene.run(read).response.is_good());
        let pages = [0, 1, 2].map(|n| marked(&scene, to[0].gpa + n * PAGE));
        // 16 blocks. The page of the last byte is always marked.
        assert_eq!(pages, [true, true, false]);
        scene.vm.clear_log();
        scene.vm.manage(subtype::QUERY_TASK, lun(0, 0), 0);
        scene.vm.managed(&mut scene.world);
        assert!(marked(&scene, rings[0]));
        scene.vm.clear_log();
        scene.vm.events.post().unwrap();
        scene.add(3, &super::data_path::malloc("m", 512, 8));
        assert_eq!(scene.vm.take_events().len(), 1);
        assert!(marked(&scene, rings[1]));
    }
}

/// SeaBIOS sets up one request queue, and a driver later all of them.
#[test]
fn a_boot_loader_and_then_a_driver_use_the_device() {
    let mut world = World::new(1);
    let scsi = world.controller("c");
    let disk = TestDisk::create("disk", 64);
    scsi.add_target(&world.target, Some(5), &(disk as _)).unwrap();
    let mut vm = Vm::connect(&world, "c", Guest { queues: 4, ..Guest::default() });
    vm.start_ring(2);
    world.settle();
    for target in 0..=255 {
        let (response, _) = vm.command(&mut world, target, cdb::report_luns(0, 16), &[], 16);
        assert_eq!(response.response == code::OK, target == 5, "{target}");
    }
    vm.attentions(&mut world, 5);
    vm.good(&mut world, 5, cdb::read(0, 1), &[], BLOCK);
    vm.stop_ring(2);
    world.settle();
    // The driver leaves out some request queues.
    for ring in [0, 1, 2, 5] {
        vm.start_ring(ring);
    }
    world.settle();
    vm.attentions(&mut world, 5);
    for queue in [0, 3] {
        let read = Command::new(lun(5, 0), 0, cdb::test_unit_ready());
        let tag = vm.submit(queue, read, Layout::Separate);
        assert!(vm.wait(&mut world, tag).response.is_good());
    }
    vm.manage(subtype::LOGICAL_UNIT_RESET, lun(5, 0), 0);
    assert_eq!(vm.managed(&mut world).response, code::OK);
    vm.start_ring(3);
    vm.start_ring(4);
    vm.attentions(&mut world, 5);
    for queue in 0..4 {
        let tag =
            vm.submit(queue, Command::new(lun(5, 0), 0, cdb::test_unit_ready()), Layout::Separate);
        assert!(vm.wait(&mut world, tag).response.is_good());
    }
}

#[test]
fn rings_stop_and_start_again_with_io_in_flight() {
    for packed in [false, true] {
        let (mut scene, disk) = Scene::of(64, Guest { queues: 2, packed, ..Guest::default() });
        for _ in 0..5 {
            disk.state().holds = true;
            let tags = [0, 1].map(|queue| scene.vm.write(queue, 0, 1));
            scene.world.settle();
            lock(&scene.vm.wire.sent).clear();
            scene.vm.stop_ring(3);
            scene.world.settle();
            assert_eq!(lock(&scene.vm.wire.sent).len(), 0, "I/O is in flight");
            disk.state().release();
            for tag in tags {
                assert!(scene.wait(tag).response.is_good());
            }
            scene.world.settle();
            assert_eq!(lock(&scene.vm.wire.sent).len(), 1);
            scene.vm.stop_all(&mut scene.world);
            scene.vm.start_all();
        }
    }
}

/// RESET_DEVICE while I/O, a function and events are pending.
#[test]
fn a_reset_of_the_device_waits_for_io() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    disk.state().holds = true;
    scene.vm.write(0, 0, 1);
    scene.world.settle();
    scene.vm.manage(subtype::LOGICAL_UNIT_RESET, lun(0, 0), 0);
    scene.vm.events.post().unwrap();
    scene.world.settle();
    lock(&scene.vm.wire.sent).clear();
    let verdict = scene.vm.send(request::RESET_DEVICE, &[], vec![]);
    assert!(matches!(verdict, Verdict::Deferred), "{verdict:?}");
    scene.world.settle();
    assert_eq!(lock(&scene.vm.wire.sent).len(), 0, "I/O is in flight");
    disk.state().release();
    let wire = Arc::clone(&scene.vm.wire);
    scene.world.until("the reset is acknowledged", || !lock(&wire.sent).is_empty());
    assert_eq!(disk.state().wrong, None);
}

#[test]
fn the_configuration_space_belongs_to_the_front_end() {
    let (scene, _disk) = Scene::of(64, Guest::default());
    let get = [0_u32, 36, 0].map(u32::to_le_bytes).concat();
    let verdict = scene.vm.send(request::GET_CONFIG, &[get, vec![0; 36]].concat(), vec![]);
    let Verdict::Reply(reply) = verdict else { panic!("{verdict:?}") };
    assert_eq!(reply[12..], [0; 36]);
}

/// Memory that is replaced while I/O uses it, and a log that begins and ends meanwhile.
#[test]
fn memory_and_log_change_under_io() {
    let (mut scene, disk) = Scene::of(64, Guest { queues: 2, ..Guest::default() });
    disk.state().holds = true;
    for round in 0..20 {
        let tags = [0, 1].map(|queue| scene.vm.write(queue, 0, 1));
        scene.world.step();
        match round % 3 {
            0 => scene.vm.set_memory(),
            1 => scene.vm.begin_log(),
            _ => scene.vm.end_log(),
        }
        scene.world.settle();
        assert_eq!(disk.state().flying(), 2);
        disk.state().complete_all();
        for tag in tags {
            assert!(scene.wait(tag).response.is_good());
        }
    }
    assert_eq!(scene.vm.features & LOG_ALL, 0);
}
