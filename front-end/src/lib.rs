//! A vhost-user-blk front end and the driver's side of virtqueues, as a library.
//!
//! It plays the part of a VMM and of its guest, for tests and measurements. It works with any back
//! end that listens on a Unix socket. In the order in which the data flows:
//!
//! 1. [`guest`]: a guest's memory, made from memfds so that a back end can map it too; `words`: a
//!    part of it as atomic integers.
//! 2. [`ring`]: where one virtqueue lies in that memory, and raw access to each of its fields, such
//!    as a [`descriptor`]; [`event`]: the eventfds for kicks and calls.
//! 3. `split` and [`packed`]: the driver's side of a ring, one for each layout, which both of the
//!    following use.
//! 4. [`request`] and [`queue`]: queues that take any virtio-blk requests; [`prepared`]: queues of
//!    requests that are laid out once, for measuring.
//! 5. [`features`] and [`config_space`]: what is agreed on, and what the device says about itself.
//! 6. `front_end`: [`FrontEnd`], the protocol: negotiation, start, stop, memory tables, reconnection;
//!    `link`: one connection, with a limit on each wait (`watchdog`).
//! 7. [`raw`]: any bytes and any fds on the same socket, for what a front end should not say.
//! 8. [`lingering`]: a socket to send whose close hangs; [`deaf`]: one to connect to that hangs.
//!
//! Forbidden dependencies, which `ci/arrows` checks: no crate of the product. It reaches a server
//! over a socket only, so that a mistake of the product cannot be a mistake of its tests, too.
//!
//! ```no_run
//! use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request};
//!
//! # fn main() -> front_end::Result<()> {
//! let ram = GuestRam::new(&[64 << 20])?;
//! let mut front_end = FrontEnd::connect("/tmp/vhost.0".as_ref(), ram.clone(), Options::default())?;
//! let mut queues = front_end.start_new(1, QueueOptions::default())?;
//! let buffer = ram.alloc(4096, 4096)?;
//! let done = queues[0].run(&Request::read(0, &[buffer]))?;
//! assert_eq!(done.status, front_end::STATUS_OK);
//! front_end.stop()?;
//! # Ok(())
//! # }
//! ```

pub mod config_space;
pub mod deaf;
pub mod descriptor;
pub mod error;
pub mod event;
pub mod features;
mod front_end;
pub mod guest;
pub mod lingering;
mod link;
pub mod packed;
pub mod prepared;
pub mod queue;
pub mod raw;
pub mod request;
pub mod ring;
mod split;
mod watchdog;
mod words;

pub use config_space::BlkConfig;
pub use deaf::Deaf;
pub use error::{Error, LIMIT, Result};
pub use features::{Options, ProtocolFeatures};
pub use front_end::FrontEnd;
pub use guest::{Backing, GuestRam, Segment};
pub use lingering::Lingering;
pub use link::Killer;
pub use queue::{AnyQueue, PackedQueue, Queue};
pub use raw::RawConnection;
pub use request::{Completion, QueueOptions, Request, STATUS_OK, Tag};
pub use ring::RingLayout;
