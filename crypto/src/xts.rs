//! AES-XTS (IEEE 1619) over logical blocks, with SPDK's tweaks.

use std::ops::BitXor;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256, Block};

/// AES blocks that are encrypted together: the cipher works on several at a time.
const LANES: usize = 32;
const AES_BLOCK: usize = 16;

/// The ciphers of a key. Its memory is zeroed when it is dropped.
#[expect(clippy::large_enum_variant, reason = "there is one for each key")]
pub(crate) enum Xts {
    Aes128(Pair<Aes128>),
    Aes256(Pair<Aes256>),
}

/// The ciphers of the data and of the tweaks.
pub(crate) struct Pair<C> {
    data: C,
    tweak: C,
}

impl Xts {
    /// Makes the ciphers. `None` if the keys are not both 16 or both 32 bytes long.
    pub(crate) fn new(data: &[u8], tweak: &[u8]) -> Option<Self> {
        match (data.len(), tweak.len()) {
            (16, 16) => Some(Self::Aes128(Pair::new(data, tweak)?)),
            (32, 32) => Some(Self::Aes256(Pair::new(data, tweak)?)),
            _ => None,
        }
    }

    /// Encrypts whole logical blocks of `block_size` bytes in place. `first` is the number of the
    /// first one on the disk.
    pub(crate) fn encrypt(&self, bytes: &mut [u8], first: u64, block_size: usize) {
        match self {
            Self::Aes128(pair) => pair.each(bytes, first, block_size, |c, b| c.encrypt_blocks(b)),
            Self::Aes256(pair) => pair.each(bytes, first, block_size, |c, b| c.encrypt_blocks(b)),
        }
    }

    /// Decrypts what [`encrypt`](Self::encrypt) has encrypted.
    pub(crate) fn decrypt(&self, bytes: &mut [u8], first: u64, block_size: usize) {
        match self {
            Self::Aes128(pair) => pair.each(bytes, first, block_size, |c, b| c.decrypt_blocks(b)),
            Self::Aes256(pair) => pair.each(bytes, first, block_size, |c, b| c.decrypt_blocks(b)),
        }
    }
}

impl<C: KeyInit + BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16>> Pair<C> {
    fn new(data: &[u8], tweak: &[u8]) -> Option<Self> {
        let cipher = |key| C::new_from_slice(key).ok();
        Some(Self { data: cipher(data)?, tweak: cipher(tweak)? })
    }

    #[inline]
    fn each(
        &self,
        bytes: &mut [u8],
        first: u64,
        block_size: usize,
        run: impl Fn(&C, &mut [Block]),
    ) {
        for (number, unit) in (first..).zip(bytes.chunks_exact_mut(block_size)) {
            self.unit(unit, number, &run);
        }
    }

    /// Encrypts or decrypts one logical block.
    #[inline]
    fn unit(&self, unit: &mut [u8], number: u64, run: &impl Fn(&C, &mut [Block])) {
        // SPDK's tweak: eight zero bytes, then the number.
        let mut tweak = Block::default();
        tweak[8..].copy_from_slice(&number.to_le_bytes());
        self.tweak.encrypt_block(&mut tweak);
        let mut tweak = u128::from_le_bytes(tweak.into());
        for chunk in unit.chunks_mut(AES_BLOCK * LANES) {
            let (mut blocks, mut tweaks) = ([Block::default(); LANES], [0; LANES]);
            let count = chunk.len() / AES_BLOCK;
            for (i, from) in chunk.chunks_exact(AES_BLOCK).enumerate() {
                tweaks[i] = tweak;
                blocks[i] = xor(from, tweak);
                tweak = double(tweak);
            }
            run(&self.data, &mut blocks[..count]);
            for (i, to) in chunk.chunks_exact_mut(AES_BLOCK).enumerate() {
                to.copy_from_slice(&xor(&blocks[i], tweaks[i]));
            }
        }
    }
}

fn xor(block: &[u8], tweak: u128) -> Block {
    let bytes: [u8; AES_BLOCK] = block.try_into().expect("a whole AES block");
    u128::from_le_bytes(bytes).bitxor(tweak).to_le_bytes().into()
}

/// Multiplies by x in the field of XTS.
fn double(tweak: u128) -> u128 {
    let carry = (tweak >> 127) * 0x87;
    (tweak << 1) ^ carry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(digit).collect()
    }

    /// Encrypts one unit with a tweak of IEEE 1619's form: the number in the first bytes.
    fn standard(xts: &Xts, unit: &mut [u8], number: u64) {
        fn pair<C: KeyInit + BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16>>(
            pair: &Pair<C>,
            unit: &mut [u8],
            number: u64,
        ) {
            let mut tweak = Block::default();
            tweak[..8].copy_from_slice(&number.to_le_bytes());
            pair.tweak.encrypt_block(&mut tweak);
            let mut tweak = u128::from_le_bytes(tweak.into());
            for block in unit.chunks_exact_mut(16) {
                let mut one = xor(block, tweak);
                pair.data.encrypt_block(&mut one);
                block.copy_from_slice(&xor(&one, tweak));
                tweak = double(tweak);
            }
        }
        match xts {
            Xts::Aes128(one) => pair(one, unit, number),
            Xts::Aes256(one) => pair(one, unit, number),
        }
    }

    /// IEEE 1619-2007, annex B, vectors 1 and 2. The first has the tweak 0, which is the same in
    /// SPDK's form; the second shows that the field and the ciphers are right with another tweak.
    #[test]
    fn it_encrypts_as_the_standard_s_vectors() {
        let xts = Xts::new(&[0; 16], &[0; 16]).unwrap();
        let mut unit = vec![0; 32];
        xts.encrypt(&mut unit, 0, 32);
        let expected = "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e";
        assert_eq!(unit, hex(expected));
        xts.decrypt(&mut unit, 0, 32);
        assert_eq!(unit, [0; 32]);
        let xts = Xts::new(&[0x11; 16], &[0x22; 16]).unwrap();
        let mut unit = vec![0x44; 32];
        standard(&xts, &mut unit, 0x33_3333_3333);
        let expected = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        assert_eq!(unit, hex(expected));
    }

    /// Computed by another implementation (`cryptography` 46 for Python, on OpenSSL), with SPDK's
    /// tweaks.
    #[test]
    fn it_encrypts_as_another_implementation() {
        let plain: Vec<u8> = (0..4096_u32).map(|i| (i * 7 + i / 256).to_le_bytes()[0]).collect();
        for (key_len, len, number, begin, end) in [
            (
                16,
                512,
                5,
                "64797a36e0a80c01fca0c5d552ea15a67e737e6d0d88761dd8ff088b86fc5fec",
                "c85ee6bd992a633f56509297cd75465b482fd757d1390716768528fd1a30b1cd",
            ),
            (
                32,
                4096,
                0x1_2345_6789,
                "3ccdc2aa50134bca62799d2a6d699769a3097284d67773e2f3dc48d5cc31f0fe",
                "cfb0c84c0eeaeb5b888703f8d37d63d7fcee7e3f1076b4d402909f0bf3101c7a",
            ),
        ] {
            let key = |from: u8| (from..).take(key_len).collect::<Vec<u8>>();
            let xts = Xts::new(&key(0), &key(100)).unwrap();
            let mut unit = plain[..len].to_vec();
            xts.encrypt(&mut unit, number, len);
            assert_eq!((&unit[..32], &unit[len - 32..]), (&*hex(begin), &*hex(end)));
            xts.decrypt(&mut unit, number, len);
            assert_eq!(unit, plain[..len]);
        }
    }

    #[test]
    fn the_number_of_a_block_is_in_the_upper_half_of_its_tweak() {
        for len in [16, 32] {
            let xts = Xts::new(&vec![1; len], &vec![2; len]).unwrap();
            let plain: Vec<u8> = (0..=255).cycle().take(8192).collect();
            let mut both = plain.clone();
            xts.encrypt(&mut both, 7, 4096);
            // Each block alone gives the same.
            let mut second = plain[4096..].to_vec();
            xts.encrypt(&mut second, 8, 4096);
            assert_eq!(both[4096..], second);
            let mut low = plain[..4096].to_vec();
            standard(&xts, &mut low, 7);
            assert_ne!(both[..4096], low);
            xts.decrypt(&mut both, 7, 4096);
            assert_eq!(both, plain);
        }
        assert!(Xts::new(&[1; 16], &[2; 32]).is_none() && Xts::new(&[1; 24], &[2; 24]).is_none());
    }
}
