//! The places of a volume's clusters, as reactors read them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use blobstore::Place;

/// Entries in the first segment, as a power of two.
const FIRST_BITS: u32 = 9;
/// Segments, each twice as long as the one before.
const SEGMENTS: usize = 18;
/// The most clusters of a volume: what [`blobstore::Store::places`] returns at most.
pub(crate) const CLUSTERS_MAX: u64 = 1 << 26;

/// The number of an entry of a cluster that is being given back. No place has it.
const LEAVING: u64 = u64::MAX;

/// An entry of a [`Table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// What the store says.
    At(Place),
    /// The cluster is being given back. It reads as zeroes, and is not zeroed for good yet.
    Leaving,
}

impl Entry {
    fn number(self) -> u64 {
        match self {
            Self::At(place) => place.encode(),
            Self::Leaving => LEAVING,
        }
    }
}

/// A table of the places of clusters. A reactor looks up an entry with two loads. Only the holder of
/// the store's lock changes entries. A table grows and never moves.
#[derive(Debug, Default)]
pub(crate) struct Table([OnceLock<Box<[AtomicU64]>>; SEGMENTS]);

/// The segment of an entry, and its index there.
#[inline]
fn position(index: u64) -> (usize, usize) {
    let shifted = index.saturating_add(1 << FIRST_BITS);
    let bits = shifted.ilog2();
    let offset = shifted - (1 << bits);
    (
        usize::try_from(bits - FIRST_BITS).unwrap_or(SEGMENTS),
        usize::try_from(offset).unwrap_or(usize::MAX),
    )
}

impl Table {
    /// Returns the entry of a cluster. Zeroes beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> Entry {
        let (segment, offset) = position(index);
        let segment = self.0.get(segment).and_then(OnceLock::get);
        // Acquire: what the entry refers to was written before.
        let entry = segment.and_then(|segment| segment.get(offset));
        match entry.map_or(0, |entry| entry.load(Ordering::Acquire)) {
            LEAVING => Entry::Leaving,
            number => Entry::At(Place::decode(number)),
        }
    }

    /// Returns whether the volume has this cluster itself.
    pub(crate) fn is_own(&self, index: u64) -> bool {
        matches!(self.get(index), Entry::At(Place::Own(_)))
    }

    /// Changes the place of a cluster.
    pub(crate) fn set(&self, index: u64, place: Place) {
        self.put(index, Entry::At(place));
    }

    /// Changes the entry of a cluster.
    pub(crate) fn put(&self, index: u64, entry: Entry) {
        let (segment, offset) = position(index);
        let Some(slot) = self.0.get(segment) else { return };
        let number = entry.number();
        if slot.get().is_none() && number == 0 {
            return;
        }
        let entries = slot.get_or_init(|| {
            let len = 1_usize << (segment + FIRST_BITS as usize);
            (0..len).map(|_| AtomicU64::new(0)).collect()
        });
        if let Some(entry) = entries.get(offset) {
            entry.store(number, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(cluster: u64) -> Entry {
        Entry::At(Place::Own(cluster))
    }

    #[test]
    fn entries_are_kept_wherever_they_are() {
        let table = Table::default();
        let indices = [0, 1, 511, 512, 1535, 1536, 100_000];
        for (n, index) in (1..).zip(indices) {
            table.set(index, Place::Own(n));
        }
        for (n, index) in (1..).zip(indices) {
            assert_eq!(table.get(index), own(n), "{index}");
        }
        assert_eq!(table.get(2), Entry::At(Place::Zeroes));
        table.set(511, Place::Inherited(9));
        table.put(0, Entry::Leaving);
        assert_eq!(table.get(511), Entry::At(Place::Inherited(9)));
        assert_eq!((table.get(0), table.get(512)), (Entry::Leaving, own(4)));
        assert!(!table.is_own(0) && table.is_own(512));
    }

    #[test]
    fn the_last_entry_has_room_and_holes_take_no_memory() {
        let (segment, offset) = position(CLUSTERS_MAX - 1);
        assert!(segment < SEGMENTS && offset < 1 << (segment + 9), "{segment} {offset}");
        let table = Table::default();
        table.set(CLUSTERS_MAX - 1, Place::Zeroes);
        table.set(u64::MAX, Place::External);
        assert!(table.0.iter().all(|segment| segment.get().is_none()));
        assert_eq!(table.get(u64::MAX), Entry::At(Place::Zeroes));
    }
}
