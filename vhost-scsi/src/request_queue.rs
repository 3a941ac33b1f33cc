//! A request queue, on a reactor: starts commands, and answers them.
//!
//! READ and WRITE need neither the logical unit nor its lock, but a copy of its facts and a [gate].
//! All other commands, and those that the gate stops, lock the unit (`slow`); if another thread has
//! locked it, the queue tries again at its next visit. A plan that is not one I/O is done by a
//! [`Job`] (`jobs`). Most READs and WRITEs of a memory disk take the shortcut (`shortcut`).
//! `barrier` is the queue's part of task management.
//!
//! [gate]: scsi::Gate
#![expect(unsafe_code, reason = "submits guest memory")]

mod answer;
mod barrier;
mod io;
mod jobs;
mod shortcut;
mod slow;
mod task;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use bdev::{Channel, Completion, Io, Status, Tag};
use reactor::{Cause, Iteration, Wait};
use scsi::sense::{Code, Key};
use scsi::{Fast, Format, PARAMETERS_MAX, Reply, Sense};
use vhost_target::device_queue::{Answer, DeviceQueue, Notice, Progress, Request, WakeFds};
use virtqueue::chain::Chain;

use self::barrier::BarrierState;
use self::task::Task;
use crate::disk::Disk;
use crate::parts::{Malformed, Parts};
use crate::session::{QueueLink, Session};
use crate::target::TARGETS_MAX;
use crate::view::{ScsiView, Shown};
use crate::wire::{Address, Response};

/// Requests that one poll reports at most.
const PROGRESS: usize = 32;
/// Requests of these that wait for something other than their I/O.
const RETRIES: usize = 8;
/// The operation code of COMPARE AND WRITE.
const COMPARE_AND_WRITE: u8 = 0x89;
/// How long a sleeping reactor waits before it tries again what nothing signals.
const TRY_AGAIN: Duration = Duration::from_millis(1);

/// Why a request makes progress.
#[derive(Clone, Copy, Debug)]
enum Cue {
    /// Its I/O has ended.
    Ended(Status),
    /// It tries again what it could not do before.
    Retry,
}

/// How a request comes to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It was taken from the ring in this visit.
    Ring,
    /// The same, and an earlier process may have started it.
    Resubmitted,
    /// It has waited until the queue adopted the view with its target.
    Waited,
}

/// The targets that a queue has opened, in a box, so that they can be released without an
/// allocation.
type Disks = Box<[Option<Box<Disk>>; TARGETS_MAX]>;

/// Returns the disk of a target, if the queue has opened it.
#[inline]
fn disk_at(disks: &mut Option<Disks>, target: u8) -> Option<&mut Disk> {
    disks.as_mut()?.get_mut(usize::from(target))?.as_deref_mut()
}

/// The device of a request queue.
pub struct RequestQueue {
    link: Arc<QueueLink>,
    session: Option<Arc<Session>>,
    /// `None` if it was released.
    disks: Option<Disks>,
    /// Disks with I/O in their channel, or waiting for room or for a rate limit: a bit for each.
    busy: u8,
    /// The disk whose channel is polled first.
    first: u8,
    /// The I/O of each request that waits for room or for a rate limit.
    parked: Box<[Option<Io>]>,
    /// Requests that try again at the next visit, oldest first.
    waiting: VecDeque<u16>,
    reply: Box<Reply>,
    parameters: Box<[u8; PARAMETERS_MAX]>,
    watch: BarrierState,
    /// The targets that the adopted view has, a bit for each.
    shown: u8,
    stopping: bool,
    /// Disks whose channel has I/O that was queued since its last kick: a bit for each.
    unkicked: u8,
    /// Whether the shortcut of any disk copies data, so that prefetching helps.
    copies: bool,
    /// Disks whose shortcut has served commands in this visit: a bit for each.
    tallied: u8,
    abandoned: bool,
    progress: ArrayVec<(u16, Cue), PROGRESS>,
}

impl std::fmt::Debug for RequestQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestQueue")
    }
}

impl Drop for RequestQueue {
    fn drop(&mut self) {
        self.link.gone.store(true, Ordering::Release);
    }
}

impl RequestQueue {
    pub(crate) fn new(link: Arc<QueueLink>) -> Self {
        let depth = usize::from(link.depth);
        Self {
            session: None,
            disks: Some(Box::default()),
            busy: 0,
            first: 0,
            parked: (0..depth).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(depth),
            reply: Box::default(),
            parameters: Box::new([0; PARAMETERS_MAX]),
            watch: BarrierState::new(link.depth),
            shown: 0,
            stopping: false,
            abandoned: false,
            unkicked: 0,
            copies: false,
            tallied: 0,
            progress: ArrayVec::new(),
            link,
        }
    }

    /// Returns a target that is shown and open.
    #[inline]
    fn disk(&mut self, target: u8) -> Option<&mut Disk> {
        disk_at(&mut self.disks, target).filter(|disk| !disk.leaves)
    }

    /// Returns the disk of a command that has been started.
    #[inline]
    fn disk_of(&mut self, task: &Task) -> Option<&mut Disk> {
        disk_at(&mut self.disks, task.target)
    }

    /// Starts a command for a target. `new`: it was taken from the ring in this visit.
    #[inline]
    fn start_command<R: Request<Self>>(&mut self, mut request: R, new: bool) -> Progress {
        let slot = request.slot();
        let (task, chain) = request.parts();
        let command = scsi::decode(&task.header.cdb);
        let Some(disk) = self.disk_of(task) else {
            return answer::respond(self, request, Response::BadTarget);
        };
        // Counted first: a command that becomes exclusive waits for it, or is seen here.
        let begun = match &command {
            Ok(scsi::Command::Write { .. }) => Some(disk.begin_write()),
            _ => None,
        };
        task.begun = begun;
        let (Ok(command), true) = (command, disk.is_current()) else {
            return self.start_slowly(request);
        };
        if begun.is_some() && disk.writes_are_slow {
            return self.start_slowly(request);
        }
        match scsi::fast(&command, &disk.facts, disk.gate, task.buffers) {
            Fast::Io(plan) => {
                if new && disk.run_shortcut(&plan, slot, task, chain) {
                    return self.end_shortcut(request, &plan);
                }
                self.start_transfer(request, slot, plan)
            }
            Fast::Slow => self.start_slowly(request),
            Fast::Failed(sense) => {
                let format = disk.gate.format();
                answer::fail(self, request, sense, format)
            }
        }
    }

    /// Starts a request with a header and a response.
    #[inline]
    fn start_addressed<R: Request<Self>>(&mut self, mut request: R, origin: Origin) -> Progress {
        let (task, _) = request.parts();
        let address = Address::of(task.header.lun);
        let Some(address) = address else {
            return answer::respond_unstarted(request, Response::BadTarget);
        };
        let tag = task.header.tag;
        task.target = address.target;
        let Some(disk) = self.disk(address.target) else {
            if self.is_coming(address.target) && origin != Origin::Resubmitted {
                return request.wait_for_room();
            }
            return answer::respond_unstarted(request, Response::BadTarget);
        };
        if address.lun != 0 {
            return slow::answer_absent(self, request);
        }
        disk.commands += 1;
        self.watch.started(request.slot(), address.target, tag);
        if let Some(response) = self.watch.ends(address.target, tag) {
            return answer::respond(self, request, response);
        }
        let is_resubmitted = origin == Origin::Resubmitted;
        if is_resubmitted && request.parts().0.header.cdb[0] == COMPARE_AND_WRITE {
            // It may have been done. A second time, it would miscompare.
            let aborted = Sense::new(Key::AbortedCommand, Code::NONE);
            return answer::fail(self, request, aborted, Format::Fixed);
        }
        self.start_command(request, origin != Origin::Waited)
    }

    /// Returns whether the latest view shows a target that the adopted view does not. The driver may
    /// have got its event already: Linux scans the target once, and not again after BAD_TARGET.
    #[cold]
    fn is_coming(&self, target: u8) -> bool {
        let session = self.session.as_ref().filter(|_| !self.stopping);
        let bit = 1_u8.checked_shl(target.into()).unwrap_or(0);
        session.is_some_and(|session| session.shown() & !self.shown & bit != 0)
    }

    /// Lets a request try again at the next visit.
    #[cold]
    fn try_again<R: Request<Self>>(&mut self, request: R) -> Progress {
        self.waiting.push_back(request.slot());
        request.keep()
    }

    /// Takes the targets that have been opened, and marks those that are not shown any more.
    fn take_arrivals(&mut self, view: Option<&ScsiView>) {
        let Some(disks) = &mut self.disks else { return };
        for (n, (place, arrival)) in disks.iter_mut().zip(&self.link.arrivals).enumerate() {
            let shown = view.and_then(|view| view.targets()[n].as_ref());
            // A target is opened before it is shown.
            if place.is_none() && shown.is_some() {
                *place = arrival.take();
            }
            let Some(disk) = place else { continue };
            let is_target = |shown: &&Shown| shown.target.as_ptr() == Arc::as_ptr(&disk.target);
            match shown.filter(is_target) {
                Some(shown) => {
                    disk.limit(shown.limited);
                    disk.leaves = false;
                }
                None => {
                    disk.stop_limiting();
                    disk.leaves = true;
                }
            }
        }
    }

    fn has_left(&self) -> bool {
        let mut disks = self.disks.iter().flat_map(|disks| disks.iter().flatten());
        disks.any(|disk| disk.leaves && disk.commands == 0)
    }

    fn has_copies(&self) -> bool {
        let mut disks = self.disks.iter().flat_map(|disks| disks.iter().flatten());
        disks.any(|disk| disk.opened.shortcut.copies())
    }

    /// Returns a target that is not shown any more and has no commands.
    fn take_left(&mut self) -> Option<Box<Disk>> {
        let disks = self.disks.as_mut()?;
        disks.iter_mut().find_map(|place| place.take_if(|disk| disk.leaves && disk.commands == 0))
    }

    /// Polls the channels of all busy disks.
    fn poll_disks(&mut self) {
        // The one after the first of the last time is first.
        self.first = (self.first + 1) % 8;
        let (mut left, mut n) = (self.busy, self.first);
        while left != 0 {
            n = (n + 1) % 8;
            if left & (1 << n) == 0 {
                continue;
            }
            left &= !(1 << n);
            self.poll_disk(n);
        }
    }

    fn poll_disk(&mut self, n: u8) {
        let Self { disks, parked, progress, busy, abandoned, .. } = self;
        let Some(disk) = disk_at(disks, n) else { return };
        if !disk.throttled.is_empty() || !disk.full.is_empty() {
            io::release_parked(disk, parked, progress, *abandoned);
        }
        let mut done = [Completion { tag: Tag(0), status: Status::Ok }; PROGRESS];
        let room = progress.remaining_capacity();
        let count = if disk.queued > 0 { disk.opened.channel.poll(&mut done[..room]) } else { 0 };
        for Completion { tag, status } in &done[..count] {
            progress.push((tag.0, Cue::Ended(*status)));
        }
        // A channel reports no more I/Os than it has.
        disk.queued -= u32::try_from(count).unwrap_or(disk.queued);
        if !disk.is_busy() {
            *busy &= !(1 << n);
        }
    }
}

impl DeviceQueue for RequestQueue {
    type Request = Task;
    type View = ScsiView;

    /// Without a view, the controller was deleted. A response that is not written would look like
    /// success.
    fn refuse(chain: &mut Chain) -> Answer {
        match Parts::take(chain) {
            Ok((_, parts, _)) | Err(Malformed::NoHeader(parts)) => answer::refuse(chain, parts),
            Err(Malformed::NoResponse) => Answer { last_byte: None, written: 0, dirty: 0 },
        }
    }

    #[inline]
    fn start<R: Request<Self>>(
        &mut self,
        _: &ScsiView,
        mut request: R,
        resubmitted: bool,
    ) -> Progress {
        let (task, chain) = request.parts();
        match Parts::take(chain) {
            Ok((header, parts, buffers)) => task.begin(header, parts, buffers),
            Err(Malformed::NoHeader(parts)) => {
                task.begin(Default::default(), parts, Default::default());
                return answer::respond_unstarted(request, Response::Failure);
            }
            Err(Malformed::NoResponse) => {
                request.count_error();
                return request.finish(Answer { last_byte: None, written: 0, dirty: 0 });
            }
        }
        let origin = if resubmitted { Origin::Resubmitted } else { Origin::Ring };
        self.start_addressed(request, origin)
    }

    /// Only requests whose target is in a view that the queue has not adopted wait in the engine.
    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress {
        self.start_addressed(request, Origin::Waited)
    }

    fn adopted(&mut self, view: Option<&ScsiView>) {
        self.take_arrivals(view);
        self.shown = view.map_or(0, ScsiView::shown);
        if let Some(view) = view {
            self.session.get_or_insert_with(|| Arc::clone(view.session()));
            self.watch.adopt(view.barrier(), self.link.reached.load(Ordering::Relaxed));
        }
        self.watch.leaves = self.has_left();
        self.copies = self.has_copies();
    }

    fn stopping(&mut self) {
        self.stopping = true;
        let disks = self.disks.iter_mut().flat_map(|disks| disks.iter_mut().flatten());
        disks.for_each(|disk| disk.stop_limiting());
    }

    #[inline]
    fn looks_ahead(&self) -> bool {
        self.copies
    }

    #[inline(always)]
    fn look_ahead(&self, chain: &Chain) {
        let Some(read) = Parts::peek(chain).and_then(|header| header.expected_read()) else {
            return;
        };
        let disks = self.disks.as_ref();
        let disk = disks.and_then(|disks| disks.get(usize::from(read.target))?.as_ref());
        if let Some(Disk { opened, facts, .. }) = disk.map(|disk| &**disk) {
            opened.shortcut.expect_read(facts.bytes(read.lba), facts.bytes(read.blocks.into()));
        }
    }

    #[inline]
    fn is_watching(&self) -> bool {
        self.watch.is_watching()
    }

    fn visited(&mut self, caught_up: bool) -> Option<Notice> {
        if let Some(disk) = self.take_left() {
            return Some(Notice::Leftover(disk));
        }
        self.watch.leaves = self.has_left();
        self.watch.visited(caught_up, &self.link);
        None
    }

    #[inline]
    fn started(&mut self, iteration: &mut Iteration) {
        if self.tallied != 0 {
            self.record_tallies(iteration);
        }
    }

    #[inline]
    fn poll(&mut self, iteration: &mut Iteration) -> usize {
        self.progress.clear();
        // Submits the I/O of requests that were continued after the last kick.
        self.kick();
        for _ in 0..self.waiting.len().min(RETRIES) {
            let Some(slot) = self.waiting.pop_front() else { break };
            self.progress.push((slot, Cue::Retry));
        }
        if let Some(barrier) = self.watch.ending() {
            self.end_parked(&barrier);
        }
        self.poll_disks();
        if !self.progress.is_empty() {
            iteration.note(Cause::Complete);
            iteration.read_clock();
        }
        self.progress.len()
    }

    #[inline]
    fn progressed(&self, n: usize) -> u16 {
        self.progress[n].0
    }

    #[inline]
    fn advance<R: Request<Self>>(&mut self, n: usize, request: R) -> Progress {
        match self.progress[n].1 {
            Cue::Ended(status) => self.io_ended(request, status),
            Cue::Retry => self.retry_task(request),
        }
    }

    #[cold]
    fn discard<R: Request<Self>>(&mut self, n: usize, request: &mut R) {
        let slot = request.slot();
        if let Cue::Ended(Status::Ok) = self.progress[n].1 {
            self.count(request, Status::Ok);
        }
        self.parked[usize::from(slot)] = None;
        answer::release(self, slot, request.parts().0);
    }

    #[inline]
    fn kick(&mut self) {
        let mut left = std::mem::take(&mut self.unkicked);
        let Some(disks) = &mut self.disks else { return };
        while left != 0 {
            let n = left.trailing_zeros() as usize;
            left &= left - 1;
            if let Some(disk) = &mut disks[n] {
                disk.opened.channel.kick();
            }
        }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        let disks = self.disks.iter_mut().flat_map(|disks| disks.iter_mut().flatten());
        disks.for_each(|disk| disk.abandon());
    }

    fn wait(&self, _: usize) -> Wait {
        if self.unkicked != 0 {
            return Wait::Poll;
        }
        let mut wait = Wait::Event;
        if !self.waiting.is_empty() {
            wait = Wait::Until(Instant::now() + TRY_AGAIN);
        }
        let disks = self.disks.iter().flat_map(|disks| disks.iter().flatten());
        disks.fold(wait, |wait, disk| {
            let wait = wait.sooner(disk.opened.wait(disk.queued as usize, disk.throttled.len()));
            // Nothing signals that a channel has room.
            let waits = !disk.full.is_empty();
            if waits { wait.sooner(Wait::Until(Instant::now() + TRY_AGAIN)) } else { wait }
        })
    }

    #[inline]
    fn is_open(&self) -> bool {
        self.disks.is_some()
    }

    fn release(&mut self) -> Option<Box<dyn Send>> {
        self.disks.take().map(|disks| disks as Box<dyn Send>)
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.link.wake.fd()].into_iter().collect()
    }

    fn set_wakes(&mut self, wakes: bool) {
        let disks = self.disks.iter_mut().flat_map(|disks| disks.iter_mut().flatten());
        disks.for_each(|disk| disk.opened.channel.set_wakes(wakes));
    }
}
