//! Virtqueues from the device's side: split and packed rings, descriptor chains, in-flight areas.
//!
//! Modules, in the order in which a request passes through them:
//!
//! * `ring`: the trait [`Ring`] and what else both layouts have in common. `split` and `packed`:
//!   the two layouts (virtio 1.2, sections 2.7 and 2.8). `any_ring`: a ring of either layout.
//! * `desc`: descriptors and indirect tables.
//! * [`mod@chain`]: collects the memory of a chain.
//! * [`mod@inflight`]: records the requests in flight in memory that outlives the process.
//! * [`mod@cache`]: prefetches cache lines.
//!
//! This crate never depends on a device or a reactor. The guest may write into a ring at any time.
//! Each value is therefore read once, the length of every chain is limited, and every index is
//! checked.

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
pub use ring::{Chained, Layout, Ring, RingAddrs, RingError, RingHint};
pub use split::{SplitChain, SplitRing};
