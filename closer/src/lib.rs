//! Closes fds and files whose close may block, on its own threads.
//!
//! The sender of an fd over a Unix socket controls how long its `close` takes. Closing a TCP socket
//! with unsent data and `SO_LINGER` blocks for as long as the sender likes, and closing a file on
//! FUSE or NFS blocks until its server answers. So a thread that serves several clients must not
//! close such an fd, nor a socket that may have such fds in unread messages.
//!
//! An [`Account`] belongs to one owner: a controller, an RPC client, or a block device. The values
//! charged to it are closed in order, by at most one thread at a time. So a close that blocks
//! delays only that account and occupies one thread. [`Account::is_stuck`] reports it, so that the
//! caller can refuse further requests of the owner.
//!
//! A [`ForeignFd`] is an fd that came from an untrusted process; when it is dropped, its account
//! closes it. [`receive`] reads bytes and keeps every fd that comes with them. Both count towards
//! the account's [`Account::open`], and nothing is read if the fds could exceed the limits
//! ([`Account::has_room`]).
//!
//! This crate depends on no other crate of the workspace.

mod account;
mod foreign;
mod message;
mod receive;

pub use account::{Account, Stuck, set_fds_max, stuck, tick};
pub use foreign::{Error, ForeignFd};
pub use message::FDS_MAX;
pub use receive::receive;
