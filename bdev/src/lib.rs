//! Where the bytes are: block devices and the wrappers round them.
//!
//! A [`Bdev`] is shared: geometry, features, and [`Bdev::open`]. I/O goes through a [`Channel`],
//! which has one owner at a time (the virtqueue it was opened for) and therefore needs no lock.
//! Channels are opened and dropped on the control side and used on a reactor, so the methods of
//! `Bdev` may block and allocate, and the methods of `Channel` may not.

pub mod io;
pub mod stats;

pub use io::{
    Bdev, Channel, Completion, Error, Features, Io, OPS, Op, Segment, Status, Submit, Tag,
};
pub use stats::{Counters, OpCounts, Stats};
