//! The event queue.

use std::sync::Arc;

use super::frame::front;
use super::requests::{Kind, Requests, Used};
use crate::descriptor::Buffer;
use crate::error::Result;
use crate::guest::GuestRam;
use crate::request::{QueueOptions, Tag};

/// Bytes of an event.
const EVENT_BYTES: u32 = 16;

/// Kinds of events, as [`Event::event`] names them, and the reasons of some.
pub mod kind {
    /// Nothing has happened; see [`MISSED`].
    pub const NO_EVENT: u32 = 0;
    /// A target has come or gone: see [`RESCAN`] and [`REMOVED`].
    pub const TRANSPORT_RESET: u32 = 1;
    /// A disk has changed. The reason has the additional sense code and its qualifier.
    pub const PARAM_CHANGE: u32 = 3;
    /// Events were lost. Added to a kind.
    pub const MISSED: u32 = 1 << 31;
    /// Reason: a target has come.
    pub const RESCAN: u32 = 1;
    /// Reason: a target has gone.
    pub const REMOVED: u32 = 2;
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// One of [`kind`].
    pub event: u32,
    /// The address of the logical unit.
    pub lun: [u8; 8],
    /// The reason.
    pub reason: u32,
    /// The number of bytes that the device reports as written.
    pub used_len: u32,
}

/// Drives the event queue.
pub type EventQueue = Requests<Events>;

/// The kind of the requests in the event queue: buffers for events.
#[derive(Debug)]
pub struct Events;

impl EventQueue {
    /// As [`super::CommandQueue::new`].
    ///
    /// # Errors
    /// As [`super::CommandQueue::new`].
    pub fn new(ram: &Arc<GuestRam>, options: QueueOptions, features: (bool, bool)) -> Result<Self> {
        Self::with(ram, super::EVENT_QUEUE, options, features, (1, EVENT_BYTES))
    }

    /// Posts a buffer for an event, and kicks the device if it wants a kick.
    ///
    /// # Errors
    /// As [`crate::Queue::submit`] and [`crate::Queue::kick`].
    pub fn post(&mut self) -> Result<Tag> {
        self.post_bytes(EVENT_BYTES)
    }

    /// The same, with a buffer of `len` bytes, at most 16.
    ///
    /// # Errors
    /// As [`EventQueue::post`].
    pub fn post_bytes(&mut self, len: u32) -> Result<Tag> {
        let frame = self.frames().take(&[], EVENT_BYTES)?;
        let chain = [Buffer::writable(front(frame.writable, len))];
        let tag = self.send(&chain, frame, ())?;
        self.kick()?;
        Ok(tag)
    }
}

impl Kind for Events {
    type Kept = ();
    type Answer = Event;

    fn answer(ram: &GuestRam, used: Used<()>) -> Result<Event> {
        let Used { frame, used_len, .. } = used;
        let mut bytes = [0; EVENT_BYTES as usize];
        ram.read(frame.writable.gpa, &mut bytes)?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let lun = std::array::from_fn(|n| bytes[4 + n]);
        Ok(Event { event: word(0), lun, reason: word(12), used_len })
    }
}
