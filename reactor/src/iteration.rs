//! The clock of a reactor's poll iterations, and the causes of its longest iteration.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{read_tsc, ticks_per_second};

/// Something that can make an iteration long. If a long iteration has no cause, the delay came from
/// outside: the scheduler preempted the reactor, or a page of guest memory was not present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// A queue adopted a new view: the queue is new, or its memory, call fd or disk changed.
    Adopt = 0,
    /// Requests were taken from a ring.
    Fetch = 1,
    /// I/O of a disk completed.
    Complete = 2,
    /// A guest was called, which takes a system call.
    Call = 3,
    /// A queue stopped.
    Stop = 4,
    /// The reactor got a new poll set.
    PollSet = 5,
}

impl Cause {
    const ALL: [Self; 6] =
        [Self::Adopt, Self::Fetch, Self::Complete, Self::Call, Self::Stop, Self::PollSet];

    /// The name in lower case, for the operator.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Adopt => "adopt",
            Self::Fetch => "fetch",
            Self::Complete => "complete",
            Self::Call => "call",
            Self::Stop => "stop",
            Self::PollSet => "poll_set",
        }
    }

    fn bit(self) -> u64 {
        1 << self as u8
    }
}

/// The longest time so far between two readings of the clock. It contains one iteration with work,
/// and the idle iterations before it, which take a microsecond at most.
#[derive(Debug, Default)]
pub struct LongestIteration(AtomicU64);

/// Bits for the causes in a [`LongestIteration`]. The bits above them hold the ticks.
const CAUSE_BITS: u32 = 8;

impl LongestIteration {
    /// Returns the ticks of the longest iteration, and its causes. `reset` starts a new
    /// measurement.
    pub fn read(&self, reset: bool) -> (u64, Vec<Cause>) {
        // Relaxed: all of the state is in this one word.
        let word =
            if reset { self.0.swap(0, Ordering::Relaxed) } else { self.0.load(Ordering::Relaxed) };
        let causes = Cause::ALL.into_iter().filter(|cause| word & cause.bit() != 0).collect();
        (word >> CAUSE_BITS, causes)
    }

    #[inline]
    pub(crate) fn note(&self, ticks: u64, causes: u64) {
        if ticks > self.0.load(Ordering::Relaxed) >> CAUSE_BITS {
            self.store_maximum(ticks, causes);
        }
    }

    #[cold]
    fn store_maximum(&self, ticks: u64, causes: u64) {
        // The maximum of the words is that of the ticks, because the ticks are in the high bits.
        // `fetch_max`, because a reset may come at any time.
        self.0.fetch_max(ticks << CAUSE_BITS | causes, Ordering::Relaxed);
    }
}

/// The clock of an iteration, and the causes since the last entry in the accounts. The clock is
/// read only when necessary.
#[derive(Debug)]
pub struct Iteration {
    now: u64,
    ticks_per_second: u64,
    /// Time of the last entry in the accounts.
    pub(crate) since: u64,
    /// End of the last iteration with work, or of the last sleep.
    pub(crate) worked_ticks: u64,
    /// Bits of [`Cause`] since that entry.
    causes: u64,
    /// The reactor was offline since the last iteration.
    woken: bool,
    pub(crate) idle_iterations: u32,
    pub(crate) iterations: u64,
}

impl Iteration {
    /// Creates a clock, and reads it.
    #[must_use]
    pub fn new() -> Self {
        let now = read_tsc();
        Self {
            now,
            ticks_per_second: ticks_per_second(),
            since: now,
            worked_ticks: now,
            causes: 0,
            woken: false,
            idle_iterations: 0,
            iterations: 0,
        }
    }

    /// The time of the last reading of the clock, in ticks.
    #[inline]
    #[must_use]
    pub fn now_ticks(&self) -> u64 {
        self.now
    }

    /// Reads the clock, and returns its ticks.
    #[inline]
    pub fn read_clock(&mut self) -> u64 {
        self.now = read_tsc();
        self.now
    }

    /// Ticks in a second.
    #[must_use]
    pub fn ticks_per_second(&self) -> u64 {
        self.ticks_per_second
    }

    /// Records a cause for the current iteration.
    #[inline]
    pub fn note(&mut self, cause: Cause) {
        self.causes |= cause.bit();
    }

    /// Records that the reactor was offline. Values that it loaded before may have been freed.
    pub(crate) fn woken(&mut self) {
        self.woken = true;
    }

    /// Returns whether the reactor was offline since the last call.
    #[inline]
    pub(crate) fn take_woken(&mut self) -> bool {
        std::mem::take(&mut self.woken)
    }

    /// Returns the recorded causes, and clears them.
    #[inline]
    pub(crate) fn take_causes(&mut self) -> u64 {
        std::mem::take(&mut self.causes)
    }
}

impl Default for Iteration {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_iteration_keeps_its_own_causes() {
        let longest = LongestIteration::default();
        longest.note(10, Cause::Adopt.bit() | Cause::Call.bit());
        longest.note(9, Cause::Stop.bit());
        assert_eq!(longest.read(false), (10, vec![Cause::Adopt, Cause::Call]));
        longest.note(11, Cause::Call.bit());
        assert_eq!(longest.read(true), (11, vec![Cause::Call]));
        assert_eq!(longest.read(false), (0, vec![]));
    }
}
