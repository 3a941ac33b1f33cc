//! What is particular to files: how they are opened, and what happens behind our back.
#![expect(unsafe_code, reason = "makes a fifo")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use bdev::{Bdev, Error, FileDisk, FileOptions, Flavour, Op, Status, Topology};
use bdev_conformance::{Driver, Memory, Request, SIZE, pattern};
use tempfile::TempDir;

use crate::disks::{file_options, make_file};

fn dynamic(disk: &Arc<FileDisk>) -> Arc<dyn Bdev> {
    Arc::clone(disk) as Arc<dyn Bdev>
}

fn refused(options: FileOptions) -> Error {
    FileDisk::create(options).map(|_| ()).expect_err("must be refused")
}

#[test]
fn the_bytes_are_in_the_file() {
    for flavour in [Flavour::Aio, Flavour::Uring] {
        let dir = TempDir::new().unwrap();
        let name = make_file(&dir, SIZE);
        let disk = FileDisk::create(file_options(name.clone(), flavour, 512)).unwrap();
        let mut driver = Driver::new(&dynamic(&disk), 4);
        let data = pattern(4, 3 * 512);
        // Aligned, and not.
        assert_eq!(driver.write(512, &data), Status::Ok);
        let mut memory = Memory::new(&[3 * 512], 1);
        memory.fill(&data);
        assert_eq!(driver.run(Request::rw(Op::Write, 8192, memory)).1, Status::Ok);
        assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
        let bytes = fs::read(&name).unwrap();
        assert_eq!(bytes[512..2048], data);
        assert_eq!(bytes[8192..8192 + 1536], data);
        assert_eq!(bytes.len() as u64, SIZE);
    }
}

#[test]
fn direct_io_is_used_where_the_file_system_tells_that_it_works() {
    let dir = TempDir::new().unwrap();
    let disk = FileDisk::create(file_options(make_file(&dir, SIZE), Flavour::Aio, 4096)).unwrap();
    let flags = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.ok())
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == disk.filename()))
        .map(|entry| {
            let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
            let text = fs::read_to_string(info).unwrap();
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            i32::from_str_radix(flags.trim(), 8).unwrap()
        })
        .collect::<Vec<_>>();
    assert_eq!(flags.len(), 1, "one descriptor");
    assert_eq!(flags[0] & libc::O_DIRECT != 0, disk.direct().is_some());
    assert_ne!(flags[0] & libc::O_CLOEXEC, 0);
    assert_eq!(disk.features().any_alignment, disk.direct().is_none());
    let shm = TempDir::new_in("/dev/shm").unwrap();
    let options = file_options(make_file(&shm, SIZE), Flavour::Aio, 4096);
    println!("temporary directory: {:?}", disk.direct());
    println!("tmpfs: {:?}", FileDisk::create(options).unwrap().direct());
}

#[test]
fn a_file_says_no_more_of_its_topology_than_direct_io_does() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    for block_size in [512, 4096] {
        let disk = FileDisk::create(file_options(name.clone(), Flavour::Aio, block_size)).unwrap();
        let physical_block_size = disk.topology().physical_block_size;
        assert_eq!(disk.topology(), Topology { physical_block_size, ..Topology::default() });
        // Whatever is under the directory, direct I/O of such blocks needs no larger ones.
        if disk.direct().is_some() {
            assert_eq!(disk.topology().settled(block_size).physical_block_size, block_size);
        }
    }
}

#[test]
fn a_file_that_got_shorter_gives_errors_and_keeps_its_size() {
    for (dir, shift) in [(TempDir::new(), 0), (TempDir::new(), 1), (TempDir::new_in("/dev/shm"), 0)]
    {
        let dir = dir.unwrap();
        let name = make_file(&dir, SIZE);
        let disk = FileDisk::create(file_options(name.clone(), Flavour::Uring, 512)).unwrap();
        let mut driver = Driver::new(&dynamic(&disk), 4);
        fs::OpenOptions::new().write(true).open(&name).unwrap().set_len(SIZE / 2).unwrap();
        let mut read =
            |offset, len| driver.run(Request::rw(Op::Read, offset, Memory::new(&[len], shift))).1;
        assert_eq!(read(SIZE / 2 - 512, 512), Status::Ok);
        assert_eq!(read(SIZE / 2 - 512, 1024), Status::IoError);
        assert_eq!(read(SIZE / 2, 512), Status::IoError);
        assert_eq!(read(SIZE / 2 - (256 << 10), 512 << 10), Status::IoError);
        assert_eq!(read(0, 512), Status::Ok);
        assert!(matches!(disk.rescan(), Err(Error::Busy(_))));
        assert_eq!(disk.size_bytes(), SIZE);
    }
}

#[test]
fn a_file_that_grew_is_larger_after_a_rescan_on_open_channels_too() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    let disk = FileDisk::create(file_options(name.clone(), Flavour::Aio, 512)).unwrap();
    let mut driver = Driver::new(&dynamic(&disk), 4);
    let file = fs::OpenOptions::new().write(true).open(&name).unwrap();
    file.set_len(2 * SIZE + 100).unwrap();
    assert_eq!(driver.write(SIZE, &[1; 512]), Status::IoError);
    assert_eq!(disk.rescan().unwrap(), 2 * SIZE / 512);
    assert_eq!(driver.write(SIZE, &[1; 512]), Status::Ok);
    assert_eq!(driver.write(2 * SIZE, &[1; 512]), Status::IoError);
    assert_eq!(driver.read(SIZE, 512), (vec![1; 512], Status::Ok));
}

#[test]
fn a_read_only_disk_reads_and_refuses_the_rest() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    fs::write(&name, pattern(1, SIZE as usize)).unwrap();
    let before = fs::read(&name).unwrap();
    let options = FileOptions { readonly: true, ..file_options(name.clone(), Flavour::Aio, 512) };
    let disk = dynamic(&FileDisk::create(options).unwrap());
    let features = disk.features();
    assert!(features.read_only && !features.unmap && !features.write_zeroes);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.read(512, 1024), (before[512..1536].to_vec(), Status::Ok));
    assert_eq!(driver.write(0, &[0; 512]), Status::IoError);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.plain(Op::Unmap, 0, 512), Status::IoError);
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
    drop(driver);
    assert!(fs::read(&name).unwrap() == before);
}

#[test]
fn unmap_frees_space_and_aio_offers_it_only_with_fallocate() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    let options = file_options(name.clone(), Flavour::Aio, 4096);
    let without = FileOptions { fallocate: false, ..options.clone() };
    assert!(!FileDisk::create(without.clone()).unwrap().features().unmap);
    let mut driver = Driver::new(&dynamic(&FileDisk::create(without).unwrap()), 4);
    assert_eq!(driver.plain(Op::Unmap, 0, SIZE), Status::Unsupported);
    let disk = FileDisk::create(options).unwrap();
    assert!(disk.features().unmap);
    let mut driver = Driver::new(&dynamic(&disk), 4);
    assert_eq!(driver.write(0, &pattern(1, SIZE as usize)), Status::Ok);
    let full = fs::metadata(&name).unwrap().blocks();
    assert_eq!(driver.plain(Op::Unmap, 0, SIZE / 2), Status::Ok);
    let punched = fs::metadata(&name).unwrap();
    assert!(punched.blocks() <= full / 2 + 64, "{} of {full}", punched.blocks());
    assert_eq!(punched.len(), SIZE);
}

#[test]
fn write_zeroes_keeps_the_space_unless_it_may_unmap() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    let options = file_options(name.clone(), Flavour::Aio, 4096);
    let mut driver = Driver::new(&dynamic(&FileDisk::create(options).unwrap()), 4);
    assert_eq!(driver.write(0, &pattern(1, SIZE as usize)), Status::Ok);
    let full = fs::metadata(&name).unwrap().blocks();
    for (may_unmap, most) in [(false, full), (true, full / 2 + 64)] {
        let zeroes = Request::plain(Op::WriteZeroes, 0, SIZE / 2);
        let (_, status) = driver.run(Request { may_unmap, ..zeroes });
        assert_eq!(status, Status::Ok);
        let blocks = fs::metadata(&name).unwrap().blocks();
        assert!(blocks <= most && (may_unmap || blocks == full), "{blocks} of {full}");
        assert_eq!(driver.read(0, SIZE as usize / 2).0, vec![0; SIZE as usize / 2]);
    }
}

#[test]
fn wrong_options_are_refused_and_the_text_names_the_file() {
    let dir = TempDir::new().unwrap();
    let name = make_file(&dir, SIZE);
    let good = file_options(name.clone(), Flavour::Aio, 512);
    let with_size = |size| {
        fs::OpenOptions::new().write(true).open(&name).unwrap().set_len(size).unwrap();
    };
    for block_size in [None, Some(0), Some(100), Some(256), Some(768)] {
        let e = refused(FileOptions { block_size, ..good.clone() });
        assert_eq!(e.errno(), libc::EINVAL, "{e}");
        assert!(e.to_string().contains(&name.display().to_string()), "{e}");
        assert!(block_size.is_none_or(|b| e.to_string().contains(&b.to_string())), "{e}");
    }
    assert_eq!(refused(FileOptions { name: String::new(), ..good.clone() }).errno(), libc::EINVAL);
    for size in [0, 512 + 511, 100] {
        with_size(size);
        let e = refused(good.clone());
        assert_eq!(e.errno(), libc::EINVAL, "{e}");
        let text = e.to_string();
        let names = [name.display().to_string(), size.to_string(), "512".into()];
        assert!(names.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn only_files_and_block_devices_are_opened() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("directory")).unwrap();
    let fifo = std::ffi::CString::new(path("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a terminated name.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    std::os::unix::fs::symlink("loop", path("loop")).unwrap();
    for (name, errno) in [
        (path("missing"), libc::ENOENT),
        (path("directory"), libc::EISDIR),
        (path("fifo"), libc::EINVAL),
        (path("socket"), libc::EINVAL),
        (path("loop"), libc::ELOOP),
        ("/dev/zero".into(), libc::EINVAL),
        ("".into(), libc::ENOENT),
    ] {
        let e = refused(file_options(name.clone(), Flavour::Uring, 512));
        assert_eq!(e.errno(), errno, "{e}");
        assert!(e.to_string().contains(&name.display().to_string()), "{e}");
        assert_eq!(errno == libc::EINVAL, e.to_string().contains("neither a file"), "{e}");
    }
    let target = make_file(&dir, SIZE);
    std::os::unix::fs::symlink(target, path("link")).unwrap();
    FileDisk::create(file_options(path("link"), Flavour::Aio, 512)).unwrap();
}

#[test]
fn a_depth_that_no_ring_has_is_refused() {
    let dir = TempDir::new().unwrap();
    let disk = FileDisk::create(file_options(make_file(&dir, SIZE), Flavour::Aio, 512)).unwrap();
    for depth in [0, u16::MAX] {
        let e = dynamic(&disk).open(depth).map(|_| ()).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL, "{e}");
    }
}
