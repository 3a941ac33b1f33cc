//! Stores with damaged blobs, on devices that fail, and without free metadata pages: nothing that
//! can be read is lost, and nothing that was acknowledged.

use std::cell::Cell;
use std::rc::Rc;

use blobstore::format::{Clear, Descriptor, Flags, Page, Xattr, extent_page};
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::{Interrupted, StoreOptions, Wanted};
use blobstore::{BlobId, Device, DeviceError, Error, Place, Properties, Result, Store};
use futures_util::FutureExt;
use uuid::Uuid;

use crate::medium::{Memory, cluster, findings, image, now, write};

const PAGE: usize = 4096;

/// A device that may have another size later, and whose writes fail or wait for ever after some.
struct Faulty {
    memory: Memory,
    size: Cell<u64>,
    left: Cell<u32>,
    waits: bool,
}

impl Faulty {
    fn new(waits: bool) -> Self {
        let memory = Memory::dirty(1 << 20, 512);
        Self { memory, size: Cell::new(1 << 20), left: Cell::new(u32::MAX), waits }
    }
}

/// A handle that stays when a store is refused.
struct Shared(Rc<Faulty>);

impl Device for Shared {
    fn properties(&self) -> Properties {
        self.0.properties()
    }
    async fn read(&self, offset: u64, len: usize) -> std::result::Result<Vec<u8>, DeviceError> {
        self.0.read(offset, len).await
    }
    async fn write(&self, offset: u64, data: Vec<u8>) -> std::result::Result<(), DeviceError> {
        self.0.write(offset, data).await
    }
    async fn flush(&self) -> std::result::Result<(), DeviceError> {
        Ok(())
    }
    async fn write_zeroes(&self, offset: u64, len: u64) -> std::result::Result<(), DeviceError> {
        self.0.write_zeroes(offset, len).await
    }
    async fn unmap(&self, offset: u64, len: u64) -> std::result::Result<(), DeviceError> {
        self.0.unmap(offset, len).await
    }
}

impl Device for Faulty {
    fn properties(&self) -> Properties {
        Properties { size: self.size.get(), ..self.memory.properties }
    }
    async fn read(&self, offset: u64, len: usize) -> std::result::Result<Vec<u8>, DeviceError> {
        self.memory.read(offset, len).await
    }
    async fn write(&self, offset: u64, data: Vec<u8>) -> std::result::Result<(), DeviceError> {
        match self.left.get() {
            0 if self.waits => std::future::pending().await,
            0 => return Err(DeviceError { errno: 5 }),
            left => self.left.set(left - 1),
        }
        self.memory.write(offset, data).await
    }
    async fn flush(&self) -> std::result::Result<(), DeviceError> {
        Ok(())
    }
    async fn write_zeroes(&self, offset: u64, len: u64) -> std::result::Result<(), DeviceError> {
        let len = usize::try_from(len).unwrap();
        self.write(offset, vec![0; len]).await
    }
    async fn unmap(&self, offset: u64, len: u64) -> std::result::Result<(), DeviceError> {
        self.memory.unmap(offset, len).await
    }
}

fn new_store<D: Device>(device: D, pages: u32) -> Lvs<D> {
    let options = StoreOptions {
        cluster_size: 4096,
        pages_per_hundred_clusters: pages,
        ..StoreOptions::default()
    };
    now(Lvs::create(device, "store", Uuid::nil(), options)).unwrap()
}

fn volume<D: Device>(lvs: &mut Lvs<D>, name: &str, clusters: u64) -> Result<BlobId> {
    let (uuid, clear) = (Uuid::from_u128(clusters.into()), Clear::Default);
    now(lvs.create_volume(NewVolume { name, uuid, clusters, thin: true, clear }))
}

fn id<D: Device>(lvs: &Lvs<D>, name: &str) -> BlobId {
    lvs.find(name).unwrap().blob.id()
}

fn seal(page: &mut [u8]) {
    let crc = crc32c::crc32c(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
}

/// Changes the root page of a blob, and gives it a right checksum or not.
fn change_root(lvs: Lvs<Memory>, id: BlobId, right: bool, change: impl Fn(&mut [u8])) -> Memory {
    let start = lvs.store().super_block().metadata.start;
    let at = (start + id.page().unwrap()) as usize * PAGE;
    let memory = lvs.into_store().into_device();
    {
        let mut bytes = memory.bytes.borrow_mut();
        let page = &mut bytes[at..at + PAGE];
        change(page);
        if right {
            seal(page);
        }
    }
    memory
}

/// The mark of an unfinished snapshot does not outlive the other blob: the next blob with its
/// number would look as if the snapshot had to be removed.
#[test]
fn a_snapshot_whose_other_blob_is_lost_is_kept_for_ever() {
    let lvs = now(Lvs::load(Memory::new(image("lvs-snaprm-kept.img.zst"), 512), true)).unwrap();
    let Interrupted::Kept(snapshot) = lvs.store().interrupted()[0] else { panic!("not kept") };
    let lost = lvs.store().clones(snapshot).next().unwrap();
    let memory = change_root(lvs, lost, false, |page| page[100] ^= 1);
    let mut lvs = now(Lvs::load(memory, false)).unwrap();
    assert_eq!(lvs.store().interrupted(), [Interrupted::Kept(snapshot)]);
    let content = cluster(lvs.store(), snapshot, 0);
    let mut names = (0..).map(|n| format!("new{n}"));
    while volume(&mut lvs, &names.next().unwrap(), 1).unwrap() != lost {}
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().interrupted(), []);
    assert!(cluster(lvs.store(), snapshot, 0) == content);
}

/// If the other blob cannot be read, neither it nor the snapshot goes.
#[test]
fn an_unfinished_snapshot_of_an_unreadable_blob_stays() {
    let lvs = now(Lvs::load(Memory::new(image("lvs-snaprm-kept.img.zst"), 512), true)).unwrap();
    let Interrupted::Kept(snapshot) = lvs.store().interrupted()[0] else { panic!("not kept") };
    let other = lvs.store().clones(snapshot).next().unwrap();
    // A flag of a later version.
    let memory = change_root(lvs, other, true, |page| page[21] |= 16);
    let mut lvs = now(Lvs::load(memory, false)).unwrap();
    assert_eq!(lvs.store().interrupted(), [Interrupted::Left(snapshot)]);
    assert!(matches!(now(lvs.delete(snapshot)), Err(Error::NotPermitted(_))));
}

/// After a commit that failed or was dropped, a guest's write must not go to the claimed cluster:
/// it would be gone after the next load.
#[test]
fn a_cluster_is_not_the_blobs_until_the_map_is_written() {
    for waits in [false, true] {
        let mut lvs = new_store(Faulty::new(waits), 40);
        let v = volume(&mut lvs, "v", 10).unwrap();
        write(lvs.store_mut(), v, 0, 0, vec![1; PAGE]);
        let wanted = [Wanted { index: 1, whole: true }];
        let claim = lvs.store_mut().claim(v, &wanted).unwrap();
        lvs.store().device().left.set(0);
        let done = lvs.store_mut().commit(claim).now_or_never();
        assert!(lvs.store().failed() && !matches!(done, Some(Ok(()))));
        assert_eq!(lvs.store().resolve(v, 1), Ok(Place::Zeroes));
        assert_eq!(Place::decode(lvs.store().places(v).unwrap().table[1]), Place::Zeroes);
        assert!(matches!(lvs.store().resolve(v, 0), Ok(Place::Own(_))));
        lvs.store().device().left.set(u32::MAX);
        let mut lvs = now(lvs.reload()).unwrap();
        assert_eq!(lvs.store().resolve(v, 1), Ok(Place::Zeroes));
        write(lvs.store_mut(), v, 1, 0, vec![2; PAGE]);
        assert!(matches!(lvs.store().resolve(v, 1), Ok(Place::Own(_))));
    }
}

#[test]
fn a_snapshot_with_an_unreadable_clone_is_not_deleted() {
    let mut lvs = new_store(Memory::dirty(1 << 20, 512), 40);
    let v = volume(&mut lvs, "v", 10).unwrap();
    write(lvs.store_mut(), v, 0, 0, vec![9; PAGE]);
    let snapshot = now(lvs.snapshot(v, "snapshot", Uuid::nil())).unwrap();
    let memory = change_root(lvs, v, true, |page| page[21] |= 16);
    let mut lvs = now(Lvs::load(memory, false)).unwrap();
    assert_eq!((lvs.store().broken()[0].id, lvs.store().clones(snapshot).count()), (v, 0));
    assert!(matches!(now(lvs.delete(snapshot)), Err(Error::NotPermitted(_))));
    assert!(!lvs.store().failed());
}

/// Fills all metadata pages but some with blobs, and returns one of them.
fn fill_metadata<D: Device>(lvs: &mut Lvs<D>, left: u64) -> BlobId {
    let mut last = None;
    for n in 0.. {
        let (used, all) = lvs.store().metadata_pages();
        if all - used <= left {
            break;
        }
        last = Some(volume(lvs, &format!("fill{n}"), 0).unwrap());
    }
    last.unwrap()
}

#[test]
fn what_takes_no_page_needs_none() {
    let mut lvs = new_store(Memory::dirty(1 << 20, 512), 8);
    let v = volume(&mut lvs, "v", 10).unwrap();
    now(lvs.store_mut().allocate(v, &[0, 1])).unwrap();
    fill_metadata(&mut lvs, 0);
    now(lvs.store_mut().allocate(v, &[2])).unwrap();
    assert_eq!(now(lvs.store_mut().release(v, &[0])).unwrap().len(), 1);
    now(lvs.store_mut().resize(v, 2)).unwrap();
    now(lvs.rename(v, "w")).unwrap();
    now(lvs.store_mut().set_read_only(v)).unwrap();
    assert_eq!(volume(&mut lvs, "x", 1), Err(Error::NoSpace("metadata pages")));
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().blob(id(&lvs, "w")).unwrap().allocated(), 1);
}

/// A map of runs may need many pages, which must be there before anything is written.
#[test]
fn a_map_of_runs_that_does_not_fit_is_refused_before_it_is_written() {
    let mut lvs = new_store(Memory::dirty(64 << 20, 512), 10);
    let v = volume(&mut lvs, "v", 6000).unwrap();
    let all: Vec<u64> = (0..6000).collect();
    now(lvs.store_mut().allocate(v, &all)).unwrap();
    let free = lvs.store().free_clusters();
    let rest = volume(&mut lvs, "rest", free).unwrap();
    now(lvs.store_mut().allocate(rest, &(0..free).collect::<Vec<_>>())).unwrap();
    let runs = volume(&mut lvs, "runs", 0).unwrap();
    // A thick blob of no clusters, without a table.
    let memory = change_root(lvs, runs, true, |page| {
        let id = u64::from_le_bytes(page[..8].try_into().unwrap());
        let name = Xattr { name: b"name".to_vec(), value: b"runs\0".to_vec() };
        let descriptors = vec![Descriptor::Flags(Flags::default()), Descriptor::Xattr(name)];
        let root = Page { id: BlobId(id), sequence: 0, descriptors, next: None };
        page.copy_from_slice(&root.encode());
    });
    let mut lvs = now(Lvs::load(memory, false)).unwrap();
    let every_second: Vec<u64> = all.into_iter().step_by(2).collect();
    now(lvs.store_mut().release(v, &every_second)).unwrap();
    fill_metadata(&mut lvs, 2);
    let grown = now(lvs.store_mut().resize(runs, 3000));
    assert_eq!((grown, lvs.store().failed()), (Err(Error::NoSpace("metadata pages")), false));
    let mut names = (0..).map(|n| format!("fill{n}"));
    for _ in 0..30 {
        let filler = id(&lvs, &names.next().unwrap());
        now(lvs.delete(filler)).unwrap();
    }
    now(lvs.store_mut().resize(runs, 3000)).unwrap();
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().blob(runs).unwrap().allocated(), 3000);
}

/// A page that two blobs have, because of damage, is not zeroed with the one that recovery removes.
#[test]
fn a_page_of_another_blob_is_not_zeroed() {
    let mut lvs = new_store(Memory::dirty(1 << 20, 512), 40);
    let [v, removed] = ["v", "removed"].map(|name| volume(&mut lvs, name, 10 + name.len() as u64));
    let (v, removed) = (v.unwrap(), removed.unwrap());
    write(lvs.store_mut(), v, 0, 0, vec![9; PAGE]);
    let start = lvs.store().super_block().metadata.start as usize;
    let at = (start + v.page().unwrap() as usize) * PAGE;
    let root = lvs.store().device().bytes.borrow()[at..at + PAGE].to_vec();
    let table = Page::decode(&root).unwrap().descriptors.into_iter();
    let table = table.filter(|d| matches!(d, Descriptor::Table { .. }));
    let mut descriptors: Vec<Descriptor> = table.collect();
    // An unfinished snapshot of a blob that is not its clone, with the extent page of "v".
    let flags = Flags { invalid: 7, ..Flags::default() };
    let other = volume(&mut lvs, "other", 1).unwrap();
    let mark = Xattr { name: b"SNAPTMP".to_vec(), value: other.0.to_le_bytes().to_vec() };
    descriptors.extend([Descriptor::Flags(flags), Descriptor::Internal(mark)]);
    let forged = Page { id: removed, sequence: 0, descriptors, next: None };
    let memory = change_root(lvs, removed, true, |page| page.copy_from_slice(&forged.encode()));
    let lvs = now(Lvs::load(memory, false)).unwrap();
    assert_eq!(lvs.store().interrupted(), [Interrupted::Removed(removed)]);
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!((lvs.store().broken().len(), cluster(lvs.store(), v, 0)), (0, vec![9; PAGE]));
}

#[test]
fn a_ratio_of_0_is_the_default() {
    let [zero, hundred] = [0, 100].map(|pages_per_hundred_clusters| {
        let options =
            StoreOptions { cluster_size: 65536, pages_per_hundred_clusters, ..Default::default() };
        let memory = Memory::dirty(64 << 20, 512);
        now(Store::create(memory, options)).unwrap().metadata_pages().1
    });
    assert_eq!((zero, hundred), (hundred, 1024));
}

/// A store that has no identity is refused before recovery writes to it.
#[test]
fn a_store_that_is_refused_is_not_written() {
    let mut bytes = image("lvs-snaptmp-removed.img.zst");
    bytes[20..28].fill(0xff);
    seal(&mut bytes[..PAGE]);
    let device = Faulty { memory: Memory::new(bytes, 512), ..Faulty::new(false) };
    device.size.set(device.memory.properties.size);
    let device = Rc::new(device);
    assert!(matches!(now(Lvs::load(Shared(device.clone()), false)), Err(Error::NotAStore(_))));
    assert_eq!(device.memory.writes.get(), 0);
}

#[test]
fn a_parent_that_cannot_be_told_makes_a_blob_unreadable() {
    let parent = Xattr { name: b"SNAP".to_vec(), value: vec![1; 7] };
    for (invalid, internal) in [(7, Some(parent)), (1 | 4 | 8, None)] {
        let mut lvs = new_store(Memory::dirty(1 << 20, 512), 40);
        let v = volume(&mut lvs, "v", 3).unwrap();
        let mut descriptors = vec![Descriptor::Flags(Flags { invalid, ..Flags::default() })];
        descriptors.extend(internal.map(Descriptor::Internal));
        let root = Page { id: v, sequence: 0, descriptors, next: None };
        let memory = change_root(lvs, v, true, |page| page.copy_from_slice(&root.encode()));
        let lvs = now(Lvs::load(memory, false)).unwrap();
        assert_eq!(lvs.store().broken().iter().map(|broken| broken.id).collect::<Vec<_>>(), [v]);
        let found = findings(lvs.store().device());
        assert_eq!(found.iter().filter(|text| text.contains("error: ")).count(), 1, "{found:?}");
    }
}

/// A super block without a size means that of the device when the store was loaded.
#[test]
fn a_store_without_a_size_does_not_grow_by_itself() {
    let mut lvs = new_store(Faulty::new(false), 40);
    now(lvs.store_mut().unload()).unwrap();
    let device = lvs.into_store().into_device();
    {
        let mut bytes = device.memory.bytes.borrow_mut();
        bytes[80..88].fill(0);
        seal(&mut bytes[..PAGE]);
    }
    device.size.set((1 << 20) - 65536);
    let mut lvs = now(Lvs::load(device, false)).unwrap();
    let free = lvs.store().free_clusters();
    lvs.store().device().size.set(1 << 20);
    volume(&mut lvs, "v", 3).unwrap();
    assert_eq!(lvs.store().super_block().size, (1 << 20) - 65536);
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().free_clusters(), free);
}

#[test]
fn an_allocation_that_is_dropped_reserves_nothing_for_ever() {
    let mut lvs = new_store(Faulty::new(true), 40);
    let v = volume(&mut lvs, "v", 3).unwrap();
    let free = lvs.store().free_clusters();
    lvs.store().device().left.set(0);
    assert!(lvs.store_mut().allocate(v, &[0]).now_or_never().is_none());
    assert_eq!(now(lvs.store_mut().unload()), Err(Error::Failed));
    lvs.store().device().left.set(u32::MAX);
    let mut lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().free_clusters(), free);
    now(lvs.store_mut().unload()).unwrap();
}

/// Few pages cannot make a load use much memory, or free what cannot be listed.
#[test]
fn maps_have_no_more_clusters_than_the_store() {
    let lvs = new_store(Memory::dirty(16 << 20, 512), 10);
    let (first, end) = (lvs.store().super_block().metadata_clusters(), 4096);
    let start = lvs.store().super_block().metadata.start;
    let memory = lvs.into_store().into_device();
    let put = |page: u32, content: &Page| {
        let at = (start + page) as usize * PAGE;
        memory.bytes.borrow_mut()[at..at + PAGE].copy_from_slice(&content.encode());
    };
    let root = |page: u32, descriptors: Vec<Descriptor>| {
        put(page, &Page { id: BlobId::of_page(page), sequence: 0, descriptors, next: None });
    };
    let run = (u32::try_from(first).unwrap(), u32::try_from(end - first).unwrap());
    for page in 10..60 {
        root(page, vec![Descriptor::Flags(Flags::default()), Descriptor::Runs(vec![run])]);
    }
    // One extent page, many times.
    put(100, &extent_page(BlobId::of_page(101), 0, &[0; 512]));
    for page in 101..111 {
        let flags = Descriptor::Flags(Flags { invalid: 5, ..Flags::default() });
        root(page, vec![flags, Descriptor::Table { clusters: 512, entries: vec![(100, 1); 490] }]);
    }
    let lvs = now(Lvs::load(memory, true)).unwrap();
    let reasons = lvs.store().broken().iter().filter(|b| b.reason.contains("more clusters"));
    assert!(reasons.count() >= 48);
    assert_eq!(lvs.store().free_clusters(), 0);
    let found = findings(lvs.store().device());
    let texts = found.iter().filter(|text| text.contains("than there are"));
    assert!(texts.count() >= 48, "{found:?}");
}

/// Until it is complete, a snapshot has all clusters of its blob, which may be those of the store.
#[test]
fn an_unfinished_snapshot_of_a_full_store_is_readable() {
    let mut lvs = new_store(Faulty::new(false), 40);
    let free = lvs.store().free_clusters();
    let v = volume(&mut lvs, "v", free).unwrap();
    now(lvs.store_mut().inflate(v)).unwrap();
    lvs.store().device().left.set(1);
    assert!(now(lvs.snapshot(v, "s", Uuid::nil())).is_err());
    lvs.store().device().left.set(u32::MAX);
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!((lvs.store().broken(), lvs.store().interrupted().len()), (&[][..], 1));
    assert_eq!(lvs.store().blob(v).unwrap().allocated(), free);
}

#[test]
fn a_table_of_places_has_a_limit() {
    let mut lvs = new_store(Memory::dirty(1 << 20, 512), 40);
    let v = volume(&mut lvs, "v", 1 << 32).unwrap();
    assert!(matches!(lvs.store().places(v), Err(Error::Invalid(_))));
    assert_eq!(lvs.store().resolve(v, 1 << 31), Ok(Place::Zeroes));
}
