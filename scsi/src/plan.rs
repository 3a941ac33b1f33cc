//! Block I/O that a command needs, as data, and the command's outcome when the I/O is done.

use crate::facts::Facts;
use crate::reply::{Range, Transferred};
use crate::sense::{Code, Key, Sense, Status};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read the range into data-in.
    Read,
    /// Write data-out to the range.
    Write,
    /// Write data-out to the range, make it durable, and read it back. With `compare`, what was
    /// read must be equal to data-out.
    WriteAndVerify {
        /// Compare.
        compare: bool,
    },
    /// Read the range, and compare nothing.
    Verify,
    /// Read the range, and compare it with data-out.
    VerifyData,
    /// Read the range, and compare each block with the first block of data-out.
    VerifyPattern,
    /// Write the first block of data-out to each block of the range. If that block is zero, this is
    /// [`Plan::zeroed`].
    WriteSame {
        /// Zeroes may be written by unmapping, if unmapped blocks read as zeroes.
        unmap: bool,
    },
    /// Write zeroes to the range.
    WriteZeroes {
        /// They may be written by unmapping, if unmapped blocks read as zeroes.
        unmap: bool,
    },
    /// Unmap each of `Reply::ranges`. The plan's range is empty.
    Unmap,
    /// Read the range and compare it with the first half of data-out; if it is equal, write the
    /// second half. No other write to the range may come between, so the plan is exclusive.
    CompareAndWrite,
    /// Read the range, and write the bitwise OR of it and data-out. No other write to the range may
    /// come between, so the plan is exclusive.
    OrWrite,
    /// Copy as many blocks as the range has, from this LBA on, to the range. If the two overlap, the
    /// initiator cannot rely on what the common blocks have in the end.
    Copy {
        /// The first block to read.
        from: u64,
        /// LIST IDENTIFIER. If there is one, the caller calls `LogicalUnit::copied` before it
        /// answers.
        list: Option<u8>,
    },
    /// Make all written data durable. The plan's range is empty.
    Flush,
}

/// When written data must be made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Whenever the initiator asks for it.
    No,
    /// Before the operation: a read with FUA comes from the medium (SBC-3, FUA).
    Before,
    /// After the operation, and before it is answered.
    After,
}

/// Block I/O to do. It is complete: whoever does it need not know the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The operation.
    pub op: Op,
    /// The blocks; on the disk, and no more than the buffer has data for.
    pub range: Range,
    /// When to flush.
    pub flush: Flush,
    /// The caller must not do it while another write, unmap or exclusive plan of this logical unit
    /// is done on a block of the range, nor begin one before it is done.
    pub exclusive: bool,
    /// Bytes that the command transfers if all is done.
    pub(crate) transfer: u64,
    /// The command asked for more than its buffer holds.
    pub(crate) overrun: bool,
    /// Bytes of the buffer of which a part may be residual.
    pub(crate) buffer: u64,
}

impl Plan {
    /// The bytes of data-out or data-in that belong to the plan.
    #[must_use]
    pub fn transfer_bytes(&self) -> u64 {
        self.transfer
    }

    /// Returns whether the plan transfers exactly the whole buffer, without a flush and without
    /// excluding others.
    #[must_use]
    #[inline]
    pub fn is_exact(&self) -> bool {
        let whole = self.transfer == self.buffer && !self.overrun;
        whole && self.flush == Flush::No && !self.exclusive
    }

    /// What a WRITE SAME with a block of zeroes becomes. Others do not change.
    #[must_use]
    pub fn zeroed(self) -> Self {
        match self.op {
            Op::WriteSame { unmap } => Self { op: Op::WriteZeroes { unmap }, ..self },
            _ => self,
        }
    }
}

/// Why a plan failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The medium failed, at this block if it is known.
    Medium(Option<u64>),
    /// A comparison failed, at this byte of data-out.
    Miscompare(u64),
    /// A thinly provisioned disk has no space left.
    NoSpace,
    /// The disk has become read-only.
    ReadOnly,
    /// The disk has become smaller than the range.
    OutOfRange,
    /// The disk does not support the operation.
    Unsupported,
    /// The command was not executed for a temporary reason, and may be repeated.
    Busy,
    /// The command was aborted: by the disk, or because the disk was removed.
    Aborted,
    /// The command was aborted by another nexus (SPC-4, TAS).
    AbortedByOther,
    /// Another host has a reservation on the disk.
    Reservation,
    /// Any other failure.
    Device,
}

/// The end of a command that had a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status.
    pub status: Status,
    /// The sense data, if the status is CHECK CONDITION.
    pub sense: Option<Sense>,
    /// Bytes transferred, residual and overrun.
    pub transferred: Transferred,
}

impl Outcome {
    /// The outcome of a plan that has been done, or has failed.
    #[must_use]
    pub fn of(plan: &Plan, facts: &Facts, result: Result<(), Failure>) -> Self {
        let (status, sense, bytes) = match result {
            Ok(()) => (Status::Good, None, plan.transfer),
            Err(failure) => match status_or_sense(plan, facts, failure) {
                Ok(sense) => (Status::CheckCondition, Some(sense), 0),
                Err(status) => (status, None, 0),
            },
        };
        Self { status, sense, transferred: Transferred::of(bytes, plan.overrun, plan.buffer) }
    }

    /// The outcome of a command that fails before its I/O.
    #[must_use]
    pub fn failed(sense: Sense, buffer: u64) -> Self {
        Self {
            status: Status::CheckCondition,
            sense: Some(sense),
            transferred: Transferred::of(0, false, buffer),
        }
    }
}

/// The sense data of a failure, or the status of one that has none.
fn status_or_sense(plan: &Plan, facts: &Facts, failure: Failure) -> Result<Sense, Status> {
    Ok(match failure {
        // SPC-4: whichever of the two ends of a copy failed.
        Failure::Medium(_) | Failure::OutOfRange | Failure::Device
            if matches!(plan.op, Op::Copy { .. }) =>
        {
            Sense::new(Key::CopyAborted, Code::THIRD_PARTY_DEVICE_FAILURE)
        }
        // SBC-3: the INFORMATION field has the LBA.
        Failure::Medium(lba) => {
            Sense { information: lba, ..Sense::new(Key::MediumError, medium_code(plan.op)) }
        }
        Failure::Miscompare(offset) => miscompare(plan, facts, offset),
        Failure::NoSpace => Sense::new(Key::DataProtect, Code::SPACE_ALLOCATION_FAILED),
        Failure::ReadOnly => Sense::new(Key::DataProtect, Code::WRITE_PROTECTED),
        Failure::OutOfRange => Sense::illegal(Code::LBA_OUT_OF_RANGE),
        Failure::Unsupported => Sense::illegal(Code::INVALID_OPERATION_CODE),
        Failure::Aborted => Sense::new(Key::AbortedCommand, Code::NONE),
        Failure::Device => match plan.op {
            Op::Flush | Op::Unmap => Sense::new(Key::HardwareError, Code::INTERNAL_TARGET_FAILURE),
            op => Sense::new(Key::MediumError, medium_code(op)),
        },
        Failure::Busy => return Err(Status::Busy),
        Failure::AbortedByOther => return Err(Status::TaskAborted),
        Failure::Reservation => return Err(Status::ReservationConflict),
    })
}

fn medium_code(op: Op) -> Code {
    match op {
        Op::Read | Op::Verify | Op::VerifyData | Op::VerifyPattern => Code::UNRECOVERED_READ_ERROR,
        _ => Code::WRITE_ERROR,
    }
}

/// SBC-3: after COMPARE AND WRITE the INFORMATION field is the offset in data-out of the first
/// byte that is not equal. For the others it is the LBA.
fn miscompare(plan: &Plan, facts: &Facts, offset: u64) -> Sense {
    let sense = Sense::new(Key::Miscompare, Code::MISCOMPARE_DURING_VERIFY);
    match plan.op {
        Op::CompareAndWrite => sense.with_information(offset),
        Op::VerifyPattern => sense,
        _ => sense.with_information(plan.range.lba.saturating_add(facts.whole_blocks(offset))),
    }
}
