//! Giving clusters to blobs, and taking single ones back.
//!
//! An allocation has three parts, so that the store is locked for two short ones only: `claim`
//! takes clusters in memory; `fill` copies what the blob inherits, or writes zeroes; `commit` writes
//! the map. A cluster always has its content before a map refers to it, also after a power cut, so
//! that no blob ever shows the data of a deleted one: free clusters are not trusted to be zero.

use futures_util::future::join_all;

use super::Store;
use super::persist::{all, runs};
use super::place::{Place, groups_of};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, Clear};

/// Bytes that are copied at once.
const COPY: u64 = 1 << 20;

/// A cluster that a blob needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its index in the blob.
    pub index: u64,
    /// Whether the caller writes the whole cluster before it commits the claim.
    pub whole: bool,
}

/// A cluster that is claimed for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claimed {
    /// Its index in the blob.
    pub index: u64,
    /// The cluster of the device.
    pub cluster: u64,
    whole: bool,
    zeroed: bool,
}

impl Claimed {
    /// Whether the caller writes the whole cluster.
    pub fn whole(&self) -> bool {
        self.whole
    }
}

/// Clusters that are claimed for a blob and not in its map yet. To be passed to
/// [`Store::commit`] or [`Store::give_back`]; if it is dropped, the clusters stay reserved until the
/// store is loaded again, and the store cannot be unloaded.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    id: BlobId,
    epoch: u64,
    clusters: Vec<Claimed>,
}

impl Claim {
    /// The blob.
    pub fn id(&self) -> BlobId {
        self.id
    }

    /// The clusters, in the order in which they were asked for.
    pub fn clusters(&self) -> &[Claimed] {
        &self.clusters
    }
}

impl<D: Device> Store<D> {
    /// Claims clusters for a blob that has none of its own at these indices. Writes nothing.
    pub fn claim(&mut self, id: BlobId, wanted: &[Wanted]) -> Result<Claim> {
        self.ready()?;
        let blob = self.changeable(id)?;
        let mut indices: Vec<u64> = wanted.iter().map(|wanted| wanted.index).collect();
        indices.sort_unstable();
        if indices.last().is_some_and(|last| *last >= blob.map.len) {
            return Err(Error::Invalid("the cluster is beyond the end of the blob"));
        }
        if indices.windows(2).any(|pair| pair[0] == pair[1])
            || indices.iter().any(|index| blob.map.get(*index) != 0)
        {
            return Err(Error::Exists);
        }
        let (epoch, taken) = (self.epoch, self.take_clusters(wanted.len())?);
        self.claimed += wanted.len();
        let clusters = wanted.iter().zip(taken).map(|(wanted, (cluster, zeroed))| Claimed {
            index: wanted.index,
            cluster: u64::from(cluster),
            whole: wanted.whole,
            zeroed,
        });
        Ok(Claim { id, epoch, clusters: clusters.collect() })
    }

    /// Takes the lowest free clusters, each with whether it is known to read as zeroes.
    pub(super) fn take_clusters(&mut self, count: usize) -> Result<Vec<(u32, bool)>> {
        if self.clusters.zeroes() < count {
            return Err(Error::NoSpace("clusters"));
        }
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            let cluster = self.clusters.take_lowest(0).expect("counted above");
            let zeroed = self.zeroed.get(cluster);
            self.zeroed.clear(cluster);
            taken.push((u32::try_from(cluster).expect("checked when loaded"), zeroed));
        }
        Ok(taken)
    }

    /// Writes to claimed clusters what the blob reads there: what it inherits, or zeroes. Clusters
    /// that the caller writes as a whole are left out. Borrows the store: other claims may be
    /// filled and maps may be read meanwhile, but no change can be made.
    pub async fn fill(&self, claim: &Claim) -> Result<()> {
        let mut zeroes = Vec::new();
        for claimed in claim.clusters.iter().filter(|claimed| !claimed.whole) {
            match self.resolve(claim.id, claimed.index)? {
                Place::Own(_) => return Err(Error::Stale),
                Place::Inherited(from) => self.copy(from, claimed.cluster).await?,
                Place::External => self.copy_external(claim.id, claimed).await?,
                Place::Zeroes if claimed.zeroed => {}
                Place::Zeroes => zeroes.extend(u32::try_from(claimed.cluster)),
            }
        }
        self.zero(zeroes).await
    }

    pub(super) async fn zero(&self, mut clusters: Vec<u32>) -> Result<()> {
        clusters.sort_unstable();
        let requests = runs(&clusters).into_iter().map(|(first, len)| {
            self.device.write_zeroes(self.offset(first), len * self.cluster_size())
        });
        all(join_all(requests).await)
    }

    async fn copy(&self, from: u64, to: u64) -> Result<()> {
        for (at, len) in pieces(self.cluster_size()) {
            let data = self.device.read(self.offset(from) + at, len).await?;
            self.device.write(self.offset(to) + at, data).await?;
        }
        Ok(())
    }

    async fn copy_external(&self, id: BlobId, claimed: &Claimed) -> Result<()> {
        let external = self.external(id)?.ok_or(Error::Stale)?;
        let start = claimed.index.saturating_mul(self.cluster_size());
        for (at, len) in pieces(self.cluster_size()) {
            let data = self.device.read_external(&external, start.saturating_add(at), len).await?;
            self.device.write(self.offset(claimed.cluster) + at, data).await?;
        }
        Ok(())
    }

    /// Puts claimed clusters, whose content has been written, into the map of the blob. All extent
    /// pages are written together, each once.
    ///
    /// The content is durable before the map refers to it. The map is durable after the next
    /// flush of the device. Fails with [`Error::Stale`] if the blob has changed since the claim;
    /// the clusters are given back then, as they are if there is no space for metadata. After
    /// another error, or if the future is dropped, the clusters are not the blob's until the store
    /// is loaded again.
    pub async fn commit(&mut self, claim: Claim) -> Result<()> {
        let groups = groups_of(claim.clusters.iter().map(|claimed| claimed.index));
        if let Err(error) = self.may_commit(&claim, &groups) {
            self.give_back(claim);
            return Err(error);
        }
        self.claimed -= claim.clusters.len();
        self.begin().await?;
        let indices = claim.clusters.iter().map(|claimed| claimed.index).collect();
        self.unwritten = Some((claim.id, indices));
        let blob = self.blob_mut(claim.id)?;
        for claimed in &claim.clusters {
            blob.map.set(claimed.index, u32::try_from(claimed.cluster).unwrap_or(0));
        }
        if self.write_extents(claim.id, &groups).await? {
            self.barrier().await?;
            self.write_root(claim.id).await?;
        }
        self.end();
        Ok(())
    }

    fn may_commit(&self, claim: &Claim, groups: &[u32]) -> Result<()> {
        self.ready()?;
        let Some(blob) = self.blobs.get(&claim.id).filter(|_| claim.epoch == self.epoch) else {
            return Err(Error::Stale);
        };
        if claim.clusters.iter().any(|claimed| blob.map.get(claimed.index) != 0) {
            return Err(Error::Stale);
        }
        let missing = self.missing_pages(claim.id, groups);
        if blob.flags.table() && missing == 0 {
            return Ok(());
        }
        // A run is 8 bytes; a cluster in the middle of a hole makes two more of them.
        let runs = if blob.flags.table() { 0 } else { claim.clusters.len() * 16 };
        self.has_room(claim.id, missing, runs)
    }

    /// Frees claimed clusters.
    pub fn give_back(&mut self, claim: Claim) {
        self.claimed -= claim.clusters.len();
        for claimed in claim.clusters {
            self.clusters.clear(usize::try_from(claimed.cluster).unwrap_or(usize::MAX));
        }
    }

    /// Claims clusters, fills and commits them. Returns their numbers. If the future is dropped,
    /// the store must be loaded again, as what was being written may still reach the clusters.
    pub async fn allocate(&mut self, id: BlobId, indices: &[u64]) -> Result<Vec<u64>> {
        let wanted: Vec<Wanted> =
            indices.iter().map(|index| Wanted { index: *index, whole: false }).collect();
        let claim = self.claim(id, &wanted)?;
        self.changing = true;
        let filled = self.fill(&claim).await;
        self.changing = false;
        if let Err(error) = filled {
            self.give_back(claim);
            return Err(error);
        }
        let clusters = claim.clusters.iter().map(|claimed| claimed.cluster).collect();
        self.commit(claim).await?;
        Ok(clusters)
    }

    /// Makes whole clusters of a blob read as zeroes. Those of a thin blob without a parent are
    /// freed, and their numbers are returned.
    ///
    /// The caller sees to it that no I/O to these clusters is in flight: a freed one may belong to
    /// another blob as soon as this ends.
    pub async fn release(&mut self, id: BlobId, indices: &[u64]) -> Result<Vec<u64>> {
        let blob = self.changeable(id)?;
        let own: Vec<(u64, u32)> = (indices.iter())
            .map(|index| (*index, blob.map.get(*index)))
            .filter(|(_, cluster)| *cluster != 0)
            .collect();
        let clusters: Vec<u32> = own.iter().map(|(_, cluster)| *cluster).collect();
        let clear = blob.flags.clear();
        let frees = blob.flags.thin() && blob.parent() == super::Parent::None;
        self.ready()?;
        if own.is_empty() {
            return Ok(Vec::new());
        }
        if !frees {
            self.zero(clusters).await?;
            return Ok(Vec::new());
        }
        if !blob.flags.table() {
            self.has_room(id, 0, own.len() * 16)?;
        }
        let groups = groups_of(own.iter().map(|(index, _)| *index));
        self.begin().await?;
        let blob = self.blob_mut(id)?;
        for (index, _) in &own {
            blob.map.set(*index, 0);
        }
        if self.write_extents(id, &groups).await? {
            self.barrier().await?;
            self.write_root(id).await?;
        }
        self.barrier().await?;
        let clear = if clear == Clear::None { Clear::Unmap } else { clear };
        let freed = clusters.iter().map(|cluster| u64::from(*cluster)).collect();
        self.free_clusters_of(clusters, clear).await?;
        self.end();
        Ok(freed)
    }
}

/// Offsets and lengths of the parts in which a cluster is copied.
fn pieces(cluster: u64) -> impl Iterator<Item = (u64, usize)> {
    let starts = (0..cluster).step_by(usize::try_from(COPY).expect("1 MiB"));
    starts.map(move |at| (at, usize::try_from(COPY.min(cluster - at)).expect("at most 1 MiB")))
}
