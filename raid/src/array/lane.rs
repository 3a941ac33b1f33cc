//! The I/Os of one channel, and their parts at the members.
//!
//! A lane has one user at a time: the channel's owner on a reactor, or the maintenance thread, which
//! changes the members. So its fields are plain data. An I/O of the owner is done in parts, one
//! child I/O for each, and for each member where all must do the same. Children come from a fixed
//! pool; an I/O for which there is none waits in `waiting`. A child that a member refuses stays in
//! `refused` and is submitted again.

mod change;
mod children;
mod detach;
mod parity;
mod read;

pub(crate) use change::TakenChannel;
pub(crate) use detach::Replacements;
pub(crate) use parity::xor;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{
    Bdev, BdevChannel, Channel, Completion, Cuts, Error, Failure, Io, Limiting, Op, Status, Tag,
    Wait, WakeSet,
};

use crate::array::{Array, SlotState, State};
use crate::level::Level;
use parity::{OwnBuffer, Parity};

/// Parts that are started in one call.
const PARTS_PER_CALL: usize = 32;
/// Completions that are taken from each member in one call.
const COMPLETIONS: usize = 32;
/// The interval of attempts while a member refuses I/O and has none outstanding.
const RETRY: Duration = Duration::from_millis(1);
/// The smallest and the largest pool of child I/Os.
const CHILDREN_MIN: usize = 32;
const CHILDREN_MAX: usize = 512;

pub(crate) struct Lane {
    array: Arc<Array>,
    members: Box<[Member]>,
    /// Masks of the members, of a redundant array.
    in_sync: u64,
    writing: u64,
    /// As in [`State`].
    hold: bool,
    failing: bool,
    window: Option<Range<u64>>,
    copied: u64,
    /// I/Os of the owner, by tag.
    active: Box<[Option<Active>]>,
    /// I/Os with parts that were not started, in order.
    waiting: VecDeque<Tag>,
    /// Changes of the locked range.
    parked: VecDeque<Tag>,
    /// Changes that have ended and wait for a superblock.
    held: VecDeque<Tag>,
    /// I/Os that have ended and were not reported.
    ended: VecDeque<Completion>,
    /// Reasons of failed I/Os, by tag.
    failures: Box<[Option<Failure>]>,
    children: Box<[Child]>,
    free: Vec<u16>,
    cuts: Cuts,
    /// Of raid5f.
    parity: Option<Parity>,
    refused: VecDeque<u16>,
    /// All of `refused` were submitted in vain.
    tried: bool,
    /// A member may have further completions.
    more: bool,
    /// The first of `waiting` has found no room.
    is_stuck: bool,
    abandoned: bool,
    limiting: Option<Limiting>,
    wakes: bool,
}

/// A member's channel.
#[derive(Default)]
pub(crate) struct Member {
    pub(crate) channel: Option<BdevChannel>,
    /// It is not used any more, and its I/O was abandoned.
    leaving: bool,
    flushes: bool,
    /// The I/Os at the member.
    with: u16,
    /// Bytes of these I/Os.
    bytes: u64,
    /// Buffers of its I/O that were replaced. Dropped after the channel.
    kept: Vec<OwnBuffer>,
}

/// An I/O of the owner.
#[derive(Clone, Copy)]
struct Active {
    io: Io,
    /// The bytes whose parts were started.
    started: u64,
    all_started: bool,
    /// Children that have not ended, and one while parts are being started.
    children: u16,
    status: Status,
    /// The members that this change went to, and those that have failed it.
    targets: u64,
    failed: u64,
}

/// A part of an I/O at a member.
#[derive(Clone, Copy)]
struct Child {
    /// It has not ended.
    used: bool,
    tag: Tag,
    member: usize,
    io: Io,
    /// The offset in the owner's I/O.
    at: u64,
    kind: Kind,
}

/// What the memory of a child is.
#[derive(Clone, Copy)]
enum Kind {
    /// That of the owner's I/O.
    Data,
    /// A buffer with a strip of parity.
    Parity(u16),
    /// A buffer for a piece that is being computed.
    Source(u16),
    /// A buffer that the member keeps. The child belongs to no I/O any more.
    Detached,
}

impl Member {
    /// Opens a member for a lane.
    ///
    /// # Errors
    /// As [`Bdev::open`].
    pub(crate) fn open(bdev: &Arc<dyn Bdev>, pool: u16, wakes: &WakeSet) -> Result<Self, Error> {
        let channel = BdevChannel::open(bdev, pool)?;
        let system = |source| Error::System { what: bdev.name().to_owned(), source };
        wakes.add(channel.wake_fds()).map_err(system)?;
        let flushes = bdev.features().flush;
        Ok(Self { channel: Some(channel), flushes, ..Self::default() })
    }
}

impl Lane {
    /// The number of children for a channel of this depth.
    pub(crate) fn pool(depth: u16, members: usize) -> u16 {
        let most = CHILDREN_MAX.max(members);
        let children = usize::from(depth) * members;
        u16::try_from(children.clamp(CHILDREN_MIN.max(members), most)).unwrap_or(u16::MAX)
    }

    /// Makes a lane with these members. `state` is the array's present state.
    pub(crate) fn new(
        array: Arc<Array>,
        members: Vec<Member>,
        state: &State,
        depth: u16,
        pool: u16,
    ) -> Self {
        let nothing = Io::plain(Op::Flush, Tag(0), 0, 0);
        let child =
            Child { used: false, tag: Tag(0), member: 0, io: nothing, at: 0, kind: Kind::Data };
        let [owner, pool_len] = [depth, pool].map(usize::from);
        let has_parity = array.layout.level == Level::Raid5f;
        Self {
            parity: has_parity.then(|| Parity::new(&array.layout, pool)),
            array,
            members: members.into(),
            in_sync: state.mask(SlotState::InSync),
            writing: state.mask(SlotState::Writing),
            hold: state.hold,
            failing: state.failing,
            window: state.window.clone(),
            copied: state.copied,
            active: vec![None; owner].into(),
            waiting: VecDeque::with_capacity(owner),
            parked: VecDeque::with_capacity(owner),
            held: VecDeque::with_capacity(owner),
            ended: VecDeque::with_capacity(owner),
            failures: vec![None; owner].into(),
            children: vec![child; pool_len].into(),
            free: (0..pool).rev().collect(),
            cuts: Cuts::new(pool),
            refused: VecDeque::with_capacity(pool_len),
            tried: false,
            more: false,
            is_stuck: false,
            abandoned: false,
            limiting: None,
            wakes: true,
        }
    }

    /// Accepts an I/O that is valid for the disk. Returns its status if it has ended already.
    pub(crate) fn start(&mut self, io: Io) -> Option<Status> {
        let Some(slot @ None) = self.active.get_mut(usize::from(io.tag.0)) else {
            // The contract forbids such a tag.
            return Some(Status::IoError);
        };
        *slot = Some(Active {
            io,
            started: 0,
            all_started: false,
            children: 0,
            status: Status::Ok,
            targets: 0,
            failed: 0,
        });
        self.waiting.push_back(io.tag);
        if self.waiting.len() == 1 {
            self.start_parts();
        }
        if self.ended.back().is_none_or(|ended| ended.tag != io.tag) {
            return None;
        }
        self.ended.pop_back().map(|ended| ended.status)
    }

    /// Reports an I/O with the next completions.
    pub(crate) fn report_later(&mut self, tag: Tag, status: Status) {
        self.ended.push_back(Completion { tag, status });
    }

    /// Starts parts of the waiting I/Os, a bounded number of them.
    fn start_parts(&mut self) {
        // Also what follows may owe pieces: `wait` then asks for the next poll.
        self.compute_pending();
        self.is_stuck = false;
        for _ in 0..PARTS_PER_CALL {
            let Some(&tag) = self.waiting.front() else { return };
            let Some(active) = self.of(tag).copied() else {
                self.waiting.pop_front();
                continue;
            };
            if active.all_started {
                self.waiting.pop_front();
            } else if active.started == 0 && self.must_wait(&active.io) {
                self.waiting.pop_front();
                self.parked.push_back(tag);
            } else if !self.start_part(tag, &active) {
                self.is_stuck = true;
                return;
            }
        }
    }

    /// Whether the I/O changes the locked range.
    fn must_wait(&self, io: &Io) -> bool {
        let changes = !matches!(io.op, Op::Read | Op::Flush);
        let locked = |window: &Range<u64>| {
            io.offset < window.end && window.start < io.offset.saturating_add(io.len)
        };
        changes && self.window.as_ref().is_some_and(locked)
    }

    /// Starts the next part of an I/O. Returns whether there were enough free children.
    fn start_part(&mut self, tag: Tag, active: &Active) -> bool {
        let (io, level) = (active.io, self.array.layout.level);
        let wide = match (level, io.op) {
            (_, Op::Flush) => true,
            (Level::Raid0, Op::Unmap | Op::WriteZeroes) => true,
            (Level::Raid1, op) => op != Op::Read,
            (Level::Raid5f, Op::WriteZeroes) => true,
            _ => false,
        };
        if self.free.len() < if wide { self.members.len() } else { 1 } {
            return false;
        }
        if level == Level::Raid5f && !wide {
            return self.start_parity_part(tag, active);
        }
        self.enter(tag);
        if wide {
            self.start_everywhere(tag, &io);
        } else if level == Level::Raid1 {
            self.start_read(tag, &io);
        } else {
            let at = active.started;
            let place = self.array.layout.place(io.offset + at, io.len - at);
            self.note_started(tag, at + place.len);
            self.send(tag, at, place);
        }
        self.leave(tag);
        true
    }

    fn note_started(&mut self, tag: Tag, bytes: u64) {
        if let Some(active) = self.of(tag) {
            active.started = bytes;
            active.all_started = bytes >= active.io.len;
        }
    }

    fn free_child(&mut self, index: u16) {
        self.children[usize::from(index)].used = false;
        self.free.push(index);
    }

    fn of(&mut self, tag: Tag) -> Option<&mut Active> {
        self.active.get_mut(usize::from(tag.0))?.as_mut()
    }

    /// Keeps an I/O from ending while its parts are being started.
    fn enter(&mut self, tag: Tag) {
        if let Some(active) = self.of(tag) {
            active.children += 1;
        }
    }

    /// Ends the I/O if this was its last child.
    fn leave(&mut self, tag: Tag) {
        let Some(active) = self.of(tag) else { return };
        active.children -= 1;
        if active.children == 0 && active.all_started {
            self.finish(tag);
        }
    }

    /// Fails an I/O: no further part of it is started.
    fn fail(&mut self, tag: Tag, status: Status) {
        if let Some(active) = self.of(tag) {
            active.status = if status == Status::Ok { Status::IoError } else { status };
            active.all_started = true;
        }
    }

    fn note_failure(&mut self, tag: Tag, failure: Option<Failure>) {
        let Some(Some(active)) = self.active.get(usize::from(tag.0)) else { return };
        if let (Some(failure), Some(slot)) = (failure, self.failures.get_mut(usize::from(tag.0))) {
            let Io { op, offset, len, .. } = active.io;
            *slot = Some(Failure { op, offset: Some(offset), len, ..failure });
        }
    }

    /// Ends an I/O whose children have ended.
    fn finish(&mut self, tag: Tag) {
        let Some(active) = self.of(tag).copied() else { return };
        let level = self.array.layout.level;
        if level.is_redundant() && active.io.op != Op::Read {
            self.finish_change(tag, &active);
        } else {
            self.end(tag, active.status);
        }
    }

    /// Ends an I/O of the owner.
    fn end(&mut self, tag: Tag, status: Status) {
        let at = usize::from(tag.0);
        if status == Status::Ok {
            self.failures[at] = None;
        }
        self.active[at] = None;
        self.ended.push_back(Completion { tag, status });
    }

    /// As [`Channel::poll`].
    pub(crate) fn poll(&mut self, done: &mut [Completion]) -> usize {
        self.more = false;
        for at in 0..self.members.len() {
            self.take_completions(at);
        }
        self.tried = true;
        for _ in 0..self.refused.len() {
            if let Some(index) = self.refused.pop_front() {
                self.submit_child(index);
            }
        }
        self.start_parts();
        self.kick();
        let mut n = 0;
        while n < done.len()
            && let Some(completion) = self.ended.pop_front()
        {
            done[n] = completion;
            n += 1;
        }
        n
    }

    /// As [`Channel::kick`].
    pub(crate) fn kick(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.with > 0) {
            if let Some(channel) = &mut member.channel {
                channel.kick();
            }
        }
    }

    /// As [`Channel::wait`].
    pub(crate) fn wait(&self) -> Wait {
        let can_compute = self.parity.as_ref().is_some_and(Parity::can_compute);
        let can_start = (!self.waiting.is_empty() && !self.is_stuck) || can_compute;
        let can_start = can_start && self.free.len() >= self.members.len();
        if self.more
            || !self.ended.is_empty()
            || can_start
            || (!self.refused.is_empty() && !self.tried)
        {
            return Wait::Poll;
        }
        let busy = self.members.iter().filter(|member| member.with > 0);
        let waits = busy.filter_map(|member| member.channel.as_ref()).map(Channel::wait);
        let wait = waits.fold(Wait::Event, Wait::sooner);
        if self.refused.is_empty() {
            wait
        } else {
            wait.sooner(Wait::Until(Instant::now() + RETRY))
        }
    }

    /// As [`Channel::failure`].
    pub(crate) fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.get_mut(usize::from(tag.0))?.take()
    }

    /// As [`Channel::set_limiting`].
    pub(crate) fn set_limiting(&mut self, limiting: Limiting) {
        self.limiting = Some(limiting);
        for member in &mut self.members {
            if let Some(channel) = &mut member.channel {
                channel.set_limiting(limiting);
            }
        }
    }

    /// As [`Channel::set_wakes`].
    pub(crate) fn set_wakes(&mut self, wakes: bool) {
        self.wakes = wakes;
        for member in &mut self.members {
            if let Some(channel) = &mut member.channel {
                channel.set_wakes(wakes);
            }
        }
    }

    /// As [`Channel::abandon`].
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
        while let Some(tag) = self.waiting.pop_front().or_else(|| self.parked.pop_front()) {
            self.enter(tag);
            if self.of(tag).is_some_and(|active| !active.all_started) {
                self.fail(tag, Status::IoError);
            }
            self.leave(tag);
        }
        while let Some(index) = self.refused.pop_front() {
            self.end_child(index, Status::IoError);
        }
        self.abandon_pending();
        for member in &mut self.members {
            if let Some(channel) = &mut member.channel {
                channel.abandon();
            }
        }
    }
}
