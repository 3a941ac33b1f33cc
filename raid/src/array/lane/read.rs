//! Reads of a mirror.

use std::sync::atomic::Ordering;

use bdev::{Io, Status, Tag};

use super::{Child, Lane};
use crate::array::{bit, slots_of};
use crate::layout::Place;
use crate::level::Level;

impl Lane {
    /// The member to read from: the one with the fewest outstanding bytes of this channel, except
    /// those that have failed the read.
    fn reader(&self, failed: u64) -> Option<usize> {
        let usable = slots_of(self.in_sync & !failed).filter(|slot| *slot < self.members.len());
        usable.min_by_key(|slot| self.members[*slot].bytes)
    }

    /// Starts a read of raid1.
    pub(super) fn start_read(&mut self, tag: Tag, io: &Io) {
        self.note_started(tag, io.len);
        let Some(member) = self.reader(0) else { return self.fail(tag, Status::IoError) };
        let offset = self.array.layout.extents[member].offset + io.offset;
        self.send(tag, 0, Place { member, offset, len: io.len });
    }

    /// Lets another member do a read that failed. Returns whether there is one.
    pub(super) fn read_elsewhere(&mut self, index: u16) -> bool {
        if self.array.layout.level != Level::Raid1 || self.abandoned {
            return false;
        }
        let Child { tag, member: at, io, .. } = self.children[usize::from(index)];
        let Some(active) = self.of(tag) else { return false };
        active.failed |= bit(at);
        let (failed, offset) = (active.failed, active.io.offset);
        let Some(other) = self.reader(failed) else { return false };
        self.array.read_errors.fetch_add(1, Ordering::Relaxed);
        let child = &mut self.children[usize::from(index)];
        child.member = other;
        child.io.offset = self.array.layout.extents[other].offset + offset;
        self.members[other].bytes += io.len;
        self.refused.push_back(index);
        // It was not submitted in vain yet.
        self.tried = false;
        true
    }
}
