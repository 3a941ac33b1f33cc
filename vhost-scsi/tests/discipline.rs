//! Reactors neither allocate nor free memory: in commands, functions, events, and when targets
//! come, go and change.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]
#![expect(unsafe_code, reason = "an allocator that counts")]

mod device {
    #[expect(dead_code, reason = "the tests of the device use the rest")]
    pub(crate) mod disk;
    #[path = "../../../vhost-target/tests/wire/mod.rs"]
    pub(crate) mod wire;
    #[expect(dead_code, reason = "the tests of the device use the rest")]
    pub(crate) mod world;
}

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::cell::Cell;
use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection,
    Latency, Malloc, MallocOptions, RateLimits,
};
use front_end::scsi::{Command, Layout, cdb, code, lun, subtype};
use vhost_scsi::{bdev_resized, limits_changed};
use vhost_target::{Core, Mode};

use device::wire::NoSockets;
use device::world::{Guest, IN_REACTOR, Vm, World};

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, with a count of the calls of reactors.
struct Counting;

fn count() {
    if IN_REACTOR.get() {
        CALLS.set(CALLS.get() + 1);
    }
}

// SAFETY: every call goes to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those of this method.
        unsafe { System.alloc(memory) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, memory: Memory) {
        count();
        // SAFETY: the memory comes from `alloc`, so from the system's allocator.
        unsafe { System.dealloc(ptr, memory) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[track_caller]
fn assert_none(what: &str) {
    assert_eq!(CALLS.take(), 0, "{what}: a reactor has allocated or freed memory");
}

fn malloc(name: &str) -> Arc<dyn Bdev> {
    let options =
        MallocOptions { name: name.into(), num_blocks: 4096, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

/// A controller on two reactors. Its targets are a memory disk, one that is slow, and one that
/// fails.
struct Stage {
    world: World,
    scsi: Arc<vhost_scsi::Scsi>,
    vm: Vm,
    slow: Arc<dyn Bdev>,
    failing: Arc<ErrorDisk>,
}

impl Stage {
    fn new(mode: Mode, packed: bool) -> Self {
        let mut world = World::in_mode(2, mode);
        let scsi = world.controller("c");
        let (avg_read_us, p99_read_us) = (50, 50);
        let (avg_write_us, p99_write_us) = (50, 50);
        let latency = Latency { avg_read_us, p99_read_us, avg_write_us, p99_write_us };
        let options = DelayOptions { name: "d".into(), base: malloc("b"), latency, uuid: None };
        let slow: Arc<dyn Bdev> = Delay::create(options).unwrap();
        let options = ErrorOptions { name: "e".into(), base: malloc("b2"), uuid: None };
        let failing = ErrorDisk::create(options).unwrap();
        let bdevs = [malloc("m"), Arc::clone(&slow), Arc::clone(&failing) as _];
        for (number, bdev) in (0..).zip(&bdevs) {
            scsi.add_target(&world.target, Some(number), bdev).unwrap();
        }
        let guest = Guest { queues: 2, size: 256, indirect: true, packed, ..Guest::default() };
        let mut vm = Vm::started(&mut world, "c", guest);
        (0..8).for_each(|_| _ = vm.events.post().unwrap());
        Self { world, scsi, vm, slow, failing }
    }

    /// Commands of all kinds.
    fn commands(&mut self) {
        let list = cdb::unmap_list(&[(0, 3), (9, 200)]);
        let commands = [
            (cdb::test_unit_ready(), 0, 0),
            (cdb::inquiry(None, 96), 0, 96),
            (cdb::inquiry(Some(0x83), 255), 0, 255),
            (cdb::report_luns(0, 16), 0, 16),
            (cdb::read_capacity(32), 0, 32),
            (cdb::read(0, 8), 0, 4096),
            (cdb::read(0, 8), 0, 1000),
            (cdb::read(5000, 8), 0, 4096),
            (cdb::ten(0x28, cdb::FUA, 0, 8), 0, 4096),
            (cdb::write(0, 8), 4096, 0),
            (cdb::ten(0x2a, cdb::FUA, 0, 8), 4096, 0),
            (cdb::synchronize_cache(), 0, 0),
            (cdb::write_same(0, 0, 400), 512, 0),
            (cdb::verify(cdb::COMPARE, 0, 8), 4096, 0),
            (cdb::write_and_verify(cdb::COMPARE, 0, 8), 4096, 0),
            (cdb::compare_and_write(0, 0, 4), 4096, 0),
            (cdb::sixteen(0x8b, 0, 0, 8), 4096, 0),
            (cdb::unmap(list.len() as u16), list.len(), 0),
            (cdb::of(&[0x1a, 0, 0x3f, 0, 255]), 0, 255),
            (cdb::persistent_reserve_in(0, 64), 0, 64),
            (cdb::reserve(false), 0, 0),
            (cdb::reserve(true), 0, 0),
            (cdb::of(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 4, 0]), 0, 1024),
            (cdb::of(&[0xff]), 10, 10),
        ];
        for target in [0, 1, 2, 5] {
            for (cdb, out, data) in commands {
                let bytes = if cdb[0] == 0x42 { list.clone() } else { vec![1; out] };
                self.vm.command(&mut self.world, target, cdb, &bytes, data);
            }
            for layout in [Layout::Cut(1), Layout::Stream(100), Layout::Separate] {
                let to: Vec<_> = (0..700).map(|_| self.vm.zeroed(16)).collect();
                let to = if matches!(layout, Layout::Stream(_)) { &to[..100] } else { &to[..] };
                let blocks = (to.len() * 16 / 512) as u16;
                let read = Command::new(lun(target, 0), 0, cdb::read(0, blocks)).with_data_in(to);
                let tag = self.vm.submit(1, read, layout);
                self.vm.wait(&mut self.world, tag);
            }
        }
    }

    fn write(&mut self, queue: usize, target: u8) -> u64 {
        let out = [self.vm.zeroed(512)];
        let write = Command::new(lun(target, 0), 0, cdb::write(0, 1)).with_data_out(&out);
        self.vm.submit(queue, write, Layout::Separate)
    }

    fn inject(&self, error: InjectedError, count: u32) {
        let op = InjectedOp::All;
        self.failing.inject(Injection { op, error, count, queue_depth: 0 }).unwrap();
    }
}

#[test]
fn reactors_do_not_allocate() {
    for mode in [Mode::Poll, Mode::Sleep { after_us: 0 }] {
        for packed in [false, true] {
            let mut stage = Stage::new(mode, packed);
            assert_none("the start");
            stage.commands();
            assert_none("commands");
            functions(&mut stage);
            assert_none("functions");
            targets(&mut stage);
            assert_none("targets");
            moves_and_stops(&mut stage);
            assert_none("moves and stops");
            failures(&mut stage);
            assert_none("failures");
        }
    }
}

fn functions(stage: &mut Stage) {
    for subtype in 0..9 {
        let tags = [0, 1].map(|queue| stage.write(queue, 1));
        for target in [0, 1, 6] {
            stage.vm.manage(subtype, lun(target, 0), tags[0]);
            stage.vm.managed(&mut stage.world);
        }
        for tag in tags {
            stage.vm.wait(&mut stage.world, tag);
        }
    }
}

fn targets(stage: &mut Stage) {
    let (target, scsi) = (Arc::clone(&stage.world.target), Arc::clone(&stage.scsi));
    for _ in 0..3 {
        scsi.add_target(&target, Some(4), &stage.slow).unwrap();
        stage.world.settle();
        stage.vm.attentions(&mut stage.world, 4);
        let tags = [stage.write(0, 4), stage.write(1, 4)];
        stage.world.step();
        scsi.remove_target(&target, 4).unwrap();
        for tag in tags {
            stage.vm.wait(&mut stage.world, tag);
        }
        stage.world.until("the number is free", || scsi.is_free(4));
        let events = stage.vm.take_events();
        events.iter().for_each(|_| _ = stage.vm.events.post().unwrap());
        bdev_resized(&target, &stage.slow);
        for rw_ios_per_sec in [1000, 0] {
            let limits = RateLimits { rw_ios_per_sec, ..RateLimits::default() };
            stage.slow.qos().set_limits(limits);
            limits_changed(&target, &stage.slow);
            stage.world.settle();
            let tags: Vec<_> = (0..20).map(|n| stage.write(n % 2, 1)).collect();
            for tag in tags {
                stage.vm.wait(&mut stage.world, tag);
            }
        }
    }
}

fn moves_and_stops(stage: &mut Stage) {
    for round in 0..8 {
        let tags = [0, 1].map(|queue| stage.write(queue, 1));
        stage.world.step();
        let (ring, core) = (round % 4, Core((round / 4 + round) % 2));
        if let Some(moving) = stage.world.target.begin_move("c", None, ring, core).unwrap() {
            while stage.world.target.end_move(&moving).is_none() {
                stage.world.step();
            }
        }
        for tag in tags {
            stage.vm.wait(&mut stage.world, tag);
        }
    }
    stage.vm.stop_all(&mut stage.world);
    stage.vm.start_all();
    stage.world.settle();
}

fn failures(stage: &mut Stage) {
    for error in [InjectedError::Failure, InjectedError::NoMemory] {
        stage.inject(error, 3);
        for _ in 0..4 {
            let tag = stage.write(0, 2);
            let done = stage.vm.wait(&mut stage.world, tag);
            assert_eq!(done.response.response, code::OK);
        }
    }
    // The controller is deleted while I/O hangs.
    stage.inject(InjectedError::Pending, 2);
    let _hangs = [0, 1].map(|queue| stage.write(queue, 2));
    stage.world.settle();
    stage.vm.manage(subtype::LOGICAL_UNIT_RESET, lun(2, 0), 0);
    stage.world.settle();
    let deletion = stage.world.target.begin_delete("c", true).unwrap();
    deletion.finish(&NoSockets);
    stage.world.settle();
    stage.failing.abort_pending();
    let target = Arc::clone(&stage.world.target);
    stage.world.until("the connection is gone", || target.connections() == 0);
}
