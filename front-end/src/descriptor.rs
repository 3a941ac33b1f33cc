//! A buffer of a chain; a descriptor and an element of the used ring, as they lie in guest memory.

use crate::guest::Segment;

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is an indirect table.
pub const INDIRECT: u16 = 4;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its memory.
    pub segment: Segment,
    /// Whether the device writes it; otherwise it reads it.
    pub write: bool,
}

impl Buffer {
    /// Makes a buffer that the device reads.
    #[must_use]
    pub fn readable(segment: Segment) -> Self {
        Self { segment, write: false }
    }

    /// Makes a buffer that the device writes.
    #[must_use]
    pub fn writable(segment: Segment) -> Self {
        Self { segment, write: true }
    }

    /// Returns the memory, and [`WRITE`] or 0.
    pub(crate) fn flagged(self) -> (Segment, u16) {
        (self.segment, if self.write { WRITE } else { 0 })
    }
}

/// A descriptor in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// The length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the next descriptor, if [`NEXT`] is set.
    pub next: u16,
}

impl Descriptor {
    /// Returns the two words of a split ring's descriptor.
    #[inline]
    pub(crate) fn split(self) -> [u64; 2] {
        let Self { addr, len, flags, next } = self;
        [addr, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48]
    }

    /// Parses the two words of a split ring's descriptor.
    #[expect(clippy::cast_possible_truncation, reason = "splits a word into its fields")]
    pub(crate) fn from_split([addr, rest]: [u64; 2]) -> Self {
        let [flags, next] = [32, 48].map(|bit| (rest >> bit) as u16);
        Self { addr, len: rest as u32, flags, next }
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the used chain.
    pub id: u32,
    /// The number of bytes that the device reports as written.
    pub len: u32,
}
