//! What the pages of one blob say together, and the pages that say it.

use super::descriptor::{Descriptor, Flags, Xattr, flag, internal};
use super::page::{BlobId, Page};

/// Where the map of a blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageTable {
    /// The map itself, as runs of consecutive clusters: first cluster, or 0 for a hole, and length.
    Runs(Vec<(u32, u32)>),
    /// Extent pages.
    Table {
        /// Clusters of the blob; the extent pages have precedence.
        clusters: u64,
        /// Page and 1, or 0 and the number of missing pages.
        entries: Vec<(u32, u32)>,
    },
}

/// The metadata of a blob, without its extent pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The number of the blob.
    pub id: BlobId,
    /// The flags.
    pub flags: Flags,
    /// Extended attributes, in their order on the disk.
    pub xattrs: Vec<Xattr>,
    /// Internal extended attributes, in their order on the disk.
    pub internal: Vec<Xattr>,
    /// The map.
    pub map: PageTable,
    /// Whether there were descriptors of unknown types, which would be lost if the blob was
    /// written.
    pub unknown: bool,
}

impl Description {
    /// Collects what a root page and the pages of its chain say. Fails with the reason.
    pub fn collect(id: BlobId, chain: Vec<Page>) -> Result<Self, &'static str> {
        let mut flags = None;
        let (mut xattrs, mut internal, mut unknown) = (Vec::new(), Vec::new(), false);
        let (mut runs, mut table) = (None, None);
        for descriptor in chain.into_iter().flat_map(|page| page.descriptors) {
            match descriptor {
                Descriptor::Flags(read) => flags = Some(read),
                Descriptor::Xattr(xattr) => xattrs.push(xattr),
                Descriptor::Internal(xattr) => internal.push(xattr),
                Descriptor::Runs(more) => runs.get_or_insert_with(Vec::new).extend(more),
                Descriptor::Table { clusters, entries } => {
                    let table = table.get_or_insert((clusters, Vec::new()));
                    table.1.extend(entries);
                }
                Descriptor::Extents { .. } => return Err("an extent page is in the chain"),
                Descriptor::Unknown(_) => unknown = true,
            }
        }
        let flags = flags.unwrap_or_default();
        let map = match (runs, table, flags.table()) {
            (None, Some((clusters, entries)), true) => PageTable::Table { clusters, entries },
            (None, None, true) => PageTable::Table { clusters: 0, entries: Vec::new() },
            (runs, None, false) => PageTable::Runs(runs.unwrap_or_default()),
            _ => return Err("the map does not match the flags"),
        };
        Ok(Self { id, flags, xattrs, internal, map, unknown })
    }

    fn attribute(&self, name: &[u8]) -> Option<&Xattr> {
        self.internal.iter().find(|xattr| xattr.name == name)
    }

    /// An internal attribute that is the number of a blob.
    pub fn internal_id(&self, name: &[u8]) -> Option<BlobId> {
        let value = self.attribute(name)?.value.as_slice();
        Some(BlobId(u64::from_le_bytes(value.try_into().ok()?)))
    }

    /// Why it cannot be told where the blob is read: the attribute that names the parent is
    /// malformed or missing.
    pub fn wrong_parent(&self) -> Option<&'static str> {
        if self.attribute(internal::PARENT).is_some_and(|xattr| xattr.value.len() != 8) {
            return Some("the number of its parent is malformed");
        }
        let external = self.flags.invalid & flag::EXTERNAL != 0;
        let missing = external && self.attribute(internal::EXTERNAL).is_none();
        missing.then_some("the identity of its external snapshot is missing")
    }

    /// The pages that hold the description: a root and its chain. The caller sets `next`.
    pub fn pages(&self) -> Vec<Page> {
        let mut writer = Writer { id: self.id, pages: Vec::new(), left: 0 };
        writer.put(Descriptor::Flags(self.flags));
        self.xattrs.iter().for_each(|xattr| writer.put(Descriptor::Xattr(xattr.clone())));
        self.internal.iter().for_each(|xattr| writer.put(Descriptor::Internal(xattr.clone())));
        match &self.map {
            PageTable::Runs(runs) if runs.is_empty() => {}
            PageTable::Runs(runs) => {
                writer.put_pairs(runs, 5, |part| Descriptor::Runs(part.to_vec()));
            }
            PageTable::Table { clusters, entries } => writer.put_pairs(entries, 13, |part| {
                Descriptor::Table { clusters: *clusters, entries: part.to_vec() }
            }),
        }
        writer.pages
    }
}

struct Writer {
    id: BlobId,
    pages: Vec<Page>,
    /// Bytes left in the last page.
    left: usize,
}

impl Writer {
    fn put(&mut self, descriptor: Descriptor) {
        let size = descriptor.size();
        if self.left < size {
            let sequence = u32::try_from(self.pages.len()).expect("far fewer pages");
            let (id, next) = (self.id, None);
            self.pages.push(Page { id, sequence, descriptors: Vec::new(), next });
            self.left = Page::ROOM;
        }
        self.left -= size;
        self.pages.last_mut().expect("was added").descriptors.push(descriptor);
    }

    /// Puts as many pairs as fit into each page, whose descriptor has `header` bytes before them.
    fn put_pairs(
        &mut self,
        pairs: &[(u32, u32)],
        header: usize,
        make: impl Fn(&[(u32, u32)]) -> Descriptor,
    ) {
        let mut rest = pairs;
        loop {
            let fit = match self.left.saturating_sub(header) / 8 {
                0 if !rest.is_empty() => (Page::ROOM - header) / 8,
                fit => fit,
            };
            let (part, after) = rest.split_at(fit.min(rest.len()));
            self.put(make(part));
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_descriptions_are_split_and_collected_again() {
        let xattr = |len| Xattr { name: b"x".to_vec(), value: vec![7; len] };
        let mut blob = Description {
            id: BlobId::of_page(3),
            flags: Flags { invalid: flag::TABLE, ..Flags::default() },
            xattrs: vec![xattr(10), xattr(Xattr::LONGEST - 1), xattr(4000)],
            internal: vec![xattr(1)],
            map: PageTable::Table { clusters: 9, entries: (0..1200).map(|n| (n, 1)).collect() },
            unknown: false,
        };
        let pages = blob.pages();
        assert!(pages.len() > 4);
        let decoded = pages.iter().map(|page| Page::decode(&page.encode()).unwrap());
        assert_eq!(Description::collect(blob.id, decoded.collect()), Ok(blob.clone()));
        blob.flags.invalid = 0;
        blob.map = PageTable::Runs((0..1200).map(|n| (n, 2)).collect());
        assert_eq!(Description::collect(blob.id, blob.pages()), Ok(blob.clone()));
        blob.flags.invalid = flag::TABLE;
        assert!(Description::collect(blob.id, blob.pages()).is_err());
    }
}
