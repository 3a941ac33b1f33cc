//! Commands that need the logical unit.

use std::sync::Arc;

use bdev::Period;
use scsi::{Command, Failure, Op, Plan, Step};
use vhost_target::device_queue::{Progress, Request};

use super::task::Stage;
use super::{RequestQueue, answer, disk_at};
use crate::job::Exclusive;
use crate::unit::Locked;
use crate::wire::Response;

/// Answers a command to a LUN that a target does not have.
#[cold]
pub(super) fn answer_absent<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
) -> Progress {
    let (task, _) = request.parts();
    scsi::absent(&task.header.cdb, task.buffers, &mut queue.reply);
    answer::reply(queue, request, false)
}

/// Returns whether a command may need a job.
fn may_need_job(cdb: &[u8]) -> bool {
    matches!(
        scsi::decode(cdb),
        Ok(Command::WriteAndVerify { .. }
            | Command::Verify { .. }
            | Command::WriteSame { .. }
            | Command::CompareAndWrite { .. }
            | Command::OrWrite { .. }
            | Command::ExtendedCopy { .. }
            | Command::Unmap { .. }
            | Command::PersistentReserveOut { .. })
    )
}

/// Returns whether a plan changes blocks, and is not exclusive.
fn writes(plan: &Plan) -> bool {
    match plan.op {
        Op::Write
        | Op::WriteAndVerify { .. }
        | Op::WriteSame { .. }
        | Op::WriteZeroes { .. }
        | Op::Copy { .. }
        | Op::Unmap => true,
        Op::Read
        | Op::Verify
        | Op::VerifyData
        | Op::VerifyPattern
        | Op::CompareAndWrite
        | Op::OrWrite
        | Op::Flush => false,
    }
}

impl RequestQueue {
    /// Starts a command with the logical unit.
    #[cold]
    #[inline(never)]
    pub(super) fn start_slowly<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let slot = request.slot();
        let (task, chain) = request.parts();
        task.stage = Stage::Start;
        // An exclusive command must not wait for this one, which may itself wait.
        let begun = task.begun.take();
        let needs_job = may_need_job(&task.header.cdb);
        let Self { disks, session, reply, parameters, .. } = self;
        let (Some(disk), Some(session)) = (disk_at(disks, task.target), session) else {
            return answer::respond(self, request, Response::BadTarget);
        };
        if let Some(begun) = begun {
            disk.end_write(begun);
        }
        if needs_job && !disk.jobs.any_free() {
            return self.try_again(request);
        }
        let target = Arc::clone(&disk.target);
        let Some(mut state) = target.unit.try_lock() else { return self.try_again(request) };
        let (nexus, port) = (session.nexus(target.number), target.port);
        let (cdb, buffers) = (&task.header.cdb, task.buffers);
        let unit = &mut state.logical_unit;
        let mut step = unit.start(nexus, port, cdb, buffers, reply);
        if let Step::Parameters { bytes } = step {
            // At most as many as the buffer has.
            let list = &mut parameters[..bytes as usize];
            task.parts.get_data_out(chain, 0, list);
            step = unit.with_parameters(nexus, port, cdb, list, buffers, reply);
        }
        disk.renew(&state, nexus);
        match step {
            Step::Done if !reply.aborted().is_empty() => {
                drop(state);
                self.start_drain(request)
            }
            Step::Done => {
                drop(state);
                answer::reply(self, request, true)
            }
            Step::Io(plan) => self.start_plan(request, slot, plan, state),
            Step::LbaStatus(query) => {
                drop(state);
                // Without extents, all blocks are mapped: to find out may block.
                scsi::report::lba_status(&query, [], buffers, reply);
                answer::reply(self, request, true)
            }
            // Cannot happen: it has got its parameters.
            Step::Parameters { .. } => {
                drop(state);
                answer::respond(self, request, Response::Failure)
            }
        }
    }

    /// Starts a plan.
    fn start_plan<R: Request<Self>>(
        &mut self,
        mut request: R,
        slot: u16,
        plan: Plan,
        state: Locked<'_>,
    ) -> Progress {
        let changes_blocks = writes(&plan);
        let (task, _) = request.parts();
        task.plan = Some(plan);
        if matches!(plan.op, Op::Read | Op::Write | Op::Flush) {
            if changes_blocks {
                task.begun = self.disk_of(task).map(|disk| disk.begin_write());
            }
            if changes_blocks && state.excludes(plan.range) {
                drop(state);
                return self.wait_for_exclusive(request);
            }
            drop(state);
            return self.start_transfer(request, slot, plan);
        }
        drop(state);
        self.start_job(request, plan, changes_blocks)
    }

    /// Lets a command wait for an exclusive command on its blocks.
    fn wait_for_exclusive<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let (task, _) = request.parts();
        task.stage = Stage::Excluded;
        let begun = task.begun.take();
        if let (Some(disk), Some(begun)) = (self.disk_of(task), begun) {
            disk.end_write(begun);
        }
        self.try_again(request)
    }

    /// Continues a command that has waited for an exclusive command.
    pub(super) fn retry_excluded<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let slot = request.slot();
        let (task, _) = request.parts();
        let target = self.disk_of(task).map(|disk| Arc::clone(&disk.target));
        let (Some(target), Some(plan)) = (target, task.plan) else {
            return answer::respond(self, request, Response::Failure);
        };
        let Some(state) = target.unit.try_lock() else { return self.try_again(request) };
        // As in `admit_job`.
        let nexus = self.session.as_ref().map(|session| session.nexus(target.number));
        let header = request.parts().0.header;
        if nexus.is_some_and(|nexus| state.logical_unit.still_allows(nexus, &header.cdb)) {
            return self.start_plan(request, slot, plan, state);
        }
        drop(state);
        self.finish_plan(request, Err(Failure::Reservation))
    }

    /// Waits until all commands that change blocks and have begun have ended, and then answers with
    /// GOOD. For PREEMPT AND ABORT: commands of the preempted nexuses may not change blocks after
    /// its answer. Commands that begin later are checked against the new reservation.
    fn start_drain<R: Request<Self>>(&mut self, mut request: R) -> Progress {
        let (task, _) = request.parts();
        let jobs = self.disk_of(task).map(|disk| &mut disk.jobs);
        let Some((jobs, n)) = jobs.and_then(|jobs| jobs.take().map(|n| (jobs, n))) else {
            return answer::respond(self, request, Response::Busy);
        };
        jobs.get(n).begin_drain();
        (task.stage, task.plan) = (Stage::Job(n), None);
        // Other commands use the reply meanwhile.
        task.residual = self.reply.transferred().residual;
        self.run_job(request, n)
    }

    /// Makes the blocks of a job exclusive, or waits for those that are.
    ///
    /// A reservation may have been made since the command was started: it is looked at again under
    /// the lock that admits the command, so that no preempted command begins to change blocks.
    pub(super) fn admit_job(&mut self, n: u8, task: &mut super::Task) -> Admission {
        let nexus = self.session.as_ref().map(|session| session.nexus(task.target));
        let Some(disk) = self.disk_of(task) else { return Admission::Refused };
        let target = Arc::clone(&disk.target);
        let unit = &target.unit;
        // A command without a plan only waits.
        let allows = |state: &Locked<'_>| {
            let allows = |nexus| state.logical_unit.still_allows(nexus, &task.header.cdb);
            task.plan.is_none() || nexus.is_some_and(allows)
        };
        let range = task.plan.map_or(scsi::Range { lba: 0, blocks: 0 }, |plan| plan.range);
        match &mut disk.jobs.get(n).exclusive {
            Exclusive::No | Exclusive::Held => Admission::Admitted,
            Exclusive::Excluded => {
                let begun = disk.begin_write();
                let admission = match unit.try_lock() {
                    None => Admission::Waits,
                    Some(state) if !allows(&state) => Admission::Refused,
                    Some(state) => match disk.jobs.get(n).changes(range, |r| state.excludes(r)) {
                        true => Admission::Waits,
                        false => Admission::Admitted,
                    },
                };
                if admission == Admission::Admitted {
                    task.begun = Some(begun);
                    disk.jobs.get(n).exclusive = Exclusive::No;
                } else {
                    disk.end_write(begun);
                }
                admission
            }
            exclusive @ Exclusive::Wanted => {
                let Some(mut state) = unit.try_lock() else { return Admission::Waits };
                if !allows(&state) {
                    return Admission::Refused;
                }
                if state.begin_exclusive(range) {
                    *exclusive = Exclusive::Draining(Period::default());
                }
                Admission::Waits
            }
            exclusive @ Exclusive::Draining(_) => {
                let Exclusive::Draining(period) = exclusive else { return Admission::Waits };
                if !unit.has_drained(period) {
                    return Admission::Waits;
                }
                *exclusive = Exclusive::Held;
                Admission::Admitted
            }
        }
    }
}

/// Whether a job may do its next I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Admitted,
    /// It tries again.
    Waits,
    /// A reservation forbids it.
    Refused,
}
