//! A sleep that does not count time in which the process was stopped.
//!
//! While a process is stopped, or its control group is frozen, none of its threads runs, but clocks
//! go on. A time limit for other threads of the process must not count that time.

use std::thread;
use std::time::{Duration, Instant};

/// Up to this much beyond the requested time a sleep counts as it is; beyond that, the process was
/// stopped.
const LATE: Duration = Duration::from_millis(100);

/// Sleeps for `time`, and returns how much of the elapsed time counts: all of it, or just `time` if
/// the sleep took much longer.
pub fn sleep(time: Duration) -> Duration {
    let begun = Instant::now();
    thread::sleep(time);
    active(time, begun.elapsed())
}

fn active(asked: Duration, passed: Duration) -> Duration {
    if passed > asked + LATE { asked } else { passed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_much_longer_than_asked_for_was_not_active() {
        let ms = Duration::from_millis;
        for (asked, passed, counts) in [(10, 10, 10), (10, 60, 60), (10, 5000, 10), (0, 200, 0)] {
            assert_eq!(active(ms(asked), ms(passed)), ms(counts), "{asked} {passed}");
        }
    }
}
