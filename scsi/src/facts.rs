//! What a logical unit says about its disk: geometry, limits and identity.

/// The vendor that SPDK's disks name, kept so that guests find their disks again.
pub const VENDOR: [u8; 8] = *b"INTEL   ";
/// The revision that SPDK's disks name.
pub const REVISION: [u8; 4] = *b"0001";
/// Bytes of a disk's name that identification pages carry: SPDK's `MAX_SERIAL_STRING`.
pub const NAME_BYTES_MAX: usize = 32;
/// Descriptors of an UNMAP command at most, as in SPDK.
pub const UNMAP_DESCRIPTORS_MAX: u16 = 256;
/// Bytes of the largest transfer that SPDK's disks take, and prefer.
const TRANSFER_BYTES: u32 = 4 << 20;
/// Bytes of the largest COMPARE AND WRITE of SPDK's disks.
const COMPARE_BYTES: u32 = 1 << 20;
/// Blocks of the largest WRITE SAME: what a CDB of 10 bytes can name. Linux asks for no more of a
/// disk without a limit. The limit bounds how long one command takes.
const WRITE_SAME_BLOCKS: u64 = 0xffff;
/// Bytes of the optimal unmap granularity, if the disk has none of its own: Windows rewrites data
/// without one.
const UNMAP_BYTES: u32 = 32 << 10;

/// The facts about a disk. `LogicalUnit` and the fast path of every reactor have a copy each.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Block size in bytes. Not zero.
    pub block_bytes: u32,
    /// Number of blocks. Not zero.
    pub blocks: u64,
    /// LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT, 0 to 15.
    pub physical_exponent: u8,
    /// LOWEST ALIGNED LOGICAL BLOCK ADDRESS, 14 bits.
    pub lowest_aligned: u16,
    /// Thin provisioning, if the disk supports unmap.
    pub unmap: Option<Unmap>,
    /// Nothing may be written.
    pub read_only: bool,
    /// Written data is volatile until it is flushed.
    pub write_cache: bool,
    /// MEDIUM ROTATION RATE (SBC-3, Block Device Characteristics): 1 is a medium that does not
    /// rotate, 0 is not reported.
    pub rotation: u16,
    /// OPTIMAL TRANSFER LENGTH GRANULARITY in blocks.
    pub granularity_blocks: u16,
    /// MAXIMUM TRANSFER LENGTH in blocks; 0 is no limit.
    pub transfer_blocks_max: u32,
    /// OPTIMAL TRANSFER LENGTH in blocks.
    pub transfer_blocks_optimal: u32,
    /// MAXIMUM COMPARE AND WRITE LENGTH in blocks; with 0 the command is not supported.
    pub compare_blocks_max: u8,
    /// MAXIMUM WRITE SAME LENGTH in blocks; 0 is no limit.
    pub write_same_blocks_max: u64,
    /// Vendor, product, serial number and designators.
    pub identity: Identity,
}

/// What a disk that supports unmap says about it (SBC-3, Block Limits and Logical
/// Block Provisioning).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmap {
    /// OPTIMAL UNMAP GRANULARITY in blocks; 0 is not reported.
    pub granularity_blocks: u32,
    /// UNMAP GRANULARITY ALIGNMENT in blocks, less than the granularity.
    pub alignment_blocks: u32,
    /// MAXIMUM UNMAP LBA COUNT: `u32::MAX` is no limit.
    pub blocks_max: u32,
    /// MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT, at most [`UNMAP_DESCRIPTORS_MAX`].
    pub descriptors_max: u16,
    /// LBPRZ: unmapped blocks read as zeroes. SPDK's disks never say so. Of a disk that does,
    /// libiscsi's WriteSame10.UnmapUntilEnd expects what SBC-3 does not allow.
    pub zeroes: bool,
}

/// Who a disk is. Guests' `/dev/disk/by-id` names are made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// T10 VENDOR IDENTIFICATION.
    pub vendor: [u8; 8],
    /// PRODUCT IDENTIFICATION.
    pub product: [u8; 16],
    /// PRODUCT REVISION LEVEL.
    pub revision: [u8; 4],
    /// The disk's name, cut to its length and filled with zeroes.
    name: [u8; NAME_BYTES_MAX],
    name_len: u8,
    /// The NAA designator.
    pub naa: u64,
}

/// The target port through which a command came. A logical unit has several if the same disk is
/// served through several targets; each says of itself what SPDK's says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The number of the target: it is called "Target N".
    pub target: u8,
    /// RELATIVE TARGET PORT IDENTIFIER. SPDK's is 0.
    pub relative: u16,
    /// LOGICAL UNIT GROUP: SPDK's index of the SCSI device in the process.
    pub group: u16,
}

impl Identity {
    /// The identity that SPDK gives to the disk `name`.
    #[must_use]
    pub fn of(product: &str, name: &str) -> Self {
        let mut cut = [0; NAME_BYTES_MAX];
        let mut name_len = 0;
        for (to, from) in cut.iter_mut().zip(name.bytes()) {
            *to = from;
            name_len += 1;
        }
        let mut padded = [b' '; 16];
        padded.iter_mut().zip(product.bytes()).for_each(|(to, from)| *to = from);
        Self {
            vendor: VENDOR,
            product: padded,
            revision: REVISION,
            name: cut,
            name_len,
            naa: naa(name),
        }
    }

    /// The disk's name, of at most [`NAME_BYTES_MAX`] bytes.
    pub fn name(&self) -> impl Iterator<Item = u8> + '_ {
        self.name.iter().copied().take(usize::from(self.name_len))
    }

    /// The unit serial number: the name and a NUL, of [`NAME_BYTES_MAX`] bytes together at most.
    pub fn serial(&self) -> impl Iterator<Item = u8> + '_ {
        self.name().take(NAME_BYTES_MAX - 1).chain([0])
    }
}

/// The NAA designator of SPDK's disks: an IEEE extended identifier of a hash of the name (the
/// reference, 3.2).
#[must_use]
pub fn naa(name: &str) -> u64 {
    let hash =
        name.bytes().fold(0_u64, |hash, byte| hash.wrapping_mul(131).wrapping_add(u64::from(byte)));
    (0x2 << 60) | (hash >> 24 & 0xfff) << 48 | 0x00_0347 << 24 | hash & 0xff_ffff
}

impl Facts {
    /// A disk of this geometry: writable, without a write cache, without unmap, on a medium that
    /// does not rotate. Its limits are SPDK's, except that of WRITE SAME, which is 4 MiB in SPDK.
    /// `block_bytes` and `blocks` are made at least 1.
    #[must_use]
    pub fn new(block_bytes: u32, blocks: u64, identity: Identity) -> Self {
        let block_bytes = block_bytes.max(1);
        let transfer = (TRANSFER_BYTES / block_bytes).max(1);
        Self {
            block_bytes,
            blocks: blocks.max(1),
            physical_exponent: 0,
            lowest_aligned: 0,
            unmap: None,
            read_only: false,
            write_cache: false,
            rotation: 1,
            granularity_blocks: u16::try_from(4096 / block_bytes).unwrap_or(u16::MAX).max(1),
            transfer_blocks_max: transfer,
            transfer_blocks_optimal: transfer,
            compare_blocks_max: u8::try_from(COMPARE_BYTES / block_bytes).unwrap_or(u8::MAX),
            write_same_blocks_max: WRITE_SAME_BLOCKS,
            identity,
        }
    }

    /// What a disk of this block size says about unmap, if it has no limits of its own.
    #[must_use]
    pub fn default_unmap(&self) -> Unmap {
        Unmap {
            granularity_blocks: (UNMAP_BYTES / self.block_bytes.max(1)).max(1),
            alignment_blocks: 0,
            blocks_max: u32::MAX,
            descriptors_max: UNMAP_DESCRIPTORS_MAX,
            zeroes: false,
        }
    }

    /// The length of `blocks` blocks in bytes; `u64::MAX` if it is larger.
    #[must_use]
    pub fn bytes(&self, blocks: u64) -> u64 {
        blocks.saturating_mul(u64::from(self.block_bytes))
    }

    /// The number of whole blocks in `bytes`.
    #[must_use]
    pub fn whole_blocks(&self, bytes: u64) -> u64 {
        // A division takes as long as all the rest of the fast path.
        if self.block_bytes.is_power_of_two() {
            return bytes >> self.block_bytes.trailing_zeros();
        }
        bytes / u64::from(self.block_bytes.max(1))
    }

    /// Whether a range of blocks lies on the disk. An empty range may begin at its end.
    #[must_use]
    pub fn contain(&self, lba: u64, blocks: u64) -> bool {
        lba.checked_add(blocks).is_some_and(|end| end <= self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_that_of_spdk() {
        assert_eq!(naa("Malloc0"), 0x2d1d_0003_4738_6228);
        let identity = Identity::of("Malloc disk", "Malloc0");
        assert_eq!(&identity.product, b"Malloc disk     ");
        assert_eq!(identity.serial().collect::<Vec<_>>(), b"Malloc0\0");
        let long = Identity::of("A product with a long name", &"x".repeat(40));
        assert_eq!(&long.product, b"A product with a");
        assert_eq!(long.name().count(), 32);
        assert_eq!(long.serial().count(), 32);
        assert_eq!(long.serial().last(), Some(0));
    }

    #[test]
    fn ranges_do_not_overflow() {
        let facts = Facts::new(512, 100, Identity::of("", ""));
        assert!(facts.contain(99, 1) && facts.contain(100, 0) && facts.contain(0, 100));
        assert!(!facts.contain(100, 1) && !facts.contain(101, 0) && !facts.contain(1, 100));
        assert!(!facts.contain(u64::MAX, 1) && !facts.contain(1, u64::MAX));
        assert_eq!(facts.bytes(u64::MAX), u64::MAX);
        for block_bytes in [0, 1, 512, 520, 4096, u32::MAX] {
            let facts = Facts { block_bytes, ..facts };
            for bytes in [0, 511, 512, 519, 520, 8191, u64::MAX] {
                assert_eq!(facts.whole_blocks(bytes), bytes / u64::from(block_bytes.max(1)));
            }
        }
    }

    #[test]
    fn limits_are_those_of_spdk() {
        let small = Facts::new(512, 1, Identity::of("", ""));
        assert_eq!((small.granularity_blocks, small.transfer_blocks_max), (8, 8192));
        assert_eq!((small.compare_blocks_max, small.write_same_blocks_max), (255, 0xffff));
        let large = Facts::new(4096, 1, Identity::of("", ""));
        assert_eq!((large.granularity_blocks, large.transfer_blocks_max), (1, 1024));
        assert_eq!(large.compare_blocks_max, 255);
        assert_eq!(Facts::new(8 << 20, 1, small.identity).compare_blocks_max, 0);
    }
}
