//! I/O: submits it, and continues requests when it has ended.

use arrayvec::ArrayVec;
use bdev::{Channel, Io, Op, Status, Submit, Tag};
use scsi::{Failure, Flush, Outcome, Plan};
use vhost_target::device_queue::{Progress, Request};

use super::task::Stage;
use super::{Cue, PROGRESS, RequestQueue, answer, disk_at};
use crate::disk::Disk;
use crate::session::Barrier;
use crate::wire::Response;

/// What has become of an I/O.
pub(super) enum Submitted {
    /// It has ended.
    Ended(Status),
    /// It is in the channel, or waits for room or a rate limit.
    Pending,
}

impl RequestQueue {
    /// Starts a plan that is one I/O, with a flush before or after it.
    #[inline]
    pub(super) fn start_transfer<R: Request<Self>>(
        &mut self,
        mut request: R,
        slot: u16,
        plan: Plan,
    ) -> Progress {
        let (task, chain) = request.parts();
        task.plan = Some(plan);
        let bytes = plan.transfer_bytes();
        let tag = Tag(slot);
        let (stage, io) = match (plan.op, plan.flush) {
            (scsi::Op::Flush, _) => (Stage::Last, Io::plain(Op::Flush, tag, 0, 0)),
            _ if bytes == 0 => return self.finish_plan(request, Ok(())),
            (scsi::Op::Read, flush) => {
                if bytes != task.buffers.data_in {
                    task.parts.trim_data_in(chain, bytes);
                }
                if flush == Flush::No {
                    return self.read(request, slot, plan);
                }
                (Stage::FlushThenRead, Io::plain(Op::Flush, tag, 0, 0))
            }
            (_, flush) => {
                let segments = if bytes == task.buffers.data_out {
                    task.parts.data_out(chain)
                } else {
                    task.parts.trimmed_data_out(chain, bytes)
                };
                let stage = if flush == Flush::After { Stage::WriteThenFlush } else { Stage::Last };
                let offset = self.offset(task.target, plan);
                (stage, Io::rw(Op::Write, tag, offset, bytes, segments))
            }
        };
        task.stage = stage;
        request.spend(bytes);
        self.submit_io(request, io)
    }

    /// Returns the first byte of a plan's range.
    #[inline]
    fn offset(&self, target: u8, plan: Plan) -> u64 {
        let disks = self.disks.as_ref();
        let disk = disks.and_then(|disks| disks.get(usize::from(target))?.as_ref());
        disk.map_or(u64::MAX, |disk| disk.facts.bytes(plan.range.lba))
    }

    /// Reads a plan's range into data-in.
    #[inline]
    fn read<R: Request<Self>>(&mut self, mut request: R, slot: u16, plan: Plan) -> Progress {
        let (task, chain) = request.parts();
        task.stage = Stage::Last;
        let segments = task.parts.data_in(chain);
        let offset = self.offset(task.target, plan);
        let io = Io::rw(Op::Read, Tag(slot), offset, plan.transfer_bytes(), segments);
        request.spend(io.len);
        self.submit_io(request, io)
    }

    /// Submits an I/O, and continues the request if it has ended.
    #[inline]
    fn submit_io<R: Request<Self>>(&mut self, mut request: R, io: Io) -> Progress {
        match self.submit(&mut request, io) {
            Submitted::Ended(status) => self.io_ended(request, status),
            Submitted::Pending => request.keep(),
        }
    }

    /// Submits an I/O of a request.
    #[inline]
    pub(super) fn submit<R: Request<Self>>(&mut self, request: &mut R, io: Io) -> Submitted {
        let now = request.iteration().now_ticks();
        let (task, _) = request.parts();
        (task.op, task.len, task.started_ticks) = (io.op, io.len, now);
        let target = task.target;
        let Some(disk) = self.disk_of(task) else { return Submitted::Ended(Status::IoError) };
        // SAFETY: the channel is open, and segments and memory do not change meanwhile.
        if unsafe { disk.opened.shortcut.run(&io) } {
            return Submitted::Ended(Status::Ok);
        }
        if !disk.full.is_empty() {
            return self.park(target, io);
        }
        // SAFETY: segments and memory stay until the completion: the engine reuses neither the slot
        // nor the view that it pins before the request has ended, and a job keeps its buffer.
        match unsafe { disk.opened.channel.submit(io) } {
            Submit::Done(status) => {
                request.iteration().read_clock();
                Submitted::Ended(status)
            }
            Submit::Queued => {
                disk.queued += 1;
                self.busy |= 1 << target;
                self.unkicked |= 1 << target;
                Submitted::Pending
            }
            Submit::Full(io) => self.park(target, io),
            Submit::Throttled(io) => {
                disk.throttled.push(&io, Some(&disk.opened));
                self.busy |= 1 << target;
                self.parked[usize::from(io.tag.0)] = Some(io);
                Submitted::Pending
            }
        }
    }

    /// Keeps an I/O for which the channel has no room, behind earlier ones. Other targets go on.
    #[cold]
    fn park(&mut self, target: u8, io: Io) -> Submitted {
        let Some(disk) = disk_at(&mut self.disks, target) else {
            return Submitted::Ended(Status::IoError);
        };
        disk.full.push_back(io.tag.0);
        self.busy |= 1 << target;
        self.parked[usize::from(io.tag.0)] = Some(io);
        Submitted::Pending
    }

    /// Lets the requests of a barrier whose I/O has not been submitted try again, which ends them.
    #[cold]
    pub(super) fn end_parked(&mut self, barrier: &Barrier) {
        let Self { disks, parked, progress, watch, .. } = self;
        let disk = disk_at(disks, barrier.target);
        let Some(disk) = disk.filter(|disk| disk.full.len() + disk.throttled.len() > 0) else {
            return;
        };
        for (slot, place) in (0..).zip(parked.iter_mut()) {
            if place.is_some() && watch.is_about(barrier, slot) && !progress.is_full() {
                *place = None;
                disk.full.retain(|other| *other != slot);
                disk.throttled.remove(slot);
                progress.push((slot, Cue::Retry));
            }
        }
    }

    /// Continues a request whose I/O has ended.
    #[inline]
    pub(super) fn io_ended<R: Request<Self>>(
        &mut self,
        mut request: R,
        status: Status,
    ) -> Progress {
        let stage = request.parts().0.stage;
        if let Stage::Job(n) = stage {
            let result = self.job_io_ended(&mut request, n, status);
            return match result {
                Ok(()) => self.run_job(request, n),
                Err(_) => self.finish_job(request, result),
            };
        }
        if let Some(failure) = self.count(&mut request, status) {
            return self.finish_plan(request, Err(failure));
        }
        let slot = request.slot();
        let (task, _) = request.parts();
        match (stage, task.plan) {
            (Stage::FlushThenRead, Some(plan)) => self.read(request, slot, plan),
            (Stage::WriteThenFlush, _) => {
                task.stage = Stage::Last;
                self.submit_io(request, Io::plain(Op::Flush, Tag(slot), 0, 0))
            }
            _ => self.finish_plan(request, Ok(())),
        }
    }

    /// Tries again what a request could not do before.
    #[cold]
    pub(super) fn retry_task<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let (task, _) = request.parts();
        let (stage, target, tag) = (task.stage, task.target, task.header.tag);
        let ends = self.watch.ends(target, tag);
        match (stage, ends) {
            // It ends itself.
            (Stage::Job(n), _) => self.run_job(request, n),
            (_, Some(response)) => answer::respond(self, request, response),
            (Stage::Start, None) => self.start_command(request, false),
            (Stage::Excluded, None) => self.retry_excluded(request),
            // Their I/O is submitted by `release_parked`.
            (Stage::Last | Stage::FlushThenRead | Stage::WriteThenFlush, None) => {
                answer::respond(self, request, Response::Failure)
            }
        }
    }

    #[inline]
    pub(super) fn finish_plan<R: Request<Self>>(
        &mut self,
        mut request: R,
        result: Result<(), Failure>,
    ) -> Progress {
        let (task, _) = request.parts();
        let outcome = match (task.plan, self.disk_of(task)) {
            (Some(plan), Some(disk)) => Outcome::of(&plan, &disk.facts, result),
            // A command that does I/O has both.
            _ => return answer::respond(self, request, Response::Failure),
        };
        answer::finish(self, request, outcome)
    }

    /// Counts an I/O that has ended, at the time of the poll iteration's clock. Returns its failure.
    #[inline]
    pub(super) fn count<R: Request<Self>>(
        &mut self,
        request: &mut R,
        status: Status,
    ) -> Option<Failure> {
        let now = request.iteration().now_ticks();
        let tag = request.slot();
        let (task, _) = request.parts();
        let (op, len) = (task.op, task.len);
        let ticks = now.saturating_sub(task.started_ticks);
        let Some(disk) = self.disk_of(task) else { return Some(Failure::Device) };
        if status == Status::Ok {
            disk.opened.counters.record(op, len, ticks);
            return None;
        }
        Some(failure(disk, (tag, op, len), ticks, status))
    }
}

/// Records the failure of an I/O, and returns what the guest is told.
#[cold]
fn failure(disk: &mut Disk, io: (u16, Op, u64), ticks: u64, status: Status) -> Failure {
    let failure = disk.opened.count_failure(io, ticks, status);
    let block_bytes = u64::from(disk.facts.block_bytes);
    match failure.errno {
        _ if status == Status::Unsupported => Failure::Unsupported,
        libc::ENOSPC | libc::EDQUOT => Failure::NoSpace,
        libc::EROFS => Failure::ReadOnly,
        libc::ENOMEM | libc::EAGAIN => Failure::Busy,
        libc::ECANCELED => Failure::Aborted,
        libc::EBADE => Failure::Reservation,
        _ => match (failure.op, failure.offset) {
            (Op::Read | Op::Write, Some(offset)) => Failure::Medium(Some(offset / block_bytes)),
            _ => Failure::Device,
        },
    }
}

/// Submits throttled I/Os that the limits now admit, and I/Os for which the channel has room again.
/// Those that end at once, or whose queue was abandoned, are added to `progress`.
#[cold]
pub(super) fn release_parked(
    disk: &mut Disk,
    parked: &mut [Option<Io>],
    progress: &mut ArrayVec<(u16, Cue), PROGRESS>,
    abandoned: bool,
) {
    let Disk { throttled, full, opened, queued, .. } = disk;
    throttled.release(|slot| {
        if progress.len() >= PROGRESS / 2 {
            return false;
        }
        let place = &mut parked[usize::from(slot)];
        let Some(io) = place.take().filter(|_| !abandoned) else {
            progress.push((slot, Cue::Ended(Status::IoError)));
            return true;
        };
        // SAFETY: as in `submit`. The engine has pinned the view when the request was kept.
        match unsafe { opened.channel.submit(io) } {
            Submit::Done(status) => progress.push((slot, Cue::Ended(status))),
            Submit::Queued => *queued += 1,
            Submit::Full(io) | Submit::Throttled(io) => {
                *place = Some(io);
                return false;
            }
        }
        true
    });
    while let Some(&slot) = full.front()
        && progress.len() < PROGRESS / 2
    {
        let place = &mut parked[usize::from(slot)];
        match place.take().filter(|_| !abandoned) {
            None => progress.push((slot, Cue::Ended(Status::IoError))),
            // SAFETY: as above.
            Some(io) => match unsafe { opened.channel.submit(io) } {
                Submit::Done(status) => progress.push((slot, Cue::Ended(status))),
                Submit::Queued => *queued += 1,
                Submit::Full(io) => {
                    *place = Some(io);
                    break;
                }
                Submit::Throttled(io) => {
                    throttled.push(&io, Some(opened));
                    *place = Some(io);
                }
            },
        }
        full.pop_front();
    }
    opened.channel.kick();
}
