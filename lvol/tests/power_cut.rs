//! Guests' I/O beside operators' operations, on a device that does everything late and in any order:
//! no write of the volume is lost, no snapshot changes, and after a power cut at any point the store
//! is in order and has what was flushed.
//!
//! `VHOST_SEEDS` sets the number of seeds; `ci/lvol-cut` records a long run. The threads run as they
//! like, so that a seed does not determine a run; a failure prints what is needed to understand it.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

mod recorder;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bdev::{Bdev, Buffer, EndedRequest, Op, Request, Rights, Tag, ThreadChannel};
use lvol::{BlobId, Clear, LvStore, NewStore, NewVolume};
use recorder::{BLOCK, Event, GUEST_DEPTH, Random, Recorder, cut, findings};
use uuid::Uuid;

const CLUSTER: u64 = 16 << 10;
const CLUSTERS: u64 = 24;
const SIZE: usize = 4 << 20;
/// I/Os of the guest in a run.
const IOS: u64 = 400;
/// Cuts that are tried for each run.
const CUTS: u64 = 12;

/// What the guest knows of a block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// The last version that was given to the disk, and the last one that was acknowledged.
    given: u32,
    acknowledged: u32,
    /// It was discarded after version `given`: it may read as anything.
    discarded: bool,
    /// How often it was discarded.
    discards: u32,
}

/// The content of a guest's block in a version.
fn content(guest: u64, block: usize, version: u32) -> [u8; BLOCK as usize] {
    let mut bytes = [0; BLOCK as usize];
    if version > 0 {
        let block = (guest << 10 | block as u64) << 48;
        for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = block | u64::from(version) << 16 | n as u64;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// The version of a block that was read; `None`: it is no version of it.
fn version(guest: u64, block: usize, read: &[u8]) -> Option<u32> {
    let first = u64::from_le_bytes(read[..8].try_into().unwrap());
    let version = (first >> 16) as u32;
    (read == content(guest, block, version)).then_some(version)
}

fn open(disk: &Arc<dyn Bdev>, depth: u16) -> ThreadChannel {
    ThreadChannel::open(disk, depth, Rights::Write).unwrap()
}

fn disk_of(store: &LvStore, id: BlobId, base: &Arc<dyn Bdev>) -> Arc<dyn Bdev> {
    let uuid = Uuid::new_v4();
    store.disk(id, uuid.to_string(), uuid, Arc::clone(base), None).unwrap()
}

fn read_all(disk: &Arc<dyn Bdev>) -> Vec<u8> {
    let mut channel = open(disk, 1);
    let len = disk.size_bytes() as usize;
    channel.run(Request::read(0, len)).unwrap().bytes().to_vec()
}

/// What a guest knew when it began the flushes that it saw end, by the number of their mark.
type Known = BTreeMap<u64, Vec<Block>>;

/// An I/O of a guest: its blocks, and what the guest knew when it began.
struct UnderWay {
    tag: Tag,
    op: Op,
    first: usize,
    len: usize,
    before: Vec<Block>,
}

/// A guest that writes, reads, discards and flushes a volume, and checks what it reads.
struct Guest<'a> {
    /// Distinguishes the data of guests.
    number: u64,
    device: &'a Recorder,
    channel: ThreadChannel,
    random: Random,
    blocks: Vec<Block>,
    under_way: Vec<UnderWay>,
    known: Known,
}

impl<'a> Guest<'a> {
    fn new(number: u64, disk: &Arc<dyn Bdev>, device: &'a Recorder, random: Random) -> Self {
        let count = (disk.size_bytes() / BLOCK) as usize;
        let channel = open(disk, GUEST_DEPTH);
        let (blocks, under_way, known) = (vec![Block::default(); count], vec![], Known::new());
        Self { number, device, channel, random, blocks, under_way, known }
    }

    fn run(mut self) -> (Known, Vec<Block>) {
        let mut started = 0;
        while started < IOS || !self.under_way.is_empty() {
            if started < IOS && !self.channel.is_full() {
                started += u64::from(self.start());
            }
            match self.channel.poll() {
                Some(ended) => self.end(ended),
                None => self.channel.sleep(&mut []).unwrap(),
            }
        }
        (self.known, self.blocks)
    }

    /// Starts an I/O. It overlaps none that is under way; only a discard may overlap any.
    fn start(&mut self) -> bool {
        let op = match self.random.below(10) {
            0 | 1 => Op::Read,
            2 => Op::Flush,
            3 => Op::Unmap,
            _ => Op::Write,
        };
        let longest = if op == Op::Unmap { 2 * CLUSTER / BLOCK } else { 40 };
        let len = 1 + self.random.below(longest) as usize;
        let first = self.random.below((self.blocks.len() - len) as u64) as usize;
        let (first, len) = if op == Op::Flush { (0, 0) } else { (first, len) };
        let apart = |io: &UnderWay| io.first + io.len <= first || first + len <= io.first;
        if op != Op::Unmap && !self.under_way.iter().all(apart) {
            return false;
        }
        let (offset, bytes) = (first as u64 * BLOCK, len * BLOCK as usize);
        let mut buffer = Buffer::new(if op == Op::Write { bytes } else { 0 });
        for (n, block) in self.blocks[first..first + len].iter_mut().enumerate() {
            if op == Op::Write {
                (block.given, block.discarded) = (block.given + 1, false);
                let content = content(self.number, first + n, block.given);
                let at = n * BLOCK as usize;
                buffer.bytes_mut()[at..at + BLOCK as usize].copy_from_slice(&content);
            } else if op == Op::Unmap {
                (block.discarded, block.discards) = (true, block.discards + 1);
                block.acknowledged = 0;
            }
        }
        let request = match op {
            Op::Read => Request::read(offset, bytes),
            Op::Write => Request::write(offset, buffer),
            _ => Request::plain(op, offset, bytes as u64),
        };
        let (before, tag) = (self.blocks.clone(), self.channel.start(request));
        self.under_way.push(UnderWay { tag, op, first, len, before });
        true
    }

    fn end(&mut self, ended: EndedRequest) {
        ended.result.unwrap();
        let at = self.under_way.iter().position(|io| io.tag == ended.tag).unwrap();
        let UnderWay { op, first, len, before, .. } = self.under_way.swap_remove(at);
        if op == Op::Flush {
            let mark = self.known.len() as u64;
            if self.number == 0 {
                self.device.mark(mark);
            }
            self.known.insert(mark, before);
            return;
        }
        for (n, before) in (first..).zip(&before[first..first + len]) {
            let block = &mut self.blocks[n];
            // A discard that began later may have come before it.
            let discarded = block.discards > before.discards;
            if op == Op::Write && !discarded {
                block.acknowledged = block.given;
            } else if op == Op::Read && !discarded && !block.discarded {
                let at = (n - first) * BLOCK as usize;
                let read = &ended.request.buffer.bytes()[at..at + BLOCK as usize];
                let version = version(self.number, n, read);
                assert_eq!(version, Some(block.given), "guest {}, block {n}", self.number);
            }
        }
    }
}

/// Deletes a snapshot, unless it has several clones.
fn delete(store: &LvStore, id: BlobId) -> bool {
    match store.delete(id) {
        Ok(()) => true,
        Err(e) if e.errno() == 1 => false,
        Err(e) => panic!("{e}"),
    }
}

/// The operator: snapshots, clones and deletes them, until the guest has ended. A snapshot must not
/// change while it exists.
fn operator(
    store: &LvStore,
    id: BlobId,
    base: &Arc<dyn Bdev>,
    random: &mut Random,
    ended: &AtomicBool,
) {
    let mut snapshots: Vec<(BlobId, Vec<u8>)> = vec![];
    let mut count = 0;
    while !ended.load(Ordering::Relaxed) {
        count += 1;
        match random.below(6) {
            0 | 1 => {
                let snapshot = store.snapshot(id, &format!("s{count}"), Uuid::new_v4()).unwrap();
                snapshots.push((snapshot, read_all(&disk_of(store, snapshot, base))));
            }
            2 if snapshots.len() > 1 => {
                let at = random.below(snapshots.len() as u64) as usize;
                let (snapshot, content) = snapshots.swap_remove(at);
                assert!(read_all(&disk_of(store, snapshot, base)) == content, "it has changed");
                if !delete(store, snapshot) {
                    snapshots.push((snapshot, content));
                }
            }
            3 => {
                let Some((snapshot, content)) = snapshots.last() else { continue };
                let name = format!("c{count}");
                let clone = store.clone_volume(*snapshot, &name, Uuid::new_v4()).unwrap();
                let disk = disk_of(store, clone, base);
                open(&disk, 1).run(Request::write(0, Buffer::new(4096))).unwrap();
                assert!(read_all(&disk)[4096..] == content[4096..]);
                drop(disk);
                store.delete(clone).unwrap();
            }
            4 => store
                .decouple(id)
                .or_else(|e| if e.errno() == 22 { Ok(()) } else { Err(e) })
                .unwrap(),
            _ => thread::yield_now(),
        }
        if snapshots.len() > 3 && random.below(2) == 0 {
            let (snapshot, content) = snapshots.remove(0);
            assert!(read_all(&disk_of(store, snapshot, base)) == content, "it has changed");
            if !delete(store, snapshot) {
                snapshots.push((snapshot, content));
            }
        }
    }
    for (snapshot, content) in snapshots {
        assert!(read_all(&disk_of(store, snapshot, base)) == content, "it has changed");
    }
}

fn new_store() -> NewStore {
    NewStore {
        name: "lvs".into(),
        uuid: Uuid::new_v4(),
        cluster_size: CLUSTER as u32,
        pages_per_hundred_clusters: 100,
        page_size: 4096,
        clear: Clear::None,
    }
}

/// Checks the volume in a state of the device: blocks have a version from `durable` on.
fn check(data: Vec<u8>, seed: u64, durable: &[Block], last: &[Block], what: &str) {
    let device = Recorder::new(data, seed);
    let base: Arc<dyn Bdev> = Arc::clone(&device) as _;
    let store = LvStore::load(&base).unwrap().unwrap();
    let facts = store.facts();
    let id = facts.volumes.iter().find(|volume| volume.name == "v").unwrap().id;
    let read = read_all(&disk_of(&store, id, &base));
    for (n, (durable, last)) in durable.iter().zip(last).enumerate() {
        let at = n * BLOCK as usize;
        let version = version(0, n, &read[at..at + BLOCK as usize]);
        let right = version.is_some_and(|v| (durable.acknowledged..=last.given).contains(&v));
        let any = durable.discarded || last.discards > durable.discards;
        assert!(right || any, "{what}: block {n}: {version:?}, flushed {durable:?}, last {last:?}");
    }
    store.close().unwrap();
    assert_eq!(findings(device.lock().data()), [""; 0], "{what}");
}

/// Tells the operator of the end, also if a guest fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn run(seed: u64) {
    let random = &mut Random::new(seed);
    let device = Recorder::new(vec![0xee; SIZE], seed);
    let base: Arc<dyn Bdev> = Arc::clone(&device) as _;
    let store = LvStore::create(&base, &new_store()).unwrap();
    let (name, uuid, clear) = ("v", Uuid::new_v4(), Clear::None);
    let thin = random.below(4) > 0;
    let new = NewVolume { name, uuid, clusters: CLUSTERS, thin, clear };
    let id = store.create_volume(&new).unwrap();
    let disk = disk_of(&store, id, &base);
    // Another volume, which gets the clusters that the first one gives back.
    let uuid = Uuid::new_v4();
    let new = NewVolume { name: "w", uuid, clusters: CLUSTERS, thin: true, clear: Clear::None };
    let other = disk_of(&store, store.create_volume(&new).unwrap(), &base);
    let before = {
        let mut state = device.lock();
        state.events.clear();
        state.data().to_vec()
    };
    let ended = AtomicBool::new(false);
    let mut others = Random::new(seed ^ 0xffff);
    let (known, last) = thread::scope(|scope| {
        let operator = scope.spawn(|| operator(&store, id, &base, &mut others, &ended));
        let _ends = Ends(&ended);
        let (one, two) = (Random::new(seed ^ 0xf0), Random::new(seed ^ 0x0f));
        let neighbour = scope.spawn(|| Guest::new(1, &other, &device, two).run());
        let known = Guest::new(0, &disk, &device, one).run();
        neighbour.join().unwrap();
        ended.store(true, Ordering::Relaxed);
        operator.join().unwrap();
        known
    });
    drop((disk, other));
    let events = device.lock().events.clone();
    for n in 0..CUTS {
        let end = random.below(events.len() as u64 + 1) as usize;
        let mark = events[..end].iter().rev().find_map(|event| match event {
            Event::Mark(mark) => Some(*mark),
            _ => None,
        });
        let none = vec![Block::default(); last.len()];
        let durable = mark.map_or(&none, |mark| &known[&mark]);
        let state = cut(&before, &events, end, random);
        check(state, seed ^ n, durable, &last, &format!("seed {seed}, cut before {end}"));
    }
    store.close().unwrap();
    let data = device.lock().data().to_vec();
    check(data, seed, &last, &last, &format!("seed {seed}, at the end"));
}

#[test]
fn nothing_is_lost_beside_operations_or_after_a_power_cut() {
    let seeds = std::env::var("VHOST_SEEDS").map_or(40, |seeds| seeds.parse().unwrap());
    let first = std::env::var("VHOST_FIRST_SEED").map_or(1, |seed| seed.parse().unwrap());
    for seed in first..first + seeds {
        run(seed);
    }
}
