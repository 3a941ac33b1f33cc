//! Making, growing and unloading stores.

use super::{Blob, LoadOptions, Store};
use crate::bits::Bits;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, Clear, MaskKind, PAGE, Region, SuperBlock, encode_mask, mask_bytes};

/// A store to be created.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Bytes of a cluster: a multiple of 4096 and of the block size.
    pub cluster_size: u32,
    /// Bytes of a metadata page: a power of two from 4096 to 65536.
    pub page_size: u32,
    /// Metadata pages for each hundred clusters; 0 means 100.
    pub pages_per_hundred_clusters: u32,
    /// What happens to the old content of the device.
    pub clear: Clear,
    /// The type of the store, padded with NUL.
    pub store_type: [u8; 16],
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            cluster_size: 4 << 20,
            page_size: 4096,
            pages_per_hundred_clusters: 100,
            clear: Clear::Default,
            store_type: [0; 16],
        }
    }
}

impl StoreOptions {
    /// The super block of a new store on a device.
    fn super_block(&self, size: u64, block_size: u32) -> Result<SuperBlock> {
        let page = self.page_size.max(block_size);
        if !(4096..=65536).contains(&page) || !page.is_power_of_two() {
            return Err(Error::Invalid("the size of metadata pages"));
        }
        let fits = self.cluster_size >= page
            && self.cluster_size.is_multiple_of(4096)
            && self.cluster_size.is_multiple_of(block_size);
        if !fits {
            return Err(Error::Invalid("the cluster size"));
        }
        let clusters = size / u64::from(self.cluster_size);
        if clusters == 0 {
            return Err(Error::Invalid("the device is smaller than a cluster"));
        }
        let ratio = match self.pages_per_hundred_clusters {
            0 => Self::default().pages_per_hundred_clusters,
            ratio => ratio,
        };
        let pages = u128::from(clusters) * u128::from(ratio) / 100;
        let too_large = |_| Error::NoSpace("the device is too large for the cluster size");
        let pages = u32::try_from(pages.max(1)).map_err(too_large)?;
        let clusters = u32::try_from(clusters).map_err(too_large)?;
        let mask = |bits: u32| (bits.div_ceil(8) + 5).div_ceil(page);
        let page_mask = Region { start: 1, len: mask(pages) };
        let room = mask(clusters.max(pages));
        let cluster_mask = Region { start: 1 + page_mask.len, len: mask(clusters) };
        let blob_mask = Region { start: cluster_mask.start + room, len: mask(pages) };
        let metadata = Region { start: blob_mask.start + blob_mask.len, len: pages };
        let store = SuperBlock {
            version: 3,
            clean: false,
            super_blob: None,
            cluster_size: self.cluster_size,
            page_mask,
            cluster_mask,
            metadata,
            store_type: self.store_type,
            blob_mask,
            size,
            io_unit_size: block_size,
            page_size: page,
        };
        store.check(size, block_size).map_err(|_| Error::NoSpace("the metadata does not fit"))?;
        Ok(store)
    }
}

impl<D: Device> Store<D> {
    /// Makes a store on a device, whose content is lost. Until this ends, the device has no store.
    pub async fn create(device: D, options: StoreOptions) -> Result<Self> {
        let properties = device.properties();
        let super_block = options.super_block(properties.size, properties.block_size.max(1))?;
        let first = super_block.metadata_clusters() * u64::from(super_block.cluster_size);
        let end = super_block.clusters_on(properties.size) * u64::from(super_block.cluster_size);
        let mut store = Self::with(device, super_block, false)?;
        // The old super block goes before what it refers to.
        store.device.write(0, store.whole_blocks(vec![0; PAGE])).await?;
        store.barrier().await?;
        store.device.write_zeroes(0, first).await?;
        let zeroed = match options.clear {
            _ if end == first => false,
            Clear::Default | Clear::Unmap if properties.unmap => {
                store.device.unmap(first, end - first).await?;
                properties.unmap_zeroes
            }
            Clear::WriteZeroes => {
                store.device.write_zeroes(first, end - first).await?;
                true
            }
            Clear::Default | Clear::Unmap | Clear::None => false,
        };
        if zeroed {
            (0..store.zeroed.len()).for_each(|cluster| {
                store.zeroed.set(cluster);
            });
        }
        store.barrier().await?;
        store.write_super_block().await?;
        Ok(store)
    }

    /// Names the blob that identifies the store.
    pub async fn set_super_blob(&mut self, id: BlobId) -> Result<()> {
        self.blob(id)?;
        self.begin().await?;
        self.super_block.super_blob = Some(id);
        self.write_super_block().await?;
        self.end();
        Ok(())
    }

    /// Writes the masks and marks the store as clean. Without effect if nothing has changed since a
    /// clean load.
    pub async fn unload(&mut self) -> Result<()> {
        if self.read_only || self.super_block.clean {
            return if self.changing { Err(Error::Failed) } else { Ok(()) };
        }
        self.ready()?;
        if self.claimed > 0 {
            return Err(Error::Busy);
        }
        self.begin().await?;
        self.check_super_block().await?;
        let store = self.super_block.clone();
        let pages = store.metadata.len;
        self.write_mask(store.page_mask, MaskKind::Pages, pages, self.pages.to_bytes()).await?;
        if store.has_blob_mask() {
            let mut roots = Bits::new(pages as usize);
            let broken = self.broken.iter().map(|broken| broken.id);
            for id in self.blobs.values().map(Blob::id).chain(broken) {
                id.page().into_iter().for_each(|page| {
                    roots.set(page as usize);
                });
            }
            self.write_mask(store.blob_mask, MaskKind::Blobs, pages, roots.to_bytes()).await?;
        }
        let clusters = u32::try_from(self.clusters.len()).map_err(|_| Error::Failed)?;
        let bits = self.clusters.to_bytes();
        self.write_mask(store.cluster_mask, MaskKind::Clusters, clusters, bits).await?;
        self.barrier().await?;
        self.super_block.clean = true;
        self.write_super_block().await?;
        self.end();
        Ok(())
    }

    /// Fails if the super block on the device is not that of this store any more.
    async fn check_super_block(&self) -> Result<()> {
        let len = self.whole_blocks(vec![0; PAGE]).len();
        let found = SuperBlock::decode(&self.device.read(0, len).await?)?;
        if found == self.super_block {
            return Ok(());
        }
        Err(Error::NotAStore("the super block has been changed by someone else"))
    }

    async fn write_mask(
        &self,
        region: Region,
        kind: MaskKind,
        len: u32,
        bits: Vec<u8>,
    ) -> Result<()> {
        let page = self.super_block.page_size() as usize;
        let bytes = encode_mask(kind, len, &bits, mask_bytes(len as usize, page));
        Ok(self.device.write(u64::from(region.start) * page as u64, bytes).await?)
    }

    /// Makes use of a device that has grown. Without effect if it has not.
    pub async fn grow(&mut self) -> Result<()> {
        self.ready()?;
        let device = self.device.properties().size;
        let mut grown = self.super_block.clone();
        grown.size = device;
        let clusters = grown.clusters_on(device);
        if clusters <= self.clusters.len() as u64 {
            return Ok(());
        }
        if device > grown.max_growable_size() {
            return Err(Error::NoSpace("the mask of clusters"));
        }
        let mask = (clusters.div_ceil(8) + 5).div_ceil(u64::from(grown.page_size()));
        let no_space = |_| Error::NoSpace("the mask of clusters");
        grown.cluster_mask.len = u32::try_from(mask).map_err(no_space)?;
        let clusters = u32::try_from(clusters).map_err(no_space)? as usize;
        self.begin().await?;
        grown.clean = false;
        self.size = device;
        self.super_block = grown;
        self.write_super_block().await?;
        self.clusters.grow(clusters);
        self.zeroed.grow(clusters);
        self.end();
        Ok(())
    }

    /// Deletes the store: the device has none afterwards.
    pub async fn destroy(mut self) -> Result<D> {
        self.begin().await?;
        self.device.write(0, self.whole_blocks(vec![0; PAGE])).await?;
        self.barrier().await?;
        Ok(self.device)
    }

    /// Reads the store from the device again.
    pub async fn reload(self) -> Result<Self> {
        let store_type = Some(self.super_block.store_type);
        let options = LoadOptions { store_type, read_only: self.read_only };
        Self::load(self.device, options).await
    }
}
