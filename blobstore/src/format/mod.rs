//! The bytes on the disk: super block, masks, metadata pages and their descriptors. All integers
//! are little endian.

mod blob;
mod bytes;
mod descriptor;
mod mask;
mod page;
mod super_block;

pub use self::blob::{Description, PageTable};
pub use self::descriptor::{Clear, Descriptor, Flags, Xattr, flag, internal};
pub use self::mask::{MaskKind, bytes as mask_bytes, decode as decode_mask, encode as encode_mask};
pub use self::page::{BlobId, Page, extent_page, extents};
pub use self::super_block::{Region, SuperBlock};

/// Bytes of a metadata page, a super block and an extent page that have a meaning.
pub const PAGE: usize = 4096;

/// Clusters that one extent page maps.
pub const PER_EXTENT: u64 = 512;
