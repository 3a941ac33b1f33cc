//! Ends a connection that keeps its front end waiting for too long.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Shuts down a socket when a guarded wait has taken too long.
///
/// A timeout on the socket's reads is not enough: the `vhost` crate repeats a read that timed out.
#[derive(Debug)]
pub(crate) struct Watchdog {
    limit: Duration,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    deadline: Option<Instant>,
    expired: bool,
    ended: bool,
}

impl Watchdog {
    /// Guards `socket`: each wait may take `limit`.
    pub(crate) fn new(socket: UnixStream, limit: Duration) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || theirs.watch(&socket))
            .map_err(Error::system("cannot start a thread"))?;
        Ok(Self { limit, shared, thread: Some(thread) })
    }

    /// Runs `wait` under the limit. The second value tells whether a wait has ever exceeded the
    /// limit.
    pub(crate) fn guard<T>(&self, wait: impl FnOnce() -> T) -> (T, bool) {
        self.shared.set(|state| state.deadline = Some(Instant::now() + self.limit));
        let result = wait();
        let mut expired = false;
        self.shared.set(|state| {
            state.deadline = None;
            expired = state.expired;
        });
        (result, expired)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.set(|state| state.ended = true);
        if let Some(thread) = self.thread.take() {
            // The thread cannot have panicked, and drop could not handle it.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn watch(&self, socket: &UnixStream) {
        let mut state = self.lock();
        while !state.ended {
            let Some(deadline) = state.deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                (state.deadline, state.expired) = (None, true);
                // A socket that is shut down already ends the wait as well.
                drop(socket.shutdown(Shutdown::Both));
                continue;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
