//! The state of a request.

use bdev::{Begun, Op};
use scsi::{Buffers, Failure, Plan};

use crate::parts::Parts;
use crate::wire::Header;

/// What a request does now, or waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has no I/O: it waits for the logical unit, or for a free job.
    #[default]
    Start,
    /// Its plan waits for an exclusive command on the same blocks.
    Excluded,
    /// Its last I/O.
    Last,
    /// A flush before its read.
    FlushThenRead,
    /// A write before its flush.
    WriteThenFlush,
    /// This job.
    Job(u8),
}

/// The state of a request.
#[derive(Debug)]
pub struct Task {
    pub(super) header: Header,
    pub(super) parts: Parts,
    pub(super) buffers: Buffers,
    pub(super) target: u8,
    pub(super) stage: Stage,
    /// What is done.
    pub(super) plan: Option<Plan>,
    /// It changes blocks, and has been counted.
    pub(super) begun: Option<Begun>,
    /// The I/O in flight: its operation, its length in bytes, and when it was submitted.
    pub(super) op: Op,
    pub(super) len: u64,
    pub(super) started_ticks: u64,
    /// Of a command that was executed and waits for others: its residual.
    pub(super) residual: u32,
    /// Of a job: its result, if it has ended and waits for the logical unit.
    pub(super) result: Option<Result<(), Failure>>,
}

impl Default for Task {
    fn default() -> Self {
        Self {
            header: Header::default(),
            parts: Parts::default(),
            buffers: Buffers::default(),
            target: 0,
            stage: Stage::Start,
            plan: None,
            begun: None,
            op: Op::Flush,
            len: 0,
            started_ticks: 0,
            residual: 0,
            result: None,
        }
    }
}

impl Task {
    /// Begins a request.
    #[inline]
    pub(super) fn begin(&mut self, header: Header, parts: Parts, buffers: Buffers) {
        self.header = header;
        self.parts = parts;
        self.buffers = buffers;
        self.stage = Stage::Start;
        self.begun = None;
        self.result = None;
    }
}
