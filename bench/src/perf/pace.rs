//! An open loop's schedule: when each request is due, whatever became of the ones before.

/// Hands out due times at an even distance, without drift.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    due: u64,
    /// 2^32 times the part of a tick that `due` leaves out.
    fraction: u64,
    step: u64,
    step_fraction: u64,
}

impl Pace {
    /// The first request is due at `start`, each further one `interval` ticks after.
    ///
    /// # Panics
    /// With an interval that is no positive number.
    #[must_use]
    pub fn new(start: u64, interval: f64) -> Self {
        assert!(interval > 0.0 && interval.is_finite(), "requests are due one after another");
        let step_fraction = (interval.fract() * 4_294_967_296.0) as u64;
        Self { due: start, fraction: 0, step: interval as u64, step_fraction }
    }

    /// When the next request is due.
    #[inline]
    #[must_use]
    pub fn due(&self) -> u64 {
        self.due
    }

    /// When the next request was due, if that is not after `now`; then the one after it is next.
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

    /// How many requests are due before `end`.
    #[must_use]
    pub fn due_before(&self, end: u64) -> u64 {
        let left = u128::from(end.saturating_sub(self.due)) << 32;
        let step = u128::from(self.step) << 32 | u128::from(self.step_fraction);
        left.saturating_sub(u128::from(self.fraction)).div_ceil(step.max(1)) as u64
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
    fn what_is_late_is_due_at_its_own_time() {
        let mut pace = Pace::new(0, 10.0);
        assert_eq!(pace.take(5), Some(0));
        // Nobody looked for a long time: each request keeps the time at which it was due.
        assert_eq!((pace.take(1000), pace.take(1000)), (Some(10), Some(20)));
    }

    #[test]
    fn what_is_left_can_be_counted() {
        for (start, interval, end) in [(100, 2.5, 112), (100, 2.5, 115), (7, 3.0, 7), (0, 0.3, 50)]
        {
            let mut pace = Pace::new(start, interval);
            pace.take(start);
            let told = pace.due_before(end);
            let counted = std::iter::from_fn(|| pace.take(end - 1)).count() as u64;
            assert_eq!(told, counted, "from {start} by {interval} to {end}");
        }
    }
}
