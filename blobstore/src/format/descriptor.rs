//! Descriptors: the typed records in a metadata page.

use super::bytes::{u16_at, u32_at, u64_at};

/// Bits in the first set of flags, those that a reader must know to open a blob.
pub mod flag {
    /// Clusters may be unallocated.
    pub const THIN: u64 = 1;
    /// The blob has internal extended attributes.
    pub const INTERNAL: u64 = 2;
    /// The map is a table of extent pages.
    pub const TABLE: u64 = 4;
    /// The parent is an external snapshot.
    pub const EXTERNAL: u64 = 8;
    /// All known bits of the first set.
    pub const KNOWN: u64 = 15;
    /// In the second set: data and metadata are read-only.
    pub const READ_ONLY: u64 = 1;
    /// In the third set: the clear method.
    pub const CLEAR: u64 = 3;
}

/// Names of internal extended attributes.
pub mod internal {
    /// The parent: the number of a blob.
    pub const PARENT: &[u8] = b"SNAP";
    /// The identity of the external snapshot.
    pub const EXTERNAL: &[u8] = b"EXTSNAP";
    /// This blob is a snapshot being made of that blob.
    pub const MAKING: &[u8] = b"SNAPTMP";
    /// This blob is a snapshot being deleted; the value is its only clone.
    pub const REMOVING: &[u8] = b"SNAPRM";
}

/// What is done to clusters that a blob gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clear {
    /// The same as `Unmap`.
    #[default]
    Default = 0,
    /// Nothing.
    None = 1,
    /// Unmap, if the device can.
    Unmap = 2,
    /// Zeroes are written.
    WriteZeroes = 3,
}

/// The flags of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// A reader that does not know all of these must not open the blob.
    pub invalid: u64,
    /// A reader that does not know all of these must not write to the blob.
    pub data_ro: u64,
    /// A reader that does not know all of these must not change the metadata.
    pub md_ro: u64,
}

impl Flags {
    /// Whether clusters may be unallocated.
    pub fn thin(self) -> bool {
        self.invalid & flag::THIN != 0
    }

    /// Whether the map is a table of extent pages, rather than runs.
    pub fn table(self) -> bool {
        self.invalid & flag::TABLE != 0
    }

    /// Whether the blob never changes.
    pub fn read_only(self) -> bool {
        self.data_ro & flag::READ_ONLY != 0
    }

    /// The clear method.
    pub fn clear(self) -> Clear {
        match self.md_ro & flag::CLEAR {
            1 => Clear::None,
            2 => Clear::Unmap,
            3 => Clear::WriteZeroes,
            _ => Clear::Default,
        }
    }
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// The name, without NUL.
    pub name: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
}

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Descriptor {
    /// Type 1: runs of consecutive clusters, as first cluster and length; cluster 0 is a hole.
    Runs(Vec<(u32, u32)>),
    /// Type 2.
    Xattr(Xattr),
    /// Type 3.
    Flags(Flags),
    /// Type 4: an extended attribute of the store itself.
    Internal(Xattr),
    /// Type 5: extent pages, as page and number of pages; page 0 stands for missing ones.
    Table {
        /// Clusters of the blob.
        clusters: u64,
        /// Page and number of pages.
        entries: Vec<(u32, u32)>,
    },
    /// Type 6: the content of an extent page.
    Extents {
        /// Clusters before the first one.
        start: u32,
        /// Cluster numbers.
        clusters: Vec<u32>,
    },
    /// Another type.
    Unknown(u8),
}

/// The descriptors in the body of a page; `None` if one exceeds it or is malformed.
pub(super) fn decode_all(mut body: &[u8]) -> Option<Vec<Descriptor>> {
    let mut descriptors = Vec::new();
    while body.len() >= 5 {
        let (kind, len) = (body[0], u32_at(body, 1) as usize);
        if kind == 0 && len == 0 {
            break;
        }
        let rest = &body[5..];
        let payload = rest.get(..len)?;
        if kind != 0 {
            descriptors.push(decode(kind, payload)?);
        }
        body = &rest[len..];
    }
    Some(descriptors)
}

fn decode(kind: u8, payload: &[u8]) -> Option<Descriptor> {
    Some(match kind {
        1 => Descriptor::Runs(pairs(payload)?),
        2 => Descriptor::Xattr(xattr(payload)?),
        3 if payload.len() == 24 => Descriptor::Flags(Flags {
            invalid: u64_at(payload, 0),
            data_ro: u64_at(payload, 8),
            md_ro: u64_at(payload, 16),
        }),
        4 => Descriptor::Internal(xattr(payload)?),
        5 if payload.len() >= 8 => {
            Descriptor::Table { clusters: u64_at(payload, 0), entries: pairs(&payload[8..])? }
        }
        6 if payload.len() >= 4 && payload.len().is_multiple_of(4) => Descriptor::Extents {
            start: u32_at(payload, 0),
            clusters: payload[4..].chunks_exact(4).map(|n| u32_at(n, 0)).collect(),
        },
        3 | 5 | 6 => return None,
        other => Descriptor::Unknown(other),
    })
}

fn pairs(payload: &[u8]) -> Option<Vec<(u32, u32)>> {
    let whole = payload.len().is_multiple_of(8);
    whole.then(|| payload.chunks_exact(8).map(|pair| (u32_at(pair, 0), u32_at(pair, 4))).collect())
}

fn xattr(payload: &[u8]) -> Option<Xattr> {
    if payload.len() < 4 {
        return None;
    }
    let name_len = usize::from(u16_at(payload, 0));
    let value_len = usize::from(u16_at(payload, 2));
    if payload.len() != 4 + name_len + value_len {
        return None;
    }
    let (name, value) = payload[4..].split_at(name_len);
    Some(Xattr { name: name.to_vec(), value: value.to_vec() })
}

impl Descriptor {
    /// Bytes of the descriptor, with its header.
    pub(super) fn size(&self) -> usize {
        5 + match self {
            Self::Runs(runs) => runs.len() * 8,
            Self::Xattr(xattr) | Self::Internal(xattr) => xattr.size(),
            Self::Flags(_) => 24,
            Self::Table { entries, .. } => 8 + entries.len() * 8,
            Self::Extents { clusters, .. } => 4 + clusters.len() * 4,
            Self::Unknown(_) => 0,
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Runs(_) => 1,
            Self::Xattr(_) => 2,
            Self::Flags(_) => 3,
            Self::Internal(_) => 4,
            Self::Table { .. } => 5,
            Self::Extents { .. } => 6,
            Self::Unknown(kind) => *kind,
        }
    }

    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        let len = u32::try_from(self.size() - 5).expect("descriptors are smaller than a page");
        bytes.push(self.kind());
        bytes.extend(len.to_le_bytes());
        match self {
            Self::Runs(pairs) => put_pairs(bytes, pairs),
            Self::Xattr(xattr) | Self::Internal(xattr) => xattr.encode(bytes),
            Self::Flags(flags) => {
                for set in [flags.invalid, flags.data_ro, flags.md_ro] {
                    bytes.extend(set.to_le_bytes());
                }
            }
            Self::Table { clusters, entries } => {
                bytes.extend(clusters.to_le_bytes());
                put_pairs(bytes, entries);
            }
            Self::Extents { start, clusters } => {
                bytes.extend(start.to_le_bytes());
                bytes.extend(clusters.iter().flat_map(|n| n.to_le_bytes()));
            }
            Self::Unknown(_) => {}
        }
    }
}

fn put_pairs(bytes: &mut Vec<u8>, pairs: &[(u32, u32)]) {
    for (first, second) in pairs {
        bytes.extend(first.to_le_bytes());
        bytes.extend(second.to_le_bytes());
    }
}

impl Xattr {
    /// The longest name and value together, in bytes: that of a descriptor that fills a page.
    pub const LONGEST: usize = super::Page::ROOM - 9;

    fn size(&self) -> usize {
        4 + self.name.len() + self.value.len()
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        for part in [&self.name, &self.value] {
            let len = u16::try_from(part.len()).expect("shorter than a page");
            bytes.extend(len.to_le_bytes());
        }
        bytes.extend(&self.name);
        bytes.extend(&self.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_read_as_it_was_written() {
        let xattr = Xattr { name: b"name".to_vec(), value: b"v\0".to_vec() };
        let all = vec![
            Descriptor::Flags(Flags { invalid: 7, data_ro: 1, md_ro: 3 }),
            Descriptor::Xattr(xattr.clone()),
            Descriptor::Internal(xattr),
            Descriptor::Runs(vec![(5, 3), (0, 9)]),
            Descriptor::Table { clusters: 600, entries: vec![(9, 1), (0, 1)] },
            Descriptor::Extents { start: 512, clusters: vec![1, 0, 3] },
        ];
        let mut bytes = Vec::new();
        all.iter().for_each(|descriptor| descriptor.encode(&mut bytes));
        assert_eq!(bytes.len(), all.iter().map(Descriptor::size).sum::<usize>());
        bytes.extend([0; 8]);
        assert_eq!(decode_all(&bytes), Some(all));
    }

    #[test]
    fn malformed_ones_are_refused() {
        for bad in [
            &[1, 7, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7][..],
            &[2, 4, 0, 0, 0, 9, 0, 0, 0],
            &[2, 2, 0, 0, 0, 0, 0, 0],
            &[3, 1, 0, 0, 0, 0],
            &[5, 4, 0, 0, 0, 0, 0, 0, 0],
            &[6, 2, 0, 0, 0, 0, 0],
            &[1, 255, 255, 255, 255],
        ] {
            assert_eq!(decode_all(bad), None, "{bad:?}");
        }
        assert_eq!(decode_all(&[9, 1, 0, 0, 0, 5]), Some(vec![Descriptor::Unknown(9)]));
    }
}
