//! Grace periods of I/O: waits until all I/O that began before a change has ended.
//!
//! A channel on a reactor reads shared data (a map of clusters) to start an I/O, and relies on it
//! until the I/O has ended. A thread that changes the data waits for a grace period before it
//! reuses what the old data refers to. The reactor does not wait. This is the algorithm of Linux's
//! sleepable RCU, with one writer of each counter.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::sync::{AtomicUsize, Ordering, fence};

/// The I/O of all channels that read the same data.
#[derive(Debug, Default)]
pub struct Grace {
    /// Its lowest bit selects the counter of new I/Os.
    period: AtomicUsize,
    channels: Mutex<Vec<Arc<InFlight>>>,
}

/// The I/Os of one channel that have begun and not ended. One thread at a time uses it.
#[derive(Debug, Default)]
pub struct InFlight {
    counts: [AtomicUsize; 2],
}

/// A grace period that a thread waits for step by step: see [`Grace::poll`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Period {
    /// Rounds that have ended.
    rounds: u8,
    /// The counters that the present round waits for.
    old: Option<usize>,
}

/// The counter of an I/O that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Begun(bool);

impl Grace {
    /// Adds a channel. Locks: not for reactors.
    #[must_use]
    pub fn add(&self) -> Arc<InFlight> {
        let channel = Arc::<InFlight>::default();
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&channel));
        channel
    }

    /// Removes a channel without I/O. Locks: not for reactors.
    pub fn remove(&self, channel: &Arc<InFlight>) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|other| !Arc::ptr_eq(other, channel));
    }

    /// Counts an I/O that begins. The caller reads the shared data afterwards. Does not wait.
    #[inline]
    pub fn begin(&self, channel: &InFlight) -> Begun {
        let begun = Begun(self.period.load(Ordering::Relaxed) & 1 == 1);
        let count = &channel.counts[usize::from(begun.0)];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // SeqCst, as in `poll`: if this fence comes first, the polling thread sees the count. If its
        // fence comes first, the I/O reads the changed data.
        fence(Ordering::SeqCst);
        begun
    }

    /// Counts the end of an I/O.
    #[inline]
    pub fn end(channel: &InFlight, begun: Begun) {
        let count = &channel.counts[usize::from(begun.0)];
        // Release: a thread that sees the count sees what the I/O has done.
        count.store(count.load(Ordering::Relaxed) - 1, Ordering::Release);
    }

    /// As [`Grace::wait`], without waiting: returns whether the grace period has ended. Returns false
    /// also while another thread adds or removes a channel. The caller changes the shared data, calls
    /// this with a new `period`, and repeats the call with the same one until it returns true. One
    /// thread at a time may do this.
    pub fn poll(&self, period: &mut Period) -> bool {
        // A channel that is added later sees the changes: the lock orders them.
        let channels = match self.channels.try_lock() {
            Ok(channels) => channels,
            Err(TryLockError::Poisoned(channels)) => channels.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        // Twice, since an I/O may have read `self.period` long ago: it is then counted where new
        // I/Os are counted, which the first round does not look at.
        while period.rounds < 2 {
            let old = *period.old.get_or_insert_with(|| {
                // The changes come before the new period.
                fence(Ordering::SeqCst);
                let old = self.period.fetch_add(1, Ordering::Relaxed) & 1;
                fence(Ordering::SeqCst);
                old
            });
            if channels.iter().any(|channel| channel.counts[old].load(Ordering::Acquire) != 0) {
                return false;
            }
            *period = Period { rounds: period.rounds + 1, old: None };
        }
        true
    }

    /// Waits until all I/O has ended that may have read the shared data before the caller has
    /// changed it. Calls `pause` again and again meanwhile, and gives up when that returns false.
    /// Returns whether the I/O has ended. One thread at a time may call this.
    pub fn wait(&self, mut pause: impl FnMut() -> bool) -> bool {
        let mut period = Period::default();
        while !self.poll(&mut period) {
            if !pause() {
                return false;
            }
        }
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_earlier_io_has_ended_and_not_before() {
        let grace = Grace::default();
        let (one, other) = (grace.add(), grace.add());
        assert!(grace.wait(|| false), "no I/O");
        let early = [grace.begin(&one), grace.begin(&other)];
        let mut pauses = 0;
        let mut later = None;
        let ended = grace.wait(|| {
            pauses += 1;
            match pauses {
                // Another I/O begins, and stays: it is not waited for.
                1 => later = Some(grace.begin(&other)),
                2 => Grace::end(&one, early[0]),
                3 => Grace::end(&other, early[1]),
                // The second round waits for it.
                4 => Grace::end(&other, later.unwrap()),
                _ => return false,
            }
            true
        });
        assert!(ended, "after {pauses} pauses");
        let hangs = grace.begin(&one);
        let mut left = 3;
        assert!(!grace.wait(|| {
            left -= 1;
            left > 0
        }));
        Grace::end(&one, hangs);
        assert!(grace.wait(|| false));
        grace.remove(&one);
        assert_eq!(grace.channels.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_period_that_is_polled_ends_with_the_same_io() {
        let grace = Grace::default();
        let (one, other) = (grace.add(), grace.add());
        assert!(grace.poll(&mut Period::default()), "no I/O");
        let early = grace.begin(&one);
        let mut period = Period::default();
        assert!(!grace.poll(&mut period));
        let later = grace.begin(&other);
        Grace::end(&one, early);
        assert!(!grace.poll(&mut period), "the second round waits for it");
        let last = grace.begin(&one);
        Grace::end(&other, later);
        assert!(grace.poll(&mut period), "the last I/O is not waited for");
        Grace::end(&one, last);
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Model check: a channel with two I/Os, and a thread that changes an entry and reuses what it
    //! referred to, twice.

    use loom::thread;

    use super::*;

    #[test]
    fn what_an_io_uses_is_not_reused_before_its_end() {
        loom::model(|| {
            // The entry says which cell is in use. `reused` holds the cells that were given away.
            let grace = loom::sync::Arc::new(Grace::default());
            let state = loom::sync::Arc::new((
                AtomicUsize::new(0),
                [const { () }; 3].map(|()| AtomicUsize::new(0)),
            ));
            let channel = grace.add();
            let reactor = {
                let (grace, state) = (grace.clone(), state.clone());
                thread::spawn(move || {
                    let (entry, reused) = &*state;
                    for _ in 0..2 {
                        let begun = grace.begin(&channel);
                        let cell = entry.load(Ordering::Relaxed);
                        thread::yield_now();
                        assert_eq!(reused[cell].load(Ordering::Relaxed), 0, "it is in use");
                        Grace::end(&channel, begun);
                    }
                })
            };
            let (entry, reused) = &*state;
            for cell in 0..2 {
                entry.store(cell + 1, Ordering::Relaxed);
                let ended = grace.wait(|| {
                    thread::yield_now();
                    true
                });
                assert!(ended);
                reused[cell].store(1, Ordering::Relaxed);
            }
            reactor.join().unwrap();
        });
    }
}
