//! The control side of bdevs: the modules that create them, the services that the program offers to
//! the modules, names, and claims.
//!
//! * [`module`]: a kind of bdev ([`BdevModule`](module::BdevModule)), and a bdev as seen by its
//!   module.
//! * [`method`]: a module's RPC methods.
//! * `host`: the program that runs the modules. `aside`: operations that may never end. `unanswered`:
//!   devices that do not answer an examination.
//! * `registry` and `claims`: names and UUIDs; the rights of a bdev's users.
//! * [`life`]: creation and deletion of bdevs.

pub mod life;
pub mod method;
pub mod module;

mod aside;
mod claims;
mod host;
mod registry;
mod unanswered;

#[cfg(test)]
pub(crate) mod test_host;

pub use aside::Aside;
pub use claims::{Claim, ClaimKind, Claimed};
pub use host::{BdevEvent, Host, OpenFile};
pub use registry::{BdevId, Errno, Live, Registry, Reservation, account_name};
pub use unanswered::Unanswered;
