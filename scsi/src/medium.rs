//! Checks commands of medium access, and makes their plans.

use arrayvec::ArrayVec;

use crate::cdb::{Command, Compare, Extent};
use crate::facts::{Facts, UNMAP_DESCRIPTORS_MAX};
use crate::gate::Gate;
use crate::plan::{Flush, Op, Plan};
use crate::reply::{Buffers, Range};
use crate::sense::{Code, Key, Sense};

/// The plan of a command whose CDB is all that is needed, if it is one of medium access. It may be
/// empty: then there is nothing to do.
///
/// The checks are in the order of SBC-3: the fields of the CDB, the range, write protection.
///
/// # Errors
/// The sense data.
pub(crate) fn plan(
    command: &Command,
    facts: &Facts,
    gate: Gate,
    buffers: Buffers,
) -> Result<Option<Plan>, Sense> {
    let medium = Medium { facts, gate, buffers };
    Ok(Some(match *command {
        Command::Read { extent, fua } => read(extent, fua, facts, gate, buffers)?,
        Command::Write { extent, fua } => write(extent, fua, facts, gate, buffers)?,
        Command::WriteAndVerify { extent, compare } => {
            let op = Op::WriteAndVerify { compare: compare != Compare::Nothing };
            medium.transfer(op, extent, Flush::After)?
        }
        Command::Verify { extent, compare } => medium.verify(extent, compare)?,
        Command::PreFetch { extent } => medium.pre_fetch(extent)?,
        Command::SynchronizeCache { extent } => medium.synchronize(extent)?,
        Command::WriteSame { extent, unmap, no_data } => {
            medium.write_same(extent, unmap, no_data)?
        }
        Command::OrWrite { extent, fua } => {
            let flush = if fua || gate.is_write_through() { Flush::After } else { Flush::No };
            Plan { exclusive: true, ..medium.transfer(Op::OrWrite, extent, flush)? }
        }
        Command::CompareAndWrite { extent, fua } => medium.compare_and_write(extent, fua)?,
        _ => return Ok(None),
    }))
}

/// The plan of READ.
///
/// # Errors
/// The sense data.
#[inline]
pub(crate) fn read(
    extent: Extent,
    fua: bool,
    facts: &Facts,
    gate: Gate,
    buffers: Buffers,
) -> Result<Plan, Sense> {
    let flush = if fua { Flush::Before } else { Flush::No };
    Medium { facts, gate, buffers }.transfer(Op::Read, extent, flush)
}

/// The plan of WRITE.
///
/// # Errors
/// The sense data.
#[inline]
pub(crate) fn write(
    extent: Extent,
    fua: bool,
    facts: &Facts,
    gate: Gate,
    buffers: Buffers,
) -> Result<Plan, Sense> {
    let flush = if fua || gate.is_write_through() { Flush::After } else { Flush::No };
    Medium { facts, gate, buffers }.transfer(Op::Write, extent, flush)
}

/// What every check needs.
struct Medium<'a> {
    facts: &'a Facts,
    gate: Gate,
    buffers: Buffers,
}

/// The byte of the CDB with the length, for the field pointer. It depends on the CDB's length,
/// which is not known here; so none is given.
const LENGTH_FIELD: Sense = Sense::illegal(Code::INVALID_FIELD_IN_CDB);

impl Medium<'_> {
    /// LBA OUT OF RANGE, with the LBA (SBC-3, INFORMATION field), then WRITE PROTECTED.
    fn check(&self, lba: u64, blocks: u64, writes: bool) -> Result<(), Sense> {
        if !self.facts.contain(lba, blocks) {
            return Err(Sense::illegal(Code::LBA_OUT_OF_RANGE).with_information(lba));
        }
        if writes && self.gate.is_protected() {
            return Err(Sense::new(Key::DataProtect, Code::WRITE_PROTECTED));
        }
        Ok(())
    }

    /// SBC-3, Block Limits: more than MAXIMUM TRANSFER LENGTH is an invalid field.
    fn check_length(&self, blocks: u32) -> Result<(), Sense> {
        let max = self.facts.transfer_blocks_max;
        if max != 0 && blocks > max { Err(LENGTH_FIELD) } else { Ok(()) }
    }

    /// There is something to flush only if the disk has a write cache.
    fn flush(&self, flush: Flush) -> Flush {
        if self.facts.write_cache { flush } else { Flush::No }
    }

    /// A plan that transfers nothing.
    fn without_data(&self, op: Op, lba: u64, blocks: u64, buffer: u64) -> Plan {
        Plan {
            op,
            range: Range { lba, blocks },
            flush: Flush::No,
            exclusive: false,
            transfer: 0,
            overrun: false,
            buffer,
        }
    }

    /// Reads and writes: as many whole blocks as the CDB asks for and the buffer holds.
    fn transfer(&self, op: Op, extent: Extent, flush: Flush) -> Result<Plan, Sense> {
        let writes = op != Op::Read;
        let asked = u64::from(extent.blocks);
        self.check_extent(extent, writes)?;
        self.check_length(extent.blocks)?;
        let buffer = if writes { self.buffers.data_out } else { self.buffers.data_in };
        let blocks = asked.min(self.facts.whole_blocks(buffer));
        Ok(Plan {
            op,
            range: Range { lba: extent.lba, blocks },
            flush: self.flush(flush),
            exclusive: false,
            transfer: self.facts.bytes(blocks),
            overrun: blocks < asked,
            buffer: self.buffer(buffer),
        })
    }

    fn check_extent(&self, extent: Extent, writes: bool) -> Result<(), Sense> {
        self.check(extent.lba, u64::from(extent.blocks), writes)
    }

    /// The buffer for the residual: one in the wrong direction is residual as a whole.
    fn buffer(&self, right: u64) -> u64 {
        if right == 0 { self.buffers.longest() } else { right }
    }

    /// SBC-3, VERIFY. Nothing is verified unless there is data for all of it.
    fn verify(&self, extent: Extent, compare: Compare) -> Result<Plan, Sense> {
        let asked = u64::from(extent.blocks);
        self.check_extent(extent, false)?;
        self.check_length(extent.blocks)?;
        let (op, data_blocks) = match compare {
            Compare::Nothing => (Op::Verify, 0),
            Compare::Blocks => (Op::VerifyData, asked),
            Compare::Pattern => (Op::VerifyPattern, asked.min(1)),
        };
        let wanted = self.facts.bytes(data_blocks);
        if self.buffers.data_out < wanted {
            return Err(LENGTH_FIELD);
        }
        let plan = self.without_data(op, extent.lba, asked, self.buffer(self.buffers.data_out));
        Ok(Plan { transfer: wanted, ..plan })
    }

    /// SBC-3, PRE-FETCH. Nothing is fetched: GOOD says that not all blocks fit into the cache.
    fn pre_fetch(&self, extent: Extent) -> Result<Plan, Sense> {
        self.check_extent(extent, false)?;
        Ok(self.without_data(Op::Verify, extent.lba, 0, self.buffer(0)))
    }

    /// SBC-3, SYNCHRONIZE CACHE. All is flushed, whatever the range. IMMED allows an earlier
    /// answer, and does not require it.
    fn synchronize(&self, extent: Extent) -> Result<Plan, Sense> {
        self.check_extent(extent, false)?;
        Ok(self.without_data(Op::Flush, 0, 0, self.buffer(0)))
    }

    /// SBC-3, WRITE SAME. A length of 0 is up to the end, since WSNZ is 0. The maximum is checked
    /// first: it does not depend on the LBA.
    fn write_same(&self, extent: Extent, unmap: bool, no_data: bool) -> Result<Plan, Sense> {
        if unmap && self.facts.unmap.is_none() {
            return Err(Sense::in_cdb(1, Some(3)));
        }
        let to_end = self.facts.blocks.checked_sub(extent.lba);
        let blocks = match (extent.blocks, to_end) {
            (0, Some(blocks)) => blocks,
            (blocks, _) => u64::from(blocks),
        };
        let max = self.facts.write_same_blocks_max;
        if max != 0 && blocks > max {
            return Err(LENGTH_FIELD);
        }
        self.check(extent.lba, blocks, true)?;
        // One block, exactly; with NDOB, data is residual.
        let wanted = if no_data { 0 } else { u64::from(self.facts.block_bytes) };
        if !no_data && self.buffers.data_out != wanted {
            return Err(LENGTH_FIELD);
        }
        let op = if no_data { Op::WriteZeroes { unmap } } else { Op::WriteSame { unmap } };
        let plan = self.without_data(op, extent.lba, blocks, self.buffer(self.buffers.data_out));
        let flush = if self.gate.is_write_through() { Flush::After } else { Flush::No };
        Ok(Plan { transfer: wanted, flush: self.flush(flush), ..plan })
    }

    /// SBC-3, COMPARE AND WRITE. Data-out has the data to compare and that to write.
    fn compare_and_write(&self, extent: Extent, fua: bool) -> Result<Plan, Sense> {
        if extent.blocks > u32::from(self.facts.compare_blocks_max) {
            return Err(Sense::in_cdb(13, None));
        }
        self.check_extent(extent, true)?;
        let blocks = u64::from(extent.blocks);
        let wanted = self.facts.bytes(2 * blocks);
        // Exactly: libiscsi sends 256 blocks, which the CDB has as 0, and expects a refusal.
        if self.buffers.data_out != wanted {
            return Err(LENGTH_FIELD);
        }
        let flush = if fua || self.gate.is_write_through() { Flush::After } else { Flush::No };
        let plan = self.without_data(
            Op::CompareAndWrite,
            extent.lba,
            blocks,
            self.buffer(self.buffers.data_out),
        );
        let flush = self.flush(flush);
        Ok(Plan { transfer: wanted, flush, exclusive: true, ..plan })
    }
}

/// The ranges of an UNMAP parameter list (SBC-3), checked as a whole: nothing is unmapped if
/// one is invalid. Empty ranges are left out. An incomplete last descriptor is ignored.
///
/// # Errors
/// The sense data.
pub(crate) fn unmap_ranges(
    list: &[u8],
    facts: &Facts,
    gate: Gate,
    ranges: &mut ArrayVec<Range, { UNMAP_DESCRIPTORS_MAX as usize }>,
) -> Result<(), Sense> {
    let unmap = facts.unmap.ok_or(Sense::illegal(Code::INVALID_OPERATION_CODE))?;
    let length_error = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);
    let ([_, _, high, low, _, _, _, _], descriptors) =
        list.split_first_chunk::<8>().ok_or(length_error)?;
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    let (descriptors, _) = descriptors.get(..length).ok_or(length_error)?.as_chunks::<16>();
    let max = unmap.descriptors_max.min(UNMAP_DESCRIPTORS_MAX);
    if descriptors.len() > usize::from(max) {
        return Err(Sense::in_list(2, None));
    }
    let medium = Medium { facts, gate, buffers: Buffers::default() };
    let mut total = 0_u64;
    for [a, b, c, d, e, f, g, h, i, j, k, l, ..] in descriptors {
        let lba = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
        let blocks = u64::from(u32::from_be_bytes([*i, *j, *k, *l]));
        medium.check(lba, blocks, true)?;
        total = total.saturating_add(blocks);
        if unmap.blocks_max != u32::MAX && total > u64::from(unmap.blocks_max) {
            return Err(Sense::in_list(8, None));
        }
        if blocks > 0 && ranges.try_push(Range { lba, blocks }).is_err() {
            return Err(Sense::in_list(2, None));
        }
    }
    Ok(())
}

/// The plan of an UNMAP whose ranges have been checked.
pub(crate) fn unmap(facts: &Facts, gate: Gate, list: u64, buffer: u64) -> Plan {
    let through = gate.is_write_through() && facts.write_cache;
    Plan {
        op: Op::Unmap,
        range: Range { lba: 0, blocks: 0 },
        flush: if through { Flush::After } else { Flush::No },
        exclusive: false,
        transfer: list,
        overrun: false,
        buffer,
    }
}
