//! Copies the data to a new member, window by window, while guests use the array. The `copier` has a
//! thread of its own for the I/O.
//!
//! All channels see the same order of steps, each at its own time:
//!
//! 1. The window is locked: changes of it wait in the channels. A change that began before goes on.
//! 2. When no such change is under way in any channel, the window does not change any more. It is
//!    copied.
//! 3. The next window is locked, and `copied` is its beginning: changes below it go to the target as
//!    well, those that waited for the old window first of all.
//!
//! A channel that is at step 3 while another is at step 1 changes the old window on the target as
//! well, which has all of its data. A change that is under way when its range becomes a window, and
//! went to no target, is waited for in step 2. So the target misses no change. Nobody reads from it
//! before the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bdev::{Bdev, Error, Rights};
use tracing::{error, info};

use super::copier::{Copier, Job};
use super::{Pace, Thread};
use crate::array::lane::Member;
use crate::array::{Process, SlotState, bit};
use crate::member_channel::{MemberChannel, is_busy};

/// A rebuild under way.
pub(super) struct Rebuild {
    slot: usize,
    copier: Copier,
    pace: Pace,
    /// The first byte that was not copied.
    at: u64,
    started: Instant,
    /// It waits for changes of the window, or for its pace.
    pub(super) waits: bool,
}

impl Thread {
    /// Adds a member to a free slot, and begins to copy.
    ///
    /// # Errors
    /// EPERM if a rebuild is under way or the slot is not free; as [`Bdev::open`].
    pub(super) fn start_rebuild(
        &mut self,
        slot: usize,
        bdev: Arc<dyn Bdev>,
        pace: Pace,
    ) -> Result<(), Error> {
        let free = |slots: &[crate::array::Slot]| {
            slots.get(slot).is_some_and(|s| s.state == SlotState::Absent && s.bdev.is_none())
        };
        if self.rebuild.is_some() || !free(&self.array.state().slots) {
            return Err(Error::of_errno(self.array.name.clone(), libc::EPERM));
        }
        if is_busy(&bdev) {
            // A late write could land on what the rebuild copies.
            return Err(Error::Busy(format!("{}: has I/O under way", bdev.name())));
        }
        let target = MemberChannel::open(&bdev, Rights::Write)?;
        let system = |source| Error::System { what: self.array.name.clone(), source };
        let copier = Copier::start(&self.array, slot, target).map_err(system)?;
        self.add_to_lanes(slot, &bdev)?;
        info!("bdev {}: rebuild of member {} begins", self.array.name, bdev.name());
        self.rebuild =
            Some(Rebuild { slot, copier, pace, at: 0, started: Instant::now(), waits: false });
        self.lock_next_window();
        Ok(())
    }

    /// Opens the member for each channel, and adds it to all at a time.
    fn add_to_lanes(&self, slot: usize, bdev: &Arc<dyn Bdev>) -> Result<(), Error> {
        let mut opened = vec![];
        loop {
            let mut state = self.array.state();
            let lanes = state.open_lanes();
            let is_open = |cell: &Arc<_>| opened.iter().any(|(other, _)| Arc::ptr_eq(other, cell));
            let new: Vec<_> = lanes.into_iter().filter(|cell| !is_open(cell)).collect();
            if new.is_empty() {
                let place = &mut state.slots[slot];
                (place.state, place.bdev) = (SlotState::Writing, Some(Arc::clone(bdev)));
                (place.uuid, place.has_failed) = (bdev.uuid(), false);
                state.version += 1;
                (state.window, state.copied) = (None, 0);
                state.process = Some(Process { slot, at: 0 });
                for (cell, member) in opened {
                    let mut lane = cell.lane.take();
                    lane.lock_window(None, 0);
                    lane.add_member(slot, member);
                }
                return Ok(());
            }
            drop(state);
            for cell in new {
                let member = Member::open(bdev, cell.depth, &cell.wakes)?;
                opened.push((cell, member));
            }
        }
    }

    /// Tells all channels that what is before `at` is copied, and locks the next window.
    fn lock_next_window(&mut self) {
        let Some(rebuild) = &mut self.rebuild else { return };
        let size = self.array.layout.size;
        let end = rebuild.at.saturating_add(rebuild.pace.window).min(size);
        let window = (rebuild.at < size).then_some(rebuild.at..end);
        let (at, slot) = (rebuild.at, rebuild.slot);
        let lanes = {
            let mut state = self.array.state();
            (state.window, state.copied) = (window.clone(), at);
            state.process = Some(Process { slot, at });
            state.open_lanes()
        };
        for cell in lanes {
            cell.lane.take().lock_window(window.clone(), at);
            cell.wake_owner();
        }
    }

    /// Does the next step of a rebuild.
    pub(super) fn step_rebuild(&mut self) {
        let Some(rebuild) = &mut self.rebuild else { return };
        rebuild.waits = true;
        if rebuild.copier.is_busy() {
            if let Some(result) = rebuild.copier.poll() {
                self.end_step(result);
            }
            return;
        }
        let slot = rebuild.slot;
        let (window, flushes) = {
            let state = self.array.state();
            let bdev = state.slots[slot].bdev.as_ref();
            (state.window.clone(), bdev.is_some_and(|bdev| bdev.features().flush))
        };
        let Some(window) = window else {
            // The superblock must not say that the data is there before it is durable.
            return if flushes {
                rebuild.copier.begin(Job::Flush)
            } else {
                self.complete_rebuild()
            };
        };
        let bytes_per_sec = rebuild.pace.bytes_per_sec;
        if bytes_per_sec > 0
            && rebuild.started.elapsed().as_secs_f64() < rebuild.at as f64 / bytes_per_sec as f64
        {
            return;
        }
        let lanes = self.array.state().open_lanes();
        if lanes.iter().any(|cell| cell.lane.take().changes_window()) {
            return;
        }
        rebuild.copier.begin(Job::Copy(window));
    }

    /// Goes on after the copy of a window, or after the flush at the end.
    fn end_step(&mut self, result: Result<(), String>) {
        let Some(rebuild) = &mut self.rebuild else { return };
        rebuild.waits = false;
        if let Err(e) = result {
            let slot = rebuild.slot;
            error!("bdev {}: rebuild has failed: {e}", self.array.name);
            return self.remove(bit(slot), true);
        }
        let window = self.array.state().window.clone();
        match window {
            Some(window) => {
                rebuild.at = window.end;
                self.lock_next_window();
            }
            None => self.complete_rebuild(),
        }
    }

    /// Makes the target a full member: everything is copied, and changes go there as well.
    fn complete_rebuild(&mut self) {
        let Some(Rebuild { slot, .. }) = self.rebuild.take() else { return };
        if !self.write_superblocks(bit(slot)) {
            return self.remove(bit(slot), true);
        }
        let lanes = {
            let mut state = self.array.state();
            if state.slots[slot].state != SlotState::Writing {
                return;
            }
            state.slots[slot].state = SlotState::InSync;
            state.version += 1;
            (state.window, state.copied, state.process) = (None, 0, None);
            state.open_lanes()
        };
        // A channel at which the target has just failed has set its bit in `failed`: the target is
        // removed again before the failed change is acknowledged.
        let all = lanes.iter().all(|cell| cell.lane.take().complete_rebuild(slot));
        if all {
            self.array.live.fetch_or(bit(slot), Ordering::AcqRel);
            info!("bdev {}: rebuild is complete", self.array.name);
        }
    }

    /// Stops reading from these members, and ends the rebuild if its target is among them.
    pub(super) fn end_rebuild_of(&mut self, slots: u64) {
        if let Some(rebuild) = &mut self.rebuild {
            rebuild.copier.forget(slots);
        }
        let of = |rebuild: &&mut Rebuild| bit(rebuild.slot) & slots != 0;
        if self.rebuild.as_mut().filter(of).is_none() {
            return;
        }
        self.rebuild = None;
        let lanes = {
            let mut state = self.array.state();
            (state.window, state.copied, state.process) = (None, 0, None);
            state.open_lanes()
        };
        for cell in lanes {
            cell.lane.take().lock_window(None, 0);
            cell.wake_owner();
        }
    }
}
