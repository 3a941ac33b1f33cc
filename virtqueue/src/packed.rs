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
use crate::ring::{Chained, Look, Ring, RingAddrs, RingError, part};

/// Of a position: its wrap counter, which is 1 in the first round.
const WRAP: u16 = 1 << 15;
/// Whose a descriptor is: available if these two differ and the first is the position's wrap
/// counter, used if both are.
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
const DESC_F_STATE: u16 = DESC_F_AVAIL | DESC_F_USED;
/// Of an event suppression structure (section 2.8.14), whose flags are two bits.
const EVENTS_ENABLE: u16 = 0;
const EVENTS_DISABLE: u16 = 1;
const EVENTS_DESC: u16 = 2;
const EVENTS_MASK: u16 = 3;

/// A packed ring in our mapping of the guest's memory.
///
/// The guest writes there whenever it likes, so each field is an atomic, loaded once where it is
/// used. Positions out of range are brought into it before they become addresses.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    event_idx: bool,
    /// `size` descriptors of two words each.
    desc: *const AtomicU64,
    /// The driver's event suppression: a position and flags.
    driver: *const AtomicU32,
    /// Ours.
    device: *const AtomicU32,
    /// Where the parts are for the guest.
    addrs: RingAddrs,
}

// SAFETY: addresses in guest memory, which is only accessed as atomics; who may do so is settled by
// the queue's single owner.
unsafe impl Send for PackedRing {}
// SAFETY: as above.
unsafe impl Sync for PackedRing {}

/// A chain that was walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its buffer id, below the ring's size.
    pub id: u16,
    /// Descriptors of the ring that it has taken.
    pub span: u16,
    /// What is wrong with it, if anything is; the walk has seen the part before the defect.
    pub defect: Option<ChainError>,
}

/// The flags of a descriptor that is used at `position`.
#[inline]
fn used(position: u16) -> u16 {
    // All ones or all zeroes, from the wrap counter at the top.
    (position.cast_signed() >> 15).cast_unsigned() & DESC_F_STATE
}

/// The flags of a descriptor that is available at `position`.
#[inline]
fn available(position: u16) -> u16 {
    used(position) ^ DESC_F_USED
}

impl PackedRing {
    /// Checks the ring's parts and finds them in `memory`.
    ///
    /// # Errors
    /// A size or an address that does not do.
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

    /// Addresses and lengths of its parts.
    pub(crate) fn parts(size: u16, addrs: RingAddrs) -> [(u64, usize); 3] {
        [(addrs.desc, DESC_BYTES * usize::from(size)), (addrs.avail, 4), (addrs.used, 4)]
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether `position` is one of this ring: what a front end says need not be.
    #[must_use]
    pub fn valid(&self, position: u16) -> bool {
        position & !WRAP < self.size
    }

    /// The index of a descriptor. For a position that is not valid, some descriptor's.
    #[inline]
    fn at(&self, position: u16) -> usize {
        usize::from((position & !WRAP).min(self.size - 1))
    }

    /// A descriptor's words: its address; its length, buffer id and flags.
    #[inline]
    fn word(&self, position: u16, word: usize) -> &AtomicU64 {
        debug_assert!(word < 2);
        // SAFETY: `new` found `size` descriptors at this aligned address, in memory that outlives
        // the ring, and the index is below that.
        unsafe { &*self.desc.wrapping_add(2 * self.at(position) + word) }
    }

    /// Where a descriptor's flags are: the last of its eight half-words.
    #[inline]
    fn flags_cell(&self, position: u16) -> &AtomicU16 {
        let halves = self.desc.cast::<AtomicU16>();
        // SAFETY: as for `word`.
        unsafe { &*halves.wrapping_add(8 * self.at(position) + 7) }
    }

    /// The flags of the descriptor at `position`.
    #[inline]
    #[must_use]
    pub fn flags(&self, position: u16) -> u16 {
        // Acquire: the rest of the descriptor and of its chain is read after it.
        u16::from_le(self.flags_cell(position).load(Ordering::Acquire))
    }

    /// The descriptor at `position`, as the guest has it now.
    #[inline]
    #[must_use]
    pub fn desc(&self, position: u16) -> Desc {
        let word = |word| self.word(position, word).load(Ordering::Relaxed);
        Desc::packed((word(0), word(1)))
    }

    /// How many descriptors `to` is after `from`: less than twice the size.
    #[inline]
    fn distance(&self, from: u16, to: u16) -> u32 {
        let size = u32::from(self.size);
        // Two rounds, the one with the wrap counter at 1 first.
        let place = |position: u16| {
            u32::from(position & !WRAP) + if position & WRAP != 0 { 0 } else { size }
        };
        let (from, to) = (place(from), place(to));
        let round = if to < from { 2 * size } else { 0 };
        // Of positions that are not valid, anything may come out.
        to.wrapping_sub(from).wrapping_add(round)
    }

    /// Descriptors from `from` up to `to`, which is no more than there are.
    #[inline]
    fn count(&self, from: u16, to: u16) -> u16 {
        self.distance(from, to).min(self.size.into()) as u16
    }

    /// Makes the descriptors from `from` up to `to` look available again, which an earlier process
    /// may have marked as used without having published them. All of them are ours.
    pub fn take_back(&self, from: u16, to: u16) {
        let mut position = from;
        for _ in 0..self.count(from, to) {
            let cell = self.flags_cell(position);
            let flags = u16::from_le(cell.load(Ordering::Relaxed)) & !DESC_F_STATE;
            cell.store((flags | available(position)).to_le(), Ordering::Relaxed);
            position = self.advance(position, 1);
        }
    }

    /// How many descriptors at `position` may be the driver's, if it has been given back everything
    /// up to `published`.
    #[inline]
    #[must_use]
    pub fn room(&self, published: u16, position: u16) -> u16 {
        self.size - self.count(published, position)
    }

    /// Walks the chain at `position`, which is available, calling `visit` with each buffer in order,
    /// until it says that it wants no more.
    ///
    /// Each descriptor is read once. The walk ends after `room` of them, or as many as a chain may have.
    ///
    /// # Errors
    /// Nobody knows where the next chain begins: the ring cannot be used any more.
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
        let (mut index, mut left) = (self.at(position) as u32, u32::from(room));
        let (mut id, mut span) = (0, 0);
        loop {
            left = left.checked_sub(1).ok_or(RingError::Chain(position))?;
            // SAFETY: in the ring it begins below the size and goes round there; in a table it
            // begins at 0, and as many are left as the table has.
            let desc = Desc::packed(unsafe { table.read(index) });
            let mut more = desc.flags & DESC_F_NEXT != 0;
            let mut defect = None;
            if table.indirect {
                // One after the other: of a table's flags only WRITE means anything (2.8.7).
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
                return self.taken(position, Taken { id, span, defect: Some(ChainError::Left) });
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

    /// Checks the buffer id of a chain at `position`.
    #[inline]
    fn taken(&self, position: u16, taken: Taken) -> Result<Taken, RingError> {
        if taken.id < self.size { Ok(taken) } else { Err(RingError::Chain(position)) }
    }

    /// Where a chain at `position` ends of which `span` descriptors were read, and more follow: its
    /// buffer id and span.
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

    /// Calls `visit` with each buffer of a chain whose descriptors were kept elsewhere, as
    /// [`PackedRing::walk`] would.
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
        let mut see = |near: &mut Near<'_>, desc: Desc| {
            let write = desc.flags & DESC_F_WRITE != 0;
            let more = visit(near, Buffer { gpa: desc.addr, len: desc.len, write });
            if more { Ok(()) } else { Err(ChainError::Left) }
        };
        if desc.flags & DESC_F_INDIRECT == 0 {
            return see(near, desc);
        }
        let ring = Table { desc: self.desc, len: self.size.into(), indirect: false };
        let table = ring.open(near, desc)?;
        // One after the other: of a table's flags only WRITE means anything (section 2.8.7).
        for index in 0..table.len {
            // SAFETY: the index is below the table's length.
            see(near, Desc::packed(unsafe { table.read(index) }))?;
        }
        Ok(())
    }

    /// The driver's event suppression: position and flags, written together or in this order.
    #[inline]
    fn driver_events(&self) -> (u16, u16) {
        // SAFETY: `new` found it at this aligned address, in memory that outlives the ring.
        let events = unsafe { &*self.driver }.load(Ordering::Relaxed);
        let events = u32::from_le(events);
        (events as u16, (events >> 16) as u16)
    }

    /// Writes ours.
    fn set_device_events(&self, position: u16, flags: u16) {
        let events = u32::from(position) | u32::from(flags) << 16;
        // SAFETY: as for the driver's.
        let cell = unsafe { &*self.device };
        cell.store(events.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn is_available(&self, position: u16) -> bool {
        self.flags(position) & DESC_F_STATE == available(position)
    }
}

/// The chain at a position of a packed ring, which is available.
#[derive(Clone, Copy, Debug)]
pub struct PackedChain<'r> {
    /// The ring.
    pub ring: &'r PackedRing,
    /// Where it begins.
    pub position: u16,
    /// The most descriptors that it may have: see [`PackedRing::room`].
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

/// A chain whose descriptors the in-flight area has kept, as the ring's may be overwritten.
#[derive(Clone, Copy, Debug)]
pub struct KeptChain<'r> {
    /// The ring that it was in.
    pub ring: &'r PackedRing,
    /// Who has kept it.
    pub tracker: &'r Tracker,
    /// What it is called there.
    pub entry: u16,
}

impl Chained for KeptChain<'_> {
    /// Its buffer id and the descriptors that it has taken; `None` if the area makes no sense.
    type Taken = Option<(u16, u16)>;

    fn walk(
        &self,
        near: &mut Near<'_>,
        mut visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken) {
        let (mut whole, mut ended, mut id, mut span) = (true, false, 0, 0);
        let known = self.tracker.descs(self.entry, |desc| {
            // A table ends a chain, as a defect does: a table for each descriptor would take seconds.
            whole = whole && !ended && self.ring.walk_kept(near, desc, &mut visit).is_ok();
            ended = desc.flags & DESC_F_INDIRECT != 0;
            (id, span) = (desc.tag, span + 1);
        });
        let sound = known && span > 0 && id < self.ring.size();
        (whole, sound.then_some((id, span)))
    }
}

impl Ring for PackedRing {
    #[inline]
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
    fn look(&self, position: u16) -> Look {
        let cell = self.flags_cell(position);
        // Relaxed: whoever takes the chain loads it again.
        let seen = cell.load(Ordering::Relaxed);
        let due = u16::from_le(seen) & DESC_F_STATE == available(position);
        Look { cell, seen, due }
    }

    #[inline]
    fn prefetch_avail(&self, position: u16, _head: u16) {
        cache::prefetch_read(self.desc.wrapping_add(2 * self.at(position)).cast());
    }

    /// Nothing: that is where the driver looks, and taking the line away would only send it to and
    /// fro.
    #[inline]
    fn prefetch_used(&self, _position: u16) {}

    /// The driver looks at the batch in order, so it does not get beyond the first one before that
    /// is marked as used.
    #[inline]
    fn put_used(&self, from: u16, position: u16, id: u16, len: u32) {
        let state = if position == from { available(position) } else { used(position) };
        // Without WRITE the length means nothing (section 2.8.4).
        let flags = if len > 0 { state | DESC_F_WRITE } else { state };
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.word(position, 1).store(rest.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn publish_used(&self, from: u16, _to: u16) {
        let cell = self.flags_cell(from);
        let write = u16::from_le(cell.load(Ordering::Relaxed)) & DESC_F_WRITE;
        // Release: the rest of the batch and the data are seen before it.
        cell.store((used(from) | write).to_le(), Ordering::Release);
    }

    fn log_used(&self, log: &DirtyLog, from: u16, to: u16) {
        let (first, count) = (self.at(from), usize::from(self.count(from, to)));
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

    /// Section 2.8.10.
    #[inline]
    fn wants_call(&self, old: u16, new: u16) -> bool {
        // As for a split ring: the flags were published before the driver's wish is read, and the
        // driver looks at the flags after storing its wish.
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
