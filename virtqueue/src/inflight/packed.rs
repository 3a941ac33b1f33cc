//! A packed queue's part of an in-flight area: `QueueRegionPacked` in the vhost-user specification.
//!
//! Each entry is a copy of a descriptor, in flight or free. The copies are necessary because the
//! device overwrites the ring's descriptors with used ones, which belong to other requests. The
//! header of the part has two positions and two heads of the free list: the current ones, and those
//! before the last batch ("old"). The ring shows whether that batch was published.
//!
//! Both positions with their wrap counters are stored as one word. The specification lists them as
//! separate fields, but a process that is killed between two stores would leave an index with the
//! wrong wrap counter.

use super::region::Region;
use super::{Batch, Damage, Recovery, VERSION, sort_by_counter};
use crate::desc::{CHAIN_MAX, Desc};

/// Offsets in the header of the part. One entry of `ENTRY_BYTES` for each descriptor follows it.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
/// `free_head` and `old_free_head`.
const FREE_HEADS: usize = 12;
const OLD_FREE_HEAD: usize = 14;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and two bytes of
/// padding.
const POSITIONS: usize = 16;
const HEAD_BYTES: usize = 32;

/// Offsets in an entry. `inflight`, a byte of padding, `next`, `last` and `num` form one word.
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
/// `id`, `flags` and `len` form one word.
const ID: usize = 16;
const ADDR: usize = 24;
const ENTRY_BYTES: usize = 32;

const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
/// The wrap counter of a position.
const WRAP: u16 = 1 << 15;

/// Size of a queue's part in bytes.
pub(super) fn bytes(entries: u16) -> usize {
    HEAD_BYTES + ENTRY_BYTES * usize::from(entries)
}

/// The offset of a field of an entry.
#[inline]
fn at(entry: u16, field: usize) -> usize {
    HEAD_BYTES + ENTRY_BYTES * usize::from(entry) + field
}

/// Joins four half-words, in the order of memory.
#[inline]
fn word(halves: [u16; 4]) -> u64 {
    let mut bytes = [0; 8];
    for (to, half) in bytes.chunks_exact_mut(2).zip(halves) {
        to.copy_from_slice(&half.to_ne_bytes());
    }
    u64::from_ne_bytes(bytes)
}

/// The inverse of [`word`].
#[inline]
fn halves(word: u64) -> [u16; 4] {
    let bytes = word.to_ne_bytes();
    std::array::from_fn(|n| u16::from_ne_bytes([bytes[2 * n], bytes[2 * n + 1]]))
}

/// The word of both positions.
#[inline]
fn positions(used: u16, old: u16) -> u64 {
    let wraps = u16::from_ne_bytes([u8::from(used & WRAP != 0), u8::from(old & WRAP != 0)]);
    word([used & !WRAP, old & !WRAP, wraps, 0])
}

/// The inverse of [`positions`].
fn from_positions(word: u64) -> (u16, u16) {
    let [used, old, wraps, _] = halves(word);
    let [used_wrap, old_wrap] = wraps.to_ne_bytes();
    let position = |index, wrap| (index & !WRAP) | if wrap == 0 { 0 } else { WRAP };
    (position(used, used_wrap), position(old, old_wrap))
}

/// The tracker of a packed queue.
#[derive(Debug)]
pub(super) struct Packed {
    region: Region,
    counter: u64,
    /// The first entry of the free list. Not an entry if the list is empty.
    free_head: u16,
    /// The position up to which requests are published.
    used: u16,
    /// Entries that were put and not published. The area does not record a put before its
    /// publication: fetches continue to use the free list meanwhile, and a return to the old head
    /// of the free list undoes an unpublished batch.
    batch: Batch,
}

impl Packed {
    /// Returns `None` if `base` is outside of the ring.
    pub(super) fn begin(
        region: Region,
        size: u16,
        base: u16,
        flags: impl Fn(u16) -> u16,
    ) -> Option<(Self, Recovery)> {
        if base & !WRAP >= size {
            return None;
        }
        let version = region.load_u16(VERSION_AT);
        let found = match version {
            0 => Ok(None),
            VERSION => recover(&region, size, base, flags).map(Some),
            _ => Err((Damage::Version(version), base)),
        };
        let (found, used, damage) = match found {
            Ok(Some(found)) => (found, None, None),
            Ok(None) => (Found::default(), Some(base), None),
            Err((damage, used)) => (Found::default(), Some(used), Some(damage)),
        };
        if let Some(used) = used {
            // If the process is killed from here on, the part is uninitialised.
            region.store_u16(VERSION_AT, 0);
            for entry in 0..region.entries() {
                unmark(&region, entry);
            }
            region.store_u64(FEATURES, 0);
            region.store_u64(POSITIONS, positions(used, used));
        }
        let free_head = link_free_list(&region, &found.taken);
        region.store_u32(FREE_HEADS, heads(free_head, free_head));
        region.store_u16(DESC_NUM, region.entries());
        region.store_u16(VERSION_AT, VERSION);

        let used = used.unwrap_or(found.used);
        let (resubmissions, counter) = sort_by_counter(found.chains);
        let last_avail = advance(used, found.descriptors, size);
        let batch = Batch::new(region.entries());
        let recovery = Recovery { used, last_avail, resubmissions, damage };
        Some((Self { region, counter, free_head, used, batch }, recovery))
    }

    /// Only the last store removes the entries from the free list. The mark is stored just before
    /// it, because rte_vhost does not look for marks in the free list.
    #[inline]
    pub(super) fn fetched(&mut self, descs: impl Iterator<Item = Desc>) -> Option<u16> {
        let region = &self.region;
        let head = self.free_head;
        let (mut free, mut last, mut num, mut second) = (head, head, 0_u16, head);
        for desc in descs {
            if free >= region.entries() || num >= region.entries() {
                return None;
            }
            region.store_u64(at(free, ADDR), desc.addr);
            let len = desc.len.to_ne_bytes();
            let (low, high) = ([len[0], len[1]], [len[2], len[3]]);
            let (low, high) = (u16::from_ne_bytes(low), u16::from_ne_bytes(high));
            region.store_u64(at(free, ID), word([desc.tag, desc.flags, low, high]));
            last = free;
            free = region.load_u16(at(free, NEXT));
            if num == 0 {
                second = free;
            }
            num += 1;
        }
        if num == 0 {
            return None;
        }
        region.store_u64(at(head, COUNTER), self.counter);
        let marked = u16::from_ne_bytes([1, 0]);
        region.store_u64(at(head, INFLIGHT), word([marked, second, last, num]));
        region.store_u32(FREE_HEADS, heads(free, free));
        self.counter = self.counter.wrapping_add(1);
        self.free_head = free;
        Some(head)
    }

    #[inline]
    pub(super) fn put(&mut self, entry: u16) {
        if entry < self.region.entries() {
            self.batch.push(entry);
        }
    }

    /// Until the last store but one, nothing has changed for the next process. After the last
    /// store, the ring shows whether the batch was published.
    #[inline]
    pub(super) fn publishing(&mut self, used: u16) {
        let region = &self.region;
        let old = self.free_head;
        for &entry in &self.batch.0 {
            let last = region.load_u16(at(entry, LAST));
            // If it is out of range, the front end has corrupted it, and the entries are lost until
            // the next process begins.
            if last < region.entries() {
                region.store_u16(at(last, NEXT), self.free_head);
                self.free_head = entry;
            }
        }
        region.store_u32(FREE_HEADS, heads(self.free_head, old));
        region.store_u64(POSITIONS, positions(used, self.used));
    }

    #[inline]
    pub(super) fn published(&mut self, used: u16) {
        let region = &self.region;
        for &entry in &self.batch.0 {
            region.store_u8(at(entry, INFLIGHT), 0);
        }
        self.batch.0.clear();
        // The positions are stored last: while they differ, the next process checks the ring.
        region.store_u16(OLD_FREE_HEAD, self.free_head);
        region.store_u64(POSITIONS, positions(used, used));
        self.used = used;
    }

    pub(super) fn descs(&self, entry: u16, mut visit: impl FnMut(Desc)) -> bool {
        let region = &self.region;
        if entry >= region.entries() {
            return false;
        }
        let num = region.load_u16(at(entry, NUM));
        if num == 0 || num > region.entries().min(CHAIN_MAX) {
            return false;
        }
        let mut entry = entry;
        for _ in 0..num {
            if entry >= region.entries() {
                return false;
            }
            let [tag, flags, low, high] = halves(region.load_u64(at(entry, ID)));
            let ([a, b], [c, d]) = (low.to_ne_bytes(), high.to_ne_bytes());
            let len = u32::from_ne_bytes([a, b, c, d]);
            visit(Desc { addr: region.load_u64(at(entry, ADDR)), len, flags, tag });
            entry = region.load_u16(at(entry, NEXT));
        }
        true
    }
}

/// The word of both heads of the free list.
#[inline]
fn heads(now: u16, old: u16) -> u32 {
    let ([a, b], [c, d]) = (now.to_ne_bytes(), old.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// The position `by` descriptors, at most `size`, after `position`.
fn advance(position: u16, by: u16, size: u16) -> u16 {
    let (index, wrap) = (position & !WRAP, position & WRAP);
    if by < size - index { (index + by) | wrap } else { (by - (size - index)) | (wrap ^ WRAP) }
}

/// The contents of an area.
#[derive(Default)]
struct Found {
    used: u16,
    /// Counters and heads of the chains in flight.
    chains: Vec<(u64, u16)>,
    /// For each entry, whether it is part of a chain in flight. Empty for an uninitialised part.
    taken: Vec<bool>,
    /// Number of entries that are part of a chain in flight.
    descriptors: u16,
}

/// Reads the queue's position and the chains in flight. If they are damaged, returns the position
/// at which to initialise the part again.
fn recover(
    region: &Region,
    size: u16,
    base: u16,
    flags: impl Fn(u16) -> u16,
) -> Result<Found, (Damage, u16)> {
    let (used, old) = from_positions(region.load_u64(POSITIONS));
    for position in [used, old] {
        if position & !WRAP >= size {
            return Err((Damage::Position(position), base));
        }
    }
    // The last batch is valid if it was published.
    let published = used != old && !is_available(flags(old), old);
    let [a, b, c, d] = region.load_u32(FREE_HEADS).to_ne_bytes();
    let (head, position) = if published { ([a, b], used) } else { ([c, d], old) };
    let free_head = u16::from_ne_bytes(head);
    // The positions are stored last: while they differ, the next process checks the ring.
    region.store_u32(FREE_HEADS, heads(free_head, free_head));
    region.store_u64(POSITIONS, positions(position, position));
    unmark_free_list(region, free_head);
    let found = find_marked(region, position, size);
    found.map_err(|damage| (damage, position))
}

/// Returns whether a descriptor with `flags` is available to a device at `position`.
fn is_available(flags: u16, position: u16) -> bool {
    let wrap = position & WRAP != 0;
    (flags & DESC_F_AVAIL != 0) == wrap && (flags & DESC_F_USED != 0) != wrap
}

fn unmark(region: &Region, entry: u16) {
    if region.load_u8(at(entry, INFLIGHT)) != 0 {
        region.store_u8(at(entry, INFLIGHT), 0);
    }
}

/// Removes the marks from the entries of the free list. A mark may be left there by a batch that
/// was published, or by a fetch that was not finished. The walk ends if the list loops.
fn unmark_free_list(region: &Region, head: u16) {
    let mut seen = vec![false; region.entries().into()];
    let mut entry = head;
    while let Some(seen @ false) = seen.get_mut(usize::from(entry)) {
        *seen = true;
        unmark(region, entry);
        entry = region.load_u16(at(entry, NEXT));
    }
}

/// Finds the marked chains.
fn find_marked(region: &Region, used: u16, size: u16) -> Result<Found, Damage> {
    let taken = vec![false; region.entries().into()];
    let mut found = Found { used, taken, ..Found::default() };
    for head in 0..region.entries() {
        if region.load_u8(at(head, INFLIGHT)) != 1 {
            continue;
        }
        let num = region.load_u16(at(head, NUM));
        let mut entry = head;
        for _ in 0..num {
            let taken = found.taken.get_mut(usize::from(entry));
            let new = taken.is_some_and(|taken| !std::mem::replace(taken, true));
            if !new || found.descriptors == size {
                return Err(Damage::Chain(head));
            }
            found.descriptors += 1;
            entry = region.load_u16(at(entry, NEXT));
        }
        if num == 0 {
            return Err(Damage::Chain(head));
        }
        found.chains.push((region.load_u64(at(head, COUNTER)), head));
    }
    Ok(found)
}

/// Links all entries that are not in flight to a free list. Returns its head. If the process is
/// killed during this, the list is neither the old nor the new one, but none of its entries is
/// marked.
fn link_free_list(region: &Region, taken: &[bool]) -> u16 {
    let mut next = region.entries();
    for entry in (0..region.entries()).rev() {
        if taken.get(usize::from(entry)) != Some(&true) {
            if region.load_u16(at(entry, NEXT)) != next {
                region.store_u16(at(entry, NEXT), next);
            }
            next = entry;
        }
    }
    next
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
