//! A command that takes several I/Os: a list of steps, each with one or more I/Os.

use arrayvec::ArrayVec;
use bdev::{Cuts, Features, Op as Io, Period};
use guest_memory::{Segment, usize_of};
use scsi::{Facts, Failure, Flush, Op, Plan, Range};
use virtqueue::chain::Chain;

use crate::parts::Parts;

/// Bytes that one I/O of a job reads, or writes from its buffer. A block is not longer.
pub(crate) const CHUNK_BYTES: usize = 32 << 10;
/// Bytes of one I/O without data.
const EXTENT_BYTES: u64 = 16 << 20;
/// Ranges of an UNMAP.
const RANGES_MAX: usize = 256;

/// What the data that a step reads is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compare {
    Nothing,
    /// The same bytes of data-out.
    DataOut,
    /// The first block of data-out, for each block.
    FirstBlock,
}

/// A step of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Flush,
    Read(Compare),
    /// Writes data-out, from this byte on.
    Write(u64),
    /// Writes the buffer again and again.
    Repeat,
    /// Reads, and writes the bitwise OR of that and data-out.
    Or,
    /// Reads from this byte of the disk on, and writes the same.
    Copy(u64),
    /// Writes zeroes without data. They may be written by unmapping.
    Zeroes(bool),
    Unmap,
}

/// An I/O of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Read into the buffer, or write from it.
    Buffer { op: Io, offset: u64, len: u64 },
    /// Write bytes of data-out, from byte `from` on.
    DataOut { from: u64, offset: u64, len: u64 },
    /// An operation without data.
    Plain { op: Io, offset: u64, len: u64, may_unmap: bool },
}

/// Whether other commands are kept from the blocks of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Exclusive {
    #[default]
    No,
    /// The job is not exclusive, and waits for an exclusive command on the same blocks.
    Excluded,
    /// The job waits until it can become exclusive.
    Wanted,
    /// No new command begins to change the blocks, and those that have begun are waited for.
    Draining(Period),
    /// The job is exclusive.
    Held,
}

/// Jobs of a target in one queue. Further commands that need one wait. Each has some 80 KiB.
const JOBS: u8 = 2;

/// The jobs of a target in one queue. Other targets have jobs of their own, so that none waits for
/// the I/O of another.
pub(crate) struct Jobs {
    all: [Job; JOBS as usize],
    free: ArrayVec<u8, { JOBS as usize }>,
    /// Segments of parts of data-out: a slot for each job.
    pub(crate) cuts: Cuts,
}

impl Jobs {
    pub(crate) fn new() -> Self {
        let all = std::array::from_fn(|_| Job::new());
        Self { all, free: (0..JOBS).collect(), cuts: Cuts::new(JOBS.into()) }
    }

    /// Returns whether one is free.
    pub(crate) fn any_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a free one.
    pub(crate) fn take(&mut self) -> Option<u8> {
        self.free.pop()
    }

    /// Gives one back.
    pub(crate) fn give_back(&mut self, n: u8) {
        self.free.push(n);
    }

    /// Returns one that was taken.
    pub(crate) fn get(&mut self, n: u8) -> &mut Job {
        &mut self.all[usize::from(n)]
    }
}

/// A command that takes several I/Os. A queue has a few of these for each target and lends them to
/// its requests.
pub(crate) struct Job {
    steps: ArrayVec<Step, 4>,
    /// The step, and its bytes that are done.
    step: usize,
    done: u64,
    /// Bytes of the I/O in flight.
    len: u64,
    /// Of [`Step::Or`] and [`Step::Copy`]: the buffer has what is to be written.
    has_read: bool,
    /// Bytes of the plan's range, and its first byte.
    total: u64,
    offset: u64,
    block_bytes: u64,
    ranges: ArrayVec<Range, RANGES_MAX>,
    /// The range of `ranges` that is being unmapped.
    range: usize,
    pub(crate) exclusive: Exclusive,
    /// What the I/O reads or writes.
    buffer: Box<[u8; CHUNK_BYTES]>,
    /// What data that was read is compared with.
    expected: Box<[u8; CHUNK_BYTES]>,
    /// The segment of an I/O on the buffer.
    segment: [Segment; 1],
}

impl Job {
    pub(crate) fn new() -> Self {
        Self {
            steps: ArrayVec::new(),
            step: 0,
            done: 0,
            len: 0,
            has_read: false,
            total: 0,
            offset: 0,
            block_bytes: 1,
            ranges: ArrayVec::new(),
            range: 0,
            exclusive: Exclusive::No,
            buffer: Box::new([0; CHUNK_BYTES]),
            expected: Box::new([0; CHUNK_BYTES]),
            segment: [Segment::new(std::ptr::null_mut(), 0)],
        }
    }

    /// Begins a plan. `ranges`: of an UNMAP. Returns the plan, which a WRITE SAME of zeroes changes.
    pub(crate) fn begin(
        &mut self,
        plan: Plan,
        ranges: &[Range],
        (facts, features): (&Facts, Features),
        (parts, chain): (&Parts, &Chain),
    ) -> Plan {
        self.block_bytes = facts.block_bytes.into();
        self.total = facts.bytes(plan.range.blocks);
        self.offset = facts.bytes(plan.range.lba);
        self.ranges.clear();
        // `scsi` accepts no more than fit.
        self.ranges.extend(ranges.iter().copied().take(RANGES_MAX));
        (self.step, self.done, self.len, self.range) = (0, 0, 0, 0);
        self.has_read = false;
        self.exclusive = if plan.exclusive { Exclusive::Wanted } else { Exclusive::No };
        let plan = self.prepare_same(plan, parts, chain);
        self.steps.clear();
        if plan.flush == Flush::Before {
            self.steps.push(Step::Flush);
        }
        let flush_after = plan.flush == Flush::After;
        match plan.op {
            Op::Read | Op::Verify => self.steps.push(Step::Read(Compare::Nothing)),
            Op::Write => self.steps.push(Step::Write(0)),
            Op::VerifyData => self.steps.push(Step::Read(Compare::DataOut)),
            Op::VerifyPattern => self.steps.push(Step::Read(Compare::FirstBlock)),
            Op::WriteAndVerify { compare } => {
                let compare = if compare { Compare::DataOut } else { Compare::Nothing };
                self.steps.push(Step::Write(0));
                // What is read back has to come from the medium.
                if flush_after {
                    self.steps.push(Step::Flush);
                }
                self.steps.push(Step::Read(compare));
                return plan;
            }
            Op::WriteSame { .. } => self.steps.push(Step::Repeat),
            Op::WriteZeroes { unmap } if features.write_zeroes => {
                self.steps.push(Step::Zeroes(unmap));
            }
            Op::WriteZeroes { .. } => {
                self.buffer.fill(0);
                self.steps.push(Step::Repeat);
            }
            Op::Unmap => self.steps.push(Step::Unmap),
            Op::CompareAndWrite => {
                self.steps.push(Step::Read(Compare::DataOut));
                self.steps.push(Step::Write(self.total));
            }
            Op::OrWrite => self.steps.push(Step::Or),
            Op::Copy { from, .. } => self.steps.push(Step::Copy(facts.bytes(from))),
            Op::Flush => self.steps.push(Step::Flush),
        }
        if flush_after {
            self.steps.push(Step::Flush);
        }
        plan
    }

    /// Begins to wait for all commands that change blocks, without an I/O.
    pub(crate) fn begin_drain(&mut self) {
        self.steps.clear();
        self.step = 0;
        self.exclusive = Exclusive::Wanted;
    }

    /// Returns whether `overlaps` is true for any range that it changes; `range` is its plan's.
    pub(crate) fn changes(&self, range: Range, overlaps: impl Fn(Range) -> bool) -> bool {
        overlaps(range) || self.ranges.iter().any(|range| overlaps(*range))
    }

    /// Fills the buffer with the block of a WRITE SAME.
    fn prepare_same(&mut self, plan: Plan, parts: &Parts, chain: &Chain) -> Plan {
        let Op::WriteSame { .. } = plan.op else { return plan };
        let block = usize_of(self.block_bytes);
        let (first, rest) = self.buffer.split_at_mut(block.min(CHUNK_BYTES));
        parts.get_data_out(chain, 0, first);
        if first.iter().all(|byte| *byte == 0) {
            return plan.zeroed();
        }
        rest.chunks_exact_mut(block).for_each(|other| other.copy_from_slice(first));
        plan
    }

    /// Returns the next I/O. `None`: the job is done.
    pub(crate) fn next(&mut self) -> Option<Work> {
        loop {
            let step = *self.steps.get(self.step)?;
            if let Some(work) = self.work(step) {
                self.len = match work {
                    Work::Buffer { len, .. }
                    | Work::DataOut { len, .. }
                    | Work::Plain { len, .. } => len,
                };
                return Some(work);
            }
            self.step += 1;
            self.done = 0;
        }
    }

    /// Returns the next I/O of a step. `None`: the step is done.
    fn work(&mut self, step: Step) -> Option<Work> {
        let left = self.total - self.done.min(self.total);
        let offset = self.offset + self.done;
        let chunk = left.min(self.whole_blocks(CHUNK_BYTES as u64));
        let extent = left.min(self.whole_blocks(EXTENT_BYTES));
        match step {
            // `done` of a flush that has ended is 1.
            Step::Flush => {
                let flush = Work::Plain { op: Io::Flush, offset: 0, len: 0, may_unmap: false };
                (self.done == 0).then_some(flush)
            }
            Step::Unmap => self.next_unmap(),
            _ if left == 0 => None,
            Step::Read(_) => Some(Work::Buffer { op: Io::Read, offset, len: chunk }),
            Step::Or | Step::Copy(_) if self.has_read => {
                Some(Work::Buffer { op: Io::Write, offset, len: chunk })
            }
            Step::Copy(from) => {
                Some(Work::Buffer { op: Io::Read, offset: from + self.done, len: chunk })
            }
            Step::Or => Some(Work::Buffer { op: Io::Read, offset, len: chunk }),
            Step::Repeat => Some(Work::Buffer { op: Io::Write, offset, len: chunk }),
            Step::Write(from) => Some(Work::DataOut { from: from + self.done, offset, len: left }),
            Step::Zeroes(may_unmap) => {
                Some(Work::Plain { op: Io::WriteZeroes, offset, len: extent, may_unmap })
            }
        }
    }

    fn next_unmap(&mut self) -> Option<Work> {
        loop {
            let range = self.ranges.get(self.range)?;
            let total = range.blocks.saturating_mul(self.block_bytes);
            if self.done < total {
                // The range is on the disk.
                let offset = range.lba * self.block_bytes + self.done;
                let len = (total - self.done).min(self.whole_blocks(EXTENT_BYTES));
                return Some(Work::Plain { op: Io::Unmap, offset, len, may_unmap: true });
            }
            self.range += 1;
            self.done = 0;
        }
    }

    fn whole_blocks(&self, bytes: u64) -> u64 {
        bytes / self.block_bytes * self.block_bytes
    }

    /// The I/O in flight has succeeded.
    ///
    /// # Errors
    /// What was read is not what was expected.
    pub(crate) fn io_succeeded(&mut self, parts: &Parts, chain: &Chain) -> Result<(), Failure> {
        match self.steps.get(self.step) {
            Some(Step::Read(compare)) => self.compare(*compare, parts, chain)?,
            Some(step @ (Step::Or | Step::Copy(_))) => {
                self.has_read = !self.has_read;
                if self.has_read {
                    if *step == Step::Or {
                        self.or_data_out(parts, chain);
                    }
                    // Done when it has been written.
                    return Ok(());
                }
            }
            _ => {}
        }
        self.done += self.len.max(1);
        Ok(())
    }

    /// Changes the buffer to the bitwise OR of it and data-out.
    fn or_data_out(&mut self, parts: &Parts, chain: &Chain) {
        let len = usize_of(self.len).min(CHUNK_BYTES);
        let others = &mut self.expected[..len];
        parts.get_data_out(chain, self.done, others);
        self.buffer.iter_mut().zip(others).for_each(|(byte, other)| *byte |= *other);
    }

    fn compare(&mut self, compare: Compare, parts: &Parts, chain: &Chain) -> Result<(), Failure> {
        // A chunk at most.
        let len = usize_of(self.len).min(CHUNK_BYTES);
        let block = usize_of(self.block_bytes).min(CHUNK_BYTES);
        let expected = &mut self.expected[..len];
        match compare {
            Compare::Nothing => return Ok(()),
            Compare::DataOut => parts.get_data_out(chain, self.done, expected),
            Compare::FirstBlock => {
                for repeated in expected.chunks_exact_mut(block) {
                    parts.get_data_out(chain, 0, repeated);
                }
            }
        }
        let got = &self.buffer[..len];
        match got.iter().zip(&*expected).position(|(got, expected)| got != expected) {
            Some(at) => Err(Failure::Miscompare(self.done + at as u64)),
            None => Ok(()),
        }
    }

    /// Returns the segment of an I/O of `len` bytes on the buffer. It stays valid until the next
    /// call.
    pub(crate) fn buffer_segment(&mut self, len: u64) -> &[Segment] {
        let len = usize_of(len).min(CHUNK_BYTES);
        self.segment = [Segment::new(self.buffer.as_mut_ptr(), len)];
        &self.segment
    }
}
