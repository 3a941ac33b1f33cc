//! A reactor's side of a disk.
#![expect(unsafe_code, reason = "the contract's method is unsafe; nothing here is")]

use std::sync::Arc;

use bdev::{
    Bdev, Channel, Completion, Failure, Io, Line, Op, Outstanding, Status, Submit, Tag, Wait,
    WakeFds, within,
};

use crate::worker::Shared;

/// The I/O path of one owner.
pub(crate) struct RbdChannel {
    shared: Arc<Shared>,
    /// Keeps the disk's thread.
    _disk: Arc<dyn Bdev>,
    writable: bool,
    line: Arc<Line>,
    outstanding: Outstanding,
    /// The number of outstanding I/Os.
    count: usize,
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
            outstanding: Outstanding::new(depth),
            count: 0,
            unannounced: false,
        })
    }
}

impl Channel for RbdChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let writes = matches!(io.op, Op::Write | Op::Unmap | Op::WriteZeroes);
        if writes && !self.writable {
            return self.outstanding.refuse(&io, libc::EROFS);
        }
        if !within(&io, self.shared.size()) {
            return self.outstanding.refuse(&io, libc::EINVAL);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        if !self.outstanding.add(&io) {
            return Submit::Done(Status::IoError);
        }
        self.line.push(io);
        self.count += 1;
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
        self.outstanding.failure(tag)
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
        if self.count == 0 {
            return 0;
        }
        self.kick();
        let n = self.outstanding.collect(&self.line, done);
        self.count -= n;
        n
    }
}

impl Drop for RbdChannel {
    fn drop(&mut self) {
        self.shared.remove(&self.line);
    }
}
