//! Writing pages and blobs, in an order that survives a power cut at each point.

use futures_util::future::join_all;

use super::Store;
use crate::device::Device;
use crate::error::{DeviceError, Error, Result};
use crate::format::{BlobId, Clear, PAGE, Page, extent_page};

/// Requests that are issued together.
const TOGETHER: usize = 64;

impl<D: Device> Store<D> {
    /// Everything written so far is durable before what is written from now on.
    pub(super) async fn barrier(&self) -> Result<()> {
        Ok(self.device.flush().await?)
    }

    pub(super) async fn write_super_block(&self) -> Result<()> {
        self.device.write(0, self.whole_blocks(self.super_block.encode())).await?;
        self.barrier().await
    }

    /// Fills `bytes` up to a multiple of the block size.
    pub(super) fn whole_blocks(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let block = self.device.properties().block_size.max(1) as usize;
        bytes.resize(bytes.len().next_multiple_of(block), 0);
        bytes
    }

    /// The offset of a metadata page in bytes.
    pub(super) fn page_offset(&self, page: u32) -> u64 {
        let start = u64::from(self.super_block.metadata.start);
        (start + u64::from(page)) * u64::from(self.super_block.page_size())
    }

    pub(super) async fn write_pages(&self, pages: Vec<(u32, Vec<u8>)>) -> Result<()> {
        let mut pages = pages.into_iter();
        loop {
            let writes: Vec<_> = (pages.by_ref().take(TOGETHER))
                .map(|(page, bytes)| {
                    self.device.write(self.page_offset(page), self.whole_blocks(bytes))
                })
                .collect();
            if writes.is_empty() {
                return Ok(());
            }
            all(join_all(writes).await)?;
        }
    }

    /// Zeroes pages that nothing refers to any more, and frees them.
    pub(super) async fn free_pages(&mut self, pages: &[u32]) -> Result<()> {
        let zeroes = |page: &u32| (*page, vec![0; PAGE]);
        self.write_pages(pages.iter().map(zeroes).collect()).await?;
        pages.iter().for_each(|page| self.pages.clear(*page as usize));
        Ok(())
    }

    pub(super) fn take_page(&mut self, from: usize) -> Result<u32> {
        let page = self.pages.take_lowest(from).ok_or(Error::NoSpace("metadata pages"))?;
        Ok(u32::try_from(page).expect("the region has a length of 32 bits"))
    }

    /// Whether `extra` extent pages and a new chain of a blob, with up to `bytes` more of
    /// attributes or runs, find room.
    pub(super) fn has_room(&self, id: BlobId, extra: usize, bytes: usize) -> Result<()> {
        // The root is written in place.
        let chain = self.blob(id)?.description().pages().len() - 1;
        // Each extent page takes up to two entries of 8 bytes.
        let grown = (extra * 16 + bytes).div_ceil(Page::ROOM / 2);
        self.has_pages(extra + chain + grown)
    }

    /// Whether this many metadata pages are free.
    pub(super) fn has_pages(&self, count: usize) -> Result<()> {
        if self.pages.zeroes() < count {
            return Err(Error::NoSpace("metadata pages"));
        }
        Ok(())
    }

    /// The groups of these that have no extent page although they need one.
    pub(super) fn missing_pages(&self, id: BlobId, groups: &[u32]) -> usize {
        let Some(blob) = self.blobs.get(&id).filter(|blob| blob.flags.table()) else { return 0 };
        let has = |group: &u32| blob.map.groups.get(group).is_some_and(|g| g.page.is_some());
        groups.iter().filter(|group| !has(group)).count()
    }

    /// Writes extent pages of a blob, those that do not exist to new pages. Whether there were
    /// such, so that the root must be written. Without a barrier.
    pub(super) async fn write_extents(&mut self, id: BlobId, groups: &[u32]) -> Result<bool> {
        if !self.blob(id)?.flags.table() {
            return Ok(!groups.is_empty());
        }
        let (mut writes, mut new) = (Vec::new(), false);
        for group in groups {
            let content = self.blob(id)?.map.groups.get(group);
            let Some(page) = content.map(|content| content.page) else { continue };
            let page = match page {
                Some(page) => page,
                None => self.take_page(1)?,
            };
            let content = self.blob_mut(id)?.map.groups.get_mut(group).expect("found above");
            new |= content.page.replace(page).is_none();
            writes.push((page, extent_page(id, *group, &content.entries).encode()));
        }
        self.write_pages(writes).await?;
        Ok(new)
    }

    /// Writes the root of a blob, which commits its chain with it. What the root refers to must be
    /// durable.
    pub(super) async fn write_root(&mut self, id: BlobId) -> Result<()> {
        let root = id.page().ok_or(Error::NotFound)?;
        let mut pages = self.blob(id)?.description().pages();
        let mut chain = Vec::new();
        for at in 1..pages.len() {
            let page = self.take_page(0)?;
            pages[at - 1].next = Some(page);
            chain.push(page);
        }
        if !chain.is_empty() {
            let pages = chain.iter().zip(&pages[1..]).map(|(at, page)| (*at, page.encode()));
            self.write_pages(pages.collect()).await?;
            self.barrier().await?;
        }
        self.write_pages(vec![(root, pages[0].encode())]).await?;
        self.barrier().await?;
        let old = std::mem::replace(&mut self.blob_mut(id)?.chain, chain);
        self.free_pages(&old).await
    }

    /// Writes extent pages, then the root.
    pub(super) async fn persist(&mut self, id: BlobId, groups: &[u32]) -> Result<()> {
        if !groups.is_empty() {
            self.write_extents(id, groups).await?;
            self.barrier().await?;
        }
        self.write_root(id).await
    }

    /// Clears clusters that nothing durable refers to, as `clear` says, and frees them.
    pub(super) async fn free_clusters_of(
        &mut self,
        mut clusters: Vec<u32>,
        clear: Clear,
    ) -> Result<()> {
        let properties = self.device.properties();
        let (unmap, zero) = match clear {
            Clear::None => (false, false),
            Clear::WriteZeroes => (false, true),
            Clear::Default | Clear::Unmap => (properties.unmap, false),
        };
        clusters.sort_unstable();
        if unmap || zero {
            let size = self.cluster_size();
            for runs in runs(&clusters).chunks(TOGETHER) {
                if zero {
                    let requests = runs.iter().map(|(first, len)| {
                        self.device.write_zeroes(self.offset(*first), len * size)
                    });
                    all(join_all(requests).await)?;
                } else {
                    let requests = runs
                        .iter()
                        .map(|(first, len)| self.device.unmap(self.offset(*first), len * size));
                    all(join_all(requests).await)?;
                }
            }
        }
        let zeroed = zero || unmap && properties.unmap_zeroes;
        for cluster in clusters {
            self.clusters.clear(cluster as usize);
            if zeroed {
                self.zeroed.set(cluster as usize);
            }
        }
        Ok(())
    }
}

/// Runs of consecutive numbers in a sorted list, as first and length.
pub(super) fn runs(clusters: &[u32]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for cluster in clusters.iter().copied().map(u64::from) {
        match runs.last_mut() {
            Some((first, len)) if *first + *len == cluster => *len += 1,
            _ => runs.push((cluster, 1)),
        }
    }
    runs
}

/// The first error of several requests, all of which have ended.
pub(super) fn all(results: Vec<std::result::Result<(), DeviceError>>) -> Result<()> {
    Ok(results.into_iter().collect::<std::result::Result<(), _>>()?)
}
