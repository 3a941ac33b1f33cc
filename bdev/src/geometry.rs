//! Checks of a device's name, size, block size and ranges.

use crate::error::Error;
use crate::io::Io;

/// The smallest block size: the unit of virtio-blk and of Linux.
pub const BLOCK_SIZE_MIN: u32 = 512;

/// Checks all parameters, and returns the bytes in `num_blocks` blocks of `block_size`.
///
/// # Errors
/// `Invalid`: the name is empty, the number of blocks is 0, the block size is not a power of two of
/// 512 or more, or the size exceeds the largest `i64` offset.
pub fn checked_size(name: &str, num_blocks: u64, block_size: u32) -> Result<u64, Error> {
    check_name(name)?;
    check_block_size(name, block_size)?;
    if num_blocks == 0 {
        return Err(Error::Invalid(format!("{name}: the number of blocks is 0")));
    }
    num_blocks
        .checked_mul(u64::from(block_size))
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| {
            let text = format!("{name}: {num_blocks} blocks of {block_size} bytes are too large");
            Error::Invalid(text)
        })
}

/// Checks that the name of a bdev is not empty.
///
/// # Errors
/// `Invalid`.
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::Invalid("the name is empty".into()));
    }
    Ok(())
}

/// Checks that a block size is a power of two and at least [`BLOCK_SIZE_MIN`]. The error's text
/// begins with `what`.
///
/// # Errors
/// `Invalid`.
pub(crate) fn check_block_size(what: &str, block_size: u32) -> Result<(), Error> {
    if block_size < BLOCK_SIZE_MIN || !block_size.is_power_of_two() {
        return Err(Error::Invalid(format!(
            "{what}: block size {block_size} is not a power of two of {BLOCK_SIZE_MIN} or more"
        )));
    }
    Ok(())
}

/// Returns whether the I/O's range lies within a device of `size` bytes.
#[inline]
#[must_use]
pub fn within(io: &Io, size: u64) -> bool {
    io.offset.checked_add(io.len).is_some_and(|end| end <= size)
}
