//! What operations have done: totals, as plain numbers.

use crate::io::OPS;

/// What one user has done, since its first channel was opened. A reset does not change it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserCounts {
    /// Totals, indexed by `Op as usize`.
    pub ops: [OpCounts; OPS],
    /// How often a rate limit has held back an I/O.
    pub throttled: u64,
}

impl UserCounts {
    /// Adds the counts of another user.
    pub fn add(&mut self, other: &Self) {
        self.ops.iter_mut().zip(&other.ops).for_each(|(sum, more)| sum.add(more));
        self.throttled += other.throttled;
    }
}

/// Totals of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Completed operations, including failed ones.
    pub count: u64,
    /// Bytes of the successful operations.
    pub bytes: u64,
    /// Failed operations.
    pub errors: u64,
    /// Sum of the latencies, in ticks of the time-stamp counter.
    pub ticks: u64,
    /// The shortest latency of a successful operation, in ticks. `None` if there was none.
    pub min_ticks: Option<u64>,
    /// The longest latency of a successful operation, in ticks. Operations that
    /// completed together count with their mean latency, for both extremes.
    pub max_ticks: u64,
}

impl OpCounts {
    /// Adds the counts of another user.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.ticks += other.ticks;
        self.min_ticks = match (self.min_ticks, other.min_ticks) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        self.max_ticks = self.max_ticks.max(other.max_ticks);
    }

    /// Subtracts the counts at a reset. The extremes are reset on their own.
    pub(super) fn since(self, reset: &Self) -> Self {
        Self {
            count: self.count.saturating_sub(reset.count),
            bytes: self.bytes.saturating_sub(reset.bytes),
            errors: self.errors.saturating_sub(reset.errors),
            ticks: self.ticks.saturating_sub(reset.ticks),
            ..self
        }
    }
}
