//! What a reactor polls.
#![expect(unsafe_code, reason = "reads memory that a pollable names")]

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use qsbr::Reader;

use crate::events::Events;
use crate::iteration::Iteration;

/// What the owner of something that is polled may do until the next visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Visit again at once.
    Poll,
    /// Sleep until a wake source signals.
    Event,
    /// Sleep until this time, or until a wake source signals.
    Until(Instant),
}

impl Wait {
    /// What satisfies both.
    #[must_use]
    pub fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Poll, _) | (_, Self::Poll) => Self::Poll,
            (Self::Until(one), Self::Until(other)) => Self::Until(one.min(other)),
            (Self::Event, other) | (other, Self::Event) => other,
        }
    }
}

/// Something that a reactor polls, such as a virtqueue. `E` is what it tells the control side.
///
/// It has one owner at a time: the reactor whose poll set has it, from the moment the set is
/// published until the pollable says otherwise, or until that reactor has been quiescent since a set
/// without it was published. Only the owner calls the unsafe methods.
///
/// The implementer owes: no method locks, allocates, frees, maps, unmaps, logs or waits; the work of
/// one visit is bounded.
pub trait Pollable<E>: Send + Sync {
    /// One visit. Returns whether there was work, and stores what to look at until the next visit.
    ///
    /// # Safety
    /// The caller is the owner; `reader` is its reader, online, and of the pollable's domain.
    unsafe fn visit(
        &self,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
        hint: &mut PollHint,
    ) -> bool;

    /// Prepares for a sleep of the reactor, after which wake sources signal new work.
    /// [`Wait::Poll`] if there is work right now.
    ///
    /// # Safety
    /// As for [`Pollable::visit`].
    unsafe fn arm(&self, reader: &Reader, iteration: &Iteration) -> Wait;

    /// Whether the control side has changed something since the visit that `hint` is from.
    ///
    /// # Safety
    /// As for [`Pollable::visit`].
    unsafe fn changed_since(&self, hint: &PollHint, reader: &Reader) -> bool;
}

/// What a reactor looks at to see whether a pollable needs a visit, without touching the pollable.
///
/// A visit makes it from the view of that visit. [`Reader::quiesce`] says when it has to be compared
/// with the pollable again ([`Pollable::changed_since`]) before it is used: until then the memory
/// that it points into is not freed.
#[derive(Clone, Copy, Debug)]
pub struct PollHint {
    /// A half-word that changes when there is work, such as a driver's available index. The reactor
    /// reads it in each iteration, so it stays readable until the pollable changes.
    pub cell: *const AtomicU16,
    /// The value of `cell`, as it is in memory, while there is no work.
    pub seen: u16,
    /// The generation of the view that it was made from.
    pub generation: u64,
    /// Something other than `cell` needs a visit in each iteration.
    pub due: bool,
    /// The reactor may sleep: a wake source signals new work, or there is nothing to wait for.
    pub wakes: bool,
    /// The pollable was told to stop before that visit.
    pub stop: bool,
}

// SAFETY: an address that only the owner's reactor reads.
unsafe impl Send for PollHint {}

/// A half-word that never changes.
static NEVER: AtomicU16 = AtomicU16::new(0);

/// For a pollable that was not visited yet.
impl Default for PollHint {
    fn default() -> Self {
        let (cell, seen) = Self::NEVER;
        Self { cell, seen, generation: 0, due: true, wakes: true, stop: false }
    }
}

impl PollHint {
    /// A [`PollHint::cell`] that never changes, and its value.
    pub const NEVER: (*const AtomicU16, u16) = (&raw const NEVER, 0);

    /// Whether the pollable needs a visit.
    ///
    /// # Safety
    /// See [`PollHint`].
    #[inline]
    pub(crate) unsafe fn needs_visit(&self) -> bool {
        // SAFETY: the caller vouches for the address. Relaxed: the visit loads the value again.
        let value = unsafe { &*self.cell }.load(Ordering::Relaxed);
        value != self.seen || self.due
    }
}
