//! The suite of bdevs, on a namespace. Needs `VHOST_NVME`, the name of its block device of [`SIZE`]
//! bytes, and one test at a time, as in the guest of `ci/nvme`.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bdev::{Access, Bdev, Engine, FileDisk, FileOptions, Flavour, Op, Status, open_file};
use bdev_conformance::{Driver, Fixture, SIZE, conformance};

/// Opens the block device, which the disk of the test before may still be closing.
fn open_block_device(path: &Path) -> File {
    loop {
        match open_file(path, Access::Exclusive) {
            Err(e) if e.errno() == libc::EBUSY => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

/// A disk of zeroes. `None`, and the test is skipped, without a namespace.
#[track_caller]
fn disk() -> Option<Fixture> {
    let Ok(block) = std::env::var("VHOST_NVME") else {
        test_report::skipped("nvme", "VHOST_NVME is not set: see ci/nvme");
        return None;
    };
    let filename = PathBuf::from("/dev").join(&block);
    let file = open_block_device(&filename);
    let options = FileOptions {
        name: "N".into(),
        filename,
        block_size: None,
        readonly: false,
        fallocate: false,
        uuid: None,
        flavour: Flavour::Nvme,
        engine: None,
    };
    let disk = FileDisk::on(file, options).unwrap();
    assert_eq!(disk.service().engine, Engine::IoUring);
    let disk: Arc<dyn Bdev> = disk;
    assert_eq!(Driver::new(&disk, 1).plain(Op::WriteZeroes, 0, SIZE), Status::Ok);
    Some(Fixture::of(disk))
}

conformance! {
    block_device => disk();
}
