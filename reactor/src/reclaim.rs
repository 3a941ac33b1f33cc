//! The thread that frees what reactors may still be using.
//!
//! It holds values until their grace period has passed and their I/O has ended, then drops them. It
//! never unmaps guest memory itself, as that can take seconds.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How long the thread waits before it tries again to free something: at first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// A value that is dropped once nobody uses it any more.
pub trait Garbage: Send {
    /// Drops the value if nobody uses it any more, otherwise returns it. Never blocks.
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>>;
}

impl<T: Send + Sync + 'static> Garbage for qsbr::Retired<T> {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        self.try_into_inner().err().map(|early| Box::new(early) as Box<dyn Garbage>)
    }
}

/// A handle on the reclaim thread, which ends when the last handle is dropped and everything is freed.
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

    /// Frees `garbage` when nobody uses it any more.
    pub fn free(&self, garbage: impl Garbage + 'static) {
        self.free_boxed(Box::new(garbage));
    }

    /// As [`Reclaim::free`].
    pub fn free_boxed(&self, garbage: Box<dyn Garbage>) {
        // The thread outlives every sender, so this cannot fail.
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
            // The garbage is still in use: dropping it now would leak it, or free it under its I/O.
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
    enum Seen {
        Tried,
        /// Whether it was allowed to be freed.
        Dropped(bool),
    }

    struct Used {
        free: Arc<AtomicBool>,
        seen: Sender<Seen>,
    }

    impl Garbage for Used {
        fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
            let _ = self.seen.send(Seen::Tried);
            if self.free.load(Ordering::Relaxed) { None } else { Some(self) }
        }
    }

    impl Drop for Used {
        fn drop(&mut self) {
            let _ = self.seen.send(Seen::Dropped(self.free.load(Ordering::Relaxed)));
        }
    }

    #[test]
    fn what_is_in_use_outlives_the_last_handle() {
        let (seen_in, seen) = channel();
        let free = Arc::new(AtomicBool::new(false));
        let reclaim = Reclaim::start(|| {}).unwrap();
        reclaim.free(Used { free: Arc::clone(&free), seen: seen_in });
        drop(reclaim);
        // The first attempt may have been before the handle was dropped, with the thread asleep
        // then.
        for _ in 0..3 {
            assert_eq!(seen.recv(), Ok(Seen::Tried));
        }
        free.store(true, Ordering::Relaxed);
        assert_eq!(seen.iter().find(|s| *s != Seen::Tried), Some(Seen::Dropped(true)));
        assert!(seen.recv().is_err());
    }
}
