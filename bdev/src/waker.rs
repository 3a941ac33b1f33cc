//! Wakes a thread that looks for work, if it sleeps.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::sync::{AtomicBool, Ordering, fence};

/// Whether one thread, the consumer, sleeps until it is woken. Producers check this after they have
/// published work, so that they make no system call while the consumer is awake.
#[derive(Debug)]
pub(crate) struct Asleep(AtomicBool);

impl Asleep {
    pub(crate) fn new(asleep: bool) -> Self {
        Self(AtomicBool::new(asleep))
    }

    /// For the consumer: records that it is awake. Until the producers see this, they may wake it
    /// without need.
    #[inline]
    pub(crate) fn wakes(&self) {
        if self.0.load(Ordering::Relaxed) {
            self.0.store(false, Ordering::Relaxed);
        }
    }

    /// For the consumer: records that it is about to sleep. It must look for work once more after
    /// this call.
    pub(crate) fn sleeps(&self) {
        self.0.store(true, Ordering::Relaxed);
        // SeqCst, as in `must_be_woken`. If this fence comes first, the producer sees that the
        // consumer sleeps, and wakes it. If the producer's fence comes first, the consumer finds
        // the work after this call.
        fence(Ordering::SeqCst);
    }

    /// For a producer, after it has published work: returns whether it must wake the consumer.
    pub(crate) fn must_be_woken(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed)
    }
}

/// Wakes the thread that does the I/Os of several channels. A reactor may call it.
#[derive(Debug)]
pub struct Waker {
    thread: Asleep,
    woken: OwnedFd,
}

impl Waker {
    /// Makes a waker.
    ///
    /// # Errors
    /// The system has no eventfd left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self { thread: Asleep::new(false), woken: eventfd(0, flags)? })
    }

    /// Wakes the thread if it sleeps. Called after work was published for it. Does not wait.
    pub fn wake(&self) {
        if self.thread.must_be_woken() {
            // Fails only if the counter is full, after 2^64 calls.
            let _ = rustix::io::write(&self.woken, &1_u64.to_ne_bytes());
        }
    }

    /// For the thread: sleeps until it is woken, unless `has_work`. May return early.
    pub fn wait(&self, has_work: impl FnOnce() -> bool) {
        self.thread.sleeps();
        if !has_work() {
            let mut fds = [PollFd::new(&self.woken, PollFlags::IN)];
            // An error (a signal) makes the caller look for work and come back.
            let _ = poll(&mut fds, None);
        }
        self.thread.wakes();
        // Fails if nobody has woken it.
        let _ = rustix::io::read(&self.woken, &mut [0; 8]);
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Model checks: a producer and the consumer at the same time.

    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::sync::AtomicUsize;

    #[test]
    fn a_consumer_that_sleeps_beside_work_is_woken() {
        loom::model(|| {
            let state = Arc::new((Asleep::new(true), AtomicUsize::new(0), AtomicUsize::new(0)));
            let producer = {
                let state = Arc::clone(&state);
                thread::spawn(move || {
                    let (asleep, work, signals) = &*state;
                    for _ in 0..2 {
                        work.fetch_add(1, Ordering::Release);
                        if asleep.must_be_woken() {
                            signals.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            };
            let (asleep, work, signals) = &*state;
            asleep.wakes();
            let seen = work.load(Ordering::Acquire);
            let before = signals.load(Ordering::Relaxed);
            asleep.sleeps();
            let sleeps = work.load(Ordering::Acquire) == seen;
            producer.join().unwrap();
            let woken = signals.load(Ordering::Relaxed) > before;
            assert!(!sleeps || woken || seen == 2, "it sleeps for ever");
        });
    }
}
