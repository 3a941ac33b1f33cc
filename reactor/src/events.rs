//! The event queue: from the reactors to the control side.

use std::io;

use crossbeam_queue::ArrayQueue;

use crate::event_fd::EventFd;

/// Capacity of the event queue. A pollable keeps an event that finds the queue full, and sends it
/// later.
const EVENTS_MAX: usize = 1024;

/// The event queue: bounded, so that no reactor ever waits for it. Pollables send, and the control
/// side receives.
#[derive(Debug)]
pub struct Events<E> {
    queue: ArrayQueue<E>,
    wake: EventFd,
}

impl<E> Events<E> {
    /// Creates an empty queue.
    ///
    /// # Errors
    /// The process has no fd left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { queue: ArrayQueue::new(EVENTS_MAX), wake: EventFd::new()? })
    }

    /// Sends an event.
    ///
    /// # Errors
    /// Returns the event if the queue is full.
    pub fn push(&self, event: E) -> Result<(), E> {
        self.queue.push(event)?;
        self.wake.signal();
        Ok(())
    }

    /// Removes and returns the next event.
    pub fn pop(&self) -> Option<E> {
        self.queue.pop()
    }

    /// The eventfd that becomes readable when there are events. Read it before taking the events.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
