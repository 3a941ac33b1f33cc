//! The shortest and the longest latency of one kind of operation.

use crate::sync::{AtomicU64, Ordering, fence};

/// The extremes. Their user extends them, and the control side reads and resets them.
///
/// Most latencies change nothing, so the user skips latencies between known ones. The control side
/// makes it look at all of them again, after a reset and when latencies are wanted for something
/// else.
#[derive(Debug)]
pub(super) struct Extremes {
    /// Of the latencies since the reset with the number `of`.
    min: AtomicU64,
    max: AtomicU64,
    of: AtomicU64,
    /// The number of resets.
    resets: AtomicU64,
    /// Latencies from `low` to `low` + `span` are skipped. With `u64::MAX` and 0, no latency that
    /// occurs is skipped.
    low: AtomicU64,
    span: AtomicU64,
}

impl Default for Extremes {
    fn default() -> Self {
        Self {
            min: AtomicU64::new(u64::MAX),
            max: AtomicU64::new(0),
            of: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            low: AtomicU64::new(u64::MAX),
            span: AtomicU64::new(0),
        }
    }
}

impl Extremes {
    /// Whether the user must look at this latency. Only the user calls this.
    #[inline]
    pub(super) fn wants(&self, latency: u64) -> bool {
        let above_low = latency.wrapping_sub(self.low.load(Ordering::Relaxed));
        above_low > self.span.load(Ordering::Relaxed)
    }

    /// Takes a latency into the extremes. From now on, the user skips those between them, unless
    /// `wanted` says that all latencies are wanted. Only the user calls this.
    pub(super) fn extend(&self, latency: u64, wanted: impl Fn() -> bool) {
        let resets = self.resets.load(Ordering::Relaxed);
        let (mut min, mut max) = (latency, latency);
        if self.of.load(Ordering::Relaxed) == resets {
            min = min.min(self.min.load(Ordering::Relaxed));
            max = max.max(self.max.load(Ordering::Relaxed));
        }
        self.min.store(min, Ordering::Relaxed);
        self.max.store(max, Ordering::Relaxed);
        self.of.store(resets, Ordering::Release);
        if wanted() {
            return;
        }
        self.low.store(min, Ordering::Relaxed);
        self.span.store(max - min, Ordering::Relaxed);
        // With the fence of `want_all`: either this sees what was changed before that fence, or the
        // stores after that fence come after those above.
        fence(Ordering::SeqCst);
        if wanted() || self.resets.load(Ordering::Relaxed) != resets {
            self.skip_none();
        }
    }

    /// Makes the user look at all latencies, until one extends the extremes. What `wanted` reads
    /// must be changed before.
    pub(super) fn want_all(&self) {
        fence(Ordering::SeqCst);
        self.skip_none();
    }

    fn skip_none(&self) {
        self.low.store(u64::MAX, Ordering::Relaxed);
        self.span.store(0, Ordering::Relaxed);
    }

    /// Forgets the extremes. The control side calls this, one thread at a time.
    pub(super) fn reset(&self) {
        self.resets.store(self.resets.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.want_all();
    }

    /// The shortest latency since the last reset, `None` if there was none, and the longest.
    pub(super) fn get(&self) -> (Option<u64>, u64) {
        if self.of.load(Ordering::Acquire) != self.resets.load(Ordering::Relaxed) {
            return (None, 0);
        }
        let min = self.min.load(Ordering::Relaxed);
        ((min < u64::MAX).then_some(min), self.max.load(Ordering::Relaxed))
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Model checks: the user and the control side at the same time.

    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn record(extremes: &Extremes, latency: u64, wanted: impl Fn() -> bool) {
        if extremes.wants(latency) {
            extremes.extend(latency, wanted);
        }
    }

    #[test]
    fn no_latency_after_a_reset_is_skipped_and_none_before_it_is_kept() {
        loom::model(|| {
            let extremes = Arc::new(Extremes::default());
            record(&extremes, 1, || false);
            record(&extremes, 9, || false);
            let control = {
                let extremes = Arc::clone(&extremes);
                thread::spawn(move || extremes.reset())
            };
            record(&extremes, 10, || false);
            control.join().unwrap();
            record(&extremes, 5, || false);
            // The latency at the time of the reset counts, or not.
            assert!(matches!(extremes.get(), (Some(5), 5 | 10)), "{:?}", extremes.get());
        });
    }

    #[test]
    fn all_latencies_are_looked_at_once_they_are_wanted() {
        loom::model(|| {
            let extremes = Arc::new(Extremes::default());
            let wanted = Arc::new(AtomicU64::new(0));
            let read = |wanted: &AtomicU64| wanted.load(Ordering::Relaxed) != 0;
            record(&extremes, 1, || false);
            let control = {
                let (extremes, wanted) = (Arc::clone(&extremes), Arc::clone(&wanted));
                thread::spawn(move || {
                    wanted.store(1, Ordering::Relaxed);
                    extremes.want_all();
                })
            };
            record(&extremes, 9, || read(&wanted));
            control.join().unwrap();
            assert!(extremes.wants(5), "a latency between the extremes");
        });
    }
}
