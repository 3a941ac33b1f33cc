//! The control queue: task management functions and asynchronous notifications.

use std::sync::Arc;

use super::frame::front;
use super::requests::{Kind, Requests, Used};
use crate::descriptor::Buffer;
use crate::error::Result;
use crate::guest::GuestRam;
use crate::request::{QueueOptions, Tag};

/// The request that asks which notifications there are.
pub const AN_QUERY: u32 = 1;
/// The request that subscribes to notifications.
pub const AN_SUBSCRIBE: u32 = 2;

/// Task management functions, as [`Tmf::subtype`] names them.
pub mod subtype {
    /// Aborts the command with the function's tag.
    pub const ABORT_TASK: u32 = 0;
    /// Aborts all commands of the nexus.
    pub const ABORT_TASK_SET: u32 = 1;
    /// Ends an auto contingent allegiance.
    pub const CLEAR_ACA: u32 = 2;
    /// Aborts all commands of the logical unit.
    pub const CLEAR_TASK_SET: u32 = 3;
    /// Resets the nexus.
    pub const I_T_NEXUS_RESET: u32 = 4;
    /// Resets the logical unit.
    pub const LOGICAL_UNIT_RESET: u32 = 5;
    /// Asks for the command with the function's tag.
    pub const QUERY_TASK: u32 = 6;
    /// Asks for any command of the nexus.
    pub const QUERY_TASK_SET: u32 = 7;
}

/// A task management function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tmf {
    /// One of [`subtype`].
    pub subtype: u32,
    /// The address of the logical unit.
    pub lun: [u8; 8],
    /// The tag of the command that it is about, if it is about one.
    pub tag: u64,
}

/// A request that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The request.
    pub tag: Tag,
    /// The answer: one of [`super::code`].
    pub response: u8,
    /// Of notifications: the events.
    pub events: u32,
    /// The number of bytes that the device reports as written.
    pub used_len: u32,
}

/// Drives the control queue.
pub type ControlQueue = Requests<Functions>;

/// The kind of the requests in the control queue.
#[derive(Debug)]
pub struct Functions;

impl ControlQueue {
    /// As [`super::CommandQueue::new`].
    ///
    /// # Errors
    /// As [`super::CommandQueue::new`].
    pub fn new(ram: &Arc<GuestRam>, options: QueueOptions, features: (bool, bool)) -> Result<Self> {
        Self::with(ram, super::CONTROL_QUEUE, options, features, (32, 8))
    }

    /// Submits a task management function, without a kick.
    ///
    /// # Errors
    /// As [`crate::Queue::submit`].
    pub fn submit(&mut self, tmf: &Tmf) -> Result<Tag> {
        let mut bytes = [0, tmf.subtype].map(u32::to_le_bytes).concat();
        bytes.extend(tmf.lun);
        bytes.extend(tmf.tag.to_le_bytes());
        self.submit_bytes(&bytes, 1)
    }

    /// Submits [`AN_QUERY`] or [`AN_SUBSCRIBE`], without a kick.
    ///
    /// # Errors
    /// As [`crate::Queue::submit`].
    pub fn submit_notification(&mut self, kind: u32, lun: [u8; 8], events: u32) -> Result<Tag> {
        let bytes = [&kind.to_le_bytes()[..], &lun, &events.to_le_bytes()].concat();
        self.submit_bytes(&bytes, 5)
    }

    /// Submits any request of at most 32 bytes, with `room` bytes for its answer, at most 8. The
    /// last of them is its response.
    ///
    /// # Errors
    /// As [`crate::Queue::submit`].
    pub fn submit_bytes(&mut self, bytes: &[u8], room: u32) -> Result<Tag> {
        let frame = self.frames().take(bytes, 8)?;
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut chain = vec![Buffer::readable(front(frame.readable, len))];
        if room > 0 {
            chain.push(Buffer::writable(front(frame.writable, room)));
        }
        self.send(&chain, frame, room)
    }

    /// Submits a task management function, kicks, and waits for its answer, if no other request is
    /// in flight.
    ///
    /// # Errors
    /// As [`ControlQueue::submit`] and [`crate::Queue::wait`].
    pub fn run(&mut self, tmf: &Tmf) -> Result<Answered> {
        self.submit(tmf)?;
        self.kick()?;
        self.wait()
    }
}

impl Kind for Functions {
    /// The room for the answer, in bytes.
    type Kept = u32;
    type Answer = Answered;

    fn answer(ram: &GuestRam, used: Used<u32>) -> Result<Answered> {
        let Used { tag, frame, kept: room, used_len } = used;
        let mut bytes = [0; 8];
        ram.read(frame.writable.gpa, &mut bytes)?;
        let response = bytes[room.clamp(1, 8) as usize - 1];
        let [a, b, c, d, ..] = bytes;
        let events = if room >= 5 { u32::from_le_bytes([a, b, c, d]) } else { 0 };
        Ok(Answered { tag, response, events, used_len })
    }
}
