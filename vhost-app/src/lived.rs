//! Time in which this process has lived.
//!
//! A process that is stopped, or whose control group is frozen, does nothing for as long as that
//! takes, and clocks go on. Whoever waits for others of the process for a limited time must not count
//! what they had no part of.

use std::time::{Duration, Instant};

/// A wait is made of such pieces; a stop of any length counts as one.
const PIECE: Duration = Duration::from_millis(100);

/// Sleeps for `time`, and does not end at once after a stop: others get the time to catch up.
pub(crate) async fn sleep(time: Duration) {
    let mut left = time;
    loop {
        let (piece, begun) = (left.min(PIECE), Instant::now());
        tokio::time::sleep(piece).await;
        left -= piece;
        if left.is_zero() {
            let late = begun.elapsed() > piece + PIECE;
            return if late {
                tokio::time::sleep(PIECE).await
            };
        }
    }
}

/// What `future` comes to, or `None` if it takes longer than `limit`.
pub(crate) async fn timeout<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        result = future => Some(result),
        () = sleep(limit) => None,
    }
}
