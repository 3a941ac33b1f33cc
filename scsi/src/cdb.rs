//! Decodes CDBs. The result has every field. A CDB that is not in the table, or that sets a bit
//! outside the usage mask of its command, is refused.

use crate::sense::{Code, Sense};
use crate::table::{self, CDB_BYTES_MAX, Entry, Found, Kind};

/// The blocks that a command of medium access names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// LOGICAL BLOCK ADDRESS.
    pub lba: u64,
    /// TRANSFER LENGTH, VERIFICATION LENGTH or NUMBER OF LOGICAL BLOCKS.
    pub blocks: u32,
}

/// What VERIFY and WRITE AND VERIFY compare: the BYTCHK field (SBC-3, VERIFY(10)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// 00b: nothing; the blocks are only read.
    Nothing,
    /// 01b: each block with its own data.
    Blocks,
    /// 11b: each block with the one block of data.
    Pattern,
}

/// The fields of MODE SENSE (SPC-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeQuery {
    /// The CDB has 10 bytes, so the header has 8.
    pub long: bool,
    /// LLBAA: the block descriptor may be long.
    pub long_lba: bool,
    /// DBD: no block descriptor.
    pub no_blocks: bool,
    /// PC.
    pub control: u8,
    /// PAGE CODE.
    pub page: u8,
    /// SUBPAGE CODE.
    pub subpage: u8,
    /// ALLOCATION LENGTH.
    pub allocation: u32,
}

/// The fields of REPORT SUPPORTED OPERATION CODES (SPC-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpcodeQuery {
    /// RCTD: with timeouts descriptors.
    pub timeouts: bool,
    /// REPORTING OPTIONS.
    pub option: u8,
    /// REQUESTED OPERATION CODE.
    pub opcode: u8,
    /// REQUESTED SERVICE ACTION.
    pub action: u16,
    /// ALLOCATION LENGTH.
    pub allocation: u32,
}

/// A decoded CDB. Allocation lengths and parameter list lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the standards")]
pub enum Command {
    TestUnitReady,
    RequestSense { descriptor: bool, allocation: u32 },
    Read { extent: Extent, fua: bool },
    Write { extent: Extent, fua: bool },
    WriteAndVerify { extent: Extent, compare: Compare },
    Verify { extent: Extent, compare: Compare },
    PreFetch { extent: Extent },
    SynchronizeCache { extent: Extent },
    WriteSame { extent: Extent, unmap: bool, no_data: bool },
    CompareAndWrite { extent: Extent, fua: bool },
    OrWrite { extent: Extent, fua: bool },
    Unmap { list: u32 },
    GetLbaStatus { lba: u64, allocation: u32 },
    Inquiry { vital: bool, page: u8, allocation: u32 },
    ModeSelect { long: bool, format: bool, save: bool, list: u32 },
    ModeSense(ModeQuery),
    Reserve,
    Release,
    StartStopUnit { start: bool, no_flush: bool },
    ReceiveDiagnosticResults { valid: bool, page: u8, allocation: u32 },
    SendDiagnostic,
    PreventAllowMediumRemoval,
    ReadCapacity10,
    ReadCapacity16 { allocation: u32 },
    ReadDefectData { long: bool, lists: u8, allocation: u32 },
    LogSense { page: u8, subpage: u8, allocation: u32 },
    PersistentReserveIn { action: u8, allocation: u32 },
    PersistentReserveOut { action: u8, scope: u8, kind: u8, list: u32 },
    ExtendedCopy { list: u32 },
    ReceiveCopyResults { action: u8, list: u8, allocation: u32 },
    ReportLuns { select: u8, allocation: u32 },
    ReportSupportedOperationCodes(OpcodeQuery),
    ReportSupportedTaskManagementFunctions { extended: bool, allocation: u32 },
}

/// A CDB of fixed size: what follows it is cut off, what is missing is zero.
pub type Bytes = [u8; CDB_BYTES_MAX];

/// The first bytes of a CDB.
#[must_use]
#[inline]
pub fn bytes(cdb: &[u8]) -> Bytes {
    // Those of virtio-scsi have 32 bytes.
    if let Some(bytes) = cdb.first_chunk() {
        return *bytes;
    }
    let mut bytes = [0; CDB_BYTES_MAX];
    bytes.iter_mut().zip(cdb).for_each(|(to, from)| *to = *from);
    bytes
}

/// The entry of a CDB in the table. An unknown operation code is INVALID COMMAND OPERATION CODE, an
/// unknown service action is INVALID FIELD IN CDB (SPC-4, SERVICE ACTION field).
///
/// # Errors
/// The sense data, if it is not in the table.
#[inline]
pub fn entry(cdb: &[u8]) -> Result<&'static Entry, Sense> {
    let Some(opcode) = cdb.first() else {
        return Err(Sense::illegal(Code::INVALID_OPERATION_CODE));
    };
    match table::find(*opcode, cdb.get(1).map_or(0, |byte| *byte)) {
        Found::Entry(entry) => Ok(entry),
        Found::NoAction => Err(Sense::in_cdb(1, Some(4))),
        Found::NoOpcode => Err(Sense::illegal(Code::INVALID_OPERATION_CODE)),
    }
}

/// Decodes a CDB. Bytes after its end are ignored.
///
/// # Errors
/// ILLEGAL REQUEST: the operation code, or the field at fault. NACA is such a field.
#[inline]
pub fn decode(cdb: &[u8]) -> Result<Command, Sense> {
    decode_as(entry(cdb)?, cdb)
}

/// Decodes a CDB whose entry in the table is known.
///
/// # Errors
/// ILLEGAL REQUEST: the field at fault.
#[inline]
pub fn decode_as(entry: &Entry, cdb: &[u8]) -> Result<Command, Sense> {
    if cdb.len() < usize::from(entry.length) {
        return Err(Sense::in_cdb(u16::try_from(cdb.len()).unwrap_or(u16::MAX), None));
    }
    let cdb = &bytes(cdb);
    if let Some((byte, bit)) = entry.unknown_bit(cdb) {
        return Err(Sense::in_cdb(byte, Some(bit)));
    }
    match entry.kind {
        Kind::Read => Ok(Command::Read { extent: extent(entry, cdb), fua: fua(entry, cdb) }),
        Kind::Write => Ok(Command::Write { extent: extent(entry, cdb), fua: fua(entry, cdb) }),
        Kind::WriteAndVerify
        | Kind::Verify
        | Kind::PreFetch
        | Kind::SynchronizeCache
        | Kind::WriteSame
        | Kind::CompareAndWrite
        | Kind::OrWrite => medium(entry, cdb),
        _ => Ok(other(entry, cdb)),
    }
}

/// LBA and length (SBC-3). In a CDB of 6 bytes a length of 0 is 256 blocks (READ(6)).
fn extent(entry: &Entry, cdb: &Bytes) -> Extent {
    let lba32 = u32::from_be_bytes([cdb[2], cdb[3], cdb[4], cdb[5]]);
    match entry.length {
        6 => Extent {
            lba: u64::from(u32::from_be_bytes([0, cdb[1], cdb[2], cdb[3]])),
            blocks: if cdb[4] == 0 { 256 } else { u32::from(cdb[4]) },
        },
        10 => Extent {
            lba: u64::from(lba32),
            blocks: u32::from(u16::from_be_bytes([cdb[7], cdb[8]])),
        },
        12 => Extent {
            lba: u64::from(lba32),
            blocks: u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]),
        },
        _ => Extent {
            lba: lba64(cdb),
            blocks: if entry.kind == Kind::CompareAndWrite {
                u32::from(cdb[13])
            } else {
                u32::from_be_bytes([cdb[10], cdb[11], cdb[12], cdb[13]])
            },
        },
    }
}

fn lba64(cdb: &Bytes) -> u64 {
    u64::from_be_bytes([cdb[2], cdb[3], cdb[4], cdb[5], cdb[6], cdb[7], cdb[8], cdb[9]])
}

fn fua(entry: &Entry, cdb: &Bytes) -> bool {
    entry.length > 6 && cdb[1] & 0x08 != 0
}

fn medium(entry: &Entry, cdb: &Bytes) -> Result<Command, Sense> {
    let extent = extent(entry, cdb);
    let compare = match cdb[1] >> 1 & 3 {
        0 => Ok(Compare::Nothing),
        1 => Ok(Compare::Blocks),
        3 if entry.kind == Kind::Verify => Ok(Compare::Pattern),
        _ => Err(Sense::in_cdb(1, Some(2))),
    };
    Ok(match entry.kind {
        Kind::WriteAndVerify => Command::WriteAndVerify { extent, compare: compare? },
        Kind::Verify => Command::Verify { extent, compare: compare? },
        Kind::PreFetch => Command::PreFetch { extent },
        Kind::WriteSame => {
            Command::WriteSame { extent, unmap: cdb[1] & 0x08 != 0, no_data: cdb[1] & 0x01 != 0 }
        }
        Kind::CompareAndWrite => Command::CompareAndWrite { extent, fua: fua(entry, cdb) },
        Kind::OrWrite => Command::OrWrite { extent, fua: fua(entry, cdb) },
        _ => Command::SynchronizeCache { extent },
    })
}

/// The commands without medium access.
fn other(entry: &Entry, cdb: &Bytes) -> Command {
    let at3 = u32::from(u16::from_be_bytes([cdb[3], cdb[4]]));
    let at7 = u32::from(u16::from_be_bytes([cdb[7], cdb[8]]));
    let at6 = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]);
    let at10 = u32::from_be_bytes([cdb[10], cdb[11], cdb[12], cdb[13]]);
    let (low, page) = (cdb[1] & 1 != 0, cdb[2]);
    match entry.kind {
        Kind::RequestSense => {
            Command::RequestSense { descriptor: low, allocation: u32::from(cdb[4]) }
        }
        Kind::Inquiry => Command::Inquiry { vital: low, page, allocation: at3 },
        Kind::ModeSelect6 => mode_select(false, cdb, u32::from(cdb[4])),
        Kind::ModeSelect10 => mode_select(true, cdb, at7),
        Kind::ModeSense6 => mode_sense(false, cdb, u32::from(cdb[4])),
        Kind::ModeSense10 => mode_sense(true, cdb, at7),
        Kind::Reserve => Command::Reserve,
        Kind::Release => Command::Release,
        Kind::StartStopUnit => {
            Command::StartStopUnit { start: cdb[4] & 1 != 0, no_flush: cdb[4] & 4 != 0 }
        }
        Kind::ReceiveDiagnosticResults => {
            Command::ReceiveDiagnosticResults { valid: low, page, allocation: at3 }
        }
        Kind::SendDiagnostic => Command::SendDiagnostic,
        Kind::PreventAllowMediumRemoval => Command::PreventAllowMediumRemoval,
        Kind::ReadCapacity10 => Command::ReadCapacity10,
        Kind::ReadCapacity16 => Command::ReadCapacity16 { allocation: at10 },
        Kind::GetLbaStatus => Command::GetLbaStatus { lba: lba64(cdb), allocation: at10 },
        Kind::ReadDefectData10 => {
            Command::ReadDefectData { long: false, lists: page, allocation: at7 }
        }
        Kind::ReadDefectData12 => {
            Command::ReadDefectData { long: true, lists: cdb[1], allocation: at6 }
        }
        Kind::Unmap => Command::Unmap { list: at7 },
        Kind::LogSense => Command::LogSense { page: page & 0x3f, subpage: cdb[3], allocation: at7 },
        Kind::PersistentReserveIn => {
            Command::PersistentReserveIn { action: cdb[1] & 0x1f, allocation: at7 }
        }
        Kind::PersistentReserveOut => Command::PersistentReserveOut {
            action: cdb[1] & 0x1f,
            scope: cdb[2] >> 4,
            kind: cdb[2] & 0x0f,
            list: u32::from_be_bytes([cdb[5], cdb[6], cdb[7], cdb[8]]),
        },
        Kind::ExtendedCopy => Command::ExtendedCopy { list: at10 },
        Kind::ReceiveCopyResults => {
            Command::ReceiveCopyResults { action: cdb[1] & 0x1f, list: page, allocation: at10 }
        }
        Kind::ReportLuns => Command::ReportLuns { select: cdb[2], allocation: at6 },
        Kind::ReportSupportedOperationCodes => opcode_query(cdb, at6),
        Kind::ReportSupportedTaskManagementFunctions => {
            let extended = cdb[2] & 0x80 != 0;
            Command::ReportSupportedTaskManagementFunctions { extended, allocation: at6 }
        }
        _ => Command::TestUnitReady,
    }
}

fn mode_select(long: bool, cdb: &Bytes, list: u32) -> Command {
    Command::ModeSelect { long, format: cdb[1] & 0x10 != 0, save: cdb[1] & 1 != 0, list }
}

fn mode_sense(long: bool, cdb: &Bytes, allocation: u32) -> Command {
    Command::ModeSense(ModeQuery {
        long,
        long_lba: long && cdb[1] & 0x10 != 0,
        no_blocks: cdb[1] & 0x08 != 0,
        control: cdb[2] >> 6,
        page: cdb[2] & 0x3f,
        subpage: cdb[3],
        allocation,
    })
}

fn opcode_query(cdb: &Bytes, allocation: u32) -> Command {
    Command::ReportSupportedOperationCodes(OpcodeQuery {
        timeouts: cdb[2] & 0x80 != 0,
        option: cdb[2] & 7,
        opcode: cdb[3],
        action: u16::from_be_bytes([cdb[4], cdb[5]]),
        allocation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(cdb: &[u8]) -> Sense {
        decode(cdb).expect_err("refused")
    }

    #[test]
    fn reads_and_writes_of_each_length() {
        let read = |cdb: &[u8]| match decode(cdb) {
            Ok(Command::Read { extent, fua }) => (extent.lba, extent.blocks, fua),
            other => panic!("{other:?}"),
        };
        assert_eq!(read(&[0x08, 0x1f, 0xff, 0xfe, 2, 0]), (0x1f_fffe, 2, false));
        assert_eq!(read(&[0x08, 0, 0, 1, 0, 0]), (1, 256, false));
        assert_eq!(read(&[0x28, 0x18, 1, 2, 3, 4, 0, 5, 6, 0]), (0x0102_0304, 0x0506, true));
        assert_eq!(
            read(&[0xa8, 0x10, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]),
            (0x0102_0304, 0x0506_0708, false)
        );
        let long = [0x88, 0x08, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0xff, 0xff];
        assert_eq!(read(&long), (0x0102_0304_0506_0708, 0x090a_0b0c, true));
        assert!(matches!(decode(&[0x0a, 0, 0, 0, 1, 0]), Ok(Command::Write { fua: false, .. })));
        assert!(matches!(
            decode(&[0x2a, 8, 0, 0, 0, 0, 0, 0, 1, 0]),
            Ok(Command::Write { fua: true, .. })
        ));
    }

    #[test]
    fn unknown_bits_are_pointed_at() {
        // RDPROTECT, the obsolete LUN of READ(6), NACA, a bit beside the group number, an unknown
        // service action.
        assert_eq!(refused(&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0]), Sense::in_cdb(1, Some(5)));
        assert_eq!(refused(&[0x08, 0xe0, 0, 0, 1, 0]), Sense::in_cdb(1, Some(7)));
        assert_eq!(refused(&[0x00, 0, 0, 0, 0, 4]), Sense::in_cdb(5, Some(2)));
        assert_eq!(refused(&[0x2a, 0, 0, 0, 0, 0, 0x3f, 0, 1, 0]), Sense::in_cdb(6, Some(5)));
        assert_eq!(refused(&[0x5f, 7, 0, 0, 0, 0, 0, 0, 24, 0]), Sense::in_cdb(1, Some(4)));
        // BYTCHK 10b; 11b for a write.
        assert_eq!(refused(&[0x2f, 4, 0, 0, 0, 0, 0, 0, 1, 0]), Sense::in_cdb(1, Some(2)));
        assert_eq!(refused(&[0x2e, 6, 0, 0, 0, 0, 0, 0, 1, 0]), Sense::in_cdb(1, Some(2)));
    }

    #[test]
    fn unknown_codes_and_short_cdbs_are_refused() {
        let invalid = Sense::illegal(Code::INVALID_OPERATION_CODE);
        assert_eq!(refused(&[]), invalid);
        for opcode in [0x04, 0x38, 0x48, 0x7f, 0x85, 0x9c, 0xc0, 0xff] {
            assert_eq!(refused(&[opcode; 32]), invalid, "{opcode:#x}");
        }
        assert_eq!(refused(&[0x28, 0, 0]), Sense::in_cdb(3, None));
    }

    #[test]
    fn each_bit_is_accepted_if_and_only_if_it_is_in_the_mask() {
        for entry in &table::TABLE {
            for bit in 8..usize::from(entry.length) * 8 {
                let mut cdb = [0; CDB_BYTES_MAX];
                cdb[0] = entry.opcode;
                cdb[1] = entry.action.unwrap_or(0);
                if entry.action.is_some() && (11..16).contains(&bit) {
                    continue;
                }
                cdb[bit / 8] ^= 0x80 >> (bit % 8);
                let known = entry.unknown_bit(&cdb).is_none();
                let decoded = decode(&cdb);
                let reserved_value =
                    matches!(entry.kind, Kind::Verify | Kind::WriteAndVerify) && cdb[1] == 4;
                assert_eq!(decoded.is_ok(), known && !reserved_value, "{} {bit}", entry.name);
                if !known {
                    let at = u16::try_from(bit / 8).unwrap();
                    let bit = u8::try_from(7 - bit % 8).unwrap();
                    assert_eq!(decoded, Err(Sense::in_cdb(at, Some(bit))));
                }
            }
        }
    }
}
