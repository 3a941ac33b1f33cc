//! Reading a store: from its masks if it was unloaded, otherwise by a scan of all metadata pages.
//! Clusters in use are counted once, however many blobs refer to them.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;

use super::blob::{Blob, Group, Map};
use super::{Broken, Store};
use crate::bits::Bits;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{
    BlobId, Description, MaskKind, PAGE, PER_EXTENT, Page, PageTable, Region, SuperBlock,
    decode_mask, extents, flag, internal, mask_bytes,
};

/// How a store is loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// The type that the store must have; none means any.
    pub store_type: Option<[u8; 16]>,
    /// Whether nothing may be written. What a power cut has interrupted is then resolved in memory
    /// only, and each change fails with [`Error::ReadOnly`].
    pub read_only: bool,
}

/// What is known while the blobs are read.
struct Loading {
    /// Blobs whose resize was interrupted.
    cut_short: Vec<BlobId>,
    /// Clusters that maps may still have, and extent pages. Metadata of any content takes no more
    /// memory: both are those of the store twice, as an unfinished snapshot has what its blob has.
    left: [usize; 2],
    /// Whether a map has not been read to its end, so that it is not known which clusters are free.
    stopped: bool,
}

const CLUSTERS: usize = 0;
const EXTENTS: usize = 1;

impl Loading {
    fn take(&mut self, kind: usize, count: usize) -> std::result::Result<(), &'static str> {
        let left = self.left[kind].checked_sub(count);
        self.stopped |= left.is_none();
        self.left[kind] = left.ok_or("the maps have more clusters than the store")?;
        Ok(())
    }
}

/// Pages that are read at once in a scan.
const SCAN: u32 = 256;
/// Pages that are read together, one by one.
const TOGETHER: usize = 64;

impl<D: Device> Store<D> {
    /// Reads a store, and finishes snapshots and deletions that a power cut has interrupted.
    ///
    /// A blob that cannot be read is listed in [`Self::broken`] and does not make the load fail.
    /// Blobs that share a cluster, which no operation causes, are read-only.
    pub async fn load(device: D, options: LoadOptions) -> Result<Self> {
        Self::load_if(device, options, |_| Ok(())).await
    }

    /// The same for a store that `accept` accepts. Otherwise, nothing has been written.
    pub(crate) async fn load_if(
        device: D,
        options: LoadOptions,
        accept: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Self> {
        let properties = device.properties();
        let first = PAGE.next_multiple_of(properties.block_size.max(1) as usize);
        if properties.size < first as u64 {
            return Err(Error::NotAStore("the device is too small"));
        }
        let super_block = SuperBlock::decode(&device.read(0, first).await?)?;
        if options.store_type.is_some_and(|wanted| wanted != super_block.store_type) {
            return Err(Error::OtherType);
        }
        super_block.check(properties.size, properties.block_size)?;
        let mut store = Self::with(device, super_block, options.read_only)?;
        let roots = if store.super_block.clean && store.super_block.has_blob_mask() {
            store.read_masks().await?
        } else {
            store.scan().await?
        };
        let left = [store.clusters.len(), store.pages.len()].map(|len| len.saturating_mul(2));
        let mut loading = Loading { cut_short: Vec::new(), left, stopped: false };
        for root in roots {
            store.load_blob(root, &mut loading).await?;
        }
        let recovery = store.resolve_interrupted(loading.cut_short);
        store.check_parents();
        store.refer();
        if loading.stopped {
            (0..store.clusters.len()).for_each(|cluster| {
                store.clusters.set(cluster);
            });
        }
        accept(&store)?;
        store.recover(recovery).await?;
        Ok(store)
    }

    /// A store without blobs.
    pub(super) fn with(device: D, super_block: SuperBlock, read_only: bool) -> Result<Self> {
        let clusters = super_block.clusters_on(device.properties().size);
        let clusters = usize::try_from(clusters).map_err(|_| Error::NotAStore("too large"))?;
        let size = super_block.size_on(device.properties().size);
        let mut used = Bits::new(clusters);
        for cluster in 0..super_block.metadata_clusters() {
            used.set(usize::try_from(cluster).map_err(|_| Error::NotAStore("too large"))?);
        }
        Ok(Self {
            device,
            pages: Bits::new(super_block.metadata.len as usize),
            clusters: used,
            zeroed: Bits::new(clusters),
            super_block,
            size,
            blobs: BTreeMap::new(),
            broken: Vec::new(),
            interrupted: Vec::new(),
            claimed: 0,
            unwritten: None,
            epoch: 0,
            changing: false,
            read_only,
        })
    }

    /// Takes the bits in use from the masks, and returns the root pages.
    async fn read_masks(&mut self) -> Result<Vec<u32>> {
        let pages = self.pages.len();
        let clusters = self.clusters.len();
        let metadata = self.super_block.metadata_clusters();
        let store = &self.super_block;
        let regions = [store.page_mask, store.cluster_mask, store.blob_mask];
        let bytes = self.read_mask(regions[0], pages).await?;
        self.pages = Bits::from_bytes(decode_mask(&bytes, MaskKind::Pages, pages)?, pages);
        let bytes = self.read_mask(regions[1], clusters).await?;
        let bits = decode_mask(&bytes, MaskKind::Clusters, clusters)?;
        self.clusters = Bits::from_bytes(bits, clusters);
        (0..metadata).filter_map(|n| usize::try_from(n).ok()).for_each(|n| {
            self.clusters.set(n);
        });
        let bytes = self.read_mask(regions[2], pages).await?;
        let roots = Bits::from_bytes(decode_mask(&bytes, MaskKind::Blobs, pages)?, pages);
        Ok((0..self.super_block.metadata.len).filter(|page| roots.get(*page as usize)).collect())
    }

    async fn read_mask(&self, region: Region, bits: usize) -> Result<Vec<u8>> {
        let page = self.super_block.page_size();
        let start = u64::from(region.start) * u64::from(page);
        Ok(self.device.read(start, mask_bytes(bits, page as usize)).await?)
    }

    /// Finds the root pages among all metadata pages.
    async fn scan(&self) -> Result<Vec<u32>> {
        let size = self.super_block.page_size() as usize;
        let end = self.super_block.metadata.len;
        let mut roots = Vec::new();
        let mut page = 0;
        while page < end {
            let count = SCAN.min(end - page);
            let bytes = self.device.read(self.page_offset(page), count as usize * size).await?;
            let pages = bytes.chunks_exact(size).zip(page..);
            let found = pages.filter(|(bytes, number)| Page::may_be_root(bytes, *number));
            roots.extend(found.map(|(_, number)| number));
            page += count;
        }
        Ok(roots)
    }

    /// Reads metadata pages; `None` for those that are out of range or damaged.
    async fn read_pages(&self, pages: &[u32]) -> Result<Vec<Option<Page>>> {
        let mut read = Vec::new();
        for pages in pages.chunks(TOGETHER) {
            let requests = pages.iter().map(async |page| {
                if *page >= self.super_block.metadata.len {
                    return Ok(None);
                }
                let len = self.whole_blocks(vec![0; PAGE]).len();
                let bytes = self.device.read(self.page_offset(*page), len).await?;
                Ok::<_, Error>(Page::decode(&bytes))
            });
            for page in join_all(requests).await {
                read.push(page?);
            }
        }
        Ok(read)
    }

    /// Reads a blob, and puts it into `blobs` or `broken`.
    async fn load_blob(&mut self, root: u32, loading: &mut Loading) -> Result<()> {
        let id = BlobId::of_page(root);
        let (pages, clusters) = (vec![root], Vec::new());
        let mut broken = Broken { id, reason: "", parent: None, pages, clusters };
        match self.read_blob(id, &mut broken, loading).await? {
            Ok((blob, short)) => {
                loading.cut_short.extend(short.then_some(id));
                self.blobs.insert(id, blob);
            }
            Err(reason) => {
                broken.reason = reason;
                self.broken.push(broken);
            }
        }
        Ok(())
    }

    /// The outer result has errors of the device, the inner one those of the blob. What is found
    /// to belong to the blob goes to `found`.
    async fn read_blob(
        &self,
        id: BlobId,
        found: &mut Broken,
        loading: &mut Loading,
    ) -> Result<std::result::Result<(Blob, bool), &'static str>> {
        let description = match self.read_chain(id, found).await? {
            Ok(description) => description,
            Err(reason) => return Ok(Err(reason)),
        };
        found.parent = description.internal_id(internal::PARENT);
        let chain = found.pages[1..].to_vec();
        let map = match &description.map {
            PageTable::Runs(runs) => self.expand(runs, found, loading).map(|map| (map, false)),
            PageTable::Table { clusters, entries } => {
                self.read_table(*clusters, entries, found, loading).await?
            }
        };
        Ok(map.and_then(|(map, short)| Ok((self.assemble(description, chain, map)?, short))))
    }

    async fn read_chain(
        &self,
        id: BlobId,
        found: &mut Broken,
    ) -> Result<std::result::Result<Description, &'static str>> {
        let mut chain: Vec<Page> = Vec::new();
        let mut seen = BTreeSet::from([found.pages[0]]);
        let mut next = Some(found.pages[0]);
        while let Some(number) = next {
            let page = self.read_pages(&[number]).await?.pop().flatten();
            let belongs = |page: &Page| page.id == id && page.sequence as usize == chain.len();
            let Some(page) = page.filter(belongs) else {
                return Ok(Err("a metadata page is damaged"));
            };
            next = page.next;
            chain.push(page);
            if let Some(next) = next {
                if next >= self.super_block.metadata.len {
                    return Ok(Err("the number of a metadata page is out of range"));
                }
                if !seen.insert(next) {
                    return Ok(Err("the metadata pages form a circle"));
                }
                found.pages.push(next);
            }
        }
        Ok(Description::collect(id, chain))
    }

    /// Whether a map may have this entry.
    fn is_data(&self, cluster: u32) -> bool {
        let cluster = u64::from(cluster);
        cluster == 0
            || (self.super_block.metadata_clusters()..self.clusters.len() as u64).contains(&cluster)
    }

    /// The map of a blob that has runs.
    fn expand(
        &self,
        runs: &[(u32, u32)],
        found: &mut Broken,
        loading: &mut Loading,
    ) -> std::result::Result<Map, &'static str> {
        let mut map = Map::default();
        for (first, len) in runs {
            let start = map.len;
            map.len += u64::from(*len);
            if map.len > Map::LONGEST {
                return Err("the map is too long");
            }
            if *first == 0 {
                continue;
            }
            let last = first.checked_add(len.saturating_sub(1));
            if !self.is_data(*first) || !last.is_some_and(|last| self.is_data(last)) {
                return Err("the number of a cluster is out of range");
            }
            loading.take(CLUSTERS, *len as usize)?;
            for (index, cluster) in (start..map.len).zip(*first..) {
                map.set(index, cluster);
                found.clusters.push(cluster);
            }
        }
        Ok(map)
    }

    /// The map of a blob that has extent pages, and whether it ends before its table does: a
    /// shrink that was interrupted.
    async fn read_table(
        &self,
        clusters: u64,
        table: &[(u32, u32)],
        found: &mut Broken,
        loading: &mut Loading,
    ) -> Result<std::result::Result<(Map, bool), &'static str>> {
        let numbers: Vec<u32> = table.iter().map(|e| e.0).filter(|page| *page != 0).collect();
        found.pages.extend(numbers.iter().filter(|page| **page < self.super_block.metadata.len));
        if let Err(reason) = loading.take(EXTENTS, numbers.len()) {
            return Ok(Err(reason));
        }
        let mut chunks = numbers.chunks(TOGETHER);
        let mut pages = Vec::new().into_iter();
        let (mut map, mut result) = (Map::default(), Ok(()));
        for (page, count) in table {
            if map.len % PER_EXTENT != 0 {
                return Ok(result.map(|()| (map, true)));
            }
            let group = u32::try_from(map.len / PER_EXTENT).unwrap_or(u32::MAX);
            if *page == 0 {
                let left = clusters.saturating_sub(map.len);
                map.len += (u64::from(*count) * PER_EXTENT).min(left);
            } else {
                if pages.as_slice().is_empty() {
                    pages = self.read_pages(chunks.next().unwrap_or(&[])).await?.into_iter();
                }
                let entries = pages.next().flatten().and_then(|page| extents(page, group));
                let Some(entries) = entries else {
                    // The clusters of the other pages stay reserved.
                    result = Err("an extent page is damaged");
                    map.len += PER_EXTENT;
                    continue;
                };
                if !entries.iter().all(|cluster| self.is_data(*cluster)) {
                    result = Err("the number of a cluster is out of range");
                }
                let there = entries.iter().filter(|cluster| **cluster != 0);
                if let Err(reason) = loading.take(CLUSTERS, there.clone().count()) {
                    return Ok(Err(reason));
                }
                found.clusters.extend(there);
                map.len += entries.len() as u64;
                map.groups.insert(group, Group { page: Some(*page), entries });
            }
            if map.len > Map::LONGEST {
                return Ok(Err("the map is too long"));
            }
        }
        Ok(result.map(|()| (map, false)))
    }

    fn assemble(
        &self,
        description: Description,
        chain: Vec<u32>,
        map: Map,
    ) -> std::result::Result<Blob, &'static str> {
        let flags = description.flags;
        if flags.invalid & !flag::KNOWN != 0 {
            return Err("the blob has unknown flags");
        }
        if let Some(reason) = description.wrong_parent() {
            return Err(reason);
        }
        let allocated = map.allocated().count() as u64;
        let damage = if flags.data_ro & !flag::READ_ONLY != 0 || flags.md_ro & !flag::CLEAR != 0 {
            Some("the blob has unknown flags")
        } else if description.unknown {
            Some("the blob has metadata of an unknown type")
        } else if !flags.thin() && allocated != map.len {
            Some("clusters of a thick blob are missing")
        } else {
            None
        };
        let Description { id, xattrs, internal, .. } = description;
        Ok(Blob { id, flags, xattrs, internal, map, chain, damage })
    }
}
