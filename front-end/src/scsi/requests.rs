//! What the three kinds of queues have in common: their ring, and the requests in flight with their
//! memory.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::frame::{Frame, Frames};
use crate::descriptor::Buffer;
use crate::error::{Error, Result};
use crate::guest::GuestRam;
use crate::queue::AnyQueue;
use crate::request::{Completion, QueueOptions, Tag};
use crate::ring::Ring;

/// The kind of a queue's requests.
pub trait Kind {
    /// What is known of a request that the device holds, besides its memory.
    type Kept: fmt::Debug;
    /// What comes back with a request.
    type Answer;

    /// Returns the answer of a request that the device has used.
    ///
    /// # Errors
    /// Its memory is not in guest memory.
    fn answer(ram: &GuestRam, used: Used<Self::Kept>) -> Result<Self::Answer>;
}

/// A request that the device has used.
#[derive(Debug)]
pub struct Used<T> {
    pub(super) tag: Tag,
    pub(super) frame: Frame,
    pub(super) kept: T,
    /// The number of bytes that the device reports as written.
    pub(super) used_len: u32,
}

/// Drives a queue of requests of one kind.
#[derive(Debug)]
pub struct Requests<K: Kind> {
    queue: AnyQueue,
    frames: Frames,
    sent: HashMap<Tag, (Frame, K::Kept)>,
}

impl<K: Kind> Requests<K> {
    /// Makes a queue on a ring of its own, with memory of these numbers of bytes for each request.
    pub(super) fn with(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        (event_idx, packed): (bool, bool),
        (readable, writable): (u32, u32),
    ) -> Result<Self> {
        let queue = AnyQueue::new(ram, index, options, event_idx, packed)?;
        let frames = Frames::new(ram, options.size, readable, writable)?;
        Ok(Self { queue, frames, sent: HashMap::new() })
    }

    /// Returns the ring, for a front end to start.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        self.queue.ring()
    }

    /// As [`AnyQueue::base`].
    #[must_use]
    pub fn base(&self) -> u16 {
        self.queue.base()
    }

    /// Returns the number of requests that the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Kicks the device if it wants a kick, and returns whether it did.
    ///
    /// # Errors
    /// As [`crate::Queue::kick`].
    pub fn kick(&mut self) -> Result<bool> {
        self.queue.kick()
    }

    /// Takes the next request that the device has used.
    ///
    /// # Errors
    /// As [`crate::Queue::poll`].
    pub fn poll(&mut self) -> Result<Option<K::Answer>> {
        let completion = self.queue.poll()?;
        completion.map(|completion| self.finish(completion)).transpose()
    }

    /// Waits for the next request that the device has used.
    ///
    /// # Errors
    /// As [`crate::Queue::wait`].
    pub fn wait(&mut self) -> Result<K::Answer> {
        let completion = self.queue.wait()?;
        self.finish(completion)
    }

    fn finish(&mut self, completion: Completion) -> Result<K::Answer> {
        let Completion { tag, used_len, .. } = completion;
        let sent = self.sent.remove(&tag);
        let (frame, kept) = sent.ok_or(Error::NotHeld { id: tag.0.into() })?;
        let answer = K::answer(self.frames.ram(), Used { tag, frame, kept, used_len })?;
        self.frames.give_back(frame);
        Ok(answer)
    }

    /// Returns the memory of requests.
    pub(super) fn frames(&mut self) -> &mut Frames {
        &mut self.frames
    }

    /// Returns the guest memory.
    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        self.frames.ram()
    }

    /// Submits the chain of a request, without a kick. Its memory is free again if that fails.
    pub(super) fn send(&mut self, chain: &[Buffer], frame: Frame, kept: K::Kept) -> Result<Tag> {
        match self.queue.submit_chain(chain) {
            Ok(tag) => {
                self.sent.insert(tag, (frame, kept));
                Ok(tag)
            }
            Err(error) => {
                self.frames.give_back(frame);
                Err(error)
            }
        }
    }
}
