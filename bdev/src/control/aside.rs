//! Work that may never end, on threads of its own.

use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::control::host::Host;
use crate::error::Error;

/// Runs one party's work that may hang, such as a connection to a storage cluster, so that it
/// occupies no thread that other parties need. The number of its threads is bounded.
#[derive(Clone, Debug)]
pub struct Aside(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    /// Whose work it is, for texts.
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

    /// Runs `work` on a thread of its own, and returns its result. If it does not end within
    /// `limit`, it goes on, and its result is dropped on its thread.
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
        let (sender, result) = mpsc::sync_channel(1);
        let spawned = thread::Builder::new().name("vhost-aside".into()).spawn(move || {
            let result = work();
            // The caller may start the next operation when it has the result.
            drop(running);
            // Without a receiver, the caller has given up.
            let _ = sender.send(result);
        });
        spawned.map_err(|source| self.0.error("cannot start a thread", source))?;
        let received = host.blocking(move || result.recv_timeout(limit)).await;
        received.unwrap_or_else(|_| {
            let text = format!("no answer within {} s", limit.as_secs());
            Err(self.0.error(&text, std::io::Error::from_raw_os_error(libc::ETIMEDOUT)))
        })
    }
}

impl Threads {
    fn error(&self, text: &str, source: std::io::Error) -> Error {
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
        let again = std::io::Error::from_raw_os_error(libc::EAGAIN);
        Err(threads.error("earlier operations have not ended", again))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::test_host::{TestHost, run};

    #[test]
    fn what_hangs_occupies_its_threads_only() {
        let host: Rc<dyn Host> = TestHost::new([]);
        let (one, other) = (Aside::new("one", 1), Aside::new("other", 1));
        let (release, hangs) = mpsc::channel::<()>();
        let errno = |result: Option<Result<i32, Error>>| result.unwrap().unwrap_err().errno();
        let wait = move || {
            let _ = hangs.recv();
            Ok(1)
        };
        assert_eq!(errno(run(one.run(&host, Duration::ZERO, wait))), libc::ETIMEDOUT);
        let minute = Duration::from_secs(60);
        assert_eq!(errno(run(one.run(&host, minute, || Ok(2)))), libc::EAGAIN);
        assert_eq!(run(other.run(&host, minute, || Ok(3))).unwrap().unwrap(), 3);
        drop(release);
        // Its thread ends soon.
        let ended = || matches!(run(one.run(&host, minute, || Ok(4))), Some(Ok(4)));
        while !ended() {
            thread::yield_now();
        }
        let fails = || Err::<(), _>(Error::Busy("x".into()));
        let failed = run(other.run(&host, minute, fails)).unwrap();
        assert_eq!(failed.unwrap_err().errno(), libc::EBUSY);
    }
}
