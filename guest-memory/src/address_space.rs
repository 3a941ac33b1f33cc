//! The address space of the process, whose addresses have 64 bits.

// On a 32-bit target, a guest-physical address or an offset in a file may not fit in a `usize`.
const _: () = assert!(usize::BITS == u64::BITS, "the target must have 64-bit addresses");

/// Converts a number of bytes from the type of guest-physical addresses and of offsets in files to
/// the type of offsets from a pointer. Both types have 64 bits, so the conversion is lossless and
/// has no cost.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the program compiles for 64 bits only")]
pub const fn usize_of(bytes: u64) -> usize {
    bytes as usize
}
