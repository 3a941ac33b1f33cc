//! Operations that may never end, on threads of their own.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use crate::control::host::Host;
use crate::error::Error;

/// Runs operations of one party that may hang, such as connecting to a storage cluster. They occupy
/// no thread that other parties need, and the number of their threads is bounded.
#[derive(Clone, Debug)]
pub struct Aside(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    /// The party, for error texts.
    name: String,
    max: usize,
    running: AtomicUsize,
}

impl Aside {
    /// Allows `max` threads at a time. `name` is the party's name.
    #[must_use]
    pub fn new(name: impl Into<String>, max: usize) -> Self {
        Self(Arc::new(Threads { name: name.into(), max, running: AtomicUsize::new(0) }))
    }

    /// Runs `work` on a thread of its own, and returns its result. If `work` does not end within
    /// `limit`, it goes on, and its thread drops the result.
    ///
    /// # Errors
    /// EAGAIN if all threads are occupied; ETIMEDOUT after `limit`; the error of `work`.
    pub async fn run<T: Send + 'static>(
        &self,
        host: &Rc<dyn Host>,
        limit: Duration,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let running = Running::enter(&self.0)?;
        let answer = Arc::new(Answer::default());
        let of_thread = Arc::clone(&answer);
        let spawned = thread::Builder::new().name("vhost-aside".into()).spawn(move || {
            let result = work();
            // First: a caller that has the result may start the next operation at once.
            drop(running);
            of_thread.give(result);
        });
        spawned.map_err(|source| self.0.error("cannot start a thread", source))?;
        let mut limit_passed = pin!(host.sleep(limit));
        let waits = Waits(&answer);
        poll_fn(|context| {
            if let Some(result) = waits.0.take(context) {
                return Poll::Ready(result);
            }
            limit_passed.as_mut().poll(context).map(|()| {
                let text = format!("no answer within {} s", limit.as_secs());
                Err(self.0.error(&text, io::Error::from_raw_os_error(libc::ETIMEDOUT)))
            })
        })
        .await
    }
}

/// A result that a thread gives to a task.
struct Answer<T>(Mutex<State<T>>);

struct State<T> {
    result: Option<T>,
    task: Option<Waker>,
    /// The task has stopped waiting.
    given_up: bool,
}

impl<T> Default for Answer<T> {
    fn default() -> Self {
        Self(Mutex::new(State { result: None, task: None, given_up: false }))
    }
}

impl<T> Answer<T> {
    /// Gives the result to the task, or drops it if the task has given up.
    fn give(&self, result: T) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.given_up {
            state.result = Some(result);
            if let Some(task) = state.task.take() {
                task.wake();
            }
        }
    }

    fn take(&self, context: &Context<'_>) -> Option<T> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.task = Some(context.waker().clone());
        state.result.take()
    }
}

/// The task's wait, which ends when this is dropped.
struct Waits<'a, T>(&'a Answer<T>);

impl<T> Drop for Waits<'_, T> {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).given_up = true;
    }
}

impl Threads {
    fn error(&self, text: &str, source: io::Error) -> Error {
        Error::System { what: format!("{}: {text}", self.name), source }
    }
}

/// Counts a thread until it is dropped.
struct Running(Arc<Threads>);

impl Running {
    fn enter(threads: &Arc<Threads>) -> Result<Self, Error> {
        let running = Self(Arc::clone(threads));
        if threads.running.fetch_add(1, Ordering::Relaxed) < threads.max {
            return Ok(running);
        }
        let again = io::Error::from_raw_os_error(libc::EAGAIN);
        Err(threads.error("too many earlier operations have not ended", again))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::control::test_host::TestHost;

    /// Polls a future until it ends.
    fn run<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(value) =
                future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return value;
            }
            thread::yield_now();
        }
    }

    #[test]
    fn what_hangs_occupies_its_threads_only() {
        let host: Rc<dyn Host> = TestHost::new([]);
        let (one, other) = (Aside::new("one", 1), Aside::new("other", 1));
        let (release, hangs) = mpsc::channel::<()>();
        let errno = |result: Result<i32, Error>| result.unwrap_err().errno();
        let wait = move || {
            let _ = hangs.recv();
            Ok(1)
        };
        assert_eq!(errno(run(one.run(&host, Duration::ZERO, wait))), libc::ETIMEDOUT);
        let minute = Duration::from_secs(60);
        assert_eq!(errno(run(one.run(&host, minute, || Ok(2)))), libc::EAGAIN);
        assert_eq!(run(other.run(&host, minute, || Ok(3))).unwrap(), 3);
        drop(release);
        // Its thread ends soon.
        while !matches!(run(one.run(&host, minute, || Ok(4))), Ok(4)) {
            thread::yield_now();
        }
        let fails = || Err::<(), _>(Error::Busy("x".into()));
        assert_eq!(run(other.run(&host, minute, fails)).unwrap_err().errno(), libc::EBUSY);
    }
}
