//! SPDK's blobstore and lvolstore: its format on the disk, read and written.
//!
//! The crate has no threads, no clock and no I/O of its own. [`device`] is the medium as the store
//! sees it; [`mod@format`] are the bytes on it. [`store`] has blobs: their maps, snapshots, clones,
//! and the operations on them, each a future that may be dropped at any point, as a power cut would
//! stop it. [`lvs`] names blobs: logical volumes. [`mod@check`] looks for contradictions in a store,
//! independently of the code that loads it.

#![forbid(unsafe_code)]

pub mod check;
pub mod device;
pub mod error;
pub mod format;
pub mod lvs;
pub mod store;

mod bits;

pub use self::device::{Device, Properties};
pub use self::error::{DeviceError, Error, Result};
pub use self::format::BlobId;
pub use self::store::{Blob, LoadOptions, Parent, Place, Store};
