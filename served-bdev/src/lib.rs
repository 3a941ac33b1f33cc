//! A bdev as a vhost device serves it: what virtio-blk and virtio-scsi queues have in common.
//!
//! * [`User`]: a user of the bdev's rate limits and counters. [`uses`], [`is_limited`]: what is
//!   below the bdev.
//! * [`Opened`]: the channel that one queue has opened. [`Throttled`]: its requests that wait for a
//!   rate limit. [`Tallies`]: its counts of one visit.
//! * [`storage_use`]: the places and leases that requests use.
//!
//! This crate knows no kind of device, no ring and no request.

mod opened;
mod storage;
mod tally;
mod throttled;
mod user;

pub use opened::Opened;
pub use storage::storage_use;
pub use tally::Tallies;
pub use throttled::Throttled;
pub use user::{User, is_limited, uses};
