//! A vhost-user-blk front end as a library, the load it makes, and the unit its figures are in.
//!
//! It works with any back end that listens on a Unix socket and shares no code with ours. In the
//! order the data flows:
//!
//! 1. [`guest`]: a guest's memory, made from memfds so that a back end can map it too.
//! 2. [`ring`]: where one virtqueue lies in that memory, and raw access to each of its fields.
//! 3. [`driver`]: the driver's side of a virtqueue: requests in, completions out; [`packed`] for the
//!    packed kind, [`any_queue`] for whichever it is.
//! 4. [`front_end`]: the socket: negotiation, start, stop, memory tables, reconnection.
//! 5. [`raw`]: any bytes and any fds on the same socket, for what a front end should not say.
//! 6. [`lingering`]: a socket to send whose close hangs; [`deaf`]: one to connect to that hangs.
//! 7. [`load`]: a thread that keeps queues busy and checks every block it reads.
//! 8. [`perf`]: a load that measures: `vhost-perf`'s engine, beside the driver for speed.
//! 9. [`round_trip`]: how long a cache line takes to another core and back, the unit of latencies.
//! 10. [`servers`]: servers of such disks, ours and others', started and ended for a measurement.
//! 11. [`crash`]: a server that is killed again and again, and a guest that goes on with the next.
//! 12. [`late_io`]: a server that ends while its disk is slow, and I/O of it that comes late.
//! 13. [`spread`] and [`markdown`]: medians of ratios, and the tables that they stand in.
//! 14. [`publish`]: what a measuring program shows while it works, and leaves behind.
//!
//! ```no_run
//! use bench::{FrontEnd, GuestRam, Options, QueueOptions, Request};
//!
//! # fn main() -> bench::Result<()> {
//! let ram = GuestRam::new(&[64 << 20])?;
//! let mut front_end = FrontEnd::connect("/tmp/vhost.0".as_ref(), ram.clone(), Options::default())?;
//! let mut queues = front_end.start_new(1, QueueOptions::default())?;
//! let buffer = ram.alloc(4096, 4096)?;
//! let done = queues[0].run(&Request::read(0, &[buffer]))?;
//! assert_eq!(done.status, bench::STATUS_OK);
//! front_end.stop()?;
//! # Ok(())
//! # }
//! ```

pub mod any_queue;
pub mod crash;
pub mod deaf;
pub mod driver;
pub mod error;
pub mod event;
pub mod front_end;
pub mod guest;
pub mod late_io;
pub mod lingering;
pub mod load;
pub mod markdown;
pub mod packed;
pub mod perf;
pub mod pin;
pub mod publish;
pub mod raw;
mod restarted;
pub mod ring;
pub mod round_trip;
pub mod servers;
pub mod spread;
mod watchdog;
mod words;

pub use any_queue::AnyQueue;
pub use deaf::Deaf;
pub use driver::{Completion, Queue, QueueOptions, Request, STATUS_OK, Tag};
pub use error::{Error, LIMIT, Result};
pub use front_end::{BlkConfig, FrontEnd, Options};
pub use guest::{Backing, GuestRam, Segment};
pub use lingering::Lingering;
pub use load::{Idle, Load, LoadOptions, Summary};
pub use packed::PackedQueue;
pub use raw::RawConnection;
pub use round_trip::round_trip_ns;
pub use spread::Spread;
pub use vhost::vhost_user::VhostUserProtocolFeatures;
