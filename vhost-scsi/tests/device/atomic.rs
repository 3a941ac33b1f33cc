//! COMPARE AND WRITE and ORWRITE are atomic: no other command of any front end changes their blocks
//! meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bdev::Op;
use front_end::Segment;
use front_end::scsi::cdb::Cdb;
use front_end::scsi::{Command, Layout, cdb, lun};
use vhost_target::{Core, SteppedReactor};

use super::data_path::malloc;
use super::disk::TestDisk;
use super::world::{Guest, Scene, Vm, World};

const BLOCK: usize = 512;

/// Two controllers that show one disk, on a reactor each, with a guest each.
fn two(bdev: &Arc<dyn bdev::Bdev>) -> (World, [Vm; 2]) {
    let mut world = World::new(2);
    let vms = [0, 1].map(|n| {
        let name = format!("c{n}");
        let scsi = world.controller_on(&name, Some(vec![Core(n)]));
        scsi.add_target(&world.target, Some(3), bdev).unwrap();
        let mut vm = Vm::started(&mut world, &name, Guest::default());
        vm.attentions(&mut world, 3);
        vm
    });
    (world, vms)
}

fn send(vm: &mut Vm, cdb: Cdb, out: &[u8]) -> u64 {
    let out = [vm.buffer(out)];
    let command = Command::new(lun(3, 0), 0, cdb).with_data_out(&out);
    vm.submit(0, command, Layout::Separate)
}

#[test]
fn writes_to_its_blocks_wait_for_an_atomic_command() {
    let disk = TestDisk::create("d", 400);
    let (mut world, [mut one, mut other]) = two(&(Arc::clone(&disk) as _));
    for (atomic, len) in
        [(cdb::compare_and_write(0, 100, 4), 8), (cdb::sixteen(0x8b, 0, 100, 4), 4)]
    {
        disk.state().data.fill(0);
        disk.state().holds = true;
        disk.state().seen.clear();
        let both = [vec![0; 4 * BLOCK], vec![7; (len - 4) * BLOCK]].concat();
        let atomic = send(&mut one, atomic, &both);
        world.settle();
        let read = (Op::Read, 100 * 512, 4 * 512);
        assert_eq!(disk.state().take_seen(), [read]);
        let waits = [
            send(&mut other, cdb::write(103, 1), &[9; BLOCK]),
            send(&mut other, cdb::write(99, 2), &[9; 2 * BLOCK]),
            send(&mut one, cdb::write(100, 4), &[9; 4 * BLOCK]),
            send(&mut other, cdb::write_same(0, 90, 20), &[9; BLOCK]),
            send(&mut one, cdb::unmap(40), &cdb::unmap_list(&[(0, 1), (102, 1)])),
            send(&mut other, cdb::compare_and_write(0, 101, 1), &[0; 2 * BLOCK]),
        ];
        let goes = send(&mut other, cdb::write(104, 1), &[9; BLOCK]);
        world.settle();
        assert_eq!(disk.state().take_seen(), [(Op::Write, 104 * 512, 512)]);
        disk.state().complete_all();
        assert!(other.wait(&mut world, goes).response.is_good());
        world.settle();
        let written = (Op::Write, 100 * 512, 4 * 512);
        assert_eq!(disk.state().take_seen(), [written], "nothing else has begun");
        disk.state().complete(0);
        assert!(one.wait(&mut world, atomic).response.is_good());
        disk.state().release();
        for (n, tag) in waits.into_iter().enumerate() {
            let vm = if matches!(n, 2 | 4) { &mut one } else { &mut other };
            let response = vm.wait(&mut world, tag).response;
            assert!(response.is_good() || response.sense() == Some((0xe, 0x1d, 0)), "{n}");
        }
        assert_eq!(disk.state().wrong, None);
    }
}

#[test]
fn an_atomic_command_waits_for_writes_that_have_begun() {
    let disk = TestDisk::create("d", 400);
    let (mut world, [mut one, mut other]) = two(&(Arc::clone(&disk) as _));
    disk.state().holds = true;
    let writes = [
        send(&mut other, cdb::write(10, 1), &[1; BLOCK]),
        send(&mut one, cdb::write_same(0, 10, 2), &[1; BLOCK]),
    ];
    world.settle();
    let atomic =
        send(&mut one, cdb::compare_and_write(0, 10, 1), &[vec![1; 512], vec![2; 512]].concat());
    world.settle();
    assert!(disk.state().take_seen().iter().all(|(op, ..)| *op == Op::Write));
    disk.state().complete(0);
    world.settle();
    assert_eq!(disk.state().take_seen(), [], "the other is in flight");
    disk.state().complete(0);
    world.settle();
    assert_eq!(disk.state().take_seen(), [(Op::Read, 10 * 512, 512)]);
    disk.state().release();
    assert!(one.wait(&mut world, atomic).response.is_good());
    assert!(other.wait(&mut world, writes[0]).response.is_good());
    assert!(one.wait(&mut world, writes[1]).response.is_good());
    assert!(disk.state().data[10 * BLOCK..11 * BLOCK].iter().all(|byte| *byte == 2));
}

/// The exclusive range ends with the front end, too.
#[test]
fn a_front_end_that_disconnects_ends_its_atomic_command() {
    let disk = TestDisk::create("d", 400);
    let (mut world, [mut one, mut other]) = two(&(Arc::clone(&disk) as _));
    disk.state().holds = true;
    send(&mut one, cdb::compare_and_write(0, 10, 1), &[0; 2 * BLOCK]);
    world.settle();
    let write = send(&mut other, cdb::write(10, 1), &[1; BLOCK]);
    one.hang_up();
    world.settle();
    assert_eq!(disk.state().take_seen(), [(Op::Read, 10 * 512, 512)]);
    disk.state().release();
    assert!(other.wait(&mut world, write).response.is_good());
}

#[test]
fn orwrite_sets_bits() {
    let (mut scene, disk) = Scene::of(300, Guest::default());
    disk.state().data.fill(0x81);
    scene.good(0, cdb::sixteen(0x8b, 0, 5, 200), &vec![0x12; 200 * BLOCK], 0);
    let data = &disk.state().data;
    assert!(data[5 * BLOCK..205 * BLOCK].iter().all(|byte| *byte == 0x93));
    assert!(data[..5 * BLOCK].iter().chain(&data[205 * BLOCK..]).all(|byte| *byte == 0x81));
}

/// A guest on its own thread, with its reactor.
struct Runner<'s> {
    vm: Vm,
    reactor: SteppedReactor,
    stop: &'s AtomicBool,
    buffer: Segment,
}

/// Blocks of the values: so many that a command takes several I/Os.
const BLOCKS: u8 = 100;

impl Runner<'_> {
    fn run(&mut self, command: Command<'_>) -> front_end::scsi::Response {
        let tag = self.vm.submit(0, command, Layout::Separate);
        loop {
            // The other guest may need the processor.
            for _ in 0..100 {
                self.reactor.step();
                if let Some(done) = self.vm.answer(tag) {
                    return done.response;
                }
            }
            thread::yield_now();
        }
    }

    /// Returns the value of all blocks, unless it is being changed.
    fn read(&mut self) -> Option<u64> {
        let len = u32::from(BLOCKS) * 512;
        let to = [Segment::new(self.buffer.gpa, len)];
        let read = Command::new(lun(3, 0), 0, cdb::read(0, BLOCKS.into())).with_data_in(&to);
        assert!(self.run(read).is_good());
        let bytes = self.vm.bytes(to[0]);
        let first = &bytes[..8];
        let whole = bytes.chunks(8).all(|value| value == first);
        whole.then(|| u64::from_le_bytes(first.try_into().unwrap()))
    }

    fn put(&self, at: u32, value: u64) -> Segment {
        let len = u32::from(BLOCKS) * 512;
        let gpa = self.buffer.gpa + u64::from(at * len);
        self.vm.ram.write(gpa, &value.to_le_bytes().repeat(len as usize / 8)).unwrap();
        Segment::new(gpa, len)
    }

    /// Returns whether the value was `old`, and is `new` now.
    fn exchange(&mut self, old: u64, new: u64) -> bool {
        let data = [self.put(0, old), self.put(1, new)];
        let cdb = cdb::compare_and_write(0, 0, BLOCKS);
        let response = self.run(Command::new(lun(3, 0), 0, cdb).with_data_out(&data));
        assert!(response.is_good() || response.sense() == Some((0xe, 0x1d, 0)), "{response:?}");
        response.is_good()
    }

    fn write(&mut self, value: u64) {
        let data = [self.put(0, value)];
        let cdb = cdb::write(0, BLOCKS.into());
        assert!(self.run(Command::new(lun(3, 0), 0, cdb).with_data_out(&data)).is_good());
    }
}

/// Runs two guests on a thread each. Returns what they return.
fn race<A: Send, B: Send>(
    one: impl FnOnce(Runner<'_>) -> A + Send,
    other: impl FnOnce(Runner<'_>) -> B + Send,
) -> (A, B) {
    let bdev = malloc("m", 512, 4096);
    let (mut world, vms) = two(&bdev);
    let mut reactors = std::mem::take(&mut world.reactors).into_iter();
    let stop = AtomicBool::new(false);
    let mut runners = vms.map(|vm| {
        let buffer = vm.zeroed(2 * usize::from(BLOCKS) * BLOCK);
        Some(Runner { vm, reactor: reactors.next().unwrap(), stop: &stop, buffer })
    });
    let [a, b] = runners.each_mut().map(|runner| runner.take().unwrap());
    thread::scope(|scope| {
        let a = scope.spawn(|| one(a));
        let b = scope.spawn(|| other(b));
        (a.join().unwrap(), b.join().unwrap())
    })
}

/// Counts up to this.
const COUNT: u64 = 1_000;

/// Both guests count with COMPARE AND WRITE: no step is lost.
#[test]
fn two_guests_count_together() {
    let count = |mut runner: Runner<'_>| {
        let mut steps = 0;
        loop {
            match runner.read() {
                Some(value) if value >= COUNT => return steps,
                Some(value) => steps += u64::from(runner.exchange(value, value + 1)),
                None => {}
            }
        }
    };
    let (one, other) = race(count, count);
    assert_eq!(one + other, COUNT, "{one} and {other}");
}

/// One guest exchanges values, the other writes. A write that comes between the comparison and the
/// write of an exchange would be lost.
#[test]
fn no_write_is_lost_to_an_exchange() {
    const WRITTEN: u64 = 1 << 32;
    let exchange = |mut runner: Runner<'_>| {
        // What each exchanged value has replaced.
        let mut replaced = HashMap::new();
        let mut next = 1;
        while !runner.stop.load(Ordering::Relaxed) {
            let Some(value) = runner.read() else { continue };
            if runner.exchange(value, next) {
                replaced.insert(next, value);
                next += 1;
            }
        }
        replaced
    };
    let write = |mut runner: Runner<'_>| {
        let mut read = vec![];
        for n in 0..COUNT {
            runner.write(WRITTEN | n);
            let value = std::iter::from_fn(|| Some(runner.read())).flatten().next().unwrap();
            read.push((n, value));
        }
        runner.stop.store(true, Ordering::Relaxed);
        read
    };
    let (replaced, read) = race(exchange, write);
    let mut exchanged = 0;
    for (n, mut value) in read {
        exchanged += u64::from(value & WRITTEN == 0);
        while value & WRITTEN == 0 {
            value = replaced[&value];
        }
        assert_eq!(value, WRITTEN | n, "the write was lost");
    }
    eprintln!("{} exchanges, {exchanged} of them before the next read", replaced.len());
    assert!(!replaced.is_empty());
}
