//! A clock whose ticks are the processor's time-stamp counter if it has a constant rate, or else
//! nanoseconds.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "RDTSCP is an unsafe intrinsic"))]

use std::time::{Duration, Instant};

/// Duration of the calibration of the counter against the system's clock. The error is about 50 ns
/// of this duration.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Samples of both clocks, of which the one with the shortest duration counts.
const SAMPLES: usize = 16;

/// A clock that counts ticks since a fixed time before its creation.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    counter: bool,
    base: Instant,
    ns_per_tick: f64,
}

impl Clock {
    /// A calibrated clock. Calibration takes about 20 ms.
    #[must_use]
    pub fn calibrated() -> Self {
        let mut clock = Self { counter: has_counter(), base: Instant::now(), ns_per_tick: 1.0 };
        if clock.counter {
            let (ticks, at) = clock.sample();
            let end = at + CALIBRATION;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            let (end_ticks, end) = clock.sample();
            clock.ns_per_tick = (end - at).as_nanos() as f64 / (end_ticks - ticks) as f64;
        }
        clock
    }

    /// A clock without a counter, whose ticks are nanoseconds.
    #[cfg(test)]
    pub(crate) fn nanoseconds() -> Self {
        Self { counter: false, base: Instant::now(), ns_per_tick: 1.0 }
    }

    /// The current time. Loads before this call in program order precede it.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        if self.counter { counter() } else { saturating_ns(self.base.elapsed()) }
    }

    /// Whether the clock uses the time-stamp counter.
    #[must_use]
    pub fn is_counter(&self) -> bool {
        self.counter
    }

    /// `ticks` in nanoseconds.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "casts from f64 saturate")]
    pub fn ns(&self, ticks: u64) -> u64 {
        (ticks as f64 * self.ns_per_tick).round() as u64
    }

    /// `duration` in ticks.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "casts from f64 saturate")]
    pub fn ticks(&self, duration: Duration) -> u64 {
        (duration.as_nanos() as f64 / self.ns_per_tick).round() as u64
    }

    /// `ns` nanoseconds in ticks, with a fraction.
    #[must_use]
    pub fn ticks_exactly(&self, ns: f64) -> f64 {
        ns / self.ns_per_tick
    }

    /// Both clocks at about the same time.
    fn sample(&self) -> (u64, Instant) {
        let samples = (0..SAMPLES).map(|_| {
            let before = self.now();
            let at = Instant::now();
            let after = self.now();
            (after - before, before + (after - before) / 2, at)
        });
        let (_, ticks, at) = samples.min_by_key(|sample| sample.0).expect("SAMPLES is not 0");
        (ticks, at)
    }
}

fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether the counter has the same constant rate on all cores and in all power states.
#[cfg(target_arch = "x86_64")]
fn has_counter() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["constant_tsc", "nonstop_tsc", "rdtscp"]
        .iter()
        .all(|needed| flags.split_whitespace().any(|flag| flag == *needed))
}

#[cfg(not(target_arch = "x86_64"))]
fn has_counter() -> bool {
    false
}

/// Reads the counter after earlier loads. (RDTSC may execute before them.)
#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    let mut processor = 0;
    // SAFETY: called only if `has_counter` has found the instruction.
    unsafe { std::arch::x86_64::__rdtscp(&raw mut processor) }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    unreachable!("`has_counter` returns false")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_time(clock: Clock) {
        let (start, at) = clock.sample();
        while at.elapsed() < Duration::from_millis(50) {}
        let (end, later) = clock.sample();
        let (ns, true_ns) = (clock.ns(end - start) as f64, (later - at).as_nanos() as f64);
        assert!((ns / true_ns - 1.0).abs() < 0.01, "{ns} of {true_ns} ns");
        assert!(clock.ns(clock.ticks(Duration::from_secs(100))).abs_diff(100_000_000_000) < 10);
    }

    #[test]
    fn ticks_are_the_system_clock_s_nanoseconds() {
        keeps_time(Clock::calibrated());
    }

    #[test]
    fn without_a_counter_ticks_are_nanoseconds() {
        let clock = Clock::nanoseconds();
        keeps_time(clock);
        assert_eq!(clock.ticks(Duration::from_micros(3)), 3000);
    }
}
