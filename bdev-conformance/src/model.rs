//! Random I/Os, many outstanding, against a model in a `Vec`.

use bdev::{Op, Status};

use crate::driver::{Driver, GUARD, Memory, Request};
use crate::fixture::{Fixture, SIZE};
use crate::random::{Random, pattern};

/// Each runs on a fresh disk. A failure names its seed.
const SEEDS: [u64; 6] = [1, 2, 3, 5, 8, 0x5eed_5eed];

/// I/Os per seed.
const STEPS: usize = 400;

/// Does random I/Os on a fresh disk for each seed, and compares what is read with the model. Does
/// nothing if there is no disk.
pub fn matches_a_model(make: impl Fn() -> Option<Fixture>) {
    for seed in SEEDS {
        let Some(fixture) = make() else { return };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mix(&fixture, seed)));
        if let Err(panic) = result {
            eprintln!("failed with seed {seed:#x}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// What a disk should hold. `None`: it was unmapped, and reads as it likes.
struct Model {
    bytes: Vec<Option<u8>>,
    keeps: bool,
}

impl Model {
    fn check(&mut self, (request, status): (Request, Status)) {
        let Request { op, offset, len, memory, .. } = request;
        assert_eq!(status, Status::Ok, "{op:?} of {len} at {offset}");
        let range = &mut self.bytes[offset as usize..(offset + len) as usize];
        match op {
            Op::Read if !self.keeps => {
                assert!(memory.data().iter().all(|b| *b == GUARD), "a null disk wrote to memory");
            }
            Op::Read => {
                for (i, (byte, expected)) in memory.data().iter().zip(range).enumerate() {
                    let same = expected.is_none_or(|e| e == *byte);
                    assert!(same, "byte {i} of a read of {len} at {offset}: {expected:?} {byte}");
                }
            }
            Op::Write => {
                range.iter_mut().zip(memory.data()).for_each(|(m, b)| *m = Some(b));
            }
            Op::WriteZeroes => range.fill(Some(0)),
            Op::Unmap => range.fill(None),
            Op::Flush => {}
        }
    }
}

fn mix(fixture: &Fixture, seed: u64) {
    let mut random = Random::new(seed);
    let depth = random.pick(&[1, 4, 31, 64]);
    let mut driver = Driver::new(&fixture.disk, depth);
    driver.set_batch(random.pick(&[1, 3, 64]));
    let mut model = Model { bytes: vec![Some(0); SIZE as usize], keeps: fixture.keeps };
    let mut salt = seed;
    for _ in 0..STEPS {
        if random.below(3) == 0 {
            driver.visit().into_iter().for_each(|ended| model.check(ended));
        }
        let Some(tag) = driver.free_tag() else { continue };
        let request = request(fixture, &mut random, &mut salt);
        // Overlapping requests that are outstanding together have no order.
        let (start, end) = (request.offset, request.offset + request.len);
        if driver.outstanding().any(|o| start < o.offset + o.len && o.offset < end) {
            continue;
        }
        if let Ok(Some(ended)) = driver.submit(tag, request) {
            model.check(ended);
        }
    }
    while driver.outstanding().next().is_some() {
        driver.visit().into_iter().for_each(|ended| model.check(ended));
    }
    for offset in (0..SIZE).step_by(1 << 20) {
        let read = Request::rw(Op::Read, offset, Memory::plain(1 << 20));
        let ended = driver.run(read);
        model.check(ended);
    }
}

fn request(fixture: &Fixture, random: &mut Random, salt: &mut u64) -> Request {
    let features = fixture.disk.features();
    let block = u64::from(fixture.disk.block_size());
    let blocks = SIZE / block;
    let longest = random.pick(&[1, 8, 64, blocks / 2]);
    let count = 1 + random.below(longest);
    let offset = random.below(blocks - count + 1) * block;
    let len = count * block;
    match random.below(12) {
        0 if features.unmap => return Request::plain(Op::Unmap, offset, len),
        1 => return Request::plain(Op::WriteZeroes, offset, len),
        2 if features.flush => return Request::plain(Op::Flush, 0, 0),
        _ => {}
    }
    let whole = random.below(2) == 0;
    let split = if whole { vec![len as usize] } else { random.split(len as usize) };
    let shift = random.pick(&[0, 0, 0, 512, 4, 1, 77]);
    let mut memory = Memory::new(&split, shift);
    if random.below(2) == 0 {
        return Request::rw(Op::Read, offset, memory);
    }
    *salt += 1;
    memory.fill(&pattern(*salt, len as usize));
    Request::rw(Op::Write, offset, memory)
}
