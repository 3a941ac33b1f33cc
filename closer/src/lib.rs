//! Closes what may take long to close, on threads that nobody waits for.
//!
//! Whoever sends an fd over a Unix socket decides how long its `close` takes: a TCP socket with
//! unsent data and `SO_LINGER` holds the closing thread for as long as its sender likes, a file on
//! FUSE or NFS until its server answers. So no thread that others need ever drops such an fd, nor
//! a socket that may still hold unread ones.
//!
//! An [`Account`] stands for one party: a controller, an RPC client, a block device. What is
//! charged to it is closed in order, by at most one thread at a time. So a close that hangs holds
//! up only that account and takes one thread, and [`Account::is_stuck`] tells it, so that the party
//! can be refused what it asks for next.
//!
//! A [`ForeignFd`] is an fd that came from a stranger: dropping it has its account close it.
//! [`receive`] reads bytes and keeps every fd that comes with them. Both count against the
//! account's [`Account::open`], and nothing is read where they would leave no room for others
//! ([`Account::has_room`]).
//!
//! This crate knows no vhost, no device and no RPC.

mod account;
mod foreign;
mod receive;

pub use account::{Account, Stuck, set_fds_max, stuck, tick};
pub use foreign::{Error, ForeignFd};
pub use receive::{FDS_MAX, receive};
