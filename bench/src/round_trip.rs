//! How long a cache line takes from one core to another and back: the unit of all latencies.
//!
//! A request crosses between cores at least once each way, so this is what no software can avoid.
//! Measured in the same run, it makes figures of machines, or of one machine's good and bad days,
//! comparable.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::pin::pin;

/// Round trips in one run.
const TRIPS: u64 = 50_000;
/// Runs, of which the median counts.
const RUNS: usize = 7;

/// A line, and its neighbour that prefetchers bring along, of its own.
#[repr(align(128))]
struct Line(AtomicU64);

/// Measures the round trip between cores `a` and `b` in nanoseconds: two threads, pinned, hand one
/// line to and fro; the median of several runs.
///
/// # Errors
/// A core that is not there, or the same one twice.
pub fn round_trip_ns(a: usize, b: usize) -> Result<f64> {
    if a == b {
        return Err(Error::TooLittle("a round trip needs two cores".into()));
    }
    let line = Line(AtomicU64::new(0));
    let (ready, is_ready) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    let line = &line.0;
    // A pinned thread stays pinned, so neither is the caller's.
    thread::scope(|scope| {
        scope.spawn(move || {
            // If the other end gives up, it drops its ends of the channels.
            if ready.send(pin(b)).is_ok() && may_go.recv().is_ok() {
                pong(line);
            }
        });
        let ping = scope.spawn(move || {
            is_ready.recv().expect("it sends before it ends")?;
            pin(a)?;
            go.send(()).expect("it waits for this");
            Ok(median(ping(line)))
        });
        ping.join().expect("it does not panic")
    })
}

/// Waits for each odd number, answers with the even one after.
fn pong(line: &AtomicU64) {
    for trip in 0..TRIPS * RUNS as u64 {
        // Acquire and Release as rings use them; on x86-64 they are plain moves.
        while line.load(Ordering::Acquire) != 2 * trip + 1 {
            spin_loop();
        }
        line.store(2 * trip + 2, Ordering::Release);
    }
}

fn ping(line: &AtomicU64) -> Vec<f64> {
    let run = |run: u64| {
        let start = Instant::now();
        for trip in run * TRIPS..(run + 1) * TRIPS {
            line.store(2 * trip + 1, Ordering::Release);
            while line.load(Ordering::Acquire) != 2 * trip + 2 {
                spin_loop();
            }
        }
        start.elapsed().as_nanos() as f64 / TRIPS as f64
    };
    (0..RUNS as u64).map(run).collect()
}

/// The middle one of `values`, or 0 if there are none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_core_or_none_is_an_error() {
        assert!(round_trip_ns(0, 0).is_err());
        assert!(round_trip_ns(0, 1000).is_err());
        assert!(round_trip_ns(1000, 0).is_err());
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
