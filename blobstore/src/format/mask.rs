//! Masks: one bit for each page, cluster or blob, after a header of 5 bytes.

use super::bytes::u32_at;
use crate::error::{Error, Result};

/// What the bits of a mask stand for; the number is the type in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskKind {
    /// Metadata pages in use.
    Pages = 0,
    /// Clusters in use.
    Clusters = 1,
    /// Root pages.
    Blobs = 2,
}

/// The bytes of a mask of `bits` bits, in whole pages of `page` bytes.
pub fn bytes(bits: usize, page: usize) -> usize {
    (bits.div_ceil(8) + 5).next_multiple_of(page)
}

/// The bytes that hold the bits of a mask, of which there must be at least `bits`.
pub fn decode(bytes: &[u8], kind: MaskKind, bits: usize) -> Result<&[u8]> {
    if bytes.len() < 5 || bytes[0] != kind as u8 {
        return Err(Error::NotAStore("a mask has the wrong type"));
    }
    if (u32_at(bytes, 1) as usize) < bits {
        return Err(Error::NotAStore("a mask is too short"));
    }
    bytes.get(5..5 + bits.div_ceil(8)).ok_or(Error::NotAStore("a mask is too short"))
}

/// The bytes of a mask of `len` bits, filled up with zeroes to `room` bytes.
pub fn encode(kind: MaskKind, len: u32, bits: &[u8], room: usize) -> Vec<u8> {
    let mut bytes = vec![kind as u8];
    bytes.extend(len.to_le_bytes());
    bytes.extend(bits);
    bytes.resize(room, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_read_as_it_was_written() {
        let bytes = encode(MaskKind::Clusters, 12, &[0xff, 0x0f], 4096);
        assert_eq!((bytes.len(), &bytes[..8]), (4096, &[1, 12, 0, 0, 0, 0xff, 0x0f, 0][..]));
        assert_eq!(decode(&bytes, MaskKind::Clusters, 12), Ok(&[0xff, 0x0f][..]));
        assert!(decode(&bytes, MaskKind::Pages, 12).is_err());
        assert!(decode(&bytes, MaskKind::Clusters, 13).is_err());
        assert!(decode(&bytes[..6], MaskKind::Clusters, 12).is_err());
    }
}
