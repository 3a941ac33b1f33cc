//! What volumes must read, without any format: volumes have blocks, and a parent for those that
//! they lack. A block may have several values as long as it was not flushed.

use std::collections::{BTreeMap, BTreeSet};

use blobstore::lvs::Lvs;
use blobstore::{Device, Parent, Place};

use crate::medium::now;

/// Blocks of a cluster.
pub(crate) const BLOCKS: usize = 8;
pub(crate) const BLOCK: usize = 512;

/// The values that a block may have: the flushed one, and all that were written since.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cell {
    durable: u64,
    since: Vec<u64>,
}

pub(crate) type Cluster = [Cell; BLOCKS];

#[derive(Debug, Clone, Default)]
pub(crate) struct Volume {
    pub(crate) len: u64,
    pub(crate) parent: Option<String>,
    pub(crate) read_only: bool,
    pub(crate) thin: bool,
    pub(crate) own: BTreeMap<u64, Cluster>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) volumes: BTreeMap<String, Volume>,
}

impl Model {
    pub(crate) fn read(&self, name: &str, index: u64) -> Cluster {
        let mut volume = &self.volumes[name];
        loop {
            if index >= volume.len {
                return Cluster::default();
            }
            if let Some(cluster) = volume.own.get(&index) {
                return cluster.clone();
            }
            let Some(parent) = &volume.parent else { return Cluster::default() };
            volume = &self.volumes[parent];
        }
    }

    pub(crate) fn names(&self, wanted: impl Fn(&Volume) -> bool) -> Vec<String> {
        let found = self.volumes.iter().filter(|(_, volume)| wanted(volume));
        found.map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn clones(&self, name: &str) -> Vec<String> {
        self.names(|volume| volume.parent.as_deref() == Some(name))
    }

    pub(crate) fn get(&mut self, name: &str) -> &mut Volume {
        self.volumes.get_mut(name).unwrap()
    }

    /// All that was written is durable.
    pub(crate) fn flush(&mut self) {
        for volume in self.volumes.values_mut() {
            for cell in volume.own.values_mut().flatten() {
                cell.durable = cell.since.pop().unwrap_or(cell.durable);
                cell.since.clear();
            }
        }
    }

    /// Writes blocks of a cluster, which becomes the volume's own.
    pub(crate) fn write(
        &mut self,
        name: &str,
        index: u64,
        blocks: std::ops::Range<usize>,
        value: u64,
    ) {
        let mut cluster = self.read(name, index);
        cluster[blocks].iter_mut().for_each(|cell| cell.since.push(value));
        self.get(name).own.insert(index, cluster);
    }

    /// Everything that the volume inherits becomes its own.
    pub(crate) fn inflate(&mut self, name: &str) {
        for index in 0..self.volumes[name].len {
            let cluster = self.read(name, index);
            self.get(name).own.insert(index, cluster);
        }
        let volume = self.get(name);
        (volume.parent, volume.thin) = (None, false);
    }

    /// The volume's parent becomes that of its parent, without a change of what it reads.
    pub(crate) fn decouple(&mut self, name: &str) {
        let parent = self.volumes[name].parent.clone().unwrap();
        let above = self.volumes[&parent].clone();
        for index in 0..self.volumes[name].len {
            let hidden = index >= above.len && above.parent.is_some();
            if above.own.contains_key(&index) || hidden {
                let cluster = self.read(name, index);
                self.get(name).own.insert(index, cluster);
            }
        }
        self.get(name).parent = above.parent;
    }

    pub(crate) fn delete(&mut self, name: &str) {
        if let Some(clone) = self.clones(name).first() {
            self.decouple(clone);
        }
        self.volumes.remove(name);
    }

    pub(crate) fn resize(&mut self, name: &str, len: u64) {
        let volume = self.get(name);
        volume.own.retain(|index, _| *index < len);
        if !volume.thin {
            for index in volume.len..len {
                volume.own.insert(index, Cluster::default());
            }
        }
        volume.len = len;
    }

    pub(crate) fn snapshot(&mut self, name: &str, new: &str) {
        let volume = self.get(name);
        let snapshot = Volume { read_only: true, ..volume.clone() };
        volume.own.clear();
        (volume.parent, volume.thin) = (Some(new.to_owned()), true);
        self.volumes.insert(new.to_owned(), snapshot);
    }

    /// What differs between the model and a store, but for contents.
    pub(crate) fn shape<D: Device>(&self, lvs: &Lvs<D>) -> Option<String> {
        let found: BTreeSet<&str> = lvs.volumes().filter_map(|volume| volume.name).collect();
        let wanted: BTreeSet<&str> = self.volumes.keys().map(String::as_str).collect();
        if found != wanted {
            return Some(format!("volumes {found:?} instead of {wanted:?}"));
        }
        for (name, wanted) in &self.volumes {
            let blob = lvs.find(name).unwrap().blob;
            let parent = match blob.parent() {
                Parent::Blob(id) => lvs.volume(id).and_then(|parent| parent.name),
                _ => None,
            };
            let found = (blob.clusters(), parent, blob.flags().read_only(), blob.flags().thin());
            let wanted = (wanted.len, wanted.parent.as_deref(), wanted.read_only, wanted.thin);
            if found != wanted {
                return Some(format!("{name}: {found:?} instead of {wanted:?}"));
            }
        }
        None
    }

    /// Compares all contents. What is found is what blocks must read from now on.
    pub(crate) fn compare<D: Device>(&mut self, lvs: &Lvs<D>) -> Result<(), String> {
        let mut found = Vec::new();
        for (name, volume) in &self.volumes {
            let blob = lvs.find(name).unwrap().blob;
            let places = lvs.store().places(blob.id()).unwrap();
            for index in 0..volume.len {
                let wanted = self.read(name, index);
                let place = places.table[usize::try_from(index).unwrap()];
                let mut values = [0; BLOCKS];
                if let Place::Own(n) | Place::Inherited(n) = Place::decode(place) {
                    let read = lvs.store().device().read(lvs.store().offset(n), BLOCKS * BLOCK);
                    values = values_of(&now(read).unwrap())
                        .ok_or_else(|| format!("{name}, cluster {index}: a block is torn"))?;
                }
                for (at, (cell, value)) in wanted.iter().zip(values).enumerate() {
                    if cell.durable != value && !cell.since.contains(&value) {
                        return Err(format!(
                            "{name}, cluster {index}, block {at}: {value:#x}, not {cell:x?}"
                        ));
                    }
                }
                if volume.own.contains_key(&index) {
                    found.push((name.clone(), index, values));
                }
            }
        }
        for (name, index, values) in found {
            let cells = values.map(|durable| Cell { durable, since: Vec::new() });
            self.get(&name).own.insert(index, cells);
        }
        Ok(())
    }
}

/// The content of a block that has this value.
pub(crate) fn block(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(BLOCK / 8)
}

fn values_of(cluster: &[u8]) -> Option<[u64; BLOCKS]> {
    let mut values = [0; BLOCKS];
    for (value, block) in values.iter_mut().zip(cluster.chunks(BLOCK)) {
        *value = u64::from_le_bytes(block[..8].try_into().ok()?);
        if block.chunks(8).any(|word| word != value.to_le_bytes()) {
            return None;
        }
    }
    Some(values)
}
