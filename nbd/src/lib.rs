//! The NBD protocol (network block device): disks of NBD servers as block devices.
//!
//! * [`protocol`]: the protocol's numbers and headers.
//! * `uri`: the address of an export. `resolver`: its host name. `stream`: connecting to it.
//!   `handshake`: choosing the export.
//! * `link`: a socket on an io_uring, without a protocol. `parser`: splits the replies.
//! * `queue`: a connection that channels share.
//! * `connector`: the thread that keeps a disk connected.
//! * `disk`: the bdev. `module`: the RPC methods.
//!
//! Reactors send and receive on their own, without waiting. A server may be hostile: all that it
//! can do is to fail the I/O of its own disk, to delay it, or to answer with wrong data.
//!
//! Forbidden dependencies: DPDK, an async runtime, and the program that runs the module.

pub mod protocol;

mod resolver;
mod stream;
mod uri;

mod handshake;

mod link;
mod parser;

mod queue;

mod connector;

mod disk;

mod module;

pub use disk::{CONNECTIONS_MAX, NbdDisk, NbdOptions};
pub use module::NbdModule;
pub use uri::NbdUri;
