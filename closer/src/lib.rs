//! Closes fds and files whose close may block, on threads of its own.
//!
//! The sender of an fd over a Unix socket controls how long its `close` takes: that of a TCP socket
//! with unsent data and `SO_LINGER` blocks for as long as the sender likes, and that of a file on
//! FUSE or NFS until its server answers. So threads that serve others must not close such an fd,
//! nor a socket that may have such fds in unread messages.
//!
//! An [`Account`] stands for one owner: a controller, an RPC client, or a block device. What is
//! charged to it is closed in order, by at most one thread at a time. A close that blocks thus
//! delays only that account and occupies one thread. [`Account::is_stuck`] reports it, so that
//! further requests of the owner can be refused.
//!
//! A [`ForeignFd`] is an fd that came from an untrusted process; when it is dropped, its account
//! closes it. [`receive`] reads bytes and keeps every fd that comes with them. Both count towards
//! the account's [`Account::open`], and nothing is read if the fds could exceed the limits
//! ([`Account::has_room`]).
//!
//! This crate knows nothing of vhost, block devices and RPC.

mod account;
mod foreign;
mod receive;

pub use account::{Account, Stuck, set_fds_max, stuck, tick};
pub use foreign::{Error, ForeignFd};
pub use receive::{FDS_MAX, receive};
