//! A vhost-user front end and the driver's side of virtqueues, as a library.
//!
//! It acts as a VMM and its guest, for tests and measurements. It works with any back end that
//! listens on a Unix socket. The modules, in the order of the data flow:
//!
//! 1. [`guest`]: a guest's memory, made from memfds so that a back end can map it too; `words`: a
//!    part of it as atomic integers.
//! 2. [`ring`]: the place of one virtqueue in that memory, and raw access to each of its fields,
//!    such as a [`descriptor`]; [`event`]: the eventfds for kicks and calls.
//! 3. `split` and [`packed`]: the driver's side of a ring, one for each layout. Both of the
//!    following use it.
//! 4. [`request`] and [`queue`]: queues that take any virtio-blk requests; [`prepared`]: queues of
//!    requests that are laid out once, for measurements; [`scsi`]: queues of a virtio-scsi driver.
//! 5. [`features`] and [`config_space`]: the negotiated features, and the device's configuration.
//! 6. `front_end`: [`FrontEnd`], the protocol: negotiation, start, stop, memory tables,
//!    reconnection; `link`: one connection, with a limit on each wait (`watchdog`).
//! 7. [`raw`]: any bytes and any fds on the same socket, for invalid messages.
//! 8. [`lingering`]: a socket whose close blocks, to be sent; [`unresponsive`]: a socket to which a
//!    connect blocks.
//!
//! Forbidden dependencies, which `ci/arrows` checks: crates of the product. This crate reaches a
//! server only over a socket, so it cannot share a bug with the product that it tests.
//!
//! ```no_run
//! use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request};
//!
//! # fn main() -> front_end::Result<()> {
//! let ram = GuestRam::new(&[64 << 20])?;
//! let path = "/tmp/vhost.0".as_ref();
//! let mut front_end = FrontEnd::connect(path, ram.clone(), Options::default())?;
//! let mut queues = front_end.start_new(1, QueueOptions::default())?;
//! let buffer = ram.alloc(4096, 4096)?;
//! let done = queues[0].run(&Request::read(0, &[buffer]))?;
//! assert_eq!(done.status, front_end::STATUS_OK);
//! front_end.stop()?;
//! # Ok(())
//! # }
//! ```

pub mod config_space;
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
pub mod scsi;
mod split;
pub mod unresponsive;
mod watchdog;
mod words;

pub use config_space::BlkConfig;
pub use descriptor::Buffer;
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
pub use unresponsive::UnresponsiveSocket;
