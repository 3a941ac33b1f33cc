//! Random numbers from a seed, and data made of them.

/// `len` bytes that differ from block to block and from one `salt` to another.
pub fn pattern(salt: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(salt);
    (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).take(len).collect()
}

/// A small generator of random numbers (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Cuts `len` into pieces, mostly odd ones.
    pub(crate) fn split(&mut self, len: usize) -> Vec<usize> {
        let mut rest = len;
        let mut pieces = Vec::new();
        while rest > 0 && pieces.len() < 40 {
            let piece = match self.below(4) {
                0 => rest,
                1 => rest.min(512 * (1 + self.below(8) as usize)),
                2 => rest.min(4096 * (1 + self.below(8) as usize)),
                _ => 1 + self.below(rest as u64) as usize,
            };
            pieces.push(piece);
            rest -= piece;
        }
        pieces.extend((rest > 0).then_some(rest));
        pieces
    }
}
