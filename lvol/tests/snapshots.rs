//! Snapshots, one after the other, of a volume whose guest writes new clusters at depth 32 all the
//! time, with reloads of the store between: nothing is lost, and no snapshot changes. SPDK's store
//! does not survive this.
//!
//! `VHOST_SNAPSHOTS` sets the number of snapshots.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bdev::{Bdev, Buffer, Malloc, MallocOptions, Request, Rights, Tag, ThreadChannel};
use lvol::{BlobId, Clear, LvStore, NewStore, NewVolume};
use uuid::Uuid;

const CLUSTER: u32 = 16 << 10;
const CLUSTERS: u64 = 512;
const DEPTH: u16 = 32;
const BLOCK: usize = 512;
/// Snapshots between two reloads.
const RELOAD: u64 = 25;

fn disk_of(store: &LvStore, id: BlobId, base: &Arc<dyn Bdev>) -> Arc<dyn Bdev> {
    let uuid = Uuid::new_v4();
    store.disk(id, uuid.to_string(), uuid, Arc::clone(base), None).unwrap()
}

/// The offset of the guest's write `n` of a round: clusters in an order of its own.
fn offset(n: u64) -> u64 {
    n * 211 % CLUSTERS * u64::from(CLUSTER)
}

/// Writes `version` to a block of each cluster, until it is told to stop or has written them all.
/// Returns how many writes were acknowledged, and how many were given to the disk.
fn write(disk: &Arc<dyn Bdev>, version: u64, stop: &AtomicBool) -> (u64, u64) {
    let mut channel = ThreadChannel::open(disk, DEPTH, Rights::Write).unwrap();
    let mut under_way: Vec<(Tag, u64)> = vec![];
    let (mut given, mut ended) = (0, vec![]);
    loop {
        let stops = stop.load(Ordering::Relaxed) || given == CLUSTERS;
        if !stops && !channel.is_full() {
            let mut buffer = Buffer::new(BLOCK);
            buffer.bytes_mut()[..8].copy_from_slice(&version.to_le_bytes());
            under_way.push((channel.start(Request::write(offset(given), buffer)), given));
            given += 1;
            continue;
        }
        if stops && under_way.is_empty() {
            break;
        }
        match channel.poll() {
            Some(done) => {
                done.result.unwrap();
                let at = under_way.iter().position(|(tag, _)| *tag == done.tag).unwrap();
                ended.push(under_way.swap_remove(at).1);
            }
            None => channel.sleep(&mut []).unwrap(),
        }
    }
    (ended.len() as u64, given)
}

/// The versions in the blocks that the guest writes, in the order of its writes.
fn versions(disk: &Arc<dyn Bdev>) -> Vec<u64> {
    let mut channel = ThreadChannel::open(disk, 1, Rights::Read).unwrap();
    let mut read = |n| {
        let read = channel.run(Request::read(offset(n), BLOCK)).unwrap();
        u64::from_le_bytes(read.bytes()[..8].try_into().unwrap())
    };
    (0..CLUSTERS).map(&mut read).collect()
}

#[test]
fn snapshots_beside_allocating_writes_lose_nothing() {
    let count = std::env::var("VHOST_SNAPSHOTS").map_or(100, |count| count.parse().unwrap());
    let (name, num_blocks, block_size) = ("M".into(), 96 << 11, 512);
    let options = MallocOptions { name, num_blocks, block_size, uuid: None };
    let base: Arc<dyn Bdev> = Malloc::create(options).unwrap();
    let new = NewStore {
        name: "lvs".into(),
        uuid: Uuid::new_v4(),
        cluster_size: CLUSTER,
        pages_per_hundred_clusters: 100,
        page_size: 4096,
        clear: Clear::None,
    };
    let mut store = LvStore::create(&base, &new).unwrap();
    let (uuid, clear) = (Uuid::new_v4(), Clear::None);
    let new = NewVolume { name: "v", uuid, clusters: CLUSTERS, thin: true, clear };
    let id = store.create_volume(&new).unwrap();
    // What each snapshot holds.
    let mut snapshots: Vec<(BlobId, Vec<u64>)> = vec![];
    let mut expected = vec![0; usize::try_from(CLUSTERS).unwrap()];
    for version in 1..=count {
        let disk = disk_of(&store, id, &base);
        let (stop, before) = (AtomicBool::new(false), expected.clone());
        let (snapshot, (acknowledged, given)) = thread::scope(|scope| {
            let guest = scope.spawn(|| write(&disk, version, &stop));
            // Every snapshot comes at another time of the guest's writes.
            (0..version % 7 * 40).for_each(|_| thread::yield_now());
            let snapshot = store.snapshot(id, &format!("s{version}"), Uuid::new_v4()).unwrap();
            (0..version % 5 * 40).for_each(|_| thread::yield_now());
            stop.store(true, Ordering::Relaxed);
            (snapshot, guest.join().unwrap())
        });
        assert_eq!(acknowledged, given);
        (0..usize::try_from(given).unwrap()).for_each(|n| expected[n] = version);
        assert_eq!(versions(&disk), expected, "of the volume after snapshot {version}");
        let held = versions(&disk_of(&store, snapshot, &base));
        for (n, (held, before)) in held.iter().zip(&before).enumerate() {
            assert!(held == before || *held == version, "write {n} of {version}: {held}, {before}");
        }
        snapshots.push((snapshot, held));
        if version % RELOAD == 0 {
            drop(disk);
            store.close().unwrap();
            store = LvStore::load(&base).unwrap().unwrap();
        }
        while snapshots.len() > 3 {
            let (oldest, held) = snapshots.remove(0);
            assert_eq!(versions(&disk_of(&store, oldest, &base)), held, "it has changed");
            store.delete(oldest).unwrap();
        }
    }
    store.close().unwrap();
}
