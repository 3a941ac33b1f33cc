//! The I/O path of a crypto disk.
//!
//! A read or write goes through buffers of the channel, in pieces of up to [`PIECE`] bytes. An I/O
//! for which no buffer is free waits in `waiting`; pieces are started in the order of the I/Os.
#![expect(unsafe_code, reason = "copies between guests' segments and the channel's buffers")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{
    Bdev, BdevChannel, Buffer, Channel, Completion, Error, Failure, FailureKind, Io, Limiting, Op,
    Segment, Status, Stores, Submit, Tag, Wait, WakeFds, memory, within,
};
use zeroize::Zeroize;

use crate::keys::Key;

/// Bytes of a buffer.
pub(crate) const PIECE: usize = 64 << 10;
/// Buffers of a channel.
const BUFFERS: u16 = 16;
/// Pieces that are encrypted or decrypted in one call: some 25 µs each.
const PIECES_PER_CALL: usize = 4;
/// The interval of attempts while the base refuses I/O and has none outstanding.
const RETRY: Duration = Duration::from_millis(1);

pub(crate) struct CryptoChannel {
    base: BdevChannel,
    /// Keeps the bdev in use while the channel is open.
    disk: Arc<dyn Bdev>,
    key: Arc<Key>,
    block_size: usize,
    /// Reads, writes and write-zeroes of the owner, by tag.
    active: Box<[Option<Active>]>,
    /// Tags of active I/Os with pieces that were not started, in order.
    waiting: VecDeque<Tag>,
    /// I/Os that have ended and were not reported.
    ended: VecDeque<Completion>,
    /// Reasons of failed I/Os, by tag.
    failures: Box<[Option<Failure>]>,
    pieces: Box<[Piece]>,
    /// Indices of the pieces that are not in use.
    free: Vec<u16>,
    /// I/Os at the base.
    with_base: usize,
    /// The base has refused a piece.
    refused: bool,
    /// The base may have further completions.
    more: bool,
    abandoned: bool,
}

/// An I/O of the owner.
struct Active {
    io: Io,
    /// The bytes whose pieces were started.
    started: u64,
    /// Pieces at the base.
    pieces: u16,
    status: Status,
}

impl Active {
    fn is_started(&self) -> bool {
        self.started >= self.io.len
    }
}

/// A buffer, and the part of an I/O that uses it.
struct Piece {
    buffer: Buffer,
    /// The whole buffer or the beginning of it. It does not move while the base uses it.
    segment: [Segment; 1],
    tag: Tag,
    /// The offset in the I/O, and the length.
    at: u64,
    len: usize,
}

impl CryptoChannel {
    /// The depth with which the base is opened: a tag for each piece, and one for each I/O that has
    /// no data.
    pub(crate) fn base_depth(depth: u16) -> Result<u16, Error> {
        let text = || Error::Invalid(format!("a queue depth of {depth} is too large"));
        depth.checked_add(BUFFERS).ok_or_else(text)
    }

    pub(crate) fn new(disk: Arc<dyn Bdev>, key: Arc<Key>, base: BdevChannel, depth: u16) -> Self {
        let piece = |_| {
            let mut buffer = Buffer::new(PIECE);
            let segment = [Segment::new(buffer.bytes_mut().as_mut_ptr(), 0)];
            Piece { buffer, segment, tag: Tag(0), at: 0, len: 0 }
        };
        let block_size = usize::try_from(disk.block_size()).unwrap_or(PIECE);
        Self {
            base,
            disk,
            key,
            block_size,
            active: (0..depth).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(depth.into()),
            ended: VecDeque::with_capacity(depth.into()),
            failures: (0..depth).map(|_| None).collect(),
            pieces: (0..BUFFERS).map(piece).collect(),
            free: (0..BUFFERS).collect(),
            with_base: 0,
            refused: false,
            more: false,
            abandoned: false,
        }
    }

    #[cold]
    fn refuse(&mut self, io: &Io, errno: i32) -> Submit {
        self.note(io.tag, io.failed(FailureKind::Failed, errno));
        Submit::Done(Status::IoError)
    }

    fn note(&mut self, tag: Tag, failure: Failure) {
        if let Some(slot) = self.failures.get_mut(usize::from(tag.0)) {
            *slot = Some(failure);
        }
    }

    /// Passes on an I/O without data.
    ///
    /// # Safety
    /// As [`Channel::submit`].
    unsafe fn pass_on(&mut self, io: Io) -> Submit {
        let mut on_base = io;
        on_base.tag = Tag(io.tag.0 + BUFFERS);
        // SAFETY: the caller's promise; the I/O has no segments.
        match unsafe { self.base.submit(on_base) } {
            Submit::Queued => {
                self.with_base += 1;
                Submit::Queued
            }
            Submit::Done(status) => {
                self.take_failure(io.tag, on_base.tag, io.op, status);
                Submit::Done(status)
            }
            Submit::Full(_) => Submit::Full(io),
            Submit::Throttled(_) => Submit::Throttled(io),
        }
    }

    /// Keeps the base's reason of a failure.
    fn take_failure(&mut self, tag: Tag, on_base: Tag, op: Op, status: Status) {
        if status != Status::Ok
            && let Some(failure) = self.base.failure(on_base)
        {
            self.note(tag, Failure { op, ..failure });
        }
    }

    /// Starts pieces of the waiting I/Os, a bounded number of them.
    fn start_pieces(&mut self) {
        self.refused = false;
        for _ in 0..PIECES_PER_CALL {
            let Some(&tag) = self.waiting.front() else { return };
            let Some(index) = self.free.pop() else { return };
            if !self.start_piece(tag, index) {
                self.free.push(index);
                self.refused = true;
                return;
            }
        }
    }

    /// Starts the next piece of an I/O in a free buffer. Returns whether the base has taken it.
    fn start_piece(&mut self, tag: Tag, index: u16) -> bool {
        let slot = usize::from(index);
        let Some(Some(active)) = self.active.get_mut(usize::from(tag.0)) else { return true };
        let (io, at) = (active.io, active.started);
        let len = usize::try_from(io.len - at).map_or(PIECE, |left| left.min(PIECE));
        let piece = &mut self.pieces[slot];
        (piece.tag, piece.at, piece.len) = (tag, at, len);
        let offset = io.offset + at;
        let bytes = &mut piece.buffer.bytes_mut()[..len];
        if io.op != Op::Read {
            if io.op == Op::Write {
                // SAFETY: the I/O has not been reported.
                let segments = unsafe { io.segments() };
                let to = bytes.as_mut_ptr();
                // SAFETY: `to` has `len` bytes of this channel's own; the segments as above.
                unsafe { memory::gather(segments, at, to, len, Stores::Cached) };
            } else {
                bytes.fill(0);
            }
            let first = offset / self.block_size as u64;
            self.key.xts().encrypt(bytes, first, self.block_size);
        }
        piece.segment = [Segment::new(bytes.as_mut_ptr(), len)];
        let op = if io.op == Op::Read { Op::Read } else { Op::Write };
        let on_base = Io::rw(op, Tag(index), offset, len as u64, &piece.segment);
        // SAFETY: buffer and segment stay where they are, and are not used, until the base has
        // reported the piece.
        let submit = unsafe { self.base.submit(on_base) };
        if let Submit::Full(_) | Submit::Throttled(_) = submit {
            return false;
        }
        active.started = at + len as u64;
        active.pieces += 1;
        if active.is_started() {
            self.waiting.pop_front();
        }
        match submit {
            Submit::Done(status) => self.end_piece(index, status),
            _ => self.with_base += 1,
        }
        true
    }

    /// Ends a piece, and its I/O with the last piece.
    fn end_piece(&mut self, index: u16, status: Status) {
        let piece = &mut self.pieces[usize::from(index)];
        let (tag, at, len) = (piece.tag, piece.at, piece.len);
        self.free.push(index);
        let Some(slot) = self.active.get_mut(usize::from(tag.0)) else { return };
        let Some(active) = slot else { return };
        active.pieces -= 1;
        let io = active.io;
        if status != Status::Ok {
            active.status = status;
            if !active.is_started() {
                active.started = io.len;
                self.waiting.retain(|waiting| *waiting != tag);
            }
        } else if io.op == Op::Read && !self.abandoned {
            let bytes = &mut piece.buffer.bytes_mut()[..len];
            let first = (io.offset + at) / self.block_size as u64;
            self.key.xts().decrypt(bytes, first, self.block_size);
            // SAFETY: the I/O has not been reported.
            let segments = unsafe { io.segments() };
            // SAFETY: the bytes are this channel's own; the segments as above.
            unsafe { memory::scatter(segments, at, bytes.as_ptr(), len) };
        }
        if active.pieces == 0 && active.is_started() {
            self.ended.push_back(Completion { tag, status: active.status });
            *slot = None;
        }
        self.take_failure(tag, Tag(index), io.op, status);
    }

    /// Takes completions of the base, a bounded number of them.
    fn take_completions(&mut self) {
        let mut done = [Completion { tag: Tag(0), status: Status::Ok }; PIECES_PER_CALL];
        let n = self.base.poll(&mut done);
        self.more = n == done.len();
        self.with_base -= n;
        for Completion { tag, status } in done.into_iter().take(n) {
            match tag.0.checked_sub(BUFFERS) {
                None => self.end_piece(tag.0, status),
                Some(own) => {
                    if status != Status::Ok
                        && let Some(failure) = self.base.failure(tag)
                    {
                        self.note(Tag(own), failure);
                    }
                    self.ended.push_back(Completion { tag: Tag(own), status });
                }
            }
        }
    }
}

impl Channel for CryptoChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        let block_size = self.block_size as u64;
        match io.op {
            // SAFETY: by the caller's promise.
            Op::Flush | Op::Unmap => return unsafe { self.pass_on(io) },
            _ if self.disk.features().read_only && io.op != Op::Read => {
                return self.refuse(&io, libc::EROFS);
            }
            _ => {}
        }
        let whole = io.offset.is_multiple_of(block_size) && io.len.is_multiple_of(block_size);
        if !whole || !within(&io, self.disk.size_bytes()) {
            return self.refuse(&io, libc::EINVAL);
        }
        if io.len == 0 {
            return Submit::Done(Status::Ok);
        }
        let Some(slot @ None) = self.active.get_mut(usize::from(io.tag.0)) else {
            // The contract forbids such a tag.
            return self.refuse(&io, libc::EINVAL);
        };
        *slot = Some(Active { io, started: 0, pieces: 0, status: Status::Ok });
        self.waiting.push_back(io.tag);
        if self.waiting.len() == 1 {
            self.start_pieces();
        }
        Submit::Queued
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        self.base.wake_fds()
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.base.set_wakes(wakes);
    }

    fn set_limiting(&mut self, limiting: Limiting) {
        self.base.set_limiting(limiting);
    }

    fn wait(&self) -> Wait {
        let can_start = !self.waiting.is_empty() && !self.free.is_empty();
        if self.more || !self.ended.is_empty() || (can_start && !self.refused) {
            return Wait::Poll;
        }
        let base = if self.with_base > 0 { self.base.wait() } else { Wait::Event };
        if self.refused { base.sooner(Wait::Until(Instant::now() + RETRY)) } else { base }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.failures.get_mut(usize::from(tag.0))?.take()
    }

    fn kick(&mut self) {
        self.base.kick();
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.with_base > 0 {
            self.take_completions();
        } else {
            self.more = false;
        }
        if !self.waiting.is_empty() {
            self.start_pieces();
            self.base.kick();
        }
        let mut n = 0;
        while n < done.len()
            && let Some(completion) = self.ended.pop_front()
        {
            done[n] = completion;
            n += 1;
        }
        n
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        while let Some(tag) = self.waiting.pop_front() {
            let Some(slot) = self.active.get_mut(usize::from(tag.0)) else { continue };
            let Some(active) = slot else { continue };
            (active.started, active.status) = (active.io.len, Status::IoError);
            if active.pieces == 0 {
                self.ended.push_back(Completion { tag, status: Status::IoError });
                *slot = None;
            }
        }
        self.base.abandon();
    }
}

impl Drop for CryptoChannel {
    fn drop(&mut self) {
        // They have held data in clear.
        self.pieces.iter_mut().for_each(|piece| piece.buffer.bytes_mut().zeroize());
    }
}
