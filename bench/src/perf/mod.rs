//! A load that measures: as cheap for each request as can be, so that the server is the limit.
//!
//! [`run`] connects and does what a [`Plan`] says; an [`Outcome`] is what came of it. In the order
//! the data flows:
//!
//! 1. [`plan`]: what to do.
//! 2. [`session`]: the connection, the memory, the threads.
//! 3. `worker`: a thread's loop; `lane`: one queue in it.
//! 4. `work` and `verify`: which block is next, and what it should hold.
//! 5. [`front_end::prepared`]: requests laid out once, and the rings they go into.
//! 6. [`clock`], [`pace`], [`histogram`], [`timeline`]: time, and what is kept of it.
//! 7. [`outcome`]: the figures.

pub mod clock;
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
pub use plan::{Order, Plan};
pub use session::{Progress, run};
