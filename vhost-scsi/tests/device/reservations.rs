//! Reservations between front ends of one controller, of two controllers, and of two targets that
//! show one disk.

use std::sync::Arc;

use front_end::scsi::{Command, Layout, Response, cdb, code, lun};

use super::data_path::malloc;
use super::disk::TestDisk;
use super::world::{Guest, Vm, World};

const BLOCK: usize = 512;
const CONFLICT: u8 = 0x18;

/// Service actions and types.
const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const WRITE_EXCLUSIVE: u8 = 1;
const EXCLUSIVE_ACCESS: u8 = 3;
const REGISTRANTS_ONLY: u8 = 5;

/// Two front ends of one controller, and one of another. All targets show one disk.
struct Hosts {
    world: World,
    vms: [Vm; 3],
    disk: Arc<TestDisk>,
}

/// The target through which each front end reaches the disk.
const TARGETS: [u8; 3] = [0, 0, 2];

impl Hosts {
    fn new() -> Self {
        let mut world = World::new(2);
        let disk = TestDisk::create("shared", 64);
        for (name, number) in [("a", 0), ("b", 2)] {
            let scsi = world.controller(name);
            scsi.add_target(&world.target, Some(number), &(Arc::clone(&disk) as _)).unwrap();
        }
        let mut vms = ["a", "a", "b"].map(|name| Vm::started(&mut world, name, Guest::default()));
        for (vm, target) in vms.iter_mut().zip(TARGETS) {
            vm.attentions(&mut world, target);
        }
        Self { world, vms, disk }
    }

    fn out(&mut self, n: usize, action: u8, kind: u8, key: u64, new: u64) -> Response {
        let (cdb, list) =
            (cdb::persistent_reserve_out(action, kind), cdb::reservation_keys(key, new));
        self.vms[n].command(&mut self.world, TARGETS[n], cdb, &list, 0).0
    }

    #[track_caller]
    fn good(&mut self, n: usize, action: u8, kind: u8, key: u64, new: u64) {
        let response = self.out(n, action, kind, key, new);
        assert!(response.is_good(), "{response:?}");
    }

    fn write(&mut self, n: usize) -> Response {
        let (vm, world) = (&mut self.vms[n], &mut self.world);
        vm.command(world, TARGETS[n], cdb::write(1, 1), &[1; BLOCK], 0).0
    }

    fn read(&mut self, n: usize) -> Response {
        self.vms[n].command(&mut self.world, TARGETS[n], cdb::read(1, 1), &[], BLOCK).0
    }

    /// Which front ends may read, and which may write.
    fn allowed(&mut self) -> ([bool; 3], [bool; 3]) {
        let is = |response: Response| {
            assert!(response.is_good() || response.status == CONFLICT, "{response:?}");
            assert_eq!((response.response, response.sense_len), (code::OK, 0));
            response.is_good()
        };
        ([0, 1, 2].map(|n| is(self.read(n))), [0, 1, 2].map(|n| is(self.write(n))))
    }

    fn attentions(&mut self, n: usize) -> Vec<(u8, u8)> {
        self.vms[n].attentions(&mut self.world, TARGETS[n])
    }

    fn keys(&mut self, n: usize) -> Vec<u64> {
        let cdb = cdb::persistent_reserve_in(0, 512);
        let data = self.vms[n].good(&mut self.world, TARGETS[n], cdb, &[], 512);
        let len = u32::from_be_bytes(data[4..8].try_into().unwrap()) as usize;
        let mut keys: Vec<_> = data[8..8 + len]
            .chunks(8)
            .map(|key| u64::from_be_bytes(key.try_into().unwrap()))
            .collect();
        keys.sort_unstable();
        keys
    }
}

/// Each front end is a nexus of its own.
#[test]
fn a_reservation_holds_for_all_other_front_ends() {
    let mut hosts = Hosts::new();
    let all = [true; 3];
    assert_eq!(hosts.allowed(), (all, all));
    hosts.good(0, REGISTER, 0, 0, 10);
    hosts.good(2, REGISTER, 0, 0, 12);
    assert_eq!(hosts.keys(1), [10, 12]);
    assert_eq!(hosts.out(1, RESERVE, WRITE_EXCLUSIVE, 0, 0).status, CONFLICT, "not registered");
    hosts.good(0, RESERVE, WRITE_EXCLUSIVE, 10, 0);
    assert_eq!(hosts.allowed(), (all, [true, false, false]));
    assert_eq!(hosts.out(2, RESERVE, WRITE_EXCLUSIVE, 12, 0).status, CONFLICT);
    hosts.good(0, RELEASE, WRITE_EXCLUSIVE, 10, 0);
    assert_eq!(hosts.allowed(), (all, all));
    hosts.good(2, RESERVE, EXCLUSIVE_ACCESS, 12, 0);
    let only = [false, false, true];
    assert_eq!(hosts.allowed(), (only, only));
    hosts.good(2, RELEASE, EXCLUSIVE_ACCESS, 12, 0);
    hosts.good(2, RESERVE, REGISTRANTS_ONLY, 12, 0);
    assert_eq!(hosts.allowed(), (all, [true, false, true]));
    hosts.good(2, CLEAR, 0, 12, 0);
    assert_eq!(hosts.attentions(0), [(0x2a, 3)], "reservations preempted");
    assert_eq!(hosts.allowed(), (all, all));
    assert!(hosts.keys(0).is_empty());
}

#[test]
fn a_preempted_nexus_gets_a_unit_attention_and_conflicts() {
    let mut hosts = Hosts::new();
    for (n, key) in [(0, 10), (1, 11), (2, 12)] {
        hosts.good(n, REGISTER, 0, 0, key);
    }
    hosts.good(0, RESERVE, WRITE_EXCLUSIVE, 10, 0);
    hosts.good(2, PREEMPT, WRITE_EXCLUSIVE, 12, 10);
    assert_eq!(hosts.attentions(0), [(0x2a, 5)], "registrations preempted");
    assert_eq!(hosts.attentions(1), []);
    assert_eq!(hosts.allowed().1, [false, false, true]);
    assert_eq!(hosts.keys(1), [11, 12]);
    assert_eq!(hosts.out(0, RESERVE, WRITE_EXCLUSIVE, 10, 0).status, CONFLICT);
}

/// No write of a preempted front end reaches the disk after the answer to PREEMPT AND ABORT.
#[test]
fn preempt_and_abort_waits_for_writes_in_flight() {
    let mut hosts = Hosts::new();
    hosts.good(0, REGISTER, 0, 0, 10);
    hosts.good(2, REGISTER, 0, 0, 12);
    hosts.good(0, RESERVE, WRITE_EXCLUSIVE, 10, 0);
    hosts.disk.state().holds = true;
    let out = [hosts.vms[0].buffer(&[9; BLOCK])];
    let write = Command::new(lun(0, 0), 0, cdb::write(1, 1)).with_data_out(&out);
    let writes = [0, 1].map(|_| hosts.vms[0].submit(0, write, Layout::Separate));
    hosts.world.settle();
    let list = [hosts.vms[2].buffer(&cdb::reservation_keys(12, 10))];
    let preempt = cdb::persistent_reserve_out(PREEMPT_AND_ABORT, WRITE_EXCLUSIVE);
    let preempt = Command::new(lun(2, 0), 0, preempt).with_data_out(&list);
    let preempt = hosts.vms[2].submit(0, preempt, Layout::Separate);
    hosts.world.settle();
    // Another command of the same queue is answered meanwhile: it has a reply of its own.
    let inquiry = hosts.vms[2].good(&mut hosts.world, 2, cdb::inquiry(None, 96), &[], 96);
    assert_eq!(inquiry[0], 0);
    let late = hosts.vms[0].submit(0, write, Layout::Separate);
    let response = hosts.vms[0].wait(&mut hosts.world, late).response;
    assert!(response.status == CONFLICT || response.sense() == Some((6, 0x2a, 5)), "{response:?}");
    assert_eq!(hosts.vms[2].answer(preempt), None);
    hosts.disk.state().complete(0);
    hosts.world.settle();
    assert_eq!(hosts.vms[2].answer(preempt), None, "one more is in flight");
    hosts.disk.state().release();
    let done = hosts.vms[2].wait(&mut hosts.world, preempt);
    assert!(done.response.is_good(), "{done:?}");
    assert_eq!((done.response.residual, done.used_len), (0, 108));
    for tag in writes {
        assert!(hosts.vms[0].answer(tag).is_some(), "answered before");
    }
    assert_eq!(hosts.allowed().1, [false, false, true]);
}

/// RESERVE and RELEASE, and what ends with the front end.
#[test]
fn reserve_ends_with_the_front_end() {
    for resets in [false, true] {
        let mut hosts = Hosts::new();
        let reserve = |hosts: &mut Hosts, n: usize, release| {
            let (vm, world) = (&mut hosts.vms[n], &mut hosts.world);
            vm.command(world, TARGETS[n], cdb::reserve(release), &[], 0).0
        };
        assert!(reserve(&mut hosts, 0, false).is_good());
        assert!(reserve(&mut hosts, 0, false).is_good());
        assert_eq!(reserve(&mut hosts, 1, false).status, CONFLICT);
        assert_eq!(reserve(&mut hosts, 2, false).status, CONFLICT);
        let only = [true, false, false];
        assert_eq!(hosts.allowed(), (only, only));
        assert!(reserve(&mut hosts, 1, true).is_good(), "RELEASE of others has no effect");
        assert_eq!(hosts.allowed(), (only, only));
        assert!(reserve(&mut hosts, 0, true).is_good());
        assert_eq!(hosts.allowed(), ([true; 3], [true; 3]));
        assert!(reserve(&mut hosts, 0, false).is_good());
        if resets {
            hosts.vms[0].stop_all(&mut hosts.world);
            // A new driver negotiates.
            hosts.vms[0].features ^= front_end::scsi::CHANGE;
            hosts.vms[0].negotiate();
            hosts.vms[0].start_all();
        } else {
            hosts.vms[0].hang_up();
            hosts.world.settle();
            hosts.vms[0].reconnect(&hosts.world, "a");
        }
        hosts.world.settle();
        hosts.attentions(0);
        assert_eq!(hosts.allowed(), ([true; 3], [true; 3]));
    }
}

/// The dirty log is switched while a driver runs: that is no new driver.
#[test]
fn a_reservation_outlives_a_migration_that_begins() {
    let mut hosts = Hosts::new();
    let reserve = cdb::reserve(false);
    hosts.vms[0].good(&mut hosts.world, 0, reserve, &[], 0);
    hosts.vms[0].begin_log();
    hosts.world.settle();
    assert_eq!(hosts.allowed().1, [true, false, false]);
    hosts.vms[0].end_log();
    hosts.world.settle();
    assert_eq!(hosts.allowed().1, [true, false, false]);
}

/// A front end that connects again has its registration.
#[test]
fn a_registration_outlives_a_reconnection() {
    let mut hosts = Hosts::new();
    hosts.good(0, REGISTER, 0, 0, 10);
    hosts.good(1, REGISTER, 0, 0, 11);
    hosts.good(0, RESERVE, WRITE_EXCLUSIVE, 10, 0);
    for n in [0, 1, 0] {
        hosts.vms[n].hang_up();
        hosts.world.settle();
        hosts.vms[n].reconnect(&hosts.world, "a");
        hosts.world.settle();
        assert_eq!(hosts.attentions(n), [(0x29, 0)]);
        assert_eq!(hosts.allowed().1, [true, false, false], "{n}");
        assert_eq!(hosts.keys(2), [10, 11]);
    }
    hosts.good(0, RELEASE, WRITE_EXCLUSIVE, 10, 0);
    hosts.good(0, REGISTER, 0, 10, 0);
    assert_eq!(hosts.keys(2), [11]);
}

/// Registrations of a controller end with it.
#[test]
fn registrations_end_with_the_controller() {
    let mut hosts = Hosts::new();
    hosts.good(0, REGISTER, 0, 0, 10);
    hosts.good(2, REGISTER, 0, 0, 12);
    hosts.good(0, RESERVE, EXCLUSIVE_ACCESS, 10, 0);
    let deletion = hosts.world.target.begin_delete("a", true).unwrap();
    hosts.vms[0].hang_up();
    hosts.vms[1].hang_up();
    hosts.world.settle();
    deletion.finish(&super::wire::NoSockets);
    let target = Arc::clone(&hosts.world.target);
    hosts.world.until("the connections are gone", || target.connections() == 1);
    hosts.attentions(2);
    assert_eq!(hosts.keys(2), [12]);
    assert!(hosts.write(2).is_good());
}

/// A nexus ends when its target is removed.
#[test]
fn reserve_ends_when_the_target_is_removed() {
    let mut world = World::new(1);
    let (scsi, bdev) = (world.controller("c"), malloc("m", 512, 64));
    for number in [0, 1] {
        scsi.add_target(&world.target, Some(number), &bdev).unwrap();
    }
    let mut vm = Vm::started(&mut world, "c", Guest::default());
    vm.attentions(&mut world, 0);
    vm.attentions(&mut world, 1);
    vm.good(&mut world, 0, cdb::reserve(false), &[], 0);
    let (response, _) = vm.command(&mut world, 1, cdb::read(0, 1), &[], BLOCK);
    assert_eq!(response.status, CONFLICT, "the paths are different nexuses");
    scsi.remove_target(&world.target, 0).unwrap();
    world.until("the number is free", || scsi.is_free(0));
    vm.good(&mut world, 1, cdb::read(0, 1), &[], BLOCK);
}
