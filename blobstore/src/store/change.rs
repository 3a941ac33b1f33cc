//! Creating, changing and deleting blobs.

use super::Store;
use super::blob::{Blob, Map, Parent, place_of, put};
use super::place::{Place, groups_of};
use super::recover::SHARED;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, Clear, Flags, PAGE, PER_EXTENT, Page, Xattr, flag, internal};

/// A blob to be created.
#[derive(Debug, Clone, Default)]
pub struct NewBlob {
    /// Its length in clusters.
    pub clusters: u64,
    /// Whether clusters are allocated when they are first written, rather than at once.
    pub thin: bool,
    /// What is done to its clusters when it gives them up.
    pub clear: Clear,
    /// Extended attributes, in their order on the disk.
    pub xattrs: Vec<Xattr>,
    /// The external snapshot of which it is a clone. Such a blob is thin.
    pub external: Option<Vec<u8>>,
}

impl NewBlob {
    fn check(&self) -> Result<()> {
        if self.clusters > Map::LONGEST {
            return Err(Error::Invalid("the blob is too large"));
        }
        self.xattrs.iter().try_for_each(check_xattr)?;
        let external = Xattr { name: internal::EXTERNAL.to_vec(), value: Vec::new() };
        check_xattr(&Xattr { value: self.external.clone().unwrap_or_default(), ..external })
    }
}

pub(super) fn check_xattr(xattr: &Xattr) -> Result<()> {
    if xattr.name.len().saturating_add(xattr.value.len()) > Xattr::LONGEST {
        return Err(Error::Invalid("an attribute is too long"));
    }
    Ok(())
}

pub(super) fn bytes_of(xattrs: &[Xattr]) -> usize {
    // With the space that may be left at the end of a page.
    xattrs.iter().map(|xattr| 2 * (xattr.name.len() + xattr.value.len() + 9)).sum()
}

/// The same for the identity of an external snapshot.
pub(super) fn external_bytes(id: &[u8]) -> usize {
    2 * (internal::EXTERNAL.len() + id.len() + 9)
}

/// A blob that has no number yet: see [`Store::add`].
pub(super) fn empty_blob(flags: Flags, len: u64, xattrs: Vec<Xattr>) -> Blob {
    let map = Map { len, ..Map::default() };
    let (internal, chain, damage) = (Vec::new(), Vec::new(), None);
    Blob { id: BlobId::of_page(0), flags, xattrs, internal, map, chain, damage }
}

impl<D: Device> Store<D> {
    /// Creates a blob. All of it reads as zeroes, or as its external snapshot.
    pub async fn create_blob(&mut self, new: NewBlob) -> Result<BlobId> {
        new.check()?;
        self.ready()?;
        let thin = new.thin || new.external.is_some();
        let groups = groups_below(if thin { 0 } else { new.clusters });
        if !thin && (self.clusters.zeroes() as u64) < new.clusters {
            return Err(Error::NoSpace("clusters"));
        }
        let flags = Flags {
            invalid: flag::TABLE | if thin { flag::THIN } else { 0 },
            data_ro: 0,
            md_ro: new.clear as u64,
        };
        let mut blob = empty_blob(flags, new.clusters, new.xattrs);
        blob.set_parent(&new.external.map_or(Parent::None, Parent::External));
        let entries = (groups.len() * 8).div_ceil(Page::ROOM / 2);
        self.has_pages(groups.len() + blob.description().pages().len() + entries)?;
        self.begin().await?;
        let id = self.add(blob)?;
        if !thin {
            self.give_zeroes(id, &(0..new.clusters).collect::<Vec<_>>()).await?;
        }
        self.persist(id, &groups).await?;
        self.end();
        Ok(id)
    }

    /// Gives a new blob a root page, and thereby its number.
    pub(super) fn add(&mut self, mut blob: Blob) -> Result<BlobId> {
        blob.id = BlobId::of_page(self.take_page(0)?);
        let id = blob.id;
        self.blobs.insert(id, blob);
        Ok(id)
    }

    /// Puts zeroed clusters into the map, without writing it. There must be enough.
    pub(super) async fn give_zeroes(&mut self, id: BlobId, indices: &[u64]) -> Result<()> {
        let taken = self.take_clusters(indices.len())?;
        let zero = taken.iter().filter(|(_, zeroed)| !zeroed).map(|(cluster, _)| *cluster);
        self.zero(zero.collect()).await?;
        self.barrier().await?;
        self.unwritten = Some((id, indices.to_vec()));
        let blob = self.blob_mut(id)?;
        for (index, (cluster, _)) in indices.iter().zip(taken) {
            blob.map.set(*index, cluster);
        }
        Ok(())
    }

    /// Changes the length of a blob, in clusters. New clusters of a thick blob read as zeroes; those
    /// of a thin one read as its parent does there. If it is interrupted while it grows, any length
    /// from the old to the new one is possible; while it shrinks, up to 511 clusters more.
    pub async fn resize(&mut self, id: BlobId, clusters: u64) -> Result<()> {
        let blob = self.changeable(id)?;
        let old = blob.map.len;
        let thin = blob.flags.thin();
        let clear = blob.flags.clear();
        if clusters > Map::LONGEST {
            return Err(Error::Invalid("the blob is too large"));
        }
        self.ready()?;
        if clusters == old {
            return Ok(());
        }
        let grown = old..if thin { old } else { clusters.max(old) };
        if (self.clusters.zeroes() as u64) < grown.end - grown.start {
            return Err(Error::NoSpace("clusters"));
        }
        let mut groups = groups_of(grown.clone());
        let new = usize::try_from(grown.end - grown.start).unwrap_or(usize::MAX / 32);
        let bytes = match blob.flags.table() {
            _ if clusters < old => 0,
            true => 64,
            false => 64 + new * 16,
        };
        self.has_room(id, self.missing_pages(id, &groups), bytes)?;
        self.begin().await?;
        self.epoch += 1;
        let (cut, pages, changed) = self.blob_mut(id)?.map.resize(clusters);
        if clusters > old {
            self.give_zeroes(id, &grown.collect::<Vec<_>>()).await?;
            groups.extend(changed.filter(|group| !groups.contains(group)));
            self.persist(id, &groups).await?;
        } else {
            // The root first: after it, the table ends with the last group that is left.
            self.write_root(id).await?;
            if let Some(group) = changed {
                self.write_extents(id, &[group]).await?;
                self.barrier().await?;
            }
            self.free_pages(&pages).await?;
            self.free_clusters_of(cut, clear).await?;
        }
        self.end();
        Ok(())
    }

    /// Sets extended attributes, or removes those without a value.
    pub async fn set_xattrs(
        &mut self,
        id: BlobId,
        xattrs: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    ) -> Result<()> {
        let mut after = self.changeable(id)?.description();
        for (name, value) in &xattrs {
            let xattr = Xattr { name: name.clone(), value: value.clone().unwrap_or_default() };
            check_xattr(&xattr)?;
            put(&mut after.xattrs, name, value.clone());
        }
        self.has_pages(after.pages().len() - 1)?;
        self.begin().await?;
        let blob = self.blob_mut(id)?;
        for (name, value) in xattrs {
            blob.set_xattr(&name, value);
        }
        self.write_root(id).await?;
        self.end();
        Ok(())
    }

    /// Makes a blob read-only, for ever.
    pub async fn set_read_only(&mut self, id: BlobId) -> Result<()> {
        if self.blob(id)?.flags.read_only() {
            return Ok(());
        }
        self.changeable(id)?;
        self.has_room(id, 0, 0)?;
        self.begin().await?;
        self.epoch += 1;
        self.blob_mut(id)?.flags.data_ro |= flag::READ_ONLY;
        self.write_root(id).await?;
        self.end();
        Ok(())
    }

    /// Deletes a blob. If it has one clone, that takes over what it inherits; a blob with more
    /// clones, or one that cannot be read, cannot be deleted.
    pub async fn delete(&mut self, id: BlobId) -> Result<()> {
        if self.blob(id)?.damage == Some(SHARED) {
            return Err(Error::NotPermitted(SHARED));
        }
        let marked = self.blob(id)?.unfinished().is_some();
        if marked || self.blobs.values().any(|blob| blob.unfinished() == Some(id)) {
            return Err(Error::NotPermitted("a snapshot of it is unfinished"));
        }
        if self.broken.iter().any(|broken| broken.parent == Some(id)) {
            return Err(Error::NotPermitted("a clone of it cannot be read"));
        }
        let clones: Vec<BlobId> = self.clones(id).take(2).collect();
        match clones[..] {
            [] => self.begin().await?,
            [clone] => self.hand_over(id, clone).await?,
            _ => return Err(Error::NotPermitted("the snapshot has more than one clone")),
        }
        self.epoch += 1;
        let blob = self.blobs.remove(&id).ok_or(Error::NotFound)?;
        let root = id.page().ok_or(Error::NotFound)?;
        self.write_pages(vec![(root, vec![0; PAGE])]).await?;
        self.barrier().await?;
        self.pages.clear(root as usize);
        let pages: Vec<u32> = blob.chain.iter().copied().chain(blob.map.pages()).collect();
        self.free_pages(&pages).await?;
        let clusters = blob.map.allocated().map(|(_, cluster)| cluster).collect();
        self.free_clusters_of(clusters, blob.flags.clear()).await?;
        self.end();
        Ok(())
    }

    /// Gives the clone of a snapshot what it inherits from it, before the snapshot is deleted.
    /// Begins the change, and does not end it.
    async fn hand_over(&mut self, id: BlobId, clone: BlobId) -> Result<()> {
        if let Some(damage) = self.blob(clone)?.damage {
            return Err(Error::NotPermitted(damage));
        }
        let hidden = self.hidden_by(id, clone)?;
        let hidden_groups = groups_of(hidden.iter().copied());
        if self.clusters.zeroes() < hidden.len() {
            return Err(Error::NoSpace("clusters"));
        }
        let snapshot = self.blob(id)?;
        let groups: Vec<u32> =
            snapshot.map.groups.keys().copied().chain(hidden_groups.clone()).collect();
        let extra = self.missing_pages(clone, &groups) + snapshot.description().pages().len();
        let runs = match self.blob(clone)?.flags.table() {
            true => 0,
            false => (snapshot.map.allocated().count() + hidden.len()) * 16,
        };
        let external = match snapshot.parent() {
            Parent::External(id) => external_bytes(&id),
            _ => 0,
        };
        self.has_room(clone, extra, 64 + runs + external)?;
        self.begin().await?;
        if !hidden.is_empty() {
            self.give_zeroes(clone, &hidden).await?;
            self.persist(clone, &hidden_groups).await?;
        }
        let value = clone.0.to_le_bytes().to_vec();
        self.blob_mut(id)?.set_internal(internal::REMOVING, Some(value));
        self.write_root(id).await?;
        let mut snapshot = self.blobs.remove(&id).ok_or(Error::NotFound)?;
        let blob = self.blob_mut(clone)?;
        let touched = take_over(&mut snapshot.map, blob);
        blob.set_parent(&snapshot.parent());
        self.blobs.insert(id, snapshot);
        self.persist(clone, &touched).await
    }

    /// Indices at which the clone reads zeroes because its snapshot is shorter than both, and
    /// would read what the snapshot's parent has once the snapshot is gone.
    pub(super) fn hidden_by(&self, snapshot: BlobId, clone: BlobId) -> Result<Vec<u64>> {
        let (snapshot, clone) = (self.blob(snapshot)?, self.blob(clone)?);
        let mut parent = snapshot.parent();
        let mut end = clone.map.len;
        let mut hidden = Vec::new();
        // Only what an ancestor has allocated can appear.
        while let Parent::Blob(id) = parent {
            let blob = self.blob(id)?;
            let appears = (blob.map.allocated().map(|(index, _)| index))
                .filter(|index| (snapshot.map.len..end).contains(index));
            hidden.extend(appears);
            end = end.min(blob.map.len);
            parent = blob.parent();
        }
        if let Parent::External(_) = parent {
            let len = end.saturating_sub(snapshot.map.len);
            if len > self.clusters.len() as u64 {
                return Err(Error::NoSpace("clusters"));
            }
            hidden.extend(snapshot.map.len..end);
        }
        hidden.sort_unstable();
        hidden.dedup();
        hidden.retain(|index| clone.map.get(*index) == 0);
        debug_assert!(
            hidden.iter().all(|index| self.resolve(clone.id, *index) == Ok(Place::Zeroes))
        );
        Ok(hidden)
    }
}

/// Moves to `clone` what it inherits from `snapshot`. Returns the groups whose extent pages must be
/// written; a page that only the snapshot has is taken over by its number.
fn take_over(snapshot: &mut Map, clone: &mut Blob) -> Vec<u32> {
    let mut touched = Vec::new();
    let groups: Vec<u32> = snapshot.groups.keys().copied().collect();
    for group in groups {
        let wanted = clone.map.entries_of(group);
        let Some(from) = snapshot.groups.get_mut(&group) else { continue };
        let same = from.entries.len() == wanted && from.page.is_some() == clone.flags.table();
        if same && !clone.map.groups.contains_key(&group) {
            clone.map.groups.extend(snapshot.groups.remove_entry(&group));
            continue;
        }
        let start = u64::from(group) * PER_EXTENT;
        let mut moved = false;
        for (index, cluster) in (start..).zip(from.entries.iter_mut()) {
            if *cluster != 0 && index < clone.map.len && clone.map.get(index) == 0 {
                clone.map.set(index, std::mem::take(cluster));
                moved = true;
            }
        }
        touched.extend(moved.then_some(group));
    }
    touched
}

/// The groups of a map of this length.
fn groups_below(len: u64) -> Vec<u32> {
    let last = len.checked_sub(1).and_then(place_of).map(|(group, _)| group);
    last.map_or_else(Vec::new, |last| (0..=last).collect())
}
