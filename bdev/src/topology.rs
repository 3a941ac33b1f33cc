//! The I/O sizes that suit a device best, for guests that lay out their data accordingly.

use crate::error::Error;
use crate::geometry::BLOCK_SIZE_MIN;

/// The I/O sizes that a device prefers. 0: no preference.
///
/// These are hints: any single block can be read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Bytes that the device writes as one unit; a smaller write makes it read first. Guests are
    /// told a power of two only.
    pub physical_block_size: u32,
    /// Blocks in the smallest I/O that does no extra work.
    pub min_io_blocks: u32,
    /// Blocks in the I/O that performs best.
    pub optimal_io_blocks: u32,
}

impl Topology {
    /// Checks the operator's values. `name` is the device's name.
    ///
    /// # Errors
    /// `Invalid`: the physical block size is not a multiple of 512.
    pub(crate) fn check(self, name: &str) -> Result<(), Error> {
        let size = self.physical_block_size;
        if !size.is_multiple_of(BLOCK_SIZE_MIN) {
            return Err(Error::Invalid(format!(
                "{name}: physical block size {size} is not a multiple of {BLOCK_SIZE_MIN}"
            )));
        }
        Ok(())
    }

    /// Returns the values for a device with blocks of `block_size`, a power of two, without
    /// inconsistent ones. A physical block is at least a block, the smallest I/O is at least a
    /// physical block, and an I/O size that is not a multiple of a physical block becomes 0.
    #[must_use]
    pub fn settled(self, block_size: u32) -> Self {
        let physical = self.physical_block_size;
        let known = if physical.is_power_of_two() { physical } else { 0 };
        let physical_block_size = known.max(block_size);
        let physical_blocks = physical_block_size / block_size;
        let whole = |blocks: u32| if blocks.is_multiple_of(physical_blocks) { blocks } else { 0 };
        Self {
            physical_block_size,
            min_io_blocks: whole(self.min_io_blocks).max(physical_blocks),
            optimal_io_blocks: whole(self.optimal_io_blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, Latency, Null, NullOptions};

    fn topology(physical_block_size: u32, min_io_blocks: u32, optimal_io_blocks: u32) -> Topology {
        Topology { physical_block_size, min_io_blocks, optimal_io_blocks }
    }

    #[test]
    fn physical_blocks_are_multiples_of_512_or_unknown() {
        for good in [0, 512, 1536, 4096, 1 << 31] {
            topology(good, 7, 9).check("d").unwrap();
        }
        for bad in [1, 100, 256, 513, 4095, u32::MAX] {
            let e = topology(bad, 0, 0).check("d").unwrap_err();
            assert_eq!(e.errno(), libc::EINVAL, "{bad}");
        }
    }

    #[test]
    fn inconsistent_values_are_removed() {
        for (block_size, said, settled) in [
            (512, topology(0, 0, 0), topology(512, 1, 0)),
            (512, topology(512, 3, 5), topology(512, 3, 5)),
            (512, topology(4096, 0, 0), topology(4096, 8, 0)),
            (512, topology(4096, 16, 24), topology(4096, 16, 24)),
            (512, topology(4096, 4, 4), topology(4096, 8, 0)),
            (512, topology(4096, 12, 12), topology(4096, 8, 0)),
            (4096, topology(512, 0, 2), topology(4096, 1, 2)),
            (4096, topology(12288, 0, 0), topology(4096, 1, 0)),
            (512, topology(u32::MAX, u32::MAX, u32::MAX), topology(512, u32::MAX, u32::MAX)),
            (512, topology(1 << 31, 1, 1), topology(1 << 31, 1 << 22, 0)),
            (1 << 31, topology(4096, 0, 0), topology(1 << 31, 1, 0)),
        ] {
            assert_eq!(said.settled(block_size), settled, "{block_size} {said:?}");
            assert_eq!(settled.settled(block_size), settled, "{settled:?} is consistent already");
        }
    }

    #[test]
    fn wrappers_have_the_topology_of_their_base() {
        let null = NullOptions { name: "n".into(), num_blocks: 8, block_size: 512, uuid: None };
        let said = topology(4096, 16, 64);
        let base: Arc<dyn Bdev> = Null::with_topology(null, said).unwrap();
        let options = ErrorOptions { name: "e".into(), base, uuid: None };
        let base: Arc<dyn Bdev> = ErrorDisk::create(options).unwrap();
        let latency = Latency::default();
        let options = DelayOptions { name: "d".into(), base, latency, uuid: None };
        assert_eq!(Delay::create(options).unwrap().topology(), said);
    }
}
