//! Copies the data to a new member, window by window, while guests use the array.
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
use std::time::{Duration, Instant};

use bdev::{Bdev, Buffer, Error, Op, Request, Rights};
use tracing::{error, info};

use super::{Pace, Thread};
use crate::array::lane::{Member, xor};
use crate::array::{Process, SlotState, bit, slots_of};
use crate::level::Level;
use crate::member_channel::{MemberChannel, is_busy};

/// The time in which a member must do an I/O of a rebuild.
const LIMIT: Duration = Duration::from_secs(10);

fn deadline() -> Instant {
    Instant::now() + LIMIT
}

/// A rebuild under way.
pub(super) struct Rebuild {
    slot: usize,
    target: MemberChannel,
    /// The members to read from, opened when they are needed.
    sources: Vec<(usize, MemberChannel)>,
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
            let source = std::io::Error::from_raw_os_error(libc::EPERM);
            return Err(Error::System { what: self.array.name.clone(), source });
        }
        if is_busy(&bdev) {
            // A late write could land on what the rebuild copies.
            return Err(Error::Busy(format!("{}: has I/O under way", bdev.name())));
        }
        let target = MemberChannel::open(&bdev, Rights::Write)?;
        self.add_to_lanes(slot, &bdev)?;
        info!("bdev {}: rebuild of member {} begins", self.array.name, bdev.name());
        self.rebuild = Some(Rebuild {
            slot,
            target,
            sources: vec![],
            pace,
            at: 0,
            started: Instant::now(),
            waits: false,
        });
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
        let window = self.array.state().window.clone();
        let Some(window) = window else { return self.complete_rebuild() };
        rebuild.waits = true;
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
        rebuild.waits = false;
        match copy(&self.array, rebuild, &window) {
            Ok(()) => {
                rebuild.at = window.end;
                self.lock_next_window();
            }
            Err(e) => {
                let slot = rebuild.slot;
                error!("bdev {}: rebuild has failed: {e}", self.array.name);
                self.remove(bit(slot), true);
            }
        }
    }

    /// Makes the target a full member: everything is copied, and changes go there as well.
    fn complete_rebuild(&mut self) {
        let Some(mut rebuild) = self.rebuild.take() else { return };
        let slot = rebuild.slot;
        let flushes = {
            let state = self.array.state();
            state.slots[slot].bdev.as_ref().is_some_and(|bdev| bdev.features().flush)
        };
        let flush = Request::plain(Op::Flush, 0, 0);
        // The superblock must not say that the data is there before it is durable.
        if flushes && rebuild.target.run(flush, deadline()).is_err() {
            error!("bdev {}: rebuild has failed: a flush of the new member", self.array.name);
            return self.remove(bit(slot), true);
        }
        drop(rebuild);
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
            rebuild.sources.retain(|(slot, _)| bit(*slot) & slots == 0);
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

/// Copies a window to the target.
fn copy(
    array: &crate::array::Array,
    rebuild: &mut Rebuild,
    window: &std::ops::Range<u64>,
) -> Result<(), String> {
    let reason = |errno| std::io::Error::from_raw_os_error(errno).to_string();
    if array.layout.level == Level::Raid5f {
        return compute(array, rebuild, window);
    }
    let len = usize::try_from(window.end - window.start).map_err(|e| e.to_string())?;
    let mut last = "no member to read from".to_owned();
    let live: Vec<usize> = slots_of(array.live.load(Ordering::Acquire)).collect();
    for slot in live {
        let offset = array.layout.extents[slot].offset + window.start;
        let source = source(array, &mut rebuild.sources, slot)?;
        let buffer = match source.run(Request::read(offset, len), deadline()) {
            Ok(buffer) => buffer,
            Err(errno) => {
                last = format!("read of member {slot}: {}", reason(errno));
                continue;
            }
        };
        let offset = array.layout.extents[rebuild.slot].offset + window.start;
        let written = rebuild.target.run(Request::write(offset, buffer), deadline());
        return written.map(drop).map_err(|errno| format!("write: {}", reason(errno)));
    }
    Err(last)
}

/// Computes the target's part of the stripes in a window, data and parity alike, from all other
/// members.
fn compute(
    array: &crate::array::Array,
    rebuild: &mut Rebuild,
    window: &std::ops::Range<u64>,
) -> Result<(), String> {
    let reason = |errno| std::io::Error::from_raw_os_error(errno).to_string();
    let layout = &array.layout;
    let strips = |bytes: u64| bytes / layout.stripe() * layout.strip;
    let (from, len) = (strips(window.start), strips(window.end - window.start));
    let len = usize::try_from(len).map_err(|e| e.to_string())?;
    let mut sum: Option<Buffer> = None;
    for slot in (0..layout.members()).filter(|slot| *slot != rebuild.slot) {
        let read = Request::read(layout.extents[slot].offset + from, len);
        let source = source(array, &mut rebuild.sources, slot)?;
        let read = source.run(read, deadline());
        let buffer = read.map_err(|errno| format!("read of member {slot}: {}", reason(errno)))?;
        match &mut sum {
            None => sum = Some(buffer),
            Some(sum) => xor(sum.bytes_mut(), buffer.bytes()),
        }
    }
    let offset = layout.extents[rebuild.slot].offset + from;
    let write = Request::write(offset, sum.ok_or("no member to read from")?);
    let written = rebuild.target.run(write, deadline());
    written.map(drop).map_err(|errno| format!("write: {}", reason(errno)))
}

/// Returns the channel to read from a member.
fn source<'a>(
    array: &crate::array::Array,
    sources: &'a mut Vec<(usize, MemberChannel)>,
    slot: usize,
) -> Result<&'a mut MemberChannel, String> {
    if !sources.iter().any(|(other, _)| *other == slot) {
        let bdev = array.state().slots[slot].bdev.clone().ok_or("a member is gone")?;
        let channel = MemberChannel::open(&bdev, Rights::Read).map_err(|e| e.to_string())?;
        sources.push((slot, channel));
    }
    let found = sources.iter_mut().find(|(other, _)| *other == slot);
    found.map(|(_, channel)| channel).ok_or_else(|| "a member is gone".to_owned())
}
