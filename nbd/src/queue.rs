//! One connection to a server, shared by channels.
//!
//! A bdev has a channel for each ring of each guest. A server may allow one connection only, so
//! channels share connections. Each channel has a [`Line`]. The thread that has taken the queue
//! serves all lines: it sends their I/Os, and passes on the replies. A reactor *tries* to take the
//! queue, and never waits: if another thread has it, the reactor tries again in its next poll
//! iteration, and does not sleep before.
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

use crate::link::Link;
pub(crate) use state::Detached;
use state::State;

/// A connection, with the channels that use it.
pub(crate) struct Queue {
    /// Set while a thread has the state.
    taken: AtomicBool,
    state: UnsafeCell<State>,
    /// Signalled for each event of the link. It is never read.
    call: OwnedFd,
    /// The number of channels.
    channels: AtomicUsize,
    /// The connection is over: the connector has to take it away.
    broken: AtomicBool,
    /// Wakes the connector.
    connector: Arc<OwnedFd>,
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

/// What happens to I/Os while there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offline {
    /// They wait for the next connection.
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
    /// Makes a queue without a connection. `payload_max` is the longest payload of a request, in
    /// bytes: a multiple of the block size. `connector` is the eventfd that wakes the connector.
    pub(crate) fn new(
        payload_max: u32,
        durability: &Arc<Durability>,
        connector: &Arc<OwnedFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            taken: AtomicBool::new(false),
            state: UnsafeCell::new(State::new(payload_max, durability)),
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            channels: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            connector: Arc::clone(connector),
        })
    }

    /// The fd that is signalled for each event of the link. Each channel has a duplicate, as a
    /// reactor can wait only once for each fd.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The number of channels that use the queue.
    pub(crate) fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }

    fn try_take(&self) -> Option<Taken<'_>> {
        // Acquire: pairs with the Release of the thread that had it before.
        // Not `then_some`: dropping a `Taken` releases the queue.
        (!self.taken.swap(true, Ordering::Acquire)).then(|| Taken(self))
    }

    /// Takes the queue, for threads that may wait. A reactor holds it for no longer than the copies
    /// of two staging buffers.
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
            self.report_broken();
        }
        done
    }

    #[cold]
    fn report_broken(&self) {
        if !self.broken.swap(true, Ordering::Relaxed) {
            // Fails only if the counter is full, after 2^64 calls.
            let _ = rustix::io::write(&*self.connector, &1_u64.to_ne_bytes());
        }
    }

    /// Adds a channel, and returns its place.
    pub(crate) fn add(&self, line: &Arc<Line>, depth: u16) -> usize {
        self.channels.fetch_add(1, Ordering::Relaxed);
        self.take().state().add(line, depth)
    }

    /// Removes a channel that has no outstanding I/O.
    pub(crate) fn remove(&self, place: usize) {
        let removed = self.take().state().remove(place);
        drop(removed);
        self.channels.fetch_sub(1, Ordering::Relaxed);
    }

    /// Starts to use a connection. The requests that were in flight on the previous one are sent
    /// again: doing them twice has the same result as doing them once. If the previous server had
    /// completed writes that were not flushed, the next flush of each channel fails, also one that
    /// was in flight.
    pub(crate) fn connect(&self, link: Box<Link>) {
        let mut taken = self.take();
        self.broken.store(false, Ordering::Relaxed);
        let before = taken.state().connect(link);
        taken.state().serve();
        drop(taken);
        drop(before);
    }

    /// Stops using the connection, and returns it.
    pub(crate) fn disconnect(&self, offline: Offline) -> Detached {
        let mut taken = self.take();
        let before = taken.state().disconnect(offline);
        taken.state().serve();
        before
    }

    /// Whether the connection is over.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}
