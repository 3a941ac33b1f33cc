//! A request in flight, and where the next one is expected.
#![expect(unsafe_code, reason = "pointers that move between threads")]

use std::ptr::NonNull;

use virtqueue::chain::Chain;

use super::View;
use crate::device_queue::DeviceQueue;

/// A request that was taken from the ring. The fields that every request uses come first and
/// together, including the first segments of its chain: three cache lines.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Slot<D: DeviceQueue> {
    /// The view that the request was submitted under, whose memory it uses.
    pub(super) view: Option<NonNull<View<D::View>>>,
    /// Its id in the used ring: the head (split) or the buffer id (packed).
    pub(super) id: u16,
    /// The position of its chain. Packed rings only.
    pub(super) position: u16,
    /// The number of places that it takes in the used ring.
    pub(super) span: u16,
    /// Its entry in the in-flight area.
    pub(super) entry: u16,
    /// The device's state of the request.
    pub(super) request: D::Request,
    pub(super) chain: Chain,
}

// SAFETY: the pointer is to a view that the slot has pinned. See `RetiredView`.
unsafe impl<D: DeviceQueue> Send for Slot<D> {}

/// The expected place of the next request: that of the previous one, because drivers keep free
/// descriptors and headers on stacks. Prefetching these lines while the available ring's line is in
/// transfer saves two round trips between the cores for a guest at depth 1. Only ever prefetched.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) head: u16,
    pub(super) header: *const u8,
}

// SAFETY: the address is only prefetched.
unsafe impl Send for Expected {}
