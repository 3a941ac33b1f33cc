//! The channel of an engine whose channels share a queue of requests to a server.
#![expect(unsafe_code, reason = "the contract's method is unsafe; nothing here is")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::contract::{Bdev, Channel, Features, Wait, WakeFds};
use crate::failure::Failure;
use crate::geometry::within;
use crate::io::{Completion, Io, Op, Status, Submit, Tag};
use crate::line::Line;
use crate::outstanding::Outstanding;

/// A queue of requests to a server, which several channels share. Each channel has a [`Line`] with
/// its I/Os; whoever serves the queue serves the lines of all.
pub trait SharedQueue: Send + Sync + 'static {
    /// The fd that is signalled when the queue may have results.
    fn call_fd(&self) -> BorrowedFd<'_>;

    /// For a reactor: serves all channels, if no other thread does. Returns whether nothing is left
    /// to do now; if not, the caller calls this again before it sleeps. Does not wait.
    fn try_serve(&self) -> bool;

    /// Adds a channel of this depth, and returns its place. Its owner may sleep.
    fn add(&self, line: &Arc<Line>, depth: u16) -> usize;

    /// Removes a channel that has no outstanding I/O. `sleeps`: whether its owner might sleep.
    fn remove(&self, place: usize, sleeps: bool);

    /// Records that the owner of one more channel may sleep, or of one less. Not for reactors.
    fn set_sleeps(&self, _sleeps: bool) {}
}

/// The I/O path of one owner to a bdev with a [`SharedQueue`].
pub struct QueueChannel<Q: SharedQueue> {
    disk: Arc<dyn Bdev>,
    features: Features,
    queue: Arc<Q>,
    /// Its place in the queue.
    place: usize,
    line: Arc<Line>,
    /// A duplicate of the queue's fd: a reactor can wait only once for each fd.
    call: OwnedFd,
    outstanding: Outstanding,
    /// The number of outstanding I/Os.
    count: usize,
    /// Another thread had the queue when this channel tried to serve it, or work is left.
    unserved: bool,
    sleeps: bool,
}

impl<Q: SharedQueue> QueueChannel<Q> {
    /// Opens a channel of `disk`, which `queue` serves.
    ///
    /// # Errors
    /// The system has no file descriptor left.
    pub fn open(disk: Arc<dyn Bdev>, queue: Arc<Q>, depth: u16) -> io::Result<Self> {
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
            sleeps: true,
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

impl<Q: SharedQueue> Channel for QueueChannel<Q> {
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

    fn set_wakes(&mut self, wakes: bool) {
        if wakes != self.sleeps {
            self.sleeps = wakes;
            self.queue.set_sleeps(wakes);
        }
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

impl<Q: SharedQueue> Drop for QueueChannel<Q> {
    fn drop(&mut self) {
        self.queue.remove(self.place, self.sleeps);
    }
}
