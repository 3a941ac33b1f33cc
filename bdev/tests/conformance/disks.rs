//! The disks under test, each of [`SIZE`] bytes.

use std::any::Any;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use bdev::Flavour;
use bdev::{
    Access, Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, FileDisk, FileOptions,
    InjectedError, InjectedOp, Injection, Latency, Malloc, MallocOptions, Null, NullOptions, Part,
    Passthru, RateLimits, open_file,
};
use bdev_conformance::{Fixture, SIZE};
use tempfile::TempDir;

use crate::loops::Loop;

pub(crate) use Below::*;
pub(crate) use Through::*;
pub(crate) use bdev::Engine::{self, *};

pub(crate) fn malloc(block_size: u32) -> Fixture {
    malloc_of(SIZE, block_size)
}

pub(crate) fn malloc_of(size: u64, block_size: u32) -> Fixture {
    let num_blocks = size / u64::from(block_size);
    let options = MallocOptions { name: "Malloc0".into(), num_blocks, block_size, uuid: None };
    Fixture::of(Malloc::create(options).unwrap())
}

pub(crate) fn null_disk(size: u64, block_size: u32) -> Arc<Null> {
    let num_blocks = size / u64::from(block_size);
    let options = NullOptions { name: "Null0".into(), num_blocks, block_size, uuid: None };
    Null::create(options).unwrap()
}

pub(crate) fn null(block_size: u32) -> Fixture {
    null_of(SIZE, block_size)
}

pub(crate) fn null_of(size: u64, block_size: u32) -> Fixture {
    Fixture { keeps: false, ..Fixture::of(null_disk(size, block_size)) }
}

/// With a limit that is reached now and then.
pub(crate) fn limited(fixture: Fixture) -> Fixture {
    let limits =
        RateLimits { rw_ios_per_sec: 20_000, rw_mbytes_per_sec: 2_000, ..Default::default() };
    fixture.disk.qos().set_limits(limits);
    fixture
}

/// Half the size at first.
pub(crate) fn resized(_whole: Fixture) -> Fixture {
    let disk = null_disk(SIZE / 2, 512);
    disk.resize(SIZE / 512).unwrap();
    Fixture { keeps: false, ..Fixture::of(disk) }
}

pub(crate) fn file_options(filename: PathBuf, flavour: Flavour, block_size: u32) -> FileOptions {
    FileOptions {
        name: "File0".into(),
        filename,
        block_size: Some(block_size),
        readonly: false,
        fallocate: true,
        uuid: None,
        flavour,
        engine: None,
    }
}

/// A file of `size` bytes in a directory of its own.
pub(crate) fn make_file(dir: &TempDir, size: u64) -> PathBuf {
    let name = dir.path().join("disk");
    std::fs::File::create(&name).unwrap().set_len(size).unwrap();
    name
}

pub(crate) fn file(flavour: Flavour, block_size: u32) -> Fixture {
    file_of(SIZE, flavour, block_size)
}

pub(crate) fn file_of(size: u64, flavour: Flavour, block_size: u32) -> Fixture {
    in_dir(TempDir::new().unwrap(), size, flavour, block_size)
}

/// On tmpfs, which cannot zero a range, so that zeroes have to be written.
pub(crate) fn tmpfs(block_size: u32) -> Fixture {
    in_dir(TempDir::new_in("/dev/shm").unwrap(), SIZE, Flavour::Uring, block_size)
}

fn in_dir(dir: TempDir, size: u64, flavour: Flavour, block_size: u32) -> Fixture {
    let name = make_file(&dir, size);
    let disk = FileDisk::create(file_options(name, flavour, block_size)).unwrap();
    Fixture::on(disk, dir)
}

/// Past the page cache, or through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Through {
    Direct,
    Buffered,
}

/// What is below a file disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    PlainFile,
    LoopDevice,
}

/// A file disk that is made in this way and no other. `None`, and the test is skipped, where the
/// host does not let us.
#[track_caller]
pub(crate) fn engine(
    engine: Engine,
    through: Through,
    below: Below,
    block_size: u32,
) -> Option<Fixture> {
    let (name, below): (PathBuf, Box<dyn Any>) = match below {
        Below::PlainFile => {
            let dir = TempDir::new().unwrap();
            (make_file(&dir, SIZE), Box::new(dir))
        }
        Below::LoopDevice => {
            let device = Loop::new(SIZE, block_size)?;
            (device.device().into(), Box::new(device))
        }
    };
    let flavour = if engine == Engine::IoUring { Flavour::Uring } else { Flavour::Aio };
    let options =
        FileOptions { engine: Some(engine), ..file_options(name.clone(), flavour, block_size) };
    let file = match through {
        Through::Direct => open_file(&name, Access::ReadWrite).unwrap(),
        Through::Buffered => File::options().read(true).write(true).open(&name).unwrap(),
    };
    let disk = FileDisk::on(file, options).unwrap();
    if through == Through::Direct && disk.direct().is_none() {
        test_report::skipped("direct-io", &format!("{} is not opened for it", name.display()));
        return None;
    }
    let service = disk.service();
    assert_eq!(service.direct, through == Through::Direct);
    if service.direct && service.engine != engine {
        let need = if engine == Engine::Aio { "linux-aio" } else { "io-uring" };
        test_report::skipped(need, "the host forbids it");
        return None;
    }
    // A read that is not in the page cache waits, whatever it is asked.
    assert_eq!(service.engine, if service.direct { engine } else { Engine::Threads });
    Some(Fixture { below: Some(below), ..Fixture::of(disk) })
}

/// A file that was a quarter as large when the disk was made.
pub(crate) fn grown_file(block_size: u32) -> Fixture {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE / 4);
    let disk = FileDisk::create(file_options(name.clone(), Flavour::Aio, block_size)).unwrap();
    std::fs::OpenOptions::new().write(true).open(&name).unwrap().set_len(SIZE).unwrap();
    assert_eq!(disk.rescan().unwrap(), SIZE / u64::from(block_size));
    Fixture::on(disk, dir)
}

/// Some I/Os held back, a few of them longer.
pub(crate) fn delay(base: Fixture) -> Fixture {
    let latency = Latency { avg_read_us: 0, p99_read_us: 300, avg_write_us: 50, p99_write_us: 100 };
    let options = DelayOptions { name: "Delay0".into(), base: base.disk, latency, uuid: None };
    Fixture { disk: Delay::create(options).unwrap(), ..base }
}

pub(crate) fn passthru(base: Fixture) -> Fixture {
    Fixture { disk: Passthru::create("P0".into(), base.disk, None).unwrap(), ..base }
}

/// The middle third.
pub(crate) fn part(base: Fixture) -> Fixture {
    let third = base.disk.num_blocks() / 3;
    Fixture { disk: Part::create("p1".into(), base.disk, third, third).unwrap(), ..base }
}

pub(crate) fn error_disk(base: Arc<dyn Bdev>) -> Arc<ErrorDisk> {
    let name = format!("EE_{}", base.name());
    ErrorDisk::create(ErrorOptions { name, base, uuid: None }).unwrap()
}

/// With nothing injected.
pub(crate) fn error(base: Fixture) -> Fixture {
    Fixture { disk: error_disk(base.disk), ..base }
}

/// Every I/O is begun in the next poll, for a while.
pub(crate) fn retrying(base: Fixture) -> Fixture {
    let disk = error_disk(base.disk);
    let error = InjectedError::NoMemory;
    disk.inject(Injection { op: InjectedOp::All, error, count: 100, queue_depth: 0 }).unwrap();
    Fixture { disk, ..base }
}
