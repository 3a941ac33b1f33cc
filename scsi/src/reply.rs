//! The answer to a command: status, sense data, and data-in in a fixed buffer.

use arrayvec::ArrayVec;

use crate::facts::UNMAP_DESCRIPTORS_MAX;
use crate::sense::{Format, Sense, Status};

/// Bytes of data-in that a [`Reply`] holds: READ FULL STATUS of all registrations, and REPORT
/// SUPPORTED OPERATION CODES with timeouts, fit in.
pub const REPLY_BYTES_MAX: usize = 4096;

/// The lengths of a command's buffers, as the initiator provides them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// Bytes of the data-in buffer.
    pub data_in: u64,
    /// Bytes of the data-out buffer.
    pub data_out: u64,
}

impl Buffers {
    /// Bytes of the longer one: of commands that use neither, or that got the wrong one.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.data_in.max(self.data_out)
    }
}

/// How many bytes were transferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Bytes transferred.
    pub bytes: u64,
    /// Bytes of the buffers that were not: `residual` of virtio-scsi.
    pub residual: u32,
    /// The command would have transferred more than its buffer holds: OVERRUN of virtio-scsi.
    pub overrun: bool,
}

impl Transferred {
    /// `bytes` of a buffer were transferred.
    #[must_use]
    pub fn of(bytes: u64, overrun: bool, buffer: u64) -> Self {
        Self {
            bytes,
            residual: u32::try_from(buffer.saturating_sub(bytes)).unwrap_or(u32::MAX),
            overrun,
        }
    }
}

/// A range of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first block.
    pub lba: u64,
    /// The number of blocks.
    pub blocks: u64,
}

/// The answer to a command. Reused: it is as large as the largest answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub(crate) status: Status,
    pub(crate) sense: Option<Sense>,
    pub(crate) format: Format,
    pub(crate) transferred: Transferred,
    data: ArrayVec<u8, REPLY_BYTES_MAX>,
    /// Of UNMAP: the ranges.
    pub(crate) ranges: ArrayVec<Range, { UNMAP_DESCRIPTORS_MAX as usize }>,
    /// Of PREEMPT AND ABORT: the initiators whose commands are to be aborted.
    pub(crate) aborted: ArrayVec<u64, { crate::reservation::REGISTRATIONS_MAX }>,
}

impl Default for Reply {
    fn default() -> Self {
        Self {
            status: Status::Good,
            sense: None,
            format: Format::Fixed,
            transferred: Transferred::default(),
            data: ArrayVec::new(),
            ranges: ArrayVec::new(),
            aborted: ArrayVec::new(),
        }
    }
}

impl Reply {
    /// GOOD, with no data.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// The sense data, if the status is CHECK CONDITION.
    #[must_use]
    pub fn sense(&self) -> Option<Sense> {
        self.sense
    }

    /// The format in which the sense data is to be encoded.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Data-in: not longer than the allocation length and the buffer.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Bytes transferred, residual and overrun.
    #[must_use]
    pub fn transferred(&self) -> Transferred {
        self.transferred
    }

    /// The ranges of `Op::Unmap`.
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// The initiators whose commands PREEMPT AND ABORT aborts. Before the caller answers, it must
    /// abort their commands on this logical unit.
    #[must_use]
    pub fn aborted(&self) -> &[u64] {
        &self.aborted
    }

    /// Empties the answer, for the next command. Until it is finished, all of both buffers is
    /// residual.
    pub(crate) fn begin(&mut self, format: Format, buffers: Buffers) {
        self.status = Status::Good;
        self.sense = None;
        self.format = format;
        self.transferred = Transferred::of(0, false, buffers.longest());
        self.data.clear();
        self.ranges.clear();
        self.aborted.clear();
    }

    /// CHECK CONDITION with this sense data, and no data-in.
    pub(crate) fn fail(&mut self, sense: Sense) {
        self.status = Status::CheckCondition;
        self.sense = Some(sense);
        self.data.clear();
        self.ranges.clear();
    }

    /// A status without sense data, and no data-in.
    pub(crate) fn end(&mut self, status: Status) {
        self.status = status;
        self.sense = None;
        self.data.clear();
    }

    /// Appends bytes to data-in. What does not fit is cut; nothing that is built here is that long.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let bytes = bytes.get(..self.data.remaining_capacity()).unwrap_or(bytes);
        self.data.extend(bytes.iter().copied());
    }

    /// Appends `bytes`, and `fill` up to `len` bytes.
    pub(crate) fn put_padded(&mut self, bytes: impl Iterator<Item = u8>, len: usize, fill: u8) {
        for byte in bytes.chain(std::iter::repeat(fill)).take(len) {
            self.put(&[byte]);
        }
    }

    /// Appends zeroes until data-in has `len` bytes.
    pub(crate) fn pad_to(&mut self, len: usize) {
        self.put_padded(std::iter::empty(), len.saturating_sub(self.data.len()), 0);
    }

    /// Bytes of data-in so far.
    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    /// Writes over bytes of data-in, such as a length that was not known.
    pub(crate) fn set(&mut self, at: usize, bytes: &[u8]) {
        let places = self.data.iter_mut().skip(at);
        places.zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// Data-in is complete: limits it to the allocation length and the buffer.
    pub(crate) fn finish(&mut self, allocation: u32, buffers: Buffers) {
        self.data.truncate(usize::try_from(allocation).unwrap_or(usize::MAX));
        let wanted = self.data.len() as u64;
        self.data.truncate(usize::try_from(buffers.data_in).unwrap_or(usize::MAX));
        let overrun = wanted > buffers.data_in;
        self.transferred = Transferred::of(self.data.len() as u64, overrun, buffers.longest());
    }

    /// `bytes` of data-out were used.
    pub(crate) fn took(&mut self, bytes: u64, buffers: Buffers) {
        self.transferred = Transferred::of(bytes, false, buffers.data_out);
    }
}
