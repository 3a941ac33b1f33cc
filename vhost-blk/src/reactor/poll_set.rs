//! The queues of one reactor, and which of them it looks at in a turn.
#![expect(
    unsafe_code,
    reason = "visits queues as their owner; a cell with one user; enters the kernel"
)]

use std::cell::UnsafeCell;
use std::sync::Arc;

use bdev::Wait;
use qsbr::Reader;

use super::{Cause, Events, Turn, ticks_per_second};
use crate::queue::{Queue, Watch};

/// Cold queues that a turn looks at, after a turn with work and after one without. Together with the
/// limit below this bounds how long the first request of an idle guest waits, and what idle guests
/// cost a busy one: some nanoseconds per turn.
const COLD_PER_TURN: (usize, usize) = (4, 16);

/// Time after which all queues have been looked at, however busy some are, in microseconds.
const PASS_MAX_US: u64 = 20;

/// Turns without work after which a queue counts as cold, at least. A power of two.
const COLD_AFTER: u32 = 1 << 14;

/// Turns between two of a reactor's visits to the kernel while it has strays. A power of two: a visit
/// costs some 0.1 us, and what a stray has completed waits for the next.
const STRAYS_AFTER: u32 = 16;

/// The queues of one reactor. A change publishes a new one.
///
/// What a reactor looks at for each queue lies side by side here, so that a turn over hundreds of
/// idle queues touches little memory: a [`Watch`] and one line of the guest's for each.
#[derive(Debug, Default)]
pub(super) struct PollSet {
    queues: Vec<Arc<Queue>>,
    scan: UnsafeCell<Scan>,
}

// SAFETY: the scan has one user, the reactor that the set was published to; see `PollSet::turn`.
unsafe impl Sync for PollSet {}

/// Where a reactor is in its list.
#[derive(Debug, Default)]
struct Scan {
    /// Queues that have had work lately, then the others: the cold ones.
    entries: Box<[Entry]>,
    hot: usize,
    /// The next of the cold ones to look at.
    cursor: usize,
    turns: u32,
    /// Turns after which there is something else to do, less one: a power of two, less one.
    round: u32,
    strays: bool,
    /// No turn was made with it.
    new: bool,
    /// When the last pass over the cold ones ended.
    passed_ticks: u64,
    /// [`PASS_MAX_US`].
    pass_max_ticks: u64,
}

#[derive(Debug)]
struct Entry {
    watch: Watch,
    /// It was armed for a sleep and has had no visit since, nor has it anything in flight.
    asleep: bool,
    /// It was visited since hot queues were last told from cold ones.
    active: bool,
    /// Its place in the list of queues.
    queue: u32,
}

impl PollSet {
    /// With `strays` the reactor enters the kernel now and then. A disk's I/O completes on the thread
    /// that submitted it, when that enters the kernel (`IORING_SETUP_COOP_TASKRUN`), and one that polls
    /// may not for long: a queue that was moved away from it would wait for what it left in flight.
    pub(super) fn new(queues: Vec<Arc<Queue>>, strays: bool) -> Self {
        let entry = |queue| Entry { watch: Watch::new(), asleep: false, active: true, queue };
        let entries: Box<[_]> = (0..queues.len() as u32).map(entry).collect();
        let scan = Scan {
            hot: entries.len(),
            entries,
            new: true,
            round: if strays { STRAYS_AFTER } else { COLD_AFTER } - 1,
            strays,
            pass_max_ticks: ticks_per_second() * PASS_MAX_US / 1_000_000,
            ..Scan::default()
        };
        Self { queues, scan: UnsafeCell::new(scan) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    #[cfg(test)]
    pub(super) fn has_strays(&self) -> bool {
        // SAFETY: tests step the reactor and look in one thread.
        let scan = unsafe { &*self.scan.get() };
        assert_eq!(scan.round, if scan.strays { STRAYS_AFTER } else { COLD_AFTER } - 1);
        scan.strays
    }

    /// One turn: visits the queues that want it; says whether any had work. `changed`: what the
    /// queues were made of may have been replaced since the turn before.
    ///
    /// # Safety
    /// The caller is the reactor that this set was published to, `reader` is its reader, online,
    /// and `changed` is what [`Reader::quiesce`] has answered since the last turn, or `true`.
    #[inline]
    pub(super) unsafe fn turn(
        &self,
        changed: bool,
        reader: &Reader,
        turn: &mut Turn,
        events: &Events,
    ) -> bool {
        // SAFETY: one reactor, and this is its one borrow in the turn.
        let scan = unsafe { &mut *self.scan.get() };
        if changed {
            self.compare(scan, reader);
        }
        if std::mem::take(&mut scan.new) {
            turn.note(Cause::PollSet);
        }
        let mut worked = false;
        let (hot, cold) = scan.entries.split_at_mut(scan.hot);
        for entry in hot {
            // SAFETY: compared above, if there was anything to compare.
            if unsafe { entry.watch.wants_visit() } {
                // SAFETY: the caller says so.
                worked |= unsafe { self.visit(entry, reader, turn, events) };
            }
        }
        if !cold.is_empty() {
            // SAFETY: as above.
            worked |= unsafe { self.look_at_cold(scan, reader, turn, events) };
        }
        scan.turns = scan.turns.wrapping_add(1);
        if scan.turns & scan.round == 0 {
            scan.round();
        }
        worked
    }

    /// Prepares all queues for a sleep of the reactor and says what to wait for besides their kicks;
    /// [`Wait::Poll`] if one has something to do.
    ///
    /// # Safety
    /// As for [`PollSet::turn`], in the turn that the reactor is in.
    pub(super) unsafe fn arm(&self, reader: &Reader, turn: &Turn) -> Wait {
        // SAFETY: one reactor, and this is its one borrow meanwhile.
        let scan = unsafe { &mut *self.scan.get() };
        if scan.entries.iter().any(|entry| !entry.watch.kicks) {
            // Before others are asked for kicks that would only cost them time.
            return Wait::Poll;
        }
        let mut wait = Wait::Event;
        for entry in &mut scan.entries {
            if entry.asleep {
                // Its kick has woken us, and this turn has not come to it.
                // SAFETY: compared in this turn.
                if unsafe { entry.watch.wants_visit() } {
                    return Wait::Poll;
                }
                continue;
            }
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: the queue is in this reactor's set, and the caller has said the rest.
            let queue_wait = unsafe { queue.arm(reader, turn) };
            if queue_wait == Wait::Poll {
                entry.watch.due = true;
                return Wait::Poll;
            }
            entry.asleep = queue_wait == Wait::Event && !entry.watch.due;
            wait = wait.sooner(queue_wait);
        }
        wait
    }

    /// Looks at some of the cold queues; at all of them when the last pass was too long ago.
    ///
    /// # Safety
    /// As for [`PollSet::turn`]; the watches have been compared.
    unsafe fn look_at_cold(
        &self,
        scan: &mut Scan,
        reader: &Reader,
        turn: &mut Turn,
        events: &Events,
    ) -> bool {
        let mut left = scan.entries.len() - scan.hot;
        let overdue = turn.now_ticks().saturating_sub(scan.passed_ticks) > scan.pass_max_ticks;
        if !overdue {
            let (busy, idle) = COLD_PER_TURN;
            left = left.min(if turn.idle_turns == 0 { busy } else { idle });
        }
        let mut worked = false;
        while left > 0 {
            left -= 1;
            if scan.cursor >= scan.entries.len() {
                scan.passed_ticks = turn.now_ticks();
                scan.cursor = 0;
            }
            scan.cursor = scan.cursor.max(scan.hot);
            let Some(entry) = scan.entries.get_mut(scan.cursor) else { break };
            // SAFETY: the caller says so.
            if unsafe { entry.watch.wants_visit() } {
                // SAFETY: the caller says so.
                worked |= unsafe { self.visit(entry, reader, turn, events) };
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
        turn: &mut Turn,
        events: &Events,
    ) -> bool {
        let queue = &self.queues[entry.queue as usize];
        // SAFETY: the queue is in this reactor's set, and the caller has said the rest.
        let (worked, watch) = unsafe { queue.visit_watched(reader, turn, events) };
        entry.watch = watch;
        entry.asleep = false;
        entry.active = true;
        worked
    }

    /// Makes the queues that the control side has changed something about wait for a visit.
    #[cold]
    fn compare(&self, scan: &mut Scan, reader: &Reader) {
        for entry in &mut scan.entries {
            let queue = &self.queues[entry.queue as usize];
            // SAFETY: queues of a set are of its reactor's domain; `turn`'s caller has said the
            // rest.
            if unsafe { queue.changed_since(&entry.watch, reader) } {
                // The address that it looked at may not be mapped any more.
                entry.watch = Watch::new();
                entry.asleep = false;
            }
        }
    }
}

impl Scan {
    /// What is not done in every turn.
    #[cold]
    fn round(&mut self) {
        if self.strays {
            // SAFETY: a query without side effects, which no libc answers by itself.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        if self.turns.is_multiple_of(COLD_AFTER) {
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
