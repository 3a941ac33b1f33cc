//! A reactor's clock, and what made its longest iteration.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{read_tsc, ticks_per_second};

/// Something in a iteration that can make it long. A iteration of none of these, and long all the same, was
/// made so by somebody else: the system took the processor away, or a page of the guest's away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// A queue took over a new view: it is new, or its memory, its call fd or its disk is.
    Adopt = 0,
    /// Requests were taken from a ring.
    Fetch = 1,
    /// I/O of a disk had completed.
    Complete = 2,
    /// A guest was called: a system call.
    Call = 3,
    /// A queue stopped.
    Stop = 4,
    /// The list of queues was a new one.
    PollSet = 5,
}

impl Cause {
    const ALL: [Self; 6] =
        [Self::Adopt, Self::Fetch, Self::Complete, Self::Call, Self::Stop, Self::PollSet];

    /// In lower case, for the operator.
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

/// The time between two readings of the clock that was the longest so far: one iteration that did
/// something, with the idle ones before it, of which there are a microsecond's worth at the most.
#[derive(Debug, Default)]
pub struct LongestIteration(AtomicU64);

/// Bits that causes have in a [`LongestIteration`]; the ticks are above.
const CAUSE_BITS: u32 = 8;

impl LongestIteration {
    /// Its ticks and what happened in it. With `reset`, the next answer is about what comes after.
    pub fn read(&self, reset: bool) -> (u64, Vec<Cause>) {
        // Relaxed: the word says all that there is to say.
        let word =
            if reset { self.0.swap(0, Ordering::Relaxed) } else { self.0.load(Ordering::Relaxed) };
        let causes = Cause::ALL.into_iter().filter(|cause| word & cause.bit() != 0).collect();
        (word >> CAUSE_BITS, causes)
    }

    #[inline]
    pub(crate) fn note(&self, ticks: u64, causes: u64) {
        if ticks > self.0.load(Ordering::Relaxed) >> CAUSE_BITS {
            self.keep(ticks, causes);
        }
    }

    #[cold]
    fn keep(&self, ticks: u64, causes: u64) {
        // The maximum of the words is that of the ticks. A reset may come at any time.
        self.0.fetch_max(ticks << CAUSE_BITS | causes, Ordering::Relaxed);
    }
}

/// A iteration's clock, read no more often than needed, and what has happened since the last booking.
#[derive(Debug)]
pub struct Iteration {
    now: u64,
    ticks_per_second: u64,
    /// When the last booking ended.
    pub(crate) since: u64,
    /// When the last iteration with work ended, or the last sleep.
    pub(crate) worked_ticks: u64,
    /// Bits of [`Cause`] since then.
    causes: u64,
    /// The reactor has been offline since the last iteration.
    woken: bool,
    pub(crate) idle_iterations: u32,
    pub(crate) iterations: u64,
}

impl Iteration {
    /// A clock that has just been read.
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

    /// The time of the last reading, in ticks.
    #[inline]
    #[must_use]
    pub fn now_ticks(&self) -> u64 {
        self.now
    }

    /// Reads the clock.
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

    /// Remembers that this happened in this iteration.
    #[inline]
    pub fn note(&mut self, cause: Cause) {
        self.causes |= cause.bit();
    }

    /// The reactor was offline: what it had loaded before may have been freed.
    pub(crate) fn woken(&mut self) {
        self.woken = true;
    }

    /// Whether the reactor was offline since the last call.
    #[inline]
    pub(crate) fn take_woken(&mut self) -> bool {
        std::mem::take(&mut self.woken)
    }

    /// Forgets what happened and answers with it.
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
    fn the_longest_turn_keeps_its_own_causes() {
        let longest = LongestIteration::default();
        longest.note(10, Cause::Adopt.bit() | Cause::Call.bit());
        longest.note(9, Cause::Stop.bit());
        assert_eq!(longest.read(false), (10, vec![Cause::Adopt, Cause::Call]));
        longest.note(11, Cause::Call.bit());
        assert_eq!(longest.read(true), (11, vec![Cause::Call]));
        assert_eq!(longest.read(false), (0, vec![]));
    }
}
