//! The choice of the next request's block and direction.

use crate::error::Result;
use crate::perf::plan::Order;

/// Bytes of a sector, the unit of offsets in requests.
pub(crate) const SECTOR: u32 = 512;

/// The blocks that one queue uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// Number of the first block, counted from the disk's offset 0.
    pub(crate) first: u64,
    /// Number of blocks.
    pub(crate) count: u64,
    /// Bytes of a block.
    pub(crate) block_bytes: u32,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) sector: u64,
    pub(crate) write: bool,
}

/// Chooses requests, and checks their results.
pub(crate) trait Work {
    /// Whether [`done`](Self::done) checks anything. If not, it need not be called.
    const CHECKS: bool;

    /// Chooses a request for each of `slots`, and calls `put` with it. For a write, it fills the
    /// slot's buffer before.
    ///
    /// # Errors
    /// The buffer is not in guest memory.
    fn next(&mut self, slots: &[u16], put: impl FnMut(usize, Io)) -> Result<()>;

    /// Checks the request in `slot`, which has completed; `ok` is whether it succeeded. Returns a
    /// text if the data is wrong.
    ///
    /// # Errors
    /// The buffer is not in guest memory.
    fn done(&mut self, slot: usize, ok: bool) -> Result<Option<String>>;
}

/// Knuth's 64-bit linear congruential generator. It is fast, and its high bits are good.
#[derive(Clone, Copy, Debug)]
struct Random(u64);

impl Random {
    /// A number below `count`, and a random number from the remaining bits.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "splits the product in two words")]
    fn below(&mut self, count: u64) -> (u64, u64) {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let wide = u128::from(self.0) * u128::from(count);
        ((wide >> 64) as u64, wide as u64)
    }
}

/// Chooses blocks and directions without checking contents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chooser {
    area: Area,
    sectors: u64,
    order: Order,
    at: u64,
    random: Random,
    mixed: bool,
    /// If mixed, a random number below this one means a read. Otherwise, 0 means writes only.
    reads: u64,
}

impl Chooser {
    /// Chooses in `area`, with a percentage of `reads`.
    pub(crate) fn new(area: Area, order: Order, reads: u8, seed: u64) -> Self {
        let mixed = !matches!(reads, 0 | 100);
        let reads = u64::try_from(u128::from(reads) * (1 << 64) / 100).unwrap_or(u64::MAX);
        // Mixes the seed, so that similar seeds give different sequences.
        let start = (seed ^ area.first).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let random = Random(start ^ start >> 32);
        let sectors = u64::from(area.block_bytes / SECTOR);
        Self { area, sectors, order, at: 0, random, mixed, reads }
    }

    /// The blocks that it chooses from.
    pub(crate) fn area(&self) -> Area {
        self.area
    }

    /// Chooses a block, counted from the area's first block, and whether to write it.
    pub(crate) fn choose(&mut self) -> (u64, bool) {
        match (self.order, self.mixed) {
            (Order::Random, false) => self.choose_as::<true, false>(),
            (Order::Random, true) => self.choose_as::<true, true>(),
            (Order::Sequential, false) => self.choose_as::<false, false>(),
            (Order::Sequential, true) => self.choose_as::<false, true>(),
        }
    }

    #[inline]
    fn choose_as<const RANDOM: bool, const MIXED: bool>(&mut self) -> (u64, bool) {
        let (block, rest) = if RANDOM {
            self.random.below(self.area.count)
        } else {
            let block = self.at;
            self.at = if block + 1 == self.area.count { 0 } else { block + 1 };
            (block, if MIXED { self.random.below(1).1 } else { 0 })
        };
        (block, if MIXED { rest >= self.reads } else { self.reads == 0 })
    }

    /// As [`Work::next`]. A copy of the state lets the compiler keep it in registers.
    #[inline]
    fn next_as<const RANDOM: bool, const MIXED: bool>(
        &mut self,
        slots: &[u16],
        mut put: impl FnMut(usize, Io),
    ) {
        let mut chooser = *self;
        for slot in slots {
            let (block, write) = chooser.choose_as::<RANDOM, MIXED>();
            put((*slot).into(), Io { sector: chooser.sector(block), write });
        }
        *self = chooser;
    }

    /// The first sector of `block`.
    #[inline]
    pub(crate) fn sector(&self, block: u64) -> u64 {
        (self.area.first + block) * self.sectors
    }
}

impl Work for Chooser {
    const CHECKS: bool = false;

    #[inline]
    fn next(&mut self, slots: &[u16], put: impl FnMut(usize, Io)) -> Result<()> {
        match (self.order, self.mixed) {
            (Order::Random, false) => self.next_as::<true, false>(slots, put),
            (Order::Random, true) => self.next_as::<true, true>(slots, put),
            (Order::Sequential, false) => self.next_as::<false, false>(slots, put),
            (Order::Sequential, true) => self.next_as::<false, true>(slots, put),
        }
        Ok(())
    }

    fn done(&mut self, _slot: usize, _ok: bool) -> Result<Option<String>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Area = Area { first: 100, count: 10, block_bytes: 2048 };

    fn next(chooser: &mut Chooser) -> Io {
        let mut next = None;
        chooser.next(&[0], |_, io| next = Some(io)).unwrap();
        next.unwrap()
    }

    #[test]
    fn choosing_for_many_slots_equals_choosing_one_by_one() {
        for (order, reads) in [(Order::Random, 100), (Order::Random, 50), (Order::Sequential, 50)] {
            let mut one = Chooser::new(AREA, order, reads, 1);
            let mut many = one;
            let mut chosen = Vec::new();
            for slots in [&[3, 1, 2][..], &[0], &[2, 3]] {
                many.next(slots, |slot, io| chosen.push((slot, io))).unwrap();
            }
            let expected: Vec<_> = [3, 1, 2, 0, 2, 3].map(|slot| (slot, next(&mut one))).into();
            assert_eq!(chosen, expected);
            assert_eq!(next(&mut one), next(&mut many));
        }
    }

    #[test]
    fn sequential_blocks_follow_and_begin_again() {
        let mut chooser = Chooser::new(AREA, Order::Sequential, 100, 1);
        let sectors: Vec<_> = (0..12).map(|_| next(&mut chooser).sector).collect();
        let expected: Vec<_> = (100..110).chain(100..102).map(|block| 4 * block).collect();
        assert_eq!(sectors, expected);
    }

    #[test]
    fn random_blocks_are_even_and_inside() {
        let mut chooser = Chooser::new(AREA, Order::Random, 100, 1);
        let mut seen = [0; 10];
        for _ in 0..100_000 {
            let io = next(&mut chooser);
            assert!(!io.write && io.sector.is_multiple_of(4));
            seen[usize::try_from(io.sector / 4 - 100).unwrap()] += 1;
        }
        assert!(seen.iter().all(|n| (9_500..10_500).contains(n)), "{seen:?}");
    }

    #[test]
    fn the_mix_is_what_was_asked_for() {
        for order in [Order::Random, Order::Sequential] {
            for (reads, least, most) in [(0, 0, 0), (30, 29_000, 31_000), (100, 100_000, 100_000)] {
                let mut chooser = Chooser::new(AREA, order, reads, 7);
                let n = (0..100_000).filter(|_| !next(&mut chooser).write).count();
                assert!((least..=most).contains(&n), "{order:?}, {reads} %: {n}");
            }
        }
    }

    #[test]
    fn seeds_differ() {
        let blocks = |seed| {
            let mut chooser = Chooser::new(AREA, Order::Random, 100, seed);
            (0..32).map(|_| next(&mut chooser).sector).collect::<Vec<_>>()
        };
        assert_eq!(blocks(1), blocks(1));
        assert_ne!(blocks(1), blocks(2));
    }
}
