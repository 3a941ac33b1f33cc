//! A ring of either layout.
#![expect(unsafe_code, reason = "rings are in memory that their owner keeps mapped")]

use guest_memory::GuestMemory;

use crate::packed::PackedRing;
use crate::ring::{Layout, Ring, RingAddrs, RingError};
use crate::split::SplitRing;

/// A ring of either layout.
#[derive(Debug)]
pub enum AnyRing {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

impl AnyRing {
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
        layout: Layout,
    ) -> Result<Self, RingError> {
        let event_idx = layout.event_idx;
        if layout.packed {
            // SAFETY: the caller says so.
            unsafe { PackedRing::new(memory, size, addrs, event_idx) }.map(Self::Packed)
        } else {
            // SAFETY: the caller says so.
            unsafe { SplitRing::new(memory, size, addrs, event_idx) }.map(Self::Split)
        }
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.size(),
            Self::Packed(ring) => ring.size(),
        }
    }

    /// For where a call costs nothing that matters.
    #[must_use]
    pub fn as_dyn(&self) -> &dyn Ring {
        match self {
            Self::Split(ring) => ring,
            Self::Packed(ring) => ring,
        }
    }
}

/// Guest-physical addresses and lengths of the parts of a ring: descriptors, what the driver writes,
/// what the device writes.
#[must_use]
pub fn parts(size: u16, addrs: RingAddrs, packed: bool) -> [(u64, usize); 3] {
    if packed { PackedRing::parts(size, addrs) } else { SplitRing::parts(size, addrs) }
}

/// Whether a ring of `size` at `addrs` does, in `memory`.
///
/// # Errors
/// A size or an address that does not do.
pub fn check(
    memory: &GuestMemory,
    size: u16,
    addrs: RingAddrs,
    layout: Layout,
) -> Result<(), RingError> {
    // SAFETY: the ring is dropped at once, while `memory` is borrowed.
    unsafe { AnyRing::new(memory, size, addrs, layout) }.map(drop)
}
