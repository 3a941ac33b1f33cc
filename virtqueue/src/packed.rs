//! Packed virtqueues (virtio 1.2, section 2.8).
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use guest_memory::{DirtyLog, GuestMemory, Near};
use qsbr::handshake::{full_fence, store_then_load};

use crate::cache;
use crate::desc::{
    Buffer, CHAIN_MAX, ChainError, DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc,
    RING_SIZE_MAX, Table,
};
use crate::inflight::Tracker;
use crate::ring::{Chained, Ring, RingAddrs, RingError, RingHint, part};

/// The wrap counter of a position. It is 1 in the first round.
const WRAP: u16 = 1 << 15;
/// The two flags that determine who owns a descriptor. It is available if they differ and AVAIL
/// equals the position's wrap counter. It is used if both equal the wrap counter.
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
const DESC_F_STATE: u16 = DESC_F_AVAIL | DESC_F_USED;
/// Flags of an event suppression structure (section 2.8.14), two bits.
const EVENTS_ENABLE: u16 = 0;
const EVENTS_DISABLE: u16 = 1;
const EVENTS_DESC: u16 = 2;
const EVENTS_MASK: u16 = 3;

/// A packed ring in guest memory, as this process maps it.
///
/// The guest may write there at any time, so each field is an atomic, and is loaded once for each
/// use. Positions out of range are clamped before they become addresses.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    event_idx: bool,
    /// `size` descriptors of two words each.
    desc: *const AtomicU64,
    /// The driver's event suppression structure: a position and flags.
    driver: *const AtomicU32,
    /// The device's event suppression structure.
    device: *const AtomicU32,
    /// Guest-physical addresses of the parts.
    addrs: RingAddrs,
}

// SAFETY: addresses in guest memory, which is only accessed as atomics. The queue's single owner
// determines who accesses it.
unsafe impl Send for PackedRing {}
// SAFETY: as above.
unsafe impl Sync for PackedRing {}

/// The result of a walk over a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The buffer id, less than the ring's size.
    pub id: u16,
    /// Number of ring descriptors in the chain.
    pub span: u16,
    /// The defect, if the chain has one or was not walked to its end. The walk has seen the part
    /// before the defect.
    pub defect: Option<ChainError>,
}

/// The ownership flags of a used descriptor at `position`.
#[inline]
fn used(position: u16) -> u16 {
    // All ones or all zeroes, by shifting the wrap counter from the highest bit.
    (position.cast_signed() >> 15).cast_unsigned() & DESC_F_STATE
}

/// The ownership flags of an available descriptor at `position`.
#[inline]
fn available(position: u16) -> u16 {
    used(position) ^ DESC_F_USED
}

impl PackedRing {
    /// Validates the ring's addresses against `memory`, and creates the ring.
    ///
    /// # Errors
    /// The size or an address is invalid.
    ///
    /// # Safety
    /// `memory` outlives the ring.
    pub unsafe fn new(
        memory: &GuestMemory,
        size: u16,
        addrs: RingAddrs,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        if size == 0 || size > RING_SIZE_MAX {
            return Err(RingError::Size(size.into()));
        }
        let [desc, driver, device] = Self::parts(size, addrs);
        Ok(Self {
            size,
            event_idx,
            desc: part(memory, desc, 16)?.cast(),
            driver: part(memory, driver, 4)?.cast(),
            device: part(memory, device, 4)?.cast(),
            addrs,
        })
    }

    /// Addresses and lengths of the ring's parts.
    pub(crate) fn parts(size: u16, addrs: RingAddrs) -> [(u64, usize); 3] {
        [(addrs.desc, DESC_BYTES * usize::from(size)), (addrs.avail, 4), (addrs.used, 4)]
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns whether `position` is in range. A front end's position may not be.
    #[must_use]
    pub fn valid(&self, position: u16) -> bool {
        position & !WRAP < self.size
    }

    /// The descriptor index of a position, clamped to the ring.
    #[inline]
    fn at(&self, position: u16) -> u16 {
        (position & !WRAP).min(self.size - 1)
    }

    /// One of a descriptor's two words: 0 is the address, 1 is length, buffer id and flags.
    #[inline]
    fn word(&self, position: u16, word: usize) -> &AtomicU64 {
        debug_assert!(word < 2);
        // SAFETY: `new` found `size` descriptors at this aligned address, in memory that outlives
        // the ring, and the index is less than `size`.
        unsafe { &*self.desc.wrapping_add(2 * usize::from(self.at(position)) + word) }
    }

    /// The cell of a descriptor's flags, the last of its eight half-words.
    #[inline]
    fn flags_cell(&self, position: u16) -> &AtomicU16 {
        let halves = self.desc.cast::<AtomicU16>();
        // SAFETY: as for `word`.
        unsafe { &*halves.wrapping_add(8 * usize::from(self.at(position)) + 7) }
    }

    /// The flags of the descriptor at `position`.
    #[inline]
    #[must_use]
    pub fn flags(&self, position: u16) -> u16 {
        // Acquire: the rest of the descriptor and of its chain is read after the flags.
        u16::from_le(self.flags_cell(position).load(Ordering::Acquire))
    }

    /// Reads the descriptor at `position`.
    #[inline]
    #[must_use]
    pub fn desc(&self, position: u16) -> Desc {
        let word = |word| self.word(position, word).load(Ordering::Relaxed);
        Desc::packed((word(0), word(1)))
    }

    /// Number of descriptors from `from` up to `to`, less than twice the size.
    #[inline]
    fn distance(&self, from: u16, to: u16) -> u32 {
        let size = u32::from(self.size);
        // Counts through two rounds: first the one with the wrap counter at 1, then the other.
        let place = |position: u16| {
            u32::from(position & !WRAP) + if position & WRAP != 0 { 0 } else { size }
        };
        let (from, to) = (place(from), place(to));
        let round = if to < from { 2 * size } else { 0 };
        // Wrapping, because positions may be out of range. The result is then meaningless.
        to.wrapping_sub(from).wrapping_add(round)
    }

    /// Number of descriptors from `from` up to `to`, limited to the ring's size.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the size is a `u16`")]
    fn count(&self, from: u16, to: u16) -> u16 {
        self.distance(from, to).min(self.size.into()) as u16
    }

    /// Marks the descriptors from `from` up to `to` as available again. An earlier process may have
    /// marked them as used without publishing them. The device must own all of them.
    pub fn take_back(&self, from: u16, to: u16) {
        let mut position = from;
        for _ in 0..self.count(from, to) {
            let cell = self.flags_cell(position);
            let flags = u16::from_le(cell.load(Ordering::Relaxed)) & !DESC_F_STATE;
            cell.store((flags | available(position)).to_le(), Ordering::Relaxed);
            position = self.advance(position, 1);
        }
    }

    /// Maximum number of descriptors that the driver can have made available at `position`, if
    /// everything up to `published` was returned to it.
    #[inline]
    #[must_use]
    pub fn room(&self, published: u16, position: u16) -> u16 {
        self.size - self.count(published, position)
    }

    /// Walks the available chain at `position`. Calls `visit` with each buffer in order, until
    /// `visit` returns false.
    ///
    /// Each descriptor is read once. The walk ends after `room` descriptors, or as many as a chain
    /// may have.
    ///
    /// # Errors
    /// The chain has no end within that limit, or its buffer id is invalid. The position of the
    /// next chain is unknown, so the ring cannot be used any longer.
    #[inline]
    pub fn walk(
        &self,
        near: &mut Near<'_>,
        position: u16,
        room: u16,
        mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> Result<Taken, RingError> {
        let room = room.min(CHAIN_MAX);
        let mut table = Table { desc: self.desc, len: self.size.into(), indirect: false };
        let (mut index, mut left) = (u32::from(self.at(position)), u32::from(room));
        let (mut id, mut span) = (0, 0);
        loop {
            left = left.checked_sub(1).ok_or(RingError::Chain(position))?;
            // SAFETY: in the ring, the index begins below the size and wraps there. In an indirect
            // table, it begins at 0, and `left` ends the walk at the end of the table.
            let desc = Desc::packed(unsafe { table.read(index) });
            let mut more = desc.flags & DESC_F_NEXT != 0;
            let mut defect = None;
            if table.indirect {
                // The chain ends with the table: of its flags, only WRITE has a meaning (2.8.7).
                more = left > 0;
            } else {
                span += 1;
                id = desc.tag;
                if desc.flags & DESC_F_INDIRECT != 0 {
                    match table.open(near, desc) {
                        Ok(opened) => {
                            (index, left, table) = (0, opened.len, opened);
                            continue;
                        }
                        Err(error) => defect = Some(error),
                    }
                }
            }
            if let Some(defect) = defect {
                if more && !table.indirect {
                    (id, span) = self.find_end(position, room, span)?;
                }
                return self.taken(position, Taken { id, span, defect: Some(defect) });
            }
            let write = desc.flags & DESC_F_WRITE != 0;
            if !visit(near, Buffer { gpa: desc.addr, len: desc.len, write }) {
                return self.taken(position, Taken { id, span, defect: Some(ChainError::Stopped) });
            }
            if !more {
                return self.taken(position, Taken { id, span, defect: None });
            }
            index += 1;
            if index == table.len {
                index = 0;
            }
        }
    }

    /// Validates the buffer id of a chain at `position`.
    #[inline]
    fn taken(&self, position: u16, taken: Taken) -> Result<Taken, RingError> {
        if taken.id < self.size { Ok(taken) } else { Err(RingError::Chain(position)) }
    }

    /// Finds the end of a chain at `position`, after its first `span` descriptors. Returns its
    /// buffer id and its span.
    #[cold]
    fn find_end(&self, position: u16, room: u16, span: u16) -> Result<(u16, u16), RingError> {
        for n in span..room {
            let desc = self.desc(self.advance(position, n));
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok((desc.tag, n + 1));
            }
        }
        Err(RingError::Chain(position))
    }

    /// Walks a chain from a copy of its descriptors. Calls `visit` with each buffer of one
    /// descriptor, as [`PackedRing::walk`] does.
    ///
    /// # Errors
    /// The chain is malformed; `visit` has seen the part before the defect.
    #[inline]
    pub fn walk_kept(
        &self,
        near: &mut Near<'_>,
        desc: Desc,
        mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> Result<(), ChainError> {
        let mut visit_desc = |near: &mut Near<'_>, desc: Desc| {
            let write = desc.flags & DESC_F_WRITE != 0;
            let more = visit(near, Buffer { gpa: desc.addr, len: desc.len, write });
            if more { Ok(()) } else { Err(ChainError::Stopped) }
        };
        if desc.flags & DESC_F_INDIRECT == 0 {
            return visit_desc(near, desc);
        }
        let ring = Table { desc: self.desc, len: self.size.into(), indirect: false };
        let table = ring.open(near, desc)?;
        // The chain ends with the table: of its flags, only WRITE has a meaning (section 2.8.7).
        for index in 0..table.len {
            // SAFETY: the index is less than the table's length.
            visit_desc(near, Desc::packed(unsafe { table.read(index) }))?;
        }
        Ok(())
    }

    /// The driver's event suppression: position and flags, written together or in this order.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "splits the word into its two halves")]
    fn driver_events(&self) -> (u16, u16) {
        // SAFETY: `new` found it at this aligned address, in memory that outlives the ring.
        let events = unsafe { &*self.driver }.load(Ordering::Relaxed);
        let events = u32::from_le(events);
        (events as u16, (events >> 16) as u16)
    }

    /// Writes the device's event suppression.
    fn set_device_events(&self, position: u16, flags: u16) {
        let events = u32::from(position) | u32::from(flags) << 16;
        // SAFETY: as for the driver's structure.
        let cell = unsafe { &*self.device };
        cell.store(events.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn is_available(&self, position: u16) -> bool {
        self.flags(position) & DESC_F_STATE == available(position)
    }
}

/// The available chain at a position of a packed ring.
#[derive(Clone, Copy, Debug)]
pub struct PackedChain<'r> {
    /// The ring.
    pub ring: &'r PackedRing,
    /// The position of its first descriptor.
    pub position: u16,
    /// Maximum number of its descriptors: see [`PackedRing::room`].
    pub room: u16,
}

impl Chained for PackedChain<'_> {
    type Taken = Result<Taken, RingError>;

    #[inline(always)]
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken) {
        let taken = self.ring.walk(near, self.position, self.room, visit);
        (matches!(taken, Ok(Taken { defect: None, .. })), taken)
    }
}

/// A chain whose descriptors are kept in the in-flight area: the ring's may be overwritten.
#[derive(Clone, Copy, Debug)]
pub struct KeptChain<'r> {
    /// The ring that the chain was in.
    pub ring: &'r PackedRing,
    /// The tracker that has kept the chain.
    pub tracker: &'r Tracker,
    /// The chain's entry in the in-flight area.
    pub entry: u16,
}

impl Chained for KeptChain<'_> {
    /// Its buffer id and its span. `None` if the in-flight area is inconsistent.
    type Taken = Option<(u16, u16)>;

    fn walk(
        &self,
        near: &mut Near<'_>,
        mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken) {
        let (mut whole, mut ended, mut id, mut span) = (true, false, 0, 0);
        let consistent = self.tracker.descs(self.entry, |desc| {
            // A table or a defect ends the walk. A chain with a table for each descriptor would
            // take seconds.
            whole = whole && !ended && self.ring.walk_kept(near, desc, &mut visit).is_ok();
            ended = desc.flags & DESC_F_INDIRECT != 0;
            (id, span) = (desc.tag, span + 1);
        });
        let valid = consistent && span > 0 && id < self.ring.size();
        (whole, valid.then_some((id, span)))
    }
}

impl Ring for PackedRing {
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "with a valid `position`, the index is below the ring size, a `u16`"
    )]
    fn advance(&self, position: u16, by: u16) -> u16 {
        let (index, wrap) = (u32::from(position & !WRAP) + u32::from(by), position & WRAP);
        match index.checked_sub(self.size.into()) {
            None => index as u16 | wrap,
            Some(index) => index as u16 | (wrap ^ WRAP),
        }
    }

    #[inline]
    fn pending(&self, position: u16) -> Result<u16, RingError> {
        Ok(self.is_available(position).into())
    }

    #[inline]
    fn hint(&self, position: u16) -> RingHint {
        let cell = self.flags_cell(position);
        // Relaxed: the flags are loaded again before the chain is taken.
        let seen = cell.load(Ordering::Relaxed);
        let due = u16::from_le(seen) & DESC_F_STATE == available(position);
        RingHint { cell, seen, due }
    }

    #[inline]
    fn prefetch_avail(&self, position: u16, _head: u16) {
        cache::prefetch_read(self.desc.wrapping_add(2 * usize::from(self.at(position))).cast());
    }

    /// Prefetches nothing: the driver polls that line, and taking it away early would only move it
    /// back and forth.
    #[inline]
    fn prefetch_used(&self, _position: u16) {}

    /// The driver reads a batch in order, and stops at its first chain until that is marked used.
    #[inline]
    fn put_used(&self, from: u16, position: u16, id: u16, len: u32) {
        let state = if position == from { available(position) } else { used(position) };
        // Without WRITE, the length has no meaning (section 2.8.4).
        let flags = if len > 0 { state | DESC_F_WRITE } else { state };
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.word(position, 1).store(rest.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn publish_used(&self, from: u16, _to: u16) {
        let cell = self.flags_cell(from);
        let write = u16::from_le(cell.load(Ordering::Relaxed)) & DESC_F_WRITE;
        // Release: the driver sees the rest of the batch and the data before the first descriptor's
        // flags.
        cell.store((used(from) | write).to_le(), Ordering::Release);
    }

    fn log_used(&self, log: &DirtyLog, from: u16, to: u16) {
        let (first, count) = (usize::from(self.at(from)), usize::from(self.count(from, to)));
        let before_end = count.min(usize::from(self.size) - first);
        let descriptors = |at: usize, count: usize| {
            log.mark(self.addrs.desc + (DESC_BYTES * at) as u64, (DESC_BYTES * count) as u64);
        };
        descriptors(first, before_end);
        descriptors(0, count - before_end);
    }

    fn log_events(&self, log: &DirtyLog) {
        log.mark(self.addrs.used, 4);
    }

    /// Virtio 1.2, section 2.8.10.
    #[inline]
    fn wants_call(&self, old: u16, new: u16) -> bool {
        // As for a split ring: the fence orders the publication of the flags before the load of the
        // driver's event suppression, and the driver loads the flags after its store of that.
        full_fence();
        let (event, flags) = self.driver_events();
        match flags & EVENTS_MASK {
            EVENTS_DISABLE => false,
            EVENTS_DESC if self.event_idx => self.distance(old, event) < self.distance(old, new),
            _ => true,
        }
    }

    fn suppress_kicks(&self, _position: u16) {
        self.set_device_events(0, EVENTS_DISABLE);
    }

    fn want_kicks(&self, position: u16) -> bool {
        let flags = if self.event_idx { EVENTS_DESC } else { EVENTS_ENABLE };
        store_then_load(|| self.set_device_events(position, flags), || self.is_available(position))
    }

    #[inline]
    fn kick_suppression_is_due(&self, _old: u16, _new: u16) -> bool {
        false
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
