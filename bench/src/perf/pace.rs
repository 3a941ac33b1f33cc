//! The schedule of an open loop: the due times of requests, independent of completions.

/// Generates due times at a constant interval, without drift.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    due: u64,
    /// The fraction of a tick that `due` omits, times 2^32.
    fraction: u64,
    step: u64,
    step_fraction: u64,
}

impl Pace {
    /// A schedule whose first request is due at `start`, and each further one `interval` ticks
    /// later.
    ///
    /// # Panics
    /// `interval` is not a positive number.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "splits the number at its point")]
    pub fn new(start: u64, interval: f64) -> Self {
        assert!(interval > 0.0 && interval.is_finite(), "the interval is a positive number");
        let step_fraction = (interval.fract() * 4_294_967_296.0) as u64;
        Self { due: start, fraction: 0, step: interval as u64, step_fraction }
    }

    /// The due time of the next request.
    #[inline]
    #[must_use]
    pub fn due(&self) -> u64 {
        self.due
    }

    /// Returns the due time of the next request and advances, if the time is not after `now`.
    #[inline]
    pub fn take(&mut self, now: u64) -> Option<u64> {
        let due = self.due;
        if due > now {
            return None;
        }
        self.fraction += self.step_fraction;
        self.due += self.step + (self.fraction >> 32);
        self.fraction &= 0xffff_ffff;
        Some(due)
    }

    /// The number of requests that are due before `end`.
    #[must_use]
    pub fn due_before(&self, end: u64) -> u64 {
        let left = u128::from(end.saturating_sub(self.due)) << 32;
        let step = u128::from(self.step) << 32 | u128::from(self.step_fraction);
        let count = left.saturating_sub(u128::from(self.fraction)).div_ceil(step.max(1));
        u64::try_from(count).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_times_are_even_and_do_not_drift() {
        let mut pace = Pace::new(100, 2.5);
        let due: Vec<_> = std::iter::from_fn(|| pace.take(112)).collect();
        assert_eq!(due, [100, 102, 105, 107, 110, 112]);
        assert_eq!((pace.due(), pace.take(114)), (115, None));
        let mut pace = Pace::new(0, 1000.0 / 3.0);
        let count = std::iter::from_fn(|| pace.take(1_000_000_000)).count();
        assert!((3_000_000..=3_000_001).contains(&count), "{count}");
    }

    #[test]
    fn late_requests_keep_their_due_times() {
        let mut pace = Pace::new(0, 10.0);
        assert_eq!(pace.take(5), Some(0));
        // Long after the due times.
        assert_eq!((pace.take(1000), pace.take(1000)), (Some(10), Some(20)));
    }

    #[test]
    fn requests_before_the_end_can_be_counted() {
        for (start, interval, end) in [(100, 2.5, 112), (100, 2.5, 115), (7, 3.0, 7), (0, 0.3, 50)]
        {
            let mut pace = Pace::new(start, interval);
            pace.take(start);
            let due = pace.due_before(end);
            let counted = std::iter::from_fn(|| pace.take(end - 1)).count() as u64;
            assert_eq!(due, counted, "from {start} by {interval} to {end}");
        }
    }
}
