//! Logical volumes: the volumes of SPDK's lvolstores as bdevs.
//!
//! The crate `blobstore` knows the format; here are the threads, and the I/O of guests.
//! [`LvStore`] is an open store with operators' operations. [`LvolDisk`] is a volume as a bdev. Its
//! channels, on reactors, look each cluster up in a [table](table) and pass the I/O on to the base.
//! An I/O that needs a cluster first, or gives one back, waits for the store's [thread].
//! [`LvolModule`] has the RPC methods, and finds stores on new bdevs.
//!
//! Forbidden dependencies: an async runtime, DPDK, and rings.

mod channel;
mod core;
mod device;
mod disk;
mod externals;
mod facts;
mod link;
mod module;
mod store;
mod table;
mod thread;
mod volume;

pub use blobstore::BlobId;
pub use blobstore::format::Clear;
pub use blobstore::lvs::NewVolume;
pub use disk::LvolDisk;
pub use facts::{Facts, StoreFacts, VolumeFacts};
pub use module::LvolModule;
pub use store::{LvStore, NewStore};
