//! What is particular to block devices, and to file systems with larger blocks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bdev::{Bdev, FileDisk, FileOptions, Flavour, Op, Status, Topology};
use bdev_conformance::{Driver, Fixture, SIZE, checks, pattern};
use std::os::fd::AsRawFd;
use tempfile::TempDir;

use crate::disks::file_options;
use crate::loops::{Loop, run};

/// As the kernel shows it, for blocks of `block_size`.
fn topology(device: &Path, block_size: u32) -> Topology {
    let queue = Path::new("/sys/block").join(device.file_name().unwrap()).join("queue");
    let bytes =
        |name| -> u32 { fs::read_to_string(queue.join(name)).unwrap().trim().parse().unwrap() };
    let physical_block_size = bytes("physical_block_size");
    assert!(physical_block_size >= block_size);
    Topology {
        physical_block_size,
        min_io_blocks: bytes("minimum_io_size") / block_size,
        optimal_io_blocks: bytes("optimal_io_size") / block_size,
    }
}

/// A file on a file system whose blocks are 4096 bytes, down to the device.
fn file_on_large_blocks() -> Option<PathBuf> {
    let device = Loop::new(8 * SIZE, 4096)?;
    run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(device.device()))?;
    let dir = TempDir::new().unwrap();
    run(Command::new("mount").arg(device.device()).arg(dir.path()))?;
    let name = dir.path().join("disk");
    let made = File::create(&name).and_then(|file| file.set_len(SIZE));
    let open = File::open(dir.path());
    run(Command::new("umount").arg("--lazy").arg(dir.path()))?;
    made.unwrap();
    // Holds the file system until the process ends.
    let open = Box::leak(Box::new(open.unwrap()));
    Some(Path::new("/proc/self/fd").join(open.as_raw_fd().to_string()).join("disk"))
}

#[test]
fn a_device_knows_its_block_size_and_does_all_operations() {
    for sector_size in [512, 4096] {
        let Some(device) = Loop::new(SIZE, sector_size) else { return };
        for flavour in [Flavour::Aio, Flavour::Uring] {
            let options = FileOptions {
                block_size: None,
                ..file_options(device.device().into(), flavour, 512)
            };
            let disk = FileDisk::create(options).unwrap();
            assert_eq!(disk.block_size(), sector_size);
            assert_eq!(disk.size_bytes(), SIZE);
            assert_eq!(disk.rescan().unwrap(), SIZE / u64::from(sector_size));
            assert_eq!(disk.topology(), topology(device.device(), sector_size));
            println!("{sector_size}: {:?} {:?}", disk.direct(), disk.features());
            let unmap = disk.features().unmap;
            let mut driver = Driver::new(&(disk as Arc<dyn Bdev>), 8);
            let data = pattern(u64::from(sector_size), 1 << 20);
            assert_eq!(driver.write(4096, &data), Status::Ok);
            assert_eq!(driver.read(4096, data.len()), (data, Status::Ok));
            assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
            assert_eq!(driver.plain(Op::WriteZeroes, 4096, 8192), Status::Ok);
            assert_eq!(driver.read(4096, 8192), (vec![0; 8192], Status::Ok));
            let status = driver.plain(Op::Unmap, 65536, 65536);
            assert_eq!(status, if unmap { Status::Ok } else { Status::Unsupported });
            assert_eq!(driver.read(65536, 65536).1, Status::Ok);
        }
    }
}

#[test]
fn a_block_size_below_the_device_s_is_refused() {
    let Some(device) = Loop::new(SIZE, 4096) else { return };
    let options = file_options(device.device().into(), Flavour::Aio, 512);
    let e = FileDisk::create(options).map(|_| ()).unwrap_err();
    assert_eq!(e.errno(), libc::EINVAL);
    let text = e.to_string();
    let names = [device.device().to_str().unwrap(), "512", "4096"];
    assert!(names.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn a_file_with_smaller_blocks_than_direct_io_goes_through_the_page_cache() {
    let Some(name) = file_on_large_blocks() else { return };
    // One after the other, on the same file, from zeroes.
    for check in [
        checks::reads_back_what_was_written,
        checks::segments_may_be_split_and_aligned_in_any_way,
        checks::a_range_past_the_end_is_an_error,
        checks::unmap_leaves_a_readable_range_and_its_neighbours,
        checks::write_zeroes_reads_as_zeroes_and_spares_the_neighbours,
        checks::a_long_request_is_done_to_its_end,
        checks::as_many_as_the_depth_are_taken_and_each_ends_once,
        checks::two_channels_see_each_other_s_writes,
    ] {
        let file = fs::OpenOptions::new().write(true).open(&name).unwrap();
        file.set_len(0).and_then(|()| file.set_len(SIZE)).unwrap();
        let disk = FileDisk::create(file_options(name.clone(), Flavour::Uring, 512)).unwrap();
        assert_eq!(disk.direct(), None);
        assert!(disk.features().any_alignment);
        assert_eq!(disk.topology().settled(512).physical_block_size, 4096);
        check(&Fixture::of(disk));
        let disk = FileDisk::create(file_options(name.clone(), Flavour::Uring, 4096)).unwrap();
        assert!(disk.direct().is_some(), "blocks of 4096 go directly");
    }
}
