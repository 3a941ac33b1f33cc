//! What both layouts of a virtqueue have in common: the trait [`Ring`], chains that can be walked,
//! addresses, and errors.

use std::sync::atomic::AtomicU16;

use guest_memory::{DirtyLog, GuestMemory, Near};

use crate::desc::{Buffer, RING_SIZE_MAX};

/// A virtqueue as its owner uses it, whichever layout it has.
///
/// A *position* is where a ring stands. Split: a free-running index. Packed: the index of a
/// descriptor in the lower 15 bits, and the wrap counter in the highest. Only [`Ring::advance`]
/// computes with positions.
pub trait Ring {
    /// The position `by` places further: split, so many chains; packed, so many descriptors.
    fn advance(&self, position: u16, by: u16) -> u16;

    /// How many chains wait at `position`, at least. Split: all that do. Packed: 0 or 1, as only a
    /// chain's end tells where the next one begins.
    ///
    /// # Errors
    /// Split: more than the ring has room for.
    fn pending(&self, position: u16) -> Result<u16, RingError>;

    /// What changes when the next chain is made available at `position`, and whether one is already.
    fn look(&self, position: u16) -> Look;

    /// Has the processor fetch what the next chains will be read from, for one that likely begins
    /// at descriptor `head` (split) and in any case is at `position`.
    fn prefetch_avail(&self, position: u16, head: u16);

    /// Has the processor fetch the place of the used ring at `position` for writing.
    fn prefetch_used(&self, position: u16);

    /// Puts a chain into the used ring at `position`, to be seen by the driver once everything from
    /// `from` on is published. `id` is the head (split) or the buffer id (packed).
    fn put_used(&self, from: u16, position: u16, id: u16, len: u32);

    /// Tells the driver about all that was put from `from` up to `to`, which is something.
    fn publish_used(&self, from: u16, to: u16);

    /// Marks what [`Ring::publish_used`] and its puts have written.
    fn log_used(&self, log: &DirtyLog, from: u16, to: u16);

    /// Marks what [`Ring::suppress_kicks`] and [`Ring::want_kicks`] write.
    fn log_events(&self, log: &DirtyLog);

    /// Whether the driver wants a notification for what was published from `old` up to `new`.
    fn wants_call(&self, old: u16, new: u16) -> bool;

    /// Asks the driver not to kick, as the ring is polled. `position` is ours; called again whenever
    /// [`Ring::kick_suppression_is_due`].
    fn suppress_kicks(&self, position: u16);

    /// Asks the driver to kick for the next chain at `position`, and says whether one has been made
    /// available meanwhile, for which no kick may come: then it has to be taken first.
    fn want_kicks(&self, position: u16) -> bool;

    /// Whether moving from `old` to `new` needs [`Ring::suppress_kicks`] again.
    fn kick_suppression_is_due(&self, old: u16, new: u16) -> bool;
}

/// A chain of buffers that can be walked.
pub trait Chained {
    /// What else there is to know of it afterwards.
    type Taken;

    /// Calls `visit` with each buffer in order, until it says that it wants no more. Each descriptor is
    /// read once, and there is an end to them whatever the guest does. Says whether all of the chain
    /// was seen and is well-formed; if not, `visit` has seen the part before the defect.
    fn walk(
        &self,
        near: &mut Near<'_>,
        visit: impl FnMut(&mut Near<'_>, Buffer) -> bool,
    ) -> (bool, Self::Taken);
}

/// What to look at until the next visit of a ring: see [`Ring::look`].
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// A word in the ring's memory.
    pub cell: *const AtomicU16,
    /// What it is as long as there is nothing, as it is in memory.
    pub seen: u16,
    /// There is something already.
    pub due: bool,
}

/// What was negotiated about rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
}

/// The host address of a part of a ring, given by guest-physical address and length. The
/// guest-physical and the host address have to be multiples of `align`.
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

/// Where a ring's parts are, guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring, written by the driver.
    pub avail: u64,
    /// Used ring, written by us.
    pub used: u64,
}

/// Why a ring cannot be used, or is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// the size is zero, no power of two, or above [`RING_SIZE_MAX`]
    #[error("ring size {0} is not a power of two up to {RING_SIZE_MAX}")]
    Size(u32),
    /// a part is not aligned as section 2.7 demands
    #[error("ring address {0:#x} is not aligned")]
    Alignment(u64),
    /// a part does not lie in one memory region
    #[error("ring address {0:#x} is not in guest memory")]
    Address(u64),
    /// a packed ring's buffer id is not below its size, or a chain has no end or a far one
    #[error("chain at {0:#x} has no end, a far one, or a bad buffer id")]
    Chain(u16),
    /// the available index ran ahead by more than the ring's size
    #[error("available index jumped from {from} to {to}")]
    AvailIndex {
        /// What we had seen.
        from: u16,
        /// What the guest says.
        to: u16,
    },
}
