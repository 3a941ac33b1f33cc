//! The I/O path to a volume.
//!
//! An I/O is done in parts, one after the other: each part goes to clusters that follow one another
//! on the base, or to the external snapshot, or waits for the store's thread. Most I/Os have one
//! part, which goes to the base with the I/O's own tag and segments.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

mod parts;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bdev::{
    Bdev, BdevChannel, Begun, Channel, Completion, Cuts, Ended, Error, Failure, FailureKind, Grace,
    InFlight, Io, Limiting, Line, Op, Status, Submit, Tag, Wait, WakeFds, WakeSet, within,
};

use self::parts::PARTS;
use crate::core::Shared;
use crate::link::Link;
use crate::volume::{Abilities, Job, Volume};

/// The interval of attempts while a base refuses I/O and has none outstanding.
const RETRY: Duration = Duration::from_millis(1);

pub(crate) struct LvolChannel {
    base: BdevChannel,
    external: Option<BdevChannel>,
    /// Keeps the bdev in use while the channel is open.
    _disk: Arc<dyn Bdev>,
    shared: Arc<Shared>,
    volume: Arc<Volume>,
    external_bdev: Option<Arc<dyn Bdev>>,
    abilities: Abilities,
    in_flight: Arc<InFlight>,
    link: Arc<Link>,
    /// The outstanding I/Os, by tag.
    active: Box<[Option<Active>]>,
    /// I/Os whose next part must be begun, in order.
    again: VecDeque<Tag>,
    /// I/Os that have ended and were not reported.
    ended: VecDeque<Completion>,
    /// Reasons of failed I/Os, by tag.
    failures: Box<[Option<Failure>]>,
    cuts: Cuts,
    wakes: WakeSet,
    /// Parts at the base, at the external snapshot, and with the store's thread.
    with_base: usize,
    with_external: usize,
    with_thread: usize,
    /// The thread has a job that it was not told of.
    untold: bool,
    /// A base has refused the first part of `again`.
    refused: bool,
    /// A base may have further completions.
    more: bool,
    abandoned: bool,
}

/// An outstanding I/O.
#[derive(Clone, Copy)]
struct Active {
    io: Io,
    /// Bytes whose parts have ended.
    done: u64,
    /// Bytes of the part under way.
    len: u64,
    at: At,
}

/// Where the part under way is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Base(Begun),
    External,
    Thread(Job),
    /// In `again`.
    Here,
}

/// What has become of an I/O whose next parts were begun.
enum Begin {
    /// A part is under way.
    Waits,
    /// It has ended.
    Ended(Status),
    /// A base has refused the next part.
    Refused(Submit),
    /// There is more to do for it than one call may do.
    More,
}

impl LvolChannel {
    /// Opens a channel of `disk`, the bdev of `volume`. `bases` are the store's base, and the
    /// external snapshot if the volume reads from one.
    pub(crate) fn open(
        disk: Arc<dyn Bdev>,
        shared: Arc<Shared>,
        volume: Arc<Volume>,
        bases: &[Arc<dyn Bdev>],
        depth: u16,
    ) -> Result<Self, Error> {
        let system = |source| Error::System { what: disk.name().to_owned(), source };
        let none = || Error::NoDevice(disk.name().to_owned());
        let base = bases.first().ok_or_else(none)?;
        let abilities = Abilities { unmap: base.features().unmap };
        let base = BdevChannel::open(base, depth)?;
        let external = bases.get(1).map(|bdev| BdevChannel::open(bdev, depth)).transpose()?;
        let line = Line::new(depth).map_err(system)?;
        let wakes = WakeSet::new().map_err(system)?;
        let mut fds: Vec<BorrowedFd<'_>> = base.wake_fds().into_iter().collect();
        fds.extend(external.iter().flat_map(BdevChannel::wake_fds));
        fds.push(line.wake_fd());
        wakes.add(fds).map_err(system)?;
        let link = Arc::new(Link { volume: Arc::clone(&volume), line });
        shared.lock_links().push(Arc::clone(&link));
        volume.channels.fetch_add(1, Ordering::SeqCst);
        Ok(Self {
            base,
            external,
            abilities,
            in_flight: shared.grace.add(),
            link,
            active: vec![None; depth.into()].into_boxed_slice(),
            again: VecDeque::with_capacity(depth.into()),
            ended: VecDeque::with_capacity(depth.into()),
            failures: vec![None; depth.into()].into_boxed_slice(),
            cuts: Cuts::new(depth),
            wakes,
            with_base: 0,
            with_external: 0,
            with_thread: 0,
            untold: false,
            refused: false,
            more: false,
            abandoned: false,
            external_bdev: bases.get(1).cloned(),
            _disk: disk,
            shared,
            volume,
        })
    }

    /// Returns the errno with which an invalid I/O fails; `None` if the I/O is valid.
    #[inline]
    fn refusal(&self, io: &Io) -> Option<i32> {
        let block = u64::from(self.shared.block_size);
        let whole = (io.offset | io.len) & (block - 1) == 0;
        (!whole || !within(io, self.volume.size())).then_some(libc::EINVAL)
    }

    #[cold]
    fn note(&mut self, tag: Tag, failure: Failure) {
        if let Some(slot) = self.failures.get_mut(usize::from(tag.0)) {
            *slot = Some(failure);
        }
    }

    /// Keeps the reason of a failed part, which `failure` has, as that of the I/O.
    #[cold]
    fn fail(&mut self, io: &Io, failure: Option<Failure>) {
        if let Some(failure) = failure {
            let whole = io.failed(failure.kind, failure.errno);
            self.note(io.tag, whole);
        }
    }

    /// Passes on a flush: what acknowledged writes need of the store's metadata was written before
    /// they were acknowledged.
    ///
    /// # Safety
    /// As [`Channel::submit`].
    unsafe fn flush(&mut self, io: Io) -> Submit {
        let begun = self.shared.grace.begin(&self.in_flight);
        // SAFETY: the caller's promise; a flush has no segments.
        let submit = unsafe { self.base.submit(io) };
        match &submit {
            Submit::Queued => {
                let active = Active { io, done: 0, len: 0, at: At::Base(begun) };
                self.active[usize::from(io.tag.0)] = Some(active);
                self.with_base += 1;
                return submit;
            }
            Submit::Done(status) if *status != Status::Ok => {
                let failure = self.base.failure(io.tag);
                self.fail(&io, failure);
            }
            _ => {}
        }
        Grace::end(&self.in_flight, begun);
        submit
    }

    /// Begins the next parts of the I/Os in `again`.
    fn go_on(&mut self) {
        self.refused = false;
        for _ in 0..PARTS.min(self.again.len()) {
            let Some(tag) = self.again.pop_front() else { return };
            let Some(mut active) = self.active.get(usize::from(tag.0)).copied().flatten() else {
                continue;
            };
            let begin = self.begin(&mut active);
            let slot = &mut self.active[usize::from(tag.0)];
            *slot = Some(active);
            match begin {
                Begin::Waits => {}
                Begin::Ended(status) => {
                    *slot = None;
                    self.ended.push_back(Completion { tag, status });
                }
                Begin::More => self.again.push_back(tag),
                Begin::Refused(_) => {
                    self.again.push_front(tag);
                    self.refused = true;
                    return;
                }
            }
        }
    }

    /// Ends the part of `tag` that was under way. Returns the I/O's status if it has ended with it.
    #[inline]
    fn end_part(&mut self, tag: Tag, status: Status) -> Option<Status> {
        let slot = self.active.get_mut(usize::from(tag.0))?;
        let active = slot.as_mut()?;
        let failure = match active.at {
            At::Base(begun) => {
                Grace::end(&self.in_flight, begun);
                self.with_base -= 1;
                (status != Status::Ok).then(|| self.base.failure(tag)).flatten()
            }
            At::External => {
                self.with_external -= 1;
                let external = self.external.as_mut();
                (status != Status::Ok).then(|| external?.failure(tag)).flatten()
            }
            At::Thread(_) | At::Here => None,
        };
        if status == Status::Ok {
            active.done += active.len;
            if active.done < active.io.len && !self.abandoned {
                active.at = At::Here;
                self.again.push_back(tag);
                return None;
            }
        }
        let io = active.io;
        let cut_off = status == Status::Ok && active.done < io.len;
        *slot = None;
        self.fail(&io, failure);
        Some(if cut_off { Status::IoError } else { status })
    }

    /// Takes completions of the base into `done`. Returns the number of I/Os that have ended.
    #[inline]
    fn poll_base(&mut self, done: &mut [Completion]) -> usize {
        let taken = self.base.poll(done);
        self.more |= taken == done.len();
        self.keep_ended(done, taken)
    }

    /// Leaves only the ended I/Os among the first `taken` completions.
    #[inline]
    fn keep_ended(&mut self, done: &mut [Completion], taken: usize) -> usize {
        let mut kept = 0;
        for at in 0..taken {
            let Completion { tag, status } = done[at];
            if let Some(status) = self.end_part(tag, status) {
                done[kept] = Completion { tag, status };
                kept += 1;
            }
        }
        kept
    }

    #[cold]
    fn poll_external(&mut self, done: &mut [Completion]) -> usize {
        let Some(external) = &mut self.external else { return 0 };
        let taken = external.poll(done);
        self.more |= taken == done.len();
        self.keep_ended(done, taken)
    }

    /// Takes the answers of the store's thread.
    #[cold]
    fn poll_thread(&mut self) {
        while let Some((tag, result)) = self.link.line.pop() {
            let Some(slot) = self.active.get_mut(usize::from(tag.0)) else { continue };
            // An abandoned I/O was reported before.
            let Some(active) = slot.as_mut() else { continue };
            let At::Thread(job) = active.at else { continue };
            self.with_thread -= 1;
            if result == Ended::Ok {
                // The others are tried again, as the map may have changed meanwhile.
                active.done += if job == Job::Release { active.len } else { 0 };
                active.at = At::Here;
                self.again.push_back(tag);
                continue;
            }
            let io = active.io;
            *slot = None;
            if let (_, Some(errno)) = result.status() {
                self.note(tag, io.failed(FailureKind::Failed, errno));
            }
            self.ended.push_back(Completion { tag, status: Status::IoError });
        }
    }

    /// Tells the store's thread of new jobs.
    #[inline]
    fn tell(&mut self) {
        if self.untold {
            self.untold = false;
            self.shared.waker.wake();
        }
    }

    fn report(&mut self, done: &mut [Completion]) -> usize {
        let mut n = 0;
        while n < done.len()
            && let Some(completion) = self.ended.pop_front()
        {
            done[n] = completion;
            n += 1;
        }
        n
    }
}

impl Channel for LvolChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if let Some(errno) = self.refusal(&io) {
            self.note(io.tag, io.failed(FailureKind::Failed, errno));
            return Submit::Done(Status::IoError);
        }
        if !matches!(self.active.get(usize::from(io.tag.0)), Some(None)) {
            // The contract forbids such a tag.
            self.note(io.tag, io.failed(FailureKind::Failed, libc::EINVAL));
            return Submit::Done(Status::IoError);
        }
        if io.op == Op::Flush {
            // SAFETY: by the caller's promise.
            return unsafe { self.flush(io) };
        }
        let mut active = Active { io, done: 0, len: 0, at: At::Here };
        let begin = self.begin(&mut active);
        match begin {
            Begin::Ended(status) => return Submit::Done(status),
            Begin::Refused(Submit::Throttled(_)) if active.done == 0 => {
                return Submit::Throttled(io);
            }
            Begin::Refused(_) if active.done == 0 => return Submit::Full(io),
            Begin::Waits => {}
            Begin::Refused(_) | Begin::More => {
                active.at = At::Here;
                self.again.push_back(io.tag);
            }
        }
        self.active[usize::from(io.tag.0)] = Some(active);
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        std::iter::once(self.wakes.fd()).collect()
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.base.set_wakes(wakes);
        if let Some(external) = &mut self.external {
            external.set_wakes(wakes);
        }
    }

    fn wait(&self) -> Wait {
        let begins = !self.again.is_empty() && !self.refused;
        let answered = || self.with_thread > 0 && !self.link.line.may_wait();
        if self.more || self.untold || begins || !self.ended.is_empty() || answered() {
            return Wait::Poll;
        }
        let mut wait = Wait::Event;
        if self.with_base > 0 {
            wait = wait.sooner(self.base.wait());
        }
        if let Some(external) = self.external.as_ref().filter(|_| self.with_external > 0) {
            wait = wait.sooner(external.wait());
        }
        if self.refused { wait.sooner(Wait::Until(Instant::now() + RETRY)) } else { wait }
    }

    fn set_limiting(&mut self, limiting: Limiting) {
        self.base.set_limiting(limiting);
        if let Some(external) = &mut self.external {
            external.set_limiting(limiting);
        }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.get_mut(usize::from(tag.0))?.take()
    }

    #[inline]
    fn kick(&mut self) {
        self.base.kick();
        if let Some(external) = &mut self.external {
            external.kick();
        }
        self.tell();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        self.more = false;
        let mut n = 0;
        if self.with_base > 0 {
            n += self.poll_base(done);
        }
        if self.with_external > 0 && n < done.len() {
            n += self.poll_external(&mut done[n..]);
        }
        if self.with_thread > 0 {
            self.poll_thread();
        }
        if !self.again.is_empty() {
            self.go_on();
            self.kick();
        }
        if !self.ended.is_empty() {
            n += self.report(&mut done[n..]);
        }
        n
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        self.again.clear();
        self.link.line.abandon();
        for (tag, slot) in (0..).map(Tag).zip(&mut self.active) {
            // The thread uses no memory of the I/O. Its answer is ignored.
            if slot.is_some_and(|active| matches!(active.at, At::Thread(_) | At::Here)) {
                *slot = None;
                self.ended.push_back(Completion { tag, status: Status::IoError });
            }
        }
        self.with_thread = 0;
        self.base.abandon();
        if let Some(external) = &mut self.external {
            external.abandon();
        }
    }
}

impl Drop for LvolChannel {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.lock_links().retain(|link| !Arc::ptr_eq(link, &self.link));
        shared.grace.remove(&self.in_flight);
        self.volume.channels.fetch_sub(1, Ordering::SeqCst);
        // A closed store's thread ends with the last channel.
        shared.waker.wake();
    }
}
