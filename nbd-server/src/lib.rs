//! An NBD server: exports bdevs over Unix sockets, or to the kernel as `/dev/nbdN`.
//!
//! An [`Export`] listens on a socket. Each client has a thread of its own, which nobody waits for
//! but the end of the export. The data flow:
//!
//! * `export`: the listening thread of one export, and its clients.
//! * `held`: a socket that its account closes. `connection`: the thread of one client. It moves bytes between the socket and the next two.
//! * `properties`: what clients learn of the bdev. `negotiation`: the handshake, a state machine over bytes.
//! * `transmission`: requests in, replies out, over a [`bdev::ThreadChannel`]. `status` answers
//!   which ranges are allocated.
//! * `kernel`: an export to the kernel's NBD driver.
//!
//! A client may be hostile: all that it can do is to use the export as its options allow. What it
//! can make the server hold is bounded, and its file descriptors are closed by its own account.
//!
//! Forbidden dependencies: DPDK, an async runtime, and the RPC server.

mod properties;

mod held;
mod negotiation;
mod status;
mod transmission;

mod connection;

mod export;
mod kernel;

pub use export::{Export, StartError};
pub use kernel::first_free_device;
pub use properties::Properties;
