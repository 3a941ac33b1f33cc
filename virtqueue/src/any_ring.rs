//! A ring of either layout.
#![expect(unsafe_code, reason = "a ring's owner keeps its memory mapped")]

use guest_memory::GuestMemory;

use crate::packed::PackedRing;
use crate::ring::{Layout, Ring, RingAddrs, RingError};
use crate::split::SplitRing;

/// A ring of either layout.
#[derive(Debug)]
pub enum AnyRing {
    /// Virtio 1.2, section 2.7.
    Split(SplitRing),
    /// Virtio 1.2, section 2.8.
    Packed(PackedRing),
}

impl AnyRing {
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
        layout: Layout,
    ) -> Result<Self, RingError> {
        let event_idx = layout.event_idx;
        if layout.packed {
            // SAFETY: the caller guarantees that `memory` outlives the ring.
            unsafe { PackedRing::new(memory, size, addrs, event_idx) }.map(Self::Packed)
        } else {
            // SAFETY: as above.
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

    /// The ring behind a trait object, for code that is not on the data path.
    #[must_use]
    pub fn as_dyn(&self) -> &dyn Ring {
        match self {
            Self::Split(ring) => ring,
            Self::Packed(ring) => ring,
        }
    }
}

/// Guest-physical addresses and lengths of the parts of a ring: the descriptors, the part that the
/// driver writes, and the part that the device writes.
#[must_use]
pub fn parts(size: u16, addrs: RingAddrs, packed: bool) -> [(u64, usize); 3] {
    if packed { PackedRing::parts(size, addrs) } else { SplitRing::parts(size, addrs) }
}

/// Validates the addresses of a ring of `size` against `memory`.
///
/// # Errors
/// The size or an address is invalid.
pub fn check(
    memory: &GuestMemory,
    size: u16,
    addrs: RingAddrs,
    layout: Layout,
) -> Result<(), RingError> {
    // SAFETY: the ring is dropped immediately, while `memory` is borrowed.
    unsafe { AnyRing::new(memory, size, addrs, layout) }.map(drop)
}
