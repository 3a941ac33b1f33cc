//! Virtio-blk's configuration space (virtio 1.2, 5.2.4).

/// Size of virtio-blk's configuration space up to the end of the write-zeroes fields.
pub(crate) const CONFIG_BYTES: u32 = 60;

/// The fields of virtio-blk's configuration space that drivers read (virtio 1.2, 5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// The size in units of 512 bytes.
    pub capacity: u64,
    /// The most bytes in one segment.
    pub size_max: u32,
    /// The most segments in one request.
    pub seg_max: u32,
    /// The bytes in a logical block.
    pub blk_size: u32,
    /// The logical blocks in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// The logical block with which the first physical block begins.
    pub alignment_offset: u8,
    /// The logical blocks in the smallest efficient I/O.
    pub min_io_size: u16,
    /// The logical blocks in the optimal I/O; 0 if there is no preference.
    pub opt_io_size: u32,
    /// The number of queues of the device.
    pub num_queues: u16,
    /// The most sectors in one discard range.
    pub max_discard_sectors: u32,
    /// The most ranges in one discard request.
    pub max_discard_seg: u32,
    /// The alignment of discard ranges, in sectors.
    pub discard_sector_alignment: u32,
    /// The most sectors in one write-zeroes range.
    pub max_write_zeroes_sectors: u32,
    /// The most ranges in one write-zeroes request.
    pub max_write_zeroes_seg: u32,
    /// Whether write-zeroes may unmap.
    pub write_zeroes_may_unmap: bool,
}

impl BlkConfig {
    pub(crate) fn parse(bytes: &[u8; CONFIG_BYTES as usize]) -> Self {
        let half = |at| u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let word = |at| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            capacity: u64::from_le_bytes(std::array::from_fn(|i| bytes[i])),
            size_max: word(8),
            seg_max: word(12),
            blk_size: word(20),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: half(26),
            opt_io_size: word(28),
            num_queues: half(34),
            max_discard_sectors: word(36),
            max_discard_seg: word(40),
            discard_sector_alignment: word(44),
            max_write_zeroes_sectors: word(48),
            max_write_zeroes_seg: word(52),
            write_zeroes_may_unmap: bytes[56] != 0,
        }
    }
}
