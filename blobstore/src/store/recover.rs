//! What a power cut has left: interrupted snapshots, deletions and resizes; relations between
//! blobs that do not hold.

use std::collections::{BTreeMap, BTreeSet};

use super::blob::{Blob, Parent};
use super::place::groups_of;
use super::{Broken, Store};
use crate::bits::Bits;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, PAGE, flag, internal};

/// The damage of blobs that cannot be deleted either, as others would lose data.
pub(super) const SHARED: &str = "clusters or metadata pages belong to several blobs";

/// What was done about an operation that a power cut had interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// The snapshot of this number was removed: it was not made, or its deletion was finished.
    Removed(BlobId),
    /// The snapshot of this number was kept: it was made, or its deletion had only begun.
    Kept(BlobId),
    /// The other blob cannot be read, so that this one was left as it is.
    Left(BlobId),
    /// The resize of this blob was finished.
    Resized(BlobId),
}

/// What must be written.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// Pages of removed blobs, the root first.
    removed: Vec<Vec<u32>>,
    /// Blobs to write, with groups whose extent pages are written before.
    changed: Vec<(BlobId, Vec<u32>)>,
}

impl<D: Device> Store<D> {
    /// Resolves interrupted operations in memory.
    pub(super) fn resolve_interrupted(&mut self, cut_short: Vec<BlobId>) -> Recovery {
        let mut recovery = Recovery::default();
        let marked: Vec<(BlobId, BlobId, bool)> = (self.blobs.values())
            .filter_map(|blob| {
                let removing = blob.internal_id(internal::REMOVING);
                Some((blob.id, blob.unfinished()?, removing.is_some()))
            })
            .collect();
        for (snapshot, other, removing) in marked {
            let unreadable = self.broken.iter().any(|broken| broken.id == other);
            let outcome = match self.blobs.get(&other).map(Blob::parent) {
                None if unreadable => Interrupted::Left(snapshot),
                Some(parent) if parent != Parent::Blob(snapshot) => {
                    self.remove(snapshot, other, &mut recovery);
                    Interrupted::Removed(snapshot)
                }
                // Without a trace of the other blob, another one gets its number some day, and the
                // mark must not name that.
                _ => {
                    self.keep(snapshot, other, removing, &mut recovery);
                    Interrupted::Kept(snapshot)
                }
            };
            self.interrupted.push(outcome);
        }
        for id in cut_short.into_iter().filter(|id| self.blobs.contains_key(id)) {
            recovery.changed.push((id, Vec::new()));
            self.interrupted.push(Interrupted::Resized(id));
        }
        recovery
    }

    /// The snapshot stays. If its deletion had begun, the clone may have taken clusters from it,
    /// which go back. The mark goes when the clone has been written.
    fn keep(&mut self, id: BlobId, clone: BlobId, removing: bool, recovery: &mut Recovery) {
        let Some(mut snapshot) = self.blobs.remove(&id) else { return };
        snapshot.flags.data_ro |= flag::READ_ONLY;
        if let Some(clone) = self.blobs.get_mut(&clone).filter(|_| removing) {
            let shared: Vec<u64> = (snapshot.map.allocated())
                .filter(|(index, cluster)| clone.map.get(*index) == *cluster)
                .map(|(index, _)| index)
                .collect();
            for index in &shared {
                clone.map.set(*index, 0);
            }
            recovery.changed.push((clone.id, groups_of(shared.into_iter())));
        }
        self.blobs.insert(id, snapshot);
        recovery.changed.push((id, Vec::new()));
    }

    /// The snapshot goes; what it shares with the other blob belongs to that one.
    fn remove(&mut self, id: BlobId, other: BlobId, recovery: &mut Recovery) {
        let Some(snapshot) = self.blobs.remove(&id) else { return };
        let kept: BTreeSet<u32> =
            self.blobs.get(&other).into_iter().flat_map(|blob| blob.map.pages()).collect();
        let extents = snapshot.map.pages().filter(|page| !kept.contains(page));
        let pages: Vec<u32> =
            id.page().into_iter().chain(snapshot.chain.iter().copied()).chain(extents).collect();
        pages.iter().for_each(|page| self.pages.clear(*page as usize));
        for (_, cluster) in snapshot.map.allocated() {
            self.clusters.clear(cluster as usize);
        }
        recovery.removed.push(pages);
    }

    /// Takes out blobs whose parent is missing or that are their own ancestors.
    pub(super) fn check_parents(&mut self) {
        let mut children: BTreeMap<BlobId, Vec<BlobId>> = BTreeMap::new();
        let mut reached = Vec::new();
        for blob in self.blobs.values() {
            match blob.parent() {
                Parent::Blob(parent) => children.entry(parent).or_default().push(blob.id),
                Parent::None | Parent::External(_) => reached.push(blob.id),
            }
        }
        let mut good = BTreeSet::new();
        while let Some(id) = reached.pop() {
            good.insert(id);
            reached.extend(children.remove(&id).unwrap_or_default());
        }
        let bad: Vec<BlobId> = self.blobs.keys().copied().filter(|id| !good.contains(id)).collect();
        for id in bad {
            let Some(blob) = self.blobs.remove(&id) else { continue };
            let reason = "a snapshot that the blob depends on is missing";
            let pages = pages_of(&blob).collect();
            let clusters = blob.map.allocated().map(|(_, cluster)| cluster).collect();
            let parent = blob.internal_id(internal::PARENT);
            self.broken.push(Broken { id, reason, parent, pages, clusters });
        }
        let parents: Vec<BlobId> = (self.blobs.values())
            .filter_map(|blob| if let Parent::Blob(id) = blob.parent() { Some(id) } else { None })
            .collect();
        for id in parents {
            if let Some(blob) = self.blobs.get_mut(&id).filter(|blob| !blob.flags.read_only()) {
                blob.damage.get_or_insert("the blob has clones, but is not a snapshot");
            }
        }
    }

    /// Sets the bits of all pages and clusters that blobs refer to. Blobs that share some become
    /// read-only.
    pub(super) fn refer(&mut self) {
        let mut seen = [Bits::new(self.pages.len()), Bits::new(self.clusters.len())];
        let mut twice = [BTreeSet::new(), BTreeSet::new()];
        let mut add = |kind: usize, number: u32| {
            if !seen[kind].set(number as usize) {
                twice[kind].insert(number);
            }
        };
        for blob in self.blobs.values() {
            pages_of(blob).for_each(|page| add(0, page));
            blob.map.allocated().for_each(|(_, cluster)| add(1, cluster));
        }
        for broken in &self.broken {
            broken.pages.iter().for_each(|page| add(0, *page));
            broken.clusters.iter().for_each(|cluster| add(1, *cluster));
        }
        for (used, seen) in [&mut self.pages, &mut self.clusters].into_iter().zip(&seen) {
            (0..seen.len()).filter(|bit| seen.get(*bit)).for_each(|bit| {
                used.set(bit);
            });
        }
        if twice.iter().all(BTreeSet::is_empty) {
            return;
        }
        for blob in self.blobs.values_mut() {
            let shares = pages_of(blob).any(|page| twice[0].contains(&page))
                || blob.map.allocated().any(|(_, cluster)| twice[1].contains(&cluster));
            if shares {
                blob.damage = Some(SHARED);
            }
        }
    }

    /// Writes what [`Self::resolve_interrupted`] has decided, in an order in which each step may be
    /// the last one.
    pub(super) async fn recover(&mut self, recovery: Recovery) -> Result<()> {
        if self.read_only || recovery.removed.is_empty() && recovery.changed.is_empty() {
            return Ok(());
        }
        self.begin().await?;
        let zeroes = |page: &u32| (*page, vec![0; PAGE]);
        let roots = recovery.removed.iter().filter_map(|pages| pages.first());
        self.write_pages(roots.map(zeroes).collect()).await?;
        self.barrier().await?;
        for pages in &recovery.removed {
            // A page whose bit is set belongs to another blob, too.
            let free = pages[1..].iter().filter(|page| !self.pages.get(**page as usize));
            self.write_pages(free.map(zeroes).collect()).await?;
        }
        let mut left = BTreeSet::new();
        for (id, groups) in &recovery.changed {
            let Ok(blob) = self.blob(*id) else { continue };
            let other = blob.unfinished();
            if blob.damage.is_some() || other.is_some_and(|other| left.contains(&other)) {
                left.insert(*id);
                continue;
            }
            let blob = self.blob_mut(*id)?;
            let before = (blob.internal.clone(), blob.flags);
            blob.set_internal(internal::REMOVING, None);
            blob.set_internal(internal::MAKING, None);
            match self.has_room(*id, 0, 0) {
                Ok(()) => self.persist(*id, groups).await?,
                Err(Error::NoSpace(_)) => {
                    let text = "no metadata page is left to finish an interrupted change";
                    let blob = self.blob_mut(*id)?;
                    blob.damage = Some(text);
                    (blob.internal, blob.flags) = before;
                    left.insert(*id);
                }
                Err(error) => return Err(error),
            }
        }
        // No other blob may get a number that a mark on the disk has.
        for page in left.iter().filter_map(|id| self.blobs.get(id)?.unfinished()?.page()) {
            self.pages.set(page as usize);
        }
        self.end();
        Ok(())
    }
}

fn pages_of(blob: &Blob) -> impl Iterator<Item = u32> {
    blob.id.page().into_iter().chain(blob.chain.iter().copied()).chain(blob.map.pages())
}
