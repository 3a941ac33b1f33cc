//! The I/O path of an error disk.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ErrorDisk, InjectedError, Releases, rule_index};
use crate::contract::{Channel, Wait};
use crate::failure::{Failure, Failures};
use crate::io::{Completion, Io, Op, Status, Submit, Tag};
use crate::memory;
use crate::wrapper::forward_to_base;

/// How often a sleeping owner looks whether the operator has released pending I/Os, which nothing
/// announces.
const RELEASE_CHECK: Duration = Duration::from_millis(1);

pub(super) struct ErrorChannel {
    base: Box<dyn Channel>,
    disk: Arc<ErrorDisk>,
    /// I/Os that have been made to wait, in order.
    pending: VecDeque<Io>,
    /// I/Os that the next poll begins.
    retries: VecDeque<Io>,
    /// I/Os that ended without the base, or inside its submit.
    ended: VecDeque<Completion>,
    /// By tag: what to do to the data when the base is done with it.
    spoiled: Box<[Option<Spoiled>]>,
    /// By tag: injected failures that nobody has asked about yet.
    failures: Failures,
    /// I/Os outstanding at the base.
    with_base: u64,
    /// As the operator had released pending I/Os when the first of ours became one.
    released: Releases,
    /// I/Os that wait need not be started any more.
    abandoned: bool,
}

#[derive(Clone, Copy)]
struct Spoiled {
    io: Io,
    offset: u64,
    value: u8,
}

impl Spoiled {
    /// Changes the byte, or changes it back.
    ///
    /// # Safety
    /// The I/O has not been reported.
    unsafe fn flip(&self) {
        // SAFETY: the caller vouches for it.
        let segments = unsafe { self.io.segments() };
        // SAFETY: as above.
        unsafe { memory::flip(segments, self.offset, self.value) }
    }
}

impl ErrorChannel {
    pub(super) fn new(disk: Arc<ErrorDisk>, base: Box<dyn Channel>, depth: u16) -> Self {
        Self {
            base,
            pending: VecDeque::with_capacity(depth.into()),
            retries: VecDeque::with_capacity(depth.into()),
            ended: VecDeque::with_capacity(depth.into()),
            spoiled: vec![None; depth.into()].into_boxed_slice(),
            failures: Failures::new(depth),
            with_base: 0,
            released: disk.releases(),
            abandoned: false,
            disk,
        }
    }

    /// Passes an I/O on, spoiled or not.
    ///
    /// # Safety
    /// As [`Channel::submit`].
    #[inline]
    unsafe fn pass_on(&mut self, io: Io, spoiled: Option<Spoiled>) -> Submit {
        let written = spoiled.filter(|_| io.op == Op::Write);
        if let Some(spoiled) = written {
            // SAFETY: the caller vouches for the memory.
            unsafe { spoiled.flip() };
        }
        // SAFETY: the caller's promise covers the base, which completes no later than we do.
        let submit = unsafe { self.base.submit(io) };
        match (&submit, spoiled) {
            (Submit::Queued, _) => {
                self.with_base += 1;
                if let Some(slot) = self.spoiled.get_mut(usize::from(io.tag.0)) {
                    *slot = spoiled;
                }
            }
            // SAFETY: the I/O is still the caller's.
            (Submit::Done(status), Some(spoiled)) => unsafe { finish(&spoiled, *status) },
            // SAFETY: as above.
            (Submit::Full(_), Some(_)) => written.iter().for_each(|s| unsafe { s.flip() }),
            _ => {}
        }
        submit
    }

    /// Takes over what the operator has decided about pending I/Os.
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

    /// Begins what waits to be begun, each I/O once.
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
                Submit::Full(io) => {
                    self.retries.push_front(io);
                    break;
                }
            }
        }
        self.base.kick();
    }
}

/// Spoils what was read, and gives the caller's data back as it was if it was written.
///
/// # Safety
/// The I/O has not been reported.
unsafe fn finish(spoiled: &Spoiled, status: Status) {
    if spoiled.io.op == Op::Write || status == Status::Ok {
        // SAFETY: the caller vouches for it.
        unsafe { spoiled.flip() };
    }
}

impl Channel for ErrorChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // Before the rule: whoever clears the rules and then resumes leaves nothing pending.
        let released = self.disk.releases();
        let rule = rule_index(io.op).map(|i| &self.disk.rules[i]);
        let spoiled = match rule.and_then(|rule| rule.take(self.with_base)) {
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
                Some(Spoiled { io, offset, value })
                    .filter(|_| matches!(io.op, Op::Read | Op::Write))
            }
        };
        // SAFETY: the caller's promise.
        unsafe { self.pass_on(io, spoiled) }
    }

    fn wait(&self) -> Wait {
        if !self.ended.is_empty() || !self.retries.is_empty() {
            return Wait::Poll;
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
        // What was spoiled stays so.
        self.spoiled.fill(None);
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
            let slot = self.spoiled.get_mut(usize::from(completion.tag.0));
            if let Some(spoiled) = slot.and_then(Option::take) {
                // SAFETY: it is reported when this returns.
                unsafe { finish(&spoiled, completion.status) };
            }
        }
        n + from_base
    }

    forward_to_base!(wake_fds, set_wakes, kick);
}
