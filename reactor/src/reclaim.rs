//! The reclaim thread, which frees values that reactors may still use.
//!
//! It holds each value until its grace period and its I/O have ended, then drops it. It never
//! unmaps guest memory itself, because that can take seconds.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How long the thread waits before it tries again to free something: the first time, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// A value that is dropped once nothing uses it any more.
pub trait Garbage: Send {
    /// Drops the value if nothing uses it any more, otherwise returns it. Never blocks.
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>>;
}

impl<T: Send + Sync + 'static> Garbage for qsbr::Retired<T> {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        self.try_into_inner().err().map(|early| Box::new(early) as Box<dyn Garbage>)
    }
}

/// A handle to the reclaim thread. The thread ends when the last handle is dropped and all garbage
/// is freed.
#[derive(Clone, Debug)]
pub struct Reclaim(Sender<Box<dyn Garbage>>);

impl Reclaim {
    /// Starts the thread, which calls `freed` after it has freed something.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(freed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("vhost-reclaim".into())
            .spawn(move || reclaim(&receiver, &freed))?;
        Ok(Self(sender))
    }

    /// Frees `garbage` once nothing uses it any more.
    pub fn free(&self, garbage: impl Garbage + 'static) {
        self.free_boxed(Box::new(garbage));
    }

    /// As [`Reclaim::free`].
    pub fn free_boxed(&self, garbage: Box<dyn Garbage>) {
        // Cannot fail, because the thread runs as long as there is a sender.
        let _ = self.0.send(garbage);
    }
}

fn reclaim(receiver: &Receiver<Box<dyn Garbage>>, freed: &dyn Fn()) {
    let mut waiting: Vec<Box<dyn Garbage>> = Vec::new();
    let mut backoff = BACKOFF.0;
    loop {
        let next = if waiting.is_empty() {
            receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            receiver.recv_timeout(backoff)
        };
        match next {
            Ok(garbage) => {
                waiting.push(garbage);
                waiting.extend(receiver.try_iter());
                backoff = BACKOFF.0;
            }
            Err(RecvTimeoutError::Timeout) => backoff = (backoff * 2).min(BACKOFF.1),
            Err(RecvTimeoutError::Disconnected) if waiting.is_empty() => return,
            // The garbage is still in use. Dropping it now would leak it, or free memory that I/O
            // still uses.
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(backoff);
                backoff = (backoff * 2).min(BACKOFF.1);
            }
        }
        let before = waiting.len();
        waiting = waiting.into_iter().filter_map(Garbage::try_free).collect();
        if waiting.len() < before {
            freed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Debug, PartialEq, Eq)]
    enum Observed {
        Tried,
        /// Holds whether the value was free at that time.
        Dropped(bool),
    }

    struct InUse {
        free: Arc<AtomicBool>,
        observed: Sender<Observed>,
    }

    impl Garbage for InUse {
        fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
            let _ = self.observed.send(Observed::Tried);
            if self.free.load(Ordering::Relaxed) { None } else { Some(self) }
        }
    }

    impl Drop for InUse {
        fn drop(&mut self) {
            let _ = self.observed.send(Observed::Dropped(self.free.load(Ordering::Relaxed)));
        }
    }

    #[test]
    fn garbage_in_use_outlives_the_last_handle() {
        let (sender, observed) = channel();
        let free = Arc::new(AtomicBool::new(false));
        let reclaim = Reclaim::start(|| {}).unwrap();
        reclaim.free(InUse { free: Arc::clone(&free), observed: sender });
        drop(reclaim);
        // The thread may have made one attempt, and begun to wait, before the handle was dropped.
        for _ in 0..3 {
            assert_eq!(observed.recv(), Ok(Observed::Tried));
        }
        free.store(true, Ordering::Relaxed);
        assert_eq!(observed.iter().find(|s| *s != Observed::Tried), Some(Observed::Dropped(true)));
        assert!(observed.recv().is_err());
    }
}
