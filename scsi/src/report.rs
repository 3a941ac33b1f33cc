//! Commands that report something and change nothing.

use crate::cdb::OpcodeQuery;
use crate::facts::Facts;
use crate::reply::{Buffers, REPLY_BYTES_MAX, Reply};
use crate::reservation::{Reservations, Type};
use crate::sense::{Code, Sense};
use crate::table::{self, Entry, Found};

/// READ CAPACITY(10) (SBC-3): all ones if the last LBA needs more than 32 bits.
pub(crate) fn capacity10(facts: &Facts, reply: &mut Reply) {
    let last = u32::try_from(facts.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
    reply.put(&last.to_be_bytes());
    reply.put(&facts.block_bytes.to_be_bytes());
}

/// READ CAPACITY(16) (SBC-3).
pub(crate) fn capacity16(facts: &Facts, reply: &mut Reply) {
    reply.put(&facts.blocks.saturating_sub(1).to_be_bytes());
    reply.put(&facts.block_bytes.to_be_bytes());
    // LBPME and LBPRZ stand before the lowest aligned LBA.
    let provisioning = match facts.unmap {
        Some(unmap) => 0x8000 | if unmap.zeroes { 0x4000 } else { 0 },
        None => 0,
    };
    reply.put(&[0, facts.physical_exponent & 0x0f]);
    reply.put(&(provisioning | facts.lowest_aligned & 0x3fff).to_be_bytes());
    reply.pad_to(32);
}

/// REPORT LUNS (SPC-4, and SPC-5 for 10h to 12h) of a target that has LUN 0 only. There are no
/// well-known and no administrative logical units.
pub(crate) fn luns(select: u8, allocation: u32, reply: &mut Reply) -> Result<(), Sense> {
    let has_lun = match select {
        0x00 | 0x02 | 0x11 => true,
        0x01 | 0x10 | 0x12 => false,
        _ => return Err(Sense::in_cdb(2, None)),
    };
    if allocation < 16 {
        return Err(Sense::in_cdb(6, None));
    }
    reply.put(&[0, 0, 0, if has_lun { 8 } else { 0 }]);
    reply.pad_to(if has_lun { 16 } else { 8 });
    Ok(())
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4).
pub(crate) fn opcodes(facts: &Facts, query: &OpcodeQuery, reply: &mut Reply) -> Result<(), Sense> {
    let OpcodeQuery { timeouts, option, opcode, action, .. } = *query;
    if option == 0 {
        all_opcodes(facts, timeouts, reply);
        return Ok(());
    }
    let low = u8::try_from(action).ok().filter(|action| *action <= 0x1f);
    let found = match table::find(opcode, low.unwrap_or(0)) {
        Found::Entry(entry) if entry.is_offered(facts) => Some(entry),
        _ => None,
    };
    let has_actions = table::offered(facts).any(|e| e.opcode == opcode && e.action.is_some());
    let exists = table::offered(facts).any(|entry| entry.opcode == opcode);
    let supported = match option {
        1 if has_actions => return Err(Sense::in_cdb(2, Some(2))),
        2 if exists && !has_actions => return Err(Sense::in_cdb(2, Some(2))),
        1 => found,
        2 => found.filter(|_| low.is_some()),
        3 => found.filter(|entry| low.is_some() && (entry.action.is_some() || action == 0)),
        _ => return Err(Sense::in_cdb(2, Some(2))),
    };
    one_opcode(facts, supported, timeouts, reply);
    Ok(())
}

/// The all_commands format of SPC-4. A descriptor has 8 bytes, and with timeouts 20.
fn all_opcodes(facts: &Facts, timeouts: bool, reply: &mut Reply) {
    reply.put(&[0; 4]);
    for entry in table::offered(facts) {
        let (action, has_action) = entry.action.map_or((0, 0), |action| (action, 1));
        let flags = has_action | if timeouts { 2 } else { 0 };
        reply.put(&[entry.opcode, 0, 0, action, 0, flags, 0, entry.length]);
        if timeouts {
            put_timeouts(reply);
        }
    }
    let length = u32::try_from(reply.len().saturating_sub(4)).unwrap_or(u32::MAX);
    reply.set(0, &length.to_be_bytes());
}

/// The one_command format of SPC-4. SUPPORT is 011b, as the standard says, or 001b, not supported.
fn one_opcode(facts: &Facts, entry: Option<&Entry>, timeouts: bool, reply: &mut Reply) {
    let Some(entry) = entry else {
        reply.put(&[0, 1, 0, 0]);
        return;
    };
    reply.put(&[0, 3 | if timeouts { 0x80 } else { 0 }, 0, entry.length]);
    reply.put_padded(entry.usage(facts).into_iter(), usize::from(entry.length), 0);
    if timeouts {
        put_timeouts(reply);
    }
}

/// A timeouts descriptor (SPC-4) that says nothing.
fn put_timeouts(reply: &mut Reply) {
    reply.put(&[0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4): all but CLEAR ACA and QUERY
/// ASYNCHRONOUS EVENT.
pub(crate) fn task_management(
    extended: bool,
    allocation: u32,
    reply: &mut Reply,
) -> Result<(), Sense> {
    if allocation < 4 {
        return Err(Sense::in_cdb(6, None));
    }
    // ATS, ATSS, CTSS, LURS, QTS; QTSS, ITNRS.
    reply.put(&[0xdc, 0x03, 0, if extended { 12 } else { 0 }]);
    reply.pad_to(if extended { 16 } else { 4 });
    Ok(())
}

/// READ DEFECT DATA (SBC-3): the lists that bits 4 and 3 of `lists` ask for are empty. So any
/// defect list format, bits 2 to 0, is returned as asked for.
pub(crate) fn defects(long: bool, lists: u8, reply: &mut Reply) {
    reply.put(&[0, lists & 0x1f, 0, 0]);
    reply.pad_to(if long { 8 } else { 4 });
}

/// LOG SENSE (SPC-4): the supported pages, and informational exceptions.
pub(crate) fn log(page: u8, subpage: u8, reply: &mut Reply) -> Result<(), Sense> {
    match (page, subpage) {
        (0x00, 0x00) => reply.put(&[0x00, 0x00, 0, 2, 0x00, 0x2f]),
        (0x00, 0xff) => reply.put(&[0x40, 0xff, 0, 6, 0x00, 0x00, 0x00, 0xff, 0x2f, 0x00]),
        // Informational Exceptions: parameter 0 says that there is no exception, and no
        // temperature.
        (0x2f, 0x00) => reply.put(&[0x2f, 0x00, 0, 8, 0, 0, 0x03, 4, 0, 0, 0xff, 0]),
        (0x00 | 0x2f, _) => return Err(Sense::in_cdb(3, None)),
        _ => return Err(Sense::in_cdb(2, Some(5))),
    }
    Ok(())
}

/// RECEIVE DIAGNOSTIC RESULTS (SPC-4): the list of diagnostic pages, which is the only one.
pub(crate) fn diagnostic(valid: bool, page: u8, reply: &mut Reply) -> Result<(), Sense> {
    if !valid {
        return Err(Sense::in_cdb(1, Some(0)));
    }
    if page != 0 {
        return Err(Sense::in_cdb(2, None));
    }
    reply.put(&[0, 0, 0, 1, 0]);
    Ok(())
}

/// PERSISTENT RESERVE IN (SPC-4). ADDITIONAL LENGTH counts what there is, not what fits.
pub(crate) fn persistent(
    reservations: &Reservations,
    action: u8,
    reply: &mut Reply,
) -> Result<(), Sense> {
    const READ_KEYS: u8 = 0;
    const READ_RESERVATION: u8 = 1;
    const REPORT_CAPABILITIES: u8 = 2;
    if action == REPORT_CAPABILITIES {
        // CRH; TMV, and no PTPL.
        let [high, low] = Type::MASK;
        reply.put(&[0, 8, 0x10, 0x80, high, low, 0, 0]);
        return Ok(());
    }
    reply.put(&reservations.generation.to_be_bytes());
    reply.put(&[0; 4]);
    match action {
        READ_KEYS => {
            let registrations = reservations.registrations.iter();
            registrations.for_each(|known| reply.put(&known.key.to_be_bytes()));
        }
        READ_RESERVATION => {
            if let Some((key, kind)) = reservations.held() {
                reply.put(&key.to_be_bytes());
                reply.put(&[0, 0, 0, 0, 0, kind as u8, 0, 0]);
            }
        }
        _ => full_status(reservations, reply),
    }
    let length = u32::try_from(reply.len().saturating_sub(8)).unwrap_or(u32::MAX);
    reply.set(4, &length.to_be_bytes());
    Ok(())
}

/// READ FULL STATUS (SPC-4). The TransportID has the format of SAS, as the designators have
/// its protocol identifier; the SAS address is the nexus' number (SPC-4, TransportID for SAS).
fn full_status(reservations: &Reservations, reply: &mut Reply) {
    const TRANSPORT_ID_BYTES: usize = 24;
    for known in &reservations.registrations {
        let kind = reservations.reservation.filter(|_| reservations.is_holder(known.nexus));
        reply.put(&known.key.to_be_bytes());
        reply.put(&[0, 0, 0, 0, u8::from(kind.is_some()), kind.map_or(0, |held| held.kind as u8)]);
        reply.put(&[0; 4]);
        reply.put(&known.port.to_be_bytes());
        reply.put(&[0, 0, 0, 24]);
        let end = reply.len() + TRANSPORT_ID_BYTES;
        reply.put(&[0x06, 0, 0, 0]);
        reply.put(&known.nexus.0.to_be_bytes());
        reply.pad_to(end);
    }
}

/// The state of blocks (SBC-3, PROVISIONING STATUS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Provisioning {
    /// They have data, or it is not known.
    Mapped = 0,
    /// They have been unmapped, or never written.
    Deallocated = 1,
}

/// What GET LBA STATUS asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LbaQuery {
    /// The first block.
    pub lba: u64,
    /// The blocks from there to the end of the disk.
    pub blocks: u64,
    /// Extents that have a place in the answer. At least one.
    pub extents_max: usize,
    allocation: u32,
}

/// Bytes of an LBA status descriptor.
const LBA_STATUS_BYTES: usize = 16;

impl LbaQuery {
    /// SBC-3, GET LBA STATUS.
    pub(crate) fn new(
        facts: &Facts,
        lba: u64,
        allocation: u32,
        buffers: Buffers,
    ) -> Result<Self, Sense> {
        let blocks = facts.blocks.checked_sub(lba).filter(|blocks| *blocks > 0);
        let blocks = blocks.ok_or(Sense::illegal(Code::LBA_OUT_OF_RANGE).with_information(lba))?;
        let bytes = u64::from(allocation).min(buffers.data_in);
        let places = usize::try_from(bytes.saturating_sub(8)).unwrap_or(usize::MAX);
        let extents_max =
            (places / LBA_STATUS_BYTES).clamp(1, (REPLY_BYTES_MAX - 8) / LBA_STATUS_BYTES);
        Ok(Self { lba, blocks, extents_max, allocation })
    }
}

/// Answers GET LBA STATUS. `extents` are the lengths and states of the extents from the query's
/// LBA on, one after the other; those past the end of the disk, or that have no place, are left
/// out. Without any, all blocks are mapped.
pub fn lba_status(
    query: &LbaQuery,
    extents: impl IntoIterator<Item = (u64, Provisioning)>,
    buffers: Buffers,
    reply: &mut Reply,
) {
    let format = reply.format();
    reply.begin(format, buffers);
    reply.put(&[0; 8]);
    let (mut lba, mut left) = (query.lba, query.blocks);
    let known = extents.into_iter().filter(|(blocks, _)| *blocks > 0).take(query.extents_max);
    for (blocks, state) in known {
        if left == 0 {
            break;
        }
        let blocks = blocks.min(left);
        put_lba_status(lba, blocks, state, reply);
        lba = lba.saturating_add(blocks);
        left = left.saturating_sub(blocks);
        // The next descriptor must follow this one, which could not say all.
        if blocks > u64::from(u32::MAX) {
            break;
        }
    }
    if reply.len() == 8 {
        put_lba_status(lba, left, Provisioning::Mapped, reply);
    }
    // PARAMETER DATA LENGTH counts what follows it.
    let length = u32::try_from(reply.len().saturating_sub(4)).unwrap_or(u32::MAX);
    reply.set(0, &length.to_be_bytes());
    reply.finish(query.allocation, buffers);
}

fn put_lba_status(lba: u64, blocks: u64, state: Provisioning, reply: &mut Reply) {
    reply.put(&lba.to_be_bytes());
    reply.put(&u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes());
    reply.put(&[state as u8, 0, 0, 0]);
}
