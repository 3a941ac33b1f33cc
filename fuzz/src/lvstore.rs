//! Logical volume stores with forged metadata.
//!
//! The input changes bytes of the pages of a small store with snapshots, clones and a clone of
//! another bdev; the checksums of changed pages are right, except where the input says so. A check
//! and a load without write access must not write, and nothing may panic, also when the store is
//! then used.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use blobstore::check::check;
use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::StoreOptions;
use blobstore::{BlobId, Device, DeviceError, Properties};
use uuid::Uuid;

use crate::input::Input;

const PAGE: usize = 4096;
const SIZE: usize = 2 << 20;
const CLUSTER: u32 = 16 << 10;
/// Pages with metadata, and some after them.
const PAGES: usize = 40;
/// Changes of one input.
const CHANGES: usize = 12;

/// A disk in memory whose changed pages are kept apart.
struct Disk<'a> {
    base: &'a [u8],
    pages: RefCell<BTreeMap<usize, Vec<u8>>>,
    writes: Cell<u64>,
}

impl<'a> Disk<'a> {
    fn new(base: &'a [u8], pages: BTreeMap<usize, Vec<u8>>) -> Self {
        Self { base, pages: RefCell::new(pages), writes: Cell::new(0) }
    }

    fn page(&self, page: usize) -> Vec<u8> {
        let base = || self.base[page * PAGE..][..PAGE].to_vec();
        self.pages.borrow().get(&page).cloned().unwrap_or_else(base)
    }

    /// The range of a request that lies on the disk.
    fn range(offset: u64, len: usize) -> Result<std::ops::Range<usize>, DeviceError> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(len).filter(|end| *end <= SIZE);
        Ok(start..end.ok_or(DeviceError { errno: 5 })?)
    }
}

impl Device for Disk<'_> {
    fn properties(&self) -> Properties {
        Properties { size: SIZE as u64, block_size: 512, unmap: true, unmap_zeroes: true }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let range = Self::range(offset, len)?;
        let mut bytes = self.base[range.clone()].to_vec();
        for (page, content) in
            self.pages.borrow().range(range.start / PAGE..range.end.div_ceil(PAGE))
        {
            let (from, to) = ((page * PAGE).max(range.start), ((page + 1) * PAGE).min(range.end));
            let content = &content[from % PAGE..][..to - from];
            bytes[from - range.start..to - range.start].copy_from_slice(content);
        }
        Ok(bytes)
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        self.writes.set(self.writes.get() + 1);
        let range = Self::range(offset, data.len()).expect("a write beyond the end of the disk");
        let (mut at, mut left) = (range.start, &data[..]);
        while !left.is_empty() {
            let len = (PAGE - at % PAGE).min(left.len());
            let mut content = self.page(at / PAGE);
            content[at % PAGE..][..len].copy_from_slice(&left[..len]);
            self.pages.borrow_mut().insert(at / PAGE, content);
            (at, left) = (at + len, &left[len..]);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let len = usize::try_from(len).expect("zeroes beyond the end of the disk");
        Self::range(offset, len).expect("zeroes beyond the end of the disk");
        self.write(offset, vec![0; len]).await
    }

    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.write_zeroes(offset, len).await
    }
}

/// Runs a future of a disk that never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let Poll::Ready(value) = pin!(future).poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("the disk never waits");
    };
    value
}

/// A store with a bit of everything, not unloaded.
fn store() -> &'static [u8] {
    static STORE: OnceLock<Vec<u8>> = OnceLock::new();
    STORE.get_or_init(|| {
        let zeroes = vec![0; SIZE];
        let options = StoreOptions { cluster_size: CLUSTER, ..StoreOptions::default() };
        let uuid = Uuid::from_u128;
        let made = now(Lvs::create(Disk::new(&zeroes, BTreeMap::new()), "lvs", uuid(1), options));
        let mut lvs = made.expect("a new store");
        let mut volume = |name, number, thin| {
            let clear = Clear::Default;
            let new = NewVolume { name, uuid: uuid(number), clusters: 6, thin, clear };
            now(lvs.create_volume(new)).expect("a volume")
        };
        let (thin, _thick) = (volume("thin", 2, true), volume("thick", 3, false));
        now(lvs.store_mut().allocate(thin, &[0, 3])).expect("clusters");
        let snapshot = now(lvs.snapshot(thin, "s1", uuid(4))).expect("a snapshot");
        now(lvs.store_mut().allocate(thin, &[3])).expect("a cluster");
        now(lvs.snapshot(thin, "s2", uuid(5))).expect("a snapshot");
        now(lvs.clone_volume(snapshot, "c", uuid(6))).expect("a clone");
        now(lvs.clone_external(uuid(9), 4, "e", uuid(7))).expect("a clone of a bdev");
        let disk = lvs.into_store().into_device();
        (0..SIZE / PAGE).flat_map(|page| disk.page(page)).collect()
    })
}

/// Changes bytes of a page.
fn forge(disk: &Disk<'_>, input: &mut Input<'_>) {
    let page = usize::from(input.u8()) % PAGES;
    let mut bytes = disk.page(page);
    let at = usize::from(input.u16()) % (PAGE - 8);
    let how = input.u8();
    for n in 0..1 + usize::from(how & 7) {
        bytes[at + n] = input.u8();
    }
    if how & 0xf0 != 0 {
        let crc = crc32c::crc32c(&bytes[..PAGE - 4]);
        bytes[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    disk.pages.borrow_mut().insert(page, bytes);
}

/// Uses a store.
fn touch(lvs: &mut Lvs<Disk<'_>>) {
    let ids: Vec<BlobId> = lvs.volumes().map(|volume| volume.blob.id()).collect();
    for id in ids {
        let len = lvs.store().blob(id).map_or(0, blobstore::Blob::clusters);
        for index in [0, len / 2, len.saturating_sub(1), u64::MAX] {
            // Any answer will do, here and below.
            let _ = lvs.store().resolve(id, index);
        }
        let _ = lvs.store().places(id);
        let _ = now(lvs.store_mut().allocate(id, &[len / 2]));
        let _ = now(lvs.store_mut().release(id, &[0, len / 2]));
        let _ = now(lvs.store_mut().resize(id, len.min(3)));
        let _ = now(lvs.snapshot(id, "new", Uuid::nil()));
        let _ = now(lvs.delete(id));
    }
    let _ = now(lvs.store_mut().unload());
}

/// Runs an input.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let disk = Disk::new(store(), BTreeMap::new());
    for _ in 0..CHANGES {
        if input.is_empty() {
            break;
        }
        forge(&disk, &mut input);
    }
    let pages = disk.pages.borrow().clone();
    // The disk does not fail.
    now(check(&disk)).expect("a check");
    assert_eq!(disk.writes.get(), 0, "a check has written");
    if let Ok(lvs) = now(Lvs::load(disk, true)) {
        assert_eq!(lvs.store().device().writes.get(), 0, "a store opened read-only was written");
    }
    if let Ok(mut lvs) = now(Lvs::load(Disk::new(store(), pages), false)) {
        touch(&mut lvs);
    }
}
