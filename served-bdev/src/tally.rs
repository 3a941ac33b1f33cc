//! Counts the I/Os that the shortcut has done in a visit.

use std::num::NonZeroU64;

use bdev::{Counters, Op};

#[derive(Debug, Default)]
struct Tally {
    count: u64,
    bytes: u64,
}

/// Reads and writes that the shortcut has done in one visit. They are counted at its end.
#[derive(Debug, Default)]
pub struct Tallies([Tally; 2]);

impl Tallies {
    /// Counts a read, or a write.
    #[inline(always)]
    pub fn add(&mut self, write: bool, bytes: u64) {
        let tally = &mut self.0[usize::from(write)];
        tally.count += 1;
        tally.bytes += bytes;
    }

    /// Returns the number of reads and writes.
    #[inline]
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0[0].count + self.0[1].count
    }

    /// Adds the tallies to `counters` and resets them. `ticks`, the time of the visit, is divided
    /// between reads and writes by their number.
    #[inline(always)]
    pub fn record(&mut self, counters: &Counters, ticks: u64) {
        let [reads, writes] = std::mem::take(&mut self.0);
        let of_writes = match (reads.count, writes.count) {
            (_, 0) => 0,
            (0, _) => ticks,
            (r, w) => ticks * w / (r + w),
        };
        if let Some(count) = NonZeroU64::new(reads.count) {
            counters.record_batch(Op::Read, count, reads.bytes, ticks - of_writes);
        }
        if let Some(count) = NonZeroU64::new(writes.count) {
            counters.record_batch(Op::Write, count, writes.bytes, of_writes);
        }
    }
}
