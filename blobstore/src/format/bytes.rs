//! Reading integers at fixed offsets, with their CRC.

/// `N` bytes at `at`. The callers have checked the length.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// Whether the last 4 of 4096 bytes are the CRC32C of the others.
pub(super) fn crc_is_good(page: &[u8]) -> bool {
    u32_at(page, super::PAGE - 4) == crc32c::crc32c(&page[..super::PAGE - 4])
}

/// Writes the CRC32C of the other bytes into the last 4 of a page.
pub(super) fn seal(page: &mut [u8]) {
    let crc = crc32c::crc32c(&page[..super::PAGE - 4]);
    page[super::PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
}
