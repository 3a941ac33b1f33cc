//! One connection to a server, shared by channels.
//!
//! A bdev has a channel for each ring of each guest. A server may allow one connection only, so
//! channels share connections. Each channel has a [`Line`]. The thread that has taken the queue
//! serves all lines: it sends their I/Os, and passes on the replies. A reactor *tries* to take the
//! queue, and never waits: if another thread has it, the reactor tries again in its next poll
//! iteration, and does not sleep before.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bdev::{Durability, Line, SharedQueue, TryTaken};
use rustix::event::{EventfdFlags, eventfd};

mod state;

use crate::link::Link;
pub(crate) use state::Detached;
use state::State;

/// A connection, with the channels that use it. A thread keeps the state for no longer than the
/// copies of two staging buffers.
pub(crate) struct Queue {
    state: TryTaken<State>,
    /// Signalled for each event of the link. It is never read.
    call: OwnedFd,
    /// The number of channels.
    channels: AtomicUsize,
    /// The connection is over: the connector has to take it away.
    broken: AtomicBool,
    /// Wakes the connector.
    connector: Arc<OwnedFd>,
}

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

impl SharedQueue for Queue {
    fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    #[inline]
    fn try_serve(&self) -> bool {
        let Some(mut state) = self.state.try_take() else { return false };
        let done = state.serve();
        if state.is_broken() {
            self.report_broken();
        }
        done
    }

    fn add(&self, line: &Arc<Line>, depth: u16) -> usize {
        self.channels.fetch_add(1, Ordering::Relaxed);
        self.state.take().add(line, depth)
    }

    fn remove(&self, place: usize, _sleeps: bool) {
        let removed = self.state.take().remove(place);
        drop(removed);
        self.channels.fetch_sub(1, Ordering::Relaxed);
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
            state: TryTaken::new(State::new(payload_max, durability)),
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            channels: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            connector: Arc::clone(connector),
        })
    }

    /// The number of channels that use the queue.
    pub(crate) fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }

    #[cold]
    fn report_broken(&self) {
        if !self.broken.swap(true, Ordering::Relaxed) {
            // Fails only if the counter is full, after 2^64 calls.
            let _ = rustix::io::write(&*self.connector, &1_u64.to_ne_bytes());
        }
    }

    /// Starts to use a connection. The requests that were in flight on the previous one are sent
    /// again: doing them twice has the same result as doing them once. If the previous server had
    /// completed writes that were not flushed, the next flush of each channel fails, also one that
    /// was in flight.
    pub(crate) fn connect(&self, link: Box<Link>) {
        let mut state = self.state.take();
        self.broken.store(false, Ordering::Relaxed);
        let before = state.connect(link);
        state.serve();
        drop(state);
        drop(before);
    }

    /// Stops using the connection, and returns it.
    pub(crate) fn disconnect(&self, offline: Offline) -> Detached {
        let mut state = self.state.take();
        let before = state.disconnect(offline);
        state.serve();
        before
    }

    /// Whether the connection is over.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}
