//! The feature bits and the config space that a controller shows to a guest.

use std::sync::Arc;

use bdev::{Bdev, UserCounts};
use served_bdev::User;
use vhost_target::session::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtqueue::QUEUES_MAX;

use crate::request::{Limits, RANGES_MAX, SECTOR_BYTES};

/// Size of `struct virtio_blk_config` in bytes, up to and including the write-zeroes fields. SPDK's
/// size.
pub const CONFIG_BYTES: usize = 60;

/// Sectors in one discard or write-zeroes request; SPDK's number.
const RANGE_SECTORS_MAX: u32 = 32768;

/// Offset of `min_io_size` in the config space.
const MIN_IO_SIZE_AT: usize = 26;
/// Offset of `wce` in the config space.
const WCE_AT: usize = 32;

/// A block device that a controller shows to guests.
pub struct Disk {
    /// The block device.
    pub bdev: Arc<dyn Bdev>,
    /// Whether the operator made the controller read-only.
    pub read_only: bool,
    /// Identifies the controller to the bdev's rate limits and counters.
    pub(crate) user: User,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Disk({})", self.bdev.name())
    }
}

impl Disk {
    /// Returns what the controller's queues have done at the bdev.
    pub(crate) fn counts(&self) -> UserCounts {
        self.user.counts()
    }

    /// Creates the disk of a controller. Each call creates a separate user of the bdev's rate
    /// limits.
    #[must_use]
    pub fn new(bdev: Arc<dyn Bdev>, read_only: bool) -> Self {
        let user = User::new(Arc::clone(&bdev));
        Self { bdev, read_only, user }
    }

    /// Returns the virtio and vhost features that are offered: SPDK's for the same device and
    /// options, plus EVENT_IDX and, with FLUSH, CONFIG_WCE (see `docs/src/replacing-spdk.md`). The
    /// controller adds RING_PACKED.
    ///
    /// With CONFIG_WCE and without FLUSH, Linux would send flushes, which are refused.
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
            | when(self.read_only || bdev.read_only, VIRTIO_BLK_F_RO)
            | when(bdev.flush, VIRTIO_BLK_F_FLUSH)
            | when(bdev.flush, VIRTIO_BLK_F_CONFIG_WCE)
            | when(bdev.unmap, VIRTIO_BLK_F_DISCARD)
            | when(bdev.write_zeroes, VIRTIO_BLK_F_WRITE_ZEROES)
    }

    /// Returns the limits that requests are checked against. A view keeps them, and a disk that
    /// grows gets a new view.
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

/// Returns the config space (virtio 1.2, section 5.2.4) of `disk`, or of a disk that was removed.
/// Then all fields are zero except those that a rebooting QEMU needs, as with SPDK. The guest can
/// only set `write_cache`.
#[must_use]
pub fn config_space(disk: Option<&Disk>, write_cache: bool) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(MIN_IO_SIZE_AT, &1_u16.to_le_bytes());
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
    let topology = Topology::of(&*disk.bdev);
    put(24, &[topology.physical_block_exp]);
    put(MIN_IO_SIZE_AT, &topology.min_io_size.to_le_bytes());
    put(28, &topology.opt_io_size.to_le_bytes());
    put(WCE_AT, &[write_cache.into()]);
    if features.unmap {
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
        put(40, &RANGES_MAX.to_le_bytes()); // max_discard_seg
        #[expect(clippy::cast_possible_truncation, reason = "`SECTOR_BYTES` is 512")]
        let sector_bytes = SECTOR_BYTES as u32;
        put(44, &(block_bytes / sector_bytes).to_le_bytes()); // discard_sector_alignment
    }
    if features.write_zeroes {
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &RANGES_MAX.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[features.unmap.into()]); // write_zeroes_may_unmap
    }
    config
}

/// `struct virtio_blk_topology`, without its `alignment_offset`: block 0 is aligned.
struct Topology {
    physical_block_exp: u8,
    /// In blocks.
    min_io_size: u16,
    /// In blocks.
    opt_io_size: u32,
}

impl Topology {
    fn of(bdev: &dyn Bdev) -> Self {
        let block_bytes = bdev.block_size();
        let topology = bdev.topology().settled(block_bytes);
        // Linux multiplies by the size of a block in 32 bits.
        let optimal = topology.optimal_io_blocks;
        let fits = optimal.checked_mul(block_bytes).is_some();
        // Both sizes are powers of two.
        let physical_block_exp = (topology.physical_block_size / block_bytes).trailing_zeros();
        Self {
            physical_block_exp: physical_block_exp.try_into().expect("at most 32 trailing zeros"),
            // A value that does not fit is cut to a power of two. Drivers take a physical block as
            // the lower limit.
            min_io_size: topology.min_io_blocks.min(1 << 15) as u16,
            opt_io_size: if fits { optimal } else { 0 },
        }
    }
}

/// Returns the value of `wce` after SET_CONFIG of `contents` at `offset`. `None` if `wce` is not
/// written, or the value is invalid. No other field can be written: such a write is ignored, as
/// with SPDK.
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
    use bdev::{Malloc, MallocOptions, Null, NullOptions, Topology};

    /// A guest that has negotiated with SPDK keeps all of its features.
    #[test]
    fn all_features_of_spdk_are_offered() {
        let (num_blocks, block_size) = (64, 512);
        let options = MallocOptions { name: "m".into(), num_blocks, block_size, uuid: None };
        let malloc: Arc<dyn Bdev> = Malloc::create(options).unwrap();
        let options = NullOptions { name: "n".into(), num_blocks, block_size, uuid: None };
        let null: Arc<dyn Bdev> = Null::create(options).unwrap();
        let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
        // The disk, whether it is read-only, the features that SPDK offers, and our additional
        // features.
        for (bdev, read_only, spdk, more) in [
            (&malloc, false, 0x1_5c00_7646, event_idx | 1 << VIRTIO_BLK_F_CONFIG_WCE),
            (&malloc, true, 0x1_5c00_7666, event_idx | 1 << VIRTIO_BLK_F_CONFIG_WCE),
            (&null, false, 0x1_5c00_5446, event_idx),
        ] {
            let features = Disk::new(Arc::clone(bdev), read_only).features();
            assert_eq!(features, spdk | more, "{} {features:#x}", bdev.name());
        }
    }

    /// Virtio 1.2, section 5.2.3: RO is offered if the device is read-only, because of the
    /// controller or of the bdev.
    #[test]
    fn a_read_only_disk_offers_ro() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        for (of_bdev, of_controller) in [(false, false), (true, false), (false, true), (true, true)]
        {
            let bdev = bdev::FileDisk::create(bdev::FileOptions {
                name: "f".into(),
                filename: file.path().into(),
                block_size: Some(512),
                readonly: of_bdev,
                fallocate: true,
                uuid: None,
                flavour: bdev::Flavour::Aio,
                engine: None,
            });
            let disk = Disk::new(bdev.unwrap(), of_controller);
            let offered = disk.features() & 1 << VIRTIO_BLK_F_RO != 0;
            assert_eq!(
                offered,
                of_bdev || of_controller,
                "bdev {of_bdev}, controller {of_controller}"
            );
            assert_eq!(
                disk.limits().features.read_only,
                offered,
                "RO is offered exactly if writes are refused"
            );
        }
    }

    /// Bytes 24 to 32 are the topology of virtio 1.2, section 5.2.4.
    #[test]
    fn the_config_space_has_the_topology_of_the_disk() {
        // The block size. The disk's topology: physical block, minimum I/O and optimal I/O. The
        // expected fields: log2 of the blocks in a physical block, and both I/Os in blocks.
        for (block_size, [physical, min, optimal], (exp, min_io_size, opt_io_size)) in [
            (512, [0, 0, 0], (0, 1_u16, 0_u32)),
            (512, [512, 0, 0], (0, 1, 0)),
            (512, [4096, 0, 256], (3, 8, 256)),
            (512, [4096, 128, 1024], (3, 128, 1024)),
            (4096, [4096, 0, 8], (0, 1, 8)),
            (4096, [16384, 0, 32], (2, 4, 32)),
            // Inconsistent values, and values that do not fit into the fields.
            (4096, [512, 0, 3], (0, 1, 3)),
            (512, [4096, 0, 12], (3, 8, 0)),
            (512, [512, 100_000, 0], (0, 32768, 0)),
            (512, [1 << 31, 0, 1 << 22], (22, 32768, 1 << 22)),
            (512, [512, 0, 1 << 23], (0, 1, 0)),
            (512, [512, 0, (1 << 23) - 1], (0, 1, (1 << 23) - 1)),
            (4096, [0, u32::MAX, u32::MAX], (0, 32768, 0)),
        ] {
            let options = NullOptions { name: "n".into(), num_blocks: 64, block_size, uuid: None };
            let topology = Topology {
                physical_block_size: physical,
                min_io_blocks: min,
                optimal_io_blocks: optimal,
            };
            let bdev = Null::with_topology(options, topology).unwrap();
            let config = config_space(Some(&Disk::new(bdev, false)), true);
            let mut expected = [exp, 0, 0, 0, 0, 0, 0, 0];
            expected[2..4].copy_from_slice(&min_io_size.to_le_bytes());
            expected[4..].copy_from_slice(&opt_io_size.to_le_bytes());
            assert_eq!(config[24..32], expected, "{block_size} {topology:?}");
        }
        assert_eq!(config_space(None, true)[24..32], [0, 0, 1, 0, 0, 0, 0, 0], "as SPDK");
    }
}
