//! Data that says which block it is and how often that was written, and its comparison.

use std::sync::Arc;

use front_end::{GuestRam, Segment};

use crate::error::Result;
use crate::perf::plan::Order;
use crate::perf::work::{Chooser, Io, Work};

/// The first word of every block.
const MAGIC: u64 = 0x6676_7265_6b6c_6276;

/// Chooses as its [`Chooser`] does, but no block that is in flight, and none to read of which it
/// has to know, and does not, what it holds.
///
/// If nothing is ever written, a block may have been written by a run before: then what it says
/// of itself must hold together.
pub(crate) struct Verified {
    chooser: Chooser,
    ram: Arc<GuestRam>,
    seed: u64,
    writes: bool,
    buffers: Vec<Segment>,
    /// Of each block: how often it was written, 0 if what it holds is not known.
    versions: Vec<u32>,
    busy: Vec<bool>,
    /// Of each slot: block and direction of the request in it.
    slots: Vec<(usize, bool)>,
    bytes: Vec<u8>,
}

impl Verified {
    /// Verifies what `chooser` chooses, in `buffers`, one of each slot. `writes` says whether it
    /// ever chooses to write.
    pub(crate) fn new(
        chooser: Chooser,
        ram: Arc<GuestRam>,
        buffers: Vec<Segment>,
        seed: u64,
        writes: bool,
    ) -> Self {
        let area = chooser.area();
        let blocks = area.count as usize;
        assert!(blocks > buffers.len(), "each request takes a block of its own");
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

    /// From now on reads one block after another; one that was never written is written.
    pub(crate) fn read_through(&mut self) {
        self.chooser = Chooser::new(self.chooser.area(), Order::Sequential, 100, self.seed);
    }

    /// The number of `block` on the disk.
    fn number(&self, block: usize) -> u64 {
        self.chooser.area().first + block as u64
    }

    /// What the request in `slot` is to do.
    fn next_in(&mut self, slot: usize) -> Result<Io> {
        let (block, write) = self.chooser.choose();
        let mut block = block as usize;
        // The order of two requests that overlap is not defined.
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

    /// What is wrong with `bytes`, if anything is.
    fn compare(&self, block: usize) -> Option<String> {
        let number = self.number(block);
        let at = number * u64::from(self.chooser.area().block_bytes);
        let place = || format!("block {number} (at byte {at} of the disk)");
        let bytes = &self.bytes;
        let known = self.versions[block];
        let [magic, says_block, says_version] = [0, 8, 16].map(|from| word(bytes, from));
        if magic != MAGIC {
            return Some(format!("{} holds no pattern", place()));
        }
        if says_block != number || known != 0 && says_version != u64::from(known) {
            let expected = if known == 0 { String::new() } else { format!(" of version {known}") };
            return Some(format!(
                "{} should hold block {number}{expected}; it says that it is block {says_block} of version \
                 {says_version}",
                place()
            ));
        }
        let expected = pattern(self.seed, number, says_version);
        let mut words = bytes.as_chunks().0.iter().zip(expected);
        let wrong = words.position(|(word, expected)| u64::from_le_bytes(*word) != expected)?;
        let wrong = 8 * wrong;
        Some(format!("{} of version {says_version} is wrong in the 8 bytes at {wrong}", place()))
    }
}

impl Work for Verified {
    const CHECKS: bool = true;

    fn next(&mut self, slots: &[u16], mut put: impl FnMut(usize, Io)) -> Result<()> {
        for slot in slots.iter().map(|slot| usize::from(*slot)) {
            put(slot, self.next_in(slot)?);
        }
        Ok(())
    }

    fn done(&mut self, slot: usize, ok: bool) -> Result<Option<String>> {
        let (block, write) = self.slots[slot];
        self.busy[block] = false;
        if write && !ok {
            // The old data, the new data, or a mixture.
            self.versions[block] = 0;
        }
        if write || !ok {
            return Ok(None);
        }
        self.ram.read(self.buffers[slot].gpa, &mut self.bytes)?;
        Ok(self.compare(block))
    }
}

/// What a block holds: a mark, block and version, and words that follow from these and the seed.
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

/// Writes the pattern over `bytes`, whose number is a multiple of eight.
pub(crate) fn fill(bytes: &mut [u8], seed: u64, block: u64, version: u64) {
    for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(pattern(seed, block, version)) {
        *to = word.to_le_bytes();
    }
}

fn word(bytes: &[u8], from: usize) -> u64 {
    bytes[from..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::work::Area;

    const AREA: Area = Area { first: 8, count: 4, block_bytes: 512 };

    /// Work on a disk that the test plays.
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

        /// Does the next request; returns its block, its direction, and the complaint.
        fn step(&mut self) -> (u64, bool, Option<String>) {
            let Io { sector, write } = self.work.next_in(0).unwrap();
            let at = sector as usize * 512;
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
    fn a_good_disk_holds_what_was_written_and_each_block_is_written_first() {
        let mut bench = Bench::new(50, 1);
        let mut written = [false; 16];
        let mut reads = 0;
        for _ in 0..200 {
            let (block, write, complaint) = bench.step();
            assert_eq!(complaint, None);
            assert!(write || written[block as usize], "block {block} was not written");
            written[block as usize] |= write;
            reads += u32::from(!write);
        }
        assert!(reads > 50, "{reads}");
    }

    /// Spoils block 9 and runs until it is read.
    fn complaint(spoil: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut bench = Bench::new(50, 1);
        for _ in 0..100 {
            bench.step();
        }
        let version = bench.work.versions[1];
        spoil(&mut bench.disk);
        loop {
            let (block, write, complaint) = bench.step();
            if let Some(complaint) = complaint {
                assert_eq!(block, 9);
                return complaint.replace(&format!("version {version}"), "version N");
            }
            // Start over if it was written before it was read.
            assert!(!(block == 9 && write), "choose another seed for this test");
        }
    }

    #[test]
    fn a_bad_block_is_named() {
        let flipped = complaint(|disk| disk[9 * 512 + 500] ^= 1);
        assert_eq!(
            flipped,
            "block 9 (at byte 4608 of the disk) of version N is wrong in the 8 bytes at 496"
        );
        let zeroed = complaint(|disk| disk[9 * 512..10 * 512].fill(0));
        assert_eq!(zeroed, "block 9 (at byte 4608 of the disk) holds no pattern");
        let other = complaint(|disk| disk.copy_within(10 * 512..11 * 512, 9 * 512));
        assert!(
            other.contains("should hold block 9 of version N; it says that it is block 10"),
            "{other}"
        );
        let old = complaint(|disk| fill(&mut disk[9 * 512..10 * 512], 1, 9, 1));
        assert!(
            old.contains("should hold block 9 of version N") && old.contains("of version 1"),
            "{old}"
        );
    }

    #[test]
    fn reads_alone_take_what_an_earlier_run_wrote() {
        let mut bench = Bench::new(100, 1);
        for block in 8..12 {
            fill(&mut bench.disk[block * 512..][..512], 1, block as u64, 40 + block as u64);
        }
        for _ in 0..50 {
            let (_, write, complaint) = bench.step();
            assert_eq!((write, complaint), (false, None));
        }
        bench.disk[8 * 512..12 * 512].fill(7);
        assert!(bench.step().2.unwrap().contains("holds no pattern"));
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
    fn requests_in_flight_have_blocks_of_their_own_and_a_failed_write_is_forgotten() {
        let mut bench = Bench::new(50, 3);
        for _ in 0..100 {
            let sectors: Vec<_> =
                (0..3).map(|slot| bench.work.next_in(slot).unwrap().sector).collect();
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
