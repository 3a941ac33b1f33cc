//! What is particular to the engines of file disks.
#![expect(unsafe_code, reason = "submits I/Os")]

use std::sync::Arc;

use bdev::{
    Bdev, Channel, Completion, Engine, FileDisk, FileOptions, Flavour, Io, Op, Segment, Status,
    Submit, Tag, Wait,
};
use bdev_conformance::SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

use crate::disks::{file_options, make_file};

fn dynamic(disk: &Arc<FileDisk>) -> Arc<dyn Bdev> {
    Arc::clone(disk) as Arc<dyn Bdev>
}

/// Whether one of the channel's fds becomes readable, without waiting.
fn is_woken(channel: &dyn Channel) -> bool {
    let fds = channel.wake_fds();
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

/// Does one I/O to its end, asking `wait` before each poll that found nothing.
fn finish(channel: &mut dyn Channel, io: Io, mut wait: impl FnMut(Wait)) -> Status {
    // SAFETY: the caller keeps the memory until this has returned.
    assert!(matches!(unsafe { channel.submit(io) }, Submit::Queued));
    channel.kick();
    let mut done = [Completion { tag: Tag(99), status: Status::Unsupported }];
    loop {
        wait(channel.wait());
        if channel.poll(&mut done) == 1 {
            assert_eq!(done[0].tag, io.tag);
            return done[0].status;
        }
    }
}

#[test]
fn linux_aio_signals_only_owners_that_may_sleep() {
    let dir = TempDir::new().unwrap();
    let options = file_options(make_file(&dir, SIZE), Flavour::Aio, 4096);
    let disk = FileDisk::create(FileOptions { engine: Some(Engine::Aio), ..options }).unwrap();
    if disk.service().engine != Engine::Aio {
        return test_report::skipped("direct-aio", "no Linux AIO without waiting on /tmp");
    }
    let mut channel = dynamic(&disk).open(2).unwrap();
    let mut memory = vec![0_u8; 2 * 4096];
    let at = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(4096));
    let segments = [Segment::new(at, 4096)];
    let read = Io::rw(Op::Read, Tag(1), 0, 4096, &segments);
    channel.set_wakes(false);
    let status = finish(&mut *channel, read, |wait| assert_eq!(wait, Wait::Poll));
    assert_eq!(status, Status::Ok);
    assert!(!is_woken(&*channel), "nobody would have slept");
    channel.set_wakes(true);
    let status = finish(&mut *channel, read, |wait| assert_eq!(wait, Wait::Event));
    assert_eq!(status, Status::Ok);
    assert!(is_woken(&*channel));
}

/// A write to a regular file waits in `io_submit` while its file system is frozen.
#[test]
fn linux_aio_is_for_what_it_does_not_wait_for() {
    let dir = TempDir::new().unwrap();
    let options = file_options(make_file(&dir, SIZE), Flavour::Aio, 4096);
    let engine = |readonly, engine| {
        let options = FileOptions { readonly, engine, ..options.clone() };
        FileDisk::create(options).unwrap().service().engine
    };
    for alone in [Engine::Aio, Engine::IoUring] {
        if engine(false, Some(alone)) != alone {
            return test_report::skipped("direct-aio", "no direct I/O without waiting on /tmp");
        }
    }
    assert_eq!(engine(false, None), Engine::IoUring);
    assert_eq!(engine(true, None), Engine::Aio);
}

#[test]
fn what_the_kernel_does_not_take_fails_alone() {
    let dir = TempDir::new().unwrap();
    let options = file_options(make_file(&dir, SIZE), Flavour::Aio, 4096);
    for engine in [Engine::Aio, Engine::IoUring, Engine::Threads] {
        let options = FileOptions { engine: Some(engine), ..options.clone() };
        let mut channel = dynamic(&FileDisk::create(options).unwrap()).open(4).unwrap();
        let mut memory = vec![0_u8; 2 * 4096];
        let at = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(4096));
        let (good, bad) = ([Segment::new(at, 4096)], [Segment::new((1_usize << 63) as _, 4096)]);
        for (tag, segments) in [(0, &bad), (1, &good), (2, &bad), (3, &good)] {
            let read = Io::rw(Op::Read, Tag(tag), 0, 4096, segments);
            // SAFETY: the good memory outlives the reads, and the kernel refuses the bad one.
            assert!(matches!(unsafe { channel.submit(read) }, Submit::Queued));
        }
        let mut ended = [None; 4];
        let mut done = [Completion { tag: Tag(99), status: Status::Unsupported }; 4];
        while ended.iter().any(Option::is_none) {
            channel.kick();
            let n = channel.poll(&mut done);
            for Completion { tag, status } in &done[..n] {
                assert_eq!(ended[usize::from(tag.0)].replace(*status), None, "reported once");
            }
        }
        let want = [Status::IoError, Status::Ok, Status::IoError, Status::Ok].map(Some);
        assert_eq!(ended, want, "{engine:?}");
        assert_eq!(channel.failure(Tag(2)).unwrap().errno, libc::EFAULT);
    }
}

#[test]
fn adjacent_segments_are_read_and_written_as_others() {
    let dir = TempDir::new().unwrap();
    let options = file_options(make_file(&dir, SIZE), Flavour::Aio, 4096);
    for engine in [Engine::Aio, Engine::IoUring, Engine::Threads] {
        let options = FileOptions { engine: Some(engine), ..options.clone() };
        let mut channel = dynamic(&FileDisk::create(options).unwrap()).open(1).unwrap();
        // Pages 0 and 1 are adjacent, 3 is not, and 5 and 4 are in the wrong order.
        let mut pages = vec![[0_u8; 4096]; 8];
        let shift = pages.as_ptr().cast::<u8>().align_offset(4096);
        let base = pages.as_mut_ptr().cast::<u8>().wrapping_add(shift);
        let page = |n: usize| Segment::new(base.wrapping_add(n * 4096), 4096);
        for order in [[0, 1, 2], [0, 1, 3], [2, 5, 4]] {
            let segments = order.map(page);
            let fill = |byte: u8| {
                for (n, segment) in (0..).zip(&segments) {
                    // SAFETY: a page of `pages`, of which nobody has a reference.
                    unsafe { segment.base().write_bytes(byte + n, 4096) };
                }
            };
            fill(1);
            let write = Io::rw(Op::Write, Tag(0), 8192, 3 * 4096, &segments);
            assert_eq!(finish(&mut *channel, write, |_| ()), Status::Ok);
            fill(9);
            let read = Io::rw(Op::Read, Tag(0), 8192, 3 * 4096, &segments);
            assert_eq!(finish(&mut *channel, read, |_| ()), Status::Ok);
            for (n, segment) in (1..).zip(&segments) {
                // SAFETY: as above.
                let bytes = unsafe { std::slice::from_raw_parts(segment.base(), 4096) };
                assert!(bytes.iter().all(|byte| *byte == n), "{engine:?} {order:?}");
            }
        }
    }
}
