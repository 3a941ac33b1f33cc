//! The I/O path of an array, for its owner on a reactor.
//!
//! The maintenance thread takes a [`Lane`] for some microseconds at a time. The owner never waits
//! for it: what it asks for meanwhile is kept here and done with the next call.
#![expect(unsafe_code, reason = "implements `Channel::submit`")]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bdev::Bdev;
use bdev::{
    Channel, Completion, Failure, FailureKind, Io, Limiting, Op, Status, Submit, Tag, Wait,
    WakeFds, within,
};

use crate::array::lane::Lane;
use crate::array::{Array, LaneCell};
use crate::level::Level;

pub(crate) struct RaidChannel {
    /// Keeps the bdev in use while the channel is open.
    disk: Arc<dyn Bdev>,
    array: Arc<Array>,
    cell: Arc<LaneCell>,
    /// I/Os that the lane was not there for.
    queue: VecDeque<Io>,
    /// Reasons of failed I/Os, by tag.
    failures: Box<[Option<Failure>]>,
    limiting: Option<Limiting>,
    abandon: bool,
    /// The lane was not there at the last poll.
    missed: bool,
}

impl RaidChannel {
    pub(crate) fn new(
        disk: Arc<dyn Bdev>,
        array: Arc<Array>,
        cell: Arc<LaneCell>,
        depth: u16,
    ) -> Self {
        Self {
            disk,
            array,
            cell,
            queue: VecDeque::with_capacity(depth.into()),
            failures: vec![None; depth.into()].into(),
            limiting: None,
            abandon: false,
            missed: false,
        }
    }

    #[cold]
    fn refuse(&mut self, io: &Io, errno: i32) -> Submit {
        if let Some(slot) = self.failures.get_mut(usize::from(io.tag.0)) {
            *slot = Some(io.failed(FailureKind::Failed, errno));
        }
        let unsupported = errno == libc::EOPNOTSUPP;
        Submit::Done(if unsupported { Status::Unsupported } else { Status::IoError })
    }

    /// Returns the errno with which an I/O is refused.
    fn problem(&self, io: &Io) -> Option<i32> {
        let features = self.disk.features();
        let supported = match io.op {
            Op::Read | Op::Write => true,
            Op::Flush => features.flush,
            Op::Unmap => features.unmap,
            Op::WriteZeroes => features.write_zeroes,
        };
        if !supported {
            return Some(libc::EOPNOTSUPP);
        }
        if features.read_only && !matches!(io.op, Op::Read | Op::Flush) {
            return Some(libc::EROFS);
        }
        let layout = &self.array.layout;
        let stripes = layout.level == Level::Raid5f && !matches!(io.op, Op::Read | Op::Flush);
        let unit = if stripes { layout.stripe() } else { u64::from(layout.block_size) };
        let whole = io.offset.is_multiple_of(unit) && io.len.is_multiple_of(unit);
        let valid = usize::from(io.tag.0) < self.failures.len();
        (!whole || !valid || !within(io, layout.size)).then_some(libc::EINVAL)
    }

    /// Ends all I/O, also that for which the lane was not there: none of it may begin any more.
    fn end_all(lane: &mut Lane, queue: &mut VecDeque<Io>) {
        while let Some(io) = queue.pop_front() {
            lane.report_later(io.tag, Status::IoError);
        }
        lane.abandon();
    }

    /// Does what was asked for while the lane was not there.
    fn catch_up(lane: &mut Lane, queue: &mut VecDeque<Io>, limiting: &mut Option<Limiting>) {
        if let Some(limiting) = limiting.take() {
            lane.set_limiting(limiting);
        }
        while let Some(io) = queue.pop_front() {
            if let Some(status) = lane.start(io) {
                lane.report_later(io.tag, status);
            }
        }
    }
}

impl Channel for RaidChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if let Some(errno) = self.problem(&io) {
            return self.refuse(&io, errno);
        }
        if io.len == 0 && io.op != Op::Flush {
            return Submit::Done(Status::Ok);
        }
        let in_time = self.queue.is_empty() && !self.abandon;
        let Some(mut lane) = self.cell.lane.try_take().filter(|_| in_time) else {
            self.queue.push_back(io);
            return Submit::Queued;
        };
        let Some(status) = lane.start(io) else { return Submit::Queued };
        if status != Status::Ok
            && let Some(slot) = self.failures.get_mut(usize::from(io.tag.0))
        {
            *slot = lane.failure(io.tag);
        }
        Submit::Done(status)
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        let fd: BorrowedFd<'_> = self.cell.wakes.fd();
        WakeFds::from_iter([fd])
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.cell.lane.take().set_wakes(wakes);
    }

    fn wait(&self) -> Wait {
        if self.missed || self.abandon || !self.queue.is_empty() {
            return Wait::Poll;
        }
        self.cell.lane.try_take().map_or(Wait::Poll, |lane| lane.wait())
    }

    fn set_limiting(&mut self, limiting: Limiting) {
        match self.cell.lane.try_take() {
            Some(mut lane) => lane.set_limiting(limiting),
            None => self.limiting = Some(limiting),
        }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.get_mut(usize::from(tag.0))?.take()
    }

    fn kick(&mut self) {
        // If the lane is not there, `poll` does it. A kick may begin copies.
        if let Some(mut lane) = self.cell.lane.try_take().filter(|_| !self.abandon) {
            lane.kick();
        }
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let Some(mut lane) = self.cell.lane.try_take() else {
            self.missed = true;
            return 0;
        };
        self.missed = false;
        if std::mem::take(&mut self.abandon) {
            Self::end_all(&mut lane, &mut self.queue);
        }
        Self::catch_up(&mut lane, &mut self.queue, &mut self.limiting);
        let n = lane.poll(done);
        for Completion { tag, status } in &done[..n] {
            if *status != Status::Ok
                && let Some(slot) = self.failures.get_mut(usize::from(tag.0))
            {
                *slot = lane.failure(*tag);
            }
        }
        n
    }

    fn abandon(&mut self) {
        match self.cell.lane.try_take() {
            Some(mut lane) => Self::end_all(&mut lane, &mut self.queue),
            // The lane's user begins no copy, so nothing is copied before the next poll.
            None => self.abandon = true,
        }
    }
}
