//! A queue of any requests on a packed ring (virtio 1.2, 2.8 and 5.2.6).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Calls, wait};
use crate::descriptor::{Buffer, INDIRECT, NEXT};
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment, Window};
use crate::packed::{PackedDriver, descriptor, put_entry};
use crate::request::{Completion, Heads, QueueOptions, Request, Tag};
use crate::ring::Ring;
use crate::words::words;

/// Drives one packed ring, as [`crate::Queue`] drives a split one. It must be started from
/// [`crate::packed::FIRST_BASE`].
///
/// It lies in the memory of a split [`Ring`], whose three parts are all large enough for the
/// descriptors, the driver's events and the device's events.
#[derive(Debug)]
pub struct PackedQueue {
    ring: Arc<Ring>,
    options: QueueOptions,
    driver: PackedDriver,
    heads: Heads,
    tables: Vec<Window>,
    /// Free buffer ids.
    free: Vec<u16>,
    /// For each buffer id, the number of its descriptors in the ring; 0 if the device does not hold
    /// it.
    parts: Vec<u16>,
    /// Descriptors since the last check for a wanted kick, and free descriptors.
    unkicked: u16,
    room: u16,
}

impl PackedQueue {
    /// Makes a queue on a ring of its own. `event_idx`: VIRTIO_RING_F_EVENT_IDX is negotiated.
    ///
    /// # Errors
    /// No memory is left, the eventfd cannot be created, or the size is invalid.
    pub fn new(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        event_idx: bool,
    ) -> Result<Self> {
        let ring = Arc::new(Ring::new(ram, index, options.size)?);
        let table_bytes = options.table_bytes()?;
        let tables = if options.indirect { options.size } else { 0 };
        let queue = Self {
            ring,
            options,
            driver: PackedDriver::new(event_idx),
            heads: Heads::new(ram, options.size)?,
            tables: (0..tables).map(|_| ram.window(table_bytes, 16)).collect::<Result<_>>()?,
            free: (0..options.size).rev().collect(),
            parts: vec![0; options.size.into()],
            unkicked: 0,
            room: options.size,
        };
        queue.refuse_calls();
        Ok(queue)
    }

    /// Returns the ring, for a front end to start.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Returns the number of requests that the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        usize::from(self.options.size) - self.free.len()
    }

    /// Submits `request` to the device, without a kick: see [`PackedQueue::kick`].
    ///
    /// # Errors
    /// [`Error::Full`] if too few descriptors are free; [`Error::Segments`] if the request never
    /// fits.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<Tag> {
        let parts = request.data.len() + 2;
        let id = self.take_chain(parts)?;
        let buffers = self.heads.lay(id, request);
        self.put_chain(id, parts, buffers);
        Ok(Tag(id))
    }

    /// Submits a chain of any buffers to the device, without a kick. The status of its completion
    /// has no meaning.
    ///
    /// # Errors
    /// As [`PackedQueue::submit`]. Two buffers do not count as segments of data.
    pub fn submit_chain(&mut self, chain: &[Buffer]) -> Result<Tag> {
        let id = self.take_chain(chain.len())?;
        self.put_chain(id, chain.len(), chain.iter().map(|buffer| buffer.flagged()));
        Ok(Tag(id))
    }

    /// Takes a buffer id and descriptors for a chain of `parts` buffers. Returns the id.
    fn take_chain(&mut self, parts: usize) -> Result<u16> {
        let (segments, most) = (parts.saturating_sub(2), self.options.segments_max);
        let fits = self.options.indirect || parts <= usize::from(self.options.size);
        if parts == 0 || segments > most || !fits {
            return Err(Error::Segments { have: segments, most });
        }
        let in_ring = if self.options.indirect { 1 } else { parts };
        let in_ring = u16::try_from(in_ring).expect("at most the size of the ring");
        if in_ring > self.room {
            return Err(Error::Full);
        }
        let id = self.free.pop().ok_or(Error::Full)?;
        self.room -= in_ring;
        self.parts[usize::from(id)] = in_ring;
        Ok(id)
    }

    /// Makes a chain of `parts` buffers available, each with its flags.
    fn put_chain(&mut self, id: u16, parts: usize, buffers: impl Iterator<Item = (Segment, u16)>) {
        let (ring, mut batch) = (self.ring.packed(), self.driver.begin());
        if let Some(table) = self.tables.get(usize::from(id)) {
            for (i, (segment, flags)) in buffers.enumerate() {
                put_entry(words(table), i, segment.gpa, segment.len, flags);
            }
            let len = u32::try_from(16 * parts).expect("at most the size of a table");
            let whole = descriptor(table.gpa(), len, id, INDIRECT);
            self.driver.put(&ring, &mut batch, whole);
        } else {
            for (i, (segment, flags)) in buffers.enumerate() {
                let flags = flags | if i + 1 < parts { NEXT } else { 0 };
                let part = descriptor(segment.gpa, segment.len, id, flags);
                self.driver.put(&ring, &mut batch, part);
            }
        }
        self.driver.publish(&ring, batch);
        let in_ring = self.parts[usize::from(id)];
        self.unkicked = self.options.size.min(self.unkicked + in_ring);
    }

    /// Kicks the device if it wants a kick for the requests submitted since the last call. Returns
    /// whether it did.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn kick(&mut self) -> Result<bool> {
        // If the driver's flags come first, a device that then asks for kicks sees the requests; if
        // the device's request comes first, this sees it. Without the fence, both may miss the
        // other.
        fence(Ordering::SeqCst);
        let unkicked = std::mem::take(&mut self.unkicked);
        let wanted = self.driver.wants_kick(&self.ring.packed(), unkicked);
        if wanted {
            self.ring.kick()?;
        }
        Ok(wanted)
    }

    /// Takes the next request that the device has used, in the device's order.
    ///
    /// # Errors
    /// [`Error::NotHeld`] for a request that the device does not hold: returned twice, or never
    /// submitted.
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        let ring = self.ring.packed();
        let Some(rest) = self.driver.given_back(&ring) else { return Ok(None) };
        #[expect(clippy::cast_possible_truncation, reason = "splits a word into its fields")]
        let (id, used_len) = ((rest >> 32) as u16, rest as u32);
        let parts = self.parts.get_mut(usize::from(id)).map_or(0, std::mem::take);
        if parts == 0 {
            return Err(Error::NotHeld { id: id.into() });
        }
        self.driver.take(&ring, parts);
        self.room += parts;
        self.free.push(id);
        let status = self.heads.status(id);
        Ok(Some(Completion { tag: Tag(id), status, used_len }))
    }

    /// Waits on the call eventfd for the next completion.
    ///
    /// # Errors
    /// [`Error::Stalled`] after [`LIMIT`], and as [`PackedQueue::poll`].
    ///
    /// [`LIMIT`]: crate::LIMIT
    pub fn wait(&mut self) -> Result<Completion> {
        wait(self)
    }

    /// Returns how far it has taken used requests: the position, with its wrap counter above.
    pub(crate) fn base(&self) -> u16 {
        self.driver.base()
    }
}

impl Calls for PackedQueue {
    fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn poll(&mut self) -> Result<Option<Completion>> {
        self.poll()
    }

    fn ask_for_call(&self) {
        self.driver.ask_for_call(&self.ring.packed());
        // If the driver's request for a call comes first, the device sees it and calls; if the
        // device's flags come first, the caller's next check sees the completion.
        fence(Ordering::SeqCst);
    }

    fn refuse_calls(&self) {
        self.driver.refuse_calls(&self.ring.packed());
    }

    fn has_completion(&self) -> bool {
        self.driver.given_back(&self.ring.packed()).is_some()
    }
}
