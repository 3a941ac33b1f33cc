//! Damaged and forged metadata: bytes, numbers and whole pages are changed at random, with right
//! checksums. Loading and checking never panic, loading without write access never writes, and a
//! store that is refused is not written.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use blobstore::check::check;
use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::{BlobId, Device, DeviceError, Properties};
use uuid::Uuid;

use crate::medium::{image, now};

const PAGE: usize = 4096;

/// A disk whose changed pages are kept apart, so that it is cheap to begin again.
struct Overlay {
    base: Rc<Vec<u8>>,
    size: usize,
    pages: RefCell<BTreeMap<usize, Vec<u8>>>,
    writes: Cell<u64>,
}

impl Overlay {
    fn page(&self, page: usize) -> Vec<u8> {
        let base = || self.base[page * PAGE..(page + 1) * PAGE].to_vec();
        self.pages.borrow().get(&page).cloned().unwrap_or_else(base)
    }
}

impl Device for Overlay {
    fn properties(&self) -> Properties {
        let size = self.size as u64;
        Properties { size, block_size: 512, unmap: true, unmap_zeroes: true }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let start = usize::try_from(offset).unwrap();
        let end = start.checked_add(len).filter(|end| *end <= self.size);
        let end = end.ok_or(DeviceError { errno: 5 })?;
        let mut bytes = self.base[start..end].to_vec();
        for (page, content) in self.pages.borrow().range(start / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(start), ((page + 1) * PAGE).min(end));
            bytes[from - start..to - start].copy_from_slice(&content[from % PAGE..][..to - from]);
        }
        Ok(bytes)
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        self.writes.set(self.writes.get() + 1);
        let start = usize::try_from(offset).unwrap();
        let inside = start.checked_add(data.len()).is_some_and(|end| end <= self.size);
        assert!(inside, "a write beyond the end");
        let (mut at, mut pages) = (0, self.pages.borrow_mut());
        while at < data.len() {
            let (page, from) = ((start + at) / PAGE, (start + at) % PAGE);
            let len = (PAGE - from).min(data.len() - at);
            let base = || self.base[page * PAGE..][..PAGE].to_vec();
            let content = pages.entry(page).or_insert_with(base);
            content[from..from + len].copy_from_slice(&data[at..at + len]);
            at += len;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.write(offset, vec![0; usize::try_from(len).unwrap()]).await
    }

    async fn unmap(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        self.writes.set(self.writes.get() + 1);
        Ok(())
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// Forges one page of those that are not zeroes.
fn forge(disk: &Overlay, used: &[usize], random: &mut Random) {
    let page = used[random.below(used.len())];
    let mut bytes = disk.page(page);
    let fresh = [0, 1, 2, 7, 511, 512, 513, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff_u32];
    for _ in 0..1 + random.below(3) {
        // Mostly where there is something.
        let mut at = random.below(PAGE - 4);
        for _ in 0..20 {
            if bytes[at] != 0 {
                break;
            }
            let end = [200, PAGE - 4][random.below(2)];
            at = random.below(end);
        }
        match random.below(5) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
            2 => {
                let number = fresh[random.below(fresh.len())];
                let at = at.min(PAGE - 8);
                bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            3 => {
                let from = disk.page(used[random.below(used.len())]);
                let len = random.below(64).min(PAGE - 4 - at);
                bytes[at..at + len].copy_from_slice(&from[at..at + len]);
            }
            _ => {
                // A chain to some page.
                let next = u32::try_from(random.below(40)).unwrap();
                bytes[4088..4092].copy_from_slice(&next.to_le_bytes());
            }
        }
    }
    if random.below(8) > 0 {
        let crc = crc32c::crc32c(&bytes[..PAGE - 4]);
        bytes[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    disk.pages.borrow_mut().insert(page, bytes);
}

/// Uses a store that loads.
fn touch(lvs: &mut Lvs<Overlay>) {
    let ids: Vec<BlobId> = lvs.volumes().map(|volume| volume.blob.id()).collect();
    for id in ids {
        let len = lvs.store().blob(id).unwrap().clusters();
        for index in [0, len / 2, len.saturating_sub(1), u64::MAX] {
            lvs.store().resolve(id, index).unwrap();
        }
        drop(now(lvs.store_mut().allocate(id, &[len / 2])));
        drop(now(lvs.store_mut().resize(id, len.min(3))));
        drop(now(lvs.delete(id)));
    }
    let new = NewVolume {
        name: "new",
        uuid: Uuid::nil(),
        clusters: 3,
        thin: false,
        clear: Clear::Default,
    };
    drop(now(lvs.create_volume(new)));
    drop(now(lvs.store_mut().unload()));
}

#[test]
fn forged_metadata_never_panics_and_is_never_written_when_refused() {
    let (mut loaded, mut refused, mut broken) = (0, 0, 0);
    for name in ["lvs-tree", "lvs-rle", "lvs-snaprm-kept", "lvs-snaptmp-of-clone", "lvs-esnap"] {
        let base = Rc::new(image(&format!("{name}.img.zst")));
        let used: Vec<usize> = (0..base.len().min(1024 * PAGE) / PAGE)
            .filter(|page| base[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0))
            .filter(|page| *page < 260)
            .collect();
        for seed in 0..400 {
            let mut random = Random(seed);
            let disk = || Overlay {
                base: base.clone(),
                size: base.len(),
                pages: RefCell::default(),
                writes: Cell::new(0),
            };
            let forged = disk();
            for _ in 0..1 + random.below(3) {
                forge(&forged, &used, &mut random);
            }
            let pages = forged.pages.borrow().clone();
            let again = || Overlay { pages: RefCell::new(pages.clone()), ..disk() };
            now(check(&forged)).unwrap();
            if let Ok(lvs) = now(Lvs::load(forged, true)) {
                assert_eq!(lvs.store().device().writes.get(), 0);
            }
            match now(Lvs::load(again(), false)) {
                Ok(mut lvs) => {
                    loaded += 1;
                    broken += lvs.store().broken().len();
                    touch(&mut lvs);
                }
                Err(_) => refused += 1,
            }
        }
    }
    println!("{loaded} loaded with {broken} unreadable blobs, {refused} refused");
    assert!(loaded > 100 && refused > 50 && broken > 100);
}

#[test]
fn truncated_stores_are_refused_or_have_unreadable_blobs() {
    let base = Rc::new(image("lvs-tree.img.zst"));
    for size in [0, 512, 4096, 8192, 1 << 20, (64 << 20) - 4096] {
        let disk =
            Overlay { base: base.clone(), size, pages: RefCell::default(), writes: Cell::new(0) };
        assert!(!now(check(&disk)).unwrap().is_empty(), "{size}");
        assert!(now(Lvs::load(disk, false)).is_err(), "{size}");
    }
}
