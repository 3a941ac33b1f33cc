//! The trait of everything that a reactor polls.
#![expect(unsafe_code, reason = "reads memory that a pollable names")]

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use qsbr::Reader;

use crate::events::Events;
use crate::iteration::Iteration;

/// What a reactor may do until the next visit of a pollable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Visit again immediately.
    Poll,
    /// Sleep until a wake source signals.
    Event,
    /// Sleep until this time or until a wake source signals, whichever is first.
    Until(Instant),
}

impl Wait {
    /// The wait that satisfies both.
    #[must_use]
    pub fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Poll, _) | (_, Self::Poll) => Self::Poll,
            (Self::Until(one), Self::Until(other)) => Self::Until(one.min(other)),
            (Self::Event, other) | (other, Self::Event) => other,
        }
    }
}

/// Something that a reactor polls, such as a virtqueue. `E` is the type of its events.
///
/// A pollable has one owner at a time: the reactor whose poll set contains it. The ownership begins
/// when the set is published. It ends when the pollable announces this itself, or when the reactor
/// has been quiescent after the publication of a set without the pollable. Only the owner calls the
/// unsafe methods.
///
/// An implementation must guarantee that no method locks, allocates, frees, maps, unmaps, logs or
/// blocks, and that the work of one visit is bounded.
pub trait Pollable<E>: Send + Sync {
    /// Visits the pollable. Returns whether there was work, and stores the hint for the time until
    /// the next visit.
    ///
    /// # Safety
    /// The caller is the owner. `reader` is its reader, is online, and belongs to the pollable's
    /// domain.
    unsafe fn visit(
        &self,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
        hint: &mut PollHint,
    ) -> bool;

    /// Prepares the pollable for a sleep of the reactor: wake sources signal work that comes later.
    /// Returns [`Wait::Poll`] if there is work already.
    ///
    /// # Safety
    /// As for [`Pollable::visit`].
    unsafe fn arm(&self, reader: &Reader, iteration: &Iteration) -> Wait;

    /// Returns whether the control side has changed the pollable since the visit that stored
    /// `hint`.
    ///
    /// # Safety
    /// As for [`Pollable::visit`].
    unsafe fn changed_since(&self, hint: &PollHint, reader: &Reader) -> bool;
}

/// A poll hint: what a reactor reads to decide whether a pollable needs a visit, without touching
/// the pollable.
///
/// A visit creates the hint from the view that it uses. When [`Reader::quiesce`] returns true, the
/// reactor compares the hint with the pollable ([`Pollable::changed_since`]) before it uses the
/// hint again. Until then, the memory that the hint points to is not freed.
#[derive(Clone, Copy, Debug)]
pub struct PollHint {
    /// A half-word that changes when there is work, such as a driver's available index. The reactor
    /// reads it in each iteration, so it must stay readable until the pollable changes.
    pub cell: *const AtomicU16,
    /// The value of `cell` while there is no work, in the byte order of the memory.
    pub seen: u16,
    /// The generation of the view from which the hint was made.
    pub generation: u64,
    /// The pollable needs a visit in each iteration, for a reason other than `cell`.
    pub due: bool,
    /// The reactor may sleep: a wake source signals new work, or no work can come.
    pub wakes: bool,
    /// The pollable was told to stop before the visit.
    pub stop: bool,
}

// SAFETY: an address, which only the owner's reactor reads through.
unsafe impl Send for PollHint {}

/// A half-word that never changes.
static NEVER: AtomicU16 = AtomicU16::new(0);

/// The hint of a pollable that was not visited yet.
impl Default for PollHint {
    fn default() -> Self {
        let (cell, seen) = Self::NEVER;
        Self { cell, seen, generation: 0, due: true, wakes: true, stop: false }
    }
}

impl PollHint {
    /// A [`PollHint::cell`] that never changes, and the value to compare it with.
    pub const NEVER: (*const AtomicU16, u16) = (&raw const NEVER, 0);

    /// Returns whether the pollable needs a visit.
    ///
    /// # Safety
    /// See [`PollHint`].
    #[inline]
    pub(crate) unsafe fn needs_visit(&self) -> bool {
        // SAFETY: the caller guarantees that the address is readable. Relaxed: the visit loads the
        // value again.
        let value = unsafe { &*self.cell }.load(Ordering::Relaxed);
        value != self.seen || self.due
    }
}
