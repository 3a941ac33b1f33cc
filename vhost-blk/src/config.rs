//! What a controller tells a guest about its disk: feature bits and the config space.

use std::sync::Arc;

use bdev::Bdev;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::request::{Limits, RANGES_MAX, SECTOR_BYTES};

/// Virtqueues of a controller: what rte_vhost answers to GET_QUEUE_NUM, and what the config space
/// says too.
pub const QUEUES_MAX: u16 = 128;

/// Bytes of `struct virtio_blk_config` up to and including write-zeroes; SPDK's size.
pub const CONFIG_BYTES: usize = 60;

/// Sectors in one discard or write-zeroes request; SPDK's number.
const RANGE_SECTORS_MAX: u32 = 32768;

/// vhost: writes to guest memory are logged, for a migration.
pub const VHOST_F_LOG_ALL: u32 = 26;
/// vhost-user: protocol features can be negotiated.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// Where `wce` is in the config space.
const WCE_AT: usize = 32;

/// A block device as one controller shows it.
pub struct Disk {
    /// The device.
    pub bdev: Arc<dyn Bdev>,
    /// Whether the operator made the controller read-only.
    pub read_only: bool,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Disk({})", self.bdev.name())
    }
}

impl Disk {
    /// The virtio and vhost features offered: SPDK's for the same device and options, plus
    /// EVENT_IDX and, with FLUSH, CONFIG_WCE (see the README's table of differences). RING_PACKED is
    /// the controller's to add.
    ///
    /// CONFIG_WCE where there is no FLUSH would have Linux send flushes that are refused.
    #[must_use]
    pub fn features(&self) -> u64 {
        let bdev = self.bdev.features();
        let bit = |bit: u32| 1_u64 << bit;
        let when = |on: bool, n: u32| if on { bit(n) } else { 0 };
        bit(VIRTIO_BLK_F_SIZE_MAX)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_MQ)
            | bit(VIRTIO_F_ANY_LAYOUT)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(VHOST_F_LOG_ALL)
            | bit(VHOST_USER_F_PROTOCOL_FEATURES)
            | bit(VIRTIO_F_VERSION_1)
            | when(self.read_only, VIRTIO_BLK_F_RO)
            | when(bdev.flush, VIRTIO_BLK_F_FLUSH)
            | when(bdev.flush, VIRTIO_BLK_F_CONFIG_WCE)
            | when(bdev.unmap, VIRTIO_BLK_F_DISCARD)
            | when(bdev.write_zeroes, VIRTIO_BLK_F_WRITE_ZEROES)
    }

    /// What a request is checked against: a view keeps it, and a disk that grows makes a new view.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let mut features = self.bdev.features();
        features.read_only |= self.read_only;
        let mut id = [b' '; VIRTIO_BLK_ID_BYTES as usize];
        let name = self.bdev.name().as_bytes();
        let n = name.len().min(id.len());
        id[..n].copy_from_slice(&name[..n]);
        Limits {
            sectors: self.bdev.size_bytes() / SECTOR_BYTES,
            block_sectors: u64::from(self.bdev.block_size()) / SECTOR_BYTES,
            features,
            id,
        }
    }
}

/// The config space (virtio 1.2, section 5.2.4) of `disk`, or of a disk that was removed: then
/// everything is zero but what keeps a rebooting QEMU alive, as with SPDK. `write_cache` is the one
/// field that the guest sets.
#[must_use]
pub fn config_space(disk: Option<&Disk>, write_cache: bool) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(26, &1_u16.to_le_bytes()); // min_io_size
    put(34, &QUEUES_MAX.to_le_bytes()); // num_queues
    let Some(disk) = disk else { return config };
    let features = disk.bdev.features();
    let block_bytes = disk.bdev.block_size();
    let (size_max, seg_max) =
        if features.any_alignment { (131_072_u32, 126_u32) } else { (65_536, 29) };
    put(0, &(disk.bdev.size_bytes() / SECTOR_BYTES).to_le_bytes()); // capacity
    put(8, &size_max.to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    put(20, &block_bytes.to_le_bytes()); // blk_size
    put(WCE_AT, &[write_cache.into()]);
    if features.unmap {
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
        put(40, &(RANGES_MAX as u32).to_le_bytes()); // max_discard_seg
        put(44, &(block_bytes / SECTOR_BYTES as u32).to_le_bytes()); // discard_sector_alignment
    }
    if features.write_zeroes {
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &(RANGES_MAX as u32).to_le_bytes()); // max_write_zeroes_seg
    }
    config
}

/// What SET_CONFIG of `contents` at `offset` makes of `wce`: `None` if it is not written, or to
/// something that it cannot be. Nothing else can be written, and such a write is ignored, as SPDK
/// does.
#[must_use]
pub fn written_write_cache(offset: u32, contents: &[u8]) -> Option<bool> {
    let at = WCE_AT.checked_sub(offset as usize)?;
    match contents.get(at)? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdev::{Malloc, MallocOptions, Null, NullOptions};

    /// Nobody who has negotiated with SPDK misses anything here.
    #[test]
    fn all_that_spdk_offers_is_offered() {
        let (num_blocks, block_size) = (64, 512);
        let options = MallocOptions { name: "m".into(), num_blocks, block_size, uuid: None };
        let malloc: Arc<dyn Bdev> = Malloc::create(options).unwrap();
        let options = NullOptions { name: "n".into(), num_blocks, block_size, uuid: None };
        let null: Arc<dyn Bdev> = Null::create(options).unwrap();
        let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
        // The disk, whether it is read-only, what SPDK offers, and what we do beyond.
        for (bdev, read_only, spdk, more) in [
            (&malloc, false, 0x1_5c00_7646, event_idx | 1 << VIRTIO_BLK_F_CONFIG_WCE),
            (&malloc, true, 0x1_5c00_7666, event_idx | 1 << VIRTIO_BLK_F_CONFIG_WCE),
            (&null, false, 0x1_5c00_5446, event_idx),
        ] {
            let features = Disk { bdev: Arc::clone(bdev), read_only }.features();
            assert_eq!(features, spdk | more, "{} {features:#x}", bdev.name());
        }
    }
}
