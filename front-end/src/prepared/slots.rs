//! The memory of a queue's requests: each slot's header, answer, data and indirect table.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::blk::Blk;
use super::form::{Form, LINE, Place};
use crate::descriptor::{Descriptor, NEXT, WRITE};
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment, Window};
use crate::packed::put_entry;
use crate::ring::RingLayout;
use crate::split::put;
use crate::words::words;

/// The bit at which the flags begin in the second word of a split ring's descriptor, and of a
/// packed one's.
pub(crate) const SPLIT_FLAGS_AT: u32 = 32;
pub(crate) const PACKED_FLAGS_AT: u32 = 48;
const DESCRIPTOR_BYTES: u32 = 16;
/// Blocks of at least a page begin at a page boundary, so that each block lies in as few pages as
/// possible.
const PAGE: u64 = 4096;

/// The memory of all requests that may be in flight, laid out once.
#[derive(Debug)]
pub struct Slots<F = Blk> {
    form: F,
    heads: Window,
    tables: Option<Window>,
    buffers: Vec<Segment>,
    segment_bytes: u32,
}

impl Slots {
    /// Allocates memory for `count` requests of virtio-blk: see [`Slots::with`].
    ///
    /// # Errors
    /// No guest memory is left.
    pub fn new(
        ram: &Arc<GuestRam>,
        count: usize,
        block_bytes: u32,
        segment_bytes: u32,
        indirect: bool,
    ) -> Result<Self> {
        Self::with(Blk, ram, count, (block_bytes, segment_bytes), indirect)
    }
}

impl<F: Form> Slots<F> {
    /// Allocates memory for `count` requests of `block_bytes`, in data segments of at most
    /// `segment_bytes`; with an indirect table for each if `indirect`.
    ///
    /// # Errors
    /// No guest memory is left.
    pub fn with(
        form: F,
        ram: &Arc<GuestRam>,
        count: usize,
        (block_bytes, segment_bytes): (u32, u32),
        indirect: bool,
    ) -> Result<Self> {
        let align = u64::from(block_bytes).next_power_of_two().min(PAGE);
        let buffers = (0..count).map(|_| ram.alloc(block_bytes, align)).collect::<Result<_>>()?;
        let too_many = |_| Error::NoRam(Self::bytes(count, block_bytes, segment_bytes));
        let count = u32::try_from(count).map_err(too_many)?;
        let table_bytes = parts(block_bytes, segment_bytes).next_power_of_two() * DESCRIPTOR_BYTES;
        let tables = indirect.then(|| ram.window(table_bytes * count, PAGE)).transpose()?;
        let heads = ram.window(F::PLACE_BYTES * count, u64::from(LINE))?;
        Ok(Self { form, heads, tables, buffers, segment_bytes })
    }

    /// Returns the most memory that [`Slots::with`] takes for these requests.
    pub fn bytes(count: usize, block_bytes: u32, segment_bytes: u32) -> u64 {
        let parts = u64::from(parts(block_bytes, segment_bytes).next_power_of_two());
        let align = u64::from(block_bytes).next_power_of_two().min(PAGE);
        let block = u64::from(block_bytes).next_multiple_of(align);
        let each = block + parts * u64::from(DESCRIPTOR_BYTES) + u64::from(F::PLACE_BYTES);
        count as u64 * each + 3 * PAGE
    }

    /// Returns the number of slots.
    pub fn count(&self) -> usize {
        self.buffers.len()
    }

    /// Returns each slot's data.
    pub fn buffers(&self) -> &[Segment] {
        &self.buffers
    }

    /// Returns whether requests are in indirect tables.
    pub(crate) fn is_indirect(&self) -> bool {
        self.tables.is_some()
    }

    /// Returns the number of descriptors of one request: header, data, answer.
    pub fn parts(&self) -> usize {
        self.buffers.first().map_or(2, |buffer| parts(buffer.len, self.segment_bytes) as usize)
    }

    /// Returns the descriptors of the request in `slot`, with NEXT in all but the last one. The
    /// caller sets `next`.
    pub fn descriptors(&self, slot: usize, write: bool) -> impl Iterator<Item = Descriptor> {
        let place = self.heads.gpa() + slot as u64 * u64::from(F::PLACE_BYTES);
        let part = |addr, len, flags| Descriptor { addr, len, flags, next: 0 };
        let header = part(place + F::HEADER_AT as u64, F::HEADER_BYTES, NEXT);
        let answer_first = F::ANSWER_FIRST && !write;
        let answer_flags = WRITE | if answer_first { NEXT } else { 0 };
        let answer = part(place + F::ANSWER_AT as u64, F::ANSWER_BYTES, answer_flags);
        let data_flags = if write { 0 } else { WRITE };
        let (Segment { gpa, len }, most) = (self.buffers[slot], self.segment_bytes);
        let data = (0..len).step_by(most as usize).map(move |from| {
            let is_last = answer_first && len - from <= most;
            let flags = data_flags | if is_last { 0 } else { NEXT };
            part(gpa + u64::from(from), most.min(len - from), flags)
        });
        let [before, behind] = [answer_first, !answer_first].map(|on| on.then_some(answer));
        std::iter::once(header).chain(before).chain(data).chain(behind)
    }

    /// Writes the indirect table of the request in `slot`, and returns a descriptor for it without
    /// flags. Returns `None` if requests are not in tables.
    pub(crate) fn lay_table(
        &self,
        slot: usize,
        layout: RingLayout,
        write: bool,
    ) -> Option<Descriptor> {
        let tables = self.tables.as_ref()?;
        let count = parts(self.buffers[slot].len, self.segment_bytes);
        let first = slot * count.next_power_of_two() as usize;
        for (next, (i, mut part)) in (1..).zip(self.descriptors(slot, write).enumerate()) {
            match layout {
                RingLayout::Split => {
                    part.next = if u32::from(next) < count { next } else { 0 };
                    put(words(tables), first + i, part.split());
                }
                RingLayout::Packed => {
                    put_entry(words(tables), first + i, part.addr, part.len, part.flags & WRITE);
                }
            }
        }
        let addr = tables.gpa() + first as u64 * u64::from(DESCRIPTOR_BYTES);
        Some(Descriptor { addr, len: count * DESCRIPTOR_BYTES, flags: 0, next: 0 })
    }

    /// Returns the descriptors in the table of `slot`, if there are tables, as two words each.
    #[inline]
    pub(crate) fn table(&self, slot: usize) -> Option<&[AtomicU64]> {
        let first = slot * self.parts().next_power_of_two();
        Some(&words(self.tables.as_ref()?)[2 * first..][..2 * self.parts()])
    }

    /// Returns the headers and answers of reads, for the measuring loop.
    pub fn heads(&self) -> impl Iterator<Item = F::Head<'_>> {
        let place_bytes = F::PLACE_BYTES as usize;
        let wide = words::<AtomicU64>(&self.heads).chunks_exact(place_bytes / 8);
        let bytes = words::<AtomicU8>(&self.heads).chunks_exact(place_bytes);
        let places = wide.zip(bytes).map(|(words, bytes)| Place { words, bytes });
        let requests = places.zip(&self.buffers).enumerate();
        requests.map(|(slot, (place, buffer))| self.form.head(place, slot, buffer.len))
    }
}

/// Makes the data of a request readable for the device (a write request) or writable (a read
/// request). `words` are the request's descriptors, two words each, whose flags begin at bit
/// `flags_at` of the second word.
#[inline]
pub(crate) fn set_data_kind(words: &[AtomicU64], flags_at: u32, write: bool) {
    let flag = u64::from(WRITE) << flags_at;
    let (descriptors, _) = words.as_chunks::<2>();
    // All descriptors but header and status.
    let data = descriptors.get(1..descriptors.len().saturating_sub(1)).unwrap_or_default();
    for [_, rest] in data {
        let others = rest.load(Ordering::Relaxed) & !flag;
        rest.store(if write { others } else { others | flag }, Ordering::Relaxed);
    }
}

fn parts(block_bytes: u32, segment_bytes: u32) -> u32 {
    block_bytes.div_ceil(segment_bytes) + 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepared::Scsi;

    #[test]
    fn a_request_has_header_data_and_status() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let slots = Slots::new(&ram, 3, 10_240, 4096, false).unwrap();
        assert_eq!((slots.parts(), slots.lay_table(0, RingLayout::Split, false)), (5, None));
        let read: Vec<_> = slots.descriptors(2, false).collect();
        let buffer = slots.buffers()[2].gpa;
        let told: Vec<_> = read.iter().map(|part| (part.len, part.flags)).collect();
        let data = NEXT | WRITE;
        assert_eq!(told, [(16, NEXT), (4096, data), (4096, data), (2048, data), (1, WRITE)]);
        assert_eq!([read[1].addr, read[3].addr], [buffer, buffer + 8192]);
        assert_eq!(read[4].addr, read[0].addr + 16);
        assert!(slots.descriptors(2, true).all(|part| part.len < 2048 || part.flags == NEXT));
    }

    #[test]
    fn tables_hold_the_same_descriptors_linked() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let slots = Slots::new(&ram, 4, 8192, 4096, true).unwrap();
        for slot in 0..4 {
            let table = slots.lay_table(slot, RingLayout::Split, false).unwrap();
            assert_eq!(table.len, 64);
            let write = slot % 2 == 1;
            set_data_kind(slots.table(slot).unwrap(), SPLIT_FLAGS_AT, write);
            for (i, part) in slots.descriptors(slot, write).enumerate() {
                let mut bytes = [0; 16];
                ram.read(table.addr + 16 * i as u64, &mut bytes).unwrap();
                let next = [1, 2, 3, 0][i];
                assert_eq!(bytes[..8], part.addr.to_le_bytes());
                assert_eq!(bytes[8..12], part.len.to_le_bytes());
                assert_eq!(bytes[12..14], part.flags.to_le_bytes());
                assert_eq!(bytes[14..], [next, 0]);
            }
        }
    }

    #[test]
    fn the_computed_memory_is_sufficient() {
        for (count, block, segment) in [(1, 512, 512), (256, 4096, 4096), (3, 1 << 20, 65536)] {
            let bytes = Slots::<Blk>::bytes(count, block, segment).next_multiple_of(4096);
            let ram = GuestRam::new(&[bytes]).unwrap();
            Slots::new(&ram, count, block, segment, true).unwrap();
            let form = Scsi { lun: [0; 8], block_bytes: 512 };
            let bytes = Slots::<Scsi>::bytes(count, block, segment).next_multiple_of(4096);
            let ram = GuestRam::new(&[bytes]).unwrap();
            Slots::with(form, &ram, count, (block, segment), true).unwrap();
        }
    }
}
