//! Answers requests.

use scsi::{Format, Outcome, Sense, Status, Transferred};
use vhost_target::device_queue::{Answer, Progress, Request};
use virtqueue::chain::Chain;

use super::RequestQueue;
use super::task::{Stage, Task};
use crate::parts::Parts;
use crate::wire::{RESPONSE_BYTES, RESPONSE_HEAD_BYTES, Response};

/// The end of a request.
#[derive(Clone, Copy, Debug)]
struct Ending {
    response: Response,
    status: Status,
    sense: Option<(Sense, Format)>,
    residual: u32,
    /// Bytes of data-in that were written.
    data_in: u64,
}

impl Ending {
    fn of(response: Response, residual: u64) -> Self {
        let residual = u32::try_from(residual).unwrap_or(u32::MAX);
        Self { response, status: Status::Good, sense: None, residual, data_in: 0 }
    }

    /// The end of a command that was executed. OVERRUN is only reported with GOOD: drivers look at
    /// the response first, and would miss another status.
    fn executed(status: Status, sense: Option<(Sense, Format)>, transferred: Transferred) -> Self {
        let overrun = transferred.overrun && status == Status::Good;
        let response = if overrun { Response::Overrun } else { Response::Ok };
        Self { response, status, sense, residual: transferred.residual, data_in: 0 }
    }

    /// Returns the response's bytes before the sense data.
    #[inline]
    fn head(&self, sense_len: usize) -> [u8; RESPONSE_HEAD_BYTES] {
        let mut head = [0; RESPONSE_HEAD_BYTES];
        let sense_len = u32::try_from(sense_len).unwrap_or(0);
        head[..4].copy_from_slice(&sense_len.to_le_bytes());
        head[4..8].copy_from_slice(&self.residual.to_le_bytes());
        head[10] = self.status as u8;
        head[11] = self.response as u8;
        head
    }

    /// Writes the response. Returns the lengths for the used ring and for the dirty log.
    #[inline]
    fn put(&self, chain: &mut Chain, parts: Parts) -> Answer {
        match self.sense {
            None => parts.respond(chain, self.head(0)),
            Some((sense, format)) => self.put_sense(chain, parts, sense, format),
        }
        let dirty = RESPONSE_BYTES as u64 + self.data_in;
        // The length in the used ring has 32 bits; a chain's writable part may be longer.
        let written = u32::try_from(dirty).unwrap_or(u32::MAX);
        Answer { last_byte: None, written, dirty }
    }

    /// Writes a response with sense data.
    #[cold]
    fn put_sense(&self, chain: &mut Chain, parts: Parts, sense: Sense, format: Format) {
        let mut bytes = [0; RESPONSE_BYTES];
        let sense_len = sense.encode(format, &mut bytes[RESPONSE_HEAD_BYTES..]);
        bytes[..RESPONSE_HEAD_BYTES].copy_from_slice(&self.head(sense_len));
        parts.respond_with_sense(chain, &bytes);
    }
}

/// Writes the response and returns the chain.
#[inline]
fn end<R: Request<RequestQueue>>(mut request: R, ending: &Ending) -> Progress {
    if ending.response != Response::Ok || ending.status != Status::Good {
        request.count_error();
    }
    let (task, chain) = request.parts();
    let answer = ending.put(chain, task.parts);
    request.finish(answer)
}

/// Writes the response to a request of a controller that was deleted.
#[cold]
pub(super) fn refuse(chain: &mut Chain, parts: Parts) -> Answer {
    Ending::of(Response::BadTarget, 0).put(chain, parts)
}

/// Takes note that a command does not use its disk any more.
#[inline]
pub(super) fn release(queue: &mut RequestQueue, slot: u16, task: &mut Task) {
    let job = if let Stage::Job(n) = task.stage { Some(n) } else { None };
    task.stage = Stage::Start;
    queue.watch.ended(slot);
    let begun = task.begun.take();
    let mut left = false;
    if let Some(disk) = queue.disk_of(task) {
        if let Some(begun) = begun {
            disk.end_write(begun);
        }
        disk.commands -= 1;
        left = disk.leaves && disk.commands == 0;
    }
    if left {
        queue.watch.leaves = true;
    }
    if let Some(n) = job {
        queue.release_job(n, task);
    }
}

/// Answers a command that has succeeded without a residual. `data_in`: the bytes of data-in that
/// were written.
#[inline]
pub(super) fn good<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
    data_in: u64,
) -> Progress {
    let slot = request.slot();
    release(queue, slot, request.parts().0);
    end(request, &Ending { data_in, ..Ending::of(Response::Ok, 0) })
}

/// Answers a command without a status.
#[cold]
pub(super) fn respond<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
    response: Response,
) -> Progress {
    let slot = request.slot();
    release(queue, slot, request.parts().0);
    respond_unstarted(request, response)
}

/// The same for a command that has not been counted.
#[cold]
pub(super) fn respond_unstarted<R: Request<RequestQueue>>(
    mut request: R,
    response: Response,
) -> Progress {
    let buffers = request.parts().0.buffers;
    end(request, &Ending::of(response, buffers.longest()))
}

/// Answers a command that fails before its I/O.
#[cold]
pub(super) fn fail<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
    sense: Sense,
    format: Format,
) -> Progress {
    let slot = request.slot();
    let (task, _) = request.parts();
    let buffers = task.buffers;
    release(queue, slot, task);
    let ending = Ending::of(Response::Ok, buffers.longest());
    end(request, &Ending { status: Status::CheckCondition, sense: Some((sense, format)), ..ending })
}

/// Answers a command whose plan has been done, or has failed.
#[inline]
pub(super) fn finish<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
    outcome: Outcome,
) -> Progress {
    let slot = request.slot();
    let (task, _) = request.parts();
    let reads = matches!(task.plan, Some(plan) if plan.op == scsi::Op::Read);
    let format = queue.disk_of(task).map_or(Format::Fixed, |disk| disk.gate.format());
    release(queue, slot, task);
    let Outcome { status, sense, transferred } = outcome;
    let ending = Ending::executed(status, sense.map(|sense| (sense, format)), transferred);
    end(request, &Ending { data_in: if reads { transferred.bytes } else { 0 }, ..ending })
}

/// Answers a command that was executed before it waited for others.
#[cold]
pub(super) fn drained<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
) -> Progress {
    let slot = request.slot();
    let (task, _) = request.parts();
    let residual = task.residual;
    release(queue, slot, task);
    end(request, &Ending::of(Response::Ok, residual.into()))
}

/// Answers a command with what the logical unit has replied. `counted`: it is a command of a disk.
#[cold]
pub(super) fn reply<R: Request<RequestQueue>>(
    queue: &mut RequestQueue,
    mut request: R,
    counted: bool,
) -> Progress {
    let slot = request.slot();
    let (task, chain) = request.parts();
    let data = queue.reply.data();
    task.parts.put_data_in(chain, data);
    let sense = queue.reply.sense().map(|sense| (sense, queue.reply.format()));
    let ending = Ending::executed(queue.reply.status(), sense, queue.reply.transferred());
    let ending = Ending { data_in: data.len() as u64, ..ending };
    if counted {
        release(queue, slot, task);
    }
    end(request, &ending)
}
