//! Snapshots, clones, and the parents of blobs.

use super::Store;
use super::blob::{Blob, Map, Parent};
use super::change::{bytes_of, check_xattr, empty_blob, external_bytes};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, Flags, Xattr, flag, internal};

impl<D: Device> Store<D> {
    /// Takes a snapshot of a blob that may be changed. The snapshot gets the clusters, and the
    /// blob becomes its clone.
    ///
    /// Three writes of roots: the snapshot, marked as being made; the blob, which then is a clone;
    /// the snapshot without the mark. A power cut after the first one removes the snapshot.
    pub async fn snapshot(&mut self, id: BlobId, xattrs: Vec<Xattr>) -> Result<BlobId> {
        let blob = self.blob(id)?;
        if !blob.writable() {
            return Err(Error::Invalid("a read-only blob has no snapshots"));
        }
        xattrs.iter().try_for_each(check_xattr)?;
        let pages = 2 + blob.description().pages().len();
        self.has_room(id, pages, bytes_of(&xattrs))?;
        self.begin().await?;
        self.epoch += 1;
        let root = self.take_page(0)?;
        let blob = self.blob_mut(id)?;
        let mut snapshot = Blob {
            id: BlobId::of_page(root),
            flags: blob.flags,
            xattrs,
            internal: Vec::new(),
            map: blob.map.clone(),
            chain: Vec::new(),
            damage: None,
        };
        snapshot.set_internal(internal::MAKING, Some(id.0.to_le_bytes().to_vec()));
        snapshot.set_parent(&blob.parent());
        let made = snapshot.id;
        self.blobs.insert(made, snapshot);
        self.write_root(made).await?;

        let blob = self.blob_mut(id)?;
        blob.map = Map { len: blob.map.len, ..Map::default() };
        blob.flags.invalid |= flag::THIN;
        blob.set_parent(&Parent::Blob(made));
        self.write_root(id).await?;

        let snapshot = self.blob_mut(made)?;
        snapshot.set_internal(internal::MAKING, None);
        snapshot.flags.data_ro |= flag::READ_ONLY;
        self.write_root(made).await?;
        self.end();
        Ok(made)
    }

    /// Creates a clone of a read-only blob.
    pub async fn clone_blob(&mut self, id: BlobId, xattrs: Vec<Xattr>) -> Result<BlobId> {
        let parent = self.blob(id)?;
        if !parent.flags.read_only() {
            return Err(Error::Invalid("only read-only blobs have clones"));
        }
        if let Some(damage) = parent.damage {
            return Err(Error::NotPermitted(damage));
        }
        xattrs.iter().try_for_each(check_xattr)?;
        let (len, layout) = (parent.map.len, parent.flags.invalid & flag::TABLE);
        let clear = parent.flags.md_ro & flag::CLEAR;
        let flags = Flags { invalid: flag::THIN | layout, data_ro: 0, md_ro: clear };
        let mut clone = empty_blob(flags, len, xattrs);
        clone.set_parent(&Parent::Blob(id));
        self.has_pages(clone.description().pages().len())?;
        self.begin().await?;
        let made = self.add(clone)?;
        self.write_root(made).await?;
        self.end();
        Ok(made)
    }

    /// Makes a snapshot the parent of a thin blob of the same length. The caller warrants that the
    /// blob reads what it should.
    pub async fn set_parent(&mut self, id: BlobId, parent: BlobId) -> Result<()> {
        let new = self.blob(parent)?;
        let is_snapshot = new.flags.read_only() && new.damage.is_none();
        if !is_snapshot {
            return Err(Error::Invalid("the parent is not a snapshot"));
        }
        if new.map.len != self.blob(id)?.map.len {
            return Err(Error::Invalid("the snapshot has another length"));
        }
        let mut ancestor = parent;
        loop {
            if ancestor == id {
                return Err(Error::Invalid("the blob is an ancestor of the snapshot"));
            }
            let Parent::Blob(next) = self.blob(ancestor)?.parent() else { break };
            ancestor = next;
        }
        self.change_parent(id, Parent::Blob(parent)).await
    }

    /// Makes an external snapshot the parent of a thin blob. The caller warrants that the blob
    /// reads what it should.
    pub async fn set_external_parent(&mut self, id: BlobId, external: Vec<u8>) -> Result<()> {
        check_xattr(&Xattr { name: internal::EXTERNAL.to_vec(), value: external.clone() })?;
        self.change_parent(id, Parent::External(external)).await
    }

    async fn change_parent(&mut self, id: BlobId, parent: Parent) -> Result<()> {
        let blob = self.changeable(id)?;
        if !blob.flags.thin() {
            return Err(Error::Invalid("the blob is not thin"));
        }
        if blob.parent() == parent {
            return Err(Error::Exists);
        }
        let bytes = if let Parent::External(id) = &parent { external_bytes(id) } else { 0 };
        self.has_room(id, 0, bytes + 64)?;
        self.begin().await?;
        self.epoch += 1;
        self.blob_mut(id)?.set_parent(&parent);
        self.write_root(id).await?;
        self.end();
        Ok(())
    }
}
