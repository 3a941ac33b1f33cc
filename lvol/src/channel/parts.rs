//! The parts of an I/O.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

use std::sync::atomic::Ordering;

use bdev::{Begun, Channel, FailureKind, Grace, Io, Op, Status, Submit, memory};

use super::{Active, At, Begin, LvolChannel};
use crate::volume::Target;

/// Bytes that are zeroed at once for a read of what was never written.
const ZEROES: u64 = 1 << 20;
/// Parts that are begun in one call.
pub(super) const PARTS: usize = 32;

impl Active {
    /// Reads `len` bytes as zeroes, or as many of them as one call may. Returns whether the I/O has
    /// been done to its end.
    fn read_zeroes(&mut self, len: u64) -> bool {
        let len = len.min(ZEROES);
        // SAFETY: the I/O has not been reported: its segments are valid.
        let segments = unsafe { self.io.segments() };
        // SAFETY: as above.
        unsafe { memory::clear(segments, self.done, usize::try_from(len).unwrap_or(usize::MAX)) };
        self.done += len;
        self.done >= self.io.len
    }
}

impl LvolChannel {
    /// Begins the next parts of an I/O, until one of them is under way.
    pub(super) fn begin(&mut self, active: &mut Active) -> Begin {
        for _ in 0..PARTS {
            let io = active.io;
            let left = io.len - active.done;
            if left == 0 {
                return Begin::Ended(Status::Ok);
            }
            let offset = io.offset + active.done;
            let volume = &self.volume;
            // Before the look-up: the base's cluster is not given away while a part uses it.
            let begun = self.shared.grace.begin(&self.in_flight);
            if io.op != Op::Read && volume.read_only.load(Ordering::Acquire) {
                Grace::end(&self.in_flight, begun);
                self.note(io.tag, io.failed(FailureKind::Failed, libc::EROFS));
                return Begin::Ended(Status::IoError);
            }
            let (target, len) = volume.target(io.op, io.may_unmap, offset, left, self.abilities);
            active.len = len;
            if let Target::Base(at) = target {
                match self.begin_on_base(active, at, begun) {
                    None => continue,
                    Some(begin) => return begin,
                }
            }
            Grace::end(&self.in_flight, begun);
            match target {
                Target::Base(_) | Target::Nothing => active.done += len,
                Target::Zeroes => {
                    if !active.read_zeroes(len) {
                        return Begin::More;
                    }
                }
                Target::External => match self.begin_on_external(active, offset) {
                    None => {}
                    Some(begin) => return begin,
                },
                Target::Thread(job) => {
                    active.at = At::Thread(job);
                    self.link.line.push(job.io(io.tag, offset, len));
                    self.with_thread += 1;
                    self.untold = true;
                    return Begin::Waits;
                }
            }
        }
        Begin::More
    }

    /// Returns the I/O that does the part under way at `offset` of a base.
    fn part(&mut self, active: &Active, offset: u64) -> Option<Io> {
        let io = active.io;
        if active.done == 0 && active.len == io.len {
            let mut whole = io;
            whole.offset = offset;
            return Some(whole);
        }
        // SAFETY: the I/O has not been reported: its segments are valid. The slot of its tag has
        // one part at a time.
        unsafe { self.cuts.part(io.tag.0, &io, active.done, active.len, io.tag, offset) }
    }

    /// Begins a part on the base. `None`: it has ended.
    #[inline]
    fn begin_on_base(&mut self, active: &mut Active, offset: u64, begun: Begun) -> Option<Begin> {
        let Some(part) = self.part(active, offset) else {
            Grace::end(&self.in_flight, begun);
            return Some(self.impossible(&active.io));
        };
        // SAFETY: the part uses segments of an I/O that is reported after the part has ended.
        let submit = unsafe { self.base.submit(part) };
        if let Submit::Queued = submit {
            active.at = At::Base(begun);
            self.with_base += 1;
            return Some(Begin::Waits);
        }
        Grace::end(&self.in_flight, begun);
        match submit {
            Submit::Done(Status::Ok) => {
                active.done += active.len;
                None
            }
            Submit::Done(status) => {
                let failure = self.base.failure(active.io.tag);
                self.fail(&active.io, failure);
                Some(Begin::Ended(status))
            }
            refused => Some(Begin::Refused(refused)),
        }
    }

    /// Begins a part on the external snapshot. `None`: it has ended.
    #[cold]
    fn begin_on_external(&mut self, active: &mut Active, offset: u64) -> Option<Begin> {
        let size = self.external_bdev.as_ref().map_or(0, |bdev| bdev.size_bytes());
        if offset >= size {
            let done = active.read_zeroes(active.len);
            return (!done).then_some(Begin::More);
        }
        active.len = active.len.min(size - offset);
        let Some(part) = self.part(active, offset) else {
            return Some(self.impossible(&active.io));
        };
        let Some(external) = &mut self.external else {
            return Some(self.impossible(&active.io));
        };
        // SAFETY: as on the base.
        match unsafe { external.submit(part) } {
            Submit::Queued => {
                active.at = At::External;
                self.with_external += 1;
                Some(Begin::Waits)
            }
            Submit::Done(Status::Ok) => {
                active.done += active.len;
                None
            }
            Submit::Done(status) => {
                let failure = external.failure(active.io.tag);
                self.fail(&active.io, failure);
                Some(Begin::Ended(status))
            }
            refused => Some(Begin::Refused(refused)),
        }
    }

    /// For what the contract or the store excludes.
    #[cold]
    fn impossible(&mut self, io: &Io) -> Begin {
        self.note(io.tag, io.failed(FailureKind::Failed, libc::EIO));
        Begin::Ended(Status::IoError)
    }
}
