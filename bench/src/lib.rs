//! Loads for vhost-user-blk and vhost-user-scsi servers, measurements of them, and what the measurements need.
//!
//! The crate's programs compare servers with it, and end-to-end tests check and kill servers with
//! it. In the order in which the data flows:
//!
//! 1. [`load`]: a thread that keeps queues busy and checks every block it reads.
//! 2. [`perf`]: a load that measures: `vhost-perf`'s engine.
//! 3. [`round_trip`]: how long a cache line takes to another core and back, the unit of latencies.
//! 4. [`servers`]: servers of such disks, ours and others', started and ended for a measurement.
//! 5. [`crash`]: a server that is killed again and again, and a guest that goes on with the next.
//! 6. [`late_io`]: a server that ends while its disk is slow, and I/O of it that comes late.
//! 7. [`spread`] and [`markdown`]: medians of ratios, and the tables that they stand in.
//! 8. [`publish`]: what a measuring program shows while it works, and leaves behind.
//!
//! Forbidden dependencies, which `ci/arrows` checks: no crate of the product. The library and the
//! programs reach a server over a socket only; the benches in `benches/`, which time parts of the
//! product, and their tests use it as dev-dependencies.

pub mod crash;
pub mod error;
pub mod late_io;
pub mod load;
pub mod markdown;
pub mod perf;
pub mod pin;
pub mod publish;
mod restarted;
pub mod round_trip;
pub mod servers;
pub mod spread;

pub use error::{Error, Result};
pub use load::{Idle, Load, LoadOptions, Summary};
pub use round_trip::round_trip_ns;
pub use spread::Spread;
