//! What a guest recognizes a disk by, against the bytes of SPDK's disks where they are to be equal,
//! and the pages that differ on purpose.

mod common;

use common::{INVALID_FIELD, OUT_OF_RANGE, Unit, cdb, facts};
use scsi::{Facts, Identity, Port, Unmap};

fn inquiry(page: Option<u8>) -> Vec<u8> {
    vec![0x12, u8::from(page.is_some()), page.unwrap_or(0), 4, 0, 0]
}

/// The facts of SPDK's malloc disk "Malloc0" of 128 MiB, target 0, whose bytes were
/// recorded.
fn malloc() -> Facts {
    let mut facts = Facts::new(512, 262_144, Identity::of("Malloc disk", "Malloc0"));
    facts.unmap = Some(facts.default_unmap());
    facts
}

#[test]
fn standard_data() {
    let data = Unit::new(malloc()).data(&inquiry(None));
    // Equal to SPDK's, but for the version, 3PC and the version descriptors.
    assert_eq!(data.len(), 96);
    assert_eq!(data[..8], [0x00, 0x00, 0x06, 0x12, 0x5b, 0x08, 0x10, 0x02]);
    assert_eq!(&data[8..36], b"INTEL   Malloc disk     0001");
    assert_eq!(data[36..58], [[b' '; 20].as_slice(), &[0, 0]].concat());
    assert_eq!(data[58..64], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0]);
    assert_eq!(data[64..], [0; 32]);
}

/// The whole page as SPDK sends it.
fn spdk_designators(target: &[u8; 12]) -> Vec<u8> {
    [
        &[0x00, 0x83, 0x00, 0x79][..],
        &[0x61, 0x83, 0, 8, 0x2d, 0x1d, 0x00, 0x03, 0x47, 0x38, 0x62, 0x28],
        &[0x62, 0x81, 0, 56],
        b"INTEL   Malloc disk     Malloc0                         ",
        &[0x63, 0xa8, 0, 12],
        target,
        &[0x63, 0x98, 0, 5],
        b"vhost",
        &[0x61, 0x94, 0, 4, 0, 0, 0, 0],
        &[0x61, 0x95, 0, 4, 0, 0, 0, 0],
    ]
    .concat()
}

#[test]
fn vital_pages_equal_to_those_of_spdk() {
    let mut unit = Unit::new(malloc());
    let serial = [&[0, 0x80, 0, 8][..], b"Malloc0\0"].concat();
    let identification =
        [spdk_designators(b"Target 0\0\0\0\0"), vec![0x61, 0x86, 0, 4, 0, 0, 0, 0]];
    let extended = [&[0, 0x86, 0, 0x3c, 0, 5][..], &[0; 58]].concat();
    let policy = vec![0, 0x87, 0, 4, 0x3f, 0xff, 0, 0];
    let ports = |port: u8| {
        let head = [0, 0x88, 0, 21, 0, 0, 0, port, 0, 0, 0, 0, 0, 0, 0, 9, 0x53, 0x98, 0, 5];
        [&head[..], b"vhost"].concat()
    };
    for (page, expected) in [
        (0x80, serial),
        (0x83, identification.concat()),
        (0x85, vec![0, 0x85, 0, 0]),
        (0x86, extended),
        (0x87, policy),
        (0x88, ports(0)),
    ] {
        assert_eq!(unit.data(&inquiry(Some(page))), expected, "page {page:x}");
    }
    unit.port.relative = 3;
    assert_eq!(unit.data(&inquiry(Some(0x88))), ports(3));
    assert_eq!(unit.data(&inquiry(Some(0x83)))[101..109], [0x61, 0x94, 0, 4, 0, 0, 0, 3]);
}

#[test]
fn targets_of_any_number_have_a_name() {
    for (target, name) in
        [(7, b"Target 7\0\0\0\0"), (10, b"Target 10\0\0\0"), (255, b"Target 255\0\0")]
    {
        let mut unit = Unit::new(Facts::new(512, 1, Identity::of("Malloc disk", "Malloc0")));
        unit.port = Port { target, relative: 0, group: 0x102 };
        let data = unit.data(&inquiry(Some(0x83)));
        let group = vec![0x61, 0x86, 0, 4, 0, 0, 1, 2];
        assert_eq!(data, [spdk_designators(name), group].concat());
    }
}

#[test]
fn block_limits_provisioning_and_characteristics() {
    let mut unit = Unit::new(malloc());
    let limits = unit.data(&inquiry(Some(0xb0)));
    // SPDK's up to the optimal transfer length.
    assert_eq!(limits[..8], [0, 0xb0, 0, 0x3c, 0, 0xff, 0, 8]);
    assert_eq!(limits[8..20], [0, 0, 0x20, 0, 0, 0, 0x20, 0, 0, 0, 0, 0]);
    assert_eq!(limits[20..36], [255, 255, 255, 255, 0, 0, 1, 0, 0, 0, 0, 64, 0x80, 0, 0, 0]);
    assert_eq!(limits[36..44], [0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    // No atomic writes.
    assert_eq!(limits[44..], [0; 20]);
    let expected = [&[0, 0xb1, 0, 0x3c, 0, 1][..], &[0; 58]].concat();
    assert_eq!(unit.data(&inquiry(Some(0xb1))), expected);
    assert_eq!(unit.data(&inquiry(Some(0xb2))), [0, 0xb2, 0, 4, 0, 0xe0, 2, 0]);
    assert_eq!(
        unit.data(&inquiry(Some(0x00))),
        [0, 0, 0, 10, 0, 0x80, 0x83, 0x85, 0x86, 0x87, 0x88, 0xb0, 0xb1, 0xb2]
    );
    // No more descriptors are reported than are taken.
    let many = Facts {
        unmap: Some(Unmap { descriptors_max: 999, ..malloc().default_unmap() }),
        ..malloc()
    };
    assert_eq!(Unit::new(many).data(&inquiry(Some(0xb0)))[24..28], [0, 0, 1, 0]);
}

#[test]
fn a_disk_without_unmap_says_so_everywhere() {
    let plain = Facts { unmap: None, ..malloc() };
    let mut unit = Unit::new(plain);
    let limits = unit.data(&inquiry(Some(0xb0)));
    assert_eq!(limits[20..36], [0; 16]);
    assert_eq!(
        unit.data(&inquiry(Some(0)))[3..],
        [9, 0, 0x80, 0x83, 0x85, 0x86, 0x87, 0x88, 0xb0, 0xb1]
    );
    assert_eq!(unit.error(&inquiry(Some(0xb2)), &[]), INVALID_FIELD);
    assert_eq!(unit.data(&cdb(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32], 16))[14], 0);
}

#[test]
fn bad_inquiries() {
    let mut unit = Unit::new(malloc());
    assert_eq!(unit.error(&[0x12, 0, 0x80, 0, 255, 0], &[]), INVALID_FIELD);
    assert_eq!(unit.error(&[0x12, 2, 0, 0, 255, 0], &[]), INVALID_FIELD);
    for page in [0x01, 0x84, 0x89, 0x8f, 0xb3, 0xff] {
        assert_eq!(unit.error(&inquiry(Some(page)), &[]), INVALID_FIELD);
    }
    assert!(unit.data(&[0x12, 0, 0, 0, 0, 0]).is_empty());
    assert_eq!(unit.data(&[0x12, 0, 0, 0, 5, 0]), [0, 0, 6, 0x12, 0x5b]);
}

#[test]
fn capacities() {
    let mut facts = malloc();
    facts.physical_exponent = 3;
    facts.lowest_aligned = 7;
    let long = cdb(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32], 16);
    let mut unit = Unit::new(facts);
    assert_eq!(unit.data(&cdb(&[0x25], 10)), [0, 3, 0xff, 0xff, 0, 0, 2, 0]);
    let expected = [&[0, 0, 0, 0, 0, 3, 0xff, 0xff, 0, 0, 2, 0, 0, 3, 0x80, 7][..], &[0; 16]];
    assert_eq!(unit.data(&long), expected.concat());
    let cut = cdb(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8], 16);
    assert_eq!(unit.data(&cut), [0, 0, 0, 0, 0, 3, 0xff, 0xff]);
    facts.blocks = (1 << 32) + 1;
    facts.unmap = facts.unmap.map(|unmap| Unmap { zeroes: true, ..unmap });
    let mut unit = Unit::new(facts);
    assert_eq!(unit.data(&cdb(&[0x25], 10)), [255, 255, 255, 255, 0, 0, 2, 0]);
    assert_eq!(unit.data(&long)[..16], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 3, 0xc0, 7]);
    assert_eq!(unit.data(&inquiry(Some(0xb2)))[5], 0xe4);
    // LBA and PMI are obsolete.
    assert_eq!(unit.error(&cdb(&[0x25, 0, 0, 0, 0, 1], 10), &[]), INVALID_FIELD);
}

#[test]
fn the_last_lba_of_a_disk_of_2_to_the_32_blocks_fits() {
    let facts = Facts { blocks: 1 << 32, ..malloc() };
    // SBC-3: ffffffffh says that READ CAPACITY(16) is needed, and so it is.
    assert_eq!(Unit::new(facts).data(&cdb(&[0x25], 10))[..4], [255; 4]);
    let below = Facts { blocks: (1 << 32) - 1, ..malloc() };
    assert_eq!(Unit::new(below).data(&cdb(&[0x25], 10))[..4], [255, 255, 255, 254]);
}

#[test]
fn luns() {
    let mut unit = Unit::new(facts());
    let report =
        |select: u8, allocation: u8| cdb(&[0xa0, 0, select, 0, 0, 0, 0, 0, 0, allocation], 12);
    let one = [&[0, 0, 0, 8][..], &[0; 12]].concat();
    for select in [0, 2, 0x11] {
        assert_eq!(unit.data(&report(select, 64)), one);
    }
    for select in [1, 0x10, 0x12] {
        assert_eq!(unit.data(&report(select, 64)), [0; 8]);
    }
    assert_eq!(unit.data(&report(0, 16)), one);
    for bad in [report(3, 64), report(0x13, 64), report(0xff, 64), report(0, 15)] {
        assert_eq!(unit.error(&bad, &[]), INVALID_FIELD);
    }
}

#[test]
fn lba_status() {
    let mut unit = Unit::new(facts());
    let get = |lba: u64, allocation: u8| {
        [&[0x9e, 0x12][..], &lba.to_be_bytes(), &[0, 0, 0, allocation, 0, 0]].concat()
    };
    let header = [0, 0, 0, 20, 0, 0, 0, 0];
    let all = [&header[..], &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 3, 0xe7, 0, 0, 0, 0]].concat();
    assert_eq!(unit.data(&get(1, 255)), all);
    assert_eq!(unit.data(&get(1, 10)), all[..10]);
    assert_eq!(unit.error(&get(1000, 255), &[]), OUT_OF_RANGE);
    assert_eq!(unit.error(&get(u64::MAX, 255), &[]), OUT_OF_RANGE);
    assert!(unit.data(&get(999, 255)).ends_with(&[0, 0, 0, 1, 0, 0, 0, 0]));
}

#[test]
fn lba_status_of_extents() {
    use scsi::report::{Provisioning, lba_status};
    use scsi::{Buffers, Step};
    let mut unit = Unit::new(facts());
    let buffers = Buffers { data_in: 40, data_out: 0 };
    let get = cdb(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 0xff], 16);
    let Step::LbaStatus(query) =
        unit.lu.start(common::A, common::PORT, &get, buffers, &mut unit.reply)
    else {
        panic!("not the step");
    };
    assert_eq!((query.lba, query.blocks, query.extents_max), (100, 900, 2));
    let extents = [
        (50, Provisioning::Mapped),
        (0, Provisioning::Mapped),
        (5000, Provisioning::Deallocated),
        (1, Provisioning::Mapped),
    ];
    lba_status(&query, extents, buffers, &mut unit.reply);
    let data = unit.reply.data();
    assert_eq!(data[..4], [0, 0, 0, 36]);
    assert_eq!(data[8..24], [0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 50, 0, 0, 0, 0]);
    assert_eq!(data[24..], [0, 0, 0, 0, 0, 0, 0, 150, 0, 0, 3, 0x52, 1, 0, 0, 0]);
}

#[test]
fn absent_luns() {
    use scsi::{Buffers, Reply, Status, absent};
    let mut reply = Reply::new();
    let buffers = Buffers { data_in: 255, data_out: 0 };
    let mut send = |cdb: &[u8]| {
        absent(cdb, buffers, &mut reply);
        (reply.status(), reply.data().to_vec(), reply.sense().map(|sense| sense.code.0))
    };
    let (status, data, _) = send(&[0x12, 0, 0, 0, 255, 0]);
    assert_eq!((status, data.len(), data[0], data[4]), (Status::Good, 36, 0x7f, 31));
    let (_, data, _) = send(&cdb(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 12));
    assert_eq!((data.len(), data[3]), (16, 8));
    let (status, data, _) = send(&[0x03, 0, 0, 0, 18, 0]);
    assert_eq!((status, data[2], data[12]), (Status::Good, 5, 0x25));
    for cdb in [&[0; 6][..], &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0xff; 6], &[]] {
        assert_eq!(send(cdb), (Status::CheckCondition, vec![], Some(0x25)));
    }
}
