//! A load generator that measures. It spends little time on a request, so that the server is the
//! bottleneck.
//!
//! [`run`] connects and runs the load of a [`Plan`], and returns an [`Outcome`]. In the order of
//! the data flow:
//!
//! 1. [`plan`]: the parameters of the load.
//! 2. [`session`]: the connection, the memory, the threads; `disk`: what the device says of its disk.
//! 3. `worker`: a thread's loop; `lane`: one queue in it.
//! 4. `work` and `verify`: which block is next, and what it should hold.
//! 5. [`front_end::prepared`]: requests laid out once, and the rings they go into.
//! 6. [`clock`], [`pace`], [`histogram`], [`timeline`]: time, and what is kept of it.
//! 7. [`outcome`]: the figures.

pub mod clock;
mod disk;
pub mod histogram;
mod lane;
pub mod outcome;
pub mod pace;
pub mod plan;
pub mod session;
pub mod timeline;
pub(crate) mod verify;
pub(crate) mod work;
mod worker;

pub use outcome::{Latencies, Outcome, Stretch};
pub use plan::{Device, Order, Plan};
pub use session::{Progress, run};
