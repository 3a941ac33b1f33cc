//! The table of operation codes and service actions. All that is known of a command before its
//! fields are read is here: decoding, reservations, unit attentions and REPORT SUPPORTED OPERATION
//! CODES use it.

use crate::facts::Facts;

mod rows;

/// Bytes of the longest CDB in the table.
pub const CDB_BYTES_MAX: usize = 16;

/// The direction of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None,
    /// From the disk to the initiator.
    In,
    /// From the initiator to the disk.
    Out,
}

/// Whether a command is allowed while another nexus has a reservation (SPC-4 and SBC-3,
/// commands that are allowed in the presence of various reservations; SPC-2 for RESERVE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Allowed.
    Any,
    /// Allowed under a persistent reservation, not under RESERVE.
    Query,
    /// Allowed under a persistent reservation of a write exclusive type.
    Read,
    /// Not allowed.
    Write,
    /// As `Any` if the START bit is set, else as `Write`.
    Start,
    /// As `Any` if the PREVENT field is zero, else as `Write`.
    Allow,
    /// The command has rules of its own.
    Own,
}

/// What the disk must support for a command to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Every disk has the command.
    Nothing,
    /// Unmap.
    Unmap,
    /// COMPARE AND WRITE.
    Compare,
}

/// What a command is; the number in some names is the length of the CDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the standards")]
pub enum Kind {
    TestUnitReady,
    RequestSense,
    Read,
    Write,
    Inquiry,
    ModeSelect6,
    Reserve,
    Release,
    ModeSense6,
    StartStopUnit,
    ReceiveDiagnosticResults,
    SendDiagnostic,
    PreventAllowMediumRemoval,
    ReadCapacity10,
    WriteAndVerify,
    Verify,
    PreFetch,
    SynchronizeCache,
    ReadDefectData10,
    ReadDefectData12,
    WriteSame,
    Unmap,
    LogSense,
    ModeSelect10,
    ModeSense10,
    PersistentReserveIn,
    PersistentReserveOut,
    ExtendedCopy,
    ReceiveCopyResults,
    CompareAndWrite,
    OrWrite,
    ReadCapacity16,
    GetLbaStatus,
    ReportLuns,
    ReportSupportedOperationCodes,
    ReportSupportedTaskManagementFunctions,
}

/// A command of the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// OPERATION CODE.
    pub opcode: u8,
    /// SERVICE ACTION, if the operation code has some.
    pub action: Option<u8>,
    /// The name in the standard.
    pub name: &'static str,
    /// Bytes of the CDB.
    pub length: u8,
    /// The bits of the CDB that mean something, the first byte highest. Bytes past `length` are not
    /// looked at, so their bits are set.
    mask: u128,
    /// The direction of its data.
    pub direction: Direction,
    /// Whether it is allowed under a reservation of another nexus.
    pub access: Access,
    /// What the disk must support.
    pub needs: Needs,
    /// What it is.
    pub kind: Kind,
}

/// The UNMAP bit of WRITE SAME, in the mask of its CDB.
const UNMAP_BIT: u128 = 0x08 << (8 * 14);

impl Entry {
    /// A pending unit attention ends the command. SAM-5: INQUIRY, REPORT LUNS and REQUEST
    /// SENSE are executed.
    #[must_use]
    pub const fn is_affected_by_attention(&self) -> bool {
        !matches!(self.kind, Kind::Inquiry | Kind::ReportLuns | Kind::RequestSense)
    }

    /// Whether a disk has the command.
    #[must_use]
    pub fn is_offered(&self, facts: &Facts) -> bool {
        match self.needs {
            Needs::Nothing => true,
            Needs::Unmap => facts.unmap.is_some(),
            Needs::Compare => facts.compare_blocks_max > 0,
        }
    }

    /// CDB USAGE DATA (SPC-4) without a disk's limits: the operation code, the service
    /// action, and masks. Only the first `length` bytes mean something.
    fn usage_mask(&self) -> [u8; CDB_BYTES_MAX] {
        let mut usage = self.mask.to_be_bytes();
        usage[0] = self.opcode;
        if let Some(action) = self.action {
            usage[1] = usage[1] & !0x1f | action;
        }
        usage
    }

    /// CDB USAGE DATA of a disk. Without unmap, WRITE SAME has no UNMAP bit.
    #[must_use]
    pub fn usage(&self, facts: &Facts) -> [u8; CDB_BYTES_MAX] {
        let mut usage = self.usage_mask();
        if self.kind == Kind::WriteSame && facts.unmap.is_none() {
            usage[1] &= !UNMAP_BIT.to_be_bytes()[1];
        }
        usage
    }

    /// The first bit of a CDB that means nothing, as its byte and its bit in it.
    #[must_use]
    #[inline]
    pub fn unknown_bit(&self, cdb: &[u8; CDB_BYTES_MAX]) -> Option<(u16, u8)> {
        let unknown = u128::from_be_bytes(*cdb) & !self.mask;
        if unknown == 0 {
            return None;
        }
        let place = unknown.leading_zeros();
        let byte = u16::try_from(place / 8).unwrap_or(0);
        Some((byte, u8::try_from(7 - place % 8).unwrap_or(0)))
    }
}

pub use rows::TABLE;

/// Where an operation code begins in the table; past its end if it is not there.
static FIRST: [u8; 256] = first();

#[cfg_attr(not(test), expect(clippy::indexing_slicing, reason = "evaluated by the compiler"))]
const fn first() -> [u8; 256] {
    let mut first = [u8::MAX; 256];
    let mut at = TABLE.len();
    while at > 0 {
        at -= 1;
        #[expect(clippy::cast_possible_truncation, reason = "the table has less than 256 rows")]
        let place = at as u8;
        first[TABLE[at].opcode as usize] = place;
    }
    first
}

/// The result of looking a CDB up.
#[derive(Clone, Copy, Debug)]
pub enum Found {
    /// The command.
    Entry(&'static Entry),
    /// The operation code is known, but not with this service action.
    NoAction,
    /// The operation code is unknown.
    NoOpcode,
}

/// Looks up an operation code, and the service action in the low five bits of `action` if it has
/// some.
#[must_use]
#[inline]
pub fn find(opcode: u8, action: u8) -> Found {
    let first = FIRST.get(usize::from(opcode)).map_or(usize::MAX, |first| usize::from(*first));
    let Some(rows) = TABLE.get(first..) else { return Found::NoOpcode };
    // Mostly it is the first: commands of medium access have no service actions.
    for entry in rows.iter().take_while(|entry| entry.opcode == opcode) {
        if entry.action.is_none_or(|expected| expected == action & 0x1f) {
            return Found::Entry(entry);
        }
    }
    Found::NoAction
}

/// All commands that a disk has.
pub fn offered(facts: &Facts) -> impl Iterator<Item = &'static Entry> + '_ {
    TABLE.iter().filter(|entry| entry.is_offered(facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_has_no_duplicates() {
        for pair in TABLE.windows(2) {
            let key = |entry: &Entry| (entry.opcode, entry.action);
            assert!(key(&pair[0]) < key(&pair[1]), "{} {}", pair[0].name, pair[1].name);
            if pair[0].opcode == pair[1].opcode {
                assert!(pair.iter().all(|entry| entry.action.is_some()));
                assert_eq!(pair[0].length, pair[1].length);
            }
        }
    }

    #[test]
    fn the_length_follows_the_group_of_the_operation_code() {
        for entry in &TABLE {
            // SPC-4, OPERATION CODE.
            let expected = match entry.opcode >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                5 => 12,
                group => panic!("group {group}"),
            };
            assert_eq!(entry.length, expected, "{}", entry.name);
        }
    }

    #[test]
    fn every_entry_is_found_by_its_codes() {
        for entry in &TABLE {
            let Found::Entry(found) = find(entry.opcode, entry.action.unwrap_or(0)) else {
                panic!("{} is not found", entry.name);
            };
            assert_eq!(found.name, entry.name);
        }
        assert!(matches!(find(0x5f, 7), Found::NoAction));
        assert!(matches!(find(0x9e, 0), Found::NoAction));
        assert!(matches!(find(0xff, 0), Found::NoOpcode));
        assert!(matches!(find(0x01, 0), Found::NoOpcode));
    }

    #[test]
    fn no_mask_has_the_control_byte() {
        for entry in &TABLE {
            let usage = entry.usage_mask();
            assert_eq!(usage[usize::from(entry.length) - 1], 0, "{}", entry.name);
            assert_eq!(usage[0], entry.opcode);
            if let Some(action) = entry.action {
                assert_eq!(usage[1] & 0x1f, action);
            }
        }
    }
}
