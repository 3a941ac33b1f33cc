//! The poll set: the queues of one reactor, and the choice of those that an iteration checks.
#![expect(
    unsafe_code,
    reason = "visits queues as their owner; a cell with one user; enters the kernel"
)]

use std::cell::UnsafeCell;
use std::sync::Arc;

use qsbr::Reader;

use crate::clock::ticks_per_second;
use crate::events::Events;
use crate::iteration::{Cause, Iteration};
use crate::pollable::{PollHint, Pollable, Wait};

/// Cold queues that one iteration checks: after an iteration with work, and after one without.
/// Together with the limit below, this bounds how long the first request of an idle guest waits,
/// and what idle guests cost a busy one, which is some nanoseconds per iteration.
const COLD_PER_ITERATION: (usize, usize) = (4, 16);

/// Time after which every queue has been checked, no matter how busy some are, in microseconds.
const PASS_MAX_US: u64 = 20;

/// Minimum number of iterations without work after which a queue is cold. A power of two.
const COLD_AFTER: u32 = 1 << 14;

/// Iterations between two system calls of a reactor that has orphan I/O. A power of two. A system
/// call costs some 0.1 us, and the completion of orphan I/O waits for the next one.
const ORPHANS_AFTER: u32 = 16;

/// The queues of one reactor. A change publishes a new set.
///
/// What a reactor reads for each queue is contiguous here, so that an iteration over hundreds of
/// idle queues touches little memory: for each queue, a [`PollHint`] and one cache line of the
/// guest's.
pub(crate) struct PollSet<E> {
    queues: Vec<Arc<dyn Pollable<E>>>,
    orphans: bool,
    scan: UnsafeCell<Scan>,
}

impl<E> Default for PollSet<E> {
    fn default() -> Self {
        Self { queues: vec![], orphans: false, scan: UnsafeCell::default() }
    }
}

impl<E> std::fmt::Debug for PollSet<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PollSet of {}", self.queues.len())
    }
}

// SAFETY: only one reactor uses the scan, the one that the set was published to; see
// `PollSet::iteration`.
unsafe impl<E> Sync for PollSet<E> {}

/// The state of a reactor's scan over its queues.
#[derive(Debug, Default)]
struct Scan {
    /// Hot queues first, then the cold ones.
    entries: Box<[Entry]>,
    hot: usize,
    /// The cold queue to check next.
    cursor: usize,
    iterations: u32,
    /// Mask: every `round + 1` iterations, [`Scan::round`] runs. A power of two, minus one.
    round: u32,
    orphans: bool,
    /// No iteration has used this set yet.
    new: bool,
    /// End of the last pass over the cold queues.
    passed_ticks: u64,
    /// [`PASS_MAX_US`] in ticks.
    pass_max_ticks: u64,
}

#[derive(Debug)]
struct Entry {
    hint: PollHint,
    /// The queue was armed for a sleep, has no I/O in flight, and was not visited since.
    asleep: bool,
    /// The queue was visited since hot and cold queues were last separated.
    active: bool,
    /// Index in the list of queues.
    queue: u32,
}

impl<E: Send + 'static> PollSet<E> {
    /// With `orphans`, the reactor makes a system call now and then. A disk's I/O completes on the
    /// thread that submitted it, when that thread enters the kernel (`IORING_SETUP_COOP_TASKRUN`).
    /// A polling thread may not enter it for a long time, and a queue that has moved to another
    /// reactor would wait for the I/O that it left in flight here.
    pub(crate) fn new(queues: Vec<Arc<dyn Pollable<E>>>, orphans: bool) -> Self {
        let entry = |queue| Entry { hint: PollHint::default(), asleep: false, active: true, queue };
        #[expect(clippy::cast_possible_truncation, reason = "2^32 queues do not fit in memory")]
        let entries: Box<[_]> = (0..queues.len() as u32).map(entry).collect();
        let scan = Scan {
            hot: entries.len(),
            entries,
            new: true,
            round: if orphans { ORPHANS_AFTER } else { COLD_AFTER } - 1,
            orphans,
            pass_max_ticks: ticks_per_second() * PASS_MAX_US / 1_000_000,
            ..Scan::default()
        };
        Self { queues, orphans, scan: UnsafeCell::new(scan) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Whether the set was created with `orphans`.
    pub(crate) fn has_orphans(&self) -> bool {
        self.orphans
    }

    /// Runs one iteration: visits the queues that need it. Returns whether any had work. `changed`:
    /// what the hints were made from may have been replaced since the last iteration.
    ///
    /// # Safety
    /// The caller is the reactor that this set was published to. `reader` is its reader, and
    /// online. `changed` is what [`Reader::quiesce`] has returned since the last iteration, or
    /// `true`.
    #[inline]
    pub(crate) unsafe fn iteration(
        &self,
        changed: bool,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> bool {
        // SAFETY: one reactor uses the set, and this is its only borrow during the iteration.
        let scan = unsafe { &mut *self.scan.get() };
        if changed {
            self.compare(scan, reader);
        }
        if std::mem::take(&mut scan.new) {
            iteration.note(Cause::PollSet);
        }
        let mut worked = false;
        let (hot, cold) = scan.entries.split_at_mut(scan.hot);
        for entry in hot {
            // SAFETY: the hint was compared above, if anything changed.
            if unsafe { entry.hint.needs_visit() } {
                // SAFETY: the caller upholds the contract of `visit`.
                worked |= unsafe { self.visit(entry, reader, iteration, events) };
            }
        }
        if !cold.is_empty() {
            // SAFETY: as above.
            worked |= unsafe { self.check_cold(scan, reader, iteration, events) };
        }
        scan.iterations = scan.iterations.wrapping_add(1);
        if scan.iterations & scan.round == 0 {
            scan.round();
        }
        worked
    }

    /// Prepares all queues for a sleep of the reactor. Returns what ends the sleep, besides their
    /// kicks, or [`Wait::Poll`] if a queue has work.
    ///
    /// # Safety
    /// As for [`PollSet::iteration`], and in the same iteration.
    pub(crate) unsafe fn arm(&self, reader: &Reader, iteration: &Iteration) -> Wait {
        // SAFETY: one reactor uses the set, and this is its only borrow during the call.
        let scan = unsafe { &mut *self.scan.get() };
        if scan.entries.iter().any(|entry| !entry.hint.wakes) {
            // Checked before other queues ask for kicks, which would only cost time.
            return Wait::Poll;
        }
        let mut wait = Wait::Event;
        for entry in &mut scan.entries {
            if entry.asleep {
                // Its kick woke the reactor, and this iteration has not visited it.
                // SAFETY: the hint was compared in this iteration.
                if unsafe { entry.hint.needs_visit() } {
                    return Wait::Poll;
                }
                continue;
            }
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: the queue is in this reactor's set; the caller upholds the rest.
            let queue_wait = unsafe { queue.arm(reader, iteration) };
            if queue_wait == Wait::Poll {
                entry.hint.due = true;
                return Wait::Poll;
            }
            entry.asleep = queue_wait == Wait::Event && !entry.hint.due;
            wait = wait.sooner(queue_wait);
        }
        wait
    }

    /// Checks some of the cold queues, or all of them if the last pass ended too long ago.
    ///
    /// # Safety
    /// As for [`PollSet::iteration`], and the hints were compared.
    unsafe fn check_cold(
        &self,
        scan: &mut Scan,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> bool {
        let mut left = scan.entries.len() - scan.hot;
        let overdue = iteration.now_ticks().saturating_sub(scan.passed_ticks) > scan.pass_max_ticks;
        if !overdue {
            let (busy, idle) = COLD_PER_ITERATION;
            left = left.min(if iteration.idle_iterations == 0 { busy } else { idle });
        }
        let mut worked = false;
        while left > 0 {
            left -= 1;
            if scan.cursor >= scan.entries.len() {
                scan.passed_ticks = iteration.now_ticks();
                scan.cursor = 0;
            }
            scan.cursor = scan.cursor.max(scan.hot);
            let Some(entry) = scan.entries.get_mut(scan.cursor) else { break };
            // SAFETY: the caller upholds the contract.
            if unsafe { entry.hint.needs_visit() } {
                // SAFETY: as above.
                worked |= unsafe { self.visit(entry, reader, iteration, events) };
                // Not swapped with the first cold queue: that one was checked long ago, and would
                // then be behind the cursor. The rotation keeps the order of the others, so that
                // none waits for two passes.
                scan.entries[scan.hot..=scan.cursor].rotate_right(1);
                scan.hot += 1;
            }
            scan.cursor += 1;
        }
        worked
    }

    /// Visits a queue. Returns whether it had work.
    ///
    /// # Safety
    /// As for [`Pollable::visit`].
    // Lets the compiler inline it into callers in other codegen units.
    #[inline]
    unsafe fn visit(
        &self,
        entry: &mut Entry,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> bool {
        let queue = &self.queues[entry.queue as usize];
        // SAFETY: the queue is in this reactor's set; the caller upholds the rest.
        let worked = unsafe { queue.visit(reader, iteration, events, &mut entry.hint) };
        entry.asleep = false;
        entry.active = true;
        worked
    }

    /// Marks the queues that the control side has changed as due for a visit.
    #[cold]
    fn compare(&self, scan: &mut Scan, reader: &Reader) {
        for entry in &mut scan.entries {
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: the queues of a set belong to its reactor's domain; the caller of `iteration`
            // upholds the rest.
            if unsafe { queue.changed_since(&entry.hint, reader) } {
                // The hint's address may no longer be mapped.
                entry.hint = PollHint::default();
                entry.asleep = false;
            }
        }
    }
}

impl Scan {
    /// The work that is not done in every iteration.
    #[cold]
    fn round(&mut self) {
        if self.orphans {
            // SAFETY: a query without side effects. It enters the kernel, because no libc caches
            // its result.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        if self.iterations.is_multiple_of(COLD_AFTER) {
            self.separate_hot_and_cold();
        }
    }

    /// Moves hot queues that were not visited lately to the cold ones.
    fn separate_hot_and_cold(&mut self) {
        let mut n = 0;
        while n < self.hot {
            if std::mem::take(&mut self.entries[n].active) {
                n += 1;
            } else {
                self.hot -= 1;
                self.entries.swap(n, self.hot);
            }
        }
    }
}
