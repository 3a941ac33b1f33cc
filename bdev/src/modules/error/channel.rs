//! The I/O path of an error disk.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ErrorDisk, InjectedError, Releases, rule_index};
use crate::bdev_channel::BdevChannel;
use crate::contract::{Channel, Wait};
use crate::failure::{Failure, Failures};
use crate::io::{Completion, Io, Op, Status, Submit, Tag};
use crate::memory;
use crate::wrapper::forward_to_base;

/// The interval at which a sleeping owner checks whether the operator has released pending I/Os, and
/// whether the base accepts I/Os again. No event signals this.
const RELEASE_CHECK: Duration = Duration::from_millis(1);

pub(super) struct ErrorChannel {
    base: BdevChannel,
    disk: Arc<ErrorDisk>,
    /// Pending I/Os, in order.
    pending: VecDeque<Io>,
    /// I/Os that the next poll starts.
    retries: VecDeque<Io>,
    /// I/Os that ended without the base, or inside its submit.
    ended: VecDeque<Completion>,
    /// The data to corrupt when the base has completed an I/O, by tag.
    corrupted: Box<[Option<Corrupted>]>,
    /// Injected failures that the owner has not taken yet, by tag.
    failures: Failures,
    /// I/Os outstanding at the base.
    with_base: u64,
    /// The release counters at the time when the first of this channel's I/Os became pending.
    released: Releases,
    /// Set when waiting I/Os need not be started any more.
    abandoned: bool,
}

#[derive(Clone, Copy)]
struct Corrupted {
    io: Io,
    offset: u64,
    value: u8,
}

impl Corrupted {
    /// Flips the byte's bits. A second call restores the byte.
    ///
    /// # Safety
    /// The I/O has not been reported.
    unsafe fn flip(&self) {
        // SAFETY: the caller guarantees that the I/O has not been reported.
        let segments = unsafe { self.io.segments() };
        // SAFETY: as above.
        unsafe { memory::flip(segments, self.offset, self.value) }
    }
}

impl ErrorChannel {
    pub(super) fn new(disk: Arc<ErrorDisk>, base: BdevChannel, depth: u16) -> Self {
        Self {
            base,
            pending: VecDeque::with_capacity(depth.into()),
            retries: VecDeque::with_capacity(depth.into()),
            ended: VecDeque::with_capacity(depth.into()),
            corrupted: vec![None; depth.into()].into_boxed_slice(),
            failures: Failures::new(depth),
            with_base: 0,
            released: disk.releases(),
            abandoned: false,
            disk,
        }
    }

    /// Passes an I/O on to the base, corrupted or not.
    ///
    /// # Safety
    /// As [`Channel::submit`].
    #[inline]
    unsafe fn pass_on(&mut self, io: Io, corrupted: Option<Corrupted>) -> Submit {
        let written = corrupted.filter(|_| io.op == Op::Write);
        if let Some(corrupted) = written {
            // SAFETY: the caller guarantees that the memory is valid.
            unsafe { corrupted.flip() };
        }
        // SAFETY: the caller's promise covers the base, which completes no later than this channel.
        let submit = unsafe { self.base.submit(io) };
        match (&submit, corrupted) {
            (Submit::Queued, _) => {
                self.with_base += 1;
                if let Some(slot) = self.corrupted.get_mut(usize::from(io.tag.0)) {
                    *slot = corrupted;
                }
            }
            // SAFETY: the caller still owns the I/O.
            (Submit::Done(status), Some(corrupted)) => unsafe { finish(&corrupted, *status) },
            (Submit::Full(_) | Submit::Throttled(_), Some(_)) => {
                // SAFETY: as above.
                written.iter().for_each(|s| unsafe { s.flip() });
                rule_index(io.op).iter().for_each(|i| self.disk.rules[*i].put_back());
            }
            _ => {}
        }
        submit
    }

    /// Applies the operator's releases to the pending I/Os.
    fn release_pending(&mut self) {
        let now = self.disk.releases();
        if now.aborts != self.released.aborts {
            while let Some(io) = self.pending.pop_front() {
                self.failures.note(&io, libc::EIO);
                self.ended.push_back(Completion { tag: io.tag, status: Status::IoError });
            }
        } else if now.resumes != self.released.resumes {
            self.retries.append(&mut self.pending);
        }
        self.released = now;
    }

    /// Starts the waiting I/Os, each once.
    fn retry(&mut self) {
        for _ in 0..self.retries.len() {
            let Some(io) = self.retries.pop_front() else { break };
            if self.abandoned {
                self.ended.push_back(Completion { tag: io.tag, status: Status::IoError });
                continue;
            }
            // SAFETY: it has not been reported since the caller submitted it.
            match unsafe { self.submit(io) } {
                Submit::Done(status) => {
                    self.ended.push_back(Completion { tag: io.tag, status });
                }
                Submit::Queued => {}
                Submit::Full(io) | Submit::Throttled(io) => {
                    self.retries.push_front(io);
                    break;
                }
            }
        }
        self.base.kick();
    }
}

/// Corrupts the data that was read, or restores the caller's data that was written.
///
/// # Safety
/// The I/O has not been reported.
unsafe fn finish(corrupted: &Corrupted, status: Status) {
    if corrupted.io.op == Op::Write || status == Status::Ok {
        // SAFETY: the caller guarantees that the I/O has not been reported.
        unsafe { corrupted.flip() };
    }
}

impl Channel for ErrorChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // Before the rule is applied: an operator that clears the rules and then resumes leaves no
        // I/O pending.
        let released = self.disk.releases();
        let rule = rule_index(io.op).map(|i| &self.disk.rules[i]);
        let corrupted = match rule.and_then(|rule| rule.take(self.with_base)) {
            None => None,
            Some(InjectedError::Failure) => {
                self.failures.note(&io, libc::EIO);
                return Submit::Done(Status::IoError);
            }
            Some(InjectedError::Pending) => {
                if self.pending.is_empty() {
                    self.released = released;
                }
                self.pending.push_back(io);
                return Submit::Queued;
            }
            Some(InjectedError::NoMemory) => {
                self.retries.push_back(io);
                return Submit::Queued;
            }
            Some(InjectedError::CorruptData { offset, value }) => {
                Some(Corrupted { io, offset, value })
                    .filter(|_| matches!(io.op, Op::Read | Op::Write))
            }
        };
        // SAFETY: by the caller's promise.
        unsafe { self.pass_on(io, corrupted) }
    }

    fn wait(&self) -> Wait {
        if !self.ended.is_empty() {
            return Wait::Poll;
        }
        if !self.retries.is_empty() {
            // Nothing signals that the base accepts I/O again.
            return Wait::Until(Instant::now() + RELEASE_CHECK);
        }
        let base = if self.with_base > 0 { self.base.wait() } else { Wait::Event };
        if self.pending.is_empty() {
            return base;
        }
        base.sooner(Wait::Until(Instant::now() + RELEASE_CHECK))
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.take(tag).or_else(|| self.base.failure(tag))
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        // Corrupted data stays corrupted.
        self.corrupted.fill(None);
        self.base.abandon();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if !self.pending.is_empty() {
            self.release_pending();
        }
        if !self.retries.is_empty() {
            self.retry();
        }
        let mut n = 0;
        while n < done.len()
            && let Some(completion) = self.ended.pop_front()
        {
            done[n] = completion;
            n += 1;
        }
        if self.with_base == 0 {
            return n;
        }
        let from_base = self.base.poll(&mut done[n..]);
        self.with_base -= from_base as u64;
        for completion in &done[n..n + from_base] {
            let slot = self.corrupted.get_mut(usize::from(completion.tag.0));
            if let Some(corrupted) = slot.and_then(Option::take) {
                // SAFETY: the I/O is reported when this returns.
                unsafe { finish(&corrupted, completion.status) };
            }
        }
        n + from_base
    }

    forward_to_base!(wake_fds, set_wakes, set_limiting, kick);
}
