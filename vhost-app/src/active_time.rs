//! Sleeps and timeouts that exclude time in which the process was stopped.
//!
//! While a process is stopped, or its control group is frozen, its threads do not run, but clocks
//! continue. A thread that waits a limited time for other threads of the process must not count
//! that time.

use std::time::{Duration, Instant};

/// A wait consists of pieces of this length. A stop of any length counts as one piece.
const PIECE: Duration = Duration::from_millis(100);

/// Sleeps for `time`. If the process was stopped in the last piece, sleeps for one more, so that
/// other tasks run before the wait ends.
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

/// The result of `future`, or `None` if it takes longer than `limit`.
pub(crate) async fn timeout<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        result = future => Some(result),
        () = sleep(limit) => None,
    }
}
