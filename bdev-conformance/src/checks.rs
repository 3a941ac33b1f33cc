//! What is asked of every disk.
#![expect(missing_docs, reason = "each name is the sentence that the function checks")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Op, Status, Tag};

use crate::driver::{Driver, GUARD, Memory, Request};
use crate::fixture::{Fixture, SIZE};
use crate::random::pattern;

/// The longest time that a thread of the disk may hold it after its channels are dropped.
const LET_GO_MAX: Duration = Duration::from_secs(30);

fn block(fixture: &Fixture) -> usize {
    fixture.disk.block_size() as usize
}

/// Writes a pattern to the whole disk and returns it.
fn fill(fixture: &Fixture, driver: &mut Driver) -> Vec<u8> {
    let data = pattern(1, SIZE as usize);
    for (i, chunk) in data.chunks(256 << 10).enumerate() {
        assert_eq!(driver.write((i << 18) as u64, chunk), Status::Ok);
    }
    assert!(fixture.disk.size_bytes() == SIZE);
    data
}

/// Checks the whole disk, if it keeps anything.
fn expect(fixture: &Fixture, driver: &mut Driver, expected: &[u8]) {
    for (i, chunk) in expected.chunks(256 << 10).enumerate() {
        let (data, status) = driver.read((i << 18) as u64, chunk.len());
        assert_eq!(status, Status::Ok);
        assert!(!fixture.keeps || data == chunk, "differs near {}", i << 18);
    }
}

pub fn reads_back_what_was_written(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    expect(fixture, &mut driver, &vec![0; SIZE as usize]);
    let data = fill(fixture, &mut driver);
    expect(fixture, &mut driver, &data);
    let other = Driver::new(&fixture.disk, 1).read(0, block(fixture));
    assert!(!fixture.keeps || other.0 == data[..block(fixture)]);
}

pub fn segments_may_be_split_and_aligned_in_any_way(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    let mut expected = fill(fixture, &mut driver);
    let b = block(fixture);
    let splits: [Vec<usize>; 8] = [
        vec![b],
        vec![1, b - 1],
        vec![b - 3, 0, 2, 1],
        vec![b / 2, b / 2],
        vec![b, b, b],
        vec![b - 16, 16 + b, b],
        vec![1; b],
        vec![3 * b - 100, 100, 200 << 10],
    ];
    for (i, split) in splits.iter().enumerate() {
        for shift in [0, 1, 2, 4, 16, 256, 511, 512, 2048] {
            let len: usize = split.iter().sum();
            let offset = (i * 3 + shift % 7) * b;
            let data = pattern((i * 10_000 + shift) as u64, len);
            let mut memory = Memory::new(split, shift);
            memory.fill(&data);
            let (request, status) = driver.run(Request::rw(Op::Write, offset as u64, memory));
            assert_eq!(status, Status::Ok, "{split:?} at {shift}");
            assert_eq!(request.memory.data(), data, "a write changed its memory");
            expected[offset..offset + len].copy_from_slice(&data);
            let memory = Memory::new(split, shift);
            let (request, status) = driver.run(Request::rw(Op::Read, offset as u64, memory));
            assert_eq!(status, Status::Ok, "{split:?} at {shift}");
            let read = request.memory.data();
            assert!(!fixture.keeps || read == data, "{split:?} at {shift}");
        }
    }
    expect(fixture, &mut driver, &expected);
}

pub fn a_range_past_the_end_is_an_error(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    let b = block(fixture);
    let expected = fill(fixture, &mut driver);
    let last = SIZE - b as u64;
    for offset in [SIZE, last, SIZE * 2, u64::MAX - b as u64 + 1, u64::MAX - 511, 1 << 63] {
        let len = if offset == last { 2 * b } else { b };
        assert_eq!(driver.write(offset, &vec![9; len]), Status::IoError, "write at {offset}");
        let (read, status) = driver.read(offset, len);
        assert_eq!(status, Status::IoError, "read at {offset}");
        assert!(read.iter().all(|byte| *byte == GUARD), "a failed read wrote to memory");
        for op in [Op::Unmap, Op::WriteZeroes] {
            assert_ne!(driver.plain(op, offset, len as u64), Status::Ok, "{op:?} at {offset}");
        }
    }
    assert_ne!(driver.plain(Op::WriteZeroes, 0, SIZE + b as u64), Status::Ok);
    assert_eq!(driver.read(last, b).1, Status::Ok);
    assert_eq!(driver.write(last, &expected[last as usize..]), Status::Ok);
    expect(fixture, &mut driver, &expected);
}

pub fn an_empty_range_is_fine(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    for offset in [0, SIZE] {
        assert_eq!(driver.read(offset, 0).1, Status::Ok);
        assert_eq!(driver.write(offset, &[]), Status::Ok);
        assert_eq!(driver.plain(Op::WriteZeroes, offset, 0), Status::Ok);
    }
    assert_eq!(driver.read(SIZE + block(fixture) as u64, 0).1, Status::IoError);
}

pub fn flush_completes(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    driver.write(0, &pattern(3, block(fixture)));
    let expected = if fixture.disk.features().flush { Status::Ok } else { Status::Unsupported };
    assert_eq!(driver.plain(Op::Flush, 0, 0), expected);
}

pub fn unmap_leaves_a_readable_range_and_its_neighbours(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    let data = fill(fixture, &mut driver);
    let b = block(fixture) as u64;
    let (start, end) = (3 * b, SIZE - 5 * b);
    let status = driver.plain(Op::Unmap, start, end - start);
    if !fixture.disk.features().unmap {
        assert_eq!(status, Status::Unsupported);
        return expect(fixture, &mut driver, &data);
    }
    assert_eq!(status, Status::Ok);
    for at in (0..SIZE).step_by(64 << 10) {
        let (read, status) = driver.read(at, 64 << 10);
        assert_eq!(status, Status::Ok);
        for (i, byte) in (at..).zip(read) {
            let was = data[i as usize];
            let inside = (start..end).contains(&i);
            let may_change = inside && (byte == 0 || fixture.unmapped_is_noise);
            assert!(byte == was || may_change, "byte {i} is {byte}, was {was}");
        }
    }
}

pub fn write_zeroes_reads_as_zeroes_and_spares_the_neighbours(fixture: &Fixture) {
    assert!(fixture.disk.features().write_zeroes);
    let mut driver = Driver::new(&fixture.disk, 4);
    let mut expected = fill(fixture, &mut driver);
    let b = block(fixture) as u64;
    for (start, len) in [(b, b), (7 * b, 3 * b), (1 << 20, 2 << 20), (SIZE - b, b)] {
        assert_eq!(driver.plain(Op::WriteZeroes, start, len), Status::Ok);
        expected[start as usize..(start + len) as usize].fill(0);
        expect(fixture, &mut driver, &expected);
    }
    assert_eq!(driver.plain(Op::WriteZeroes, 0, SIZE), Status::Ok);
    expect(fixture, &mut driver, &vec![0; SIZE as usize]);
}

pub fn a_long_request_is_done_to_its_end(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    let data = pattern(8, SIZE as usize);
    assert_eq!(driver.write(0, &data), Status::Ok);
    let (read, status) = driver.read(0, SIZE as usize);
    assert_eq!(status, Status::Ok);
    assert!(!fixture.keeps || read == data);
    let mut memory = Memory::new(&[3 << 20, 1 << 20], 1);
    memory.fill(&data);
    assert_eq!(driver.run(Request::rw(Op::Write, 0, memory)).1, Status::Ok);
    expect(fixture, &mut driver, &data);
    let (request, status) =
        driver.run(Request::rw(Op::Read, 0, Memory::new(&[1 << 20, 3 << 20], 1)));
    assert_eq!(status, Status::Ok);
    assert!(!fixture.keeps || request.memory.data() == data);
}

/// Submits a mix under every tag before the first visit, then sees all of them end.
fn all_tags_at_once(fixture: &Fixture, depth: u16, batch: usize) {
    let mut driver = Driver::new(&fixture.disk, depth);
    driver.set_batch(batch);
    let b = block(fixture);
    for round in 0..4_u64 {
        let mut ended = 0;
        for i in 0..depth {
            let tag = Tag((depth - 1) - i);
            let offset = u64::from(i) * 2 * b as u64;
            let request = match (u64::from(i) + round) % 4 {
                0 => Request::rw(Op::Read, offset, Memory::new(&[1, b - 1], 3)),
                1 => Request::rw(Op::Write, offset, Memory::new(&[b], 1)),
                2 => Request::rw(Op::Write, offset, Memory::plain(b)),
                _ => Request::plain(Op::WriteZeroes, offset, b as u64),
            };
            let submitted = driver.submit(tag, request);
            let submitted = submitted.unwrap_or_else(|_| panic!("full below the depth"));
            if let Some((_, status)) = submitted {
                assert_eq!(status, Status::Ok);
                ended += 1;
            }
        }
        while driver.outstanding().next().is_some() {
            let done = driver.visit();
            assert!(done.len() <= batch);
            assert!(done.iter().all(|(_, status)| *status == Status::Ok));
            ended += done.len();
        }
        assert_eq!(ended, usize::from(depth));
        assert!(driver.visit().is_empty(), "reported more than there was");
    }
}

pub fn as_many_as_the_depth_are_taken_and_each_ends_once(fixture: &Fixture) {
    for depth in [1, 2, 3, 64, 100, 128] {
        all_tags_at_once(fixture, depth, usize::from(depth));
    }
}

pub fn completions_come_out_one_at_a_time_if_asked_so(fixture: &Fixture) {
    all_tags_at_once(fixture, 64, 1);
    let mut driver = Driver::new(&fixture.disk, 4);
    driver.set_batch(0);
    let request = Request::rw(Op::Read, 0, Memory::plain(block(fixture)));
    if driver.submit(Tag(0), request).ok().expect("room").is_none() {
        assert!(driver.visit().is_empty());
        driver.set_batch(1);
        while driver.visit().is_empty() {}
    }
}

pub fn a_channel_works_on_another_thread(fixture: &Fixture) {
    let mut driver = Driver::new(&fixture.disk, 4);
    let data = pattern(5, block(fixture));
    assert_eq!(driver.write(0, &data), Status::Ok);
    let mut channel = Arc::clone(&fixture.disk).open(2).unwrap();
    let keeps = fixture.keeps;
    let b = block(fixture);
    let data = thread::scope(|scope| {
        let there = scope.spawn(move || {
            // The channel was opened there and is used, and dropped, here.
            let mut done = [bdev::Completion { tag: Tag(7), status: Status::IoError }];
            assert_eq!(channel.poll(&mut done), 0);
            drop(channel);
            let (read, status) = driver.read(0, b);
            assert_eq!(status, Status::Ok);
            assert!(!keeps || read == data);
            data
        });
        there.join().unwrap()
    });
    let read = Driver::new(&fixture.disk, 1).read(0, b).0;
    assert!(!fixture.keeps || read == data);
}

pub fn two_channels_see_each_other_s_writes(fixture: &Fixture) {
    let mut drivers = [Driver::new(&fixture.disk, 2), Driver::new(&fixture.disk, 2)];
    let b = block(fixture);
    for round in 0..50 {
        let data = pattern(round, 2 * b);
        // Every third one is not aligned, and so takes the slow way of a file.
        let mut memory = Memory::new(&[2 * b], if round % 3 == 0 { 1 } else { 0 });
        memory.fill(&data);
        let offset = round % 5 * b as u64;
        let write = Request::rw(Op::Write, offset, memory);
        assert_eq!(drivers[round as usize % 2].run(write).1, Status::Ok);
        let (read, status) = drivers[1 - round as usize % 2].read(offset, 2 * b);
        assert_eq!(status, Status::Ok);
        assert!(!fixture.keeps || read == data, "round {round}");
    }
}

pub fn a_dropped_channel_lets_go_of_the_disk(fixture: &Fixture) {
    let before = Arc::strong_count(&fixture.disk);
    let mut drivers: Vec<_> = (0..8).map(|_| Driver::new(&fixture.disk, 16)).collect();
    assert!(drivers.iter_mut().all(|d| d.read(0, block(fixture)).1 == Status::Ok));
    // The rate limits in front of each channel hold the disk; the module's channel may hold it,
    // too.
    assert!(Arc::strong_count(&fixture.disk) >= before + 8);
    drop(drivers);
    // A thread of the disk may drop the last reference.
    let start = Instant::now();
    while Arc::strong_count(&fixture.disk) > before && start.elapsed() < LET_GO_MAX {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(Arc::strong_count(&fixture.disk), before);
}
