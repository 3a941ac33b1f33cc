//! A queue of either layout, for code that drives both alike.

use std::sync::Arc;
use std::time::Duration;

use super::{Calls, PackedQueue, Queue, wait_any};
use crate::descriptor::Buffer;
use crate::error::Result;
use crate::guest::GuestRam;
use crate::request::{Completion, QueueOptions, Request, Tag};
use crate::ring::Ring;

/// A split or a packed ring's driver. The methods are those of [`Queue`] and [`PackedQueue`].
#[derive(Debug)]
#[expect(missing_docs, reason = "the variants' types are documented")]
pub enum AnyQueue {
    Split(Queue),
    Packed(PackedQueue),
}

macro_rules! of_either {
    ($any:expr, $queue:ident => $call:expr) => {
        match $any {
            AnyQueue::Split($queue) => $call,
            AnyQueue::Packed($queue) => $call,
        }
    };
}

impl AnyQueue {
    /// As [`Queue::new`], or as [`PackedQueue::new`].
    ///
    /// # Errors
    /// No memory is left, the eventfd cannot be created, or the size is invalid.
    pub fn new(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        event_idx: bool,
        packed: bool,
    ) -> Result<Self> {
        if packed {
            PackedQueue::new(ram, index, options, event_idx).map(Self::Packed)
        } else {
            Queue::new(ram, index, options, event_idx).map(Self::Split)
        }
    }

    /// Returns the ring, for a front end to start.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        of_either!(self, queue => queue.ring())
    }

    /// Returns how far it has taken used requests, in the format of SET_VRING_BASE and
    /// GET_VRING_BASE. A new queue begins here, and the device stops here if all requests have been
    /// taken.
    #[must_use]
    pub fn base(&self) -> u16 {
        of_either!(self, queue => queue.base())
    }

    /// Returns the number of requests that the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        of_either!(self, queue => queue.in_flight())
    }

    /// Submits `request` to the device, without a kick.
    ///
    /// # Errors
    /// As [`Queue::submit`].
    pub fn submit(&mut self, request: &Request<'_>) -> Result<Tag> {
        of_either!(self, queue => queue.submit(request))
    }

    /// Submits a chain of any buffers to the device, without a kick. The status of its completion
    /// has no meaning.
    ///
    /// # Errors
    /// As [`Queue::submit_chain`].
    pub fn submit_chain(&mut self, chain: &[Buffer]) -> Result<Tag> {
        of_either!(self, queue => queue.submit_chain(chain))
    }

    /// Kicks the device if it wants a kick, and returns whether it did.
    ///
    /// # Errors
    /// As [`Queue::kick`].
    pub fn kick(&mut self) -> Result<bool> {
        of_either!(self, queue => queue.kick())
    }

    /// Takes the next request that the device has used.
    ///
    /// # Errors
    /// As [`Queue::poll`].
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        of_either!(self, queue => queue.poll())
    }

    /// Waits for the next completion.
    ///
    /// # Errors
    /// As [`Queue::wait`].
    pub fn wait(&mut self) -> Result<Completion> {
        of_either!(self, queue => queue.wait())
    }

    /// Sleeps until the device calls for one of `queues`, at most for `limit`; not at all if one
    /// has completions already. Returns whether one has.
    ///
    /// # Errors
    /// The system call fails.
    pub fn wait_any(queues: &[Self], limit: Duration) -> Result<bool> {
        wait_any(queues, limit)
    }
}

impl From<Queue> for AnyQueue {
    fn from(queue: Queue) -> Self {
        Self::Split(queue)
    }
}

impl From<PackedQueue> for AnyQueue {
    fn from(queue: PackedQueue) -> Self {
        Self::Packed(queue)
    }
}

impl Calls for AnyQueue {
    fn ring(&self) -> &Arc<Ring> {
        self.ring()
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn poll(&mut self) -> Result<Option<Completion>> {
        self.poll()
    }

    fn ask_for_call(&self) {
        of_either!(self, queue => queue.ask_for_call());
    }

    fn refuse_calls(&self) {
        of_either!(self, queue => queue.refuse_calls());
    }

    fn has_completion(&self) -> bool {
        of_either!(self, queue => queue.has_completion())
    }
}
