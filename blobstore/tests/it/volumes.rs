//! What operations on volumes answer, and the defects of SPDK's that they do not have.

use blobstore::format::{Clear, Xattr};
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::{NewBlob, StoreOptions, Wanted};
use blobstore::{BlobId, Device, DeviceError, Error, Parent, Place, Properties, Store};
use uuid::Uuid;

use crate::medium::{Memory, cluster, findings, now, write};

const CLUSTER: usize = 4096;

fn options() -> StoreOptions {
    StoreOptions { cluster_size: 4096, pages_per_hundred_clusters: 40, ..StoreOptions::default() }
}

fn new_store<D: Device>(device: D) -> Lvs<D> {
    now(Lvs::create(device, "store", Uuid::from_u128(7), options())).unwrap()
}

fn store() -> Lvs<Memory> {
    new_store(Memory::dirty(1 << 20, 512))
}

fn create<D: Device>(lvs: &mut Lvs<D>, name: &str, clusters: u64) -> Result<BlobId, Error> {
    let uuid = Uuid::from_u128(clusters.into());
    now(lvs.create_volume(NewVolume { name, uuid, clusters, thin: true, clear: Clear::Default }))
}

fn snapshot<D: Device>(lvs: &mut Lvs<D>, id: BlobId, name: &str) -> Result<BlobId, Error> {
    now(lvs.snapshot(id, name, Uuid::nil()))
}

fn byte<D: Device>(lvs: &Lvs<D>, id: BlobId, index: u64) -> u8 {
    let bytes = cluster(lvs.store(), id, index);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[test]
fn names_are_checked_at_each_place() {
    let mut lvs = store();
    let long = "x".repeat(64);
    for bad in ["", &long, "a\0b"] {
        assert!(matches!(create(&mut lvs, bad, 1), Err(Error::Invalid(_))), "{bad}");
    }
    let one = create(&mut lvs, "one/two", 1).unwrap();
    assert_eq!(create(&mut lvs, "one/two", 1), Err(Error::Exists));
    create(&mut lvs, &long[..63], 2).unwrap();
    for (bad, error) in [("one/two", Error::Exists), (&long[..63], Error::Exists)] {
        assert_eq!(now(lvs.rename(one, bad)), Err(error));
    }
    assert!(matches!(now(lvs.rename(one, &long)), Err(Error::Invalid(_))));
    assert!(matches!(now(lvs.rename(one, "")), Err(Error::Invalid(_))));
    // A rename that is refused leaves the old name.
    let s = snapshot(&mut lvs, one, "s").unwrap();
    assert!(matches!(now(lvs.rename(s, "t")), Err(Error::NotPermitted(_))));
    assert!(lvs.find("s").is_some() && lvs.find("t").is_none());
    // The number of clusters does not wrap.
    assert!(matches!(create(&mut lvs, "huge", 1 << 44), Err(Error::Invalid(_))));
    now(lvs.rename_store("other")).unwrap();
    let lvs = now(lvs.reload()).unwrap();
    assert_eq!((lvs.name(), lvs.volumes().count()), ("other", 3));
    assert_eq!(lvs.find(&Uuid::from_u128(1).to_string()).unwrap().name, Some("one/two"));
}

#[test]
fn a_blob_without_a_name_is_kept() {
    let mut lvs = store();
    create(&mut lvs, "named", 1).unwrap();
    let xattrs = vec![Xattr { name: b"name".to_vec(), value: vec![b'x'; 100] }];
    now(lvs.store_mut().create_blob(NewBlob { xattrs, clusters: 2, ..NewBlob::default() }))
        .unwrap();
    let lvs = now(lvs.reload()).unwrap();
    let names: Vec<Option<&str>> = lvs.volumes().map(|volume| volume.name).collect();
    assert_eq!(names, [Some("named"), None]);
}

/// SPDK writes an allocation that a snapshot overtakes into the root of the store.
#[test]
fn a_claim_does_not_outlive_a_snapshot() {
    let mut lvs = store();
    let id = create(&mut lvs, "v", 4).unwrap();
    let wanted = [Wanted { index: 0, whole: false }];
    let claim = lvs.store_mut().claim(id, &wanted).unwrap();
    now(lvs.store().fill(&claim)).unwrap();
    write(lvs.store_mut(), id, 0, 0, vec![5; CLUSTER]);
    let late = lvs.store_mut().claim(id, &[Wanted { index: 1, whole: true }]).unwrap();
    assert_eq!(now(lvs.store_mut().unload()), Err(Error::Busy));
    snapshot(&mut lvs, id, "s").unwrap();
    let free = lvs.store().free_clusters();
    assert_eq!(now(lvs.store_mut().commit(claim)), Err(Error::Stale));
    assert_eq!(now(lvs.store_mut().commit(late)), Err(Error::Stale));
    assert_eq!(lvs.store().free_clusters(), free + 2);
    assert_eq!(byte(&lvs, id, 0), 5);
    now(lvs.store_mut().unload()).unwrap();
    assert_eq!(findings(lvs.store().device()), [""; 0]);
}

#[test]
fn what_a_shorter_snapshot_hides_stays_hidden() {
    for decouple in [false, true] {
        let mut lvs = store();
        let id = create(&mut lvs, "v", 6).unwrap();
        (0..6).for_each(|i| write(lvs.store_mut(), id, i, 0, vec![9; CLUSTER]));
        snapshot(&mut lvs, id, "long").unwrap();
        now(lvs.store_mut().resize(id, 2)).unwrap();
        let short = snapshot(&mut lvs, id, "short").unwrap();
        now(lvs.store_mut().resize(id, 6)).unwrap();
        let before: Vec<u8> = (0..6).map(|i| byte(&lvs, id, i)).collect();
        assert_eq!(before, [9, 9, 0, 0, 0, 0]);
        match decouple {
            true => now(lvs.store_mut().decouple(id)).unwrap(),
            false => now(lvs.delete(short)).unwrap(),
        }
        let after: Vec<u8> = (0..6).map(|i| byte(&lvs, id, i)).collect();
        assert_eq!(after, before);
        assert_eq!(lvs.store().blob(id).unwrap().allocated(), 4);
    }
}

#[test]
fn relations_are_answered_as_spdk_answers() {
    let mut lvs = store();
    let v = create(&mut lvs, "v", 4).unwrap();
    let s = snapshot(&mut lvs, v, "s").unwrap();
    let store = lvs.store_mut();
    assert!(matches!(now(store.snapshot(s, vec![])), Err(Error::Invalid(_))));
    assert!(matches!(now(store.clone_blob(v, vec![])), Err(Error::Invalid(_))));
    assert!(matches!(now(store.resize(s, 1)), Err(Error::NotPermitted(_))));
    assert!(matches!(now(store.set_parent(s, v)), Err(Error::Invalid(_))));
    assert_eq!(now(store.set_parent(v, s)), Err(Error::Exists));
    let c = now(store.clone_blob(s, vec![])).unwrap();
    assert_eq!(
        now(store.delete(s)),
        Err(Error::NotPermitted("the snapshot has more than one clone"))
    );
    now(store.inflate(v)).unwrap();
    assert_eq!(
        (store.blob(v).unwrap().parent(), store.free_clusters()),
        (Parent::None, store.data_clusters() - 4)
    );
    assert!(matches!(now(store.decouple(v)), Err(Error::Invalid(_))));
    now(store.inflate(v)).unwrap();
    assert!(matches!(now(store.set_parent(v, s)), Err(Error::Invalid(_))), "it is thick");
    let external = b"external".to_vec();
    now(store.set_external_parent(c, external.clone())).unwrap();
    assert_eq!(now(store.set_external_parent(c, external.clone())), Err(Error::Exists));
    assert_eq!(store.resolve(c, 0), Ok(Place::External));
    // Without the external device, nothing changes.
    let free = store.free_clusters();
    assert_eq!(now(store.allocate(c, &[0])), Err(Error::Device(DeviceError { errno: 19 })));
    assert!(!store.failed() && store.free_clusters() == free);
    let space = store.free_clusters() + 1;
    assert_eq!(now(store.resize(v, 4 + space)), Err(Error::NoSpace("clusters")));
    now(store.delete(s)).unwrap();
    assert_eq!(now(store.delete(s)), Err(Error::NotFound));
}

#[test]
fn an_external_snapshot_is_read_and_inherited_and_copied() {
    let mut memory = Memory::dirty(1 << 20, 512);
    let id = Uuid::from_u128(5);
    memory.external.insert(format!("{id}\0").into_bytes(), vec![3; 2 * CLUSTER]);
    let mut lvs = new_store(memory);
    let clone = now(lvs.clone_external(id, 4, "e", Uuid::nil())).unwrap();
    // It ends after two clusters.
    let read = |lvs: &Lvs<Memory>, id| (0..4).map(|i| byte(lvs, id, i)).collect::<Vec<u8>>();
    assert_eq!(read(&lvs, clone), [3, 3, 0, 0]);
    let s = snapshot(&mut lvs, clone, "s").unwrap();
    write(lvs.store_mut(), clone, 3, 0, vec![4; CLUSTER]);
    assert_eq!((read(&lvs, clone), read(&lvs, s)), (vec![3, 3, 0, 4], vec![3, 3, 0, 0]));
    let mut lvs = now(lvs.reload()).unwrap();
    now(lvs.store_mut().inflate(clone)).unwrap();
    now(lvs.delete(s)).unwrap();
    assert_eq!(read(&lvs, clone), [3, 3, 0, 4]);
    assert_eq!(lvs.store().external(clone), Ok(None));
}

#[test]
fn a_store_grows_with_its_device() {
    let mut lvs = store();
    let v = create(&mut lvs, "v", 4).unwrap();
    let free = lvs.store().free_clusters();
    now(lvs.store_mut().grow()).unwrap();
    assert_eq!(lvs.store().free_clusters(), free);
    let memory = lvs.into_store().into_device();
    memory.bytes.borrow_mut().resize(2 << 20, 0xdb);
    let properties = Properties { size: 2 << 20, ..memory.properties };
    let mut lvs = now(Lvs::load(Memory { properties, ..memory }, false)).unwrap();
    assert_eq!(lvs.store().free_clusters(), free, "growing is an operation");
    now(lvs.store_mut().grow()).unwrap();
    assert_eq!(lvs.store().free_clusters(), free + 256);
    now(lvs.store_mut().resize(v, free + 256)).unwrap();
    now(lvs.store_mut().inflate(v)).unwrap();
    let mut lvs = now(lvs.reload()).unwrap();
    assert_eq!(lvs.store().free_clusters(), 0);
    now(lvs.store_mut().unload()).unwrap();
    assert_eq!(findings(lvs.store().device()), [""; 0]);
}

/// A device whose writes fail after some.
struct Failing(Memory, std::cell::Cell<u32>);

impl Device for Failing {
    fn properties(&self) -> Properties {
        self.0.properties
    }
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        self.0.read(offset, len).await
    }
    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        if self.1.get() == 0 {
            return Err(DeviceError { errno: 5 });
        }
        self.1.set(self.1.get() - 1);
        self.0.write(offset, data).await
    }
    async fn flush(&self) -> Result<(), DeviceError> {
        self.0.flush().await
    }
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.0.write_zeroes(offset, len).await
    }
    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.0.unmap(offset, len).await
    }
}

#[test]
fn a_store_whose_device_fails_is_not_changed_until_it_is_loaded_again() {
    for writes in 0..3 {
        let mut lvs = new_store(Failing(Memory::dirty(1 << 20, 512), u32::MAX.into()));
        let v = create(&mut lvs, "v", 4).unwrap();
        write(lvs.store_mut(), v, 0, 0, vec![6; CLUSTER]);
        lvs.store().device().1.set(writes);
        let failed = Err(Error::Device(DeviceError { errno: 5 }));
        assert_eq!(snapshot(&mut lvs, v, "s").map(|_| ()), failed);
        assert!(lvs.store().failed());
        lvs.store().device().1.set(u32::MAX);
        assert_eq!(create(&mut lvs, "w", 1), Err(Error::Failed));
        assert_eq!(lvs.store_mut().claim(v, &[]).unwrap_err(), Error::Failed);
        assert_eq!(now(lvs.store_mut().unload()), Err(Error::Failed));
        let mut lvs = now(lvs.reload()).unwrap();
        assert_eq!((byte(&lvs, v, 0), lvs.find("s").is_some()), (6, writes == 2));
        create(&mut lvs, "w", 1).unwrap();
    }
}

#[test]
fn a_store_can_be_destroyed() {
    let lvs = store();
    let device = now(lvs.into_store().destroy()).unwrap();
    assert!(matches!(now(Store::load(device, Default::default())), Err(Error::NotAStore(_))));
}

#[test]
fn errors_have_the_numbers_that_spdk_reports() {
    let numbers = [
        Error::NotAStore("").errno(),
        Error::OtherType.errno(),
        Error::Exists.errno(),
        Error::Invalid("").errno(),
        Error::NoSpace("").errno(),
        Error::NotPermitted("").errno(),
        Error::Busy.errno(),
    ];
    assert_eq!(numbers, [84, 6, 17, 22, 28, 1, 16]);
}
