//! The kinds of arrays.

/// The largest number of members.
pub(crate) const MEMBERS_MAX: usize = 255;
/// The largest number of members of a redundant array: one bit of a mask for each.
pub(crate) const MASK_MAX: usize = 64;
/// The largest strip of raid5f in bytes. A channel has two buffers of a strip, and no guest writes
/// larger stripes.
const PARITY_STRIP_MAX: u64 = 16 << 20;

/// The way in which an array stores its data on its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Strips in turn on each member.
    Raid0,
    /// Everything on every member.
    Raid1,
    /// One member after the other.
    Concat,
    /// Strips with parity, written in whole stripes only.
    Raid5f,
}

impl Level {
    /// SPDK's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raid0 => "raid0",
            Self::Raid1 => "raid1",
            Self::Concat => "concat",
            Self::Raid5f => "raid5f",
        }
    }

    /// The number in a superblock.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Raid0 => 0,
            Self::Raid1 => 1,
            Self::Raid5f => 95,
            Self::Concat => 99,
        }
    }

    pub(crate) fn of_number(number: u32) -> Option<Self> {
        let all = [Self::Raid0, Self::Raid1, Self::Concat, Self::Raid5f];
        all.into_iter().find(|level| level.number() == number)
    }

    /// The smallest number of members.
    pub(crate) fn members_min(self) -> usize {
        match self {
            Self::Raid0 | Self::Concat => 1,
            Self::Raid1 => 2,
            Self::Raid5f => 3,
        }
    }

    /// The largest number of members.
    pub(crate) fn members_max(self) -> usize {
        if self.is_redundant() { MASK_MAX } else { MEMBERS_MAX }
    }

    /// The largest strip in bytes. A channel of raid5f has buffers for whole strips.
    pub(crate) fn strip_max(self) -> u64 {
        if self == Self::Raid5f { PARITY_STRIP_MAX } else { u64::MAX }
    }

    /// The smallest number of members with which an array of `members` works.
    #[must_use]
    pub fn operational(self, members: usize) -> usize {
        match self {
            Self::Raid0 | Self::Concat => members,
            Self::Raid1 => 1,
            Self::Raid5f => members.saturating_sub(1),
        }
    }

    /// Whether an array can lose a member.
    #[must_use]
    pub fn is_redundant(self) -> bool {
        matches!(self, Self::Raid1 | Self::Raid5f)
    }
}
