//! Faults that a review has found, each shown by a test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Bdev, Malloc, MallocOptions, Op, Status};
use bdev_conformance::{Driver, Memory, Request};
use uuid::Uuid;

use crate::{Extent, Level, OptionalMember, RaidDisk, RaidOptions};

const OFFSET: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(20);

fn malloc(name: &str, size: u64) -> Arc<dyn Bdev> {
    let options =
        MallocOptions { name: name.into(), num_blocks: size / 512, block_size: 512, uuid: None };
    Malloc::create(options).unwrap()
}

fn array(level: Level, strip: u64, members: &[Arc<dyn Bdev>], seq: Option<u64>) -> Arc<RaidDisk> {
    let members = members.iter().map(|bdev| OptionalMember {
        bdev: Some(Arc::clone(bdev)),
        uuid: bdev.uuid(),
        extent: Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET },
    });
    RaidDisk::create(RaidOptions {
        name: "R".into(),
        uuid: Uuid::new_v4(),
        level,
        strip,
        members: members.collect(),
        seq_number: seq,
    })
    .unwrap()
}

fn stored(bdev: &Arc<dyn Bdev>, at: u64, len: usize) -> Vec<u8> {
    Driver::new(bdev, 1).read(OFFSET + at, len).0
}

/// Submits a write, and returns whether it has ended within some seconds.
fn write_ends(driver: &mut Driver, offset: u64, data: &[u8]) -> bool {
    let mut memory = Memory::plain(data.len());
    memory.fill(data);
    let tag = driver.free_tag().unwrap();
    let ended = driver.submit(tag, Request::rw(Op::Write, offset, memory));
    if ended.unwrap_or_else(|_| panic!("full")).is_some() {
        return true;
    }
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        if driver.visit().iter().any(|(request, _)| request.offset == offset) {
            return true;
        }
    }
    false
}

/// A forged superblock has the largest number.
#[test]
fn the_largest_sequence_number_does_not_end_the_thread() {
    let members = [malloc("a", 1 << 20), malloc("b", 1 << 20)];
    let disk = array(Level::Raid1, 0, &members, Some(u64::MAX));
    let removed = disk.remove_member(0).recv_timeout(LIMIT);
    assert!(matches!(removed, Ok(Ok(()))), "{removed:?}");
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    assert!(write_ends(&mut Driver::new(&shared, 4), 0, &[1; 4096]), "writes hang");
    assert_ne!(disk.array.state().seq_number, 0, "older than the removed member's");
}

/// A superblock has up to 255 members; a mask has 64.
#[test]
fn an_array_of_more_members_than_a_mask_has_bits_is_refused_or_written() {
    let members: Vec<_> = (0..65).map(|n| malloc(&format!("m{n}"), 128 << 10)).collect();
    let options = |bdev: &Arc<dyn Bdev>| OptionalMember {
        bdev: Some(Arc::clone(bdev)),
        uuid: bdev.uuid(),
        extent: Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET },
    };
    let made = RaidDisk::create(RaidOptions {
        name: "R".into(),
        uuid: Uuid::new_v4(),
        level: Level::Raid1,
        strip: 0,
        members: members.iter().map(options).collect(),
        seq_number: Some(1),
    });
    let Ok(disk) = made else { return };
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    assert_eq!(Driver::new(&shared, 4).write(0, &[7; 4096]), Status::Ok);
    let has_it = stored(&members[64], 0, 4096) == [7; 4096];
    assert!(has_it, "configured, and without the write");
}
