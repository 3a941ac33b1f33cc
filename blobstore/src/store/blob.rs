//! A blob in memory, and its map from cluster indices to clusters of the device.

use std::collections::BTreeMap;

use crate::format::{BlobId, Description, Flags, PER_EXTENT, PageTable, Xattr, flag, internal};

/// Where a cluster that a blob does not have is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// It reads as zeroes.
    None,
    /// From a snapshot in the same store.
    Blob(BlobId),
    /// From an external snapshot, which has this identity.
    External(Vec<u8>),
}

/// A blob.
#[derive(Debug, Clone)]
pub struct Blob {
    pub(super) id: BlobId,
    pub(super) flags: Flags,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) internal: Vec<Xattr>,
    pub(super) map: Map,
    /// The pages after the root.
    pub(super) chain: Vec<u32>,
    pub(super) damage: Option<&'static str>,
}

impl Blob {
    /// Its number.
    pub fn id(&self) -> BlobId {
        self.id
    }

    /// Its flags.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// Its length in clusters.
    pub fn clusters(&self) -> u64 {
        self.map.len
    }

    /// How many clusters of its own it has.
    pub fn allocated(&self) -> u64 {
        self.map.allocated().count() as u64
    }

    /// An extended attribute.
    pub fn xattr(&self, name: &[u8]) -> Option<&[u8]> {
        find(&self.xattrs, name)
    }

    /// All extended attributes, in their order on the disk.
    pub fn xattrs(&self) -> &[Xattr] {
        &self.xattrs
    }

    /// Where it is read if a cluster is not its own.
    pub fn parent(&self) -> Parent {
        if let Some(id) = self.internal_id(internal::PARENT) {
            Parent::Blob(id)
        } else if let Some(id) = find(&self.internal, internal::EXTERNAL) {
            Parent::External(id.to_vec())
        } else {
            Parent::None
        }
    }

    /// Why data and metadata of this blob may only be read, although its flags permit changes:
    /// its metadata is damaged, or has parts that this version does not know.
    pub fn damage(&self) -> Option<&'static str> {
        self.damage
    }

    /// Whether its data may be changed.
    pub fn writable(&self) -> bool {
        !self.flags.read_only() && self.damage.is_none()
    }

    /// The number of metadata pages: the root, the pages of its chain, and extent pages.
    pub fn pages(&self) -> usize {
        1 + self.chain.len() + self.map.pages().count()
    }

    /// An internal attribute that is the number of a blob.
    pub(super) fn internal_id(&self, name: &[u8]) -> Option<BlobId> {
        let value = find(&self.internal, name)?;
        Some(BlobId(u64::from_le_bytes(value.try_into().ok()?)))
    }

    /// The other blob of a snapshot whose making or deletion was interrupted.
    pub(super) fn unfinished(&self) -> Option<BlobId> {
        let removing = self.internal_id(internal::REMOVING);
        removing.or_else(|| self.internal_id(internal::MAKING))
    }

    /// Sets or removes an internal attribute.
    pub(super) fn set_internal(&mut self, name: &[u8], value: Option<Vec<u8>>) {
        put(&mut self.internal, name, value);
        let has = if self.internal.is_empty() { 0 } else { flag::INTERNAL };
        self.flags.invalid = self.flags.invalid & !flag::INTERNAL | has;
    }

    pub(super) fn set_parent(&mut self, parent: &Parent) {
        let (blob, external) = match parent {
            Parent::None => (None, None),
            Parent::Blob(id) => (Some(id.0.to_le_bytes().to_vec()), None),
            Parent::External(id) => (None, Some(id.clone())),
        };
        let has = if external.is_some() { flag::EXTERNAL } else { 0 };
        self.flags.invalid = self.flags.invalid & !flag::EXTERNAL | has;
        self.set_internal(internal::PARENT, blob);
        self.set_internal(internal::EXTERNAL, external);
    }

    pub(super) fn set_xattr(&mut self, name: &[u8], value: Option<Vec<u8>>) {
        put(&mut self.xattrs, name, value);
    }

    pub(super) fn description(&self) -> Description {
        Description {
            id: self.id,
            flags: self.flags,
            xattrs: self.xattrs.clone(),
            internal: self.internal.clone(),
            map: if self.flags.table() { self.map.table() } else { self.map.runs() },
            unknown: false,
        }
    }
}

fn find<'a>(xattrs: &'a [Xattr], name: &[u8]) -> Option<&'a [u8]> {
    xattrs.iter().find(|xattr| xattr.name == name).map(|xattr| &xattr.value[..])
}

pub(super) fn put(xattrs: &mut Vec<Xattr>, name: &[u8], value: Option<Vec<u8>>) {
    match (xattrs.iter().position(|xattr| xattr.name == name), value) {
        (Some(at), Some(value)) => xattrs[at].value = value,
        (Some(at), None) => drop(xattrs.remove(at)),
        (None, Some(value)) => xattrs.push(Xattr { name: name.to_vec(), value }),
        (None, None) => {}
    }
}

/// A map, with the groups of 512 clusters that have entries. Its size in memory follows from the
/// metadata pages that it takes on the disk, not from the length that they claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) len: u64,
    pub(super) groups: BTreeMap<u32, Group>,
}

/// The entries of up to 512 clusters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Group {
    /// The extent page; none in a map of runs.
    pub(super) page: Option<u32>,
    /// Cluster numbers, 0 for holes. As long as the map needs.
    pub(super) entries: Vec<u32>,
}

/// The group of an index, and its place in the group.
pub(super) fn place_of(index: u64) -> Option<(u32, usize)> {
    let place = usize::try_from(index % PER_EXTENT).ok()?;
    Some((u32::try_from(index / PER_EXTENT).ok()?, place))
}

impl Map {
    /// The longest map, as the format has 32 bits for the first index of an extent page.
    pub(super) const LONGEST: u64 = 1 << 32;

    /// The cluster of an index, 0 if there is none.
    pub(super) fn get(&self, index: u64) -> u32 {
        let entry = place_of(index)
            .and_then(|(group, place)| self.groups.get(&group)?.entries.get(place).copied());
        entry.unwrap_or(0)
    }

    /// Sets the cluster of an index below the length, and returns the group.
    pub(super) fn set(&mut self, index: u64, cluster: u32) -> Option<u32> {
        let (group, place) = place_of(index).filter(|_| index < self.len)?;
        let wanted = self.entries_of(group);
        let entries = &mut self.groups.entry(group).or_default().entries;
        entries.resize(wanted, 0);
        entries[place] = cluster;
        Some(group)
    }

    /// How many entries a group has.
    pub(super) fn entries_of(&self, group: u32) -> usize {
        let left = self.len.saturating_sub(u64::from(group) * PER_EXTENT).min(PER_EXTENT);
        usize::try_from(left).expect("at most 512")
    }

    /// Indices and clusters, where there are any.
    pub(super) fn allocated(&self) -> impl Iterator<Item = (u64, u32)> {
        self.groups.iter().flat_map(|(group, content)| {
            let start = u64::from(*group) * PER_EXTENT;
            let entries = content.entries.iter().enumerate().filter(|(_, entry)| **entry != 0);
            entries.map(move |(i, entry)| (start + i as u64, *entry))
        })
    }

    /// The extent pages.
    pub(super) fn pages(&self) -> impl Iterator<Item = u32> {
        self.groups.values().filter_map(|group| group.page)
    }

    /// Changes the length. Returns what was cut off, clusters and extent pages, and whether the
    /// last group that is left has another number of entries than before.
    pub(super) fn resize(&mut self, len: u64) -> (Vec<u32>, Vec<u32>, Option<u32>) {
        let cut: Vec<u32> =
            self.allocated().filter(|(i, _)| *i >= len).map(|(_, cluster)| cluster).collect();
        let borders = [self.len, len].map(|len| len.checked_sub(1).and_then(place_of));
        self.len = len;
        let groups = u32::try_from(len.div_ceil(PER_EXTENT)).unwrap_or(u32::MAX);
        let pages = self.groups.split_off(&groups).into_values().filter_map(|group| group.page);
        let pages = pages.collect();
        let mut changed = None;
        for (group, _) in borders.into_iter().flatten() {
            let wanted = self.entries_of(group);
            if let Some(content) = self.groups.get_mut(&group)
                && content.entries.len() != wanted
            {
                content.entries.resize(wanted, 0);
                changed = Some(group);
            }
        }
        (cut, pages, changed)
    }

    fn table(&self) -> PageTable {
        let groups = u32::try_from(self.len.div_ceil(PER_EXTENT)).unwrap_or(u32::MAX);
        let mut entries: Vec<(u32, u32)> = Vec::new();
        let mut next = 0;
        for (group, content) in &self.groups {
            if *group > next {
                entries.push((0, group - next));
            }
            entries.push((content.page.unwrap_or(0), 1));
            next = group + 1;
        }
        if groups > next {
            entries.push((0, groups - next));
        }
        PageTable::Table { clusters: self.len, entries }
    }

    fn runs(&self) -> PageTable {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut next = 0;
        let mut add = |cluster: u32, len: u64| {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            match runs.last_mut() {
                Some((first, run))
                    if cluster != 0 && *first != 0 && first.checked_add(*run) == Some(cluster) =>
                {
                    *run += len;
                }
                _ if len > 0 => runs.push((cluster, len)),
                _ => {}
            }
        };
        for (index, cluster) in self.allocated() {
            add(0, index - next);
            add(cluster, 1);
            next = index + 1;
        }
        add(0, self.len - next);
        PageTable::Runs(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_grows_and_shrinks_by_groups() {
        let mut map = Map { len: 600, ..Map::default() };
        assert_eq!([map.set(0, 5), map.set(599, 6), map.set(600, 7)], [Some(0), Some(1), None]);
        map.groups.get_mut(&1).unwrap().page = Some(9);
        assert_eq!([map.entries_of(0), map.entries_of(1)], [512, 88]);
        assert_eq!(map.resize(2000), (vec![], vec![], Some(1)));
        assert_eq!((map.get(599), map.get(1999), map.get(5000)), (6, 0, 0));
        let entries = vec![(0, 1), (9, 1), (0, 2)]; // Group 0 has no page here.
        assert_eq!(map.table(), PageTable::Table { clusters: 2000, entries });
        assert_eq!(map.runs(), PageTable::Runs(vec![(5, 1), (0, 598), (6, 1), (0, 1400)]));
        assert_eq!(map.resize(512), (vec![6], vec![9], None));
        assert_eq!(map.resize(0), (vec![5], vec![], None));
        assert_eq!(map.table(), PageTable::Table { clusters: 0, entries: vec![] });
    }
}
