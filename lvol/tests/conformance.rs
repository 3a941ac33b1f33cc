//! The suite of bdevs, on logical volumes.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, FileDisk, FileOptions, Flavour, Latency, Malloc, MallocOptions,
};
use bdev_conformance::{Fixture, SIZE, conformance};
use lvol::{BlobId, Clear, LvStore, NewStore, NewVolume};
use tempfile::TempDir;
use uuid::Uuid;

/// Bytes of a cluster: the suite's disk has several, and I/Os cross them.
const CLUSTER: u32 = 32 << 10;

/// Closes the store when the test ends.
struct Store(LvStore);

impl Drop for Store {
    fn drop(&mut self) {
        self.0.close().unwrap();
    }
}

fn malloc(block_size: u32) -> Arc<dyn Bdev> {
    let num_blocks = 4 * SIZE / u64::from(block_size);
    let options = MallocOptions { name: "M".into(), num_blocks, block_size, uuid: None };
    Malloc::create(options).unwrap()
}

fn file(dir: &TempDir, flavour: Flavour) -> Arc<dyn Bdev> {
    let filename = dir.path().join("disk");
    std::fs::File::create(&filename).unwrap().set_len(4 * SIZE).unwrap();
    let options = FileOptions {
        name: "F".into(),
        filename,
        block_size: Some(512),
        readonly: false,
        fallocate: true,
        uuid: None,
        flavour,
        engine: None,
    };
    FileDisk::create(options).unwrap()
}

fn delayed(base: Arc<dyn Bdev>) -> Arc<dyn Bdev> {
    let latency = Latency { avg_read_us: 0, p99_read_us: 300, avg_write_us: 50, p99_write_us: 100 };
    Delay::create(DelayOptions { name: "D".into(), base, latency, uuid: None }).unwrap()
}

fn store(base: &Arc<dyn Bdev>) -> LvStore {
    let new = NewStore {
        name: "lvs".into(),
        uuid: Uuid::new_v4(),
        cluster_size: CLUSTER,
        pages_per_hundred_clusters: 100,
        page_size: 4096,
        clear: Clear::Default,
    };
    LvStore::create(base, &new).unwrap()
}

fn volume(store: &LvStore, thin: bool) -> BlobId {
    let (uuid, clusters) = (Uuid::new_v4(), SIZE / u64::from(CLUSTER));
    let new = NewVolume { name: "v", uuid, clusters, thin, clear: Clear::Default };
    store.create_volume(&new).unwrap()
}

fn fixture(store: LvStore, id: BlobId, base: Arc<dyn Bdev>, more: impl std::any::Any) -> Fixture {
    let uuid = Uuid::new_v4();
    let disk = store.disk(id, uuid.to_string(), uuid, base, None).unwrap();
    Fixture::on(disk, (Store(store), more))
}

fn on(base: Arc<dyn Bdev>, thin: bool) -> Fixture {
    let store = store(&base);
    let id = volume(&store, thin);
    fixture(store, id, base, ())
}

fn on_file(flavour: Flavour) -> Fixture {
    let dir = TempDir::new().unwrap();
    let base = file(&dir, flavour);
    let store = store(&base);
    let id = volume(&store, true);
    fixture(store, id, base, dir)
}

/// A clone of a snapshot, whose clusters are copied when they are written.
fn a_clone(base: Arc<dyn Bdev>) -> Fixture {
    let store = store(&base);
    let id = volume(&store, false);
    let snapshot = store.snapshot(id, "s", Uuid::new_v4()).unwrap();
    let clone = store.clone_volume(snapshot, "c", Uuid::new_v4()).unwrap();
    fixture(store, clone, base, ())
}

conformance! {
    thin_on_malloc_512 => on(malloc(512), true);
    thin_on_malloc_4096 => on(malloc(4096), true);
    thick_on_malloc => on(malloc(512), false);
    clone_on_malloc => a_clone(malloc(512));
    thin_on_delay => on(delayed(malloc(512)), true);
    thin_on_uring => on_file(Flavour::Uring);
    thin_on_aio => on_file(Flavour::Aio);
}
