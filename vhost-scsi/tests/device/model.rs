//! Random commands, functions, completions, stops, removals, moves, changes of memory and dirty
//! log, and kills of the process, by a seed. A failure prints its seed; `MODEL_SEED=n` replays one.
//!
//! After each step:
//! * No memory of an answered command has been accessed: its buffers are overwritten when it is
//!   answered, and stay as they are, and what they have been overwritten with is on no disk.
//! * When a function has been answered that ends commands, those that it is about have been
//!   answered.
//! * The first page of data-in that a command has returned is marked in the dirty log, if there is
//!   one.
//!
//! In the end, every command and every function has been answered once, and nothing is left.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bdev::{Bdev, Op};
use front_end::Segment;
use front_end::scsi::{Command, Layout, Tmf, cdb, code, lun, subtype};
use vhost_scsi::{Scsi, bdev_resized, remove_bdev};
use vhost_target::{Core, Mode};

use super::disk::{Fault, TestDisk, lock};
use super::rng::Rng;
use super::wire::NoSockets;
use super::world::{Guest, Vm, World};

const BLOCK: usize = 512;
const BLOCKS: u64 = 256;
/// What the buffers of answered commands are overwritten with. It is not in the data of commands.
const POISON: u8 = 0xdd;
const STEPS: usize = 500;
const SEEDS: u64 = 30;
/// Buffers of answered commands that are looked at.
const POISONED_MAX: usize = 80;
/// Commands of a front end in flight.
const COMMANDS_MAX: usize = 40;

/// A command that the device has.
#[derive(Clone, Debug)]
struct Sent {
    queue: usize,
    /// The dirty log has been on since it was sent.
    logged: bool,
    target: u8,
    buffers: Vec<Segment>,
}

/// A function that the device has: what it is about, and the commands that it may have to end.
#[derive(Clone, Debug)]
struct Function {
    tmf: Tmf,
    before: Vec<u64>,
}

/// A front end, its guest, and what the device has of it.
struct Host {
    name: &'static str,
    scsi: Arc<Scsi>,
    vm: Vm,
    commands: BTreeMap<u64, Sent>,
    functions: HashMap<u16, Function>,
    /// Rings that are served.
    served: Vec<bool>,
    /// Buffers of answered commands.
    poisoned: Vec<Segment>,
    /// The number of event buffers that the device has.
    posted: usize,
    /// The dirty log is on.
    logs: bool,
}

struct Model {
    rng: Rng,
    world: World,
    hosts: Vec<Host>,
    disks: Vec<Arc<TestDisk>>,
    counts: BTreeMap<&'static str, usize>,
}

/// The devices of a process.
struct Process {
    world: World,
    scsi: Vec<Arc<Scsi>>,
    disks: Vec<Arc<TestDisk>>,
}

const NAMES: [&str; 2] = ["a", "b"];

impl Process {
    /// Both controllers show the first disk, and each has another one.
    fn start(rng: &mut Rng) -> Self {
        let mode = if rng.one_in(2) { Mode::Poll } else { Mode::Sleep { after_us: 0 } };
        let world = World::in_mode(2, mode);
        let disks: Vec<_> =
            ["shared", "one", "other"].map(|name| TestDisk::create(name, BLOCKS)).into();
        for disk in &disks {
            disk.state().holds = true;
        }
        let controller = |(n, name): (usize, &&str)| {
            let scsi = world.controller_on(name, rng.one_in(2).then(|| vec![Core(n)]));
            for (number, disk) in [(0, &disks[0]), (1, &disks[1 + n])] {
                scsi.add_target(&world.target, Some(number), &(Arc::clone(disk) as _)).unwrap();
            }
            scsi
        };
        let scsi = NAMES.iter().enumerate().map(controller).collect();
        Self { world, scsi, disks }
    }
}

/// All I/O fails.
fn all_fail() -> Vec<(Op, Fault)> {
    let all = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];
    all.map(|op| (op, Fault::Errno(libc::EIO))).into()
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let Process { mut world, scsi, disks } = Process::start(&mut rng);
        let host = |(name, scsi)| {
            let guest = Guest {
                queues: 2,
                size: 256,
                packed: rng.one_in(2),
                indirect: rng.one_in(2),
                event_idx: rng.one_in(3),
                tracked: true,
                ..Guest::default()
            };
            let vm = Vm::started(&mut world, name, guest);
            Host {
                name,
                scsi,
                vm,
                commands: BTreeMap::new(),
                functions: HashMap::new(),
                served: vec![true; 4],
                poisoned: vec![],
                posted: 0,
                logs: false,
            }
        };
        let hosts = NAMES.into_iter().zip(scsi).map(host).collect();
        Self { rng, world, hosts, disks, counts: BTreeMap::new() }
    }

    /// Kills the process. The next one serves the same guests.
    fn kill(&mut self) {
        let Process { world, scsi, disks } = Process::start(&mut self.rng);
        let mut killed = std::mem::replace(&mut self.world, world);
        // From here on, it neither accesses a ring nor does I/O.
        for name in NAMES {
            killed.target.begin_delete(name, true).unwrap().finish(&NoSockets);
        }
        for disk in std::mem::replace(&mut self.disks, disks) {
            let mut state = disk.state();
            (state.faults, state.room) = (all_fail(), None);
            state.release();
        }
        let target = Arc::clone(&killed.target);
        killed.until("the connections are gone", || target.connections() == 0);
        for (host, scsi) in self.hosts.iter_mut().zip(scsi) {
            host.scsi = scsi;
            host.reconnect(&self.world);
        }
        self.count("killed");
    }

    /// Replaces the memory table, or switches the dirty log.
    fn change_memory(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        match (self.rng.below(3), host.logs) {
            (0, _) => host.vm.set_memory(),
            (_, false) => {
                host.vm.begin_log();
                // Stepped reactors adopt it now.
                self.world.settle();
                host.logs = true;
            }
            (_, true) => {
                host.vm.end_log();
                host.log_has_ended();
            }
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn act(&mut self) {
        let host = self.rng.below(2);
        match self.rng.below(100) {
            0..28 => self.send(host),
            28..34 => self.manage(host),
            34..62 => {
                let reactor = self.rng.below(2);
                self.world.step_one(reactor);
            }
            62..84 => self.complete(),
            84..88 => self.add_or_remove(host),
            88..90 => self.stop_or_start(host),
            90..92 => self.change_disk(),
            92..94 => {
                if self.hosts[host].posted < 8 {
                    self.hosts[host].vm.events.post().unwrap();
                    self.hosts[host].posted += 1;
                }
            }
            94..97 => self.move_queue(host),
            97 => match self.rng.below(4) {
                0 => self.kill(),
                1 => self.hang_up(host),
                _ => self.change_memory(host),
            },
            98 => self.resize(),
            _ => self.remove_disk(),
        }
    }

    /// Returns a command, and the lengths of its data-out and data-in.
    fn command(&mut self) -> (cdb::Cdb, usize, usize) {
        let rng = &mut self.rng;
        let blocks = 1 + rng.below(6);
        let lba = rng.below(BLOCKS as usize - blocks);
        let (at, n, len) = (lba as u32, blocks as u16, blocks * BLOCK);
        let fua = if rng.one_in(4) { cdb::FUA } else { 0 };
        match rng.below(12) {
            0..3 => (cdb::ten(0x28, fua, at, n), 0, len),
            3..6 => (cdb::ten(0x2a, fua, at, n), len, 0),
            6 => (cdb::compare_and_write(0, at.into(), n as u8), 2 * len, 0),
            7 => (cdb::write_same(0, at.into(), n.into()), BLOCK, 0),
            8 => (cdb::verify(cdb::COMPARE, at, n), len, 0),
            9 => (cdb::write_and_verify(0, at, n), len, 0),
            10 => (cdb::unmap(24), 24, 0),
            _ => (cdb::inquiry(None, 96), 0, 96),
        }
    }

    fn send(&mut self, host: usize) {
        if self.hosts[host].commands.len() >= COMMANDS_MAX {
            return;
        }
        let (cdb, out, data) = self.command();
        let (queue, target) = (self.rng.below(2), self.rng.below(3) as u8);
        let layout = match self.rng.below(4) {
            0 => Layout::Cut(60),
            1 => Layout::Stream(2000),
            _ => Layout::Separate,
        };
        // A buffer that is too short, at times.
        let data = if self.rng.one_in(10) { data / 2 } else { data };
        let byte = 1 + self.rng.below(100) as u8;
        let host = &mut self.hosts[host];
        let bytes =
            if cdb[0] == 0x42 { cdb::unmap_list(&[(u64::from(byte), 2)]) } else { vec![byte; out] };
        let (out, data) = (host.vm.buffer(&bytes), host.vm.zeroed(data));
        let command = Command::new(lun(target, 0), 0, cdb);
        let (outs, datas) = ([out], [data]);
        let command = if out.len > 0 { command.with_data_out(&outs) } else { command };
        let command = if data.len > 0 { command.with_data_in(&datas) } else { command };
        let tag = host.vm.submit(queue, command, layout);
        // With a stream, the device accesses memory of the queue, which is used again.
        let buffers = if matches!(layout, Layout::Stream(_)) { vec![] } else { vec![out, data] };
        let logged = host.logs;
        host.commands.insert(tag, Sent { queue, logged, target, buffers });
    }

    fn manage(&mut self, host: usize) {
        if self.hosts[host].functions.len() >= 4 {
            return;
        }
        let subtype = [
            subtype::ABORT_TASK,
            subtype::ABORT_TASK,
            subtype::ABORT_TASK_SET,
            subtype::CLEAR_TASK_SET,
            subtype::I_T_NEXUS_RESET,
            subtype::LOGICAL_UNIT_RESET,
            subtype::LOGICAL_UNIT_RESET,
            subtype::QUERY_TASK,
            subtype::QUERY_TASK_SET,
        ][self.rng.below(9)];
        let n = self.rng.below(self.hosts[host].commands.len() + 1);
        let host = &mut self.hosts[host];
        let one = host.commands.iter().nth(n).map(|(tag, sent)| (*tag, sent.target));
        let (tag, target) = one.unwrap_or((1 << 40, 0));
        let by_tag = matches!(subtype, subtype::ABORT_TASK | subtype::QUERY_TASK);
        let about = |(other, sent): (&u64, &Sent)| {
            (sent.target == target && (!by_tag || *other == tag)).then_some(*other)
        };
        let before = host.commands.iter().filter_map(about).collect();
        let tmf = Tmf { subtype, lun: lun(target, 0), tag };
        let head = host.vm.control.submit(&tmf).unwrap().0;
        host.vm.control.kick().unwrap();
        host.functions.insert(head, Function { tmf, before });
    }

    fn complete(&mut self) {
        let disk = self.rng.below(3);
        let flying = self.disks[disk].state().flying();
        if flying == 0 {
            return;
        }
        let nth = self.rng.below(flying);
        let faulty = self.rng.one_in(12);
        let mut state = self.disks[disk].state();
        if faulty {
            state.faults = all_fail();
        }
        state.complete(nth);
        state.faults.clear();
    }

    fn change_disk(&mut self) {
        let disk = self.rng.below(3);
        let (room, holds) = (self.rng.below(6), !self.rng.one_in(4));
        let full = self.rng.one_in(2);
        let mut state = self.disks[disk].state();
        state.room = full.then_some(room);
        state.holds = holds;
    }

    fn add_or_remove(&mut self, host: usize) {
        let number = self.rng.below(3) as u8;
        let disk = if number == 0 { 0 } else { 1 + host };
        let (target, scsi) = (&self.world.target, &self.hosts[host].scsi);
        if scsi.remove_target(target, number).is_err() && scsi.is_free(number) {
            let bdev: Arc<dyn Bdev> = Arc::clone(&self.disks[disk]) as _;
            scsi.add_target(target, Some(number), &bdev).unwrap();
            self.count("added");
        }
    }

    fn remove_disk(&mut self) {
        let disk = self.rng.below(3);
        remove_bdev(&self.world.target, &(Arc::clone(&self.disks[disk]) as _));
    }

    fn resize(&mut self) {
        let disk = self.rng.below(3);
        let blocks = BLOCKS - self.rng.below(8) as u64;
        self.disks[disk].resize(blocks);
        bdev_resized(&self.world.target, &(Arc::clone(&self.disks[disk]) as _));
    }

    /// Stops a request ring, once its I/O has ended, or starts it again.
    fn stop_or_start(&mut self, host: usize) {
        let ring = 2 + self.rng.below(2);
        if self.hosts[host].served[ring] {
            self.release();
            let vm = &self.hosts[host].vm;
            lock(&vm.wire.sent).clear();
            vm.stop_ring(ring);
            let wire = Arc::clone(&vm.wire);
            self.world.until("a ring drains", || !lock(&wire.sent).is_empty());
            self.hosts[host].served[ring] = false;
            self.hold();
            self.count("stopped");
        } else {
            self.hosts[host].vm.take_all();
            self.hosts[host].vm.start_ring(ring);
            self.hosts[host].served[ring] = true;
        }
    }

    /// Ends the connection with I/O in flight, and connects again when it has ended.
    fn hang_up(&mut self, host: usize) {
        self.hosts[host].vm.hang_up();
        self.release();
        let target = Arc::clone(&self.world.target);
        self.world.until("the connection is gone", || target.connections() == 1);
        self.hold();
        let host = &mut self.hosts[host];
        host.vm.take_all();
        // Functions that were not taken are answered after the reconnection.
        let answers = std::iter::from_fn(|| host.vm.control.poll().unwrap()).collect::<Vec<_>>();
        let events = host.vm.take_events().len();
        host.posted -= events;
        answers.iter().for_each(|answer| _ = host.functions.remove(&answer.tag.0));
        host.reconnect(&self.world);
        self.count("reconnected");
    }

    fn move_queue(&mut self, host: usize) {
        let (ring, core) = (self.rng.below(4), Core(self.rng.below(2)));
        let name = self.hosts[host].name;
        let Ok(Some(moving)) = self.world.target.begin_move(name, None, ring, core) else { return };
        for _ in 0..1000 {
            if let Some(moved) = self.world.target.end_move(&moving) {
                moved.unwrap();
                self.count("moved");
                return;
            }
            self.world.step();
        }
        panic!("a move does not end");
    }

    /// All I/O ends.
    fn release(&mut self) {
        for disk in &self.disks {
            let mut state = disk.state();
            state.room = None;
            state.release();
        }
    }

    fn hold(&mut self) {
        self.disks.iter().for_each(|disk| disk.state().holds = true);
    }

    /// Takes what has been answered, and checks it.
    fn check(&mut self) {
        for n in 0..2 {
            let host = &mut self.hosts[n];
            // The functions first: what they are about must have been answered before.
            let answers: Vec<_> = std::iter::from_fn(|| host.vm.control.poll().unwrap()).collect();
            host.posted -= host.vm.take_events().len();
            host.vm.take_all();
            let tags: Vec<u64> = host.commands.keys().copied().collect();
            let mut kinds = vec![];
            for tag in tags {
                let Some(done) = host.vm.answer(tag) else { continue };
                let sent = host.commands.remove(&tag).unwrap();
                if let ([_, data], true) = (&sent.buffers[..], sent.logged)
                    && data.len > 0
                    && done.response.is_good()
                {
                    assert!(host.vm.is_marked(data.gpa), "not marked: {sent:?}");
                    kinds.push("marked");
                }
                for segment in sent.buffers.iter().filter(|segment| segment.len > 0) {
                    let poison = vec![POISON; segment.len as usize];
                    host.vm.ram.write(segment.gpa, &poison).unwrap();
                    host.poisoned.push(*segment);
                }
                kinds.push(match (done.response.response, done.response.status) {
                    (code::OK, 0) => "good",
                    (code::OK, 2) => "check condition",
                    (code::OK, _) => "other status",
                    (code::OVERRUN, _) => "overrun",
                    (code::ABORTED, _) => "aborted",
                    (code::RESET, _) => "reset",
                    (code::BAD_TARGET, _) => "bad target",
                    other => panic!("{other:?}"),
                });
            }
            for answer in answers {
                let function = host.functions.remove(&answer.tag.0).expect("answered once");
                kinds.push(host.check_function(&function, answer.response));
            }
            kinds.into_iter().for_each(|kind| self.count(kind));
        }
        for (n, host) in self.hosts.iter().enumerate() {
            for segment in &host.poisoned {
                let bytes = host.vm.bytes(*segment);
                assert!(
                    bytes.iter().all(|byte| *byte == POISON),
                    "host {n}: memory of an answered command was written: {segment:?}"
                );
            }
        }
        for host in &mut self.hosts {
            let old = host.poisoned.len().saturating_sub(POISONED_MAX);
            host.poisoned.drain(..old);
        }
        for disk in &self.disks {
            let state = disk.state();
            assert!(!state.data.contains(&POISON), "memory of an answered command was read");
            assert_eq!(state.wrong, None);
        }
    }

    fn run(mut self) -> BTreeMap<&'static str, usize> {
        for _ in 0..STEPS {
            self.act();
            self.check();
        }
        for host in 0..2 {
            for ring in 2..4 {
                if !self.hosts[host].served[ring] {
                    self.hosts[host].vm.take_all();
                    self.hosts[host].vm.start_ring(ring);
                    self.hosts[host].served[ring] = true;
                }
            }
        }
        for _ in 0..100_000 {
            self.release();
            self.world.step();
            self.check();
            if self.hosts.iter().all(|host| host.commands.is_empty() && host.functions.is_empty()) {
                break;
            }
        }
        for host in &self.hosts {
            assert!(host.commands.is_empty(), "not answered: {:?}", host.commands);
            assert!(host.functions.is_empty(), "not answered: {:?}", host.functions);
            for number in 0..3 {
                let _ = host.scsi.remove_target(&self.world.target, number);
            }
        }
        let disks = self.disks.clone();
        self.world.until("all channels are closed", || {
            disks.iter().all(|disk| disk.state().channels == 0)
        });
        for number in 0..3 {
            let [a, b] = [0, 1].map(|n| Arc::clone(&self.hosts[n].scsi));
            self.world.until("all numbers are free", || a.is_free(number) && b.is_free(number));
        }
        self.counts
    }
}

impl Host {
    /// Connects again. The log was that of the last connection.
    fn reconnect(&mut self, world: &World) {
        self.vm.forget_log();
        self.log_has_ended();
        self.vm.reconnect(world, self.name);
        self.served = vec![true; 4];
    }

    fn log_has_ended(&mut self) {
        self.logs = false;
        self.commands.values_mut().for_each(|sent| sent.logged = false);
    }

    /// Checks the answer to a function. Returns its kind.
    fn check_function(&self, function: &Function, response: u8) -> &'static str {
        let ends = match function.tmf.subtype {
            subtype::QUERY_TASK | subtype::QUERY_TASK_SET => {
                assert!(matches!(response, code::OK | code::SUCCEEDED | code::BAD_TARGET));
                return "query";
            }
            _ => response == code::OK,
        };
        assert!(ends || response == code::BAD_TARGET, "{function:?}: {response}");
        let left: Vec<_> = function
            .before
            .iter()
            .filter_map(|tag| Some((tag, self.commands.get(tag)?)))
            .filter(|(_, sent)| self.served[2 + sent.queue])
            .collect();
        assert!(!ends || left.is_empty(), "{function:?} was answered before {left:?}");
        if ends { "function" } else { "function of no target" }
    }
}

#[test]
fn no_memory_of_an_answered_command_is_used() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let seeds = match number("MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MODEL_SEEDS").unwrap_or(SEEDS),
    };
    let mut counts = BTreeMap::<_, usize>::new();
    for seed in seeds.clone() {
        let run = || Model::new(seed).run();
        let result = std::panic::catch_unwind(run);
        let of_seed = result.unwrap_or_else(|panic| {
            eprintln!("MODEL_SEED={seed}");
            std::panic::resume_unwind(panic)
        });
        for (what, count) in of_seed {
            *counts.entry(what).or_default() += count;
        }
    }
    eprintln!("{counts:?}");
    let kinds = ["good", "check condition", "overrun", "aborted", "reset", "bad target"];
    let reached = kinds.iter().chain(&[
        "function",
        "query",
        "moved",
        "stopped",
        "reconnected",
        "killed",
        "marked",
    ]);
    let missing: Vec<_> = reached.filter(|kind| !counts.contains_key(*kind)).collect();
    assert!(seeds.count() < 10 || missing.is_empty(), "never reached: {missing:?}");
}
