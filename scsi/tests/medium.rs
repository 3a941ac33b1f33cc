//! Commands of medium access: the plans, the order of the checks, and the outcomes.

mod common;

use common::{
    A, End, INVALID_FIELD, INVALID_LIST, INVALID_OPCODE, LIST_LENGTH, OUT_OF_RANGE, PROTECTED,
    Unit, cdb, facts, medium,
};
use scsi::sense::Key;
use scsi::{Buffers, Facts, Failure, Fast, Flush, Op, Outcome, Plan, Range, Status, decode, fast};

const READS: [u8; 4] = [0x08, 0x28, 0xa8, 0x88];
const WRITES: [u8; 4] = [0x0a, 0x2a, 0xaa, 0x8a];
const WRITES_AND_VERIFIES: [u8; 3] = [0x2e, 0xae, 0x8e];
const VERIFIES: [u8; 3] = [0x2f, 0xaf, 0x8f];
const PRE_FETCHES: [u8; 2] = [0x34, 0x90];
const SYNCHRONIZES: [u8; 2] = [0x35, 0x91];
const WRITES_SAME: [u8; 2] = [0x41, 0x93];

fn short(plan: &Plan) -> (Op, u64, u64, Flush, bool) {
    (plan.op, plan.range.lba, plan.range.blocks, plan.flush, plan.exclusive)
}

#[test]
fn reads_and_writes() {
    let mut unit = Unit::new(facts());
    let data = vec![0; 1024];
    for opcode in READS {
        let plan = unit.plan(&medium(opcode, 0, 998, 2), &[]);
        assert_eq!(short(&plan), (Op::Read, 998, 2, Flush::No, false));
        assert_eq!(plan.transfer_bytes(), 1024);
    }
    for opcode in WRITES {
        let plan = unit.plan(&medium(opcode, 0, 998, 2), &data);
        assert_eq!(short(&plan), (Op::Write, 998, 2, Flush::No, false));
    }
    // DPO and FUA: a read from the medium is flushed before, a write after.
    for (opcode, flags, flush) in [
        (0x28, 0x10, Flush::No),
        (0x28, 0x08, Flush::Before),
        (0xa8, 0x18, Flush::Before),
        (0x88, 0x08, Flush::Before),
        (0x2a, 0x10, Flush::No),
        (0x2a, 0x08, Flush::After),
        (0xaa, 0x08, Flush::After),
        (0x8a, 0x18, Flush::After),
    ] {
        let read = READS.contains(&opcode);
        let out = if read { &[][..] } else { &data };
        assert_eq!(unit.plan(&medium(opcode, flags, 0, 2), out).flush, flush, "{opcode:x}");
    }
    for opcode in WRITES_AND_VERIFIES {
        let plan = unit.plan(&medium(opcode, 0x12, 1, 2), &data);
        let op = Op::WriteAndVerify { compare: true };
        assert_eq!(short(&plan), (op, 1, 2, Flush::After, false));
        let plan = unit.plan(&medium(opcode, 0, 1, 2), &data);
        assert_eq!(plan.op, Op::WriteAndVerify { compare: false });
    }
}

#[test]
fn a_disk_without_a_write_cache_is_never_flushed() {
    let mut unit = Unit::new(Facts { write_cache: false, ..facts() });
    assert_eq!(unit.plan(&medium(0x28, 8, 0, 1), &[]).flush, Flush::No);
    assert_eq!(unit.plan(&medium(0x2a, 8, 0, 1), &[0; 512]).flush, Flush::No);
    unit.good(A, &medium(0x35, 0, 0, 0), &[]);
    unit.good(A, &medium(0x91, 2, 1000, 0), &[]);
}

/// The bytes moved follow the CDB: a longer buffer has a residual, a shorter one an overrun and no
/// partial block.
#[test]
fn buffers_of_other_lengths_than_the_cdb() {
    let mut unit = Unit::new(facts());
    for (buffer, blocks, residual, overrun) in [
        (4096, 8, 0, false),
        (8192, 8, 4096, false),
        (4095, 7, 511, true),
        (512, 1, 0, true),
        (511, 0, 511, true),
        (0, 0, 0, true),
    ] {
        for (opcode, out) in [(0x28, false), (0x88, false), (0x2a, true), (0x8a, true)] {
            let buffers = if out {
                Buffers { data_in: 0, data_out: buffer }
            } else {
                Buffers { data_in: buffer, data_out: 0 }
            };
            let transferred = match unit.send_with(A, &medium(opcode, 0, 5, 8), &[], buffers) {
                End::Io(plan) => {
                    assert_eq!(plan.range, Range { lba: 5, blocks });
                    Outcome::of(&plan, &facts(), Ok(())).transferred
                }
                End::Good(_) => unit.reply.transferred(),
                other => panic!("{other:?}"),
            };
            assert_eq!(transferred.bytes, blocks * 512);
            assert_eq!((transferred.residual, transferred.overrun), (residual, overrun));
        }
    }
    // A buffer in the wrong direction is residual as a whole.
    let wrong = Buffers { data_in: 0, data_out: 600 };
    assert_eq!(unit.send_with(A, &medium(0x28, 0, 0, 1), &[], wrong), End::Good(vec![]));
    let transferred = unit.reply.transferred();
    assert_eq!((transferred.residual, transferred.overrun), (600, true));
}

#[test]
fn zero_blocks() {
    let mut unit = Unit::new(facts());
    for opcode in
        [&READS[1..], &WRITES[1..], &WRITES_AND_VERIFIES, &VERIFIES, &PRE_FETCHES].concat()
    {
        for lba in [0, 999, 1000] {
            unit.good(A, &medium(opcode, 0, lba, 0), &[]);
        }
        for lba in [1001, 0x8000_0000, 0xffff_ffff] {
            assert_eq!(unit.error(&medium(opcode, 0, lba, 0), &[]), OUT_OF_RANGE, "{opcode:x}");
        }
    }
    // In READ(6) and WRITE(6), 0 is 256 blocks.
    assert_eq!(unit.plan(&medium(0x08, 0, 0, 0), &[]).range.blocks, 128);
    assert!(unit.reply.sense().is_none());
    assert_eq!(unit.error(&medium(0x08, 0, 745, 0), &[]), OUT_OF_RANGE);
    unit.good(A, &cdb(&[0x89], 16), &[]);
}

#[test]
fn ranges_past_the_end() {
    let mut unit = Unit::new(facts());
    let all: Vec<u8> = [
        &READS[..],
        &WRITES,
        &WRITES_AND_VERIFIES,
        &VERIFIES,
        &PRE_FETCHES,
        &SYNCHRONIZES,
        &WRITES_SAME,
    ]
    .concat();
    for opcode in all {
        let wide = opcode >> 5 == 4;
        let mut lbas = vec![999, 1000];
        if opcode >> 5 != 0 {
            lbas.push(0xffff_ffff);
        }
        if wide {
            lbas.extend([1 << 63, u64::MAX - 1, u64::MAX]);
        }
        for lba in lbas {
            let cdb = medium(opcode, 0, lba, 2);
            assert_eq!(unit.error(&cdb, &[0; 512]), OUT_OF_RANGE, "{opcode:x} {lba:x}");
            assert_eq!(unit.reply.sense().unwrap().information, Some(lba));
        }
    }
    assert_eq!(unit.error(&medium(0x88, 0, u64::MAX, u32::MAX), &[]), OUT_OF_RANGE);
    let write = [&[0x89, 0, 0, 0, 0, 0, 0, 0, 3, 0xe7][..], &[0, 0, 0, 2, 0, 0]].concat();
    assert_eq!(unit.error(&write, &[0; 2048]), OUT_OF_RANGE);
}

#[test]
fn transfers_longer_than_the_maximum() {
    let mut unit = Unit::new(facts());
    for opcode in [&READS[1..], &WRITES[1..], &WRITES_AND_VERIFIES, &VERIFIES].concat() {
        assert_eq!(unit.error(&medium(opcode, 0, 0, 501), &[]), INVALID_FIELD);
        // The range is checked before.
        assert_eq!(unit.error(&medium(opcode, 0, 900, 501), &[]), OUT_OF_RANGE);
    }
    unit.plan(&medium(0x2f, 0, 0, 500), &[]);
}

#[test]
fn protection_fields_are_refused() {
    let mut unit = Unit::new(facts());
    let opcodes = [&READS[1..], &WRITES[1..], &WRITES_AND_VERIFIES, &VERIFIES, &WRITES_SAME];
    for opcode in opcodes.concat().into_iter().chain([0x89]) {
        for protect in 1..8_u8 {
            let cdb = medium(opcode, protect << 5, 0, 1);
            assert_eq!(unit.error(&cdb, &[0; 512]), INVALID_FIELD, "{opcode:x}");
            let field = unit.reply.sense().unwrap().field.unwrap();
            assert_eq!((field.in_cdb, field.byte), (true, 1));
        }
    }
}

#[test]
fn verify() {
    let mut unit = Unit::new(facts());
    for opcode in VERIFIES {
        let plan = unit.plan(&medium(opcode, 0x10, 3, 4), &[]);
        assert_eq!(short(&plan), (Op::Verify, 3, 4, Flush::No, false));
        // With BYTCHK 0 nothing is compared, even if there is data: it is residual.
        let plan = unit.plan(&medium(opcode, 0, 3, 4), &[0; 2048]);
        assert_eq!(plan.op, Op::Verify);
        assert_eq!(Outcome::of(&plan, &facts(), Ok(())).transferred.residual, 2048);
        let plan = unit.plan(&medium(opcode, 2, 3, 4), &[0; 2048]);
        assert_eq!((plan.op, plan.transfer_bytes()), (Op::VerifyData, 2048));
        let plan = unit.plan(&medium(opcode, 6, 3, 4), &[0; 512]);
        assert_eq!((plan.op, plan.transfer_bytes()), (Op::VerifyPattern, 512));
        assert_eq!(unit.error(&medium(opcode, 4, 3, 4), &[0; 2048]), INVALID_FIELD);
        // Too little to compare with.
        assert_eq!(unit.error(&medium(opcode, 2, 3, 4), &[0; 2047]), INVALID_FIELD);
        assert_eq!(unit.error(&medium(opcode, 6, 3, 4), &[0; 511]), INVALID_FIELD);
        unit.good(A, &medium(opcode, 2, 3, 0), &[]);
    }
}

#[test]
fn pre_fetch_and_synchronize_cache() {
    let mut unit = Unit::new(facts());
    for opcode in PRE_FETCHES {
        unit.good(A, &medium(opcode, 0, 3, 4), &[]);
        unit.good(A, &medium(opcode, 2, 3, 0), &[]);
    }
    for opcode in SYNCHRONIZES {
        for (flags, lba, blocks) in [(0, 0, 0), (2, 1, 2), (0, 1000, 0)] {
            let plan = unit.plan(&medium(opcode, flags, lba, blocks), &[]);
            assert_eq!(short(&plan), (Op::Flush, 0, 0, Flush::No, false));
        }
    }
}

#[test]
fn write_same() {
    let mut unit = Unit::new(facts());
    let block = [0x5a; 512];
    for opcode in WRITES_SAME {
        let plan = unit.plan(&medium(opcode, 0, 3, 4), &block);
        assert_eq!(short(&plan), (Op::WriteSame { unmap: false }, 3, 4, Flush::No, false));
        assert_eq!(plan.zeroed().op, Op::WriteZeroes { unmap: false });
        let plan = unit.plan(&medium(opcode, 8, 3, 4), &block);
        assert_eq!(plan.zeroed().op, Op::WriteZeroes { unmap: true });
        // Up to the end.
        let plan = unit.plan(&medium(opcode, 0, 3, 0), &block);
        assert_eq!(plan.range, Range { lba: 3, blocks: 997 });
        unit.good(A, &medium(opcode, 0, 1000, 0), &block);
        assert_eq!(unit.error(&medium(opcode, 0, 1001, 0), &block), OUT_OF_RANGE);
        // ANCHOR is not offered. The data is one block.
        assert_eq!(unit.error(&medium(opcode, 0x18, 3, 4), &block), INVALID_FIELD);
        for len in [0, 1, 511, 513, 1024] {
            assert_eq!(unit.error(&medium(opcode, 8, 3, 4), &vec![0; len]), INVALID_FIELD);
        }
        // The maximum comes before the range.
        assert_eq!(unit.error(&medium(opcode, 0, 0, 2001), &block), INVALID_FIELD);
    }
    // NDOB, of WRITE SAME(16) only.
    let plan = unit.plan(&medium(0x93, 9, 3, 4), &[]);
    assert_eq!(plan.op, Op::WriteZeroes { unmap: true });
    assert_eq!(plan.transfer_bytes(), 0);
    let plan = unit.plan(&medium(0x93, 1, 3, 4), &block);
    assert_eq!((plan.op, plan.transfer_bytes()), (Op::WriteZeroes { unmap: false }, 0));
    assert_eq!(Outcome::of(&plan, &facts(), Ok(())).transferred.residual, 512);
    assert_eq!(unit.error(&medium(0x41, 1, 3, 4), &[]), INVALID_FIELD);
    let small = Facts { write_same_blocks_max: 500, ..facts() };
    let plan = Unit::new(small).plan(&medium(0x93, 0, 500, 0), &block);
    assert_eq!((plan.range.blocks, plan.transfer_bytes()), (500, 512));
    assert_eq!(Unit::new(small).error(&medium(0x93, 0, 0, 501), &block), INVALID_FIELD);
    assert_eq!(Unit::new(small).error(&medium(0x93, 0, 0, 0), &block), INVALID_FIELD);
    let mut plain = Unit::new(Facts { unmap: None, ..facts() });
    assert_eq!(plain.error(&medium(0x93, 8, 0, 1), &block), INVALID_FIELD);
    plain.plan(&medium(0x93, 0, 0, 1), &block);
}

fn compare_and_write(flags: u8, lba: u8, blocks: u8) -> Vec<u8> {
    vec![0x89, flags, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, blocks, 0, 0]
}

#[test]
fn compare_and_writes() {
    let mut unit = Unit::new(facts());
    let plan = unit.plan(&compare_and_write(0, 7, 8), &[0; 8192]);
    assert_eq!(short(&plan), (Op::CompareAndWrite, 7, 8, Flush::No, true));
    assert_eq!(plan.transfer_bytes(), 8192);
    assert_eq!(unit.plan(&compare_and_write(0x18, 7, 1), &[0; 1024]).flush, Flush::After);
    assert_eq!(unit.error(&compare_and_write(0, 7, 9), &[0; 9216]), INVALID_FIELD);
    unit.good(A, &compare_and_write(0, 7, 0), &[]);
    assert_eq!(unit.error(&compare_and_write(0, 7, 0), &[0; 512]), INVALID_FIELD);
    for len in [0, 512, 1023, 1025, 2048] {
        assert_eq!(unit.error(&compare_and_write(0, 7, 1), &vec![0; len]), INVALID_FIELD);
    }
    let mut without = Unit::new(Facts { compare_blocks_max: 0, ..facts() });
    assert_eq!(without.error(&compare_and_write(0, 0, 1), &[0; 1024]), INVALID_OPCODE);
}

#[test]
fn or_writes() {
    let mut unit = Unit::new(facts());
    let plan = unit.plan(&medium(0x8b, 0, 998, 2), &[0; 1024]);
    assert_eq!(short(&plan), (Op::OrWrite, 998, 2, Flush::No, true));
    assert_eq!(plan.transfer_bytes(), 1024);
    assert_eq!(unit.plan(&medium(0x8b, 0x18, 0, 1), &[0; 512]).flush, Flush::After);
    assert_eq!(unit.plan(&medium(0x8b, 0, 0, 3), &[0; 1535]).range.blocks, 2);
    unit.good(A, &medium(0x8b, 0, 1000, 0), &[]);
    assert_eq!(unit.error(&medium(0x8b, 0, 999, 2), &[0; 1024]), OUT_OF_RANGE);
    assert_eq!(unit.error(&medium(0x8b, 0, 0, 501), &[0; 512]), INVALID_FIELD);
    assert_eq!(unit.error(&medium(0x8b, 0x20, 0, 1), &[0; 512]), INVALID_FIELD);
    let mut read_only = Unit::new(Facts { read_only: true, ..facts() });
    assert_eq!(read_only.error(&medium(0x8b, 0, 0, 1), &[0; 512]), PROTECTED);
}

fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let bytes = u16::try_from(ranges.len() * 16).expect("a short list");
    let mut list = [(bytes + 6).to_be_bytes(), bytes.to_be_bytes(), [0; 2], [0; 2]].concat();
    for (lba, blocks) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

fn unmap(list: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(list.len()).expect("a short list").to_be_bytes();
    vec![0x42, 0, 0, 0, 0, 0, 0, high, low, 0]
}

#[test]
fn unmaps() {
    let mut unit = Unit::new(facts());
    let list = unmap_list(&[(0, 1), (7, 0), (990, 10), (1000, 0)]);
    let plan = unit.plan(&unmap(&list), &list);
    assert_eq!((plan.op, plan.transfer_bytes()), (Op::Unmap, 72));
    assert_eq!(plan.flush, Flush::No);
    assert_eq!(unit.reply.ranges(), [Range { lba: 0, blocks: 1 }, Range { lba: 990, blocks: 10 }]);
    for list in [vec![], unmap_list(&[]), unmap_list(&[(5, 0)])] {
        unit.good(A, &unmap(&list), &list);
        let residual = if list.is_empty() { 65536 } else { 0 };
        assert_eq!(unit.reply.transferred().residual, residual);
    }
    // Nothing is unmapped if one range is bad.
    let list = unmap_list(&[(0, 1), (1000, 1)]);
    assert_eq!(unit.error(&unmap(&list), &list), OUT_OF_RANGE);
    let list = unmap_list(&[(0, 1), (u64::MAX, u32::MAX)]);
    assert_eq!(unit.error(&unmap(&list), &list), OUT_OF_RANGE);
    // Limits: 4 descriptors, 100 blocks.
    let list = unmap_list(&[(0, 1); 5]);
    assert_eq!(unit.error(&unmap(&list), &list), INVALID_LIST);
    let list = unmap_list(&[(0, 50), (50, 50)]);
    unit.plan(&unmap(&list), &list);
    let list = unmap_list(&[(0, 50), (50, 51)]);
    assert_eq!(unit.error(&unmap(&list), &list), INVALID_LIST);
}

#[test]
fn bad_unmap_lists() {
    let mut unit = Unit::new(facts());
    let list = unmap_list(&[(0, 1), (2, 1)]);
    for len in 1..8 {
        assert_eq!(unit.error(&unmap(&list[..len]), &list[..len]), LIST_LENGTH);
    }
    // The descriptors are longer than the list, or the list than the data.
    assert_eq!(unit.error(&unmap(&list[..39]), &list[..39]), LIST_LENGTH);
    assert_eq!(unit.error(&unmap(&list), &list[..39]), LIST_LENGTH);
    let long = vec![0; scsi::PARAMETERS_MAX + 1];
    assert_eq!(unit.error(&unmap(&long), &long), LIST_LENGTH);
    // An incomplete descriptor at the end is ignored. SPDK copies it past the end of its list.
    for rest in 1..16 {
        let mut list = list.clone();
        list[3] -= 16 - rest;
        unit.plan(&unmap(&list), &list);
        assert_eq!(unit.reply.ranges(), [Range { lba: 0, blocks: 1 }]);
    }
    assert_eq!(unit.error(&[0x42, 1, 0, 0, 0, 0, 0, 0, 0, 0], &[]), INVALID_FIELD);
    let mut plain = Unit::new(Facts { unmap: None, ..facts() });
    assert_eq!(plain.error(&unmap(&list), &list), INVALID_OPCODE);
}

#[test]
fn the_largest_unmap_list_with_a_rest() {
    let mut unmap_facts = facts();
    unmap_facts.unmap = Some(facts().default_unmap());
    let mut unit = Unit::new(unmap_facts);
    let ranges: Vec<_> = (0..256).map(|lba| (lba, 1)).collect();
    let mut list = unmap_list(&ranges);
    assert_eq!(list.len(), scsi::PARAMETERS_MAX);
    unit.plan(&unmap(&list), &list);
    assert_eq!(unit.reply.ranges().len(), 256);
    list.extend([0; 15]);
    [list[2], list[3]] = 4111_u16.to_be_bytes();
    assert_eq!(unit.error(&unmap(&list), &list), LIST_LENGTH);
}

#[test]
fn a_read_only_disk_refuses_what_writes() {
    let mut unit = Unit::new(Facts { read_only: true, ..facts() });
    let block = [0; 512];
    for opcode in [&WRITES[..], &WRITES_AND_VERIFIES, &WRITES_SAME].concat() {
        assert_eq!(unit.error(&medium(opcode, 0, 0, 1), &block), PROTECTED, "{opcode:x}");
        // The range is checked first.
        assert_eq!(unit.error(&medium(opcode, 0, 1000, 1), &block), OUT_OF_RANGE);
    }
    assert_eq!(unit.error(&compare_and_write(0, 0, 1), &[0; 1024]), PROTECTED);
    let list = unmap_list(&[(0, 1)]);
    assert_eq!(unit.error(&unmap(&list), &list), PROTECTED);
    unit.plan(&medium(0x28, 0, 0, 1), &[]);
    unit.plan(&medium(0x2f, 0, 0, 1), &[]);
    unit.plan(&medium(0x35, 0, 0, 0), &[]);
}

#[test]
fn outcomes() {
    let facts = facts();
    let mut unit = Unit::new(facts);
    let read = unit.plan(&medium(0x28, 0, 10, 4), &[]);
    let write = unit.plan(&medium(0x2a, 0, 10, 4), &[0; 2048]);
    let verify = unit.plan(&medium(0x2f, 2, 10, 4), &[0; 2048]);
    let pattern = unit.plan(&medium(0x2f, 6, 10, 4), &[0; 512]);
    let compare = unit.plan(&compare_and_write(0, 10, 2), &[0; 2048]);
    let flush = unit.plan(&medium(0x35, 0, 0, 0), &[]);
    for (plan, failure, key, code, information) in [
        (&read, Failure::Medium(Some(11)), Key::MediumError, (0x11, 0), Some(11)),
        (&read, Failure::Device, Key::MediumError, (0x11, 0), None),
        (&write, Failure::Medium(Some(12)), Key::MediumError, (0x0c, 0), Some(12)),
        (&write, Failure::NoSpace, Key::DataProtect, (0x27, 7), None),
        (&write, Failure::ReadOnly, Key::DataProtect, (0x27, 0), None),
        (&write, Failure::OutOfRange, Key::IllegalRequest, (0x21, 0), None),
        (&write, Failure::Aborted, Key::AbortedCommand, (0, 0), None),
        (&verify, Failure::Miscompare(1024), Key::Miscompare, (0x1d, 0), Some(12)),
        (&pattern, Failure::Miscompare(5), Key::Miscompare, (0x1d, 0), None),
        (&compare, Failure::Miscompare(513), Key::Miscompare, (0x1d, 0), Some(513)),
        (&flush, Failure::Device, Key::HardwareError, (0x44, 0), None),
        (&flush, Failure::Unsupported, Key::IllegalRequest, (0x20, 0), None),
    ] {
        let outcome = Outcome::of(plan, &facts, Err(failure));
        let sense = outcome.sense.unwrap();
        assert_eq!(outcome.status, Status::CheckCondition);
        assert_eq!((sense.key, (sense.code.0, sense.code.1)), (key, code), "{failure:?}");
        assert_eq!(sense.information, information);
        assert_eq!(outcome.transferred.bytes, 0);
    }
    for (failure, status) in [
        (Failure::Busy, Status::Busy),
        (Failure::Reservation, Status::ReservationConflict),
        (Failure::AbortedByOther, Status::TaskAborted),
    ] {
        let outcome = Outcome::of(&read, &facts, Err(failure));
        assert_eq!((outcome.status, outcome.sense), (status, None));
        assert_eq!(outcome.transferred.residual, 65536);
    }
    let done = Outcome::of(&write, &facts, Ok(()));
    assert_eq!((done.status, done.transferred.bytes), (Status::Good, 2048));
}

/// The fast path says what the logical unit says, or that it does not know.
#[test]
fn the_fast_path_agrees_with_the_logical_unit() {
    for facts in [facts(), Facts { read_only: true, ..facts() }] {
        let mut unit = Unit::new(facts);
        let gate = unit.lu.gate(A);
        for opcode in [READS, WRITES].concat() {
            for (flags, lba, blocks) in
                [(0, 0, 1), (8, 5, 3), (16, 999, 1), (0, 999, 2), (0, 0, 501), (0, 7, 0)]
            {
                let flags = if opcode < 0x20 { 0 } else { flags };
                let cdb = medium(opcode, flags, lba, blocks);
                for len in [0, 512, 1300, 1 << 20] {
                    let out = WRITES.contains(&opcode);
                    let data_out = if out { len } else { 0 };
                    let buffers = Buffers { data_in: len - data_out, data_out };
                    let slow = unit.send_with(A, &cdb, &[], buffers);
                    match (fast(&decode(&cdb).unwrap(), &facts, gate, buffers), slow) {
                        (Fast::Io(fast), End::Io(slow)) => assert_eq!(fast, slow),
                        (Fast::Io(fast), End::Good(_)) => {
                            assert_eq!(fast.range.blocks, 0);
                            let outcome = Outcome::of(&fast, &facts, Ok(()));
                            assert_eq!(outcome.transferred, unit.reply.transferred());
                        }
                        (Fast::Failed(fast), End::Check(slow)) => assert_eq!(fast, slow),
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        for other in [cdb(&[0], 6), medium(0x2f, 0, 0, 1), medium(0x41, 0, 0, 1)] {
            let command = decode(&other).unwrap();
            assert_eq!(fast(&command, &facts, gate, Buffers::default()), Fast::Slow);
        }
        let read = decode(&medium(0x28, 0, 0, 1)).unwrap();
        assert_eq!(fast(&read, &facts, scsi::Gate::SLOW, Buffers::default()), Fast::Slow);
    }
}
