//! A descriptor and an element of the used ring, as they lie in guest memory.

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor, as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one, if [`NEXT`] is set.
    pub next: u16,
}

impl Descriptor {
    /// The two words of a split ring's descriptor.
    #[inline]
    pub(crate) fn split(self) -> [u64; 2] {
        let Self { addr, len, flags, next } = self;
        [addr, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48]
    }

    /// What the two words of a split ring's descriptor say.
    pub(crate) fn from_split([addr, rest]: [u64; 2]) -> Self {
        let [flags, next] = [32, 48].map(|bit| (rest >> bit) as u16);
        Self { addr, len: rest as u32, flags, next }
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that was used.
    pub id: u32,
    /// Bytes that the device says it has written.
    pub len: u32,
}
