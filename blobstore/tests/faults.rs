//! Stores with damaged blobs, on devices that fail, and without free metadata pages: nothing that
//! can be read is lost, and nothing that was acknowledged.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod medium;

use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::{Interrupted, StoreOptions};
use blobstore::{BlobId, Device, Error, Result};
use medium::{Memory, cluster, image, now};
use uuid::Uuid;

const PAGE: usize = 4096;

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
