//! The control queue (virtio 1.2, section 5.6.6.2): task management functions, one after the other.
//!
//! A function about commands posts a [`Barrier`], which the control side passes on to the request
//! queues in a new view. The function is answered when all of them have reached the barrier. So the
//! driver sees the answers of the commands before that of the function, and the memory of these
//! commands is not used afterwards. A logical unit reset of one disk does not wait for commands of
//! another.
#![expect(unsafe_code, reason = "reads and writes guest memory")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::memory;
use guest_memory::usize_of;
use reactor::{Cause, Iteration, Wait};
use vhost_target::device_queue::{Answer, DeviceQueue, Notice, Progress, Request};
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE, VIRTIO_SCSI_T_TMF,
    VIRTIO_SCSI_T_TMF_ABORT_TASK, VIRTIO_SCSI_T_TMF_ABORT_TASK_SET,
    VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET, VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET,
    VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, VIRTIO_SCSI_T_TMF_QUERY_TASK,
    VIRTIO_SCSI_T_TMF_QUERY_TASK_SET,
};
use virtqueue::chain::{Chain, Parts};

use crate::session::{Barrier, Ends, Session};
use crate::target::TARGETS_MAX;
use crate::view::ScsiView;
use crate::wire::{AN_BYTES, Address, Response, TMF_BYTES, Tmf, take};

/// Barriers of a front end in a second, at most: each makes the control side publish views of all
/// its rings.
const BARRIERS_PER_SECOND_MAX: u64 = 100;
/// How long a sleeping reactor waits before it looks again whether a barrier was reached.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A function that waits for its barrier, or for those before it.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    slot: u16,
    target: u8,
    /// The target was shown when the function was taken.
    shown: bool,
    tag: Option<u64>,
    ends: Ends,
}

/// The device of a control queue.
pub(crate) struct ControlQueue {
    session: Option<Arc<Session>>,
    /// The targets that the view shows, a bit for each.
    shown: u8,
    /// The oldest is at work if there is a barrier.
    waiting: VecDeque<Waiting>,
    barrier: Option<Barrier>,
    /// The control side has to be told of the barrier.
    is_new: bool,
    posted_ticks: u64,
    /// The answer to the oldest function.
    answer: Response,
    /// All functions fail: there is no view any more.
    refuses: bool,
    /// Functions of an abandoned queue that were reported.
    reported: usize,
    abandoned: bool,
    released: bool,
}

impl std::fmt::Debug for ControlQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlQueue")
    }
}

impl ControlQueue {
    /// Creates the device of a queue with at most `depth` requests in flight.
    pub(crate) fn new(depth: u16) -> Self {
        Self {
            session: None,
            shown: 0,
            waiting: VecDeque::with_capacity(depth.into()),
            barrier: None,
            is_new: false,
            posted_ticks: 0,
            answer: Response::Failure,
            refuses: false,
            reported: 0,
            abandoned: false,
            released: false,
        }
    }

    /// Returns whether a target is shown.
    fn shows(&self, target: u8) -> bool {
        target < 8 && self.shown & (1 << target) != 0
    }

    /// Returns what a function is about and does. `Err`: its answer.
    ///
    /// A target that is not shown may have commands: it may just have been removed.
    fn check(&self, tmf: &Tmf) -> Result<(u8, Option<u64>, Ends), Response> {
        let address = Address::of(tmf.lun).ok_or(Response::BadTarget)?;
        if usize::from(address.target) >= TARGETS_MAX {
            return Err(Response::BadTarget);
        }
        let shown = self.shows(address.target);
        let refused = |response| if shown { response } else { Response::BadTarget };
        if address.lun != 0 {
            return Err(refused(Response::IncorrectLun));
        }
        let (tag, ends) = match tmf.subtype {
            VIRTIO_SCSI_T_TMF_ABORT_TASK => (Some(tmf.tag), Ends::Aborted),
            // The commands of other front ends belong to other nexuses, and stay.
            VIRTIO_SCSI_T_TMF_ABORT_TASK_SET | VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET => {
                (None, Ends::Aborted)
            }
            VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET => (None, Ends::Reset),
            VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET => (None, Ends::NexusReset),
            VIRTIO_SCSI_T_TMF_QUERY_TASK => (Some(tmf.tag), Ends::Nothing),
            VIRTIO_SCSI_T_TMF_QUERY_TASK_SET => (None, Ends::Nothing),
            _ => return Err(refused(Response::FunctionRejected)),
        };
        Ok((address.target, tag, ends))
    }

    /// Posts the barrier of the oldest function, if the last one is long enough ago.
    fn post_next(&mut self, iteration: &Iteration) {
        let (Some(&Waiting { target, tag, ends, .. }), Some(session)) =
            (self.waiting.front(), &self.session)
        else {
            return;
        };
        let interval = iteration.ticks_per_second() / BARRIERS_PER_SECOND_MAX;
        if iteration.now_ticks().wrapping_sub(self.posted_ticks) < interval {
            return;
        }
        self.barrier = Some(session.post_barrier(target, tag, ends));
        self.is_new = true;
        self.posted_ticks = iteration.now_ticks();
    }

    /// Returns whether the oldest function is to be answered, and stores the answer.
    fn is_oldest_done(&mut self, iteration: &Iteration) -> bool {
        let Some(&oldest) = self.waiting.front() else { return false };
        if self.refuses {
            self.answer = Response::Failure;
            return true;
        }
        let (Some(barrier), Some(session)) = (self.barrier, &self.session) else {
            self.post_next(iteration);
            return false;
        };
        let Some(found) = session.reached(&barrier) else { return false };
        let query = barrier.ends == Ends::Nothing;
        self.answer = match (oldest.shown, query && found) {
            (false, _) => Response::BadTarget,
            (true, true) => Response::FunctionSucceeded,
            (true, false) => Response::Ok,
        };
        true
    }

    fn start_function<R: Request<Self>>(&mut self, request: R, tmf: Tmf) -> Progress {
        match self.check(&tmf) {
            Err(response) => answer(request, &[response as u8]),
            Ok((target, tag, ends)) => {
                let shown = self.shows(target);
                self.waiting.push_back(Waiting { slot: request.slot(), target, shown, tag, ends });
                request.keep()
            }
        }
    }

    /// Asynchronous notifications (AN_QUERY, AN_SUBSCRIBE): there are none.
    fn start_notification<R: Request<Self>>(&self, request: R, lun: [u8; 8]) -> Progress {
        let address = Address::of(lun);
        let shown = address.is_some_and(|address| self.shows(address.target));
        let response = if shown { Response::Ok } else { Response::BadTarget };
        answer(request, &[0, 0, 0, 0, response as u8])
    }
}

/// Writes an answer, and finishes the request.
fn answer<R: Request<ControlQueue>>(mut request: R, bytes: &[u8]) -> Progress {
    let answer = put_answer(request.parts().1, bytes);
    if answer.written == 0 {
        request.count_error();
    }
    request.finish(answer)
}

/// Writes an answer. Without room for it, nothing is written.
fn put_answer(chain: &mut Chain, bytes: &[u8]) -> Answer {
    let Parts { totals, segments } = chain.parts();
    let written = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let fits = !totals.malformed && totals.writable_bytes() >= written.into();
    if fits {
        let segments = &segments[totals.readable..totals.count];
        // SAFETY: the segments are guest memory that stays mapped while the chain is in use.
        unsafe { memory::scatter(segments, 0, bytes.as_ptr(), bytes.len()) };
    }
    let written = if fits { written } else { 0 };
    Answer { last_byte: None, written, dirty: written.into() }
}

/// Reads the readable part: its first bytes, and their number.
fn read(chain: &mut Chain) -> ([u8; TMF_BYTES], usize) {
    let mut bytes = [0; TMF_BYTES];
    let Parts { totals, segments } = chain.parts();
    if totals.malformed {
        return (bytes, 0);
    }
    let len = usize_of(totals.readable_bytes).min(TMF_BYTES);
    let (segments, to) = (&segments[..totals.readable], bytes.as_mut_ptr());
    // SAFETY: as in `answer`, in the other direction.
    unsafe { memory::gather(segments, 0, to, len, memory::Stores::Cached) };
    (bytes, len)
}

impl DeviceQueue for ControlQueue {
    type Request = ();
    type View = ScsiView;

    fn refuse(chain: &mut Chain) -> Answer {
        let bad = Response::BadTarget as u8;
        let (bytes, len) = read(chain);
        match u32::from_le_bytes(take(&bytes, 0)) {
            VIRTIO_SCSI_T_TMF if len >= TMF_BYTES => put_answer(chain, &[bad]),
            _ => put_answer(chain, &[0, 0, 0, 0, bad]),
        }
    }

    fn start<R: Request<Self>>(&mut self, _: &ScsiView, mut request: R, _: bool) -> Progress {
        let (bytes, len) = read(request.parts().1);
        let kind = u32::from_le_bytes(take(&bytes, 0));
        match kind {
            VIRTIO_SCSI_T_TMF if len >= TMF_BYTES => self.start_function(request, Tmf::of(&bytes)),
            VIRTIO_SCSI_T_AN_QUERY | VIRTIO_SCSI_T_AN_SUBSCRIBE if len >= AN_BYTES => {
                self.start_notification(request, take(&bytes, 4))
            }
            _ => {
                request.count_error();
                request.finish(Answer { last_byte: None, written: 0, dirty: 0 })
            }
        }
    }

    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress {
        request.keep()
    }

    fn adopted(&mut self, view: Option<&ScsiView>) {
        if self.session.is_none() {
            self.session = view.map(|view| Arc::clone(view.session()));
        }
        self.shown = view.map_or(0, ScsiView::shown);
        self.refuses = view.is_none();
    }

    fn is_watching(&self) -> bool {
        self.is_new
    }

    fn visited(&mut self, _: bool) -> Option<Notice> {
        std::mem::take(&mut self.is_new).then_some(Notice::Views)
    }

    fn poll(&mut self, iteration: &mut Iteration) -> usize {
        if self.abandoned {
            let new = self.waiting.len() - self.reported;
            self.reported = self.waiting.len();
            return new;
        }
        let done = self.is_oldest_done(iteration);
        if done {
            iteration.note(Cause::Complete);
        }
        usize::from(done)
    }

    fn progressed(&self, n: usize) -> u16 {
        self.waiting[n].slot
    }

    fn advance<R: Request<Self>>(&mut self, _: usize, request: R) -> Progress {
        self.waiting.pop_front();
        if let (Some(barrier), Some(session)) = (self.barrier.take(), &self.session) {
            session.end_barrier(&barrier);
        }
        answer(request, &[self.answer as u8])
    }

    fn discard<R: Request<Self>>(&mut self, _: usize, _: &mut R) {}

    fn abandon(&mut self) {
        self.abandoned = true;
    }

    fn wait(&self, _: usize) -> Wait {
        Wait::Until(Instant::now() + LOOK_AGAIN)
    }

    fn is_open(&self) -> bool {
        !self.released
    }

    /// Nothing is to be dropped.
    fn release(&mut self) -> Option<Box<dyn Send>> {
        self.released = true;
        None
    }
}
