//! Disks of other vhost-user-blk servers as block devices: SPDK's bdev module `virtio`, transport
//! `user`.
//!
//! * `memory`: the memory that is shared with a server. `request`: virtio-blk's requests. `ring`:
//!   the driver's side of a virtqueue.
//! * `queue`: a virtqueue that channels share.
//! * `session`: the vhost-user handshake. `connection`: the thread that keeps a disk connected.
//!   `size`: the size of a disk, which may grow.
//! * `disk`: the bdev. `module`: the RPC methods.
//!
//! Reactors access rings and bounce buffers themselves, without a system call but the server's
//! kick. A server may be hostile: all that it can do is to fail the I/O of its own disk, to delay
//! it, or to answer with wrong data.
//!
//! Forbidden dependencies: DPDK, an async runtime, and the program that runs the module.

mod memory;
mod request;
mod ring;
mod size;

mod queue;

mod session;

mod connection;
mod disk;

mod module;

pub use disk::{VirtioDisk, VirtioOptions};
pub use module::VirtioModule;
