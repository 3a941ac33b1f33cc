//! The virtio-blk device (virtio 1.2, section 5.2), for the target's queue engine.
//!
//! * [`mod@config`]: feature bits and the configuration space.
//! * [`mod@request`]: parses a descriptor chain into an I/O or an answer.
//! * `device`: the control side ([`Blk`]).
//! * `view`: what a queue knows of the disk.
//! * `queue`: the reactor side ([`BlkQueue`]): submits I/Os to a bdev's channel, and answers
//!   requests.
//!
//! This crate depends neither on DPDK, nor on a session or a controller. It uses them through
//! [`vhost_target::device`] and [`vhost_target::device_queue`].

pub mod config;
pub mod request;
mod view;

mod device;
mod queue;

pub use device::{Blk, bdev_resized, limits_changed, remove_bdev};
pub use queue::BlkQueue;
pub use view::BlkView;
