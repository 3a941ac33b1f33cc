//! A metadata page: header, descriptors, the number of the next page, CRC.

use std::fmt;

use super::bytes::{crc_is_good, seal, u32_at, u64_at};
use super::descriptor::{self, Descriptor};
use super::{PAGE, PER_EXTENT};

const NO_PAGE: u32 = u32::MAX;
/// Where the descriptors are.
const BODY: std::ops::Range<usize> = 16..4088;

/// The number of a blob: 2^32 plus the number of its root page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(pub u64);

impl BlobId {
    /// The blob with the root page `page`.
    pub fn of_page(page: u32) -> Self {
        Self(1 << 32 | u64::from(page))
    }

    /// The number of the root page, if this is the number of a blob.
    pub fn page(self) -> Option<u32> {
        let page = u32::try_from(self.0 ^ 1 << 32).ok()?;
        (self == Self::of_page(page)).then_some(page)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A metadata page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The blob that wrote it.
    pub id: BlobId,
    /// 0 for a root or an extent page, then counted along the chain.
    pub sequence: u32,
    /// The descriptors.
    pub descriptors: Vec<Descriptor>,
    /// The next page of the chain.
    pub next: Option<u32>,
}

impl Page {
    /// The room for descriptors, in bytes.
    pub const ROOM: usize = BODY.end - BODY.start;

    /// Decodes a page; `None` if the checksum is wrong, or a descriptor exceeds the page or is
    /// malformed.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..PAGE).filter(|bytes| crc_is_good(bytes))?;
        let next = u32_at(bytes, BODY.end);
        Some(Self {
            id: BlobId(u64_at(bytes, 0)),
            sequence: u32_at(bytes, 8),
            descriptors: descriptor::decode_all(&bytes[BODY])?,
            next: (next != NO_PAGE).then_some(next),
        })
    }

    /// The [`PAGE`] bytes of the page. The descriptors must fit into [`Self::ROOM`].
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.0.to_le_bytes().to_vec();
        bytes.extend(self.sequence.to_le_bytes());
        bytes.resize(BODY.start, 0);
        for descriptor in &self.descriptors {
            descriptor.encode(&mut bytes);
        }
        debug_assert!(bytes.len() <= BODY.end, "descriptors exceed the page");
        bytes.resize(BODY.end, 0);
        bytes.extend(self.next.unwrap_or(NO_PAGE).to_le_bytes());
        bytes.resize(PAGE, 0);
        seal(&mut bytes);
        bytes
    }

    /// Whether this is the root of a blob, if it was read from page `number`.
    pub fn is_root(&self, number: u32) -> bool {
        self.sequence == 0 && self.id == BlobId::of_page(number)
    }

    /// Whether a page that was read from `number` looks like a root by its header alone, without
    /// a look at its descriptors.
    pub fn may_be_root(bytes: &[u8], number: u32) -> bool {
        bytes.len() >= PAGE
            && u64_at(bytes, 0) == BlobId::of_page(number).0
            && u32_at(bytes, 8) == 0
            && crc_is_good(&bytes[..PAGE])
    }
}

/// The page that maps the clusters of a blob from `group * 512` on.
pub fn extent_page(id: BlobId, group: u32, clusters: &[u32]) -> Page {
    let start = u32::try_from(u64::from(group) * PER_EXTENT).unwrap_or(u32::MAX);
    let extents = Descriptor::Extents { start, clusters: clusters.to_vec() };
    Page { id, sequence: 0, descriptors: vec![extents], next: None }
}

/// The cluster numbers in the extent page of group `group`; `None` if it is not one.
pub fn extents(page: Page, group: u32) -> Option<Vec<u32>> {
    let wanted = u64::from(group) * PER_EXTENT;
    let mut descriptors = page.descriptors.into_iter();
    match (page.next, descriptors.next()?) {
        (None, Descriptor::Extents { start, clusters })
            if u64::from(start) == wanted
                && (1..=PER_EXTENT).contains(&(clusters.len() as u64)) =>
        {
            Some(clusters)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_blobs_are_numbers_of_pages() {
        assert_eq!(BlobId::of_page(5), BlobId(0x1_0000_0005));
        assert_eq!(BlobId::of_page(u32::MAX).page(), Some(u32::MAX));
        assert_eq!([BlobId(5).page(), BlobId(2 << 32).page(), BlobId(u64::MAX).page()], [None; 3]);
    }

    #[test]
    fn a_full_extent_page_is_read_as_it_was_written() {
        let clusters: Vec<u32> = (7..519).collect();
        let page = extent_page(BlobId::of_page(1), 3, &clusters);
        let bytes = page.encode();
        assert_eq!(Page::decode(&bytes), Some(page.clone()));
        assert_eq!(extents(page.clone(), 3), Some(clusters));
        assert_eq!(extents(page, 2), None);
        assert!(!Page::may_be_root(&bytes, 2) && Page::may_be_root(&bytes, 1));
        assert_eq!(Page::decode(&[0; PAGE]), None);
        assert_eq!(Page::decode(&bytes[1..]), None);
    }
}
