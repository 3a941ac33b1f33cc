//! Writes, write-zeroes, unmaps and flushes: they go to several members, and their acknowledgement
//! may have to wait until a superblock says which members have them.
//!
//! A member that fails a change is removed before the change is acknowledged. Otherwise, the member
//! would be read after a restart, without the change. The channel removes it from [`Array::live`],
//! sends no I/O there any more, and holds the completions of this and of all later changes. The
//! maintenance thread removes the member from the other channels, writes superblocks without it to
//! the remaining members, and then releases what is held.
//!
//! [`Array::live`]: crate::array::Array::live

use std::sync::atomic::Ordering;

use bdev::{Channel, Io, Op, Status, Tag};

use super::{Active, Child, Lane, Member};
use crate::array::{bit, slots_of};
use crate::layout::Place;
use crate::level::Level;

impl Lane {
    /// Starts an I/O that all members do. There are enough free children.
    pub(super) fn start_everywhere(&mut self, tag: Tag, io: &Io) {
        self.note_started(tag, io.len);
        let level = self.array.layout.level;
        let targets = self.targets(io);
        for member in 0..self.members.len() {
            if level.is_redundant() && targets & bit(member) == 0 {
                continue;
            }
            if io.op == Op::Flush {
                if self.members[member].flushes {
                    self.add_target(tag, member);
                    self.send(tag, 0, Place { member, offset: 0, len: 0 });
                }
                continue;
            }
            let layout = &self.array.layout;
            let first = layout.extents[member].offset;
            let place = match level {
                Level::Raid0 => layout.on_member(member, io.offset, io.len),
                Level::Raid5f => {
                    let strips = |bytes: u64| bytes / layout.stripe() * layout.strip;
                    let (offset, len) = (first + strips(io.offset), strips(io.len));
                    Some(Place { member, offset, len })
                }
                _ => Some(Place { member, offset: first + io.offset, len: io.len }),
            };
            if let Some(place) = place {
                self.add_target(tag, member);
                self.send(tag, 0, place);
            }
        }
    }

    /// The members that must do a change: those with right data, and the target of a rebuild behind
    /// its window. What is ahead of the window will be copied; nothing can be in the window or
    /// reach into it, as such changes wait.
    pub(super) fn targets(&self, io: &Io) -> u64 {
        let copied = io.op == Op::Flush || io.offset < self.copied;
        self.in_sync | if copied { self.writing } else { 0 }
    }

    pub(super) fn add_target(&mut self, tag: Tag, member: usize) {
        if let Some(active) = self.of(tag) {
            active.targets |= bit(member);
        }
    }

    /// Ends a change of a redundant array.
    pub(super) fn finish_change(&mut self, tag: Tag, active: &Active) {
        let failed = active.failed & (self.in_sync | self.writing);
        // After `abandon`, members may end I/O that they have not done, so a failure says nothing.
        let removed = failed != 0 && !self.abandoned && self.remove_failed(failed);
        if failed != 0 && !removed && active.io.op != Op::Flush {
            self.note_torn(&active.io);
        }
        if self.hold {
            self.held.push_back(tag);
        } else {
            let status = self.result(active);
            self.end(tag, status);
        }
    }

    /// Removes members that have failed a change. If too few would be left, they stay: the change
    /// has then failed. Returns whether all of them are removed.
    fn remove_failed(&mut self, failed: u64) -> bool {
        let (live, target) = (failed & self.in_sync, failed & self.writing);
        let removed = if live != 0 && self.array.remove_live(live) { live } else { 0 } | target;
        if removed != 0 {
            self.hold = true;
            self.stop_using(removed);
            // Release: the maintenance thread that sees the bits also sees the change of `live`.
            self.array.failed.fetch_or(removed, Ordering::Release);
            self.array.waker.wake();
        }
        removed == failed
    }

    /// Asks for a repair: some members may have a change that others lack, and none was removed.
    fn note_torn(&self, io: &Io) {
        if self.array.torn.push(io.offset..io.offset + io.len).is_ok() {
            self.array.waker.wake();
        }
    }

    /// Sends no I/O to these members from now on.
    fn stop_using(&mut self, slots: u64) {
        self.in_sync &= !slots;
        self.writing &= !slots;
        for slot in slots_of(slots) {
            let Some(member) = self.members.get_mut(slot) else { continue };
            if let (Some(channel), false) = (&mut member.channel, member.leaving) {
                channel.abandon();
            }
            member.leaving = true;
        }
    }

    /// Whether a change has succeeded: every member with right data that it was for has it. A member
    /// that another channel has removed meanwhile does not count.
    fn result(&self, active: &Active) -> Status {
        let done = active.targets & !active.failed;
        // Acquire: pairs with the removal of a member by another channel.
        let live = self.array.live.load(Ordering::Acquire);
        let flushed_nowhere = active.io.op == Op::Flush && active.targets == 0;
        let everywhere = live & active.targets & !done == 0 && live & done != 0;
        let ok = active.status == Status::Ok && !self.failing && (everywhere || flushed_nowhere);
        if ok { Status::Ok } else { Status::IoError }
    }

    // For the maintenance thread.

    /// Removes members, and holds the completions of changes until [`Lane::release`].
    pub(crate) fn remove_members(&mut self, slots: u64) {
        self.hold = true;
        self.stop_using(slots);
    }

    /// Reports what is held. `failing`: changes fail, as no superblock can be written.
    pub(crate) fn release(&mut self, failing: bool) {
        (self.hold, self.failing) = (false, failing);
        while let Some(tag) = self.held.pop_front() {
            let Some(active) = self.of(tag).copied() else { continue };
            let status = self.result(&active);
            self.end(tag, status);
        }
    }

    /// Takes the channel of a member that is not used any more, once it has no I/O.
    pub(crate) fn take_channel(&mut self, slot: usize) -> TakenChannel {
        let at_it = |index: &u16| self.children[usize::from(*index)].member == slot;
        // What it has refused ends with the next poll.
        let refused = self.refused.iter().any(at_it);
        match self.members.get_mut(slot) {
            Some(member) if member.leaving && (member.with > 0 || refused) => TakenChannel::Busy,
            Some(member) if member.leaving => match std::mem::take(member).channel {
                Some(channel) => TakenChannel::Taken(Box::new(channel)),
                None => TakenChannel::None,
            },
            _ => TakenChannel::None,
        }
    }

    /// Adds the target of a rebuild.
    pub(crate) fn add_member(&mut self, slot: usize, mut member: Member) {
        if let Some(channel) = &mut member.channel {
            channel.set_wakes(self.wakes);
            if let Some(limiting) = self.limiting {
                channel.set_limiting(limiting);
            }
            if self.abandoned {
                channel.abandon();
            }
        }
        if let Some(place) = self.members.get_mut(slot) {
            *place = member;
            self.writing |= bit(slot);
        }
    }

    /// Locks a range instead of the one before. Changes below `copied` go to the target as well.
    pub(crate) fn lock_window(&mut self, window: Option<std::ops::Range<u64>>, copied: u64) {
        (self.window, self.copied) = (window, copied);
        while let Some(tag) = self.parked.pop_back() {
            self.waiting.push_front(tag);
        }
    }

    /// Whether a change of the locked range, which began before the lock, is under way at a member
    /// that is used. What others still do makes no difference to the data.
    pub(crate) fn changes_window(&self) -> bool {
        let active = |tag: Tag| self.active.get(usize::from(tag.0))?.as_ref();
        let at_used = |child: &&Child| child.used && !self.members[child.member].leaving;
        let mut parts = self.children.iter().filter(at_used).filter_map(|child| active(child.tag));
        let mut rest = self.active.iter().flatten();
        parts.any(|active| self.must_wait(&active.io))
            || rest.any(|a| a.started > 0 && !a.all_started && self.must_wait(&a.io))
    }

    /// Makes the target of a rebuild a full member. Returns whether it still is the target.
    pub(crate) fn complete_rebuild(&mut self, slot: usize) -> bool {
        let target = self.writing & bit(slot);
        self.writing &= !target;
        self.in_sync |= target;
        target != 0
    }
}

/// What [`Lane::take_channel`] has found.
pub(crate) enum TakenChannel {
    /// The member has I/O outstanding.
    Busy,
    None,
    Taken(Box<bdev::BdevChannel>),
}
