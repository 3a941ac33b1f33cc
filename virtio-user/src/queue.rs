//! One virtqueue of a server, shared by several channels.
//!
//! A server has a fixed number of queues, often one, and a bdev has a channel for each ring of each
//! guest. So channels share a queue. Each channel has a [`Line`]. The thread that has taken the
//! queue serves all lines: it starts their I/Os, and passes on their results. A reactor *tries* to
//! take the queue, and never waits: if another thread has it, the reactor tries again in its next
//! poll iteration, and does not sleep before.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bdev::{Durability, Line, SharedQueue, TryTaken};
use rustix::event::{EventfdFlags, eventfd};

mod state;

use crate::request::Limits;
use crate::ring::Ring;
use state::State;

/// A queue, with the channels that use it. A thread keeps the state for no longer than the copies
/// of a batch.
pub(crate) struct Queue {
    state: TryTaken<State>,
    /// The server signals it when it has used requests. It is never read.
    call: OwnedFd,
    /// The number of channels whose owners may sleep.
    sleepers: AtomicUsize,
    /// The server has written an invalid index or id into the used ring.
    broken: AtomicBool,
}

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

impl SharedQueue for Queue {
    fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    #[inline]
    fn try_serve(&self) -> bool {
        let Some(mut state) = self.state.try_take() else { return false };
        let done = state.serve();
        if state.is_broken() {
            self.broken.store(true, Ordering::Relaxed);
        }
        done
    }

    fn add(&self, line: &Arc<Line>, depth: u16) -> usize {
        let mut state = self.state.take();
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        state.set_signals(true);
        state.add(line, depth)
    }

    fn remove(&self, place: usize, sleeps: bool) {
        let removed = self.state.take().remove(place);
        drop(removed);
        if sleeps {
            self.set_sleeps(false);
        }
    }

    fn set_sleeps(&self, sleeps: bool) {
        let mut state = self.state.take();
        let before = if sleeps {
            self.sleepers.fetch_add(1, Ordering::Relaxed)
        } else {
            self.sleepers.fetch_sub(1, Ordering::Relaxed)
        };
        let now = if sleeps { before + 1 } else { before - 1 };
        state.set_signals(now > 0);
    }
}

impl Queue {
    /// Makes a queue for at most `slots` requests in flight. It has no ring yet.
    pub(crate) fn new(
        slots: u16,
        limits: Limits,
        durability: &Arc<Durability>,
    ) -> io::Result<Self> {
        Ok(Self {
            state: TryTaken::new(State::new(slots, limits, durability)),
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            sleepers: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        })
    }

    /// Starts to use a ring. Requests that were in flight in the previous ring are put into it:
    /// doing them twice has the same result as doing them once. If the previous server had
    /// completed writes that were not flushed, the next flush of each channel fails, also one that
    /// was in flight.
    pub(crate) fn connect(&self, ring: Ring, limits: Limits) {
        let mut state = self.state.take();
        let before = state.ring.replace(ring);
        state.limits = limits;
        state.offline = Offline::Wait;
        self.broken.store(false, Ordering::Relaxed);
        state.set_signals(self.sleepers.load(Ordering::Relaxed) > 0);
        state.resubmit();
        state.serve();
        drop(state);
        drop(before);
    }

    /// Stops using the ring, as the server is gone. Returns it, because its memory takes time to
    /// unmap.
    pub(crate) fn disconnect(&self, offline: Offline) -> Option<Ring> {
        let mut state = self.state.take();
        let before = state.ring.take();
        state.offline = offline;
        state.serve();
        before
    }

    /// Returns whether the server has written an invalid index or id into the used ring.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}
