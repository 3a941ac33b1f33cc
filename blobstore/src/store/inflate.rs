//! Making blobs independent of their parents.
//!
//! The clusters are allocated in batches, between which others may use the store: `missing` lists
//! the next ones, which the caller allocates, and `inflate_end` or `decouple_end` cuts the tie.

use super::Store;
use super::blob::Parent;
use super::change::external_bytes;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, flag};

/// Clusters that are allocated together.
const BATCH: usize = 32;

impl<D: Device> Store<D> {
    /// Up to `limit` clusters from index `from` on that a blob needs before it can do without its
    /// parent (`decouple`), or without any (otherwise).
    pub fn missing(&self, id: BlobId, decouple: bool, from: u64, limit: usize) -> Result<Vec<u64>> {
        let blob = self.blob(id)?;
        let Parent::Blob(parent) = blob.parent() else {
            let all = (from..blob.map.len).filter(|index| blob.map.get(*index) == 0);
            return Ok(all.take(limit).collect());
        };
        if !decouple {
            let all = (from..blob.map.len).filter(|index| blob.map.get(*index) == 0);
            return Ok(all.take(limit).collect());
        }
        let mut needed = self.hidden_by(parent, id)?;
        let inherited = self.blob(parent)?.map.allocated().map(|(index, _)| index);
        needed.extend(inherited.filter(|index| *index < blob.map.len && blob.map.get(*index) == 0));
        needed.sort_unstable();
        needed.retain(|index| *index >= from);
        needed.truncate(limit);
        Ok(needed)
    }

    /// Allocates all clusters of a blob, and makes it thick and independent. Without effect on a
    /// thick one.
    pub async fn inflate(&mut self, id: BlobId) -> Result<()> {
        if !self.changeable(id)?.flags.thin() {
            return Ok(());
        }
        self.allocate_missing(id, false).await?;
        self.inflate_end(id).await
    }

    /// Copies what a blob has from its direct parent, and makes it a clone of that one's parent. If
    /// the parent is an external snapshot, this is [`Self::inflate`].
    pub async fn decouple(&mut self, id: BlobId) -> Result<()> {
        match self.changeable(id)?.parent() {
            Parent::None => Err(Error::Invalid("the blob has no parent")),
            Parent::External(_) => self.inflate(id).await,
            Parent::Blob(_) => {
                self.allocate_missing(id, true).await?;
                self.decouple_end(id).await
            }
        }
    }

    async fn allocate_missing(&mut self, id: BlobId, decouple: bool) -> Result<()> {
        let blob = self.blob(id)?;
        let needed = match decouple {
            true => self.missing(id, true, 0, usize::MAX)?.len() as u64,
            false => blob.map.len - blob.map.allocated().count() as u64,
        };
        if (self.clusters.zeroes() as u64) < needed {
            return Err(Error::NoSpace("clusters"));
        }
        let mut from = 0;
        loop {
            let batch = self.missing(id, decouple, from, BATCH)?;
            let Some(last) = batch.last() else { return Ok(()) };
            from = last + 1;
            self.allocate(id, &batch).await?;
        }
    }

    /// Ends [`Self::inflate`]: fails with [`Error::Stale`] if clusters are missing.
    pub async fn inflate_end(&mut self, id: BlobId) -> Result<()> {
        self.changeable(id)?;
        if !self.missing(id, false, 0, 1)?.is_empty() {
            return Err(Error::Stale);
        }
        self.cut_tie(id, Parent::None, 0).await
    }

    /// Ends [`Self::decouple`]: fails with [`Error::Stale`] if clusters are missing.
    pub async fn decouple_end(&mut self, id: BlobId) -> Result<()> {
        let Parent::Blob(parent) = self.changeable(id)?.parent() else {
            return Err(Error::Invalid("the blob has no parent in the store"));
        };
        if !self.missing(id, true, 0, 1)?.is_empty() {
            return Err(Error::Stale);
        }
        self.cut_tie(id, self.blob(parent)?.parent(), flag::THIN).await
    }

    async fn cut_tie(&mut self, id: BlobId, parent: Parent, thin: u64) -> Result<()> {
        let bytes = if let Parent::External(id) = &parent { external_bytes(id) } else { 0 };
        self.has_room(id, 0, bytes)?;
        self.begin().await?;
        self.epoch += 1;
        let blob = self.blob_mut(id)?;
        blob.set_parent(&parent);
        blob.flags.invalid = blob.flags.invalid & !flag::THIN | thin;
        self.write_root(id).await?;
        self.end();
        Ok(())
    }
}
