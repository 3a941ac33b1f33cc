//! MODE SENSE, MODE SELECT, LOG SENSE, diagnostics, START STOP UNIT, and sense formats.

mod common;

use common::{
    A, B, End, INVALID_FIELD, INVALID_LIST, LIST_LENGTH, PORT, PROTECTED, Unit, cdb, facts, medium,
};
use scsi::sense::{Code, Key};
use scsi::{Attention, Buffers, Facts, Fast, Flush, Format, Op, Outcome, Step, decode, fast};

fn sense6(control: u8, page: u8, subpage: u8) -> Vec<u8> {
    vec![0x1a, 0, control << 6 | page, subpage, 255, 0]
}

fn select6(list: &[u8]) -> Vec<u8> {
    vec![0x15, 0x10, 0, 0, u8::try_from(list.len()).expect("a short list"), 0]
}

const CACHING: [u8; 20] = [0x08, 18, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const CONTROL: [u8; 12] = [0x0a, 10, 0, 0x10, 0, 0x40, 0, 0, 0, 0, 0, 0];

fn page(page: &[u8]) -> Vec<u8> {
    [&[0; 4], page].concat()
}

#[test]
fn headers_and_block_descriptors() {
    let mut unit = Unit::new(facts());
    let short = [0, 0, 3, 0xe8, 0, 0, 2, 0];
    let caching = &CACHING[..];
    // DPOFUA is set, WP is not.
    assert_eq!(unit.data(&sense6(0, 8, 0)), [&[31, 0, 0x10, 8][..], &short, caching].concat());
    let bare = [0x1a, 8, 8, 0, 255, 0];
    assert_eq!(unit.data(&bare), [&[23, 0, 0x10, 0][..], caching].concat());
    let long = cdb(&[0x5a, 0, 8, 0, 0, 0, 0, 0, 255], 10);
    let header = [0, 34, 0, 0x10, 0, 0, 0, 8];
    assert_eq!(unit.data(&long), [&header[..], &short, caching].concat());
    let long_lba = cdb(&[0x5a, 0x10, 8, 0, 0, 0, 0, 0, 255], 10);
    let header = [0, 42, 0, 0x10, 1, 0, 0, 16];
    let descriptor = [0, 0, 0, 0, 0, 0, 3, 0xe8, 0, 0, 0, 0, 0, 0, 2, 0];
    assert_eq!(unit.data(&long_lba), [&header[..], &descriptor, caching].concat());
    // Cut, MODE DATA LENGTH stays.
    assert_eq!(unit.data(&[0x1a, 0, 8, 0, 4, 0]), [31, 0, 0x10, 8]);
    assert!(unit.data(&[0x1a, 0, 8, 0, 0, 0]).is_empty());
    let mut large = Unit::new(Facts { blocks: 1 << 40, read_only: true, ..facts() });
    assert_eq!(large.data(&sense6(0, 8, 0))[2..12], [0x90, 8, 255, 255, 255, 255, 0, 0, 2, 0]);
}

#[test]
fn pages_and_values() {
    let mut unit = Unit::new(facts());
    let all = unit.data(&sense6(0, 0x3f, 0));
    // As those of SPDK's disks, but for RCD in Caching, and QUEUE ALGORITHM MODIFIER and TAS in
    // Control.
    let zero = |code: u8, length: u8| [&[code, length][..], &[0; 22][..length.into()]].concat();
    let before = [zero(1, 10), zero(2, 14), zero(7, 10)].concat();
    let after = [zero(0x10, 22), zero(0x1a, 10), zero(0x1c, 10)].concat();
    let extension = [&[0x4a, 1, 0, 28][..], &[0; 28]].concat();
    assert_eq!(all[12..], [&before[..], &CACHING, &CONTROL, &after].concat());
    assert_eq!(usize::from(all[0]) + 1, all.len());
    assert_eq!(unit.data(&sense6(2, 0x3f, 0)), all);
    let with_subpages = unit.data(&sense6(0, 0x3f, 0xff));
    assert_eq!(with_subpages[12..], [&before[..], &CACHING, &CONTROL, &extension, &after].concat());
    assert_eq!(unit.data(&sense6(0, 0x0a, 1))[12..], extension);
    assert_eq!(unit.data(&sense6(0, 0x0a, 0))[12..], CONTROL);
    assert_eq!(unit.data(&sense6(0, 0x0a, 0xff))[12..], [&CONTROL[..], &extension].concat());
    assert_eq!(unit.data(&sense6(0, 0x10, 0xff))[12..], zero(0x10, 22));
    let changeable = unit.data(&sense6(1, 0x3f, 0));
    let control = [0x0a, 10, 4, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(changeable[12..], [&before[..], &CACHING, &control, &after].concat());
    assert_eq!(unit.error(&sense6(3, 0x3f, 0), &[]), (Key::IllegalRequest, 0x39, 0));
    for (page, subpage) in
        [(0, 0), (3, 0), (4, 0), (8, 1), (0x3f, 1), (0x0a, 2), (0x3e, 0xff), (0, 0xff)]
    {
        assert_eq!(unit.error(&sense6(0, page, subpage), &[]), INVALID_FIELD);
    }
    // A disk without a write cache has no WCE to change.
    let mut plain = Unit::new(Facts { write_cache: false, ..facts() });
    for control in 0..3 {
        assert_eq!(plain.data(&sense6(control, 8, 0))[12..15], [8, 18, 0]);
    }
}

#[test]
fn the_write_cache_is_turned_off_and_on() {
    let mut unit = Unit::new(facts());
    let generation = unit.lu.generation();
    let mut off = CACHING;
    off[2] = 0;
    // What was written so far is made durable.
    let plan = unit.plan(&select6(&page(&off)), &page(&off));
    assert_eq!((plan.op, plan.transfer_bytes()), (Op::Flush, 24));
    assert!(!unit.lu.is_write_cache_enabled());
    assert_ne!(unit.lu.generation(), generation);
    assert_eq!(unit.data(&sense6(0, 8, 0))[14], 0);
    assert_eq!(unit.data(&sense6(2, 8, 0))[14], 4);
    for opcode in [0x0a, 0x2a, 0xaa, 0x8a] {
        assert_eq!(unit.plan(&medium(opcode, 0, 0, 1), &[0; 512]).flush, Flush::After);
    }
    assert_eq!(unit.plan(&medium(0x41, 0, 0, 1), &[0; 512]).flush, Flush::After);
    assert_eq!(unit.plan(&medium(0x28, 0, 0, 1), &[]).flush, Flush::No);
    // The other nexus is told, this one is not.
    assert_eq!(unit.send(B, &[0; 6], &[]), End::Check(Attention::ModeChanged.sense()));
    unit.good(B, &[0; 6], &[]);
    unit.good(A, &select6(&page(&CACHING)), &page(&CACHING));
    assert!(unit.lu.is_write_cache_enabled());
    assert_eq!(unit.plan(&medium(0x2a, 0, 0, 1), &[0; 512]).flush, Flush::No);
    // Nothing changes: nobody is told.
    assert_eq!(unit.send(B, &[0; 6], &[]), End::Check(Attention::ModeChanged.sense()));
    unit.good(A, &select6(&page(&CACHING)), &page(&CACHING));
    unit.good(B, &[0; 6], &[]);
}

#[test]
fn software_write_protection_and_descriptor_sense() {
    let mut unit = Unit::new(facts());
    let mut control = CONTROL;
    (control[2], control[4]) = (4, 8);
    unit.good(A, &select6(&page(&control)), &page(&control));
    assert_eq!(unit.error(&medium(0x2a, 0, 0, 1), &[0; 512]), PROTECTED);
    assert_eq!(unit.reply.format(), Format::Descriptor);
    assert_eq!(unit.data(&sense6(0, 0x0a, 0))[2], 0x90);
    assert_eq!(unit.lu.gate(A).format(), Format::Descriptor);
    unit.lu.reset();
    assert_eq!(unit.send(A, &[0; 6], &[]), End::Check(Attention::Reset.sense()));
    assert_eq!(unit.reply.format(), Format::Fixed);
    unit.plan(&medium(0x2a, 0, 0, 1), &[0; 512]);
}

/// Modes do not slow the fast path down: the gate has what it needs of them.
#[test]
fn the_fast_path_knows_the_modes() {
    let mut unit = Unit::new(facts());
    let (mut caching, mut control) = (CACHING, CONTROL);
    (caching[2], control[2]) = (0, 4);
    let list = [&page(&caching)[..], &control].concat();
    unit.plan(&select6(&list), &list);
    unit.send(B, &[0; 6], &[]);
    for nexus in [A, B] {
        let gate = unit.lu.gate(nexus);
        assert_eq!(gate.format(), Format::Descriptor);
        let command = decode(&medium(0x2a, 0, 0, 1)).unwrap();
        let buffers = Buffers { data_in: 0, data_out: 512 };
        let Fast::Io(plan) = fast(&command, unit.lu.facts(), gate, buffers) else {
            panic!("not fast");
        };
        assert_eq!(plan.flush, Flush::After);
    }
    control[4] = 8;
    unit.good(A, &select6(&page(&control)), &page(&control));
    let command = decode(&medium(0x2a, 0, 0, 1)).unwrap();
    let end = fast(&command, unit.lu.facts(), unit.lu.gate(A), Buffers::default());
    assert!(matches!(end, Fast::Failed(scsi::Sense { code: Code::WRITE_PROTECTED, .. })));
}

#[test]
fn parameter_lists_are_no_residual() {
    let mut unit = Unit::new(facts());
    let list = [&page(&CONTROL)[..], &[0; 9]].concat();
    assert_eq!(unit.send(A, &[0x15, 0x10, 0, 0, 16, 0], &list), End::Good(vec![]));
    let transferred = unit.reply.transferred();
    assert_eq!((transferred.bytes, transferred.residual), (16, 9));
    let register = cdb(&[0x5f, 6, 0, 0, 0, 0, 0, 0, 24], 10);
    assert_eq!(unit.send(A, &register, &[0; 30]), End::Good(vec![]));
    let transferred = unit.reply.transferred();
    assert_eq!((transferred.bytes, transferred.residual), (24, 6));
}

#[test]
fn mode_select_with_block_descriptors() {
    let mut unit = Unit::new(facts());
    let control = &CONTROL[..];
    for blocks in [[0, 0, 0, 0], [0, 0, 3, 0xe8], [255; 4]] {
        let list = [&[0, 0, 0, 8][..], &blocks, &[0, 0, 2, 0], control].concat();
        unit.good(A, &select6(&list), &list);
    }
    for (blocks, bytes, field) in [([0, 0, 3, 0xe9], [0, 2, 0], 4), ([0; 4], [0, 16, 0], 9)] {
        let list = [&[0, 0, 0, 8][..], &blocks, &[0], &bytes, control].concat();
        assert_eq!(unit.error(&select6(&list), &list), INVALID_LIST);
        assert_eq!(unit.reply.sense(), Some(scsi::Sense::in_list(field, None)));
    }
    let select10 =
        |list: &[u8]| cdb(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, u8::try_from(list.len()).unwrap()], 10);
    let descriptor = [0, 0, 0, 0, 0, 0, 3, 0xe8, 0, 0, 0, 0, 0, 0, 2, 0];
    let list = [&[0, 0, 0, 0, 1, 0, 0, 16][..], &descriptor, control].concat();
    unit.good(A, &select10(&list), &list);
    let list = [&[0, 0, 0, 0, 0, 0, 0, 0][..], control].concat();
    unit.good(A, &select10(&list), &list);
    // Fields of a long descriptor, and one that is not as long as LONGLBA says.
    for (at, field) in [(15, 8), (22, 20)] {
        let mut list = [&[0, 0, 0, 0, 1, 0, 0, 16][..], &descriptor, control].concat();
        list[at] ^= 1;
        assert_eq!(unit.error(&select10(&list), &list), INVALID_LIST);
        assert_eq!(unit.reply.sense(), Some(scsi::Sense::in_list(field, None)));
    }
    let list = [&[0, 0, 0, 0, 1, 0, 0, 8][..], &[0, 0, 3, 0xe8, 0, 0, 2, 0], control].concat();
    assert_eq!(unit.error(&select10(&list), &list), INVALID_LIST);
    // A long descriptor without LONGLBA.
    let list = [&[0, 0, 0, 0, 0, 0, 0, 16][..], &descriptor, control].concat();
    assert_eq!(unit.error(&select10(&list), &list), INVALID_LIST);
}

#[test]
fn bad_mode_selects_change_nothing() {
    let mut unit = Unit::new(facts());
    let mut on = CONTROL;
    on[2] = 4;
    let bad_bit = |at: usize, bit: u8| {
        let mut control = CONTROL;
        control[at] ^= bit;
        [&page(&on)[..], &control].concat()
    };
    for list in [
        bad_bit(2, 0x80),
        bad_bit(3, 0x10),
        bad_bit(5, 0x40),
        bad_bit(11, 1),
        bad_bit(0, 0x80),
        bad_bit(0, 0x40),
        bad_bit(1, 1),
        [&page(&on)[..], &[0x03, 14], &[0; 14]].concat(),
        // A subpage in the format of pages without; a bit of a page of zeroes; the length of a
        // subpage.
        [&page(&on)[..], &[0x0a, 28], &[0; 30]].concat(),
        [&page(&on)[..], &[0x4a, 1, 0, 28], &[0; 27], &[1]].concat(),
        [&page(&on)[..], &[0x1a, 10, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat(),
        [&page(&on)[..], &[0x4a, 1, 0, 27], &[0; 28]].concat(),
        [&page(&on)[..], &[0x4a, 1, 1, 28], &[0; 28]].concat(),
        [&[0, 1, 0, 0][..], &on].concat(),
        [&[0, 0, 0, 7][..], &on].concat(),
    ] {
        assert_eq!(unit.error(&select6(&list), &list), INVALID_LIST, "{list:x?}");
    }
    // A page without a subpage in the format of subpages.
    let list = [&page(&on)[..], &[0x4a, 0, 0, 10], &CONTROL[2..]].concat();
    assert_eq!(unit.error(&select6(&list), &list), INVALID_LIST);
    assert_eq!(unit.reply.sense(), Some(scsi::Sense::in_list(16, None)));
    for list in [
        vec![0],
        vec![0; 3],
        vec![0, 0, 0, 8],
        [&page(&on)[..], &CONTROL[..11]].concat(),
        [&page(&on)[..], &[8]].concat(),
        [&page(&on)[..], &[0x4a, 1, 0]].concat(),
        [&page(&on)[..], &[0x4a, 1, 0, 28], &[0; 27]].concat(),
    ] {
        assert_eq!(unit.error(&select6(&list), &list), LIST_LENGTH, "{list:x?}");
    }
    let list = page(&on);
    assert_eq!(unit.error(&select6(&list), &list[..15]), LIST_LENGTH);
    assert_eq!(unit.error(&[0x15, 0x11, 0, 0, 16, 0], &list), INVALID_FIELD);
    assert_eq!(unit.error(&[0x15, 0, 0, 0, 16, 0], &list), INVALID_FIELD);
    assert_eq!(unit.reply.format(), Format::Fixed);
    assert!(!unit.lu.gate(B).format().eq(&Format::Descriptor));
    unit.good(B, &[0; 6], &[]);
    // Pages of zeroes are taken as they are.
    let pages = [&[0x4a, 1, 0, 28][..], &[0; 28], &[2, 14], &[0; 14]].concat();
    unit.good(A, &select6(&page(&pages)), &page(&pages));
    // An empty list is no error.
    unit.good(A, &[0x15, 0x10, 0, 0, 0, 0], &[]);
    unit.good(A, &[0x15, 0x10, 0, 0, 4, 0], &[0; 4]);
}

#[test]
fn logs() {
    let mut unit = Unit::new(facts());
    let log = |page: u8, subpage: u8| cdb(&[0x4d, 0, 0x40 | page, subpage, 0, 0, 0, 0, 255], 10);
    assert_eq!(unit.data(&log(0, 0)), [0, 0, 0, 2, 0, 0x2f]);
    assert_eq!(unit.data(&log(0, 0xff)), [0x40, 0xff, 0, 6, 0, 0, 0, 0xff, 0x2f, 0]);
    assert_eq!(unit.data(&log(0x2f, 0)), [0x2f, 0, 0, 8, 0, 0, 3, 4, 0, 0, 0xff, 0]);
    for (page, subpage) in [(0, 1), (0x2f, 1), (0x0d, 0), (0x3f, 0)] {
        assert_eq!(unit.error(&log(page, subpage), &[]), INVALID_FIELD);
    }
    assert_eq!(unit.error(&cdb(&[0x4d, 1], 10), &[]), INVALID_FIELD);
}

#[test]
fn defect_lists_are_empty() {
    let mut unit = Unit::new(facts());
    // Both lists, in the long block format; then none.
    let short = |lists: u8, allocation: u8| cdb(&[0x37, 0, lists, 0, 0, 0, 0, 0, allocation], 10);
    let long = |lists: u8, allocation: u8| cdb(&[0xb7, lists, 0, 0, 0, 0, 0, 0, 0, allocation], 12);
    assert_eq!(unit.data(&short(0x1b, 32)), [0, 0x1b, 0, 0]);
    assert_eq!(unit.data(&short(0, 2)), [0, 0]);
    assert_eq!(unit.data(&long(0x1b, 32)), [0, 0x1b, 0, 0, 0, 0, 0, 0]);
    assert_eq!(unit.data(&long(0, 4)), [0; 4]);
    assert_eq!(unit.error(&short(0x20, 32), &[]), INVALID_FIELD);
}

#[test]
fn diagnostics_and_medium_removal() {
    let mut unit = Unit::new(facts());
    unit.good(A, &[0x1d, 4, 0, 0, 0, 0], &[]);
    assert_eq!(unit.error(&[0x1d, 0x24, 0, 0, 0, 0], &[]), INVALID_FIELD);
    assert_eq!(unit.error(&[0x1d, 0x10, 0, 0, 8, 0], &[0; 8]), INVALID_FIELD);
    assert_eq!(unit.data(&[0x1c, 1, 0, 0, 255, 0]), [0, 0, 0, 1, 0]);
    assert_eq!(unit.error(&[0x1c, 1, 1, 0, 255, 0], &[]), INVALID_FIELD);
    assert_eq!(unit.error(&[0x1c, 0, 0, 0, 255, 0], &[]), INVALID_FIELD);
    unit.good(A, &[0x1e, 0, 0, 0, 1, 0], &[]);
    unit.good(A, &[0x1e, 0, 0, 0, 0, 0], &[]);
    assert_eq!(unit.error(&[0x1e, 0, 0, 0, 2, 0], &[]), INVALID_FIELD);
}

#[test]
fn a_stopped_unit_is_not_ready() {
    let mut unit = Unit::new(facts());
    let stop = [0x1b, 0, 0, 0, 0, 0];
    let start = [0x1b, 0, 0, 0, 1, 0];
    assert_eq!(unit.plan(&stop, &[]).op, Op::Flush);
    for cdb in [
        cdb(&[0], 6),
        medium(0x28, 0, 0, 1),
        medium(0x2a, 0, 0, 1),
        medium(0x2f, 0, 0, 1),
        medium(0x35, 0, 0, 0),
        medium(0x41, 0, 0, 1),
        cdb(&[0x42], 10),
        cdb(&[0x9e, 0x12], 16),
    ] {
        assert_eq!(unit.error(&cdb, &[0; 512]), (Key::NotReady, 4, 2), "{cdb:x?}");
    }
    let sense = unit.data(&[0x03, 0, 0, 0, 18, 0]);
    assert_eq!((sense[2], sense[12], sense[13]), (2, 4, 2));
    unit.data(&[0x12, 0, 0, 0, 255, 0]);
    unit.data(&cdb(&[0x25], 10));
    unit.good(A, &start, &[]);
    unit.good(A, &[0; 6], &[]);
    // NO_FLUSH; LOEJ and power conditions are not supported.
    unit.good(A, &[0x1b, 1, 0, 0, 4, 0], &[]);
    assert_eq!(unit.error(&[0x1b, 0, 0, 0, 2, 0], &[]), INVALID_FIELD);
    assert_eq!(unit.error(&[0x1b, 0, 0, 0, 0x10, 0], &[]), INVALID_FIELD);
    // It is started by a reset, and when the last nexus is lost.
    unit.lu.reset();
    assert_eq!(unit.send(B, &[0; 6], &[]), End::Check(Attention::Reset.sense()));
    unit.good(B, &[0; 6], &[]);
    assert!(matches!(unit.send(B, &stop, &[]), End::Io(_)));
    unit.lu.nexus_lost(A);
    let not_ready = scsi::Sense::new(Key::NotReady, Code::INITIALIZING_COMMAND_REQUIRED);
    assert_eq!(unit.send(B, &[0; 6], &[]), End::Check(not_ready));
    unit.lu.nexus_lost(B);
    assert!(unit.lu.attach(B, false));
    unit.good(B, &[0; 6], &[]);
}

#[test]
fn request_sense() {
    let mut unit = Unit::new(facts());
    let fixed = unit.data(&[0x03, 0, 0, 0, 252, 0]);
    assert_eq!(fixed, [&[0x70, 0, 0, 0, 0, 0, 0, 10][..], &[0; 10]].concat());
    assert_eq!(unit.data(&[0x03, 1, 0, 0, 252, 0]), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    unit.lu.resized(2000);
    let pending = unit.data(&[0x03, 1, 0, 0, 252, 0]);
    assert_eq!(pending[..4], [0x72, 6, 0x2a, 9]);
    unit.good(A, &[0; 6], &[]);
    assert_eq!(unit.data(&[0x03, 0, 0, 0, 4, 0]).len(), 4);
}

#[test]
fn data_in_is_limited_by_allocation_and_buffer() {
    let mut unit = Unit::new(facts());
    for (allocation, buffer, len, residual, overrun) in [
        (255, 255, 96, 159, false),
        (36, 255, 36, 219, false),
        (255, 36, 36, 0, true),
        // SPDK reports a residual of nearly 4 GiB and no data.
        (96, 36, 36, 0, true),
        (36, 36, 36, 0, false),
        (0, 36, 0, 36, false),
        (96, 0, 0, 0, true),
    ] {
        let buffers = Buffers { data_in: buffer, data_out: 0 };
        let step =
            unit.lu.start(A, PORT, &[0x12, 0, 0, 0, allocation, 0], buffers, &mut unit.reply);
        assert_eq!(step, Step::Done);
        let transferred = unit.reply.transferred();
        assert_eq!(unit.reply.data().len(), len);
        assert_eq!(transferred.bytes, len as u64);
        assert_eq!((transferred.residual, transferred.overrun), (residual, overrun));
    }
    let plan = unit.plan(&[0x1b, 0, 0, 0, 0, 0], &[]);
    assert_eq!(Outcome::of(&plan, &facts(), Ok(())).transferred.residual, 65536);
}
