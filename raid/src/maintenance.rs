//! The thread of a redundant array: it removes and adds members, writes their superblocks, and
//! rebuilds.
//!
//! It takes each channel's lane for a moment to change it, and never makes a reactor wait.

mod copier;
mod rebuild;
mod repair;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Bdev, Channel, Error};
use tracing::{error, info, warn};

use crate::array::lane::{Replacements, TakenChannel};
use crate::array::{Array, LaneCell, SlotState, bit, slots_of};
use crate::member_channel::is_busy;
use crate::metadata;
use rebuild::Rebuild;

/// The pause while the thread waits for I/O of channels.
const PAUSE: Duration = Duration::from_micros(200);
/// The interval of attempts to write superblocks after all have failed.
const RETRY: Duration = Duration::from_secs(1);

/// How a rebuild runs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes that are locked and copied at a time.
    pub window: u64,
    /// The largest number of bytes per second. 0: no limit.
    pub bytes_per_sec: u64,
}

/// What the thread is asked for. `done` is dropped if the array ends first.
pub(crate) enum Command {
    Remove {
        slot: usize,
        done: Sender<Result<(), Error>>,
    },
    Add {
        slot: usize,
        bdev: Arc<dyn Bdev>,
        pace: Pace,
        /// Keeps the slot and the claim on the bdev for this command.
        reserved: Arc<()>,
        done: Sender<Result<(), Error>>,
    },
}

#[derive(Default)]
struct Commands {
    queue: Mutex<VecDeque<Command>>,
    stop: AtomicBool,
}

/// The thread of an array, which ends when this is dropped.
pub(crate) struct Maintenance {
    commands: Arc<Commands>,
    array: Arc<Array>,
}

impl Maintenance {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn start(array: &Arc<Array>) -> std::io::Result<Self> {
        let commands = Arc::new(Commands::default());
        let mut thread = Thread {
            array: Arc::clone(array),
            commands: Arc::clone(&commands),
            leaving: vec![],
            rebuild: None,
            retry_at: None,
        };
        thread::Builder::new().name("vhost-raid".into()).spawn(move || thread.run())?;
        Ok(Self { commands, array: Arc::clone(array) })
    }

    /// Asks for something. Does not wait.
    pub(crate) fn ask(&self, command: Command) {
        self.commands.lock().push_back(command);
        self.array.waker.wake();
    }
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        self.commands.stop.store(true, Ordering::Release);
        self.array.waker.wake();
    }
}

impl Commands {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Command>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member that is not used any more, and whose I/O has not ended everywhere.
struct Leaving {
    slot: usize,
    /// All who wait for it.
    done: Vec<Sender<Result<(), Error>>>,
}

struct Thread {
    array: Arc<Array>,
    commands: Arc<Commands>,
    leaving: Vec<Leaving>,
    rebuild: Option<Rebuild>,
    /// When to try again to write superblocks.
    retry_at: Option<Instant>,
}

impl Thread {
    fn run(&mut self) {
        while !self.commands.stop.load(Ordering::Acquire) {
            self.round();
            if self.leaving.is_empty() && self.rebuild.is_none() && self.retry_at.is_none() {
                self.array.waker.wait(|| self.has_work() || self.has_repairs());
            } else if self.rebuild.as_ref().is_none_or(|rebuild| rebuild.waits) && !self.has_work()
            {
                thread::sleep(PAUSE);
            }
        }
    }

    fn has_work(&self) -> bool {
        self.commands.stop.load(Ordering::Acquire)
            || self.array.failed.load(Ordering::Acquire) != 0
            || !self.commands.lock().is_empty()
    }

    /// Does what is due now: failed members first, as guests' writes wait for them.
    fn round(&mut self) {
        // Acquire: pairs with the Release of the channel that has removed the members.
        let failed = self.array.failed.swap(0, Ordering::AcqRel);
        if failed != 0 {
            self.remove(failed, true);
        }
        let command = self.commands.lock().pop_front();
        match command {
            Some(Command::Remove { slot, done }) => self.remove_slot(slot, done),
            Some(Command::Add { slot, bdev, pace, reserved, done }) => {
                let begun = self.start_rebuild(slot, bdev, pace);
                drop(reserved);
                let _ = done.send(begun);
            }
            None => {}
        }
        self.take_channels();
        if self.retry_at.is_some_and(|time| time <= Instant::now()) {
            self.retry_at = None;
            self.write_and_release();
        }
        self.step_repair();
        self.step_rebuild();
    }

    fn lanes(&self) -> Vec<Arc<LaneCell>> {
        self.array.state().open_lanes()
    }

    /// Removes a member because it is asked for.
    fn remove_slot(&mut self, slot: usize, done: Sender<Result<(), Error>>) {
        let state = self.array.state().slots.get(slot).map(|slot| slot.state);
        let may = match state {
            Some(SlotState::InSync) => self.array.remove_live(bit(slot)),
            Some(SlotState::Writing) => true,
            // A channel has removed it just now.
            Some(SlotState::Absent) => false,
            None => false,
        };
        if may {
            self.remove(bit(slot), false);
        }
        let is_leaving = self
            .array
            .state()
            .slots
            .get(slot)
            .is_some_and(|slot| slot.state == SlotState::Absent && slot.bdev.is_some());
        match self.leaving.iter_mut().find(|leaving| leaving.slot == slot) {
            Some(leaving) => leaving.done.push(done),
            None if is_leaving => self.leaving.push(Leaving { slot, done: vec![done] }),
            None => {
                let text = format!("{}: too few members would be left", self.array.name);
                let gone = state == Some(SlotState::Absent);
                let _ = done.send(if gone || may { Ok(()) } else { Err(Error::Busy(text)) });
            }
        }
    }

    /// Removes members that are not in `live` any more from all channels, writes superblocks without
    /// them, and lets channels acknowledge changes again.
    fn remove(&mut self, slots: u64, has_failed: bool) {
        let lanes = {
            let mut state = self.array.state();
            for slot in slots_of(slots) {
                let Some(place) = state.slots.get_mut(slot) else { continue };
                if place.state == SlotState::Absent {
                    continue;
                }
                (place.state, place.has_failed) = (SlotState::Absent, has_failed);
                let name = place.bdev.as_ref().map_or("?", |bdev| bdev.name());
                let why = if has_failed { "was removed after an error" } else { "was removed" };
                warn!(
                    "bdev {}: member {name} {why}; the array goes on without it",
                    self.array.name
                );
                self.leaving.push(Leaving { slot, done: vec![] });
            }
            state.version += 1;
            state.hold = true;
            state.open_lanes()
        };
        self.array.live.fetch_and(!slots, Ordering::AcqRel);
        // From now on, no channel reads from these members: a change that they do not have may be
        // acknowledged once the superblocks say so.
        for cell in &lanes {
            cell.lane.take().remove_members(slots);
            cell.wake_owner();
        }
        self.end_rebuild_of(slots);
        self.write_and_release();
    }

    /// Writes superblocks, and lets channels acknowledge changes.
    fn write_and_release(&mut self) {
        let failing = !self.write_superblocks(0);
        self.retry_at = failing.then(|| Instant::now() + RETRY);
        let lanes = {
            let mut state = self.array.state();
            (state.hold, state.failing) = (false, failing);
            state.open_lanes()
        };
        for cell in lanes {
            let mut lane = cell.lane.take();
            // Another member has failed meanwhile: what is held may depend on it as well.
            if self.array.failed.load(Ordering::Acquire) == 0 {
                lane.release(failing);
            }
            drop(lane);
            cell.wake_owner();
        }
    }

    /// Writes superblocks to the members with right data, and `more`. Members that fail are removed,
    /// unless too few would be left. Returns whether the superblocks are right.
    ///
    /// Those of `more` come first: if the others counted on a member without a superblock after a
    /// power cut, the array would wait for it for ever.
    fn write_superblocks(&mut self, more: u64) -> bool {
        if !self.array.superblock {
            return true;
        }
        loop {
            let (bytes, first, others) = {
                let mut state = self.array.state();
                state.seq_number = state.seq_number.saturating_add(1);
                let of = |mask: u64| {
                    let member = |slot: usize| Some((slot, state.slots.get(slot)?.bdev.clone()?));
                    slots_of(mask).filter_map(member).collect::<Vec<_>>()
                };
                let others = state.mask(SlotState::InSync) & !more;
                (self.array.superblock(&state, more).encode(), of(more), of(others))
            };
            let mut failed = metadata::write_all(first, &bytes, metadata::LIMIT);
            if failed.is_empty() {
                failed = metadata::write_all(others, &bytes, metadata::LIMIT);
            }
            let mut mask = 0;
            for (slot, e) in failed {
                error!("bdev {}: {e}", self.array.name);
                mask |= bit(slot);
            }
            if mask == 0 {
                return true;
            }
            if mask & more != 0 || !self.array.remove_live(mask) {
                return false;
            }
            self.drop_silently(mask);
        }
    }

    /// Removes members while superblocks are being written.
    fn drop_silently(&mut self, slots: u64) {
        let lanes = {
            let mut state = self.array.state();
            for slot in slots_of(slots) {
                if let Some(place) = state.slots.get_mut(slot) {
                    (place.state, place.has_failed) = (SlotState::Absent, true);
                    self.leaving.push(Leaving { slot, done: vec![] });
                }
            }
            state.version += 1;
            state.hold = true;
            state.open_lanes()
        };
        for cell in lanes {
            cell.lane.take().remove_members(slots);
            cell.wake_owner();
        }
        self.end_rebuild_of(slots);
    }

    /// Closes the channels of leaving members that have no I/O, and lets go of the bdevs.
    fn take_channels(&mut self) {
        for leaving in std::mem::take(&mut self.leaving) {
            let mut busy = false;
            for cell in self.lanes() {
                let taken = cell.lane.take().take_channel(leaving.slot);
                match taken {
                    TakenChannel::Busy => {
                        busy = true;
                        replace_buffers(&cell, leaving.slot);
                    }
                    TakenChannel::None => {}
                    TakenChannel::Taken(channel) => cell.wakes.remove(channel.wake_fds()),
                }
            }
            let bdev = self.array.state().slots.get(leaving.slot).and_then(|s| s.bdev.clone());
            // Also I/O that was given up: it could corrupt what the member has later.
            if busy || bdev.is_some_and(|bdev| is_busy(&bdev)) {
                self.leaving.push(leaving);
                continue;
            }
            let bdev = self.array.state().slots.get_mut(leaving.slot).and_then(|s| s.bdev.take());
            if let Some(bdev) = &bdev {
                info!(
                    "bdev {}: removed member {} has no more I/O and is released",
                    self.array.name,
                    bdev.name()
                );
            }
            drop(bdev);
            for done in leaving.done {
                let _ = done.send(Ok(()));
            }
        }
    }
}

/// Gives a channel new buffers for those that a leaving member keeps.
fn replace_buffers(cell: &LaneCell, slot: usize) {
    let lens = cell.lane.take().kept_buffers(slot);
    if lens.is_empty() {
        return;
    }
    // The owner has the lane meanwhile.
    let new = Replacements::new(lens);
    cell.lane.take().replace_buffers(slot, new);
    cell.wake_owner();
}
