//! Virtqueues as a device sees them: split and packed rings, descriptor chains, in-flight areas.
//!
//! Modules in the order in which a request meets them:
//!
//! * `ring`: what both layouts have in common, above all the trait [`Ring`]; `split` and `packed`:
//!   the layouts (virtio 1.2, sections 2.7 and 2.8); `any_ring`: either of them.
//! * `desc`: descriptors and indirect tables.
//! * [`mod@chain`]: the memory of a chain, collected.
//! * [`mod@inflight`]: which requests are in flight, in memory that outlives the process.
//! * [`mod@cache`]: prefetches of cache lines.
//!
//! This crate never depends on a device or a reactor. The guest writes into a ring at any time: each
//! value is read once, every chain is bounded, and every index is checked.

pub mod cache;
pub mod chain;
pub mod inflight;

mod any_ring;
mod desc;
mod packed;
mod ring;
mod split;

pub use any_ring::{AnyRing, check, parts};
pub use desc::{Buffer, ChainError, Desc, RING_SIZE_MAX};
pub use inflight::QUEUES_MAX;
pub use packed::{KeptChain, PackedChain, PackedRing, Taken};
pub use ring::{Chained, Layout, Look, Ring, RingAddrs, RingError};
pub use split::{SplitChain, SplitRing};
