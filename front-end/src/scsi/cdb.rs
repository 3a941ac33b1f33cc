//! The command descriptor blocks of common commands (SPC-4, SBC-3).

/// Bytes of a command descriptor block in a request: the default of `cdb_size`.
pub const CDB_BYTES: usize = 32;

/// A command descriptor block.
pub type Cdb = [u8; CDB_BYTES];

/// FUA of READ and WRITE with 10 bytes or more, in byte 1.
pub const FUA: u8 = 0x08;
/// UNMAP of WRITE SAME, in byte 1.
pub const UNMAP: u8 = 0x08;
/// NDOB of WRITE SAME(16), in byte 1.
pub const NO_DATA: u8 = 0x01;
/// BYTCHK 01b of VERIFY and WRITE AND VERIFY, in byte 1: compare with the data.
pub const COMPARE: u8 = 0x02;

/// Returns these bytes and zeroes.
#[must_use]
pub fn of(bytes: &[u8]) -> Cdb {
    let mut cdb = [0; CDB_BYTES];
    let len = bytes.len().min(CDB_BYTES);
    cdb[..len].copy_from_slice(&bytes[..len]);
    cdb
}

/// Returns a command of 10 bytes with an address of 32 bits and a length of 16.
#[must_use]
pub fn ten(operation: u8, flags: u8, lba: u32, blocks: u16) -> Cdb {
    let mut cdb = of(&[operation, flags]);
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// Returns a command of 16 bytes with an address of 64 bits and a length of 32.
#[must_use]
pub fn sixteen(operation: u8, flags: u8, lba: u64, blocks: u32) -> Cdb {
    let mut cdb = of(&[operation, flags]);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// TEST UNIT READY.
#[must_use]
pub fn test_unit_ready() -> Cdb {
    of(&[])
}

/// REQUEST SENSE.
#[must_use]
pub fn request_sense(allocation: u8) -> Cdb {
    of(&[0x03, 0, 0, 0, allocation])
}

/// INQUIRY: standard data, or a page of vital product data.
#[must_use]
pub fn inquiry(page: Option<u8>, allocation: u16) -> Cdb {
    let [high, low] = allocation.to_be_bytes();
    of(&[0x12, u8::from(page.is_some()), page.unwrap_or(0), high, low])
}

/// REPORT LUNS.
#[must_use]
pub fn report_luns(select: u8, allocation: u32) -> Cdb {
    let mut cdb = of(&[0xa0, 0, select]);
    cdb[6..10].copy_from_slice(&allocation.to_be_bytes());
    cdb
}

/// READ CAPACITY(16).
#[must_use]
pub fn read_capacity(allocation: u32) -> Cdb {
    sixteen(0x9e, 0x10, 0, allocation)
}

/// READ(10).
#[must_use]
pub fn read(lba: u32, blocks: u16) -> Cdb {
    ten(0x28, 0, lba, blocks)
}

/// WRITE(10).
#[must_use]
pub fn write(lba: u32, blocks: u16) -> Cdb {
    ten(0x2a, 0, lba, blocks)
}

/// SYNCHRONIZE CACHE(10) of the whole disk.
#[must_use]
pub fn synchronize_cache() -> Cdb {
    ten(0x35, 0, 0, 0)
}

/// VERIFY(10), with [`COMPARE`] or without.
#[must_use]
pub fn verify(flags: u8, lba: u32, blocks: u16) -> Cdb {
    ten(0x2f, flags, lba, blocks)
}

/// WRITE AND VERIFY(10), with [`COMPARE`] or without.
#[must_use]
pub fn write_and_verify(flags: u8, lba: u32, blocks: u16) -> Cdb {
    ten(0x2e, flags, lba, blocks)
}

/// WRITE SAME(16), with [`UNMAP`] and [`NO_DATA`] or without.
#[must_use]
pub fn write_same(flags: u8, lba: u64, blocks: u32) -> Cdb {
    sixteen(0x93, flags, lba, blocks)
}

/// COMPARE AND WRITE.
#[must_use]
pub fn compare_and_write(flags: u8, lba: u64, blocks: u8) -> Cdb {
    let mut cdb = sixteen(0x89, flags, lba, 0);
    cdb[13] = blocks;
    cdb
}

/// UNMAP with a parameter list of `bytes`.
#[must_use]
pub fn unmap(bytes: u16) -> Cdb {
    ten(0x42, 0, 0, bytes)
}

/// Returns the parameter list of an UNMAP: first block and number of blocks of each range.
#[must_use]
pub fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let bytes = 16 * ranges.len();
    let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes();
    let mut list = [short(bytes + 6), short(bytes)].concat();
    list.resize(8, 0);
    for (lba, blocks) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

/// RESERVE(6), or RELEASE(6).
#[must_use]
pub fn reserve(release: bool) -> Cdb {
    of(&[if release { 0x17 } else { 0x16 }])
}

/// PERSISTENT RESERVE OUT: a service action with a type, and a parameter list of 24 bytes.
#[must_use]
pub fn persistent_reserve_out(action: u8, kind: u8) -> Cdb {
    of(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24])
}

/// Returns the parameter list of a PERSISTENT RESERVE OUT.
#[must_use]
pub fn reservation_keys(key: u64, service_action_key: u64) -> Vec<u8> {
    let mut list = [key, service_action_key].map(u64::to_be_bytes).concat();
    list.resize(24, 0);
    list
}

/// PERSISTENT RESERVE IN.
#[must_use]
pub fn persistent_reserve_in(action: u8, allocation: u16) -> Cdb {
    let [high, low] = allocation.to_be_bytes();
    of(&[0x5e, action, 0, 0, 0, 0, 0, high, low])
}
