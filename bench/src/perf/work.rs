//! Which block comes next, and in which direction.

use crate::error::Result;
use crate::perf::plan::Order;

/// Sectors of the disk, which requests count in.
pub(crate) const SECTOR: u32 = 512;

/// The blocks that one queue works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// Number of the first block, counted from the disk's offset 0.
    pub(crate) first: u64,
    /// How many.
    pub(crate) count: u64,
    /// Bytes in each.
    pub(crate) block_bytes: u32,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) sector: u64,
    pub(crate) write: bool,
}

/// Decides what each request does, and looks at what came of it.
pub(crate) trait Work {
    /// What the request in `slot` is to do. For a write, the slot's buffer holds the data after.
    ///
    /// # Errors
    /// The buffer is not in guest memory.
    fn next(&mut self, slot: usize) -> Result<Io>;

    /// The request in `slot` has completed, well or not. Returns what is wrong with the data.
    ///
    /// # Errors
    /// The buffer is not in guest memory.
    fn done(&mut self, slot: usize, ok: bool) -> Result<Option<String>>;
}

/// A generator whose high bits are good and cheap: Knuth's 64-bit linear congruential one.
#[derive(Clone, Copy, Debug)]
struct Random(u64);

impl Random {
    /// A number below `count`, and what is left of the randomness.
    #[inline]
    fn below(&mut self, count: u64) -> (u64, u64) {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let wide = u128::from(self.0) * u128::from(count);
        ((wide >> 64) as u64, wide as u64)
    }
}

/// Chooses blocks and directions, and does not care what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Chooser {
    area: Area,
    sectors: u64,
    order: Order,
    at: u64,
    random: Random,
    /// Of 2^64 random numbers, this many and one more mean a read.
    reads: Option<u64>,
}

impl Chooser {
    /// Chooses in `area`; `reads` of a hundred requests are reads.
    pub(crate) fn new(area: Area, order: Order, reads: u8, seed: u64) -> Self {
        let reads = (reads > 0).then(|| (u128::from(reads) * (1 << 64) / 100 - 1) as u64);
        // Seeds that differ little should not make sequences that do.
        let mixed = (seed ^ area.first).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let random = Random(mixed ^ mixed >> 32);
        let sectors = u64::from(area.block_bytes / SECTOR);
        Self { area, sectors, order, at: 0, random, reads }
    }

    /// The blocks that it chooses from.
    pub(crate) fn area(&self) -> Area {
        self.area
    }

    /// The next block, counted from the area's first one, and whether to write it.
    #[inline]
    pub(crate) fn choose(&mut self) -> (u64, bool) {
        let (block, rest) = match self.order {
            Order::Random => self.random.below(self.area.count),
            Order::Sequential => {
                let block = self.at;
                self.at = if block + 1 == self.area.count { 0 } else { block + 1 };
                (block, self.random.below(1).1)
            }
        };
        (block, self.reads.is_none_or(|reads| rest > reads))
    }

    /// The first sector of `block`.
    #[inline]
    pub(crate) fn sector(&self, block: u64) -> u64 {
        (self.area.first + block) * self.sectors
    }
}

impl Work for Chooser {
    #[inline]
    fn next(&mut self, _slot: usize) -> Result<Io> {
        let (block, write) = self.choose();
        Ok(Io { sector: self.sector(block), write })
    }

    #[inline]
    fn done(&mut self, _slot: usize, _ok: bool) -> Result<Option<String>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Area = Area { first: 100, count: 10, block_bytes: 2048 };

    fn next(chooser: &mut Chooser) -> Io {
        chooser.next(0).unwrap()
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
            assert!(!io.write && io.sector % 4 == 0);
            seen[(io.sector / 4 - 100) as usize] += 1;
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
