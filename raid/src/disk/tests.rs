//! Arrays at the limits of what a superblock can say.

use std::time::Duration;

use bdev::{Malloc, MallocOptions, Status};
use bdev_conformance::Driver;

use super::*;

const OFFSET: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(20);

fn array(level: Level, strip: u64, members: u64, seq_number: u64) -> Result<Arc<RaidDisk>, Error> {
    let member = |n| {
        let (name, num_blocks) = (format!("m{n}"), (OFFSET + (64 << 10)) / 512);
        let bdev = Malloc::create(MallocOptions { name, num_blocks, block_size: 512, uuid: None })
            .unwrap();
        let extent = Extent { offset: OFFSET, len: bdev.size_bytes() - OFFSET };
        OptionalMember { uuid: bdev.uuid(), bdev: Some(bdev), extent }
    };
    RaidDisk::create(RaidOptions {
        name: "R".into(),
        uuid: Uuid::new_v4(),
        level,
        strip,
        members: (0..members).map(member).collect(),
        seq_number: Some(seq_number),
    })
}

#[test]
fn the_largest_sequence_number_does_not_end_the_thread() {
    let disk = array(Level::Raid1, 0, 2, u64::MAX).unwrap();
    let removed = disk.remove_member(0).recv_timeout(LIMIT);
    assert!(matches!(removed, Ok(Ok(()))), "{removed:?}");
    let shared: Arc<dyn Bdev> = Arc::clone(&disk) as _;
    assert_eq!(Driver::new(&shared, 4).write(0, &[1; 4096]), Status::Ok);
    assert_ne!(disk.array.state().seq_number, 0, "older than the removed member's");
}

/// A superblock has up to 255 members; a mask has 64.
#[test]
fn a_redundant_array_has_no_more_members_than_a_mask_has_bits() {
    assert!(array(Level::Raid1, 0, 64, 1).is_ok());
    for level in [Level::Raid1, Level::Raid5f] {
        let strip = if level == Level::Raid1 { 0 } else { 4096 };
        assert!(matches!(array(level, strip, 65, 1), Err(Error::Invalid(_))), "{level:?}");
    }
    assert!(array(Level::Raid0, 4096, 65, 1).is_ok(), "nothing is ever removed");
}

#[test]
fn an_array_with_parity_has_no_larger_strips_than_its_channels_have_memory_for() {
    let Err(Error::Invalid(text)) = array(Level::Raid5f, 32 << 20, 3, 1) else {
        panic!("it is refused")
    };
    assert!(text.contains("strips are too large"), "{text}");
}
