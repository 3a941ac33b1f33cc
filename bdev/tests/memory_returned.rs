//! A deleted memory disk gives its memory back. Alone in its file: it measures the process.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use bdev::{Bdev, Malloc, MallocOptions};

/// Address space and resident memory, in pages.
fn used() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let mut numbers = text.split(' ').map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn memory_is_present_from_the_start_and_gone_with_the_disk() {
    const MIB_64: u64 = 64 << 20;
    let options =
        MallocOptions { name: "m".into(), num_blocks: MIB_64 / 512, block_size: 512, uuid: None };
    drop(Malloc::create(options.clone()).unwrap());
    let (address_space, resident) = used();
    for _ in 0..20 {
        let disk = Malloc::create(options.clone()).unwrap();
        if disk.backing() == bdev::Backing::NormalPages {
            assert!(used().1 >= resident + MIB_64 / 4096 / 2, "not populated");
        }
        assert_eq!(disk.size_bytes(), MIB_64);
    }
    let (address_space_after, resident_after) = used();
    assert!(address_space_after < address_space + MIB_64 / 4096, "address space leaks");
    assert!(resident_after < resident + MIB_64 / 4096, "memory leaks");
}
