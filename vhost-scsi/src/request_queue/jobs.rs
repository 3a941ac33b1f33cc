//! Commands that take several I/Os.

use bdev::{Io, Op, Status, Tag};
use scsi::{Failure, Outcome, Plan};
use vhost_target::device_queue::{Progress, Request};

use super::io::Submitted;
use super::slow::Admission;
use super::task::{Stage, Task};
use super::{RequestQueue, answer, disk_at};
use crate::disk::Disk;
use crate::job::{Exclusive, Work};
use crate::wire::Response;

/// Limit on the I/Os of a job that complete at once in one visit, so that other requests and queues
/// do not wait for the whole job.
const STEPS: usize = 8;

impl RequestQueue {
    /// Starts a plan that takes several I/Os.
    pub(super) fn start_job<R: Request<Self>>(
        &mut self,
        mut request: R,
        plan: Plan,
        changes_blocks: bool,
    ) -> Progress {
        let (task, chain) = request.parts();
        let Self { disks, reply, .. } = self;
        let Some(Disk { jobs, facts, target, .. }) = disk_at(disks, task.target) else {
            return answer::respond(self, request, Response::Failure);
        };
        let Some(n) = jobs.take() else {
            // Checked before the command was started.
            return answer::respond(self, request, Response::Busy);
        };
        let job = jobs.get(n);
        let about = (&*facts, target.bdev().features());
        let plan = job.begin(plan, reply.ranges(), about, (&task.parts, chain));
        if changes_blocks {
            job.exclusive = Exclusive::Excluded;
        }
        (task.stage, task.plan) = (Stage::Job(n), Some(plan));
        self.run_job(request, n)
    }

    /// Frees a job. If it is exclusive, other commands may change its blocks again.
    pub(super) fn release_job(&mut self, n: u8, task: &Task) {
        let Some(disk) = self.disk_of(task) else { return };
        let exclusive = std::mem::take(&mut disk.jobs.get(n).exclusive);
        disk.jobs.give_back(n);
        if matches!(exclusive, Exclusive::Draining(_) | Exclusive::Held) {
            disk.target.unit.end_exclusive();
        }
    }

    /// Does the next I/Os of a job.
    pub(super) fn run_job<R: Request<Self>>(&mut self, mut request: R, n: u8) -> Progress {
        for _ in 0..STEPS {
            let (task, _) = request.parts();
            if let Some(result) = task.result.take() {
                return self.finish_job(request, result);
            }
            if let Some(response) = self.watch.ends(task.target, task.header.tag) {
                if task.plan.is_some_and(is_copy) {
                    return self.finish_job(request, Err(Failure::Aborted));
                }
                return answer::respond(self, request, response);
            }
            match self.admit_job(n, task) {
                Admission::Admitted => {}
                Admission::Waits => return self.try_again(request),
                Admission::Refused => {
                    return self.finish_job(request, Err(Failure::Reservation));
                }
            }
            let next = self.disk_of(task).and_then(|disk| disk.jobs.get(n).next());
            let Some(work) = next else {
                return self.finish_job(request, Ok(()));
            };
            let Some(io) = self.io_of(&mut request, n, work) else {
                return self.finish_job(request, Err(Failure::Device));
            };
            match self.submit(&mut request, io) {
                Submitted::Ended(status) => {
                    let result = self.job_io_ended(&mut request, n, status);
                    if result.is_err() {
                        return self.finish_job(request, result);
                    }
                }
                Submitted::Pending => return request.keep(),
            }
        }
        self.try_again(request)
    }

    /// Returns the I/O of a job.
    fn io_of<R: Request<Self>>(&mut self, request: &mut R, n: u8, work: Work) -> Option<Io> {
        let tag = Tag(request.slot());
        let (task, chain) = request.parts();
        let jobs = &mut self.disk_of(task)?.jobs;
        match work {
            Work::Buffer { op, offset, len } => {
                Some(Io::rw(op, tag, offset, len, jobs.get(n).buffer_segment(len)))
            }
            Work::DataOut { from, offset, len } => {
                let segments = task.parts.data_out(chain);
                let whole = Io::rw(Op::Write, tag, 0, task.buffers.data_out, segments);
                // SAFETY: the segments are those of this request's chain, and stay until it ends.
                // Each job has a slot of its own.
                unsafe { jobs.cuts.part(n.into(), &whole, from, len, tag, offset) }
            }
            Work::Plain { op, offset, len, may_unmap } => {
                Some(Io::plain(op, tag, offset, len).unmapping(may_unmap))
            }
        }
    }

    /// Takes note that an I/O of a job has ended.
    pub(super) fn job_io_ended<R: Request<Self>>(
        &mut self,
        request: &mut R,
        n: u8,
        status: Status,
    ) -> Result<(), Failure> {
        if let Some(failure) = self.count(request, status) {
            return Err(failure);
        }
        let (task, chain) = request.parts();
        let Some(disk) = self.disk_of(task) else { return Err(Failure::Device) };
        disk.jobs.get(n).io_succeeded(&task.parts, chain)
    }

    pub(super) fn finish_job<R: Request<Self>>(
        &mut self,
        mut request: R,
        result: Result<(), Failure>,
    ) -> Progress {
        let (task, _) = request.parts();
        let Some(plan) = task.plan else { return answer::drained(self, request) };
        let nexus = self.session.as_ref().map(|session| session.nexus(task.target));
        let Some(disk) = self.disk_of(task) else {
            return answer::respond(self, request, Response::Failure);
        };
        if is_copy(plan)
            && let Some(nexus) = nexus
        {
            let Some(mut state) = disk.target.unit.try_lock() else {
                task.result = Some(result);
                return self.try_again(request);
            };
            state.logical_unit.copied(nexus, &plan, result);
        }
        let outcome = Outcome::of(&plan, &disk.facts, result);
        answer::finish(self, request, outcome)
    }
}

/// Returns whether the logical unit has to be told of a plan's end.
fn is_copy(plan: Plan) -> bool {
    matches!(plan.op, scsi::Op::Copy { .. })
}
