//! Verification: data that contains the block's number and version, and its comparison.

use std::sync::Arc;

use front_end::{GuestRam, Segment};

use crate::error::Result;
use crate::perf::plan::Order;
use crate::perf::work::{Chooser, Io, Work};

/// The first word of every block.
const MAGIC: u64 = 0x6676_7265_6b6c_6276;

/// Chooses as its [`Chooser`], except that it skips blocks in flight, and writes blocks with
/// unknown contents instead of reading them.
///
/// In a run that only reads, an earlier run must have written the blocks. Then a block's contents
/// must agree with the number and version in it.
pub(crate) struct Verified {
    chooser: Chooser,
    ram: Arc<GuestRam>,
    seed: u64,
    writes: bool,
    buffers: Vec<Segment>,
    /// The version of each block: how often it was written. 0 if its contents are unknown.
    versions: Vec<u32>,
    /// Whether each block is in flight.
    busy: Vec<bool>,
    /// The block and the direction of each slot's request.
    slots: Vec<(usize, bool)>,
    bytes: Vec<u8>,
}

impl Verified {
    /// Verifies the requests that `chooser` chooses. `buffers` has one buffer for each slot.
    /// `writes` is whether the load has writes.
    pub(crate) fn new(
        chooser: Chooser,
        ram: Arc<GuestRam>,
        buffers: Vec<Segment>,
        seed: u64,
        writes: bool,
    ) -> Self {
        let area = chooser.area();
        let blocks = index(area.count);
        assert!(blocks > buffers.len(), "a block is in flight at most once");
        Self {
            chooser,
            ram,
            seed,
            writes,
            versions: vec![0; blocks],
            busy: vec![false; blocks],
            slots: vec![(0, false); buffers.len()],
            bytes: vec![0; area.block_bytes as usize],
            buffers,
        }
    }

    /// Reads the blocks sequentially from now on, and writes those that were never written.
    pub(crate) fn read_through(&mut self) {
        self.chooser = Chooser::new(self.chooser.area(), Order::Sequential, 100, self.seed);
    }

    /// The number of `block` on the disk.
    fn number(&self, block: usize) -> u64 {
        self.chooser.area().first + block as u64
    }

    /// Chooses the request in `slot`.
    fn choose_for(&mut self, slot: usize) -> Result<Io> {
        let (block, write) = self.chooser.choose();
        let mut block = index(block);
        // The order of overlapping requests in flight is undefined.
        while self.busy[block] {
            block = (block + 1) % self.busy.len();
        }
        let write = write || self.writes && self.versions[block] == 0;
        if write {
            self.versions[block] = self.versions[block].wrapping_add(1).max(1);
            let (number, version) = (self.number(block), u64::from(self.versions[block]));
            fill(&mut self.bytes, self.seed, number, version);
            self.ram.write(self.buffers[slot].gpa, &self.bytes)?;
        }
        self.busy[block] = true;
        self.slots[slot] = (block, write);
        Ok(Io { sector: self.chooser.sector(block as u64), write })
    }

    /// Compares `bytes` with the contents of `block`. Returns a text if they differ.
    fn compare(&self, block: usize) -> Option<String> {
        let number = self.number(block);
        let at = number * u64::from(self.chooser.area().block_bytes);
        let place = || format!("block {number} (offset {at})");
        let bytes = &self.bytes;
        let known = self.versions[block];
        let [magic, found_block, found_version] = [0, 8, 16].map(|from| word(bytes, from));
        if magic != MAGIC {
            return Some(format!("{} does not contain the pattern", place()));
        }
        if found_block != number || known != 0 && found_version != u64::from(known) {
            let version = if known == 0 { String::new() } else { format!(" version {known}") };
            return Some(format!(
                "{}: expected block {number}{version}, found block {found_block} version \
                 {found_version}",
                place()
            ));
        }
        let expected = pattern(self.seed, number, found_version);
        let mut words = bytes.as_chunks().0.iter().zip(expected);
        let wrong = words.position(|(word, expected)| u64::from_le_bytes(*word) != expected)?;
        let wrong = 8 * wrong;
        Some(format!(
            "{} version {found_version} has wrong data in the 8 bytes at {wrong}",
            place()
        ))
    }
}

impl Work for Verified {
    const CHECKS: bool = true;

    fn next(&mut self, slots: &[u16], mut put: impl FnMut(usize, Io)) -> Result<()> {
        for slot in slots.iter().map(|slot| usize::from(*slot)) {
            put(slot, self.choose_for(slot)?);
        }
        Ok(())
    }

    fn done(&mut self, slot: usize, ok: bool) -> Result<Option<String>> {
        let (block, write) = self.slots[slot];
        self.busy[block] = false;
        if write && !ok {
            // The block may contain the old data, the new data, or a mixture.
            self.versions[block] = 0;
        }
        if write || !ok {
            return Ok(None);
        }
        self.ram.read(self.buffers[slot].gpa, &mut self.bytes)?;
        Ok(self.compare(block))
    }
}

/// The contents of a block: a magic number, the block's number and version, and pseudo-random words
/// that depend on these and the seed.
fn pattern(seed: u64, block: u64, version: u64) -> impl Iterator<Item = u64> {
    let mut random = seed ^ block.rotate_left(32) ^ version;
    let words = std::iter::repeat_with(move || {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (random ^ random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    });
    [MAGIC, block, version].into_iter().chain(words)
}

/// Fills `bytes`, whose length is a multiple of eight, with the pattern.
pub(crate) fn fill(bytes: &mut [u8], seed: u64, block: u64, version: u64) {
    for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(pattern(seed, block, version)) {
        *to = word.to_le_bytes();
    }
}

/// A block's index in a table. The table has an entry for each block, so the number fits.
fn index(block: u64) -> usize {
    usize::try_from(block).expect("a block of the area")
}

fn word(bytes: &[u8], from: usize) -> u64 {
    bytes[from..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::work::Area;

    const AREA: Area = Area { first: 8, count: 4, block_bytes: 512 };

    /// Work on a disk in the test's memory.
    struct Bench {
        work: Verified,
        ram: Arc<GuestRam>,
        disk: Vec<u8>,
    }

    impl Bench {
        fn new(reads: u8, slots: usize) -> Self {
            let ram = GuestRam::new(&[1 << 20]).unwrap();
            let buffers = (0..slots).map(|_| ram.alloc(512, 512).unwrap()).collect();
            let chooser = Chooser::new(AREA, Order::Random, reads, 1);
            let work = Verified::new(chooser, ram.clone(), buffers, 1, reads < 100);
            Self { work, ram, disk: vec![0; 16 * 512] }
        }

        /// Runs the next request. Returns its block, its direction, and the problem.
        fn step(&mut self) -> (u64, bool, Option<String>) {
            let Io { sector, write } = self.work.choose_for(0).unwrap();
            let at = index(sector) * 512;
            let (buffer, block) = (self.work.buffers[0].gpa, &mut self.disk[at..at + 512]);
            if write {
                self.ram.read(buffer, block).unwrap();
            } else {
                self.ram.write(buffer, block).unwrap();
            }
            (sector, write, self.work.done(0, true).unwrap())
        }
    }

    #[test]
    fn a_good_disk_has_no_mismatches_and_each_block_is_written_first() {
        let mut bench = Bench::new(50, 1);
        let mut written = [false; 16];
        let mut reads = 0;
        for _ in 0..200 {
            let (block, write, problem) = bench.step();
            assert_eq!(problem, None);
            assert!(write || written[index(block)], "block {block} was not written");
            written[index(block)] |= write;
            reads += u32::from(!write);
        }
        assert!(reads > 50, "{reads}");
    }

    /// Corrupts block 9, and runs until it is read. Returns the problem.
    fn problem_after(corrupt: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut bench = Bench::new(50, 1);
        for _ in 0..100 {
            bench.step();
        }
        let version = bench.work.versions[1];
        corrupt(&mut bench.disk);
        loop {
            let (block, write, problem) = bench.step();
            if let Some(problem) = problem {
                assert_eq!(block, 9);
                return problem.replace(&format!("version {version}"), "version N");
            }
            assert!(!(block == 9 && write), "choose another seed for this test");
        }
    }

    #[test]
    fn a_bad_block_is_named() {
        let flipped = problem_after(|disk| disk[9 * 512 + 500] ^= 1);
        assert_eq!(flipped, "block 9 (offset 4608) version N has wrong data in the 8 bytes at 496");
        let zeroed = problem_after(|disk| disk[9 * 512..10 * 512].fill(0));
        assert_eq!(zeroed, "block 9 (offset 4608) does not contain the pattern");
        let other = problem_after(|disk| disk.copy_within(10 * 512..11 * 512, 9 * 512));
        assert!(other.contains("expected block 9 version N, found block 10 version"), "{other}");
        let old = problem_after(|disk| fill(&mut disk[9 * 512..10 * 512], 1, 9, 1));
        assert!(old.contains("expected block 9 version N, found block 9 version 1"), "{old}");
    }

    #[test]
    fn a_run_of_reads_verifies_what_an_earlier_run_wrote() {
        let mut bench = Bench::new(100, 1);
        for block in 8..12 {
            fill(&mut bench.disk[block * 512..][..512], 1, block as u64, 40 + block as u64);
        }
        for _ in 0..50 {
            let (_, write, problem) = bench.step();
            assert_eq!((write, problem), (false, None));
        }
        bench.disk[8 * 512..12 * 512].fill(7);
        assert!(bench.step().2.unwrap().contains("does not contain the pattern"));
    }

    #[test]
    fn all_blocks_are_read_in_the_end() {
        let mut bench = Bench::new(50, 1);
        for _ in 0..100 {
            bench.step();
        }
        bench.work.read_through();
        for block in 8..12 {
            assert_eq!(bench.step(), (block, false, None));
        }
    }

    #[test]
    fn requests_in_flight_have_distinct_blocks_and_a_failed_write_makes_its_block_unknown() {
        let mut bench = Bench::new(50, 3);
        for _ in 0..100 {
            let sectors: Vec<_> =
                (0..3).map(|slot| bench.work.choose_for(slot).unwrap().sector).collect();
            assert!(
                sectors[0] != sectors[1] && sectors[1] != sectors[2] && sectors[0] != sectors[2]
            );
            for slot in 0..3 {
                bench.work.done(slot, false).unwrap();
                let (block, write) = bench.work.slots[slot];
                assert!(!write || bench.work.versions[block] == 0);
            }
        }
    }
}
