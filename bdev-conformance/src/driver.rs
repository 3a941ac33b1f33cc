//! Drives a channel and checks its side of the contract: each I/O ends once, with its own tag.
#![expect(unsafe_code, reason = "submits I/Os")]

use std::sync::Arc;

use bdev::{
    Bdev, BdevChannel, Channel, Completion, Io, Limiting, Op, QosUser, Segment, Status, Submit, Tag,
};

/// Fills memory around and between segments, which nobody may touch.
pub(crate) const GUARD: u8 = 0xe7;

/// Memory for one I/O: segments with a gap before and behind each.
pub struct Memory {
    bytes: Vec<u8>,
    segments: Vec<Segment>,
    /// Where each segment begins in `bytes`.
    starts: Vec<usize>,
}

impl Memory {
    /// Segments of `lens` bytes, each at an address that is `shift` more than a multiple of 4096.
    pub fn new(lens: &[usize], shift: usize) -> Self {
        const PAGE: usize = 4096;
        let room = |len: &usize| (shift + len + 2).next_multiple_of(PAGE);
        let total: usize = lens.iter().map(room).sum();
        let mut bytes = vec![GUARD; total + 2 * PAGE];
        let mut at = PAGE + bytes.as_ptr().align_offset(PAGE);
        let mut starts = Vec::new();
        let mut segments = Vec::new();
        let base = bytes.as_mut_ptr();
        for len in lens {
            starts.push(at + shift);
            segments.push(Segment::new(base.wrapping_add(at + shift), *len));
            at += room(len);
        }
        Self { bytes, segments, starts }
    }

    /// One aligned segment of `len` bytes, or none.
    pub fn plain(len: usize) -> Self {
        if len == 0 { Self::new(&[], 0) } else { Self::new(&[len], 0) }
    }

    fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Writes into the segments.
    pub fn fill(&mut self, data: &[u8]) {
        let mut rest = data;
        for (start, segment) in self.starts.iter().zip(&self.segments) {
            let (now, later) = rest.split_at(segment.len());
            self.bytes[*start..start + now.len()].copy_from_slice(now);
            rest = later;
        }
        assert!(rest.is_empty());
    }

    /// What the segments hold. Checks that nothing round them was touched.
    pub fn data(&self) -> Vec<u8> {
        let mut data = Vec::new();
        let mut end = 0;
        for (start, segment) in self.starts.iter().zip(&self.segments) {
            assert!(self.bytes[end..*start].iter().all(|&b| b == GUARD), "wrote before a segment");
            end = start + segment.len();
            data.extend_from_slice(&self.bytes[*start..end]);
        }
        assert!(self.bytes[end..].iter().all(|&b| b == GUARD), "wrote behind a segment");
        data
    }
}

/// An I/O that is outstanding or has ended, with its memory.
pub struct Request {
    /// The operation.
    pub op: Op,
    /// Its first byte on the disk.
    pub offset: u64,
    /// The number of bytes.
    pub len: u64,
    /// Whether a write of zeroes may unmap the range.
    pub may_unmap: bool,
    /// Its segments: none, except for reads and writes.
    pub memory: Memory,
}

impl Request {
    /// A read into the memory, or a write of what it holds.
    pub fn rw(op: Op, offset: u64, memory: Memory) -> Self {
        Self { op, offset, len: memory.len() as u64, may_unmap: false, memory }
    }

    /// An operation without data.
    pub fn plain(op: Op, offset: u64, len: u64) -> Self {
        Self { op, offset, len, may_unmap: false, memory: Memory::plain(0) }
    }

    fn io(&self, tag: Tag) -> Io {
        match self.op {
            Op::Read | Op::Write => {
                Io::rw(self.op, tag, self.offset, self.len, &self.memory.segments)
            }
            _ => Io::plain(self.op, tag, self.offset, self.len).unmapping(self.may_unmap),
        }
    }
}

/// A channel with what is outstanding on it.
pub struct Driver {
    channel: BdevChannel,
    outstanding: Vec<Option<Request>>,
    batch: usize,
}

impl Driver {
    /// Opens a channel of the disk for `depth` I/Os, with the disk's rate limits.
    pub fn new(disk: &Arc<dyn Bdev>, depth: u16) -> Self {
        let mut channel = BdevChannel::open(disk, depth).unwrap();
        channel.set_limiting(Limiting::Apply(QosUser::new(1)));
        let outstanding = (0..depth).map(|_| None).collect();
        Self { channel, outstanding, batch: usize::from(depth) }
    }

    /// From now on asks for so many completions at a time.
    pub fn set_batch(&mut self, batch: usize) {
        self.batch = batch;
    }

    /// The requests that were submitted and have not ended.
    pub fn outstanding(&self) -> impl Iterator<Item = &Request> {
        self.outstanding.iter().flatten()
    }

    /// A tag that is not in use.
    pub fn free_tag(&self) -> Option<Tag> {
        let i = self.outstanding.iter().position(Option::is_none)?;
        Some(Tag(i as u16))
    }

    /// Submits under a tag that is free. `Ok(None)`: it is queued.
    ///
    /// # Errors
    /// The channel is full.
    pub fn submit(
        &mut self,
        tag: Tag,
        request: Request,
    ) -> Result<Option<(Request, Status)>, Request> {
        let slot = &mut self.outstanding[usize::from(tag.0)];
        assert!(slot.is_none());
        let is_same = |io: &Io| {
            let same = (io.op, io.tag, io.offset, io.len);
            assert_eq!(same, (request.op, tag, request.offset, request.len));
        };
        loop {
            // SAFETY: the request is kept, unmoved on the heap, until it has been reported.
            return match unsafe { self.channel.submit(request.io(tag)) } {
                Submit::Done(status) => Ok(Some((request, status))),
                Submit::Queued => {
                    *slot = Some(request);
                    Ok(None)
                }
                Submit::Full(io) => {
                    is_same(&io);
                    Err(request)
                }
                Submit::Throttled(io) => {
                    is_same(&io);
                    std::thread::yield_now();
                    continue;
                }
            };
        }
    }

    /// One visit: what has ended.
    pub fn visit(&mut self) -> Vec<(Request, Status)> {
        self.channel.kick();
        let nobody = Completion { tag: Tag(u16::MAX), status: Status::Unsupported };
        let mut done = vec![nobody; self.batch];
        let n = self.channel.poll(&mut done);
        let finish = |c: &Completion| {
            let request = self.outstanding[usize::from(c.tag.0)].take();
            (request.expect("reported once, while outstanding"), c.status)
        };
        let ended: Vec<_> = done[..n].iter().map(finish).collect();
        if n == 0 {
            std::thread::yield_now();
        }
        ended
    }

    /// Does one I/O from start to end.
    pub fn run(&mut self, request: Request) -> (Request, Status) {
        let tag = self.free_tag().expect("a free tag");
        let ended = self.submit(tag, request).unwrap_or_else(|_| panic!("full with one I/O"));
        if let Some(ended) = ended {
            return ended;
        }
        loop {
            if let Some(ended) = self.visit().pop() {
                return ended;
            }
        }
    }

    /// Writes, to the end.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Status {
        let mut memory = Memory::plain(data.len());
        memory.fill(data);
        self.run(Request::rw(Op::Write, offset, memory)).1
    }

    /// Reads, to the end.
    pub fn read(&mut self, offset: u64, len: usize) -> (Vec<u8>, Status) {
        let (request, status) = self.run(Request::rw(Op::Read, offset, Memory::plain(len)));
        (request.memory.data(), status)
    }

    /// Does an operation without data, to the end.
    pub fn plain(&mut self, op: Op, offset: u64, len: u64) -> Status {
        self.run(Request::plain(op, offset, len)).1
    }
}
