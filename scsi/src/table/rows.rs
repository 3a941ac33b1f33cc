//! The rows of the table.

use super::{Access, Direction, Entry, Kind, Needs};

/// One row: the slice has the usage masks of the bytes after the operation code.
#[cfg_attr(not(test), expect(clippy::indexing_slicing, reason = "evaluated by the compiler"))]
const fn row(
    opcode: u8,
    action: Option<u8>,
    name: &'static str,
    masks: &[u8],
    direction: Direction,
    access: Access,
    kind: Kind,
) -> Entry {
    let mut mask = u128::MAX;
    let mut at = 0;
    while at < masks.len() {
        mask &= !(((masks[at] ^ 0xff) as u128) << (8 * (14 - at)));
        at += 1;
    }
    let needs = match kind {
        Kind::Unmap => Needs::Unmap,
        Kind::CompareAndWrite => Needs::Compare,
        _ => Needs::Nothing,
    };
    #[expect(clippy::cast_possible_truncation, reason = "at most 15 masks")]
    let length = masks.len() as u8 + 1;
    Entry { opcode, action, name, length, mask, direction, access, needs, kind }
}

use Access::{Allow, Any, Own, Query, Start};
use Direction::{In, None as No, Out};
use Kind::{
    CompareAndWrite, ExtendedCopy, GetLbaStatus, Inquiry, LogSense, ModeSelect6, ModeSelect10,
    ModeSense6, ModeSense10, OrWrite, PersistentReserveIn, PersistentReserveOut, PreFetch,
    PreventAllowMediumRemoval, ReadCapacity10, ReadCapacity16, ReadDefectData10, ReadDefectData12,
    ReceiveCopyResults, ReceiveDiagnosticResults, Release, ReportLuns,
    ReportSupportedOperationCodes, ReportSupportedTaskManagementFunctions, RequestSense, Reserve,
    SendDiagnostic, StartStopUnit, SynchronizeCache, TestUnitReady, Unmap, Verify, WriteAndVerify,
    WriteSame,
};

/// CDBs of medium access: byte 1, the LBA, GROUP NUMBER, the length, control.
const fn medium6(
    opcode: u8,
    name: &'static str,
    out: Direction,
    access: Access,
    kind: Kind,
) -> Entry {
    row(opcode, None, name, &[0x1f, 0xff, 0xff, 0xff, 0], out, access, kind)
}

const fn medium10(
    opcode: u8,
    name: &'static str,
    flags: u8,
    direction: Direction,
    access: Access,
    kind: Kind,
) -> Entry {
    let masks = [flags, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, 0];
    row(opcode, None, name, &masks, direction, access, kind)
}

const fn medium12(
    opcode: u8,
    name: &'static str,
    flags: u8,
    direction: Direction,
    access: Access,
    kind: Kind,
) -> Entry {
    let masks = [flags, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, 0];
    row(opcode, None, name, &masks, direction, access, kind)
}

const fn medium16(
    opcode: u8,
    name: &'static str,
    flags: u8,
    direction: Direction,
    access: Access,
    kind: Kind,
) -> Entry {
    let masks =
        [flags, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, 0];
    row(opcode, None, name, &masks, direction, access, kind)
}

const fn persistent_in(action: u8, name: &'static str) -> Entry {
    let masks = [0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    row(0x5e, Some(action), name, &masks, In, Own, PersistentReserveIn)
}

const fn persistent_out(action: u8, name: &'static str) -> Entry {
    let masks = [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    row(0x5f, Some(action), name, &masks, Out, Own, PersistentReserveOut)
}

const fn copy_results(action: u8, name: &'static str, list: u8) -> Entry {
    let masks = [0x1f, list, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
    row(0x84, Some(action), name, &masks, In, Query, ReceiveCopyResults)
}

/// DPO and FUA.
const CACHE: u8 = 0x18;
/// DPO and BYTCHK.
const CHECK: u8 = 0x16;
/// IMMED.
const IMMED: u8 = 0x02;
/// GROUP NUMBER (SBC-3, grouping function). It is taken and not used, as in SPDK: GROUP_SUP is 0.
const GROUP: u8 = 0x1f;

/// The table, in the order of the operation codes. Sources: SPC-4 and SBC-3, and SPC-2
/// for RESERVE and RELEASE.
///
/// ANCHOR is in no mask, since anchored blocks are not offered (ANC_SUP is 0); nor are RDPROTECT,
/// WRPROTECT and VRPROTECT, since no protection information is.
pub static TABLE: [Entry; 61] = [
    row(0x00, None, "TEST UNIT READY", &[0; 5], No, Query, TestUnitReady),
    row(0x03, None, "REQUEST SENSE", &[0x01, 0, 0, 0xff, 0], In, Any, RequestSense),
    medium6(0x08, "READ(6)", In, Access::Read, Kind::Read),
    medium6(0x0a, "WRITE(6)", Out, Access::Write, Kind::Write),
    row(0x12, None, "INQUIRY", &[0x01, 0xff, 0xff, 0xff, 0], In, Any, Inquiry),
    row(0x15, None, "MODE SELECT(6)", &[0x11, 0, 0, 0xff, 0], Out, Access::Write, ModeSelect6),
    row(0x16, None, "RESERVE(6)", &[0; 5], No, Own, Reserve),
    row(0x17, None, "RELEASE(6)", &[0; 5], No, Own, Release),
    row(0x1a, None, "MODE SENSE(6)", &[8, 0xff, 0xff, 0xff, 0], In, Access::Read, ModeSense6),
    row(0x1b, None, "START STOP UNIT", &[0x01, 0, 0, 0x05, 0], No, Start, StartStopUnit),
    row(
        0x1c,
        None,
        "RECEIVE DIAGNOSTIC RESULTS",
        &[0x01, 0xff, 0xff, 0xff, 0],
        In,
        Access::Read,
        ReceiveDiagnosticResults,
    ),
    row(0x1d, None, "SEND DIAGNOSTIC", &[0x14, 0, 0, 0, 0], No, Access::Write, SendDiagnostic),
    row(
        0x1e,
        None,
        "PREVENT ALLOW MEDIUM REMOVAL",
        &[0, 0, 0, 0x01, 0],
        No,
        Allow,
        PreventAllowMediumRemoval,
    ),
    row(0x25, None, "READ CAPACITY(10)", &[0; 9], In, Any, ReadCapacity10),
    medium10(0x28, "READ(10)", CACHE, In, Access::Read, Kind::Read),
    medium10(0x2a, "WRITE(10)", CACHE, Out, Access::Write, Kind::Write),
    medium10(0x2e, "WRITE AND VERIFY(10)", CHECK, Out, Access::Write, WriteAndVerify),
    medium10(0x2f, "VERIFY(10)", CHECK, Out, Access::Read, Verify),
    medium10(0x34, "PRE-FETCH(10)", IMMED, No, Access::Read, PreFetch),
    medium10(0x35, "SYNCHRONIZE CACHE(10)", IMMED, No, Access::Write, SynchronizeCache),
    row(
        0x37,
        None,
        "READ DEFECT DATA(10)",
        &[0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0],
        In,
        Access::Read,
        ReadDefectData10,
    ),
    medium10(0x41, "WRITE SAME(10)", 0x08, Out, Access::Write, WriteSame),
    row(0x42, None, "UNMAP", &[0, 0, 0, 0, 0, GROUP, 0xff, 0xff, 0], Out, Access::Write, Unmap),
    row(0x4d, None, "LOG SENSE", &[0, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0], In, Any, LogSense),
    row(
        0x55,
        None,
        "MODE SELECT(10)",
        &[0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 0],
        Out,
        Access::Write,
        ModeSelect10,
    ),
    row(0x56, None, "RESERVE(10)", &[0; 9], No, Own, Reserve),
    row(0x57, None, "RELEASE(10)", &[0; 9], No, Own, Release),
    row(
        0x5a,
        None,
        "MODE SENSE(10)",
        &[0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0],
        In,
        Access::Read,
        ModeSense10,
    ),
    persistent_in(0x00, "READ KEYS"),
    persistent_in(0x01, "READ RESERVATION"),
    persistent_in(0x02, "REPORT CAPABILITIES"),
    persistent_in(0x03, "READ FULL STATUS"),
    persistent_out(0x00, "REGISTER"),
    persistent_out(0x01, "RESERVE"),
    persistent_out(0x02, "RELEASE"),
    persistent_out(0x03, "CLEAR"),
    persistent_out(0x04, "PREEMPT"),
    persistent_out(0x05, "PREEMPT AND ABORT"),
    persistent_out(0x06, "REGISTER AND IGNORE EXISTING KEY"),
    row(
        0x83,
        Some(0x00),
        "EXTENDED COPY(LID1)",
        &[0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        Out,
        Access::Write,
        ExtendedCopy,
    ),
    copy_results(0x00, "RECEIVE COPY STATUS(LID1)", 0xff),
    copy_results(0x03, "RECEIVE COPY OPERATING PARAMETERS", 0),
    medium16(0x88, "READ(16)", CACHE, In, Access::Read, Kind::Read),
    row(
        0x89,
        None,
        "COMPARE AND WRITE",
        &[CACHE, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, GROUP, 0],
        Out,
        Access::Write,
        CompareAndWrite,
    ),
    medium16(0x8a, "WRITE(16)", CACHE, Out, Access::Write, Kind::Write),
    medium16(0x8b, "ORWRITE(16)", CACHE, Out, Access::Write, OrWrite),
    medium16(0x8e, "WRITE AND VERIFY(16)", CHECK, Out, Access::Write, WriteAndVerify),
    medium16(0x8f, "VERIFY(16)", CHECK, Out, Access::Read, Verify),
    medium16(0x90, "PRE-FETCH(16)", IMMED, No, Access::Read, PreFetch),
    medium16(0x91, "SYNCHRONIZE CACHE(16)", IMMED, No, Access::Write, SynchronizeCache),
    medium16(0x93, "WRITE SAME(16)", 0x09, Out, Access::Write, WriteSame),
    row(
        0x9e,
        Some(0x10),
        "READ CAPACITY(16)",
        &[0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        In,
        Any,
        ReadCapacity16,
    ),
    row(
        0x9e,
        Some(0x12),
        "GET LBA STATUS",
        &[0x1f, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0],
        In,
        Access::Read,
        GetLbaStatus,
    ),
    row(
        0xa0,
        None,
        "REPORT LUNS",
        &[0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        In,
        Any,
        ReportLuns,
    ),
    row(
        0xa3,
        Some(0x0c),
        "REPORT SUPPORTED OPERATION CODES",
        &[0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        In,
        Access::Read,
        ReportSupportedOperationCodes,
    ),
    row(
        0xa3,
        Some(0x0d),
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        &[0x1f, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        In,
        Access::Read,
        ReportSupportedTaskManagementFunctions,
    ),
    medium12(0xa8, "READ(12)", CACHE, In, Access::Read, Kind::Read),
    medium12(0xaa, "WRITE(12)", CACHE, Out, Access::Write, Kind::Write),
    medium12(0xae, "WRITE AND VERIFY(12)", CHECK, Out, Access::Write, WriteAndVerify),
    medium12(0xaf, "VERIFY(12)", CHECK, Out, Access::Read, Verify),
    row(
        0xb7,
        None,
        "READ DEFECT DATA(12)",
        &[0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        In,
        Access::Read,
        ReadDefectData12,
    ),
];
