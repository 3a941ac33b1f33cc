//! The requests of a queue in flight, with their memory.

use std::collections::HashMap;
use std::sync::Arc;

use super::frame::{Frame, Frames};
use crate::descriptor::Buffer;
use crate::error::{Error, Result};
use crate::guest::GuestRam;
use crate::queue::AnyQueue;
use crate::request::{Completion, QueueOptions, Tag};
use crate::ring::Ring;

/// A queue, and what is known of each request that the device holds: its memory, and a `T`.
#[derive(Debug)]
pub(super) struct Requests<T> {
    queue: AnyQueue,
    frames: Frames,
    sent: HashMap<Tag, (Frame, T)>,
}

/// A request that the device has used.
pub(super) struct Used<T> {
    pub(super) tag: Tag,
    pub(super) frame: Frame,
    pub(super) kept: T,
    /// The number of bytes that the device reports as written.
    pub(super) used_len: u32,
}

impl<T> Requests<T> {
    /// Makes a queue on a ring of its own, with memory of these numbers of bytes for each request.
    pub(super) fn new(
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

    pub(super) fn ring(&self) -> &Arc<Ring> {
        self.queue.ring()
    }

    pub(super) fn base(&self) -> u16 {
        self.queue.base()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    pub(super) fn kick(&mut self) -> Result<bool> {
        self.queue.kick()
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
    pub(super) fn send(&mut self, chain: &[Buffer], frame: Frame, kept: T) -> Result<Tag> {
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

    /// Takes the next request that the device has used. The caller gives its memory back.
    pub(super) fn poll(&mut self) -> Result<Option<Used<T>>> {
        let completion = self.queue.poll()?;
        completion.map(|completion| self.used(completion)).transpose()
    }

    /// Waits for the next request that the device has used.
    pub(super) fn wait(&mut self) -> Result<Used<T>> {
        let completion = self.queue.wait()?;
        self.used(completion)
    }

    fn used(&mut self, completion: Completion) -> Result<Used<T>> {
        let Completion { tag, used_len, .. } = completion;
        let sent = self.sent.remove(&tag).ok_or(Error::NotHeld { id: tag.0.into() });
        sent.map(|(frame, kept)| Used { tag, frame, kept, used_len })
    }
}
