//! A vhost-user target: connections, sessions, controllers, and the engine that serves the
//! virtqueues of any kind of device.
//!
//! Modules, in the order in which a connection uses them:
//!
//! * [`transport`]: the trait of what carries messages between a front end and the target.
//!   [`protocol`]: the messages.
//! * [`session`]: the state machine of one connection. Pure: it takes events and returns effects.
//! * [`device`]: the control side of a kind of device. [`device_queue`]: its reactor side. Both are
//!   traits.
//! * [`queue`]: a virtqueue that a reactor owns, generic over the device. [`notify`]: notifies the
//!   guest.
//! * `controller`: a device with a name and a socket. `control`: all controllers ([`Target`]).
//!
//! A *view* is all that a reactor needs to know of one queue. It is immutable and replaced as a
//! whole. A *core* is the state of a queue that its owner changes. It has one owner at a time.
//! Views are published through [`qsbr`]. Reactors never wait here.
//!
//! This crate depends neither on a bdev, nor on a device, nor on DPDK, and does not read JSON.

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

pub use control::{DeleteProgress, Deletion, Events, Moving, Reactor, SteppedReactor, Target};
pub use controller::{
    ControllerInfo, ControllerSpec, IOPS_THRESHOLD_DEFAULT, QueueInfo, SessionInfo,
    check_coalescing, check_name,
};
pub use error::Error;
pub use reactor::{Core, Mode, OnStart, ReactorInfo};
pub use transport::{ConnId, Connection, Offer, Transport, Verdict};
