//! Faults that a review has found, each shown by a test. The member of these tests keeps I/O like a
//! kernel does: abandoning a channel does not end what is under way.
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
    let data = vec![1; 2 * STRIP as usize];
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
fn a_late_write_of_a_failed_rebuild_does_not_spoil_the_next_one() {
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
    while disk.array.state().process.is_some() || disk.array.state().slots[1].bdev.is_some() {
        assert!(Instant::now() < deadline, "the rebuild does not fail");
        driver.visit();
    }
    let added = disk.add_member(1, Arc::clone(&member), pace).recv_timeout(LIMIT).unwrap();
    if added.is_err() {
        // Refused as long as the old write is under way: fine.
        stuck.late.store(true, Ordering::Release);
        return;
    }
    while disk.live_members() != 2 {
        assert!(Instant::now() < deadline + LIMIT, "the rebuild does not end");
        driver.visit();
    }
    assert_eq!(driver.write(0, &[2; 4096]), Status::Ok);
    stuck.late.store(true, Ordering::Release);
    std::thread::sleep(Duration::from_secs(1));
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
    assert_eq!(Driver::new(&shared, 4).write(0, &[2; 4096]), Status::Ok);
    assert_eq!(stored(&target, 0, 4096), [0; 4096], "the target lacks it");
    stuck.late.store(true, Ordering::Release);
    std::thread::sleep(Duration::from_secs(1));
    let bytes = Driver::new(&stuck.stored, 1).read(0, 4096).0;
    let Parsed::Valid(found) = Superblock::parse(&bytes, 512) else { panic!("no superblock") };
    assert!(found.members[1].state != MemberState::Configured, "a restart would use the target");
}
