//! Tests of arrays with members whose I/O stays under way. They keep it like a kernel does:
//! abandoning a channel does not end it.
#![expect(unsafe_code, reason = "forwards I/O to `Channel::submit`")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bdev::{
    Bdev, BdevChannel, Buffer, Channel, Completion, Error, Features, Io, Malloc, MallocOptions, Op,
    Qos, Rights, Stats, Status, Submit, ThreadChannel,
};
use bdev_conformance::{Driver, Memory, Request};
use uuid::Uuid;

use crate::faulty::{Fault, Faulty};
use crate::superblock::{MemberState, Parsed, Superblock};
use crate::{Extent, Level, OptionalMember, Pace, RaidDisk, RaidOptions};

const OFFSET: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(20);

/// A member whose changes stay under way while `holds` is set.
struct Stuck {
    stored: Arc<dyn Bdev>,
    holds: AtomicBool,
    /// Changes that stay under way whatever `holds` says, until `late` is set.
    caught: Mutex<usize>,
    /// Superblocks stay under way as well.
    catches_superblocks: AtomicBool,
    late: AtomicBool,
    stats: Stats,
    qos: Qos,
}

fn malloc(name: &str, size: u64) -> Arc<dyn Bdev> {
    let options =
        MallocOptions { name: name.into(), num_blocks: size / 512, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

impl Stuck {
    fn new(name: &str, size: u64) -> Arc<Self> {
        Arc::new(Self {
            stored: malloc(name, size),
            holds: AtomicBool::new(false),
            caught: Mutex::new(0),
            catches_superblocks: AtomicBool::new(false),
            late: AtomicBool::new(false),
            stats: Stats::default(),
            qos: Qos::default(),
        })
    }

    fn hold(&self, holds: bool) {
        self.holds.store(holds, Ordering::Release);
    }
}

impl Bdev for Stuck {
    fn name(&self) -> &str {
        self.stored.name()
    }
    fn product_name(&self) -> &'static str {
        "Stuck"
    }
    fn uuid(&self) -> Uuid {
        self.stored.uuid()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn num_blocks(&self) -> u64 {
        self.stored.num_blocks()
    }
    fn features(&self) -> Features {
        self.stored.features()
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(&self.stored, depth)?;
        Ok(Box::new(StuckChannel { base, of: self, held: vec![], late: vec![] }))
    }
}

struct StuckChannel {
    base: BdevChannel,
    of: Arc<Stuck>,
    held: Vec<Io>,
    late: Vec<Io>,
}

impl Channel for StuckChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if io.op == Op::Write {
            let mut caught = self.of.caught.lock().unwrap();
            if *caught > 0 {
                *caught -= 1;
                self.late.push(io);
                return Submit::Queued;
            }
            drop(caught);
            if io.offset == 0 && self.of.catches_superblocks.load(Ordering::Acquire) {
                self.late.push(io);
                return Submit::Queued;
            }
            if self.of.holds.load(Ordering::Acquire) {
                self.held.push(io);
                return Submit::Queued;
            }
        }
        // SAFETY: by the caller's promise.
        unsafe { self.base.submit(io) }
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut n = 0;
        let mut due = vec![];
        if !self.of.holds.load(Ordering::Acquire) {
            due.append(&mut self.held);
        }
        if self.of.late.load(Ordering::Acquire) {
            due.append(&mut self.late);
        }
        for io in due {
            // SAFETY: the I/O has not been reported.
            if let Submit::Done(status) = unsafe { self.base.submit(io) } {
                done[n] = Completion { tag: io.tag, status };
                n += 1;
            }
        }
        n + self.base.poll(&mut done[n..])
    }
}

fn array(level: Level, strip: u64, members: &[Arc<dyn Bdev>], seq: Option<u64>) -> Arc<RaidDisk> {
    let members = members.iter().map(|bdev| OptionalMember {
        bdev: Some(Arc::clone(bdev)),
        uuid: bdev.uuid(),
        extent: Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET },
    });
    RaidDisk::create(RaidOptions {
        name: "R".into(),
        uuid: Uuid::new_v4(),
        level,
        strip,
        members: members.collect(),
        seq_number: seq,
    })
    .unwrap()
}

fn stored(bdev: &Arc<dyn Bdev>, at: u64, len: usize) -> Vec<u8> {
    Driver::new(bdev, 1).read(OFFSET + at, len).0
}

/// Submits a write, and returns whether it has ended within some seconds.
fn write_ends(driver: &mut Driver, offset: u64, data: &[u8]) -> bool {
    let mut memory = Memory::plain(data.len());
    memory.fill(data);
    let tag = driver.free_tag().unwrap();
    let ended = driver.submit(tag, Request::rw(Op::Write, offset, memory));
    if ended.unwrap_or_else(|_| panic!("full")).is_some() {
        return true;
    }
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        if driver.visit().iter().any(|(request, _)| request.offset == offset) {
            return true;
        }
    }
    false
}

/// `Channel::abandon`: "From now on, the channel itself begins no copy."
#[test]
fn nothing_is_copied_after_abandon() {
    let members = [malloc("a", 1 << 20), malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, None);
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut guest = ThreadChannel::open(&shared, 4, Rights::Write).unwrap();
    let cell = disk.array.state().open_lanes().pop().unwrap();
    // The maintenance thread has the lane for a moment.
    let lane = cell.lane.take();
    let mut buffer = Buffer::new(4096);
    buffer.bytes_mut().fill(7);
    guest.start(bdev::Request::write(0, buffer));
    guest.abandon();
    drop(lane);
    // Here the guest's memory may have another owner.
    while guest.poll().is_none() {}
    assert!(stored(&members[0], 0, 4096).iter().all(|byte| *byte == 0), "copied after abandon");
}

/// A rebuild takes hours. A member that is removed meanwhile must be free at once.
#[test]
fn a_rebuild_does_not_keep_a_removed_source() {
    let members: Vec<_> = (0..3).map(|n| malloc(&format!("m{n}"), 1 << 20)).collect();
    let disk = array(Level::Raid1, 0, &members, None);
    disk.remove_member(2).recv_timeout(LIMIT).unwrap().unwrap();
    let pace = Pace { window: 4096, bytes_per_sec: 8192 };
    disk.add_member(2, malloc("new", 1 << 20), pace).recv_timeout(LIMIT).unwrap().unwrap();
    while disk.array.state().copied == 0 {
        std::thread::yield_now();
    }
    let source = Arc::downgrade(&members[0]);
    drop(members);
    disk.remove_member(0).recv_timeout(LIMIT).unwrap().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(disk.array.state().process.is_some(), "the rebuild goes on");
    assert_eq!(source.strong_count(), 0, "its deletion waits for the end of the rebuild");
}

/// The book: "If the I/O of a removed member hangs, requests that were already there end with it;
/// new ones do not wait."
#[test]
fn a_rebuild_does_not_stop_new_writes_because_a_removed_member_hangs() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let members = [malloc("a", 1 << 20), Arc::clone(&stuck) as _, malloc("c", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, None);
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let [mut one, mut other] = [Driver::new(&shared, 4), Driver::new(&shared, 4)];
    disk.remove_member(2).recv_timeout(LIMIT).unwrap().unwrap();
    stuck.hold(true);
    assert!(!write_ends(&mut one, 0, &[1; 4096]));
    let removed = disk.remove_member(1);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        one.visit();
    }
    assert!(removed.try_recv().is_err());
    assert!(write_ends(&mut other, 8192, &[2; 4096]), "without a rebuild, new writes go on");
    let pace = Pace { window: 64 << 10, bytes_per_sec: 0 };
    disk.add_member(2, malloc("d", 1 << 20), pace).recv_timeout(LIMIT).unwrap().unwrap();
    let ends = write_ends(&mut other, 16384, &[3; 4096]);
    stuck.hold(false);
    while one.outstanding().next().is_some() {
        one.visit();
    }
    assert!(ends, "another guest's write waits for the removed member");
}

#[test]
fn a_removed_member_with_parity_under_way_does_not_stop_new_writes() {
    const STRIP: u64 = 512 << 10;
    let stuck = Stuck::new("stuck", 16 << 20);
    let members = [malloc("a", 16 << 20), malloc("b", 16 << 20), Arc::clone(&stuck) as _];
    let disk = array(Level::Raid5f, STRIP, &members, None);
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 16);
    let data = vec![1; 2 * usize::try_from(STRIP).unwrap()];
    stuck.hold(true);
    // The parity of stripes 0, 3, … is on the last member.
    for stripe in [0, 3] {
        let mut memory = Memory::plain(data.len());
        memory.fill(&data);
        let tag = driver.free_tag().unwrap();
        let request = Request::rw(Op::Write, stripe * 2 * STRIP, memory);
        assert!(driver.submit(tag, request).unwrap_or_else(|_| panic!("full")).is_none());
    }
    drop(disk.remove_member(2));
    let deadline = Instant::now() + LIMIT;
    while disk.live_members() != 2 {
        driver.visit();
        assert!(Instant::now() < deadline);
    }
    let ends = write_ends(&mut driver, 2 * STRIP, &data);
    stuck.hold(false);
    while driver.outstanding().next().is_some() {
        driver.visit();
    }
    assert!(ends, "new writes wait for the removed member");
}

/// A write of a rebuild that was given up is still under way. The member is added again.
#[test]
fn a_late_write_of_a_failed_rebuild_does_not_corrupt_the_next_one() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let members = [malloc("a", 1 << 20), malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, None);
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 4);
    assert_eq!(driver.write(0, &[1; 4096]), Status::Ok);
    disk.remove_member(1).recv_timeout(LIMIT).unwrap().unwrap();
    *stuck.caught.lock().unwrap() = 1;
    let pace = Pace { window: 1 << 20, bytes_per_sec: 0 };
    let member: Arc<dyn Bdev> = Arc::clone(&stuck) as _;
    disk.add_member(1, Arc::clone(&member), pace).recv_timeout(LIMIT).unwrap().unwrap();
    let deadline = Instant::now() + LIMIT;
    while disk.array.state().process.is_some() {
        assert!(Instant::now() < deadline, "the rebuild does not fail");
        driver.visit();
    }
    std::thread::sleep(Duration::from_millis(500));
    let added = disk.add_member(1, Arc::clone(&member), pace).recv_timeout(LIMIT).unwrap();
    assert!(added.is_err(), "the old write is under way");
    stuck.late.store(true, Ordering::Release);
    while disk.array.state().slots[1].bdev.is_some() {
        assert!(Instant::now() < deadline + LIMIT, "the slot stays in use");
        driver.visit();
    }
    disk.add_member(1, Arc::clone(&member), pace).recv_timeout(LIMIT).unwrap().unwrap();
    while disk.live_members() != 2 {
        assert!(Instant::now() < deadline + LIMIT, "the rebuild does not end");
        driver.visit();
    }
    assert_eq!(driver.write(0, &[2; 4096]), Status::Ok);
    assert!(stored(&stuck.stored, 0, 4096) == [2; 4096], "an acknowledged write is lost");
}

/// A superblock that was given up lands after the one that replaced it.
#[test]
fn a_late_superblock_does_not_make_a_stale_member_current() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let members = [Arc::clone(&stuck) as Arc<dyn Bdev>, malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, Some(1));
    disk.remove_member(1).recv_timeout(LIMIT).unwrap().unwrap();
    // The next write of the first member: the superblock at the end of the rebuild.
    *stuck.caught.lock().unwrap() = 1;
    let target = malloc("target", 1 << 20);
    let pace = Pace { window: 1 << 20, bytes_per_sec: 0 };
    disk.add_member(1, Arc::clone(&target), pace).recv_timeout(LIMIT).unwrap().unwrap();
    let deadline = Instant::now() + LIMIT;
    while disk.array.state().slots[1].bdev.is_some() {
        assert!(Instant::now() < deadline, "the rebuild does not fail");
        std::thread::yield_now();
    }
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 4);
    // Nothing is acknowledged while the old superblock may land.
    assert_eq!(driver.write(0, &[2; 4096]), Status::IoError);
    assert_eq!(stored(&target, 0, 4096), [0; 4096], "the target lacks it");
    stuck.late.store(true, Ordering::Release);
    while driver.write(0, &[2; 4096]) != Status::Ok {
        assert!(Instant::now() < deadline + LIMIT, "no superblock is written any more");
    }
    let bytes = Driver::new(&stuck.stored, 1).read(0, 4096).0;
    let Parsed::Valid(found) = Superblock::parse(&bytes, 512) else { panic!("no superblock") };
    assert!(found.members[1].state != MemberState::Configured, "a restart would use the target");
}

/// Returns what a member's superblock says about the members.
fn states(bdev: &Arc<dyn Bdev>) -> Option<Vec<MemberState>> {
    let bytes = Driver::new(bdev, 1).read(0, 4096).0;
    let Parsed::Valid(found) = Superblock::parse(&bytes, 512) else { return None };
    Some(found.members.iter().map(|member| member.state).collect())
}

/// After a power cut between the two, a member that counts on a blank one would wait for ever.
#[test]
fn no_member_counts_on_a_new_one_before_that_has_a_superblock() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let members = [malloc("a", 1 << 20), malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, Some(1));
    disk.remove_member(1).recv_timeout(LIMIT).unwrap().unwrap();
    stuck.catches_superblocks.store(true, Ordering::Release);
    let pace = Pace { window: 1 << 20, bytes_per_sec: 0 };
    disk.add_member(1, Arc::clone(&stuck) as _, pace).recv_timeout(LIMIT).unwrap().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let [configured, missing] = [MemberState::Configured, MemberState::Missing];
    assert_eq!(states(&members[0]), Some(vec![configured, missing]));
    stuck.catches_superblocks.store(false, Ordering::Release);
    stuck.late.store(true, Ordering::Release);
    let deadline = Instant::now() + LIMIT;
    while disk.live_members() != 2 {
        assert!(Instant::now() < deadline, "the rebuild does not end");
    }
    for member in [&members[0], &stuck.stored] {
        assert_eq!(states(member), Some(vec![configured, configured]));
    }
}

#[test]
fn everyone_who_removes_a_member_gets_an_answer() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let members = [malloc("a", 1 << 20), Arc::clone(&stuck) as _];
    let disk = array(Level::Raid1, 0, &members, None);
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 4);
    stuck.hold(true);
    assert!(!write_ends(&mut driver, 0, &[1; 4096]));
    let removals = [disk.remove_member(1), disk.remove_member(1)];
    std::thread::sleep(Duration::from_millis(500));
    stuck.hold(false);
    while driver.outstanding().next().is_some() {
        driver.visit();
    }
    for removal in removals {
        assert!(matches!(removal.recv_timeout(LIMIT), Ok(Ok(()))));
    }
}

#[test]
fn a_range_is_repaired_from_a_member_that_can_be_read() {
    let faulty = Faulty::new("a", 1 << 20);
    let members = [Arc::clone(&faulty) as Arc<dyn Bdev>, malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, None);
    assert_eq!(Driver::new(&members[1], 1).write(OFFSET, &[2; 4096]), Status::Ok);
    faulty.set(Fault::Reads);
    disk.array.torn.push(0..4096).unwrap();
    disk.array.waker.wake();
    let deadline = Instant::now() + LIMIT;
    while stored(&faulty.stored, 0, 4096) != [2; 4096] {
        assert!(Instant::now() < deadline, "the members differ");
    }
}

/// The members end all I/O in `submit`, and a piece follows the other.
#[test]
fn one_call_computes_a_part_of_a_long_read_only() {
    const STRIP: u64 = 8 << 20;
    let members: Vec<_> = (0..3).map(|n| malloc(&format!("m{n}"), 16 << 20)).collect();
    let disk = array(Level::Raid5f, STRIP, &members, None);
    disk.remove_member(0).recv_timeout(LIMIT).unwrap().unwrap();
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 4);
    let tag = driver.free_tag().unwrap();
    let memory = Memory::plain(usize::try_from(STRIP).unwrap());
    let read = driver.submit(tag, Request::rw(Op::Read, 0, memory));
    assert!(read.unwrap_or_else(|_| panic!("full")).is_none());
    let mut calls = 1;
    while driver.visit().is_empty() {
        calls += 1;
    }
    assert!(calls >= 8, "{calls}");
}

/// The superblocks, and then the completions, do not wait for the I/O of the rebuild.
#[test]
fn held_writes_do_not_wait_for_a_rebuild_that_hangs() {
    let stuck = Stuck::new("stuck", 1 << 20);
    let faulty = Faulty::new("b", 1 << 20);
    let members = [malloc("a", 1 << 20), Arc::clone(&faulty) as _, malloc("c", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, Some(1));
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    let mut driver = Driver::new(&shared, 4);
    disk.remove_member(2).recv_timeout(LIMIT).unwrap().unwrap();
    *stuck.caught.lock().unwrap() = 1;
    let pace = Pace { window: 64 << 10, bytes_per_sec: 0 };
    disk.add_member(2, Arc::clone(&stuck) as _, pace).recv_timeout(LIMIT).unwrap().unwrap();
    let deadline = Instant::now() + LIMIT;
    while *stuck.caught.lock().unwrap() > 0 {
        assert!(Instant::now() < deadline, "nothing is copied");
    }
    faulty.set(Fault::Changes);
    assert!(write_ends(&mut driver, 512 << 10, &[3; 4096]), "it waits for the rebuild");
    assert_eq!(disk.live_members(), 1);
    stuck.late.store(true, Ordering::Release);
}
