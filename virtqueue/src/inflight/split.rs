//! A split queue's part of an in-flight area: `QueueRegionSplit` in the vhost-user specification.

use super::region::Region;
use super::{Batch, Damage, Recovery, VERSION, sort_by_counter};

/// Offsets in the header of the part. One entry of `ENTRY_BYTES` for each descriptor follows it.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEAD_BYTES: usize = 16;

/// Offsets in an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
const ENTRY_BYTES: usize = 16;

/// Size of a queue's part in bytes.
pub(super) fn bytes(entries: u16) -> usize {
    HEAD_BYTES + ENTRY_BYTES * usize::from(entries)
}

/// The offset of a field of an entry.
#[inline]
fn at(entry: u16, field: usize) -> usize {
    HEAD_BYTES + ENTRY_BYTES * usize::from(entry) + field
}

/// The tracker of a split queue.
#[derive(Debug)]
pub(super) struct Split {
    region: Region,
    counter: u64,
    /// The head that was put last.
    last: u16,
    batch: Batch,
}

impl Split {
    /// `used_idx` is the ring's used index, which includes all that a killed process has published.
    /// Its difference to the area's own index is the number of published requests that may still be
    /// marked.
    pub(super) fn begin(region: Region, size: u16, used_idx: u16) -> (Self, Recovery) {
        let mut damage = None;
        let version = region.load_u16(VERSION_AT);
        if version == VERSION {
            damage = unmark_last_batch(&region, used_idx).err();
            region.store_u16(USED_IDX, used_idx);
            region.store_u16(DESC_NUM, region.entries());
        } else {
            if version != 0 {
                damage = Some(Damage::Version(version));
                // If the process is killed from here on, the part is uninitialised.
                region.store_u16(VERSION_AT, 0);
            }
            initialise(&region, used_idx);
        }
        let mut requests = Vec::new();
        for entry in 0..region.entries() {
            if region.load_u8(at(entry, INFLIGHT)) != 1 {
                continue;
            }
            if entry < size {
                requests.push((region.load_u64(at(entry, COUNTER)), entry));
            } else {
                region.store_u8(at(entry, INFLIGHT), 0);
                damage = Some(Damage::Outside(entry));
            }
        }
        let (resubmissions, counter) = sort_by_counter(requests);
        let count =
            u16::try_from(resubmissions.len()).expect("the part has at most 65,535 entries");
        let last_avail = used_idx.wrapping_add(count);
        let batch = Batch::new(region.entries());
        let recovery = Recovery { used: used_idx, last_avail, resubmissions, damage };
        (Self { region, counter, last: 0, batch }, recovery)
    }

    #[inline]
    pub(super) fn fetched(&mut self, head: u16) {
        if head < self.region.entries() {
            self.region.store_u64(at(head, COUNTER), self.counter);
            self.region.store_u8(at(head, INFLIGHT), 1);
            self.counter = self.counter.wrapping_add(1);
        }
    }

    #[inline]
    pub(super) fn put(&mut self, head: u16) {
        if head < self.region.entries() {
            self.region.store_u16(at(head, NEXT), self.last);
            self.last = head;
            self.batch.push(head);
        }
    }

    #[inline]
    pub(super) fn publishing(&mut self) {
        self.region.store_u16(LAST_BATCH_HEAD, self.last);
    }

    #[inline]
    pub(super) fn published(&mut self, used: u16) {
        for &head in &self.batch.0 {
            self.region.store_u8(at(head, INFLIGHT), 0);
        }
        self.batch.0.clear();
        // Until this store, the whole batch is considered marked.
        self.region.store_u16(USED_IDX, used);
    }
}

/// Removes the marks of requests that were published and not unmarked. Their number is the
/// difference between the ring's used index and the area's.
fn unmark_last_batch(region: &Region, used_idx: u16) -> Result<(), Damage> {
    let count = used_idx.wrapping_sub(region.load_u16(USED_IDX));
    let inconsistent = Damage::LastBatch(count);
    if count > region.entries() {
        return Err(inconsistent);
    }
    let mut batch = Vec::with_capacity(count.into());
    let mut seen = vec![false; region.entries().into()];
    let mut head = if count > 0 { region.load_u16(LAST_BATCH_HEAD) } else { 0 };
    for _ in 0..count {
        let new =
            seen.get_mut(usize::from(head)).is_some_and(|seen| !std::mem::replace(seen, true));
        if !new {
            return Err(inconsistent);
        }
        batch.push(head);
        head = region.load_u16(at(head, NEXT));
    }
    for head in batch {
        region.store_u8(at(head, INFLIGHT), 0);
    }
    Ok(())
}

/// Initialises the part. Its index is the ring's used index, which may be greater than zero.
/// rte_vhost stores 0, and the next process loses a request at descriptor 0 (SPDK issue 3766).
fn initialise(region: &Region, used_idx: u16) {
    for entry in 0..region.entries() {
        if region.load_u8(at(entry, INFLIGHT)) != 0 {
            region.store_u8(at(entry, INFLIGHT), 0);
        }
    }
    region.store_u64(FEATURES, 0);
    region.store_u16(DESC_NUM, region.entries());
    region.store_u16(LAST_BATCH_HEAD, 0);
    region.store_u16(USED_IDX, used_idx);
    region.store_u16(VERSION_AT, VERSION);
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
