//! REPORT SUPPORTED OPERATION CODES against the table, and both against what is executed.

mod common;

use common::{A, End, INVALID_FIELD, Unit, cdb, facts};
use scsi::sense::{Code, Key};
use scsi::table::{Direction, TABLE};
use scsi::{Buffers, Facts, Sense};

fn report(option: u8, opcode: u8, action: u16) -> Vec<u8> {
    let [high, low] = action.to_be_bytes();
    vec![0xa3, 0x0c, option, opcode, high, low, 0, 0, 0x20, 0, 0, 0]
}

/// A disk with everything, and one without what a disk may lack.
fn disks() -> [Facts; 2] {
    [facts(), Facts { unmap: None, compare_blocks_max: 0, ..facts() }]
}

#[test]
fn all_commands_are_those_of_the_table() {
    for facts in disks() {
        let mut unit = Unit::new(facts);
        let expected: Vec<_> = TABLE.iter().filter(|entry| entry.is_offered(&facts)).collect();
        for (timeouts, size) in [(0, 8), (0x80, 20)] {
            let data = unit.data(&report(timeouts, 0, 0));
            let (length, list) = data.split_at(4);
            assert_eq!(
                usize::try_from(u32::from_be_bytes(length.try_into().unwrap())).unwrap(),
                list.len()
            );
            assert_eq!(list.len(), expected.len() * size);
            for (descriptor, entry) in list.chunks(size).zip(&expected) {
                assert_eq!(descriptor[0], entry.opcode);
                assert_eq!(descriptor[3], entry.action.unwrap_or(0));
                assert_eq!(descriptor[5] & 1, u8::from(entry.action.is_some()));
                assert_eq!(descriptor[5] & 2 != 0, size == 20);
                assert_eq!(descriptor[7], entry.length);
                assert!(size == 8 || descriptor[8..] == [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            }
        }
    }
}

#[test]
fn one_command() {
    for facts in disks() {
        let mut unit = Unit::new(facts);
        for entry in TABLE.iter().filter(|entry| entry.is_offered(&facts)) {
            let action = u16::from(entry.action.unwrap_or(0));
            let option = if entry.action.is_some() { 2 } else { 1 };
            for option in [option, 3] {
                let data = unit.data(&report(option, entry.opcode, action));
                assert_eq!(data[..4], [0, 3, 0, entry.length], "{}", entry.name);
                assert_eq!(data[4..], entry.usage(&facts)[..usize::from(entry.length)]);
            }
            let timed = unit.data(&report(0x80 | 3, entry.opcode, action));
            assert_eq!(timed[1], 0x83);
            assert_eq!(timed.len(), usize::from(entry.length) + 16);
            // Option 1 is for commands without service actions, option 2 for those with.
            assert_eq!(unit.error(&report(3 - option, entry.opcode, action), &[]), INVALID_FIELD);
        }
        for option in 4..8 {
            assert_eq!(unit.error(&report(option, 0, 0), &[]), INVALID_FIELD);
        }
    }
}

#[test]
fn commands_that_are_not_supported() {
    let [_, plain] = disks();
    let mut unit = Unit::new(plain);
    for (option, opcode, action) in [
        (1, 0x04, 0),
        (1, 0x48, 0),
        (1, 0x42, 0),
        (1, 0x89, 0),
        (3, 0x04, 0),
        (3, 0x12, 1),
        (2, 0x04, 0),
        (2, 0x9e, 0),
        (2, 0x5f, 7),
        (2, 0x9e, 0x110),
        (3, 0x9e, 0x110),
    ] {
        assert_eq!(unit.data(&report(option, opcode, action)), [0, 1, 0, 0], "{opcode:x}");
    }
    // The UNMAP bit of WRITE SAME goes with the command.
    assert_eq!(unit.data(&report(1, 0x93, 0))[5], 0x01);
    assert_eq!(Unit::new(facts()).data(&report(1, 0x93, 0))[5], 0x09);
}

/// Sends every CDB of one set bit. It must be refused for an invalid field exactly if the bit is
/// not in CDB USAGE DATA, unless its value is: those are listed.
#[test]
fn what_is_reported_is_what_is_executed() {
    for facts in disks() {
        for entry in TABLE.iter().filter(|entry| entry.is_offered(&facts)) {
            let option = if entry.action.is_some() { 2 } else { 1 };
            let action = u16::from(entry.action.unwrap_or(0));
            let usage = Unit::new(facts).data(&report(option, entry.opcode, action))[4..].to_vec();
            for bit in 8..usage.len() * 8 {
                let (byte, mask) = (bit / 8, 0x80 >> (bit % 8));
                if entry.action.is_some() && byte == 1 && mask < 0x20 {
                    continue;
                }
                let mut cdb = cdb(&[entry.opcode, entry.action.unwrap_or(0)], usage.len());
                cdb[byte] |= mask;
                let mut unit = Unit::new(facts);
                let buffers = match entry.direction {
                    Direction::Out => Buffers { data_in: 0, data_out: 512 },
                    _ => Buffers { data_in: 512, data_out: 0 },
                };
                let end = unit.send_with(A, &cdb, &[0; 512], buffers);
                let field = match end {
                    End::Check(Sense { key, code, field, .. }) => {
                        let code = (key, code);
                        assert_ne!(code, (Key::IllegalRequest, Code::INVALID_OPERATION_CODE));
                        field.filter(|field| field.in_cdb).map(|field| (field.byte, field.bit))
                    }
                    _ => None,
                };
                let at = (u16::try_from(byte).unwrap(), Some(u8::try_from(7 - bit % 8).unwrap()));
                if usage[byte] & mask == 0 {
                    assert_eq!(field, Some(at), "{} {cdb:x?}", entry.name);
                } else if let Some((refused, _)) = field {
                    // A field of many values, of which this is not one.
                    assert!(
                        matches!(
                            (entry.opcode, refused),
                            // Page codes, BYTCHK, PF and SP, SELECT REPORT, reporting options,
                            // the number of blocks, type and scope, list identifier.
                            (0x12 | 0x1c | 0x1a | 0x5a | 0x4d, _)
                                | (0x2e | 0x2f | 0x8e | 0x8f | 0xae | 0xaf, 1)
                                | (0x15 | 0x55, 1)
                                | (0xa0, _)
                                | (0xa3, _)
                                | (0x89, 13)
                                | (0x5f | 0x84, 2)
                        ),
                        "{} {cdb:x?} {refused}",
                        entry.name
                    );
                }
            }
        }
    }
}

#[test]
fn operation_codes_outside_of_the_table_are_invalid() {
    let mut unit = Unit::new(facts());
    for opcode in 0..=255_u8 {
        let known = TABLE.iter().any(|entry| entry.opcode == opcode);
        let end = unit.send(A, &cdb(&[opcode], 32), &[]);
        let invalid = End::Check(Sense::illegal(Code::INVALID_OPERATION_CODE));
        assert_eq!(end == invalid, !known, "{opcode:x}");
    }
}

/// The names are those of the standards. What a disk could not keep is not offered: SANITIZE and
/// FORMAT UNIT, which go on after power on, and WRITE ATOMIC, which never tears.
#[test]
fn the_table_has_the_commands_of_the_issue() {
    let names: Vec<_> = TABLE.iter().map(|entry| entry.name).collect();
    for name in ["REPORT LUNS", "UNMAP", "WRITE SAME(16)", "ORWRITE(16)", "READ(6)"] {
        assert!(names.contains(&name), "{name}");
    }
    for opcode in [0x48, 0x04, 0x9c] {
        assert!(!TABLE.iter().any(|entry| entry.opcode == opcode));
    }
}

#[test]
fn task_management_functions() {
    let mut unit = Unit::new(facts());
    let report = |extended: u8, allocation: u8| {
        cdb(&[0xa3, 0x0d, extended, 0, 0, 0, 0, 0, 0, allocation], 12)
    };
    assert_eq!(unit.data(&report(0, 255)), [0xdc, 3, 0, 0]);
    let extended = [&[0xdc, 3, 0, 12][..], &[0; 12]].concat();
    assert_eq!(unit.data(&report(0x80, 255)), extended);
    assert_eq!(unit.data(&report(0, 4)).len(), 4);
    assert_eq!(unit.error(&report(0, 3), &[]), INVALID_FIELD);
}
