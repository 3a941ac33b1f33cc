//! What the guest sees: virtio-blk over vhost-user, without a line that knows DPDK or JSON.
//!
//! Modules in the order in which a request meets them:
//!
//! * [`transport`]: what carries messages between a front end and the target (a trait), and
//!   [`protocol`]: what the messages say.
//! * [`session`]: the state machine of one connection. Pure: events in, effects out.
//! * [`memory`]: a guest's memory as mapped by us; `sigbus`: what happens when it is cut short.
//! * [`ring`]: split virtqueues; [`request`]: virtio-blk requests; [`queue`]: a virtqueue as a
//!   reactor owns it; [`notify`]: telling the guest.
//! * [`reactor`]: the threads that serve queues; [`reclaim`]: the threads that free and unmap for them.
//! * [`controller`]: a disk with a name and a socket; [`target`]: all of them.
//!
//! A *view* is all that a reactor needs to know of one queue, immutable, replaced as a whole
//! ([`queue::View`]); a *core* is what it keeps about it ([`queue::core::Core`]), with one owner at a
//! time. Views are published through [`qsbr`]; nothing here is ever waited for by a reactor.

mod cache;
pub mod config;
pub mod controller;
pub mod dirty_log;
pub mod inflight;
mod lived;
pub mod memory;
pub mod notify;
pub mod protocol;
pub mod queue;
pub mod reactor;
pub mod reclaim;
pub mod request;
pub mod ring;
pub mod session;
pub mod shared_file;
mod sigbus;
pub mod target;
pub mod transport;

pub use controller::{ControllerInfo, ControllerSpec, QueueInfo, SessionInfo};
pub use reactor::{Core, Mode, OnStart, ReactorInfo};
pub use target::{Error, Target};
pub use transport::{ConnId, Connection, Transport, Verdict};
