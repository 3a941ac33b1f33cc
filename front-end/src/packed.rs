//! The driver's side of a packed ring: requests in, completions out (virtio 1.2, 2.8 and 5.2.6).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::any_queue::{self, Calls};
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment, Window};
use crate::request::{
    Completion, HEAD_BYTES, QueueOptions, Request, STATUS_UNWRITTEN, Tag, status_at,
};
use crate::ring::{INDIRECT, NEXT, Ring, WRITE};
use crate::split::need_event;

/// Descriptor flags: what the side that wrote it last has its wrap counter at.
pub(crate) const AVAILABLE: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;
/// Event flags: always, never, or at the position that is named beside them.
pub(crate) const EVENTS_ON: u16 = 0;
pub(crate) const EVENTS_OFF: u16 = 1;
pub(crate) const EVENTS_AT: u16 = 2;
/// Where both sides begin, as SET_VRING_BASE says it: position 0, wrap counter 1.
pub const FIRST_BASE: u16 = 1 << 15;

/// Where a descriptor has its length, buffer id and flags.
const LEN_AT: usize = 8;
const ID_AT: usize = 12;
const FLAGS_AT: usize = 14;

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) at: u16,
    pub(crate) wrap: bool,
}

impl Position {
    pub(crate) const FIRST: Self = Self { at: 0, wrap: true };

    /// Moves on by `n`, which is at most `size`.
    #[inline]
    pub(crate) fn advance(&mut self, n: u16, size: u16) {
        self.at += n;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// Whether flags say that the descriptor here has been used.
    #[inline]
    pub(crate) fn is_used(self, flags: u16) -> bool {
        (flags & AVAILABLE != 0) == self.wrap && (flags & USED != 0) == self.wrap
    }
}

/// Whether a device whose events are `flags` and `named` wants a kick for the `unkicked` descriptors
/// before `next`, in a ring of `size`.
#[inline]
pub(crate) fn wants_kick(
    [named, flags]: [u16; 2],
    event_idx: bool,
    (next, unkicked): (Position, u16),
    size: u16,
) -> bool {
    match flags & 3 {
        EVENTS_OFF => false,
        EVENTS_AT if event_idx => {
            let mut event = named & !FIRST_BASE;
            if (named & FIRST_BASE != 0) != next.wrap {
                // A round behind.
                event = event.wrapping_sub(size);
            }
            need_event(event, next.at, next.at.wrapping_sub(unkicked))
        }
        _ => true,
    }
}

/// Drives one packed ring, as [`crate::Queue`] drives a split one. To be started from
/// [`FIRST_BASE`].
///
/// It lies in the memory of a split [`Ring`], whose three parts are all large enough: descriptors,
/// the driver's events, the device's events.
#[derive(Debug)]
pub struct PackedQueue {
    ring: Arc<Ring>,
    options: QueueOptions,
    event_idx: bool,
    heads: Window,
    tables: Vec<Window>,
    /// Buffer ids that no request uses.
    free: Vec<u16>,
    /// Of each buffer id: its descriptors in the ring, 0 unless the device holds it.
    parts: Vec<u16>,
    next: Position,
    used: Position,
    /// Descriptors since the last look at whether a kick is wanted, and descriptors that are free.
    unkicked: u16,
    room: u16,
}

impl PackedQueue {
    /// Makes a queue on a ring of its own. `event_idx` says whether VIRTIO_RING_F_EVENT_IDX has
    /// been agreed on.
    ///
    /// # Errors
    /// No memory, no eventfd, or a bad size.
    pub fn new(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        event_idx: bool,
    ) -> Result<Self> {
        let ring = Arc::new(Ring::new(ram, index, options.size)?);
        let table_bytes = 16 * (options.segments_max as u32 + 2);
        let tables = if options.indirect { options.size } else { 0 };
        let queue = Self {
            ring,
            options,
            event_idx,
            heads: ram.window(HEAD_BYTES * u32::from(options.size), 64)?,
            tables: (0..tables).map(|_| ram.window(table_bytes, 16)).collect::<Result<_>>()?,
            free: (0..options.size).rev().collect(),
            parts: vec![0; options.size.into()],
            next: Position::FIRST,
            used: Position::FIRST,
            unkicked: 0,
            room: options.size,
        };
        queue.refuse_calls();
        Ok(queue)
    }

    /// The ring, for a front end to start.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Requests that the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        usize::from(self.options.size) - self.free.len()
    }

    /// Hands `request` to the device, without a kick: see [`PackedQueue::kick`].
    ///
    /// # Errors
    /// [`Error::Full`] if too few descriptors are free, [`Error::Segments`] if they never will do.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<Tag> {
        let (segments, most) = (request.data.len(), self.options.segments_max);
        let parts = segments + 2;
        if segments > most || !self.options.indirect && parts > usize::from(self.options.size) {
            return Err(Error::Segments { have: segments, most });
        }
        let in_ring = if self.options.indirect { 1 } else { parts as u16 };
        if in_ring > self.room {
            return Err(Error::Full);
        }
        let id = self.free.pop().ok_or(Error::Full)?;
        self.room -= in_ring;
        self.parts[usize::from(id)] = in_ring;

        let at = usize::from(id) * HEAD_BYTES as usize;
        self.heads.store(at, u64::from(request.kind), Ordering::Relaxed);
        self.heads.store(at + 8, request.sector, Ordering::Relaxed);
        self.heads.store(status_at(id), STATUS_UNWRITTEN, Ordering::Relaxed);

        let header = Segment { gpa: self.heads.gpa() + at as u64, len: 16 };
        let status = Segment { gpa: self.heads.gpa() + status_at(id) as u64, len: 1 };
        let data_flags = if request.device_writes { WRITE } else { 0 };
        let buffers = std::iter::once((header, 0))
            .chain(request.data.iter().map(|&segment| (segment, data_flags)))
            .chain(std::iter::once((status, WRITE)));
        if let Some(table) = self.tables.get(usize::from(id)) {
            for (i, (segment, flags)) in buffers.enumerate() {
                put(table, i, segment, 0);
                table.store(16 * i + FLAGS_AT, flags, Ordering::Relaxed);
            }
            let whole = Segment { gpa: table.gpa(), len: 16 * parts as u32 };
            self.publish(id, [(whole, INDIRECT)].into_iter(), 1);
        } else {
            self.publish(id, buffers, in_ring);
        }
        Ok(Tag(id))
    }

    /// Kicks the device if it wants to be kicked for what was submitted since the last call.
    /// Returns whether it did.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn kick(&mut self) -> Result<bool> {
        // If our flags come first, a device that then asks for kicks sees the requests; if its
        // asking comes first, we see that. Without the fence, both may miss the other.
        fence(Ordering::SeqCst);
        let theirs = self.ring.windows()[2];
        let events = [0, 2].map(|at| theirs.load::<u16>(at, Ordering::Relaxed));
        let unkicked = std::mem::take(&mut self.unkicked);
        let since = (self.next, unkicked);
        let wanted = unkicked > 0 && wants_kick(events, self.event_idx, since, self.options.size);
        if wanted {
            self.ring.kick()?;
        }
        Ok(wanted)
    }

    /// Takes the next request that the device has given back, in its order.
    ///
    /// # Errors
    /// [`Error::NotHeld`] for one that it does not hold: given back twice, or never submitted here.
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        if !self.has_completion() {
            return Ok(None);
        }
        let ([descriptors, ..], at) = (self.ring.windows(), 16 * usize::from(self.used.at));
        let id: u16 = descriptors.load(at + ID_AT, Ordering::Relaxed);
        let used_len = descriptors.load(at + LEN_AT, Ordering::Relaxed);
        let parts = self.parts.get_mut(usize::from(id)).map_or(0, std::mem::take);
        if parts == 0 {
            return Err(Error::NotHeld { id: id.into() });
        }
        self.used.advance(parts, self.options.size);
        self.room += parts;
        self.free.push(id);
        let status = self.heads.load(status_at(id), Ordering::Relaxed);
        Ok(Some(Completion { tag: Tag(id), status, used_len }))
    }

    /// Waits on the call eventfd for the next completion.
    ///
    /// # Errors
    /// [`Error::Stalled`] after [`LIMIT`], and as [`PackedQueue::poll`].
    ///
    /// [`LIMIT`]: crate::LIMIT
    pub fn wait(&mut self) -> Result<Completion> {
        any_queue::wait(self)
    }

    /// How far it has taken back what the device has done: the position, and its wrap counter above.
    pub(crate) fn base(&self) -> u16 {
        self.used.at | if self.used.wrap { FIRST_BASE } else { 0 }
    }

    /// Puts the `count` descriptors of request `id` into the ring.
    fn publish(&mut self, id: u16, parts: impl Iterator<Item = (Segment, u16)>, count: u16) {
        let [descriptors, ..] = self.ring.windows();
        let flags_at = |position: Position| 16 * usize::from(position.at) + FLAGS_AT;
        let (first, mut first_flags) = (self.next, 0);
        for (i, (segment, flags)) in (1..).zip(parts) {
            let state = if self.next.wrap { AVAILABLE } else { USED };
            let flags = flags | state | if i < count { NEXT } else { 0 };
            put(descriptors, self.next.at.into(), segment, id);
            // The device waits for the first one's flags, and looks at no other before.
            if i == 1 {
                first_flags = flags;
            } else {
                descriptors.store(flags_at(self.next), flags, Ordering::Relaxed);
            }
            self.next.advance(1, self.options.size);
        }
        // Release: the device that sees these flags sees the header and all other descriptors.
        descriptors.store(flags_at(first), first_flags, Ordering::Release);
        self.unkicked = self.options.size.min(self.unkicked + count);
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
        let ours = self.ring.windows()[1];
        ours.store(0, self.base(), Ordering::Relaxed);
        let flags = if self.event_idx { EVENTS_AT } else { EVENTS_ON };
        ours.store(2, flags, Ordering::Release);
        // If our asking comes first, the device sees it and calls; if its flags come first, the
        // caller's look at them sees the completion.
        fence(Ordering::SeqCst);
    }

    fn refuse_calls(&self) {
        self.ring.windows()[1].store(2, EVENTS_OFF, Ordering::Relaxed);
    }

    fn has_completion(&self) -> bool {
        let at = 16 * usize::from(self.used.at) + FLAGS_AT;
        // Acquire: pairs with the device's store of the flags after it has written all else.
        self.used.is_used(self.ring.windows()[0].load(at, Ordering::Acquire))
    }
}

/// Writes descriptor `i` of a table, all but its flags.
fn put(table: &Window, i: usize, segment: Segment, id: u16) {
    table.store(16 * i, segment.gpa, Ordering::Relaxed);
    table.store(16 * i + LEN_AT, segment.len, Ordering::Relaxed);
    table.store(16 * i + ID_AT, id, Ordering::Relaxed);
}
