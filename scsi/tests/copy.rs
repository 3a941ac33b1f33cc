//! EXTENDED COPY and RECEIVE COPY RESULTS: the plan, the order of the checks, and what is held.

mod common;

use common::{A, B, End, INVALID_FIELD, INVALID_LIST, LIST_LENGTH, PROTECTED, Unit, cdb, facts};
use scsi::sense::Key;
use scsi::{Facts, Failure, Flush, Nexus, Op, Outcome, Plan, Range, Status};

/// Bytes of a list with one target and one segment.
const LIST_BYTES: usize = 76;

/// COPY ABORTED, for other reasons than those with a code.
const ABORTED: (Key, u8, u8) = (Key::CopyAborted, 0, 0);

/// A parameter list: this logical unit is the one target, and there is one segment.
fn list(identifier: u8, from: u64, to: u64, blocks: u16) -> Vec<u8> {
    let header = [identifier, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    let parts: [&[u8]; 8] = [
        &header,
        &[0xe4, 0, 0, 0, 1, 3, 0, 8],
        &facts().identity.naa.to_be_bytes(),
        // The rest of the designator, and the block size.
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0],
        &[2, 0, 0, 0x18, 0, 0, 0, 0, 0, 0],
        &blocks.to_be_bytes(),
        &from.to_be_bytes(),
        &to.to_be_bytes(),
    ];
    parts.concat()
}

fn copy(list: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(list.len()).expect("a short list").to_be_bytes();
    cdb(&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low], 16)
}

fn status(identifier: u8) -> Vec<u8> {
    cdb(&[0x84, 0, identifier, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 16)
}

impl Unit {
    fn copy(&mut self, list: &[u8]) -> Plan {
        self.plan(&copy(list), list)
    }

    fn refused(&mut self, list: &[u8]) -> (Key, u8, u8) {
        self.error(&copy(list), list)
    }

    /// The list with some bytes changed.
    fn refused_with(&mut self, changes: &[(usize, u8)]) -> (Key, u8, u8) {
        let mut list = list(0, 0, 500, 10);
        changes.iter().for_each(|(at, byte)| list[*at] = *byte);
        self.refused(&list)
    }
}

#[test]
fn a_segment_is_a_plan() {
    let mut unit = Unit::new(facts());
    let plan = unit.copy(&list(7, 3, 990, 10));
    assert_eq!(plan.op, Op::Copy { from: 3, list: Some(7) });
    assert_eq!(plan.range, Range { lba: 990, blocks: 10 });
    assert_eq!((plan.flush, plan.exclusive, plan.transfer_bytes()), (Flush::No, false, 76));
    let done = Outcome::of(&plan, &facts(), Ok(()));
    assert_eq!((done.status, done.transferred.bytes), (Status::Good, 76));
    // Without an identifier, or with one whose result is discarded.
    for usage in [0x10, 0x18] {
        let mut list = list(0, 990, 3, 10);
        list[1] = usage;
        assert_eq!(unit.copy(&list).op, Op::Copy { from: 990, list: None });
    }
    // The second of two targets; the block size of the disk; obsolete fields of SPC-3.
    let mut two = list(0, 0, 500, 1);
    (two[3], two[17], two[45], two[46]) = (64, 0xa0, 0, 0);
    let second = two[16..48].to_vec();
    two.splice(16..16, second);
    (two[16 + 8], two[80 + 5], two[80 + 7]) = (0xff, 1, 1);
    assert_eq!(unit.copy(&two).range, Range { lba: 500, blocks: 1 });
    // The first is another disk.
    two[80 + 5] = 0;
    assert_eq!(unit.refused(&two), (Key::CopyAborted, 0x0d, 2));
}

#[test]
fn without_blocks_nothing_is_copied() {
    let mut unit = Unit::new(facts());
    unit.good(A, &copy(&[]), &[]);
    let mut no_segment = list(1, 0, 0, 0)[..48].to_vec();
    no_segment[11] = 0;
    for list in [list(1, 0, 0, 0), list(1, 1000, 1000, 0), no_segment] {
        unit.good(A, &copy(&list), &list);
        assert_eq!(unit.data(&status(1)), [0, 0, 0, 8, 1, 0, 1, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn an_initiator_that_begins_anew_is_not_told_of_earlier_copies() {
    let mut unit = Unit::new(facts());
    let list = list(1, 0, 0, 0);
    unit.good(A, &copy(&list), &list);
    // A page of vital product data, which a copy needs, changes nothing.
    unit.data(&[0x12, 1, 0x83, 0, 96, 0]);
    assert_eq!(unit.data(&status(1)).len(), 12);
    unit.good(A, &copy(&list), &list);
    unit.data(&[0x12, 0, 0, 0, 96, 0]);
    assert_eq!(unit.error(&status(1), &[]), (Key::IllegalRequest, 0x24, 0));
}

#[test]
fn lengths_of_the_list() {
    let mut unit = Unit::new(facts());
    let list = list(0, 0, 500, 10);
    for len in 1..LIST_BYTES {
        assert_eq!(unit.refused(&list[..len]), LIST_LENGTH, "{len}");
    }
    // More than the buffer has, and what follows the descriptors.
    assert_eq!(unit.error(&copy(&list), &list[..LIST_BYTES - 1]), LIST_LENGTH);
    unit.copy(&[&list[..], &[0; 10]].concat());
    // More descriptors than fit into any list.
    assert_eq!(unit.refused_with(&[(2, 4)]), LIST_LENGTH);
    assert_eq!(unit.refused_with(&[(8, 0xff), (9, 0xff), (10, 0xff), (11, 0xff)]), LIST_LENGTH);
    assert_eq!(unit.refused_with(&[(15, 1)]), (Key::IllegalRequest, 0x26, 0x0b));
    assert_eq!(unit.refused_with(&[(1, 0x08)]), INVALID_LIST);
}

#[test]
fn too_many_descriptors() {
    let mut unit = Unit::new(facts());
    let one = list(0, 0, 500, 10);
    let target = &one[16..48];
    let mut targets = [&one[..16], target, target, &one[16..]].concat();
    targets[3] = 96;
    assert_eq!(unit.refused(&targets), (Key::IllegalRequest, 0x26, 6));
    let mut segments = [&one[..], &one[48..]].concat();
    segments[11] = 56;
    assert_eq!(unit.refused(&segments), (Key::IllegalRequest, 0x26, 8));
}

#[test]
fn bad_descriptors() {
    let mut unit = Unit::new(facts());
    assert_eq!(unit.refused_with(&[(3, 33)]), INVALID_LIST);
    // The type codes of a target and of a segment.
    assert_eq!(unit.refused_with(&[(16, 0xe0)]), (Key::IllegalRequest, 0x26, 7));
    assert_eq!(unit.refused_with(&[(48, 3)]), (Key::IllegalRequest, 0x26, 9));
    // A block size that is not the disk's, and the length of the segment.
    assert_eq!(unit.refused_with(&[(46, 4)]), INVALID_LIST);
    assert_eq!(unit.refused_with(&[(51, 0x17)]), INVALID_LIST);
    // A source and a destination that are not in the list.
    assert_eq!(unit.refused_with(&[(53, 1)]), (Key::CopyAborted, 0x08, 4));
    assert_eq!(unit.refused_with(&[(55, 1)]), (Key::CopyAborted, 0x08, 4));
    // Another designator: code set, association, type, length, value.
    for change in [(20, 2), (21, 0x13), (21, 2), (23, 16), (24, 0), (31, 0)] {
        assert_eq!(unit.refused_with(&[change]), (Key::CopyAborted, 0x0d, 2));
    }
    for (from, to) in [(991, 0), (0, 991), (u64::MAX, 0), (0, u64::MAX - 5)] {
        assert_eq!(unit.refused(&list(0, from, to, 10)), ABORTED);
    }
    // None of them is known afterwards.
    assert_eq!(unit.error(&status(0), &[]), INVALID_FIELD);
    // Other service actions.
    for bad in [cdb(&[0x83, 1], 16), cdb(&[0x84, 1], 16), cdb(&[0x84, 4], 16)] {
        assert_eq!(unit.error(&bad, &[]), INVALID_FIELD);
    }
}

#[test]
fn protection_stopped_units_and_the_write_cache() {
    let mut unit = Unit::new(Facts { read_only: true, ..facts() });
    assert_eq!(unit.refused(&list(0, 0, 500, 10)), PROTECTED);
    let mut unit = Unit::new(facts());
    assert!(matches!(unit.send(A, &[0x1b, 0, 0, 0, 0, 0], &[]), End::Io(_)));
    assert_eq!(unit.refused(&list(0, 0, 500, 10)), (Key::NotReady, 4, 2));
    unit.good(A, &[0x1b, 0, 0, 0, 1, 0], &[]);
    let off = [&[0, 0, 0, 0, 8, 18][..], &[0; 18]].concat();
    assert_eq!(unit.plan(&[0x15, 0x10, 0, 0, 24, 0], &off).op, Op::Flush);
    assert_eq!(unit.copy(&list(0, 0, 500, 10)).flush, Flush::After);
}

#[test]
fn failures() {
    let mut unit = Unit::new(facts());
    let plan = unit.copy(&list(0, 0, 500, 10));
    let code = |failure: Failure| {
        let sense = Outcome::of(&plan, &facts(), Err(failure)).sense.expect("sense data");
        (sense.key, sense.code.0, sense.code.1)
    };
    for failure in [Failure::Medium(Some(3)), Failure::OutOfRange, Failure::Device] {
        assert_eq!(code(failure), (Key::CopyAborted, 0x0d, 1));
    }
    assert_eq!(code(Failure::ReadOnly), PROTECTED);
    assert_eq!(code(Failure::NoSpace), (Key::DataProtect, 0x27, 7));
}

#[test]
fn results_are_held_until_they_are_told() {
    let mut unit = Unit::new(facts());
    assert_eq!(unit.error(&status(7), &[]), INVALID_FIELD);
    let plan = unit.copy(&list(7, 0, 500, 10));
    // While it runs, it may be asked for again and again.
    for _ in 0..2 {
        assert_eq!(unit.data(&status(7)), [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    unit.lu.copied(A, &plan, Ok(()));
    // Other identifiers and nexuses know nothing of it.
    assert_eq!(unit.error(&status(8), &[]), INVALID_FIELD);
    assert!(matches!(unit.send(B, &status(7), &[]), End::Check(_)));
    assert_eq!(unit.data(&status(7)), [0, 0, 0, 8, 1, 0, 1, 0, 0, 0, 0x14, 0]);
    assert_eq!(unit.error(&status(7), &[]), INVALID_FIELD);
    let plan = unit.copy(&list(7, 0, 500, 10));
    unit.lu.copied(A, &plan, Err(Failure::Device));
    assert_eq!(unit.data(&status(7)), [0, 0, 0, 8, 2, 0, 0, 0, 0, 0, 0, 0]);
    // The result of an earlier copy with the identifier is forgotten.
    unit.lu.copied(A, &plan, Ok(()));
    unit.copy(&list(7, 0, 500, 10));
    assert_eq!(unit.data(&status(7))[4], 0);
    // Plans without an identifier, and of other commands, are not held.
    let mut unidentified = list(9, 0, 500, 10);
    unidentified[1] = 0x18;
    let plan = unit.copy(&unidentified);
    unit.lu.copied(A, &plan, Ok(()));
    assert_eq!(unit.error(&status(9), &[]), INVALID_FIELD);
}

#[test]
fn large_copies_are_counted_in_mebibytes() {
    let facts = Facts { block_bytes: 1 << 20, blocks: 1 << 20, ..facts() };
    let mut unit = Unit::new(facts);
    let mut list = list(1, 0, 1 << 19, 0xffff);
    list[45..48].fill(0);
    let plan = unit.copy(&list);
    unit.lu.copied(A, &plan, Ok(()));
    assert_eq!(unit.data(&status(1)), [0, 0, 0, 8, 1, 0, 1, 2, 0, 0, 0xff, 0xff]);
}

#[test]
fn what_ends_the_memory_of_results() {
    let begin = |unit: &mut Unit, identifier: u8| {
        let list = list(identifier, 0, 500, 10);
        assert!(matches!(unit.send(A, &copy(&list), &list), End::Io(_)));
    };
    // A reset, and the loss of the nexus, but not of another.
    let mut unit = Unit::new(facts());
    begin(&mut unit, 1);
    unit.lu.nexus_lost(B);
    assert_eq!(unit.data(&status(1))[3], 8);
    unit.lu.nexus_lost(A);
    unit.lu.attach(A, false);
    assert_eq!(unit.error(&status(1), &[]), INVALID_FIELD);
    begin(&mut unit, 1);
    unit.lu.reset();
    unit.send(A, &[0; 6], &[]);
    assert_eq!(unit.error(&status(1), &[]), INVALID_FIELD);
    // The oldest makes room.
    for identifier in 0..17 {
        begin(&mut unit, identifier);
    }
    assert_eq!(unit.error(&status(0), &[]), INVALID_FIELD);
    for identifier in 1..17 {
        assert_eq!(unit.data(&status(identifier))[3], 8);
    }
}

#[test]
fn operating_parameters() {
    let parameters = cdb(&[0x84, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], 16);
    let mut unit = Unit::new(facts());
    let data = unit.data(&parameters);
    assert_eq!(data.len(), 46);
    assert_eq!(data[..16], [0, 0, 0, 42, 1, 0, 0, 0, 0, 2, 0, 1, 0, 0, 4, 0]);
    // 65,535 blocks of 512 bytes.
    assert_eq!(data[16..20], [0x01, 0xff, 0xfe, 0x00]);
    assert_eq!(data[20..34], [0; 14]);
    assert_eq!(data[34..], [0, 16, 16, 9, 0, 0, 0, 0, 0, 2, 0x02, 0xe4]);
    let large = Facts { block_bytes: 1 << 20, ..facts() };
    let data = Unit::new(large).data(&parameters);
    assert_eq!((&data[16..20], data[37]), (&[0xff; 4][..], 20));
    assert_eq!(unit.error(&cdb(&[0x84, 3, 1], 16), &[]), INVALID_FIELD);
}

#[test]
fn reservations_apply() {
    let mut unit = Unit::new(facts());
    let out = |action: u8, kind: u8| cdb(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24], 10);
    let mut key = [0; 24];
    key[15] = 1;
    unit.good(B, &out(0, 0), &key);
    (key[7], key[15]) = (1, 0);
    unit.good(B, &out(1, 1), &key);
    let list = list(0, 0, 500, 10);
    let conflict = End::Status(Status::ReservationConflict);
    assert_eq!(unit.send(A, &copy(&list), &list), conflict);
    assert!(matches!(unit.send(B, &copy(&list), &list), End::Io(_)));
    // What has been copied may be asked for.
    assert_eq!(unit.error(&status(0), &[]), INVALID_FIELD);
    assert!(matches!(unit.send(Nexus(0xb), &status(0), &[]), End::Good(_)));
}
