//! Fixtures of the tests of both layouts, and tests of areas.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small areas, and random numbers")]

use super::*;
use guest_memory::testing::memfd;

/// Pseudo-random numbers, the same for the same seed.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// A new area, mapped as for a front end.
pub(super) fn area(num_queues: u16, queue_size: u16, packed: bool) -> Arc<Area> {
    let (spec, fd) = Area::create(num_queues, queue_size, packed).unwrap();
    let unmapper = Unmapper::start().unwrap();
    Arc::new(Area::map(spec, &ForeignFd::alone(fd), &unmapper).unwrap())
}

/// Sets each word of the area to the value that `next` returns for it.
pub(super) fn fill(area: &Area, mut next: impl FnMut(usize) -> u64) {
    for word in 0..area.file.size_bytes() as usize / 8 {
        // SAFETY: a word of the mapping. It is aligned, and only this thread uses it.
        unsafe { area.file.host().cast::<u64>().wrapping_add(word).write_volatile(next(word)) };
    }
}

/// Fills the area with random bytes, or with random contents that look plausible.
pub(super) fn corrupt_area(area: &Area, packed: bool, rng: &mut Rng) {
    let kind = rng.below(4);
    let part = region_bytes(area.queue_size(), packed) as usize / 8;
    let small = u64::from(area.queue_size()) + 1;
    fill(area, |word| {
        let random = rng.next();
        let [a, b, c, d] = [0, 16, 32, 48].map(|shift| (random >> shift) % small);
        let halves = |a| a | (b << 16) | (c << 32) | (d << 48);
        match kind {
            0 => random,
            1 if word % part == 1 => (random & !0xffff) | 1,
            1 => random,
            _ if word % part == 1 => halves(1),
            _ => halves(a % (1 << kind)),
        }
    });
}

/// A guest with its ring, which outlives the processes that serve it.
pub(super) trait World {
    type Process;
    /// Starts a process, and checks what it has recovered.
    fn begin(&mut self) -> Self::Process;
    /// Does some work, like a reactor's visit.
    fn visit(&mut self, process: &mut Self::Process, rng: &mut Rng);
    /// The guest takes completed requests, and makes more available.
    fn drive(&mut self, rng: &mut Rng);
    /// Returns whether all requests have completed, each once.
    fn finished(&self) -> bool;
}

/// Lets processes serve `world`. The first is killed at store `kills[0]`, the next at its own store
/// `kills[1]`, and so on. The last one completes all requests. Returns the number of its stores.
pub(super) fn serve<W: World>(mut world: W, rng: &mut Rng, kills: &[u64]) -> u64 {
    for &at in kills.iter().chain(&[u64::MAX]) {
        let before = crash::stores();
        let end = crash::killed_at(at, || {
            let mut process = world.begin();
            while !world.finished() {
                world.drive(rng);
                world.visit(&mut process, rng);
            }
        });
        if end.is_some() {
            return crash::stores() - before;
        }
        for _ in 0..rng.below(4) {
            world.drive(rng);
        }
    }
    unreachable!("the last process is not killed")
}

/// Kills a process at each of its stores, and its successors at one of their first stores.
pub(super) fn kill_everywhere<W: World>(world: impl Fn(&mut Rng) -> W) {
    let run = |seed, kills: &[u64]| {
        let mut rng = Rng::new(seed);
        serve(world(&mut rng), &mut rng, kills)
    };
    for seed in 0..4 {
        let mut early = Rng::new(!seed);
        for at in 0..run(seed, &[]) {
            run(seed, &[at]);
            let again = [(); 3].map(|()| early.below(40) as u64);
            run(seed, &[at, again[0], again[1], again[2]]);
        }
    }
}

#[test]
fn the_size_of_an_area_is_limited() {
    for (queues, size) in [(0, 1), (1, 0), (129, 1), (1, 32769), (128, 32768)] {
        for packed in [false, true] {
            assert!(matches!(Area::create(queues, size, packed), Err(Error::Count(..))));
        }
    }
    assert!(Area::create(128, 4096, false).is_ok());
    assert!(Area::create(1, 32768, true).is_ok());
    assert!(Area::create(1, 1, true).is_ok());
}

#[test]
fn an_area_cannot_be_truncated_and_must_be_long_enough() {
    let unmapper = Unmapper::start().unwrap();
    let (spec, fd) = Area::create(3, 7, false).unwrap();
    assert_eq!(spec.mmap_size, 3 * 128);
    let file = File::from(fd);
    assert!(file.set_len(8).is_err());
    let map = |spec, fd: OwnedFd| Area::map(spec, &ForeignFd::alone(fd), &unmapper);
    let again = || OwnedFd::from(file.try_clone().unwrap());
    assert!(map(spec, again()).is_ok());
    let short = AreaSpec { mmap_size: 3 * 128 - 1, ..spec };
    assert!(matches!(map(short, again()), Err(Error::Short { have: 383, want: 384 })));
    let beyond = AreaSpec { mmap_offset: 64, ..spec };
    assert!(matches!(map(beyond, again()), Err(Error::File(_))));
    let odd = AreaSpec { mmap_offset: 8, ..spec };
    assert!(matches!(map(odd, memfd(4096)), Err(Error::Alignment(8))));
    let many = AreaSpec { num_queues: 129, ..spec };
    assert!(matches!(map(many, memfd(1 << 20)), Err(Error::Count(129, 7))));
    assert!(map(AreaSpec { mmap_offset: 3 * 64, ..spec }, memfd(4096)).is_ok());
}

#[test]
fn a_queue_without_room_is_not_tracked() {
    let split = area(2, 8, false);
    assert!(Tracker::split(&split, 1, 8, 0).is_some());
    assert!(Tracker::split(&split, 2, 8, 0).is_none());
    assert!(Tracker::split(&split, 0, 9, 0).is_none());
    assert!(Tracker::split(&split, 0, 0, 0).is_none());
    assert!(Tracker::packed(&split, 0, 8, 0, |_| 0).is_none());
    let packed = area(2, 8, true);
    assert!(Tracker::packed(&packed, 1, 8, 8, |_| 0).is_none());
    assert!(Tracker::packed(&packed, 1, 8, 7, |_| 0).is_some());
}

#[test]
fn an_area_takes_no_memory_before_it_is_used() {
    use std::os::unix::fs::MetadataExt;
    for packed in [false, true] {
        let (spec, fd) = Area::create(16, 32768, packed).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        let unmapper = Unmapper::start().unwrap();
        let area = Arc::new(Area::map(spec, &ForeignFd::alone(fd), &unmapper).unwrap());
        let stat = file.metadata().unwrap();
        assert_eq!((stat.len(), stat.blocks(), area.was_used()), (spec.mmap_size, 0, false));
        let tracker = match packed {
            false => Tracker::split(&area, 0, 8, 0),
            true => Tracker::packed(&area, 0, 8, 0, |_| 0),
        };
        assert!(tracker.is_some() && area.was_used());
        assert!(file.metadata().unwrap().blocks() > 0);
    }
}
