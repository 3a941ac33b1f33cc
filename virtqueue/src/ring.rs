//! What both layouts of a virtqueue have in common: the trait [`Ring`], chains, addresses, errors.

use std::sync::atomic::AtomicU16;

use guest_memory::{DirtyLog, GuestMemory, Near};

use crate::desc::{Buffer, RING_SIZE_MAX};

/// A virtqueue of either layout, as its owner uses it.
///
/// A *position* is where a ring stands. Split: a free-running index. Packed: the index of a
/// descriptor in the lower 15 bits, and the wrap counter in the highest. Only [`Ring::advance`]
/// does arithmetic on positions.
pub trait Ring {
    /// Returns the position `by` chains (split) or `by` descriptors (packed) after `position`.
    fn advance(&self, position: u16, by: u16) -> u16;

    /// Returns a lower limit for the number of chains available at `position`. Split: their number.
    /// Packed: 0 or 1, because only the end of a chain shows where the next one begins.
    ///
    /// # Errors
    /// Split: more chains are available than the ring has descriptors.
    fn pending(&self, position: u16) -> Result<u16, RingError>;

    /// Returns the place where the driver makes the next chain available at `position`, and whether
    /// one is available already.
    fn hint(&self, position: u16) -> RingHint;

    /// Prefetches what the next chains are read from. The next chain is at `position`, and its
    /// first descriptor is probably `head` (split).
    fn prefetch_avail(&self, position: u16, head: u16);

    /// Prefetches the element of the used ring at `position` for writing.
    fn prefetch_used(&self, position: u16);

    /// Puts a chain into the used ring at `position`. The driver sees it only when everything from
    /// position `from` on is published. `id` is the chain's head (split) or buffer id (packed).
    fn put_used(&self, from: u16, position: u16, id: u16, len: u32);

    /// Publishes to the driver what was put from `from` up to `to`. The range is not empty.
    fn publish_used(&self, from: u16, to: u16);

    /// Marks the memory that [`Ring::put_used`] and [`Ring::publish_used`] have written.
    fn log_used(&self, log: &DirtyLog, from: u16, to: u16);

    /// Marks the memory that [`Ring::suppress_kicks`] and [`Ring::want_kicks`] write.
    fn log_events(&self, log: &DirtyLog);

    /// Returns whether the driver wants a call for what was published from `old` up to `new`.
    fn wants_call(&self, old: u16, new: u16) -> bool;

    /// Asks the driver not to kick, because the ring is polled. `position` is that of the next
    /// chain. To be repeated when [`Ring::kick_suppression_is_due`].
    fn suppress_kicks(&self, position: u16);

    /// Asks the driver to kick for the next chain at `position`. Returns whether a chain was made
    /// available before that. No kick may come for that chain, so it must be taken first.
    fn want_kicks(&self, position: u16) -> bool;

    /// Returns whether the move from position `old` to `new` requires another
    /// [`Ring::suppress_kicks`].
    fn kick_suppression_is_due(&self, old: u16, new: u16) -> bool;
}

/// A chain of buffers to walk.
pub trait Chained {
    /// What a walk returns about the chain, in addition to the buffers.
    type Taken;

    /// Calls `visit` with each buffer in order, until `visit` returns false. Each descriptor is
    /// read once, and the walk ends whatever the guest writes. Returns true if the chain is
    /// well-formed and `visit` has seen all of it. Otherwise, `visit` has seen the part before the
    /// defect.
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken);
}

/// The part of a poll hint that comes from the ring: see [`Ring::hint`].
#[derive(Clone, Copy, Debug)]
pub struct RingHint {
    /// A half-word in the ring's memory.
    pub cell: *const AtomicU16,
    /// The value of `cell` while no chain is available, in the byte order of the memory.
    pub seen: u16,
    /// A chain is available already.
    pub due: bool,
}

/// The negotiated features that determine the layout of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
}

/// Translates the guest-physical address of a part of a ring. The guest-physical and the host
/// address must be multiples of `align`.
pub(crate) fn part(
    memory: &GuestMemory,
    (gpa, len): (u64, usize),
    align: u64,
) -> Result<*mut u8, RingError> {
    if !gpa.is_multiple_of(align) {
        return Err(RingError::Alignment(gpa));
    }
    let host = memory.range(gpa, len).ok_or(RingError::Address(gpa))?;
    if !(host as u64).is_multiple_of(align) {
        return Err(RingError::Alignment(gpa));
    }
    Ok(host)
}

/// Guest-physical addresses of a ring's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring, written by the driver. Packed: the driver's event suppression structure.
    pub avail: u64,
    /// Used ring, written by the device. Packed: the device's event suppression structure.
    pub used: u64,
}

/// Why a ring cannot be used, or cannot be used any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// the size is zero, not a power of two (split), or greater than [`RING_SIZE_MAX`]
    #[error(
        "invalid ring size {0}: expected 1 to {RING_SIZE_MAX}, a power of two for a split ring"
    )]
    Size(u32),
    /// a part is not aligned as section 2.7 requires
    #[error("ring address {0:#x} is not aligned")]
    Alignment(u64),
    /// a part is not inside one memory region
    #[error("ring address {0:#x} is not in guest memory")]
    Address(u64),
    /// packed: the chain at a position has no end, is too long, or has a buffer id outside the ring
    #[error("descriptor chain at {0:#x} is unterminated, too long, or has an invalid buffer id")]
    Chain(u16),
    /// split: the available index is ahead by more than the ring's size
    #[error("available index moved from {from} to {to}, by more than the ring's size")]
    AvailIndex {
        /// The position of the next chain.
        from: u16,
        /// The available index as the guest wrote it.
        to: u16,
    },
}
