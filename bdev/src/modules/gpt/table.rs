//! Parses a GUID partition table (UEFI specification, chapter 5) from a disk's first and last
//! bytes. SPDK's rules apply.

use guest_memory::usize_of;
use uuid::{Uuid, uuid};

/// The type of SPDK's partitions.
const CURRENT: Uuid = uuid!("6527994e-2c5a-4eec-9613-8f5944074e8b");
/// Their older type. SPDK shows such a partition without its last block.
const OLD: Uuid = uuid!("7c5222bd-8f5d-4087-9c00-bf9843c7b58c");

/// The bytes read at each end of a disk, at most. A table must lie within them, as in SPDK.
pub(super) const WINDOW: usize = 32 << 10;
/// The length of an entry, and the limit on their number.
const ENTRY_LEN: usize = 128;
const ENTRIES_MAX: usize = 128;
/// The shortest header.
const HEADER_LEN: usize = 92;
/// The position of the header's checksum in the header.
const HEADER_CRC: std::ops::Range<usize> = 16..20;

/// What is known of a disk.
pub(super) struct Disk<'a> {
    /// The bytes in a block, 512 or more.
    pub(super) block_size: usize,
    pub(super) num_blocks: u64,
    /// The first and the last bytes, in whole blocks.
    pub(super) front: &'a [u8],
    pub(super) back: &'a [u8],
}

/// The partitions of a disk that SPDK shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// The disk's GUID.
    pub(super) disk: Uuid,
    /// By ascending number. They do not overlap, and lie within the disk.
    pub(super) partitions: Vec<Partition>,
    /// Partitions of SPDK's types that are not shown, with the reasons.
    pub(super) skipped: Vec<(u32, Skipped)>,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// The index of its entry, from 1.
    pub(super) number: u32,
    pub(super) kind: Uuid,
    pub(super) unique: Uuid,
    /// Its first block on the disk, and the number of its blocks.
    pub(super) first: u64,
    pub(super) num_blocks: u64,
    pub(super) name: String,
}

/// The reason for which a partition is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Skipped {
    /// its range is not within the blocks that the header allows
    #[error("its range is not within the usable blocks")]
    Range,
    /// it has no block
    #[error("it has no block")]
    Empty,
    /// it shares blocks with another partition
    #[error("it overlaps partition {0}")]
    Overlap(u32),
}

/// The reason for which a table is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    /// no header at the expected block
    #[error("there is no header")]
    NoHeader,
    /// the header is corrupt
    #[error("the header's checksum is wrong")]
    HeaderChecksum,
    /// a field of the header is out of range
    #[error("the header's {0} is out of range")]
    Field(&'static str),
    /// the entries are corrupt
    #[error("the checksum of the entries is wrong")]
    EntriesChecksum,
}

/// Returns the disk's table: the first one or, if it is not valid, the one at the end. `None` if
/// the disk is not marked as one that has a table.
///
/// # Errors
/// The reasons for which the two tables are not valid.
pub(super) fn parse(disk: &Disk<'_>) -> Result<Option<Table>, [Invalid; 2]> {
    if !has_protective_mbr(disk) {
        return Ok(None);
    }
    let Some(last) = disk.num_blocks.checked_sub(1) else { return Ok(None) };
    let first = table_at(disk, 1, disk.front, 0);
    first
        .or_else(|first| {
            let blocks_back = (disk.back.len() / disk.block_size) as u64;
            let start = disk.num_blocks.saturating_sub(blocks_back);
            table_at(disk, last, disk.back, start).map_err(|backup| [first, backup])
        })
        .map(Some)
}

/// Returns whether the boot record says that a GUID partition table covers the whole disk.
fn has_protective_mbr(disk: &Disk<'_>) -> bool {
    let Some(mbr) = disk.front.get(..512) else { return false };
    let whole = disk.num_blocks.checked_sub(1).and_then(|size| u32::try_from(size).ok());
    let covers = |entry: &[u8]| {
        let size = u32_at(entry, 12);
        entry[4] == 0xEE && u32_at(entry, 8) == 1 && (size == u32::MAX || Some(size) == whole)
    };
    mbr[510..] == [0x55, 0xAA] && mbr[446..510].chunks_exact(16).any(covers)
}

/// The fields of a valid header.
struct Header {
    disk: Uuid,
    /// The first and the last block that partitions may use.
    usable: (u64, u64),
    entries_lba: u64,
    num_entries: usize,
    entries_crc: u32,
}

/// Parses the table whose header is block `lba`, in `window`, which begins at block `start`.
fn table_at(disk: &Disk<'_>, lba: u64, window: &[u8], start: u64) -> Result<Table, Invalid> {
    let bytes = |from: u64, len: usize| -> Option<&[u8]> {
        let from = usize::try_from(from.checked_sub(start)?).ok()?.checked_mul(disk.block_size)?;
        window.get(from..from.checked_add(len)?)
    };
    let block = bytes(lba, disk.block_size).ok_or(Invalid::NoHeader)?;
    let header = header(block, lba, disk.num_blocks)?;
    let entries = bytes(header.entries_lba, header.num_entries * ENTRY_LEN)
        .ok_or(Invalid::Field("position of the entries"))?;
    if crc32fast::hash(entries) != header.entries_crc {
        return Err(Invalid::EntriesChecksum);
    }
    let mut table = Table { disk: header.disk, partitions: vec![], skipped: vec![] };
    for (number, entry) in (1..).zip(entries.chunks_exact(ENTRY_LEN)) {
        match partition(number, entry, header.usable, &table.partitions) {
            None => {}
            Some(Ok(partition)) => table.partitions.push(partition),
            Some(Err(reason)) => table.skipped.push((number, reason)),
        }
    }
    Ok(table)
}

fn header(block: &[u8], lba: u64, num_blocks: u64) -> Result<Header, Invalid> {
    if block.get(..8) != Some(b"EFI PART") {
        return Err(Invalid::NoHeader);
    }
    let len = usize_of(u32_at(block, 12).into());
    if !(HEADER_LEN..=block.len()).contains(&len) {
        return Err(Invalid::Field("length"));
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&block[..HEADER_CRC.start]);
    crc.update(&[0; 4]);
    crc.update(&block[HEADER_CRC.end..len]);
    if crc.finalize() != u32_at(block, HEADER_CRC.start) {
        return Err(Invalid::HeaderChecksum);
    }
    if u64_at(block, 24) != lba {
        return Err(Invalid::Field("own position"));
    }
    let usable = (u64_at(block, 40), u64_at(block, 48));
    // Blocks 0 and 1 hold the boot record and the header.
    if usable.0 < 2 || usable.0 > usable.1 || usable.1 >= num_blocks {
        return Err(Invalid::Field("range of usable blocks"));
    }
    let num_entries = usize_of(u32_at(block, 80).into());
    if num_entries > ENTRIES_MAX {
        return Err(Invalid::Field("number of entries"));
    }
    if usize_of(u32_at(block, 84).into()) != ENTRY_LEN {
        return Err(Invalid::Field("length of an entry"));
    }
    Ok(Header {
        disk: guid_at(block, 56),
        usable,
        entries_lba: u64_at(block, 72),
        num_entries,
        entries_crc: u32_at(block, 88),
    })
}

/// Parses an entry. `None` if it is not a partition of SPDK's.
fn partition(
    number: u32,
    entry: &[u8],
    usable: (u64, u64),
    before: &[Partition],
) -> Option<Result<Partition, Skipped>> {
    let kind = guid_at(entry, 0);
    if kind != CURRENT && kind != OLD {
        return None;
    }
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    if first < usable.0 || last > usable.1 || first > last {
        return Some(Err(Skipped::Range));
    }
    // No overflow: `last` is a block of the disk.
    let num_blocks = last - first + u64::from(kind == CURRENT);
    if num_blocks == 0 {
        return Some(Err(Skipped::Empty));
    }
    let overlaps = |other: &&Partition| {
        first < other.first + other.num_blocks && other.first < first + num_blocks
    };
    if let Some(other) = before.iter().find(overlaps) {
        return Some(Err(Skipped::Overlap(other.number)));
    }
    let units = entry[56..].chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    let (unique, name) = (guid_at(entry, 16), String::from_utf16_lossy(&name));
    Some(Ok(Partition { number, kind, unique, first, num_blocks, name }))
}

// The callers have checked the lengths.

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the field is within the structure")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(array_at(bytes, at))
}

#[cfg(test)]
mod tests;
