//! The places of a volume's clusters, as reactors read them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use blobstore::Place;

/// Entries in the first segment, as a power of two.
const FIRST_BITS: u32 = 9;
/// Segments, each twice as long as the one before: 2^26 entries, the most that
/// [`blobstore::Store::places`] returns.
const SEGMENTS: usize = 18;

/// A table of [`Place`]s. A reactor looks up an entry with two loads. Only the holder of the store's
/// lock changes entries. A table grows and never moves.
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
    /// Returns the place of a cluster. Zeroes beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> Place {
        let (segment, offset) = position(index);
        let segment = self.0.get(segment).and_then(OnceLock::get);
        // Acquire: what the entry refers to was written before.
        let entry = segment.and_then(|segment| segment.get(offset));
        Place::decode(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    /// Changes the place of a cluster.
    pub(crate) fn set(&self, index: u64, place: Place) {
        let (segment, offset) = position(index);
        let Some(slot) = self.0.get(segment) else { return };
        let number = place.encode();
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

    #[test]
    fn entries_are_kept_wherever_they_are() {
        let table = Table::default();
        let indices = [0, 1, 511, 512, 1535, 1536, 100_000];
        for (n, index) in (1..).zip(indices) {
            table.set(index, Place::Own(n));
        }
        for (n, index) in (1..).zip(indices) {
            assert_eq!(table.get(index), Place::Own(n), "{index}");
        }
        assert_eq!(table.get(2), Place::Zeroes);
        table.set(511, Place::Inherited(9));
        assert_eq!((table.get(511), table.get(512)), (Place::Inherited(9), Place::Own(4)));
    }

    #[test]
    fn the_last_entry_is_the_longest_table_s_and_holes_take_no_memory() {
        let last = (1 << 26) - 1;
        let (segment, offset) = position(last);
        assert!(segment < SEGMENTS && offset < 1 << (segment + 9), "{segment} {offset}");
        let table = Table::default();
        table.set(last, Place::Zeroes);
        table.set(u64::MAX, Place::External);
        assert!(table.0.iter().all(|segment| segment.get().is_none()));
        assert_eq!((table.get(last), table.get(u64::MAX)), (Place::Zeroes, Place::Zeroes));
    }
}
