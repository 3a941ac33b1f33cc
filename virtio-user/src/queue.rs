//! One virtqueue of a server, shared by several channels.
//!
//! A server has a fixed number of queues, often one, and a bdev has a channel for each ring of each
//! guest. So channels share a queue. Each channel has a [`Line`]. The thread that has taken the
//! queue serves all lines: it starts their I/Os, and passes on their results. A reactor *tries* to
//! take the queue, and never waits: if another thread has it, the reactor tries again in its next
//! poll iteration, and does not sleep before.
#![expect(unsafe_code, reason = "shares a queue without a lock")]

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bdev::{Durability, Line};
use rustix::event::{EventfdFlags, eventfd};

mod state;

use crate::request::Limits;
use crate::ring::Ring;
use state::State;

/// A queue, with the channels that use it.
pub(crate) struct Queue {
    /// Set while a thread has the state.
    taken: AtomicBool,
    state: UnsafeCell<State>,
    /// The server signals it when it has used requests. It is never read.
    call: OwnedFd,
    /// The number of channels whose owners may sleep.
    sleepers: AtomicUsize,
    /// The server has written an invalid index or id into the used ring.
    broken: AtomicBool,
}

// SAFETY: the state is accessed only by the thread that has set `taken`.
unsafe impl Sync for Queue {}
// SAFETY: as above; what the state points to may be used by any thread.
unsafe impl Send for Queue {}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

/// What happens to I/Os while there is no ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offline {
    /// They wait for the next ring.
    Wait,
    /// They fail.
    Fail,
}

/// The right to use the state, until it is dropped.
struct Taken<'a>(&'a Queue);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        // Release: the next thread sees what this one has done.
        self.0.taken.store(false, Ordering::Release);
    }
}

impl Taken<'_> {
    fn state(&mut self) -> &mut State {
        // SAFETY: this thread has set `taken`, and `self` is borrowed as long as the state.
        unsafe { &mut *self.0.state.get() }
    }
}

impl Queue {
    /// Makes a queue for at most `slots` requests in flight. It has no ring yet.
    pub(crate) fn new(
        slots: u16,
        limits: Limits,
        durability: &Arc<Durability>,
    ) -> io::Result<Self> {
        let state = State::new(slots, limits, durability);
        Ok(Self {
            taken: AtomicBool::new(false),
            state: UnsafeCell::new(state),
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            sleepers: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        })
    }

    /// The fd that the server signals. Each channel has a duplicate, as a reactor can wait only once
    /// for each fd.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    fn try_take(&self) -> Option<Taken<'_>> {
        // Acquire: pairs with the Release of the thread that had it before.
        // Not `then_some`: dropping a `Taken` releases the queue.
        (!self.taken.swap(true, Ordering::Acquire)).then(|| Taken(self))
    }

    /// Takes the queue, for threads that may wait. A reactor holds it for no longer than the copies
    /// of a batch.
    fn take(&self) -> Taken<'_> {
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            std::thread::yield_now();
        }
    }

    /// For a reactor: serves all channels, if no other thread does. Returns whether nothing is left
    /// to do now; if not, the caller must call this again before it sleeps.
    #[inline]
    pub(crate) fn try_serve(&self) -> bool {
        let Some(mut taken) = self.try_take() else { return false };
        let done = taken.state().serve();
        if taken.state().is_broken() {
            self.broken.store(true, Ordering::Relaxed);
        }
        done
    }

    /// Adds a channel, and returns its place.
    pub(crate) fn add(&self, line: &Arc<Line>, depth: u16) -> usize {
        let mut taken = self.take();
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        taken.state().set_signals(true);
        taken.state().add(line, depth)
    }

    /// Removes a channel that has no outstanding I/O.
    pub(crate) fn remove(&self, client: usize, sleeps: bool) {
        let removed = self.take().state().remove(client);
        drop(removed);
        if sleeps {
            self.set_sleeps(false);
        }
    }

    /// Records that the owner of one more channel may sleep, or of one less. Not for reactors.
    pub(crate) fn set_sleeps(&self, sleeps: bool) {
        let mut taken = self.take();
        let before = if sleeps {
            self.sleepers.fetch_add(1, Ordering::Relaxed)
        } else {
            self.sleepers.fetch_sub(1, Ordering::Relaxed)
        };
        let now = if sleeps { before + 1 } else { before - 1 };
        taken.state().set_signals(now > 0);
    }

    /// Starts to use a ring. Requests that were in flight in the previous ring are put into it:
    /// doing them twice has the same result as doing them once. If the previous server had
    /// completed writes that were not flushed, the next flush of each channel fails, also one that
    /// was in flight.
    pub(crate) fn connect(&self, ring: Ring, limits: Limits) {
        let mut taken = self.take();
        let state = taken.state();
        let before = state.ring.replace(ring);
        state.limits = limits;
        state.offline = Offline::Wait;
        self.broken.store(false, Ordering::Relaxed);
        state.set_signals(self.sleepers.load(Ordering::Relaxed) > 0);
        state.resubmit();
        state.serve();
        drop(taken);
        drop(before);
    }

    /// Stops using the ring, as the server is gone. Returns it, because its memory takes time to
    /// unmap.
    pub(crate) fn disconnect(&self, offline: Offline) -> Option<Ring> {
        let mut taken = self.take();
        let before = taken.state().ring.take();
        taken.state().offline = offline;
        taken.state().serve();
        before
    }

    /// Returns whether the server has written an invalid index or id into the used ring.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}
