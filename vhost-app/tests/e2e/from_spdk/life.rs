//! A ring and its life before the swap: the guest's side, and SPDK's.

use std::fs::File;
use std::sync::Arc;

use front_end::ring::Ring;
use front_end::{GuestRam, Segment};

/// Descriptors of a ring.
pub(crate) const SIZE: u16 = 64;

/// How far SPDK gets with the completion of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Whole,
    /// The guest sees it, and the area does not say so yet.
    Published,
    /// The area says that it is about to be published, and the guest sees nothing.
    Announced,
}

/// A ring with requests of one piece of data.
pub(crate) trait Life: Sized {
    /// Of a new ring, with its part of an area for `queues` rings.
    fn new(ram: &Arc<GuestRam>, queue: u16, area: &File) -> Self;

    fn ring(&self) -> &Arc<Ring>;

    /// The position that the front end gives to who goes on.
    fn base(&self) -> u16;

    /// The position after the last request that was made available.
    fn end(&self) -> u16;

    /// Makes a request available, if there is room. Answers with what it is called.
    fn submit(&mut self, write: bool, sector: u64, data: Segment) -> Option<u16>;

    fn kick(&mut self);

    /// A request that has come back, and its status. Panics if it comes back twice.
    fn poll(&mut self) -> Option<(u16, u8)>;

    /// SPDK takes the next request, if there is one.
    fn take(&mut self) -> bool;

    /// What SPDK has taken and not completed, as the guest calls it.
    fn held(&self) -> Vec<u16>;

    /// SPDK completes the `nth` of these.
    fn finish(&mut self, nth: usize, end: End);
}
