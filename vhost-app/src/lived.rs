//! Sleeps and timeouts that do not count time in which the process was stopped.
//!
//! While a process is stopped, or its control group is frozen, none of its threads runs, but clocks
//! go on. A thread that waits for other threads of the process for a limited time must not count
//! that time.

use std::time::{Duration, Instant};

/// A wait is made of such pieces; a stop of any length counts as one piece.
const PIECE: Duration = Duration::from_millis(100);

/// Sleeps for `time`; after a stop at its end it sleeps one piece more, so that other tasks can
/// catch up.
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
