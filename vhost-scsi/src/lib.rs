//! The virtio-scsi device (virtio 1.2, section 5.6), for the target's queue engine.
//!
//! * `wire`: the layout of requests, responses, task management functions and events.
//! * `unit`: the logical unit of a bdev, which all targets that show the bdev share.
//! * `target`: a target of a controller. It has one logical unit, LUN 0. `slots`: the places of
//!   targets.
//! * `session`: what the queues of one front end share: its nexus, its events, its task management.
//!   `view`: what a queue knows of the targets.
//! * `device`: the control side ([`Scsi`]): adds and removes targets, opens channels for queues.
//! * `parts`, `job`, `disk`: the parts of a request's chain; a command that takes several I/Os; a
//!   target as a request queue has opened it.
//! * `request_queue`, `control_queue`, `event_queue`: the reactor side of the three kinds of queues.
//!
//! Commands are executed by the crate [`scsi`]. This crate depends neither on DPDK, nor on a session
//! or a controller of the target, which it uses through [`vhost_target::device`] and
//! [`vhost_target::device_queue`].

mod wire;

mod unit;

mod slots;
mod target;

mod session;
mod view;

mod disk;
mod job;
mod parts;

mod control_queue;
mod event_queue;
mod request_queue;

mod device;

pub use device::{Scsi, bdev_resized, limits_changed, remove_bdev};
pub use request_queue::RequestQueue;
pub use slots::{AddError, RemoveError, TargetInfo};
pub use target::TARGETS_MAX;
pub use unit::Units;
pub use view::ScsiView;
