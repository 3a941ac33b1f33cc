//! Splits the stream of a server's replies into headers and data, wherever reads have cut it.

use crate::protocol::SimpleReply;

/// A part of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    /// A reply. If data follows it, the caller calls [`Parser::expect`].
    Reply(SimpleReply),
    /// Some of the data of the latest reply, in order; not empty.
    Data(&'a [u8]),
    /// The stream does not follow the protocol: no reply is here.
    Violation,
}

/// The state between two reads.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    header: [u8; SimpleReply::SIZE],
    /// The bytes of `header` that have arrived.
    have: usize,
    /// The bytes of data that are missing.
    data: usize,
}

impl Parser {
    /// `len` bytes of data follow the reply that was returned last.
    pub(crate) fn expect(&mut self, len: usize) {
        self.data = len;
    }

    /// The bytes of data that are missing.
    pub(crate) fn missing(&self) -> usize {
        self.data
    }

    /// Takes the next part from the front of `input`. `None`: more input is needed.
    #[inline]
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Option<Item<'a>> {
        if input.is_empty() {
            return None;
        }
        if self.data > 0 {
            let (data, rest) = input.split_at(self.data.min(input.len()));
            self.data -= data.len();
            *input = rest;
            return Some(Item::Data(data));
        }
        let wanted = &mut self.header[self.have..];
        let (bytes, rest) = input.split_at(wanted.len().min(input.len()));
        wanted[..bytes.len()].copy_from_slice(bytes);
        self.have += bytes.len();
        *input = rest;
        if self.have < SimpleReply::SIZE {
            return None;
        }
        self.have = 0;
        Some(SimpleReply::decode(&self.header).map_or(Item::Violation, Item::Reply))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A random number below `limit`, from a seed.
    fn random(seed: &mut u64, limit: usize) -> usize {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        usize::try_from(*seed >> 33).unwrap() % limit
    }

    /// The data of a reply, by its cookie.
    fn data(cookie: u64) -> Vec<u8> {
        let len = usize::try_from(cookie * 37 % 300).unwrap();
        (0..len).map(|i| (i as u64 ^ cookie).to_le_bytes()[0]).collect()
    }

    fn stream(replies: u64) -> Vec<u8> {
        let mut bytes = vec![];
        for cookie in 0..replies {
            let error = u32::from(cookie % 5 == 4);
            bytes.extend(SimpleReply { error, cookie }.encode());
            if error == 0 {
                bytes.extend(data(cookie));
            }
        }
        bytes
    }

    /// Feeds one read to a parser, and adds what it returns.
    fn feed(parser: &mut Parser, mut input: &[u8], got: &mut Vec<(SimpleReply, Vec<u8>)>) -> bool {
        while let Some(item) = parser.next(&mut input) {
            match item {
                Item::Reply(reply) => {
                    parser.expect(if reply.error == 0 { data(reply.cookie).len() } else { 0 });
                    got.push((reply, vec![]));
                }
                Item::Data(bytes) => got.last_mut().unwrap().1.extend(bytes),
                Item::Violation => return false,
            }
        }
        assert!(input.is_empty());
        true
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_replies() {
        const REPLIES: u64 = 40;
        let bytes = stream(REPLIES);
        for seed in 1..200_u64 {
            let mut random_seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let (mut parser, mut got, mut rest) = (Parser::default(), vec![], &bytes[..]);
            let longest = [1, 3, 17, 64, 1000][random(&mut random_seed, 5)];
            while !rest.is_empty() {
                let (now, later) =
                    rest.split_at((1 + random(&mut random_seed, longest)).min(rest.len()));
                assert!(feed(&mut parser, now, &mut got), "seed {seed}");
                rest = later;
            }
            assert_eq!(got.len() as u64, REPLIES, "seed {seed}");
            for (cookie, (reply, found)) in (0..).zip(&got) {
                let expected = if reply.error == 0 { data(cookie) } else { vec![] };
                assert_eq!((reply.cookie, found), (cookie, &expected), "seed {seed}");
            }
        }
    }

    #[test]
    fn data_behind_the_expected_data_is_a_violation() {
        let mut bytes = stream(2);
        bytes.extend([0; 16]);
        let mut got = vec![];
        assert!(!feed(&mut Parser::default(), &bytes, &mut got));
        assert_eq!(got.len(), 2);
    }
}
