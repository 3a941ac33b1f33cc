//! A vhost-user target: connections, sessions, controllers, and the engine that serves virtqueues for
//! any kind of device.
//!
//! Modules in the order in which a connection meets them:
//!
//! * [`transport`]: what carries messages between a front end and the target (a trait), and
//!   [`protocol`]: what the messages say.
//! * [`session`]: the state machine of one connection. Pure: events in, effects out.
//! * [`device`]: what a kind of device is to the control side, and [`device_queue`]: to a reactor
//!   (traits).
//! * [`queue`]: a virtqueue as a reactor owns it, generic over the device; [`notify`]: notifying the
//!   guest.
//! * `controller`: a device with a name and a socket; `control`: all of them ([`Target`]).
//!
//! A *view* is all that a reactor needs to know of one queue, immutable, replaced as a whole; a *core*
//! is what it keeps about the queue, with one owner at a time. Views are published through [`qsbr`]; a
//! reactor waits for nothing here.
//!
//! This crate never depends on a bdev, on a device, or on DPDK, and never reads JSON.

mod control;
mod controller;
pub mod device;
pub mod device_queue;
mod error;
pub mod notify;
pub mod protocol;
pub mod queue;
pub mod session;
pub mod transport;

pub use control::{DeleteProgress, Events, Moving, Reactor, SteppedReactor, Target};
pub use controller::{
    ControllerInfo, ControllerSpec, IOPS_THRESHOLD_DEFAULT, QueueInfo, SessionInfo,
};
pub use error::Error;
pub use reactor::{Core, Mode, OnStart, ReactorInfo};
pub use transport::{ConnId, Connection, Transport, Verdict};
