//! The outstanding I/Os of a channel.

use crate::failure::{Failure, Failures};
use crate::io::{Completion, Io, Status, Submit, Tag};
use crate::line::Line;

/// The outstanding I/Os of a channel, by tag, and why I/Os have failed.
#[derive(Debug)]
pub struct Outstanding {
    slots: Box<[Option<Io>]>,
    failures: Failures,
}

impl Outstanding {
    /// Makes room for tags below `depth`.
    #[must_use]
    pub fn new(depth: u16) -> Self {
        let slots = vec![None; depth.into()].into_boxed_slice();
        Self { slots, failures: Failures::new(depth) }
    }

    /// Adds an I/O. Returns whether its tag is valid: below the depth, and not in use.
    #[inline]
    #[must_use]
    pub fn add(&mut self, io: &Io) -> bool {
        match self.slots.get_mut(usize::from(io.tag.0)) {
            Some(slot @ None) => {
                *slot = Some(*io);
                true
            }
            // The contract forbids such a tag.
            _ => false,
        }
    }

    /// The slot of a tag.
    #[inline]
    pub(crate) fn slot(&mut self, tag: Tag) -> Option<&mut Option<Io>> {
        self.slots.get_mut(usize::from(tag.0))
    }

    /// Fails an I/O that is invalid for the disk, with this errno.
    #[cold]
    pub fn refuse(&mut self, io: &Io, errno: i32) -> Submit {
        self.failures.note(io, errno);
        let unsupported = errno == libc::EOPNOTSUPP;
        Submit::Done(if unsupported { Status::Unsupported } else { Status::IoError })
    }

    /// Records the reason for which an I/O fails.
    #[cold]
    pub(crate) fn note(&mut self, io: &Io, errno: i32) {
        self.failures.note(io, errno);
    }

    /// Takes the reason of a failed I/O, for [`crate::Channel::failure`].
    pub fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.take(tag)
    }

    /// Fills `done` from the front with the I/Os of a line that have ended, and returns their
    /// number.
    pub fn collect(&mut self, line: &Line, done: &mut [Completion]) -> usize {
        let mut n = 0;
        while n < done.len() {
            let Some((tag, ended)) = line.pop() else { break };
            let io = self.slot(tag).and_then(Option::take);
            let (status, errno) = ended.status();
            if let (Some(io), Some(errno)) = (io, errno) {
                self.failures.note(&io, errno);
            }
            done[n] = Completion { tag, status };
            n += 1;
        }
        n
    }
}
