//! The parts of I/Os at the members: how they are submitted, refused, and end.
#![expect(unsafe_code, reason = "forwards I/O to `Channel::submit`")]

use bdev::{Channel, Completion, Op, Status, Submit, Tag};

use super::{COMPLETIONS, Child, Kind, Lane};
use crate::array::bit;
use crate::layout::Place;

impl Lane {
    /// Makes a child for the bytes at `at` of an I/O, and submits it. A child is free.
    pub(super) fn send(&mut self, tag: Tag, at: u64, place: Place) {
        let Some(index) = self.free.pop() else { return };
        let Some(io) = self.of(tag).map(|active| active.io) else { return };
        let Place { member, offset, len } = place;
        let part = if len == io.len {
            let mut part = io;
            (part.tag, part.offset) = (Tag(index), offset);
            Some(part)
        } else {
            // SAFETY: the segments are valid until the I/O is reported, which is after the end of
            // this child; the slot belongs to the child.
            unsafe { self.cuts.part(index, &io, at, len, Tag(index), offset) }
        };
        self.enter(tag);
        let child = &mut self.children[usize::from(index)];
        (child.tag, child.member, child.at, child.kind) = (tag, member, at, Kind::Data);
        child.used = true;
        match part {
            Some(part) => {
                child.io = part;
                self.members[member].bytes += len;
                self.submit_child(index);
            }
            // The range is within the I/O, so this does not occur.
            None => self.end_child(index, Status::IoError),
        }
    }

    /// Submits a child. If its member refuses it, it is submitted again later.
    pub(super) fn submit_child(&mut self, index: u16) {
        let Child { member: at, io, .. } = self.children[usize::from(index)];
        let member = &mut self.members[at];
        let Some(channel) = member.channel.as_mut().filter(|_| !member.leaving) else {
            return self.end_child(index, Status::IoError);
        };
        // SAFETY: segments and memory are valid until the I/O of the owner is reported, which is
        // after the end of its children.
        match unsafe { channel.submit(io) } {
            Submit::Queued => member.with += 1,
            Submit::Done(status) => self.end_child(index, status),
            Submit::Full(_) | Submit::Throttled(_) => self.refused.push_back(index),
        }
    }

    /// Ends a child, and its I/O with the last child.
    pub(super) fn end_child(&mut self, index: u16, status: Status) {
        let child @ Child { tag, member: at, io, kind, .. } = self.children[usize::from(index)];
        let member = &mut self.members[at];
        member.bytes = member.bytes.saturating_sub(io.len);
        if matches!(kind, Kind::Detached) {
            if let Some(channel) = &mut member.channel {
                channel.failure(Tag(index));
            }
            return self.free_child(index);
        }
        let ok = status == Status::Ok && !member.leaving;
        if !ok {
            let failure = member.channel.as_mut().and_then(|channel| channel.failure(Tag(index)));
            self.note_failure(tag, failure);
            if matches!(kind, Kind::Data) && io.op == Op::Read {
                if self.read_elsewhere(index) {
                    return;
                }
                if self.compute_instead(&child) {
                    return self.free_child(index);
                }
            }
            if let Some(active) = self.of(tag) {
                active.failed |= bit(at);
                let is_read = matches!(kind, Kind::Data) && io.op == Op::Read;
                if is_read || !self.array.layout.level.is_redundant() {
                    self.fail(tag, status);
                }
            }
        }
        self.free_child(index);
        match kind {
            Kind::Data | Kind::Detached => {}
            Kind::Parity(buffer) => self.free_strip(buffer),
            Kind::Source(slot) => return self.end_source(slot, ok),
        }
        self.leave(tag);
    }

    /// Takes completions of a member, a bounded number of them.
    pub(super) fn take_completions(&mut self, at: usize) {
        let member = &mut self.members[at];
        let Some(channel) = member.channel.as_mut().filter(|_| member.with > 0) else { return };
        let mut done = [Completion { tag: Tag(0), status: Status::Ok }; COMPLETIONS];
        let n = channel.poll(&mut done);
        member.with = member.with.saturating_sub(u16::try_from(n).unwrap_or(u16::MAX));
        self.more |= n == done.len();
        for Completion { tag, status } in done.into_iter().take(n) {
            self.end_child(tag.0, status);
        }
    }
}
