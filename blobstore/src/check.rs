//! Looks for contradictions in a store, without changing it and without the code that loads it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::device::Device;
use crate::error::Result;
use crate::format::{
    BlobId, Description, Flags, MaskKind, PAGE, PER_EXTENT, Page, PageTable, Region, SuperBlock,
    decode_mask, extents, flag, internal, mask_bytes,
};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is wrong.
    Note,
    /// Space is lost, or a change was interrupted; a load repairs or tolerates it.
    Warning,
    /// Data is lost, or will be.
    Error,
}

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.text)
    }
}

/// Checks the store on a device. Fails only if the device cannot be read.
pub async fn check<D: Device>(device: &D) -> Result<Vec<Finding>> {
    let properties = device.properties();
    let block = properties.block_size.max(1) as usize;
    let first = PAGE.next_multiple_of(block);
    if properties.size < first as u64 {
        return Ok(vec![error("the device is too small for a store".to_owned())]);
    }
    let bytes = device.read(0, first).await?;
    let store = match SuperBlock::decode(&bytes) {
        Ok(store) => store,
        Err(reason) => return Ok(vec![error(reason.to_string())]),
    };
    if let Err(reason) = store.check(properties.size, properties.block_size) {
        return Ok(vec![error(reason.to_string())]);
    }
    let mut checker = Checker {
        device,
        block,
        clusters: store.clusters_on(properties.size),
        left: [u64::from(store.metadata.len) * 2, store.clusters_on(properties.size) * 2],
        owners: [BTreeMap::new(), BTreeMap::new()],
        store,
        shared: BTreeMap::new(),
        blobs: BTreeMap::new(),
        findings: Vec::new(),
    };
    checker.run().await?;
    Ok(checker.findings)
}

fn error(text: String) -> Finding {
    Finding { severity: Severity::Error, text }
}

const PAGES: usize = 0;
const CLUSTERS: usize = 1;
const KINDS: [&str; 2] = ["metadata pages", "clusters"];

struct Checker<'a, D> {
    device: &'a D,
    block: usize,
    store: SuperBlock,
    /// The clusters of the store.
    clusters: u64,
    /// Extent pages and clusters that maps may still have: no more than twice those of the store.
    left: [u64; 2],
    /// For each page and each cluster that is in use: the root page of its blob.
    owners: [BTreeMap<u32, u32>; 2],
    /// How much two blobs share.
    shared: BTreeMap<(u32, u32), [u64; 2]>,
    blobs: BTreeMap<u32, Seen>,
    findings: Vec<Finding>,
}

/// A blob that was found.
struct Seen {
    name: String,
    flags: Flags,
    parent: Option<BlobId>,
    /// The blob of which it is an unfinished snapshot.
    unfinished: Option<(BlobId, &'static str)>,
}

impl<D: Device> Checker<'_, D> {
    fn find(&mut self, severity: Severity, text: String) {
        self.findings.push(Finding { severity, text });
    }

    async fn run(&mut self) -> Result<()> {
        for root in self.find_roots().await? {
            self.check_blob(root).await?;
        }
        self.check_relations();
        self.check_shared();
        self.check_super_blob();
        if !self.store.clean {
            self.find(Severity::Note, "the store was not unloaded".to_owned());
        } else if self.store.has_blob_mask() {
            self.check_masks().await?;
        }
        Ok(())
    }

    async fn page(&self, page: u32) -> Result<Vec<u8>> {
        let start = u64::from(self.store.metadata.start) + u64::from(page);
        let offset = start * u64::from(self.store.page_size());
        Ok(self.device.read(offset, PAGE.next_multiple_of(self.block)).await?)
    }

    async fn find_roots(&mut self) -> Result<Vec<u32>> {
        let mut roots = Vec::new();
        let size = self.store.page_size() as usize;
        let pages = self.store.metadata.len;
        for first in (0..pages).step_by(256) {
            let count = (pages - first).min(256) as usize;
            let start = u64::from(self.store.metadata.start) + u64::from(first);
            let bytes = self.device.read(start * size as u64, count * size).await?;
            for (page, bytes) in (first..).zip(bytes.chunks_exact(size)) {
                let header = BlobId::of_page(page).0.to_le_bytes();
                if bytes[..8] != header || bytes[8..12] != [0; 4] {
                    continue;
                }
                match Page::decode(bytes) {
                    Some(_) => roots.push(page),
                    None => self.find(
                        Severity::Error,
                        format!("blob {}: the root page is damaged", BlobId::of_page(page)),
                    ),
                }
            }
        }
        Ok(roots)
    }

    /// Reads all that belongs to a blob.
    async fn check_blob(&mut self, root: u32) -> Result<()> {
        let id = BlobId::of_page(root);
        let (mut chain, mut next) = (Vec::new(), Some(root));
        while let Some(number) = next {
            if number >= self.store.metadata.len {
                self.find(Severity::Error, format!("blob {id}: its chain leaves the metadata"));
                return Ok(());
            }
            if chain.len() >= self.store.metadata.len as usize {
                self.find(Severity::Error, format!("blob {id}: its chain has no end"));
                return Ok(());
            }
            let page = Page::decode(&self.page(number).await?);
            let Some(page) = page.filter(|p| p.id == id && p.sequence as usize == chain.len())
            else {
                let text = format!("blob {id}: page {number} of its chain is damaged");
                self.find(Severity::Error, text);
                return Ok(());
            };
            self.own(PAGES, number, root);
            next = page.next;
            chain.push(page);
        }
        match Description::collect(id, chain) {
            Ok(description) => self.check_description(root, description).await,
            Err(reason) => {
                self.find(Severity::Error, format!("blob {id}: {reason}"));
                Ok(())
            }
        }
    }

    async fn check_description(&mut self, root: u32, blob: Description) -> Result<()> {
        let making = blob.internal_id(internal::MAKING).map(|id| (id, "made"));
        let removing = blob.internal_id(internal::REMOVING).map(|id| (id, "deleted"));
        let name = blob.xattrs.iter().find(|xattr| xattr.name == b"name");
        let name = name.map(|name| {
            let end = name.value.iter().position(|b| *b == 0).unwrap_or(name.value.len());
            String::from_utf8_lossy(&name.value[..end]).into_owned()
        });
        let (flags, parent) = (blob.flags, blob.internal_id(internal::PARENT));
        let name = match name {
            Some(name) => format!("{} ({name})", blob.id),
            None => blob.id.to_string(),
        };
        if flags.invalid & !flag::KNOWN != 0 {
            self.find(Severity::Error, format!("blob {name}: unknown flags"));
        }
        if let Some(reason) = blob.wrong_parent() {
            self.find(Severity::Error, format!("blob {name}: {reason}"));
        }
        if blob.unknown {
            self.find(Severity::Warning, format!("blob {name}: descriptors of unknown type"));
        }
        let holes = match &blob.map {
            PageTable::Runs(runs) => self.check_runs(root, &name, runs),
            PageTable::Table { clusters, entries } => {
                self.check_table(root, &name, *clusters, entries).await?
            }
        };
        if holes > 0 && !flags.thin() {
            let text = format!("blob {name}: it is thick, but {holes} clusters are missing");
            self.find(Severity::Error, text);
        }
        let unfinished = removing.or(making);
        self.blobs.insert(root, Seen { name, flags, parent, unfinished });
        Ok(())
    }

    /// Returns the number of holes.
    fn check_runs(&mut self, root: u32, name: &str, runs: &[(u32, u32)]) -> u64 {
        let (mut holes, mut wrong) = (0, 0_u64);
        for (first, len) in runs {
            if *first == 0 {
                holes += u64::from(*len);
                continue;
            }
            let end = u64::from(*first) + u64::from(*len);
            if !self.is_data(*first) || end > self.clusters {
                wrong += u64::from(*len);
                continue;
            }
            if !self.take(CLUSTERS, u64::from(*len), name) {
                break;
            }
            for cluster in (*first..).take(*len as usize) {
                self.own(CLUSTERS, cluster, root);
            }
        }
        self.out_of_range(name, wrong);
        holes
    }

    /// Returns the number of holes.
    async fn check_table(
        &mut self,
        root: u32,
        name: &str,
        clusters: u64,
        table: &[(u32, u32)],
    ) -> Result<u64> {
        let (mut len, mut holes, mut wrong) = (0_u64, 0, 0);
        for (page, count) in table {
            if len % PER_EXTENT != 0 {
                let text = format!("blob {name}: the resize to {len} clusters was interrupted");
                self.find(Severity::Warning, text);
                break;
            }
            if *page == 0 {
                let missing = (u64::from(*count) * PER_EXTENT).min(clusters.saturating_sub(len));
                (len, holes) = (len + missing, holes + missing);
                continue;
            }
            if !self.take(PAGES, 1, name) {
                break;
            }
            let group = u32::try_from(len / PER_EXTENT).unwrap_or(u32::MAX);
            let entries = match *page < self.store.metadata.len {
                true => Page::decode(&self.page(*page).await?).and_then(|p| extents(p, group)),
                false => None,
            };
            let Some(entries) = entries else {
                let text = format!("blob {name}: extent page {page} is damaged");
                self.find(Severity::Error, text);
                len += PER_EXTENT;
                continue;
            };
            self.own(PAGES, *page, root);
            len += entries.len() as u64;
            for cluster in entries {
                match cluster {
                    0 => holes += 1,
                    cluster if self.is_data(cluster) => self.own(CLUSTERS, cluster, root),
                    _ => wrong += 1,
                }
            }
        }
        self.out_of_range(name, wrong);
        Ok(holes)
    }

    /// Whether the maps may have `count` more.
    fn take(&mut self, kind: usize, count: u64, name: &str) -> bool {
        let left = self.left[kind].checked_sub(count);
        self.left[kind] = left.unwrap_or(0);
        if left.is_none() {
            let text = format!("blob {name}: its map has more {} than there are", KINDS[kind]);
            self.find(Severity::Error, text);
        }
        left.is_some()
    }

    fn out_of_range(&mut self, name: &str, count: u64) {
        if count > 0 {
            let text = format!("blob {name}: {count} clusters are out of range");
            self.find(Severity::Error, text);
        }
    }

    fn is_data(&self, cluster: u32) -> bool {
        (self.store.metadata_clusters()..self.clusters).contains(&u64::from(cluster))
    }

    fn own(&mut self, kind: usize, number: u32, root: u32) {
        if let Some(other) = self.owners[kind].insert(number, root) {
            let pair = (other.min(root), other.max(root));
            self.shared.entry(pair).or_default()[kind] += 1;
        }
    }

    fn name(&self, root: u32) -> String {
        let id = BlobId::of_page(root);
        self.blobs.get(&root).map_or_else(|| id.to_string(), |blob| blob.name.clone())
    }

    /// Parents exist, are read-only, and are no descendants.
    fn check_relations(&mut self) {
        let mut wrong = Vec::new();
        let mut good: BTreeSet<u32> = BTreeSet::new();
        for (root, blob) in &self.blobs {
            let mut path = BTreeSet::from([*root]);
            let mut at = blob;
            while let Some(parent) = at.parent {
                let found = parent.page().and_then(|page| Some((page, self.blobs.get(&page)?)));
                let Some((page, seen)) = found else {
                    wrong.push(format!("blob {}: its parent {parent} is missing", blob.name));
                    break;
                };
                if path.contains(&page) {
                    wrong.push(format!("blob {}: it is its own ancestor", blob.name));
                    break;
                }
                if at.parent == blob.parent && !seen.flags.read_only() && seen.unfinished.is_none()
                {
                    let text = "is not read-only";
                    wrong.push(format!("blob {}: its parent {} {text}", blob.name, seen.name));
                }
                if good.contains(&page) {
                    break;
                }
                path.insert(page);
                at = seen;
            }
            good.extend(path);
        }
        wrong.into_iter().for_each(|text| self.find(Severity::Error, text));
    }

    fn check_shared(&mut self) {
        let unfinished: Vec<(u32, String, BlobId, &str)> = (self.blobs.iter())
            .filter_map(|(root, blob)| {
                let (other, what) = blob.unfinished?;
                Some((*root, blob.name.clone(), other, what))
            })
            .collect();
        let mut may = BTreeSet::new();
        for (root, name, other, what) in unfinished {
            let text = format!("blob {name}: a snapshot of {other} that was not completely {what}");
            self.find(Severity::Warning, text);
            may.extend(other.page().map(|other| (root.min(other), root.max(other))));
        }
        for ((one, two), counts) in std::mem::take(&mut self.shared) {
            for (count, kind) in counts.into_iter().zip(KINDS).filter(|(count, _)| *count > 0) {
                let names = (self.name(one), self.name(two));
                if one == two {
                    let text = format!("blob {} has {count} {kind} twice", names.0);
                    self.find(Severity::Error, text);
                } else if !may.contains(&(one, two)) {
                    let text = format!("blobs {} and {} share {count} {kind}", names.0, names.1);
                    self.find(Severity::Error, text);
                }
            }
        }
    }

    fn check_super_blob(&mut self) {
        let found = self.store.super_blob.and_then(BlobId::page);
        if !found.is_some_and(|page| self.blobs.contains_key(&page)) {
            let text = "the blob that names the store is missing".to_owned();
            self.find(Severity::Error, text);
        }
    }

    async fn check_masks(&mut self) -> Result<()> {
        let pages = u64::from(self.store.metadata.len);
        let metadata = self.store.metadata_clusters();
        let used: BTreeSet<u32> = self.owners[PAGES].keys().copied().collect();
        self.check_mask(self.store.page_mask, MaskKind::Pages, pages, &used).await?;
        let mut used: BTreeSet<u32> = self.owners[CLUSTERS].keys().copied().collect();
        used.extend((0..metadata).filter_map(|cluster| u32::try_from(cluster).ok()));
        self.check_mask(self.store.cluster_mask, MaskKind::Clusters, self.clusters, &used).await?;
        let used: BTreeSet<u32> = self.blobs.keys().copied().collect();
        self.check_mask(self.store.blob_mask, MaskKind::Blobs, pages, &used).await
    }

    /// Compares a mask with what is in use.
    async fn check_mask(
        &mut self,
        region: Region,
        kind: MaskKind,
        bits: u64,
        used: &BTreeSet<u32>,
    ) -> Result<()> {
        let page = self.store.page_size();
        let start = u64::from(region.start) * u64::from(page);
        // At most 2^32, as the super block was checked.
        let bits = usize::try_from(bits).unwrap_or(0);
        let bytes = self.device.read(start, mask_bytes(bits, page as usize)).await?;
        let bytes = match decode_mask(&bytes, kind, bits) {
            Ok(bytes) => bytes,
            Err(reason) => {
                self.find(Severity::Error, reason.to_string());
                return Ok(());
            }
        };
        let set = |bit: usize| bytes[bit / 8] >> (bit % 8) & 1 == 1;
        let marked = (0..bits).filter(|bit| set(*bit)).count();
        let both = used.iter().filter(|bit| set(**bit as usize)).count();
        let name = match kind {
            MaskKind::Pages => KINDS[PAGES],
            MaskKind::Clusters => KINDS[CLUSTERS],
            MaskKind::Blobs => "blobs",
        };
        if marked > both {
            let lost = marked - both;
            let text = format!("{lost} {name} are marked as used, but nothing refers to them");
            self.find(Severity::Warning, text);
        }
        if used.len() > both {
            let free = used.len() - both;
            self.find(Severity::Error, format!("{free} {name} are in use, but marked as free"));
        }
        Ok(())
    }
}
