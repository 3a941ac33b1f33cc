//! raid5f: whole stripes with their parity, and data that is computed from the other members.
//!
//! A stripe is written with the parity of the guest's segments. A guest that changes them meanwhile
//! corrupts the parity of what it is writing, and of nothing else: a stripe is always written as a
//! whole, by one I/O. Strips of a member that is missing, or that fails a read, are computed from all
//! other members, a bounded number of bytes at a time; what is not computed yet waits in [`Parity::uncomputed`].
#![expect(unsafe_code, reason = "copies between guests' segments and the channel's buffers")]

use std::collections::VecDeque;

use bdev::{Buffer, Io, Op, Segment, Status, Stores, Tag, memory};

use super::{Active, Child, Kind, Lane};
use crate::array::bit;
use crate::layout::{Layout, Place};

/// Bytes that are computed at a time.
const PIECE: usize = 64 << 10;
/// Bytes that a piece counts for at least.
const PIECE_MIN: u64 = 8 << 10;
/// Bytes of parity under way in a channel, if a strip is not longer, and the most buffers for them.
const PARITY_BYTES: u64 = 1 << 20;
const STRIPES_MAX: u64 = 16;
/// Pieces that are computed in a channel at the same time.
const SOURCES: u16 = 2;
/// Bytes that are computed in one call, if members read at once.
const BYTES_PER_CALL: u64 = 8 * PIECE as u64;
/// Further pieces that may wait.
const UNCOMPUTED_MAX: usize = 64;

/// The buffers of a channel of raid5f.
pub(super) struct Parity {
    /// A strip of parity each.
    strips: Box<[OwnBuffer]>,
    free_strips: Vec<u16>,
    sources: Box<[Sources]>,
    free_sources: Vec<u16>,
    scratch: Buffer,
    /// Pieces to compute: their I/O, offset in it, and length.
    uncomputed: VecDeque<(Tag, u64, u64)>,
}

/// A buffer and its segment. Both are on the heap, where they do not move while a member uses them.
pub(super) struct OwnBuffer {
    buffer: Buffer,
    segment: Box<[Segment; 1]>,
}

/// A piece that is being computed, with the bytes of each other member.
struct Sources {
    tag: Tag,
    at: u64,
    len: usize,
    left: usize,
    failed: bool,
    buffers: Box<[OwnBuffer]>,
}

impl OwnBuffer {
    pub(super) fn new(len: usize) -> Self {
        let mut buffer = Buffer::new(len);
        let segment = Box::new([Segment::new(buffer.bytes_mut().as_mut_ptr(), len)]);
        Self { buffer, segment }
    }

    pub(super) fn len(&self) -> usize {
        self.buffer.bytes().len()
    }

    fn set_len(&mut self, len: usize) {
        *self.segment = [Segment::new(self.buffer.bytes_mut().as_mut_ptr(), len)];
    }
}

/// Adds `from` to `to`, bit by bit without carry.
pub(crate) fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Parity {
    pub(super) fn new(layout: &Layout, pool: u16) -> Self {
        let strips = (PARITY_BYTES / layout.strip).clamp(2, STRIPES_MAX);
        let piece = usize_of(layout.strip).min(PIECE);
        let others = layout.members() - 1;
        let sources = |_| Sources {
            tag: Tag(0),
            at: 0,
            len: 0,
            left: 0,
            failed: false,
            buffers: (0..others).map(|_| OwnBuffer::new(piece)).collect(),
        };
        let strips: Box<[_]> =
            (0..strips).map(|_| OwnBuffer::new(usize_of(layout.strip))).collect();
        Self {
            free_strips: (0..u16::try_from(strips.len()).unwrap_or(1)).collect(),
            strips,
            sources: (0..SOURCES).map(sources).collect(),
            free_sources: (0..SOURCES).collect(),
            scratch: Buffer::new(piece),
            uncomputed: VecDeque::with_capacity(UNCOMPUTED_MAX + usize::from(pool)),
        }
    }

    /// Computes the parity of a stripe at `at` of a write.
    ///
    /// # Safety
    /// The I/O has not been reported.
    unsafe fn compute(&mut self, strip: u16, io: &Io, at: u64, data: u64, len: u64) {
        let parity = self.strips[usize::from(strip)].buffer.bytes_mut();
        parity.fill(0);
        // SAFETY: by the caller's promise.
        let segments = unsafe { io.segments() };
        let scratch = self.scratch.bytes_mut();
        for strip in 0..data {
            for (n, part) in parity.chunks_mut(scratch.len()).enumerate() {
                let from = at + strip * len + (n * scratch.len()) as u64;
                let to = scratch.as_mut_ptr();
                // SAFETY: `to` has at least as many bytes, of this channel's own; the segments are
                // valid by the caller's promise.
                unsafe { memory::gather(segments, from, to, part.len(), Stores::Cached) };
                xor(part, scratch);
            }
        }
    }

    pub(super) fn strip(&mut self, strip: u16) -> Option<&mut OwnBuffer> {
        self.strips.get_mut(usize::from(strip))
    }

    /// The buffer of a piece that this read uses.
    pub(super) fn source(&mut self, piece: u16, io: &Io) -> Option<&mut OwnBuffer> {
        // SAFETY: the read is under way, so its segment is valid.
        let segment = unsafe { io.segments() }.as_ptr();
        let mut buffers = self.sources.get_mut(usize::from(piece))?.buffers.iter_mut();
        buffers.find(|buffer| buffer.segment.as_ptr() == segment)
    }

    /// Whether computed pieces can be started, apart from free children.
    pub(super) fn can_compute(&self) -> bool {
        !self.uncomputed.is_empty() && !self.free_sources.is_empty()
    }
}

impl Lane {
    /// Starts a stripe of a write, or a piece of a read. Returns whether there was room.
    pub(super) fn start_parity_part(&mut self, tag: Tag, active: &Active) -> bool {
        match active.io.op {
            Op::Write => self.start_stripe(tag, active),
            _ => self.start_strip_read(tag, active),
        }
    }

    fn start_stripe(&mut self, tag: Tag, active: &Active) -> bool {
        let (io, at, members) = (active.io, active.started, self.members.len());
        let Some(parity) = self.parity.as_mut().filter(|_| self.free.len() >= members) else {
            return false;
        };
        let Some(buffer) = parity.free_strips.pop() else { return false };
        let layout = &self.array.layout;
        let (strip, data) = (layout.strip, members as u64 - 1);
        let stripe = (io.offset + at) / layout.stripe();
        let parity_member = layout.parity_member(stripe);
        // SAFETY: the I/O has not been reported.
        unsafe { parity.compute(buffer, &io, at, data, strip) };
        self.enter(tag);
        self.note_started(tag, at + strip * data);
        let targets = self.targets(&io);
        for (n, from) in (0..members - 1).zip((at..).step_by(usize_of(strip))) {
            let place = self.array.layout.place(io.offset + from, strip);
            debug_assert_eq!(place.member, self.array.layout.data_member(stripe, n));
            if targets & bit(place.member) != 0 {
                self.add_target(tag, place.member);
                self.send(tag, from, place);
            }
        }
        if targets & bit(parity_member) != 0 {
            self.add_target(tag, parity_member);
            self.send_parity(tag, buffer, parity_member, stripe);
        } else if let Some(parity) = &mut self.parity {
            parity.free_strips.push(buffer);
        }
        self.leave(tag);
        true
    }

    /// Writes a strip of parity. A child is free.
    fn send_parity(&mut self, tag: Tag, buffer: u16, member: usize, stripe: u64) {
        let (Some(index), Some(parity)) = (self.free.pop(), &self.parity) else { return };
        let strip = self.array.layout.strip;
        let offset = self.array.layout.extents[member].offset + stripe * strip;
        let segments = &*parity.strips[usize::from(buffer)].segment;
        let io = Io::rw(Op::Write, Tag(index), offset, strip, segments);
        self.enter(tag);
        let kind = Kind::Parity(buffer);
        self.children[usize::from(index)] = Child { used: true, tag, member, io, at: 0, kind };
        self.members[member].bytes += strip;
        self.submit_child(index);
    }

    pub(super) fn free_strip(&mut self, buffer: u16) {
        if let Some(parity) = &mut self.parity {
            parity.free_strips.push(buffer);
        }
    }

    fn start_strip_read(&mut self, tag: Tag, active: &Active) -> bool {
        let (io, at) = (active.io, active.started);
        let place = self.array.layout.place(io.offset + at, io.len - at);
        if self.in_sync & bit(place.member) == 0 {
            let Some(parity) = self.parity.as_mut().filter(|p| p.uncomputed.len() < UNCOMPUTED_MAX)
            else {
                return false;
            };
            parity.uncomputed.push_back((tag, at, place.len));
            self.enter(tag);
            self.note_started(tag, at + place.len);
            return true;
        }
        if self.free.is_empty() {
            return false;
        }
        self.enter(tag);
        self.note_started(tag, at + place.len);
        self.send(tag, at, place);
        self.leave(tag);
        true
    }

    /// Lets the other members stand in for one that has failed a read. Returns whether they can.
    pub(super) fn compute_instead(&mut self, child: &Child) -> bool {
        let others = !bit(child.member) & self.all();
        if self.abandoned || self.in_sync & others != others {
            return false;
        }
        let Some(parity) = &mut self.parity else { return false };
        // The child's share of the I/O becomes that of the piece.
        parity.uncomputed.push_back((child.tag, child.at, child.io.len));
        true
    }

    fn all(&self) -> u64 {
        (0..self.members.len()).fold(0, |mask, slot| mask | bit(slot))
    }

    /// Starts to compute what is pending, as far as there is room, and a bounded number of bytes.
    pub(super) fn compute_pending(&mut self) {
        let mut bytes = 0;
        while bytes < BYTES_PER_CALL && self.free.len() >= self.members.len() {
            let Some(parity) = &mut self.parity else { return };
            let Some(&(tag, at, len)) = parity.uncomputed.front() else { return };
            let Some(slot) = parity.free_sources.pop() else { return };
            let piece = len.min(parity.scratch.bytes().len() as u64);
            // A small piece costs an I/O at each member as well.
            bytes += piece.max(PIECE_MIN);
            match len - piece {
                0 => drop(parity.uncomputed.pop_front()),
                left => parity.uncomputed[0] = (tag, at + piece, left),
            }
            if self.of(tag).is_none_or(|active| active.status != Status::Ok) {
                self.free_source(slot);
            } else {
                self.read_sources(tag, slot, at, piece);
            }
            if piece == len {
                self.leave(tag);
            }
        }
    }

    fn free_source(&mut self, slot: u16) {
        if let Some(parity) = &mut self.parity {
            parity.free_sources.push(slot);
        }
    }

    /// Reads a piece's range from all members but its own.
    fn read_sources(&mut self, tag: Tag, slot: u16, at: u64, len: u64) {
        let Some(io) = self.of(tag).map(|active| active.io) else { return self.free_source(slot) };
        let layout = &self.array.layout;
        let Place { member: own, offset, .. } = layout.place(io.offset + at, len);
        let within = offset - layout.extents[own].offset;
        let others = self.all() & !bit(own);
        let can = self.in_sync & others == others;
        let Some(parity) = self.parity.as_mut().filter(|_| can) else {
            self.fail(tag, Status::IoError);
            return self.free_source(slot);
        };
        let sources = &mut parity.sources[usize::from(slot)];
        (sources.tag, sources.at, sources.len) = (tag, at, usize_of(len));
        (sources.left, sources.failed) = (self.members.len() - 1, false);
        sources.buffers.iter_mut().for_each(|buffer| buffer.set_len(usize_of(len)));
        self.enter(tag);
        let members = (0..self.members.len()).filter(|member| *member != own);
        for (n, member) in members.enumerate() {
            let (Some(index), Some(parity)) = (self.free.pop(), &self.parity) else { return };
            let offset = self.array.layout.extents[member].offset + within;
            let segments = &*parity.sources[usize::from(slot)].buffers[n].segment;
            let io = Io::rw(Op::Read, Tag(index), offset, len, segments);
            let kind = Kind::Source(slot);
            self.children[usize::from(index)] = Child { used: true, tag, member, io, at, kind };
            self.members[member].bytes += len;
            self.submit_child(index);
        }
    }

    /// Ends the read of one member for a piece; with the last one, computes the piece.
    pub(super) fn end_source(&mut self, slot: u16, ok: bool) {
        let Some(parity) = &mut self.parity else { return };
        let sources = &mut parity.sources[usize::from(slot)];
        sources.left -= 1;
        sources.failed |= !ok;
        if sources.left > 0 {
            return;
        }
        let (tag, at, len, failed) = (sources.tag, sources.at, sources.len, sources.failed);
        if failed || self.abandoned {
            self.fail(tag, Status::IoError);
        } else if let Some((first, rest)) = sources.buffers.split_first_mut() {
            let sum = &mut first.buffer.bytes_mut()[..len];
            rest.iter().for_each(|other| xor(sum, &other.buffer.bytes()[..len]));
            if let Some(Some(active)) = self.active.get(usize::from(tag.0)) {
                // SAFETY: the I/O has not been reported.
                let segments = unsafe { active.io.segments() };
                // SAFETY: the bytes are this channel's own; the segments as above.
                unsafe { memory::scatter(segments, at, sum.as_ptr(), len) };
            }
        }
        self.free_source(slot);
        self.leave(tag);
    }

    /// Ends what is pending, after [`Lane::abandon`].
    pub(super) fn abandon_pending(&mut self) {
        while let Some((tag, ..)) =
            self.parity.as_mut().and_then(|parity| parity.uncomputed.pop_front())
        {
            self.fail(tag, Status::IoError);
            self.leave(tag);
        }
    }
}
