//! A reactor's side of a disk.
#![expect(unsafe_code, reason = "the contract's method is unsafe; nothing here is")]

use std::sync::Arc;

use bdev::{
    Bdev, Channel, Completion, Failure, Failures, Io, Line, Op, Status, Submit, Tag, Wait, WakeFds,
    within,
};

use crate::worker::Shared;

/// The I/O path of one owner.
pub(crate) struct RbdChannel {
    shared: Arc<Shared>,
    /// Keeps the disk's thread.
    _disk: Arc<dyn Bdev>,
    writable: bool,
    line: Arc<Line>,
    /// The outstanding I/Os, by tag.
    slots: Box<[Option<Io>]>,
    failures: Failures,
    outstanding: usize,
    /// The disk's thread was not woken for I/Os that were added.
    unannounced: bool,
}

impl RbdChannel {
    /// Opens the I/O path to a disk whose thread serves `shared`.
    pub(crate) fn open(
        disk: Arc<dyn Bdev>,
        shared: &Arc<Shared>,
        depth: u16,
    ) -> std::io::Result<Self> {
        let line = Line::new(depth)?;
        shared.add(&line);
        Ok(Self {
            shared: Arc::clone(shared),
            writable: !disk.features().read_only,
            _disk: disk,
            line,
            slots: vec![None; depth.into()].into_boxed_slice(),
            failures: Failures::new(depth),
            outstanding: 0,
            unannounced: false,
        })
    }

    /// Fails an I/O that is invalid for this disk.
    #[cold]
    fn refuse(&mut self, io: &Io, errno: i32) -> Submit {
        self.failures.note(io, errno);
        Submit::Done(Status::IoError)
    }
}

impl Channel for RbdChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let writes = matches!(io.op, Op::Write | Op::Unmap | Op::WriteZeroes);
        if writes && !self.writable {
            return self.refuse(&io, libc::EROFS);
        }
        if !within(&io, self.shared.size()) {
            return self.refuse(&io, libc::EINVAL);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        match self.slots.get_mut(usize::from(io.tag.0)) {
            Some(slot @ None) => *slot = Some(io),
            // The contract forbids such a tag.
            _ => return Submit::Done(Status::IoError),
        }
        self.line.push(io);
        self.outstanding += 1;
        self.unannounced = true;
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        std::iter::once(self.line.wake_fd()).collect()
    }

    fn wait(&self) -> Wait {
        if self.unannounced || !self.line.may_wait() { Wait::Poll } else { Wait::Event }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.take(tag)
    }

    #[inline]
    fn kick(&mut self) {
        if self.unannounced {
            self.unannounced = false;
            self.shared.wake();
        }
    }

    fn abandon(&mut self) {
        self.line.abandon();
        self.shared.wake();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.outstanding == 0 {
            return 0;
        }
        self.kick();
        let mut n = 0;
        while n < done.len() {
            let Some((tag, ended)) = self.line.pop() else { break };
            self.outstanding -= 1;
            let io = self.slots.get_mut(usize::from(tag.0)).and_then(Option::take);
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

impl Drop for RbdChannel {
    fn drop(&mut self) {
        self.shared.remove(&self.line);
    }
}
