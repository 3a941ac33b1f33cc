//! What may stop READ and WRITE, as a number that the caller keeps in an atomic.
//!
//! The caller computes the gate of each nexus again (`LogicalUnit::gate`) when
//! `LogicalUnit::generation` has changed.

use crate::sense::Format;

/// The state of a logical unit for one nexus, as far as READ and WRITE need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate(u64);

impl Gate {
    /// Everything takes the slow path: the gate before the first one is computed.
    pub const SLOW: Self = Self(1);
    const ATTENTION: u64 = 1 << 1;
    const NO_READ: u64 = 1 << 2;
    const NO_WRITE: u64 = 1 << 3;
    const NOT_READY: u64 = 1 << 4;
    const PROTECTED: u64 = 1 << 5;
    const WRITE_THROUGH: u64 = 1 << 6;
    const DESCRIPTOR: u64 = 1 << 7;

    pub(crate) fn new(state: &State) -> Self {
        let bits = [
            (Self::ATTENTION, state.attention),
            (Self::NO_READ, !state.may_read),
            (Self::NO_WRITE, !state.may_write),
            (Self::NOT_READY, state.stopped),
            (Self::PROTECTED, state.protected),
            (Self::WRITE_THROUGH, state.write_through),
            (Self::DESCRIPTOR, state.format == Format::Descriptor),
        ];
        Self(bits.iter().filter(|(_, set)| *set).map(|(bit, _)| bit).sum())
    }

    /// As a number, for an atomic.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// From such a number. Unknown bits are slow.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    const fn has(self, bits: u64) -> bool {
        self.0 & bits != 0
    }

    /// The format of sense data.
    #[must_use]
    pub const fn format(self) -> Format {
        if self.has(Self::DESCRIPTOR) { Format::Descriptor } else { Format::Fixed }
    }

    pub(crate) const fn is_protected(self) -> bool {
        self.has(Self::PROTECTED)
    }

    pub(crate) const fn is_write_through(self) -> bool {
        self.has(Self::WRITE_THROUGH)
    }

    /// Whether a read, or a write, must take the slow path.
    pub(crate) const fn is_slow(self, write: bool) -> bool {
        let other = if write { Self::NO_READ } else { Self::NO_WRITE };
        let harmless = Self::PROTECTED | Self::WRITE_THROUGH | Self::DESCRIPTOR | other;
        self.has(!harmless)
    }
}

/// What a gate is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) attention: bool,
    pub(crate) may_read: bool,
    pub(crate) may_write: bool,
    pub(crate) stopped: bool,
    pub(crate) protected: bool,
    pub(crate) write_through: bool,
    pub(crate) format: Format,
}
