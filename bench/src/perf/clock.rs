//! The time in ticks: the processor's time-stamp counter where it keeps time, else nanoseconds.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "the counter's instruction has no safe function")
)]

use std::time::{Duration, Instant};

/// How long the counter is compared with the system's clock: its error is some 50 ns of this.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Looks at both clocks, of which the one with the least time between counts.
const LOOKS: usize = 16;

/// Tells the time in ticks since some moment before it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    counter: bool,
    base: Instant,
    ns_per_tick: f64,
}

impl Clock {
    /// Finds out what the processor has and how fast that runs, which takes some 20 ms.
    #[must_use]
    pub fn calibrated() -> Self {
        let mut clock = Self { counter: has_counter(), base: Instant::now(), ns_per_tick: 1.0 };
        if clock.counter {
            let (ticks, at) = clock.look();
            let end = at + CALIBRATION;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            let (more, later) = clock.look();
            clock.ns_per_tick = (later - at).as_nanos() as f64 / (more - ticks) as f64;
        }
        clock
    }

    /// A clock without a counter, whose ticks are nanoseconds.
    #[cfg(test)]
    pub(crate) fn nanoseconds() -> Self {
        Self { counter: false, base: Instant::now(), ns_per_tick: 1.0 }
    }

    /// Now. All loads before it in the program have been done by then.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        if self.counter { counter() } else { self.base.elapsed().as_nanos() as u64 }
    }

    /// Whether ticks are those of the time-stamp counter.
    #[must_use]
    pub fn is_counter(&self) -> bool {
        self.counter
    }

    /// `ticks` in nanoseconds.
    #[must_use]
    pub fn ns(&self, ticks: u64) -> u64 {
        (ticks as f64 * self.ns_per_tick).round() as u64
    }

    /// `duration` in ticks.
    #[must_use]
    pub fn ticks(&self, duration: Duration) -> u64 {
        (duration.as_nanos() as f64 / self.ns_per_tick).round() as u64
    }

    /// `ns` nanoseconds in ticks, with a fraction.
    #[must_use]
    pub fn ticks_exactly(&self, ns: f64) -> f64 {
        ns / self.ns_per_tick
    }

    /// Both clocks at one moment, as nearly as can be had.
    fn look(&self) -> (u64, Instant) {
        let looks = (0..LOOKS).map(|_| {
            let before = self.now();
            let at = Instant::now();
            let after = self.now();
            (after - before, before + (after - before) / 2, at)
        });
        let (_, ticks, at) = looks.min_by_key(|look| look.0).expect("there are several");
        (ticks, at)
    }
}

/// Whether the counter runs at one rate in every state of the processor, on all cores together.
#[cfg(target_arch = "x86_64")]
fn has_counter() -> bool {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = told.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["constant_tsc", "nonstop_tsc", "rdtscp"]
        .iter()
        .all(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

#[cfg(not(target_arch = "x86_64"))]
fn has_counter() -> bool {
    false
}

/// The counter, once all loads before have been done: RDTSC alone may run ahead of them.
#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    let mut processor = 0;
    // SAFETY: only called where `has_counter` has found the instruction.
    unsafe { std::arch::x86_64::__rdtscp(&raw mut processor) }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    unreachable!("no processor of this kind is said to have one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_time(clock: Clock) {
        let (start, at) = clock.look();
        while at.elapsed() < Duration::from_millis(50) {}
        let (end, later) = clock.look();
        let (told, true_ns) = (clock.ns(end - start) as f64, (later - at).as_nanos() as f64);
        assert!((told / true_ns - 1.0).abs() < 0.01, "{told} of {true_ns} ns");
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
