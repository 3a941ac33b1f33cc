//! The queues of one reactor, and which of them it looks at in a iteration.
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

/// Cold queues that a iteration looks at, after a iteration with work and after one without. Together with the
/// limit below this bounds how long the first request of an idle guest waits, and what idle guests
/// cost a busy one: some nanoseconds per iteration.
const COLD_PER_ITERATION: (usize, usize) = (4, 16);

/// Time after which all queues have been looked at, however busy some are, in microseconds.
const PASS_MAX_US: u64 = 20;

/// Turns without work after which a queue counts as cold, at least. A power of two.
const COLD_AFTER: u32 = 1 << 14;

/// Turns between two of a reactor's visits to the kernel while it has orphans. A power of two: a visit
/// costs some 0.1 us, and what a stray has completed waits for the next.
const ORPHANS_AFTER: u32 = 16;

/// The queues of one reactor. A change publishes a new one.
///
/// What a reactor looks at for each queue lies side by side here, so that a iteration over hundreds of
/// idle queues touches little memory: a [`PollHint`] and one line of the guest's for each.
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

// SAFETY: the scan has one user, the reactor that the set was published to; see `PollSet::iteration`.
unsafe impl<E> Sync for PollSet<E> {}

/// Where a reactor is in its list.
#[derive(Debug, Default)]
struct Scan {
    /// Queues that have had work lately, then the others: the cold ones.
    entries: Box<[Entry]>,
    hot: usize,
    /// The next of the cold ones to look at.
    cursor: usize,
    iterations: u32,
    /// Turns after which there is something else to do, less one: a power of two, less one.
    round: u32,
    orphans: bool,
    /// No iteration was made with it.
    new: bool,
    /// When the last pass over the cold ones ended.
    passed_ticks: u64,
    /// [`PASS_MAX_US`].
    pass_max_ticks: u64,
}

#[derive(Debug)]
struct Entry {
    hint: PollHint,
    /// It was armed for a sleep and has had no visit since, nor has it anything in flight.
    asleep: bool,
    /// It was visited since hot queues were last told from cold ones.
    active: bool,
    /// Its place in the list of queues.
    queue: u32,
}

impl<E: Send + 'static> PollSet<E> {
    /// With `orphans` the reactor enters the kernel now and then. A disk's I/O completes on the thread
    /// that submitted it, when that enters the kernel (`IORING_SETUP_COOP_TASKRUN`), and one that polls
    /// may not for long: a queue that was moved away from it would wait for what it left in flight.
    pub(crate) fn new(queues: Vec<Arc<dyn Pollable<E>>>, orphans: bool) -> Self {
        let entry = |queue| Entry { hint: PollHint::default(), asleep: false, active: true, queue };
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

    /// Whether it was made with `orphans`.
    pub(crate) fn has_orphans(&self) -> bool {
        self.orphans
    }

    /// One iteration: visits the queues that want it; says whether any had work. `changed`: what the
    /// queues were made of may have been replaced since the iteration before.
    ///
    /// # Safety
    /// The caller is the reactor that this set was published to, `reader` is its reader, online,
    /// and `changed` is what [`Reader::quiesce`] has answered since the last iteration, or `true`.
    #[inline]
    pub(crate) unsafe fn iteration(
        &self,
        changed: bool,
        reader: &Reader,
        iteration: &mut Iteration,
        events: &Events<E>,
    ) -> bool {
        // SAFETY: one reactor, and this is its one borrow in the iteration.
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
            // SAFETY: compared above, if there was anything to compare.
            if unsafe { entry.hint.needs_visit() } {
                // SAFETY: the caller says so.
                worked |= unsafe { self.visit(entry, reader, iteration, events) };
            }
        }
        if !cold.is_empty() {
            // SAFETY: as above.
            worked |= unsafe { self.look_at_cold(scan, reader, iteration, events) };
        }
        scan.iterations = scan.iterations.wrapping_add(1);
        if scan.iterations & scan.round == 0 {
            scan.round();
        }
        worked
    }

    /// Prepares all queues for a sleep of the reactor and says what to wait for besides their kicks;
    /// [`Wait::Poll`] if one has something to do.
    ///
    /// # Safety
    /// As for [`PollSet::iteration`], in the iteration that the reactor is in.
    pub(crate) unsafe fn arm(&self, reader: &Reader, iteration: &Iteration) -> Wait {
        // SAFETY: one reactor, and this is its one borrow meanwhile.
        let scan = unsafe { &mut *self.scan.get() };
        if scan.entries.iter().any(|entry| !entry.hint.wakes) {
            // Before others are asked for kicks that would only cost them time.
            return Wait::Poll;
        }
        let mut wait = Wait::Event;
        for entry in &mut scan.entries {
            if entry.asleep {
                // Its kick has woken us, and this iteration has not come to it.
                // SAFETY: compared in this iteration.
                if unsafe { entry.hint.needs_visit() } {
                    return Wait::Poll;
                }
                continue;
            }
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: the queue is in this reactor's set, and the caller has said the rest.
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

    /// Looks at some of the cold queues; at all of them when the last pass was too long ago.
    ///
    /// # Safety
    /// As for [`PollSet::iteration`]; the watches have been compared.
    unsafe fn look_at_cold(
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
            // SAFETY: the caller says so.
            if unsafe { entry.hint.needs_visit() } {
                // SAFETY: the caller says so.
                worked |= unsafe { self.visit(entry, reader, iteration, events) };
                // Not swapped with the first cold one, which was looked at long ago and would come
                // to lie behind the cursor: the others keep their order, and none waits two passes.
                scan.entries[scan.hot..=scan.cursor].rotate_right(1);
                scan.hot += 1;
            }
            scan.cursor += 1;
        }
        worked
    }

    /// Visits a queue; says whether it had work.
    ///
    /// # Safety
    /// That of [`Queue::visit`].
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
        // SAFETY: the queue is in this reactor's set, and the caller has said the rest.
        let worked = unsafe { queue.visit(reader, iteration, events, &mut entry.hint) };
        entry.asleep = false;
        entry.active = true;
        worked
    }

    /// Makes the queues that the control side has changed something about wait for a visit.
    #[cold]
    fn compare(&self, scan: &mut Scan, reader: &Reader) {
        for entry in &mut scan.entries {
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: queues of a set are of its reactor's domain; `iteration`'s caller has said the
            // rest.
            if unsafe { queue.changed_since(&entry.hint, reader) } {
                // The address that it looked at may not be mapped any more.
                entry.hint = PollHint::default();
                entry.asleep = false;
            }
        }
    }
}

impl Scan {
    /// What is not done in every iteration.
    #[cold]
    fn round(&mut self) {
        if self.orphans {
            // SAFETY: a query without side effects, which no libc answers by itself.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        if self.iterations.is_multiple_of(COLD_AFTER) {
            self.tell_hot_from_cold();
        }
    }

    /// Moves the hot queues that were not visited for a while to the cold ones.
    fn tell_hot_from_cold(&mut self) {
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
