//! Where a cluster of a blob is read.

use super::Store;
use super::blob::{Map, Parent, place_of};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::BlobId;

/// Where a cluster of a blob is read. Cluster numbers count from the beginning of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// From a cluster that belongs to the blob: it may be written in place.
    Own(u64),
    /// From a cluster of a snapshot.
    Inherited(u64),
    /// From the external snapshot at the end of the chain of parents, at the same offset.
    External,
    /// There is none: it reads as zeroes.
    Zeroes,
}

/// The longest table that is made, 512 MiB: enough for 256 TiB in clusters of 4 MiB.
const TABLE_LONGEST: u64 = 1 << 26;

const INHERITED: u64 = 1 << 63;
const EXTERNAL: u64 = 1 << 62;

impl Place {
    /// As one number: 0 for zeroes, a cluster number for an own one.
    pub fn encode(self) -> u64 {
        match self {
            Self::Own(cluster) => cluster,
            Self::Inherited(cluster) => cluster | INHERITED,
            Self::External => EXTERNAL,
            Self::Zeroes => 0,
        }
    }

    /// The place that [`Self::encode`] made a number of.
    pub fn decode(number: u64) -> Self {
        match number {
            0 => Self::Zeroes,
            n if n & INHERITED != 0 => Self::Inherited(n & !INHERITED),
            n if n & EXTERNAL != 0 => Self::External,
            n => Self::Own(n),
        }
    }
}

/// The places of all clusters of a blob, at the time of the call: see [`Place::decode`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// One number for each cluster.
    pub table: Vec<u64>,
    /// The external snapshot that [`Place::External`] means.
    pub external: Option<Vec<u8>>,
}

impl<D: Device> Store<D> {
    /// Where the cluster `index` of a blob is read; zeroes beyond its end.
    pub fn resolve(&self, id: BlobId, index: u64) -> Result<Place> {
        let own = u64::from(self.blob(id)?.map.get(index));
        if own != 0 && !self.unwritten_of(id).contains(&index) {
            return Ok(Place::Own(own));
        }
        Ok(self.inherited(self.blob(id)?.map.len, &self.blob(id)?.parent(), index))
    }

    /// Indices at which a change that has failed may or may not have given the blob a cluster.
    fn unwritten_of(&self, id: BlobId) -> &[u64] {
        self.unwritten.as_ref().filter(|(of, _)| *of == id).map_or(&[], |(_, indices)| indices)
    }

    /// What a blob of `len` clusters with the parent `parent` inherits at `index`.
    pub(super) fn inherited(&self, mut len: u64, parent: &Parent, index: u64) -> Place {
        let mut parent = parent.clone();
        // There is no circle: loading and all operations see to it.
        loop {
            match parent {
                _ if index >= len => return Place::Zeroes,
                Parent::None => return Place::Zeroes,
                Parent::External(_) => return Place::External,
                Parent::Blob(id) => {
                    let Some(blob) = self.blobs.get(&id) else { return Place::Zeroes };
                    let cluster = blob.map.get(index);
                    if cluster != 0 {
                        return Place::Inherited(u64::from(cluster));
                    }
                    len = len.min(blob.map.len);
                    parent = blob.parent();
                }
            }
        }
    }

    /// The external snapshot at the end of the chain of parents.
    pub fn external(&self, id: BlobId) -> Result<Option<Vec<u8>>> {
        let mut parent = self.blob(id)?.parent();
        while let Parent::Blob(id) = parent {
            parent = self.blob(id)?.parent();
        }
        Ok(if let Parent::External(id) = parent { Some(id) } else { None })
    }

    /// The places of all clusters of a blob. Takes 8 bytes for each. Fails for a blob of more than
    /// 2^26 clusters.
    pub fn places(&self, id: BlobId) -> Result<Places> {
        let mut blob = self.blob(id)?;
        let too_large = Error::Invalid("the blob is too large for a table");
        let len = usize::try_from(blob.map.len.min(TABLE_LONGEST + 1)).unwrap_or(usize::MAX);
        let mut table = Vec::new();
        if blob.map.len > TABLE_LONGEST || table.try_reserve_exact(len).is_err() {
            return Err(too_large);
        }
        table.resize(len, 0);
        let mut visible = blob.map.len;
        fill(&mut table, visible, &blob.map, 0);
        for index in self.unwritten_of(id) {
            let place = usize::try_from(*index).ok().and_then(|index| table.get_mut(index));
            place.into_iter().for_each(|place| *place = 0);
        }
        let external = loop {
            match blob.parent() {
                Parent::None => break None,
                Parent::External(external) => {
                    let visible = usize::try_from(visible).unwrap_or(len).min(len);
                    let holes = table[..visible].iter_mut().filter(|place| **place == 0);
                    holes.for_each(|place| *place = EXTERNAL);
                    break Some(external);
                }
                Parent::Blob(parent) => {
                    blob = self.blob(parent)?;
                    visible = visible.min(blob.map.len);
                    fill(&mut table, visible, &blob.map, INHERITED);
                }
            }
        };
        Ok(Places { table, external })
    }
}

/// Writes the clusters of `map` below `visible` where `table` has none.
fn fill(table: &mut [u64], visible: u64, map: &Map, mark: u64) {
    for (index, cluster) in map.allocated().take_while(|(index, _)| *index < visible) {
        let place = usize::try_from(index).ok().and_then(|index| table.get_mut(index));
        if let Some(place) = place.filter(|place| **place == 0) {
            *place = u64::from(cluster) | mark;
        }
    }
}

/// The groups of a list of indices, without duplicates.
pub(super) fn groups_of(indices: impl Iterator<Item = u64>) -> Vec<u32> {
    let mut groups: Vec<u32> = indices.filter_map(place_of).map(|(group, _)| group).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_numbers() {
        for place in [Place::Own(7), Place::Inherited(7), Place::External, Place::Zeroes] {
            assert_eq!(Place::decode(place.encode()), place);
        }
    }
}
