//! Logical volumes: the volumes of SPDK's lvolstores as bdevs.
//!
//! The crate `blobstore` knows the format; here are the threads, and the I/O of guests. The modules,
//! in the order in which they build on one another:
//!
//! 1. `table`, `volume`: the places of a volume's clusters, as reactors look them up.
//! 2. `externals`, `device`: the store's base and external snapshots, for threads that may block.
//! 3. `facts`: what operators see.
//! 4. `link`, `core`: what channels, threads and operations share, and the lock that reactors never
//!    take.
//! 5. `thread`: the store's own thread, which allocates and releases clusters for guests' I/O.
//! 6. `store`: [`LvStore`], operators' operations.
//! 7. `channel`: the I/O path of a volume. `disk`: [`LvolDisk`], the bdev.
//! 8. `module`: [`LvolModule`], the RPC methods, and the stores that are found on new bdevs.
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
