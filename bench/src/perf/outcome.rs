//! The results of a run.

use std::time::Duration;

use crate::perf::clock::Clock;
use crate::perf::histogram::{Counts, Distribution};
use crate::perf::lane::Tally;
use crate::perf::worker::WorkerResult;

/// The number of requests, and their latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    /// Requests that completed, with any status.
    pub completed: u64,
    /// Their latencies.
    pub ns: Distribution,
}

/// A stretch of the time line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stretch {
    /// Its start, in seconds since the start of the measurement.
    pub at_s: f64,
    /// Requests per second that completed in it.
    pub iops: f64,
    /// The longest gap that overlaps it.
    pub longest_gap_ns: u64,
}

/// The results of a run, without the ramp.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// From the end of the ramp until the last request completed or was given up.
    pub elapsed: Duration,
    /// All requests.
    pub all: Latencies,
    /// The reads.
    pub reads: Latencies,
    /// The writes.
    pub writes: Latencies,
    /// Requests that completed with a status other than OK.
    pub errors: u64,
    /// Blocks that were read with wrong contents.
    pub mismatches: u64,
    /// The first error or mismatch, as a text.
    pub first_problem: Option<String>,
    /// Requests that had not completed at the end.
    pub outstanding: usize,
    /// Requests of a rate that were due but not submitted before the end.
    pub unsubmitted: u64,
    /// The time line.
    pub timeline: Vec<Stretch>,
    /// The longest gaps, at most ten, longest first: their start in seconds, their length in
    /// nanoseconds.
    pub longest_gaps: Vec<(f64, u64)>,
    /// Whether the server closed the connection before the end.
    pub closed: bool,
    /// The disk's size in bytes, as reported by the server.
    pub disk_bytes: u64,
    /// The first byte that was used, and the number of bytes.
    pub range: (u64, u64),
    /// Whether the clock is the processor's time-stamp counter.
    pub counter: bool,
}

impl Outcome {
    /// Combines the results of several threads since `start`.
    pub(crate) fn new(results: Vec<WorkerResult>, start: u64, clock: &Clock, empty: Tally) -> Self {
        let ended = results.iter().map(|result| result.ended).max().unwrap_or(start);
        let outstanding = results.iter().map(|result| result.outstanding).sum();
        let unsubmitted = results.iter().map(|result| result.unsubmitted).sum();
        let mut tally = empty;
        results.into_iter().for_each(|result| tally.add(result.tally));
        let seconds = |ticks: u64| clock.ns(ticks) as f64 / 1e9;
        let elapsed = ended.saturating_sub(start);
        let [reads, writes] = &tally.latencies;
        let mut all = reads.clone();
        all.add(writes);
        let gaps = tally.timeline.longest_gaps();
        let gap = |from: u64, length| (seconds(from.saturating_sub(start)), clock.ns(length));
        Self {
            elapsed: Duration::from_nanos(clock.ns(elapsed)),
            all: latencies(&all, clock),
            reads: latencies(reads, clock),
            writes: latencies(writes, clock),
            errors: tally.errors,
            mismatches: tally.mismatches,
            first_problem: tally.first_problem.clone(),
            outstanding,
            unsubmitted,
            timeline: stretches(&tally, elapsed, clock),
            longest_gaps: gaps.map(|g| gap(g.from, g.length)).collect(),
            closed: false,
            disk_bytes: 0,
            range: (0, 0),
            counter: clock.is_counter(),
        }
    }

    /// Completed requests per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.all.completed as f64 / seconds } else { 0.0 }
    }

    /// The longest gap: its start in seconds, and its length in nanoseconds.
    #[must_use]
    pub fn longest_gap(&self) -> Option<&(f64, u64)> {
        self.longest_gaps.first()
    }

    /// Whether every request succeeded with the right contents.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let bad = self.errors + self.mismatches + self.outstanding as u64;
        bad == 0 && !self.closed
    }
}

fn latencies(counts: &Counts, clock: &Clock) -> Latencies {
    Latencies { completed: counts.total(), ns: counts.distribution(|ticks| clock.ns(ticks)) }
}

/// The time line up to `elapsed` ticks. A last bucket of less than half the width is merged with
/// the one before, because rates over very short times mean nothing.
fn stretches(tally: &Tally, elapsed: u64, clock: &Clock) -> Vec<Stretch> {
    let (buckets, width) = tally.timeline.buckets();
    let mut buckets = buckets.to_vec();
    let rest = elapsed.saturating_sub((buckets.len() as u64 - 1) * width);
    if buckets.len() > 1 && rest < width / 2 {
        let last = buckets.pop().expect("there are two");
        let before = buckets.last_mut().expect("there are two");
        before.completed += last.completed;
        before.longest_gap = before.longest_gap.max(last.longest_gap);
    }
    let last = buckets.len() - 1;
    let stretch = |i: usize| {
        let from = i as u64 * width;
        let length = if i == last { elapsed.saturating_sub(from) } else { width };
        let seconds = clock.ns(length).max(1) as f64 / 1e9;
        Stretch {
            at_s: clock.ns(from) as f64 / 1e9,
            iops: buckets[i].completed as f64 / seconds,
            longest_gap_ns: clock.ns(buckets[i].longest_gap),
        }
    };
    (0..buckets.len()).map(stretch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::timeline::Timeline;

    #[test]
    fn a_short_last_bucket_is_merged() {
        let clock = Clock::nanoseconds();
        let ms = |ms: u64| clock.ticks(Duration::from_millis(ms));
        let mut tally = Tally::new(Timeline::new(0, ms(100), 3));
        tally.timeline.note(ms(50), ms(49), 10);
        tally.timeline.note(ms(150), ms(149), 20);
        tally.timeline.note(ms(220), ms(215), 4);
        let merged = |elapsed| {
            let parts = stretches(&tally, ms(elapsed), &clock);
            parts.iter().map(|s| (s.at_s, s.iops.round(), s.longest_gap_ns)).collect::<Vec<_>>()
        };
        let long = merged(240);
        assert_eq!((long.len(), long[0]), (2, (0.0, 100.0, 1_000_000)));
        // 24 in 140 ms.
        assert_eq!((long[1].1, long[1].2), (171.0, 5_000_000));
        let three = merged(280);
        assert_eq!((three.len(), three[2].1), (3, 50.0));
        assert!((three[2].0 - 0.2).abs() < 1e-6 && (long[1].0 - 0.1).abs() < 1e-6);
    }
}
