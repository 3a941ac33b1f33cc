//! What an error disk does to I/Os, over memory and over a file.

use std::sync::Arc;

use bdev::{Bdev, ErrorDisk, InjectedError, InjectedOp, Injection, Op, RateLimits, Status, Tag};
use bdev_conformance::{Driver, Fixture, Memory, Request, pattern};

use crate::disks::{Flavour, error_disk, file, malloc};

fn bases() -> [Fixture; 2] {
    [malloc(512), file(Flavour::Uring, 512)]
}

fn inject(disk: &ErrorDisk, op: InjectedOp, error: InjectedError, count: u32) {
    disk.inject(Injection { op, error, count, queue_depth: 0 }).unwrap();
}

fn driver(disk: &Arc<ErrorDisk>) -> Driver {
    Driver::new(&(Arc::clone(disk) as Arc<dyn Bdev>), 8)
}

fn read_request(offset: u64) -> Request {
    Request::rw(Op::Read, offset, Memory::plain(512))
}

#[test]
fn so_many_of_one_kind_fail_and_do_nothing() {
    for base in bases() {
        let disk = error_disk(Arc::clone(&base.disk));
        let mut driver = driver(&disk);
        inject(&disk, InjectedOp::Write, InjectedError::Failure, 2);
        assert_eq!(driver.read(0, 512).1, Status::Ok);
        assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
        assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::Ok);
        assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
        assert_eq!(driver.read(0, 512), (vec![0; 512], Status::Ok));
        assert_eq!(driver.write(0, &[1; 512]), Status::Ok);
        inject(&disk, InjectedOp::All, InjectedError::Failure, 1);
        assert_eq!(driver.plain(Op::Flush, 0, 0), Status::IoError);
        assert_eq!(driver.plain(Op::Unmap, 0, 512), Status::IoError);
        assert_eq!(driver.read(0, 512).1, Status::IoError);
        assert_eq!(driver.read(0, 512), (vec![1; 512], Status::Ok));
        inject(&disk, InjectedOp::Clear, InjectedError::Failure, 7);
        assert_eq!(driver.write(0, &[1; 512]), Status::Ok, "cleared");
    }
}

#[test]
fn pending_ones_wait_until_they_are_resumed_and_others_pass_them() {
    for base in bases() {
        let disk = error_disk(Arc::clone(&base.disk));
        let mut driver = driver(&disk);
        // Before anything is pending: releases nothing later.
        disk.resume_pending();
        disk.abort_pending();
        assert_eq!(driver.write(512, &[5; 512]), Status::Ok);
        inject(&disk, InjectedOp::Read, InjectedError::Pending, u32::MAX);
        assert!(matches!(driver.submit(Tag(0), read_request(512)), Ok(None)));
        for i in 0..100 {
            assert_eq!(driver.write(1024, &[i; 512]), Status::Ok);
            assert!(driver.visit().is_empty());
        }
        // Still injected: it is made to wait again.
        disk.resume_pending();
        assert!((0..10).all(|_| driver.visit().is_empty()));
        inject(&disk, InjectedOp::Clear, InjectedError::Failure, 0);
        assert!((0..10).all(|_| driver.visit().is_empty()), "clear alone resumes nothing");
        disk.resume_pending();
        let (request, status) = loop {
            if let Some(ended) = driver.visit().pop() {
                break ended;
            }
        };
        assert_eq!((request.memory.data(), status), (vec![5; 512], Status::Ok));
    }
}

#[test]
fn pending_ones_fail_when_they_are_aborted_on_every_channel() {
    for base in bases() {
        let disk = error_disk(Arc::clone(&base.disk));
        let mut drivers = [driver(&disk), driver(&disk)];
        inject(&disk, InjectedOp::Read, InjectedError::Pending, 6);
        for driver in &mut drivers {
            for tag in 0..3 {
                assert!(matches!(driver.submit(Tag(tag), read_request(0)), Ok(None)));
            }
            assert!(driver.visit().is_empty());
        }
        disk.abort_pending();
        for driver in &mut drivers {
            let ended = driver.visit();
            assert_eq!(ended.len(), 3);
            assert!(ended.iter().all(|(_, status)| *status == Status::IoError));
            assert_eq!(driver.read(0, 512).1, Status::Ok);
        }
    }
}

#[test]
fn a_moment_without_memory_only_delays() {
    for base in bases() {
        let disk = error_disk(Arc::clone(&base.disk));
        let mut driver = driver(&disk);
        inject(&disk, InjectedOp::All, InjectedError::NoMemory, 1);
        assert_eq!(driver.write(0, &[3; 512]), Status::Ok);
        assert_eq!(driver.read(0, 512), (vec![3; 512], Status::Ok));
    }
}

#[test]
fn one_byte_is_corrupted_and_a_writer_s_memory_is_restored() {
    let xor = |mut data: Vec<u8>, at: usize| {
        data[at] ^= 0x81;
        data
    };
    for base in bases() {
        let disk = error_disk(Arc::clone(&base.disk));
        let mut driver = driver(&disk);
        let data = pattern(1, 1024);
        let error = InjectedError::CorruptData { offset: 700, value: 0x81 };
        inject(&disk, InjectedOp::Write, error, 1);
        let mut memory = Memory::new(&[600, 424], 0);
        memory.fill(&data);
        let (request, status) = driver.run(Request::rw(Op::Write, 0, memory));
        assert_eq!((request.memory.data(), status), (data.clone(), Status::Ok));
        assert_eq!(driver.read(0, 1024), (xor(data.clone(), 700), Status::Ok));
        inject(&disk, InjectedOp::Read, error, 1);
        assert_eq!(driver.read(0, 1024), (data.clone(), Status::Ok));
        assert_eq!(driver.read(0, 1024), (xor(data, 700), Status::Ok));
        inject(&disk, InjectedOp::All, error, 1);
        assert_eq!(driver.read(0, 512).1, Status::Ok, "past the end of the data");
        assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
        let none = InjectedError::CorruptData { offset: 0, value: 0 };
        let injection = Injection { op: InjectedOp::Read, error: none, count: 1, queue_depth: 0 };
        assert_eq!(disk.inject(injection).unwrap_err().errno(), libc::EINVAL);
    }
}

#[test]
fn a_queue_depth_spares_those_that_come_first() {
    let base = file(Flavour::Aio, 512);
    let disk = error_disk(Arc::clone(&base.disk));
    let mut driver = driver(&disk);
    let error = InjectedError::Failure;
    let injection = Injection { op: InjectedOp::Read, error, count: 9, queue_depth: 2 };
    disk.inject(injection).unwrap();
    assert_eq!(driver.read(0, 512).1, Status::Ok);
    assert!(matches!(driver.submit(Tag(0), read_request(0)), Ok(None)));
    assert!(matches!(driver.submit(Tag(1), read_request(0)), Ok(None)));
    let third = driver.submit(Tag(2), read_request(0));
    assert!(matches!(third, Ok(Some((_, Status::IoError)))));
    let mut ended = 0;
    while ended < 2 {
        let done = driver.visit();
        assert!(done.iter().all(|(_, status)| *status == Status::Ok));
        ended += done.len();
    }
}

#[test]
fn a_throttled_io_does_not_use_up_an_injection() {
    let base = malloc(512);
    base.disk.qos().set_limits(RateLimits { rw_ios_per_sec: 20, ..RateLimits::default() });
    let disk = error_disk(Arc::clone(&base.disk));
    let mut driver = driver(&disk);
    driver.write(0, &[0; 512]);
    inject(&disk, InjectedOp::Read, InjectedError::CorruptData { offset: 0, value: 0x81 }, 1);
    assert_eq!(driver.read(0, 512).0[0], 0x81);
    assert_eq!(driver.read(0, 512).0[0], 0);
}
