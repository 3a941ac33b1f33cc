//! The way from the reactors to the control side.

use std::io;

use crossbeam_queue::ArrayQueue;

use crate::event_fd::EventFd;

/// Events that may be queued. A pollable keeps an event that does not fit, and sends it later.
const EVENTS_MAX: usize = 1024;

/// What pollables tell the control side: a bounded queue, for which no reactor ever waits.
#[derive(Debug)]
pub struct Events<E> {
    queue: ArrayQueue<E>,
    wake: EventFd,
}

impl<E> Events<E> {
    /// An empty one.
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

    /// The next event.
    pub fn pop(&self) -> Option<E> {
        self.queue.pop()
    }

    /// Becomes readable when there are events. Read it before taking the events.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
