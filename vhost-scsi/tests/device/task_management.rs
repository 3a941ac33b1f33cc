//! Task management functions: their answers, and what has been answered before them.

use std::sync::Arc;

use bdev::{Bdev, Op, RateLimits};
use front_end::scsi::{
    AN_QUERY, AN_SUBSCRIBE, Command, Layout, cdb, code, lun, peripheral_lun, subtype,
};
use vhost_scsi::limits_changed;

use super::disk::TestDisk;
use super::world::{Guest, Scene, Vm, World};

const BLOCK: usize = 512;

/// Submits a write of a block to queue `queue`.
fn reset(scene: &mut Scene, target: u8) {
    scene.vm.manage(subtype::LOGICAL_UNIT_RESET, lun(target, 0), 0);
}

#[test]
fn every_function_is_answered() {
    let (mut scene, _disk) = Scene::of(64, Guest::default());
    let supported = [
        subtype::ABORT_TASK,
        subtype::ABORT_TASK_SET,
        subtype::CLEAR_TASK_SET,
        subtype::I_T_NEXUS_RESET,
        subtype::LOGICAL_UNIT_RESET,
        subtype::QUERY_TASK,
        subtype::QUERY_TASK_SET,
    ];
    for subtype in (0..12).chain([u32::MAX]) {
        let here = if supported.contains(&subtype) { code::OK } else { code::REJECTED };
        for (lun, expected) in [
            (lun(0, 0), here),
            (peripheral_lun(0, 0), here),
            (lun(0, 1), code::INCORRECT_LUN),
            (lun(1, 0), code::BAD_TARGET),
            (lun(8, 0), code::BAD_TARGET),
            (lun(255, 9), code::BAD_TARGET),
            ([0; 8], code::BAD_TARGET),
        ] {
            scene.vm.manage(subtype, lun, 1);
            let answer = scene.vm.managed(&mut scene.world);
            assert_eq!((answer.response, answer.used_len), (expected, 1), "{subtype} {lun:?}");
        }
    }
}

#[test]
fn notifications_are_answered_and_there_are_none() {
    let (mut scene, _disk) = Scene::of(64, Guest::default());
    for kind in [AN_QUERY, AN_SUBSCRIBE] {
        for (lun, expected) in [(lun(0, 0), code::OK), (lun(5, 0), code::BAD_TARGET)] {
            scene.vm.control.submit_notification(kind, lun, u32::MAX).unwrap();
            let answer = scene.vm.managed(&mut scene.world);
            let answer = (answer.response, answer.events, answer.used_len);
            assert_eq!(answer, (expected, 0, 5), "{kind}");
        }
    }
}

#[test]
fn invalid_requests_of_the_control_queue_are_returned() {
    let (mut scene, _disk) = Scene::of(64, Guest::default());
    let tmf = [&[0; 4][..], &5_u32.to_le_bytes(), &lun(0, 0), &[0; 8]].concat();
    for (bytes, room, used_len) in [
        (&tmf[..], 1, 1),
        (&tmf[..], 0, 0),
        (&tmf[..23], 1, 0),
        (&tmf[..4], 1, 0),
        (&tmf[..1], 8, 0),
        (&[3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..], 8, 0),
        (&[1, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], 5, 5),
        (&[1, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], 4, 0),
        (&[1, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0][..], 5, 0),
    ] {
        scene.vm.control.submit_bytes(bytes, room).unwrap();
        let answer = scene.vm.managed(&mut scene.world);
        assert_eq!(answer.used_len, used_len, "{bytes:?} {room}");
        if used_len == 0 && room > 0 {
            assert_eq!(answer.response, code::UNWRITTEN, "{bytes:?} {room}");
        }
    }
}

#[test]
fn a_reset_waits_for_io_in_flight_and_ends_what_has_none() {
    for packed in [false, true] {
        let guest = Guest { queues: 2, packed, ..Guest::default() };
        let (mut scene, disk) = Scene::of(64, guest);
        disk.state().holds = true;
        disk.state().room = Some(3);
        let flying = [0, 1, 0].map(|queue| scene.vm.write(queue, 0, 5));
        scene.world.settle();
        let parked = [0, 1, 1].map(|queue| scene.vm.write(queue, 0, 6));
        scene.world.settle();
        reset(&mut scene, 0);
        for left in (0..3).rev() {
            scene.world.settle();
            scene.world.settle();
            assert_eq!(scene.vm.control.poll().unwrap(), None, "{left} in flight");
            disk.state().complete(0);
        }
        let answer = scene.vm.managed(&mut scene.world);
        assert_eq!((answer.response, answer.used_len), (code::OK, 1));
        // They are in the used ring when the function is.
        for tag in flying {
            let response = scene.vm.answer(tag).expect("answered before the function").response;
            assert!(response.is_good());
        }
        for tag in parked {
            let response = scene.vm.answer(tag).expect("answered before the function").response;
            assert_eq!((response.response, response.residual), (code::RESET, 512));
        }
        assert_eq!(disk.state().take_seen(), [(Op::Write, 5 * 512, 512); 3]);
        assert_eq!(scene.vm.attentions(&mut scene.world, 0).len(), 1, "the reset");
        assert_eq!(disk.state().wrong, None);
    }
}

/// What the driver had made available before the function is answered before it.
#[test]
fn a_reset_waits_for_requests_in_the_ring() {
    for packed in [false, true] {
        for atonce in [false, true] {
            let guest = Guest { queues: 3, size: 256, packed, ..Guest::default() };
            let (mut scene, disk) = Scene::of(64, guest);
            disk.state().holds = !atonce;
            let tags: Vec<_> = (0..150).map(|n| scene.vm.write(n % 3, 0, 1)).collect();
            reset(&mut scene, 0);
            let answer = loop {
                scene.world.step();
                let answer = scene.vm.control.poll().unwrap();
                if let Some(answer) = answer {
                    break answer;
                }
                disk.state().complete_all();
            };
            assert_eq!(answer.response, code::OK);
            let mut ended = 0;
            for tag in tags {
                let done = scene.vm.answer(tag).expect("answered before the function");
                ended += usize::from(done.response.response == code::RESET);
                assert!(done.response.is_good() || done.response.response == code::RESET);
            }
            assert_eq!(disk.state().flying(), 0);
            eprintln!("{ended} of 150 were ended");
        }
    }
}

/// A guest that submits requests all the time gets its answer.
#[test]
fn a_reset_is_answered_under_load() {
    for packed in [false, true] {
        let (mut scene, _disk) = Scene::of(64, Guest { size: 128, packed, ..Guest::default() });
        // More than one visit takes, again and again.
        let tags: Vec<_> = (0..40).map(|_| scene.vm.write(0, 0, 1)).collect();
        reset(&mut scene, 0);
        let mut out = tags.len();
        let mut answer = None;
        for _ in 0..2_000 {
            scene.world.step();
            while let Some(done) = scene.vm.queues[0].poll().unwrap() {
                assert!(done.response.is_written());
                out -= 1;
            }
            while out < 40 {
                scene.vm.write(0, 0, 1);
                out += 1;
            }
            answer = scene.vm.control.poll().unwrap();
            if answer.is_some() {
                break;
            }
        }
        assert_eq!(answer.expect("answered under load").response, code::OK);
    }
}

#[test]
fn a_reset_does_not_wait_for_another_target_that_hangs() {
    let (mut scene, hanging) = Scene::of(64, Guest { queues: 2, ..Guest::default() });
    let other = TestDisk::create("other", 64);
    scene.add(4, &(Arc::clone(&other) as _));
    scene.vm.attentions(&mut scene.world, 4);
    hanging.state().holds = true;
    other.state().holds = true;
    let hangs: Vec<_> = (0..20).map(|n| scene.vm.write(n % 2, 0, 1)).collect();
    // Commands of several I/Os, and of more than fit into the channel.
    hanging.state().room = Some(2);
    let out = [scene.vm.buffer(&[1; BLOCK])];
    for _ in 0..6 {
        let same = Command::new(lun(0, 0), 0, cdb::write_same(0, 0, 32)).with_data_out(&out);
        scene.vm.submit(0, same, Layout::Separate);
    }
    let tag = scene.vm.write(1, 4, 1);
    scene.world.settle();
    reset(&mut scene, 4);
    scene.world.settle();
    assert_eq!(scene.vm.control.poll().unwrap(), None);
    other.state().release();
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    assert!(scene.vm.answer(tag).unwrap().response.is_good());
    assert!(hangs.iter().all(|tag| scene.vm.answer(*tag).is_none()));
    hanging.state().room = None;
    hanging.state().release();
    for tag in hangs {
        assert!(scene.wait(tag).response.is_good());
    }
}

#[test]
fn a_command_is_aborted_by_its_tag() {
    let (mut scene, disk) = Scene::of(64, Guest { queues: 2, ..Guest::default() });
    disk.state().holds = true;
    let [first, second, third] = [0, 1, 1].map(|queue| scene.vm.write(queue, 0, 1));
    scene.world.settle();
    disk.state().room = Some(0);
    let parked = scene.vm.write(0, 0, 2);
    scene.world.settle();
    for (tag, expected) in [
        (first, code::SUCCEEDED),
        (third, code::SUCCEEDED),
        (parked, code::SUCCEEDED),
        (1 << 40, code::OK),
    ] {
        scene.vm.manage(subtype::QUERY_TASK, lun(0, 0), tag);
        assert_eq!(scene.vm.managed(&mut scene.world).response, expected, "{tag}");
    }
    scene.vm.manage(subtype::QUERY_TASK_SET, lun(0, 0), 0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::SUCCEEDED);
    // One that waits is ended at once.
    scene.vm.manage(subtype::ABORT_TASK, lun(0, 0), parked);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    let response = scene.vm.answer(parked).expect("answered before the function").response;
    assert_eq!(response.response, code::ABORTED);
    disk.state().room = None;
    // One in flight is waited for. Others are not.
    scene.vm.manage(subtype::ABORT_TASK, lun(0, 0), second);
    scene.world.settle();
    disk.state().complete(0);
    disk.state().complete(1);
    scene.world.settle();
    assert_eq!(scene.vm.control.poll().unwrap(), None);
    assert!(scene.vm.answer(first).unwrap().response.is_good());
    assert!(scene.vm.answer(third).unwrap().response.is_good());
    disk.state().complete(0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    let done = scene.vm.answer(second).expect("answered before the function");
    assert!(done.response.is_good() || done.response.response == code::ABORTED);
    for tag in [first, second, parked] {
        scene.vm.manage(subtype::QUERY_TASK, lun(0, 0), tag);
        assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    }
    scene.vm.manage(subtype::QUERY_TASK_SET, lun(0, 0), 0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    assert_eq!(scene.vm.attentions(&mut scene.world, 0), [], "no unit attention");
}

/// A command of several I/Os ends between two of them.
#[test]
fn a_job_is_aborted_between_two_ios() {
    let (mut scene, disk) = Scene::of(6400, Guest::default());
    disk.state().holds = true;
    let out = [scene.vm.buffer(&[1; BLOCK])];
    let same = Command::new(lun(0, 0), 0, cdb::write_same(0, 0, 6400)).with_data_out(&out);
    let tag = scene.vm.submit(0, same, Layout::Separate);
    scene.world.settle();
    assert_eq!(disk.state().flying(), 1);
    scene.vm.manage(subtype::ABORT_TASK, lun(0, 0), tag);
    scene.world.settle();
    disk.state().complete(0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    assert_eq!(scene.vm.answer(tag).unwrap().response.response, code::ABORTED);
    assert_eq!(disk.state().flying(), 0);
    assert_eq!(disk.state().take_seen().len(), 1);
    // Its state is free for the next command.
    disk.state().holds = false;
    for _ in 0..4 {
        assert!(scene.run(same).response.is_good());
    }
}

/// Commands of other front ends belong to other nexuses.
#[test]
fn commands_of_other_front_ends_stay() {
    let disk = TestDisk::create("d", 64);
    let mut world = World::new(1);
    let scsi = world.controller("c");
    scsi.add_target(&world.target, Some(0), &(Arc::clone(&disk) as _)).unwrap();
    let [mut one, mut other] = [(); 2].map(|()| Vm::started(&mut world, "c", Guest::default()));
    one.attentions(&mut world, 0);
    other.attentions(&mut world, 0);
    disk.state().holds = true;
    let tag = other.write(0, 0, 1);
    world.settle();
    for subtype in [subtype::ABORT_TASK_SET, subtype::CLEAR_TASK_SET, subtype::LOGICAL_UNIT_RESET] {
        one.manage(subtype, lun(0, 0), 0);
        assert_eq!(one.managed(&mut world).response, code::OK, "it does not wait");
        one.manage(subtype::QUERY_TASK, lun(0, 0), tag);
        assert_eq!(one.managed(&mut world).response, code::OK, "there is no such command here");
    }
    assert_eq!(other.answer(tag), None);
    disk.state().release();
    assert!(other.wait(&mut world, tag).response.is_good());
    assert_eq!(other.attentions(&mut world, 0).len(), 1, "of the reset");
    assert_eq!(one.attentions(&mut world, 0).len(), 1);
}

#[test]
fn an_i_t_nexus_reset_concerns_one_nexus() {
    let disk = TestDisk::create("d", 64);
    let mut world = World::new(1);
    let scsi = world.controller("c");
    scsi.add_target(&world.target, Some(0), &(disk as _)).unwrap();
    let [mut one, mut other] = [(); 2].map(|()| Vm::started(&mut world, "c", Guest::default()));
    one.attentions(&mut world, 0);
    other.attentions(&mut world, 0);
    one.good(&mut world, 0, cdb::reserve(false), &[], 0);
    let (response, _) = other.command(&mut world, 0, cdb::read(0, 1), &[], BLOCK);
    assert_eq!(response.status, 0x18, "a reservation conflict");
    one.manage(subtype::I_T_NEXUS_RESET, lun(0, 0), 0);
    assert_eq!(one.managed(&mut world).response, code::OK);
    other.good(&mut world, 0, cdb::read(0, 1), &[], BLOCK);
    assert_eq!(one.attentions(&mut world, 0), [(0x29, 7)]);
    assert_eq!(other.attentions(&mut world, 0), []);
}

/// A reset of a target that is being removed.
#[test]
fn a_reset_of_a_target_that_is_being_removed_is_answered() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    disk.state().holds = true;
    let tag = scene.vm.write(0, 0, 1);
    scene.world.settle();
    reset(&mut scene, 0);
    scene.world.settle();
    scene.scsi.remove_target(&scene.world.target, 0).unwrap();
    scene.world.settle();
    // The target does not exist any more, but its I/O is in flight.
    reset(&mut scene, 0);
    scene.world.settle();
    assert_eq!(scene.vm.control.poll().unwrap(), None, "its I/O is in flight");
    disk.state().release();
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::BAD_TARGET);
    assert!(scene.vm.answer(tag).expect("answered before the function").response.is_good());
    let scsi = Arc::clone(&scene.scsi);
    scene.world.until("the number is free", || scsi.is_free(0));
}

#[test]
fn functions_are_answered_in_order() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    disk.state().holds = true;
    let tag = scene.vm.write(0, 0, 1);
    scene.world.settle();
    let sent: Vec<_> = [subtype::LOGICAL_UNIT_RESET, subtype::QUERY_TASK, subtype::ABORT_TASK_SET]
        .into_iter()
        .map(|subtype| {
            let tmf = front_end::scsi::Tmf { subtype, lun: lun(0, 0), tag };
            scene.vm.control.submit(&tmf).unwrap()
        })
        .collect();
    scene.world.settle();
    assert_eq!(scene.vm.control.poll().unwrap(), None);
    disk.state().release();
    for tag in sent {
        let answer = scene.vm.managed(&mut scene.world);
        assert_eq!((answer.tag, answer.response), (tag, code::OK));
    }
}

/// After a restart of the rings, an earlier function has no effect.
#[test]
fn an_earlier_function_does_not_affect_a_new_queue() {
    for reconnects in [false, true] {
        let (mut scene, _disk) = Scene::of(64, Guest::default());
        reset(&mut scene, 0);
        assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
        scene.vm.attentions(&mut scene.world, 0);
        scene.vm.stop_all(&mut scene.world);
        if reconnects {
            scene.vm.hang_up();
            scene.world.settle();
            scene.vm.reconnect(&scene.world, "c");
        } else {
            scene.vm.start_all();
        }
        // Before the queue is visited.
        let tag = scene.vm.write(0, 0, 1);
        let response = scene.wait(tag).response;
        let attention = reconnects && response.sense().is_some_and(|(key, ..)| key == 6);
        assert!(response.is_good() || attention, "{response:?}");
    }
}

/// Queues that are not served are not waited for.
#[test]
fn a_reset_does_not_wait_for_queues_that_are_not_served() {
    let (mut scene, disk) = Scene::of(64, Guest { queues: 3, ..Guest::default() });
    // One is stopped, one is broken, and one has I/O in flight.
    scene.vm.stop_ring(2 + 1);
    scene.world.settle();
    scene.vm.queues[2].ring().set_available_index(999);
    scene.world.settle();
    reset(&mut scene, 0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    disk.state().holds = true;
    let tag = scene.vm.write(0, 0, 1);
    scene.vm.attentions(&mut scene.world, 0);
    scene.world.settle();
    reset(&mut scene, 0);
    scene.world.settle();
    assert_eq!(disk.state().flying(), 0, "the unit attention");
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    assert!(scene.vm.answer(tag).is_some());
}

/// A queue that is stopped while a function waits for its I/O.
#[test]
fn stops_end_while_a_function_waits() {
    for control_first in [false, true] {
        let (mut scene, disk) = Scene::of(64, Guest::default());
        disk.state().holds = true;
        let tag = scene.vm.write(0, 0, 1);
        scene.world.settle();
        reset(&mut scene, 0);
        scene.world.settle();
        scene.vm.stop_ring(if control_first { 0 } else { 2 });
        scene.world.settle();
        scene.world.settle();
        let sent = || super::disk::lock(&scene.vm.wire.sent).len();
        assert_eq!(sent(), 0, "I/O is in flight");
        disk.state().release();
        let wire = Arc::clone(&scene.vm.wire);
        scene.world.until("the ring drains", || !super::disk::lock(&wire.sent).is_empty());
        assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
        assert!(scene.vm.answer(tag).unwrap().response.is_good());
    }
}

/// The front end disconnects while a function waits for I/O.
#[test]
fn a_connection_ends_while_a_function_waits() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    disk.state().holds = true;
    scene.vm.write(0, 0, 1);
    scene.world.settle();
    reset(&mut scene, 0);
    scene.world.settle();
    scene.vm.hang_up();
    scene.world.settle();
    assert_eq!(scene.world.target.connections(), 1);
    disk.state().release();
    let target = Arc::clone(&scene.world.target);
    scene.world.until("the connection is gone", || target.connections() == 0);
    assert_eq!(disk.state().wrong, None);
}

/// Requests that wait for a rate limit are ended.
#[test]
fn a_reset_ends_requests_that_wait_for_a_rate_limit() {
    let (mut scene, disk) = Scene::of(64, Guest { size: 256, ..Guest::default() });
    let limits = RateLimits { rw_ios_per_sec: 1000, ..RateLimits::default() };
    disk.qos().set_limits(limits);
    limits_changed(&scene.world.target, &(Arc::clone(&disk) as _));
    scene.world.settle();
    // Some pass at once, and the others wait for seconds.
    let tags: Vec<_> = (0..60).map(|_| scene.vm.write(0, 0, 1)).collect();
    scene.world.settle();
    reset(&mut scene, 0);
    assert_eq!(scene.vm.managed(&mut scene.world).response, code::OK);
    let responses: Vec<_> =
        tags.iter().map(|tag| scene.vm.answer(*tag).unwrap().response).collect();
    let ended = responses.iter().filter(|response| response.response == code::RESET).count();
    let good = responses.iter().filter(|response| response.is_good()).count();
    assert_eq!(ended + good, 60);
    assert!(ended > 0, "they had to wait");
}
