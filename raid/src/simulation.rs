//! Members that fail, hang, leave and come, under random I/O from a seed: no acknowledged write is
//! lost, none is read stale, and at any time a restart would find all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Bdev, Op, Status};
use bdev_conformance::{Driver, Memory, Request};
use uuid::Uuid;

use crate::faulty::{Fault, Faulty};
use crate::superblock::{MemberState, Parsed, Superblock};
use crate::{Extent, Level, OptionalMember, Pace, RaidDisk, RaidOptions};

/// Bytes before the data of each member.
const OFFSET: u64 = 64 << 10;
const UNIT: u64 = 4096;
const UNITS: u64 = 64;
const PACE: Pace = Pace { window: 8 * UNIT, bytes_per_sec: 0 };
/// Longer than any wait of the array for a member.
const LIMIT: Duration = Duration::from_secs(60);

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What a unit may hold: what was acknowledged last, and what has failed since.
#[derive(Clone)]
struct Allowed {
    values: Vec<u64>,
    /// A stripe whose write has failed holds anything.
    torn: bool,
}

impl Allowed {
    fn allows(&self, bytes: &[u8]) -> bool {
        self.torn || value_of(bytes).is_some_and(|value| self.values.contains(&value))
    }
}

struct World {
    random: Random,
    level: Level,
    disk: Arc<RaidDisk>,
    /// By slot.
    members: Vec<Option<Arc<Faulty>>>,
    /// All members that there ever were.
    all: Vec<Arc<Faulty>>,
    drivers: Vec<Driver>,
    units: Vec<Allowed>,
    /// The value that is being written to a unit.
    writing: HashMap<u64, u64>,
    reading: HashMap<u64, u32>,
    salt: u64,
}

/// A unit with this value. Its strips differ, or their parity would be zero whatever the value.
fn filled(value: u64) -> Vec<u8> {
    (0..UNIT / 8).flat_map(|n| value.wrapping_mul(2 * n + 1).to_le_bytes()).collect()
}

/// The value that a unit holds, or `None` if it holds a mixture.
fn value_of(bytes: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (bytes == filled(value)).then_some(value)
}

impl World {
    fn new(seed: u64, level: Level, count: usize) -> Self {
        let size = UNITS * UNIT / if level == Level::Raid5f { count as u64 - 1 } else { 1 };
        let all: Vec<_> =
            (0..count).map(|n| Faulty::new(&format!("m{n}"), OFFSET + size)).collect();
        let members = all.iter().map(|faulty| OptionalMember {
            bdev: Some(Arc::clone(faulty) as _),
            uuid: faulty.uuid(),
            extent: Extent { offset: OFFSET, len: size },
        });
        let strip = if level == Level::Raid5f { UNIT / (count as u64 - 1) } else { 0 };
        let options = RaidOptions {
            name: "R".into(),
            uuid: Uuid::new_v4(),
            level,
            strip,
            members: members.collect(),
            seq_number: Some(1),
        };
        let disk = RaidDisk::create(options).unwrap();
        let first = disk.array.superblock(&disk.array.state(), 0).encode();
        let bdevs = all.iter().map(|faulty| Arc::clone(faulty) as Arc<dyn Bdev>).enumerate();
        assert!(crate::metadata::write_all(bdevs.collect(), &first, LIMIT).is_empty());
        let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
        Self {
            random: Random(seed),
            level,
            drivers: (0..2).map(|_| Driver::new(&shared, 8)).collect(),
            disk,
            members: all.iter().cloned().map(Some).collect(),
            all,
            units: vec![Allowed { values: vec![0], torn: false }; UNITS as usize],
            writing: HashMap::new(),
            reading: HashMap::new(),
            salt: 0,
        }
    }

    fn unit_len(&self) -> u64 {
        self.disk.array.layout.size / UNITS
    }

    /// Writes a unit, to the end.
    fn write(&mut self, unit: u64) {
        self.salt += 1;
        let mut memory = Memory::plain(UNIT as usize);
        memory.fill(&filled(self.salt));
        self.writing.insert(unit, self.salt);
        let ended = self.drivers[0].run(Request::rw(Op::Write, unit * UNIT, memory));
        self.ended(ended);
    }

    fn submit(&mut self) {
        let driver = self.random.below(2) as usize;
        let Some(tag) = self.drivers[driver].free_tag() else { return };
        let unit = self.random.below(UNITS);
        let mut memory = Memory::plain(UNIT as usize);
        let is_read = self.random.below(3) == 0;
        if self.writing.contains_key(&unit) || (!is_read && self.reading.contains_key(&unit)) {
            return;
        }
        let op = if is_read { Op::Read } else { Op::Write };
        if is_read {
            *self.reading.entry(unit).or_default() += 1;
        } else {
            self.salt += 1;
            memory.fill(&filled(self.salt));
            self.writing.insert(unit, self.salt);
        }
        let request = Request::rw(op, unit * UNIT, memory);
        let ended = self.drivers[driver].submit(tag, request).unwrap_or_else(|_| panic!("full"));
        if let Some(ended) = ended {
            self.ended(ended);
        }
    }

    fn ended(&mut self, (request, status): (Request, Status)) {
        let unit = request.offset / UNIT;
        if request.op == Op::Read {
            let left = self.reading.get_mut(&unit).unwrap();
            *left -= 1;
            if *left == 0 {
                self.reading.remove(&unit);
            }
            if status == Status::Ok {
                let (allowed, bytes) = (&self.units[unit as usize], request.memory.data());
                let (value, values) = (value_of(&bytes), &allowed.values);
                let fine = allowed.allows(&bytes);
                assert!(fine, "stale read of unit {unit}: {value:?}, not one of {values:?}");
            }
            return;
        }
        let value = self.writing.remove(&unit).unwrap();
        let allowed = &mut self.units[unit as usize];
        if status == Status::Ok {
            *allowed = Allowed { values: vec![value], torn: false };
        } else {
            allowed.values.push(value);
            allowed.torn = self.level == Level::Raid5f;
        }
    }

    fn visit(&mut self) {
        for n in 0..self.drivers.len() {
            for ended in self.drivers[n].visit() {
                self.ended(ended);
            }
        }
    }

    /// Something happens to a member.
    fn event(&mut self) {
        let slot = self.random.below(self.members.len() as u64) as usize;
        let healthy = self.members.iter().flatten().filter(|m| m.fault() == Fault::None).count();
        let spare = healthy > self.level.operational(self.members.len());
        let full = self.disk.live_members() as usize == self.members.len();
        match (self.members[slot].clone(), self.random.below(5)) {
            (Some(member), 0) if spare && full => member.set(Fault::Changes),
            (Some(member), 1) if spare && full => member.set(Fault::Reads),
            (Some(member), 2) if spare && full => {
                member.set(Fault::Hangs);
                for _ in 0..20 {
                    self.submit();
                    self.visit();
                }
                drop(self.disk.remove_member(slot));
            }
            (Some(_), 3) if spare && full => drop(self.disk.remove_member(slot)),
            (Some(member), _) if member.fault() == Fault::Reads => member.set(Fault::None),
            _ => self.replace(slot),
        }
    }

    /// Adds a new member to a free slot.
    fn replace(&mut self, slot: usize) {
        let free = self.disk.array.state().slots[slot].bdev.is_none();
        if !free {
            return;
        }
        self.members[slot] = None;
        let size = self.all[0].size_bytes();
        let new = Faulty::new(&format!("m{}", self.all.len()), size);
        let added = self.disk.add_member(slot, Arc::clone(&new) as _, PACE);
        if added.recv_timeout(LIMIT).unwrap().is_ok() {
            self.members[slot] = Some(Arc::clone(&new));
            self.all.push(new);
        }
    }

    /// What a restart would find now: the newest superblock's members must have every acknowledged
    /// write.
    fn check_restart(&mut self) {
        let superblocks = self.all.iter().filter_map(|member| {
            let (bytes, _) = Driver::new(&member.stored, 1).read(0, 4096);
            match Superblock::parse(&bytes, 512) {
                Parsed::Valid(superblock) => Some(superblock),
                _ => None,
            }
        });
        let Some(newest) = superblocks.max_by_key(|superblock| superblock.seq_number) else {
            return;
        };
        let configured = newest.members.iter().filter(|m| m.state == MemberState::Configured);
        let uuids: Vec<_> = configured.map(|member| member.uuid).collect();
        assert!(uuids.len() >= self.level.operational(self.members.len()), "{newest:?}");
        if self.level != Level::Raid1 {
            return;
        }
        for member in self.all.iter().filter(|member| uuids.contains(&member.uuid())) {
            let (bytes, _) = Driver::new(&member.stored, 1).read(OFFSET, (UNITS * UNIT) as usize);
            for (unit, bytes) in (0..).zip(bytes.chunks(UNIT as usize)) {
                let writing = self.writing.contains_key(&unit);
                let fine = self.units[unit as usize].allows(bytes);
                let name = member.name();
                assert!(fine || writing, "{name} would be used without unit {unit}: {newest:?}");
            }
        }
    }

    /// The strips of each stripe add up to zero, so that any one can be computed.
    fn check_parity(&self) {
        if self.level != Level::Raid5f {
            return;
        }
        let strip = (self.disk.array.layout.strip) as usize;
        let mut sum = vec![0; UNITS as usize * strip];
        for member in self.members.iter().flatten() {
            let (bytes, _) = Driver::new(&member.stored, 1).read(OFFSET, sum.len());
            crate::array::lane::xor(&mut sum, &bytes);
        }
        for (unit, strip) in self.units.iter().zip(sum.chunks(strip)) {
            assert!(unit.torn || strip.iter().all(|byte| *byte == 0), "wrong parity");
        }
    }

    fn drain(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while self.drivers.iter().any(|driver| driver.outstanding().next().is_some()) {
            self.visit();
            assert!(Instant::now() < deadline, "I/O does not end");
        }
    }

    /// Heals everything, and reads all units from each member.
    fn end(&mut self) {
        self.members.iter().flatten().for_each(|member| member.set(Fault::None));
        self.drain();
        self.make_whole();
        // A last rebuild, under load.
        let slot = self.random.below(self.members.len() as u64) as usize;
        let removed = self.disk.remove_member(slot);
        while removed.try_recv().is_err() {
            self.visit();
        }
        self.make_whole();
        self.drain();
        self.check_restart();
        self.check_parity();
        self.check_reads();
    }

    fn make_whole(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while self.disk.live_members() as usize != self.members.len() {
            assert!(Instant::now() < deadline, "the array is not whole again");
            for slot in 0..self.members.len() {
                self.replace(slot);
            }
            for _ in 0..8 {
                self.submit();
            }
            self.visit();
        }
    }

    fn check_reads(&mut self) {
        for unit in 0..UNITS {
            for _ in 0..4 {
                let ended = self.drivers[0].run(Request::rw(
                    Op::Read,
                    unit * UNIT,
                    Memory::plain(UNIT as usize),
                ));
                assert_eq!(ended.1, Status::Ok);
                self.reading.insert(unit, 1);
                self.ended(ended);
            }
        }
    }
}

fn run(seed: u64, level: Level, count: usize, steps: u32) {
    println!("seed {seed}");
    let mut world = World::new(seed, level, count);
    for step in 0..steps {
        world.submit();
        if world.random.below(2) == 0 {
            world.visit();
        }
        if world.random.below(40) == 0 {
            world.event();
        }
        if step % 16 == 0 {
            world.check_restart();
        }
    }
    world.end();
}

/// The seeds, or the one that the environment names.
fn seeds() -> Vec<u64> {
    let given = std::env::var("RAID_SEED").ok().and_then(|seed| seed.parse().ok());
    given.map_or((1..40).collect(), |seed| vec![seed])
}

#[test]
fn an_array_with_parity_loses_no_acknowledged_write() {
    seeds().into_iter().for_each(|seed| run(seed, Level::Raid5f, 3, 2000));
}

#[test]
fn an_array_of_five_with_parity_loses_no_acknowledged_write() {
    seeds().into_iter().for_each(|seed| run(seed, Level::Raid5f, 5, 2000));
}

#[test]
fn a_mirror_of_two_loses_no_acknowledged_write() {
    seeds().into_iter().for_each(|seed| run(seed, Level::Raid1, 2, 2000));
}

#[test]
fn a_mirror_of_three_loses_no_acknowledged_write() {
    seeds().into_iter().for_each(|seed| run(seed, Level::Raid1, 3, 2000));
}

/// Changes behind the window of a rebuild go to the target, data and parity alike.
#[test]
fn what_is_copied_is_kept_up_to_date() {
    for (level, count) in [(Level::Raid1, 2), (Level::Raid5f, 3), (Level::Raid5f, 5)] {
        for slot in 0..count {
            let mut world = World::new(1, level, count);
            world.disk.remove_member(slot).recv_timeout(LIMIT).unwrap().unwrap();
            // The second of two windows is copied half a second after the first.
            let window = world.disk.array.layout.size / 2;
            let pace = Pace { window, bytes_per_sec: 2 * window };
            let new = Faulty::new("new", world.all[0].size_bytes());
            let added = world.disk.add_member(slot, Arc::clone(&new) as _, pace);
            added.recv_timeout(LIMIT).unwrap().unwrap();
            world.members[slot] = Some(Arc::clone(&new));
            world.all.push(new);
            let deadline = Instant::now() + LIMIT;
            while world.disk.array.state().copied == 0 {
                assert!(Instant::now() < deadline, "the first window is not copied");
                std::thread::yield_now();
            }
            for unit in 0..window / world.unit_len() {
                world.write(unit);
            }
            world.drain();
            assert!(world.disk.array.state().process.is_some(), "too slow to show anything");
            while world.disk.live_members() as usize != count {
                assert!(Instant::now() < deadline, "the rebuild does not end");
            }
            world.check_restart();
            world.check_parity();
            world.check_reads();
        }
    }
}

/// A guest that goes away leaves its last writes on some members only: they become equal again.
#[test]
fn what_was_abandoned_is_the_same_on_all_members() {
    for (level, count) in [(Level::Raid1, 2), (Level::Raid1, 3), (Level::Raid5f, 3)] {
        for slot in 0..count {
            let mut world = World::new(1, level, count);
            (0..UNITS).for_each(|unit| world.write(unit));
            let disk: Arc<dyn Bdev> = Arc::clone(&world.disk) as _;
            let mut guest = bdev::ThreadChannel::open(&disk, 4, bdev::Rights::Write).unwrap();
            world.all[slot].set(Fault::Hangs);
            for unit in 8..12 {
                let mut buffer = bdev::Buffer::new(UNIT as usize);
                buffer.bytes_mut().copy_from_slice(&filled(1000 + unit));
                guest.start(bdev::Request::write(unit * UNIT, buffer));
                assert!(guest.poll().is_none());
            }
            guest.abandon();
            world.all[slot].set(Fault::None);
            drop(guest);
            let stored = |member: &Arc<Faulty>| {
                let len = (member.size_bytes() - OFFSET) as usize;
                Driver::new(&member.stored, 1).read(OFFSET, len).0
            };
            let deadline = Instant::now() + LIMIT;
            loop {
                let all: Vec<Vec<u8>> = world.all.iter().map(stored).collect();
                let equal = all.iter().all(|bytes| *bytes == all[0]);
                let mut sum = vec![0; all[0].len()];
                all.iter().for_each(|bytes| crate::array::lane::xor(&mut sum, bytes));
                let fine = if level == Level::Raid1 { equal } else { sum.iter().all(|b| *b == 0) };
                if fine {
                    break;
                }
                assert!(Instant::now() < deadline, "the members differ for ever");
            }
            assert_eq!(world.disk.live_members() as usize, count, "none has failed");
            assert_eq!(world.drivers[0].write(9 * UNIT, &filled(7)), Status::Ok);
        }
    }
}
