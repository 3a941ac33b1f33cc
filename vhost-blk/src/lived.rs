//! Time in which this process has lived.
//!
//! A process that is stopped, or whose control group is frozen, does nothing for as long as that
//! takes, and clocks go on. Whoever gives others a time to do something counts what they had of it.

use std::thread;
use std::time::{Duration, Instant};

/// What a sleep may take longer than asked for and still count as such.
const LATE: Duration = Duration::from_millis(100);

/// Sleeps for `time`, and answers with how much of what has passed the process has lived: all of it, or
/// `time` if it is much more.
pub(crate) fn sleep(time: Duration) -> Duration {
    let begun = Instant::now();
    thread::sleep(time);
    lived(time, begun.elapsed())
}

fn lived(asked: Duration, passed: Duration) -> Duration {
    if passed > asked + LATE { asked } else { passed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_much_longer_than_asked_for_was_not_lived() {
        let ms = Duration::from_millis;
        for (asked, passed, counts) in [(10, 10, 10), (10, 60, 60), (10, 5000, 10), (0, 200, 0)] {
            assert_eq!(lived(ms(asked), ms(passed)), ms(counts), "{asked} {passed}");
        }
    }
}
