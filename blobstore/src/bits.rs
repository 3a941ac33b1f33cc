//! A set of bits of fixed length that counts its ones.

/// Which metadata pages or clusters are in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: usize,
    ones: usize,
    /// All words before this one are full.
    full: usize,
}

impl Bits {
    /// `len` zeroes.
    pub(crate) fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len, ones: 0, full: 0 }
    }

    /// The first `len` bits of `bytes`, least significant bit first; missing ones are zeroes.
    pub(crate) fn from_bytes(bytes: &[u8], len: usize) -> Self {
        let mut bits = Self::new(len);
        for (i, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                bits.set(i * 8 + bit);
            }
        }
        bits
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.len.div_ceil(8));
        bytes
    }

    pub(crate) fn get(&self, bit: usize) -> bool {
        bit < self.len && self.words[bit / 64] >> (bit % 64) & 1 == 1
    }

    /// Sets a bit; bits beyond the length are ignored. Whether it was zero.
    pub(crate) fn set(&mut self, bit: usize) -> bool {
        let new = bit < self.len && !self.get(bit);
        if new {
            self.words[bit / 64] |= 1 << (bit % 64);
            self.ones += 1;
        }
        new
    }

    pub(crate) fn clear(&mut self, bit: usize) {
        if self.get(bit) {
            self.words[bit / 64] &= !(1 << (bit % 64));
            self.ones -= 1;
            self.full = self.full.min(bit / 64);
        }
    }

    pub(crate) fn zeroes(&self) -> usize {
        self.len - self.ones
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds zeroes up to `len` bits.
    pub(crate) fn grow(&mut self, len: usize) {
        self.len = self.len.max(len);
        self.words.resize(self.len.div_ceil(64), 0);
    }

    /// Sets the lowest zero that is not below `from`, and returns its number.
    pub(crate) fn take_lowest(&mut self, from: usize) -> Option<usize> {
        while self.words.get(self.full) == Some(&u64::MAX) {
            self.full += 1;
        }
        let first = self.full.max(from / 64);
        let bit = (first..self.words.len()).find_map(|i| {
            let below = if i == from / 64 { (1 << (from % 64)) - 1 } else { 0 };
            let word = self.words[i] | below;
            (word != u64::MAX).then(|| i * 64 + word.trailing_ones() as usize)
        });
        bit.filter(|bit| self.set(*bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_zero_is_taken_and_counts_are_kept() {
        let mut bits = Bits::new(130);
        assert_eq!(
            [bits.take_lowest(1), bits.take_lowest(0), bits.take_lowest(0)],
            [Some(1), Some(0), Some(2)]
        );
        while bits.take_lowest(0).is_some() {}
        assert_eq!((bits.zeroes(), bits.set(130)), (0, false));
        bits.clear(65);
        bits.clear(129);
        bits.clear(129);
        assert_eq!(bits.zeroes(), 2);
        let copy = Bits::from_bytes(&bits.to_bytes(), 130);
        assert!((0..131).all(|bit| copy.get(bit) == bits.get(bit)));
        assert_eq!([bits.take_lowest(66), bits.take_lowest(0)], [Some(129), Some(65)]);
        bits.grow(200);
        assert_eq!((bits.zeroes(), bits.take_lowest(0)), (70, Some(130)));
    }
}
