//! The control side of bdevs: modules that make them, what the program offers to the modules, names,
//! and claims.
//!
//! * [`module`]: a kind of bdev ([`BdevModule`](module::BdevModule)), and a bdev as its module knows it.
//! * [`method`]: a module's RPC methods.
//! * `host`: the program that runs the modules.
//! * `registry` and `claims`: names and UUIDs; who may use a bdev beside whom.
//! * [`life`]: how bdevs come and go.

pub mod life;
pub mod method;
pub mod module;

mod claims;
mod host;
mod registry;

#[cfg(test)]
pub(crate) mod test_host;

pub use claims::{Claim, ClaimKind, Claimed};
pub use host::{Host, OpenFile};
pub use registry::{BdevId, Errno, Live, Registry, Reservation, account_name};
