use std::io::Read;
use std::path::Path;

use uuid::Uuid;

use super::*;

/// The beginning of an image that SPDK has written.
fn image(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(name);
    let file = std::fs::File::open(path.with_extension("img.zst")).unwrap();
    let mut bytes = vec![0; 64 << 10];
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

fn parsed(name: &str, block_size: u32) -> Superblock {
    match Superblock::parse(&image(name), block_size) {
        Parsed::Valid(superblock) => superblock,
        other => panic!("{name}: {other:?}"),
    }
}

const IMAGES: [(&str, u32); 13] = [
    ("raid0-m1", 512),
    ("raid0-m2", 512),
    ("concat-m3", 4096),
    ("concat-m4", 4096),
    ("concat-m5", 4096),
    ("raid1-m6", 512),
    ("raid1-m7", 512),
    ("raid1-degraded-m8", 512),
    ("raid1-degraded-m9", 512),
    ("raid5f-m11", 512),
    ("raid5f-m12", 512),
    ("raid5f-m13", 512),
    ("raid5f-m14", 512),
];

#[test]
fn spdk_s_superblocks_are_encoded_again_to_the_byte() {
    for (name, block_size) in IMAGES {
        let encoded = parsed(name, block_size).encode();
        assert_eq!(encoded, image(name)[..encoded.len()], "{name}");
    }
}

#[test]
fn spdk_s_superblocks_say_what_is_recorded() {
    let degraded = parsed("raid1-degraded-m9", 512);
    assert_eq!((degraded.name.as_str(), degraded.level), ("raid1-degraded", Level::Raid1));
    assert_eq!((degraded.seq_number, degraded.raid_size, degraded.strip_size), (2, 14336, 0));
    let states: Vec<_> = degraded.members.iter().map(|member| member.state).collect();
    assert_eq!(states, [MemberState::Missing, MemberState::Configured]);
    assert_eq!(parsed("raid1-degraded-m8", 512).seq_number, 1);
    let concat = parsed("concat-m4", 4096);
    let sizes: Vec<_> = concat.members.iter().map(|m| (m.data_offset, m.data_size)).collect();
    assert_eq!(sizes, [(256, 1792), (256, 768), (256, 1280)]);
    assert_eq!((concat.strip_size, concat.raid_size), (8, 3840));
    let parity = parsed("raid5f-m11", 512);
    assert_eq!((parity.level, parity.strip_size, parity.num_base_bdevs), (Level::Raid5f, 32, 4));
    assert_eq!(parity.members[1].state, MemberState::Missing);
    assert_eq!(parity.members[1].uuid.to_string(), "aaaaaaaa-0000-4000-8000-000000000012");
}

#[test]
fn any_changed_bit_is_noticed() {
    let good = image("raid5f-m11");
    let len = Superblock::len(4);
    for bit in (0..len * 8).step_by(3) {
        let mut bad = good[..512].to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(!matches!(Superblock::parse(&bad, 512), Parsed::Valid(_)), "bit {bit}");
    }
    for len in 0..512 {
        let parsed = Superblock::parse(&good[..len], 512);
        assert!(!matches!(parsed, Parsed::Valid(_)), "{len} bytes");
    }
    assert_eq!(Superblock::parse(&[0; 4096], 512), Parsed::None);
    assert!(matches!(Superblock::parse(&good, 4096), Parsed::Invalid(_)));
}

/// A forged superblock with a right checksum must not lead to an access out of range.
#[test]
fn fields_out_of_range_are_refused() {
    let good = parsed("raid5f-m11", 512);
    let refuse = |change: fn(&mut Superblock)| {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(matches!(Superblock::parse(&bad.encode(), 512), Parsed::Invalid(_)), "{bad:?}");
    };
    refuse(|s| s.name.clear());
    refuse(|s| s.uuid = Uuid::nil());
    refuse(|s| s.strip_size = 0);
    refuse(|s| s.strip_size = 33);
    refuse(|s| s.level = Level::Raid1);
    refuse(|s| s.num_base_bdevs = 2);
    refuse(|s| s.num_base_bdevs = 5);
    refuse(|s| s.members.truncate(2));
    refuse(|s| s.members[0].slot = 4);
    refuse(|s| s.members[0].slot = 1);
    refuse(|s| s.seq_number = SEQ_MAX + 1);
    refuse(|s| s.strip_size = 64 << 10);
    let with = |count: u8| {
        let mut many = good.clone();
        let member = good.members[0].clone();
        many.members = (0..count).map(|slot| SuperMember { slot, ..member.clone() }).collect();
        many.num_base_bdevs = count;
        Superblock::parse(&many.encode(), 512)
    };
    assert!(matches!(with(64), Parsed::Valid(_)));
    assert!(matches!(with(65), Parsed::Invalid(_)), "a mask has 64 bits");
}
