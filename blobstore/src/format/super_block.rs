//! The super block: page 0 of a store.

use super::bytes::{array, crc_is_good, seal, u32_at, u64_at};
use super::{BlobId, PAGE};
use crate::error::{Error, Result};

const SIGNATURE: &[u8; 8] = b"SPDKBLOB";
const NO_BLOB: u64 = u64::MAX;

/// Consecutive metadata pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// The first one, counted from the beginning of the device.
    pub start: u32,
    /// How many.
    pub len: u32,
}

impl Region {
    /// The page after the last one.
    pub fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.len)
    }
}

/// The fields of the super block, as they are on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperBlock {
    /// 1 to 3; new stores have 3.
    pub version: u32,
    /// Whether the masks are valid.
    pub clean: bool,
    /// The blob that identifies the store.
    pub super_blob: Option<BlobId>,
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// The mask of metadata pages in use.
    pub page_mask: Region,
    /// The mask of clusters in use.
    pub cluster_mask: Region,
    /// The metadata pages.
    pub metadata: Region,
    /// The type of the store, padded with NUL.
    pub store_type: [u8; 16],
    /// The mask of root pages. Empty in versions 1 and 2.
    pub blob_mask: Region,
    /// Bytes of the store; 0 means the whole device.
    pub size: u64,
    /// Bytes of the smallest I/O; 0 means 4096.
    pub io_unit_size: u32,
    /// Bytes of a metadata page; 0 means 4096.
    pub page_size: u32,
}

impl SuperBlock {
    /// Decodes the first [`PAGE`] bytes of a device, and checks them without knowledge of the
    /// device.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < PAGE {
            return Err(Error::NotAStore("the device is too small"));
        }
        if &bytes[..8] != SIGNATURE {
            return Err(Error::NotAStore("no signature"));
        }
        let version = u32_at(bytes, 8);
        if !(1..=3).contains(&version) {
            return Err(Error::NotAStore("unknown version"));
        }
        if !crc_is_good(bytes) {
            return Err(Error::NotAStore("wrong checksum of the super block"));
        }
        let region = |at| Region { start: u32_at(bytes, at), len: u32_at(bytes, at + 4) };
        let super_blob = u64_at(bytes, 20);
        Ok(Self {
            version,
            clean: u32_at(bytes, 16) == 1,
            super_blob: (super_blob != NO_BLOB).then_some(BlobId(super_blob)),
            cluster_size: u32_at(bytes, 28),
            page_mask: region(32),
            cluster_mask: region(40),
            metadata: region(48),
            store_type: array(bytes, 56),
            blob_mask: region(72),
            size: u64_at(bytes, 80),
            io_unit_size: u32_at(bytes, 88),
            page_size: u32_at(bytes, 92),
        })
    }

    /// The [`PAGE`] bytes of the super block.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        let word = |bytes: &mut Vec<u8>, n: u32| bytes.extend(n.to_le_bytes());
        word(&mut bytes, self.version);
        word(&mut bytes, 4096);
        word(&mut bytes, u32::from(self.clean));
        bytes.extend(self.super_blob.map_or(NO_BLOB, |id| id.0).to_le_bytes());
        word(&mut bytes, self.cluster_size);
        for region in [self.page_mask, self.cluster_mask, self.metadata] {
            word(&mut bytes, region.start);
            word(&mut bytes, region.len);
        }
        bytes.extend(self.store_type);
        word(&mut bytes, self.blob_mask.start);
        word(&mut bytes, self.blob_mask.len);
        bytes.extend(self.size.to_le_bytes());
        word(&mut bytes, self.io_unit_size);
        word(&mut bytes, self.page_size);
        bytes.resize(PAGE, 0);
        seal(&mut bytes);
        bytes
    }

    /// Bytes of a metadata page.
    pub fn page_size(&self) -> u32 {
        if self.page_size == 0 { 4096 } else { self.page_size }
    }

    /// Bytes of the smallest I/O.
    pub fn io_unit_size(&self) -> u32 {
        if self.io_unit_size == 0 { 4096 } else { self.io_unit_size }
    }

    /// Bytes of the store on a device of `device` bytes.
    pub fn size_on(&self, device: u64) -> u64 {
        if self.size == 0 { device } else { self.size }
    }

    /// The number of clusters on a device of `device` bytes, those of the metadata included.
    pub fn clusters_on(&self, device: u64) -> u64 {
        self.size_on(device).checked_div(u64::from(self.cluster_size)).unwrap_or(0)
    }

    /// The clusters at the beginning that hold metadata.
    pub fn metadata_clusters(&self) -> u64 {
        (self.metadata.end() * u64::from(self.page_size()))
            .div_ceil(u64::from(self.cluster_size.max(1)))
    }

    /// Whether the store has a mask of root pages. Otherwise, it is recovered at each load.
    pub fn has_blob_mask(&self) -> bool {
        self.version >= 3 && self.blob_mask.len > 0
    }

    /// The pages that the mask of clusters may grow to.
    pub fn cluster_mask_room(&self) -> u32 {
        let next = if self.has_blob_mask() { self.blob_mask.start } else { self.metadata.start };
        next.saturating_sub(self.cluster_mask.start)
    }

    /// The largest size in bytes that the store can grow to.
    pub fn max_growable_size(&self) -> u64 {
        let room = u64::from(self.cluster_mask_room()) * u64::from(self.page_size());
        (room.saturating_sub(5) * 8).saturating_mul(u64::from(self.cluster_size))
    }

    /// Checks the regions against one another and against the size of the device.
    pub fn check(&self, device: u64, block_size: u32) -> Result<()> {
        let page = self.page_size();
        let wrong = |text| Err(Error::NotAStore(text));
        if !page.is_power_of_two() || !(4096..=65536).contains(&page) || page < block_size {
            return wrong("invalid size of metadata pages");
        }
        if self.cluster_size < page
            || !self.cluster_size.is_multiple_of(4096)
            || !self.cluster_size.is_multiple_of(block_size.max(1))
        {
            return wrong("invalid cluster size");
        }
        if !self.io_unit_size().is_power_of_two() {
            return wrong("invalid size of I/O units");
        }
        if device < self.size_on(device) {
            return wrong("the device is smaller than the store");
        }
        let mut end = 1;
        let masks = [self.page_mask, self.cluster_mask];
        let blob_mask = self.has_blob_mask().then_some(self.blob_mask);
        for region in masks.into_iter().chain(blob_mask).chain([self.metadata]) {
            if u64::from(region.start) < end || region.len == 0 {
                return wrong("the regions of the metadata overlap");
            }
            end = region.end();
        }
        let clusters = self.clusters_on(device);
        if u32::try_from(clusters).is_err() || self.metadata_clusters() > clusters {
            return wrong("the metadata is larger than the store");
        }
        let holds = |region: Region, bits: u64| {
            u64::from(region.len) * u64::from(page) >= bits.div_ceil(8) + 5
        };
        let pages = u64::from(self.metadata.len);
        if !holds(self.page_mask, pages)
            || blob_mask.is_some_and(|mask| !holds(mask, pages))
            || !holds(self.cluster_mask, clusters)
        {
            return wrong("a mask is too small");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> SuperBlock {
        SuperBlock {
            version: 3,
            clean: true,
            super_blob: Some(BlobId(1 << 32)),
            cluster_size: 1 << 20,
            page_mask: Region { start: 1, len: 1 },
            cluster_mask: Region { start: 2, len: 1 },
            metadata: Region { start: 4, len: 64 },
            store_type: *b"LVOLSTORE\0\0\0\0\0\0\0",
            blob_mask: Region { start: 3, len: 1 },
            size: 64 << 20,
            io_unit_size: 512,
            page_size: 4096,
        }
    }

    #[test]
    fn fields_survive_and_the_figures_of_the_reference_come_out() {
        let store = example();
        let bytes = store.encode();
        assert_eq!(SuperBlock::decode(&bytes), Ok(store.clone()));
        assert_eq!(store.check(64 << 20, 512), Ok(()));
        assert_eq!(store.metadata_clusters(), 1);
        assert_eq!(store.max_growable_size(), 34_317_795_328);
    }

    #[test]
    fn each_changed_byte_is_noticed() {
        let bytes = example().encode();
        for at in 0..PAGE {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(SuperBlock::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let wrong: [fn(&mut SuperBlock); 8] = [
            |s| s.page_size = 2048,
            |s| s.cluster_size = 0,
            |s| s.cluster_size = 5000,
            |s| s.cluster_mask.start = 1,
            |s| s.metadata.len = u32::MAX,
            |s| s.size = 128 << 20,
            |s| s.page_mask.len = 0,
            |s| s.io_unit_size = 3,
        ];
        for change in wrong {
            let mut store = example();
            change(&mut store);
            assert!(store.check(64 << 20, 512).is_err(), "{store:?}");
        }
    }
}
