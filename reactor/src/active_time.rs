//! A sleep that does not count time in which the process was stopped.
//!
//! While a process is stopped, or its control group is frozen, none of its threads runs, but clocks
//! continue. A time limit for other threads of the process must not count that time.

use std::thread;
use std::time::{Duration, Instant};

/// A sleep that takes at most this much longer than requested counts in full. If it takes longer,
/// the process was stopped.
const LATE: Duration = Duration::from_millis(100);

/// Sleeps for `time`. Returns how much of the elapsed time counts: all of it, or only `time` if the
/// sleep took much longer.
pub fn sleep(time: Duration) -> Duration {
    let start = Instant::now();
    thread::sleep(time);
    active(time, start.elapsed())
}

fn active(requested: Duration, elapsed: Duration) -> Duration {
    if elapsed > requested + LATE { requested } else { elapsed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_much_longer_than_requested_counts_as_requested() {
        let ms = Duration::from_millis;
        for (requested, elapsed, counts) in
            [(10, 10, 10), (10, 60, 60), (10, 5000, 10), (0, 200, 0)]
        {
            assert_eq!(active(ms(requested), ms(elapsed)), ms(counts), "{requested} {elapsed}");
        }
    }
}
