//! The contents of blocks.

use super::BLOCK;

/// What a block holds: its number, its version, and words that follow from these and the seed.
pub(super) fn pattern(seed: u64, block: u64, version: u32) -> [u8; BLOCK as usize] {
    let mut bytes = [0; BLOCK as usize];
    let mut random = Random(seed ^ block.rotate_left(32) ^ u64::from(version));
    let header = [block, u64::from(version)];
    let words = header.into_iter().chain(std::iter::repeat_with(|| random.next()));
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Returns what a block that holds something else holds.
pub(super) fn describe(bytes: &[u8; BLOCK as usize], block: u64, version: u32) -> String {
    let word = |at: usize| {
        bytes[at..at + 8].iter().rev().fold(0, |word: u64, &byte| word << 8 | u64::from(byte))
    };
    format!(
        "block {block} should hold version {version}; it says that it is block {} of version {}",
        word(0),
        word(8)
    )
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
