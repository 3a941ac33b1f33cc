//! A reactor's side of a disk.
#![expect(unsafe_code, reason = "the contract's method is unsafe; nothing here is")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bdev::{
    Bdev, Channel, Completion, Failure, Features, Io, Line, Op, Outstanding, Status, Submit, Tag,
    Wait, WakeFds, within,
};

use crate::queue::Queue;

/// The I/O path of one owner.
pub(crate) struct NbdChannel {
    disk: Arc<dyn Bdev>,
    features: Features,
    queue: Arc<Queue>,
    /// Its place in the queue.
    place: usize,
    line: Arc<Line>,
    /// Signalled for each event of the queue's connection.
    call: OwnedFd,
    outstanding: Outstanding,
    /// The number of outstanding I/Os.
    count: usize,
    /// Another thread had the queue when this channel tried to serve it, or work is left.
    unserved: bool,
}

impl NbdChannel {
    pub(crate) fn open(disk: Arc<dyn Bdev>, queue: Arc<Queue>, depth: u16) -> io::Result<Self> {
        let line = Line::new(depth)?;
        Ok(Self {
            call: queue.call_fd().try_clone_to_owned()?,
            place: queue.add(&line, depth),
            features: disk.features(),
            disk,
            queue,
            line,
            outstanding: Outstanding::new(depth),
            count: 0,
            unserved: false,
        })
    }

    /// Returns the errno with which an invalid I/O fails; `None` if the I/O is valid.
    fn refusal(&self, io: &Io) -> Option<i32> {
        let Features { read_only, flush, unmap, write_zeroes, .. } = self.features;
        let supported = match io.op {
            Op::Read => true,
            Op::Write => !read_only,
            Op::Flush => flush,
            Op::Unmap => unmap,
            Op::WriteZeroes => write_zeroes,
        };
        match supported {
            false if read_only && io.op != Op::Flush => Some(libc::EROFS),
            false => Some(libc::EOPNOTSUPP),
            true => (!within(io, self.disk.size_bytes())).then_some(libc::EINVAL),
        }
    }

    #[inline]
    fn serve(&mut self) {
        self.line.owner_is_awake();
        self.unserved = !self.queue.try_serve();
    }
}

impl Channel for NbdChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if let Some(errno) = self.refusal(&io) {
            return self.outstanding.refuse(&io, errno);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        if !self.outstanding.add(&io) {
            return Submit::Done(Status::IoError);
        }
        self.line.push(io);
        self.count += 1;
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.line.wake_fd(), self.call.as_fd()].into_iter().collect()
    }

    fn wait(&self) -> Wait {
        let poll = self.unserved || self.line.waiting() > 0 || !self.line.may_wait();
        if poll { Wait::Poll } else { Wait::Event }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.outstanding.failure(tag)
    }

    #[inline]
    fn kick(&mut self) {
        if self.line.waiting() > 0 {
            self.serve();
        }
    }

    fn abandon(&mut self) {
        self.line.abandon();
        self.serve();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.count == 0 {
            return 0;
        }
        self.serve();
        let n = self.outstanding.collect(&self.line, done);
        self.count -= n;
        n
    }
}

impl Drop for NbdChannel {
    fn drop(&mut self) {
        self.queue.remove(self.place);
    }
}
