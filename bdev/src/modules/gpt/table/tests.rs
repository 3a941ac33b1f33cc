use super::*;

const DISK: Uuid = uuid!("11111111-2222-4333-8444-555555555555");
const FOREIGN: Uuid = uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4");

/// A disk of 1 MiB with a table at both ends, whose fields a test changes.
struct Image {
    block_size: usize,
    bytes: Vec<u8>,
}

impl Image {
    fn new(block_size: usize, entries: &[(Uuid, u64, u64)]) -> Self {
        let mut image = Self { block_size, bytes: vec![0; 1 << 20] };
        let blocks = image.num_blocks();
        image.bytes[446 + 4] = 0xEE;
        image.set_u32(446 + 8, 1);
        image.set_u32(446 + 12, u32::try_from(blocks - 1).unwrap());
        image.bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
        let array = (ENTRIES_MAX * ENTRY_LEN / block_size) as u64;
        for (lba, entries_lba) in [(1, 2), (blocks - 1, blocks - 1 - array)] {
            let at = image.at(lba);
            image.bytes[at..at + 8].copy_from_slice(b"EFI PART");
            image.set_u32(at + 12, 92);
            image.set_u64(at + 24, lba);
            image.set_u64(at + 40, 2 + array);
            image.set_u64(at + 48, blocks - 2 - array);
            image.bytes[at + 56..at + 72].copy_from_slice(&DISK.to_bytes_le());
            image.set_u64(at + 72, entries_lba);
            image.set_u32(at + 80, 128);
            image.set_u32(at + 84, 128);
            for (i, (kind, first, last)) in entries.iter().enumerate() {
                image.entry(entries_lba, i, *kind, *first, *last);
            }
        }
        image.seal();
        image
    }

    fn entry(&mut self, entries_lba: u64, i: usize, kind: Uuid, first: u64, last: u64) {
        let at = self.at(entries_lba) + i * ENTRY_LEN;
        self.bytes[at..at + 16].copy_from_slice(&kind.to_bytes_le());
        self.bytes[at + 16] = u8::try_from(i + 1).unwrap();
        self.set_u64(at + 32, first);
        self.set_u64(at + 40, last);
        self.bytes[at + 56..at + 60].copy_from_slice(&[b'g', 0, 0xE4, 0]);
    }

    fn num_blocks(&self) -> u64 {
        (self.bytes.len() / self.block_size) as u64
    }

    fn at(&self, lba: u64) -> usize {
        usize::try_from(lba).unwrap() * self.block_size
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Makes the checksums right again, where the fields allow it.
    fn seal(&mut self) {
        for lba in [1, self.num_blocks() - 1] {
            let at = self.at(lba);
            let (first, count) = (u64_at(&self.bytes, at + 72), u32_at(&self.bytes, at + 80));
            let len = usize_of(u64::from(count)) * ENTRY_LEN;
            let from = usize::try_from(first).ok().and_then(|n| n.checked_mul(self.block_size));
            let entries = from.and_then(|from| self.bytes.get(from..from.checked_add(len)?));
            let crc = entries.map_or(0, crc32fast::hash);
            self.set_u32(at + 88, crc);
            self.set_u32(at + 16, 0);
            let len = usize_of(u32_at(&self.bytes, at + 12).into()).min(self.block_size);
            let crc = crc32fast::hash(&self.bytes[at..at + len]);
            self.set_u32(at + 16, crc);
        }
    }

    fn parse(&self) -> Result<Option<Table>, [Invalid; 2]> {
        let Self { block_size, bytes } = self;
        let (front, back) = (&bytes[..WINDOW], &bytes[bytes.len() - WINDOW..]);
        parse(&Disk { block_size: *block_size, num_blocks: self.num_blocks(), front, back })
    }

    fn table(&self) -> Table {
        self.parse().unwrap().unwrap()
    }

    /// Numbers, first blocks and numbers of blocks.
    fn ranges(&self) -> Vec<(u32, u64, u64)> {
        self.table().partitions.iter().map(|p| (p.number, p.first, p.num_blocks)).collect()
    }
}

fn two() -> Image {
    Image::new(512, &[(CURRENT, 100, 199), (FOREIGN, 200, 299), (OLD, 300, 399)])
}

#[test]
fn partitions_of_spdk_s_types_are_found() {
    for block_size in [512, 4096] {
        let image = Image::new(block_size, &[(CURRENT, 50, 99), (FOREIGN, 1, 2), (OLD, 100, 199)]);
        let table = image.table();
        assert_eq!((table.disk, table.skipped), (DISK, vec![]));
        let unique = uuid!("00000001-0000-0000-0000-000000000000");
        let name = "gä".to_owned();
        let first = Partition { number: 1, kind: CURRENT, unique, first: 50, num_blocks: 50, name };
        assert_eq!(table.partitions[0], first);
        assert_eq!(image.ranges(), [(1, 50, 50), (3, 100, 99)], "an old one is a block shorter");
    }
}

#[test]
fn a_disk_without_a_protective_boot_record_has_no_table() {
    let changes: [fn(&mut Image); 5] = [
        |image| image.bytes[510] = 0,
        |image| image.bytes[450] = 0x83,
        |image| image.set_u32(454, 2),
        |image| image.set_u32(458, 2046),
        |image| image.set_u32(458, 2048),
    ];
    for change in changes {
        let mut image = two();
        change(&mut image);
        assert_eq!(image.parse(), Ok(None));
    }
    let mut image = two();
    image.set_u32(458, u32::MAX);
    assert_eq!(image.ranges().len(), 2);
    image.bytes.copy_within(446..462, 494);
    image.bytes[446..462].fill(0);
    assert_eq!(image.ranges().len(), 2, "it may be any of the four entries");
    let empty = Disk { block_size: 512, num_blocks: 0, front: &image.bytes, back: &[] };
    assert_eq!(parse(&empty), Ok(None));
    let short = Disk { block_size: 512, num_blocks: 1, front: &image.bytes[..511], back: &[] };
    assert_eq!(parse(&short), Ok(None));
}

#[test]
fn the_backup_is_used_if_the_first_table_is_corrupt() {
    // The signature, the header, an entry.
    for at in [512, 512 + 60, 1024 + 200] {
        let mut image = two();
        image.bytes[at] ^= 1;
        assert_eq!(image.ranges(), two().ranges());
        let backup = image.bytes.len() - 512 + 60;
        image.bytes[backup] ^= 1;
        let [first, second] = image.parse().unwrap_err();
        let expected = match at {
            512 => Invalid::NoHeader,
            572 => Invalid::HeaderChecksum,
            _ => Invalid::EntriesChecksum,
        };
        assert_eq!((first, second), (expected, Invalid::HeaderChecksum));
    }
}

#[test]
fn fields_out_of_range_are_refused() {
    let length = Invalid::Field("length");
    let usable = Invalid::Field("range of usable blocks");
    let entries = Invalid::Field("position of the entries");
    let count = Invalid::Field("number of entries");
    let entry = Invalid::Field("length of an entry");
    let cases: [(usize, u64, Invalid); 19] = [
        (12, 91, length),
        (12, 513, length),
        (12, u64::from(u32::MAX), length),
        (24, 2, Invalid::Field("own position")),
        (40, 0, usable),
        (40, 1, usable),
        (40, 2015, usable),
        (48, 2048, usable),
        (48, u64::MAX, usable),
        (72, 64, entries),
        (72, 1 << 40, entries),
        (72, u64::MAX, entries),
        (72, u64::MAX / 512 + 1, entries),
        (80, 129, count),
        (80, u64::from(u32::MAX), count),
        (84, 0, entry),
        (84, 127, entry),
        (84, 256, entry),
        (84, u64::from(u32::MAX), entry),
    ];
    for (field, value, expected) in cases {
        let mut image = two();
        // The backup is out of the way.
        let backup = image.bytes.len() - 512;
        image.bytes[backup] = 0;
        match u32::try_from(value) {
            Ok(value) if ![24, 40, 48, 72].contains(&field) => image.set_u32(512 + field, value),
            _ => image.set_u64(512 + field, value),
        }
        image.seal();
        let case = (field, value);
        assert_eq!(image.parse(), Err([expected, Invalid::NoHeader]), "{case:?}");
    }
    // Fewer entries than usual are a table, also none.
    for (count, found) in [(0, 0), (1, 1), (56, 2)] {
        let mut image = two();
        image.set_u32(512 + 80, count);
        image.seal();
        assert_eq!(image.ranges().len(), found);
    }
}

#[test]
fn a_partition_that_cannot_be_is_skipped() {
    let image = Image::new(
        512,
        &[
            (CURRENT, 100, 199),
            (CURRENT, 199, 250),
            (CURRENT, 0, 50),
            (CURRENT, 1, u64::MAX),
            (CURRENT, 500, 499),
            (OLD, 600, 600),
            (CURRENT, 2000, 2016),
            (CURRENT, 2014, 2014),
            (CURRENT, 90, 300),
            (CURRENT, 200, 299),
        ],
    );
    let table = image.table();
    assert_eq!(image.ranges(), [(1, 100, 100), (8, 2014, 1), (10, 200, 100)]);
    let skipped = [
        (2, Skipped::Overlap(1)),
        (3, Skipped::Range),
        (4, Skipped::Range),
        (5, Skipped::Range),
        (6, Skipped::Empty),
        (7, Skipped::Range),
        (9, Skipped::Overlap(1)),
    ];
    assert_eq!(table.skipped, skipped);
}

/// The next number of an xorshift generator.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn mutated_tables_yield_partitions_within_the_disk() {
    let mut state = 0x1234_5678_9ABC_DEF1_u64;
    let (mut valid, mut found) = (0, 0);
    for seed in 0..20_000 {
        let mut image = two();
        let last = image.bytes.len() - 512;
        for _ in 0..=next(&mut state) % 4 {
            let area = [446..512, 512..640, 1024..1536, last..last + 128];
            let area = area[usize_of(next(&mut state) % 4)].clone();
            let at = area.start + usize_of(next(&mut state)) % area.len();
            let value = next(&mut state).to_le_bytes()[0];
            image.bytes[at] = [0, 0xFF, value, image.bytes[at] ^ 1][usize_of(value.into()) % 4];
        }
        if !next(&mut state).is_multiple_of(4) {
            image.seal();
        }
        let Ok(Some(table)) = image.parse() else { continue };
        valid += 1;
        found += table.partitions.len();
        for (i, one) in table.partitions.iter().enumerate() {
            let end = one.first.checked_add(one.num_blocks).unwrap();
            assert!(one.first >= 2 && one.num_blocks > 0 && end <= 2048, "{seed}: {one:?}");
            let others = table.partitions[..i].iter();
            let apart = |other: &Partition| {
                other.first + other.num_blocks <= one.first || end <= other.first
            };
            assert!(others.clone().all(apart), "{seed}: {table:?}");
        }
    }
    assert!(valid > 1000 && found > 1000, "the mutations leave something: {valid}, {found}");
}
