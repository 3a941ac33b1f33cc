//! A virtio-scsi driver (virtio 1.2, section 5.6): commands in any layout of descriptors, task
//! management functions, events, and their answers.
//!
//! [`cdb`] builds the descriptor blocks of common commands. [`CommandQueue`] drives a request
//! queue, [`ControlQueue`] queue 0, [`EventQueue`] queue 1. Their rings are started like any others
//! ([`crate::FrontEnd::start`]). [`Requests`]: what the three have in common. `frame`: the memory of
//! requests. [`Response`]: the answer to a command.

pub mod cdb;
mod command;
mod control;
mod event;
mod frame;
mod requests;
mod response;

pub(crate) use self::command::HEADER_BYTES;
pub use self::command::{Command, CommandQueue, Done, Layout};
pub use self::control::{AN_QUERY, AN_SUBSCRIBE, Answered, ControlQueue, Tmf, subtype};
pub use self::event::{Event, EventQueue, kind};
pub use self::requests::Requests;
pub(crate) use self::response::RESPONSE_BYTES;
pub use self::response::{Response, SENSE_BYTES, code};
use crate::features::{EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1};

/// The virtqueue of task management functions.
pub const CONTROL_QUEUE: usize = 0;
/// The virtqueue of events.
pub const EVENT_QUEUE: usize = 1;
/// The first virtqueue of commands.
pub const FIRST_COMMAND_QUEUE: usize = 2;

/// Feature bit: a command may have data in both directions.
pub const INOUT: u64 = 1 << 0;
/// Feature bit: the device tells the driver of targets that come and go.
pub const HOTPLUG: u64 = 1 << 1;
/// Feature bit: the device tells the driver of changed disks.
pub const CHANGE: u64 = 1 << 2;
/// The features that Linux's driver accepts, and those that the protocol adds.
pub const DRIVER_FEATURES: u64 =
    HOTPLUG | CHANGE | 1 << 27 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1;

/// Returns the address of a logical unit as Linux writes it: flat addressing.
#[must_use]
pub fn lun(target: u8, lun: u16) -> [u8; 8] {
    let [high, low] = (0x4000 | (lun & 0x3fff)).to_be_bytes();
    [1, target, high, low, 0, 0, 0, 0]
}

/// Returns the address as Windows writes it: peripheral addressing.
#[must_use]
pub fn peripheral_lun(target: u8, lun: u8) -> [u8; 8] {
    [1, target, 0, lun, 0, 0, 0, 0]
}
