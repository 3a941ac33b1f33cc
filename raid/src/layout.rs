//! Where an array's bytes are on its members.

use crate::level::Level;

/// The part of a member that holds data, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The offset of the first byte.
    pub offset: u64,
    /// The number of bytes.
    pub len: u64,
}

/// A contiguous range on one member, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) member: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Where an array's bytes are on its members.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) level: Level,
    /// Bytes of a strip; 0 for raid1.
    pub(crate) strip: u64,
    pub(crate) block_size: u32,
    pub(crate) extents: Box<[Extent]>,
    /// The size of the array in bytes.
    pub(crate) size: u64,
}

/// A layout that is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooSmall;

impl Layout {
    /// Makes a layout. The lengths of `extents` are reduced to what the level uses.
    ///
    /// # Errors
    /// A member holds no strip, or the array is larger than the largest `i64`.
    pub(crate) fn new(
        level: Level,
        strip: u64,
        block_size: u32,
        mut extents: Vec<Extent>,
    ) -> Result<Self, TooSmall> {
        let unit = if strip == 0 { u64::from(block_size) } else { strip };
        extents.iter_mut().for_each(|extent| extent.len -= extent.len % unit);
        let min = extents.iter().map(|extent| extent.len).min().unwrap_or(0);
        if level != Level::Concat {
            extents.iter_mut().for_each(|extent| extent.len = min);
        }
        let sum = extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.len));
        let size = match level {
            Level::Raid0 | Level::Concat => sum,
            Level::Raid1 => Some(min),
            Level::Raid5f => sum.map(|sum| sum - min),
        };
        let size = size.filter(|size| min > 0 && i64::try_from(*size).is_ok()).ok_or(TooSmall)?;
        Ok(Self { level, strip, block_size, extents: extents.into(), size })
    }

    /// The number of members.
    pub(crate) fn members(&self) -> usize {
        self.extents.len()
    }

    /// Bytes of a stripe of raid5f: the unit of writes.
    pub(crate) fn stripe(&self) -> u64 {
        self.strip * (self.members() as u64).saturating_sub(1)
    }

    /// Returns where the data at `at` is, and how many bytes of at most `len` follow it there. For
    /// raid1: on the first member.
    pub(crate) fn place(&self, at: u64, len: u64) -> Place {
        match self.level {
            Level::Raid1 => Place { member: 0, offset: self.extents[0].offset + at, len },
            Level::Raid0 => {
                let (strip, within) = (at / self.strip, at % self.strip);
                let member = index(strip % self.members() as u64);
                let offset = strip / self.members() as u64 * self.strip + within;
                let len = len.min(self.strip - within);
                Place { member, offset: self.extents[member].offset + offset, len }
            }
            Level::Concat => {
                let (mut member, mut within) = (0, at);
                while within >= self.extents[member].len && member + 1 < self.members() {
                    within -= self.extents[member].len;
                    member += 1;
                }
                let extent = self.extents[member];
                let len = len.min(extent.len.saturating_sub(within));
                Place { member, offset: extent.offset + within, len }
            }
            Level::Raid5f => {
                let (stripe, in_stripe) = (at / self.stripe(), at % self.stripe());
                let within = in_stripe % self.strip;
                let member = self.data_member(stripe, index(in_stripe / self.strip));
                let offset = self.extents[member].offset + stripe * self.strip + within;
                Place { member, offset, len: len.min(self.strip - within) }
            }
        }
    }

    /// The member of raid5f with the parity of a stripe.
    pub(crate) fn parity_member(&self, stripe: u64) -> usize {
        self.members() - 1 - index(stripe % self.members() as u64)
    }

    /// The member of raid5f with strip `strip` of the data of a stripe.
    pub(crate) fn data_member(&self, stripe: u64, strip: usize) -> usize {
        strip + usize::from(strip >= self.parity_member(stripe))
    }

    /// The range on a member of raid0 that has its bytes of a range of the array: they follow one
    /// another there.
    pub(crate) fn on_member(&self, member: usize, at: u64, len: u64) -> Option<Place> {
        let (members, strip) = (self.members() as u64, self.strip);
        let (first, last) = (at / strip, (at + len).checked_sub(1)? / strip);
        let ahead = (member as u64 + members - first % members) % members;
        let behind = (last % members + members - member as u64) % members;
        let own_first = first + ahead;
        let own_last = last.checked_sub(behind).filter(|own| *own >= own_first)?;
        let start = own_first / members * strip + if own_first == first { at % strip } else { 0 };
        let end_within = if own_last == last { (at + len - 1) % strip + 1 } else { strip };
        let end = own_last / members * strip + end_within;
        Some(Place { member, offset: self.extents[member].offset + start, len: end - start })
    }
}

/// Converts a small number, such as a member's.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 512;

    /// Where SPDK's rules put block `b`: member and block there.
    fn plain(layout: &Layout, b: u64) -> (usize, u64) {
        let (n, strip) = (layout.members() as u64, layout.strip / BLOCK);
        let (member, block) = match layout.level {
            Level::Raid1 => (0, b),
            Level::Raid0 => (b / strip % n, b / strip / n * strip + b % strip),
            Level::Concat => {
                let mut left = b;
                let mut member = 0;
                for extent in &layout.extents {
                    if left < extent.len / BLOCK {
                        break;
                    }
                    left -= extent.len / BLOCK;
                    member += 1;
                }
                (member, left)
            }
            Level::Raid5f => {
                let t = b / (strip * (n - 1));
                let parity = n - 1 - t % n;
                let others: Vec<u64> = (0..n).filter(|m| *m != parity).collect();
                let within = b % (strip * (n - 1));
                (others[(within / strip) as usize], t * strip + within % strip)
            }
        };
        (member as usize, layout.extents[member as usize].offset / BLOCK + block)
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        let level = prop_oneof![
            Just(Level::Raid0),
            Just(Level::Raid1),
            Just(Level::Concat),
            Just(Level::Raid5f)
        ];
        (level, 0_u32..4, proptest::collection::vec((0_u64..9, 16_u64..70), 3..6)).prop_map(
            |(level, shift, members)| {
                let strip = if level == Level::Raid1 { 0 } else { BLOCK << shift };
                let extents = members.into_iter();
                let extents = extents.map(|(o, l)| Extent { offset: o * BLOCK, len: l * BLOCK });
                Layout::new(level, strip, 512, extents.collect()).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn every_block_is_where_spdk_puts_it_and_nowhere_else(layout in layouts()) {
            let mut seen = HashSet::new();
            for b in 0..layout.size / BLOCK {
                let left = layout.size - b * BLOCK;
                let place = layout.place(b * BLOCK, left);
                let expected = plain(&layout, b);
                prop_assert_eq!((place.member, place.offset / BLOCK), expected);
                prop_assert!(place.len >= BLOCK && place.len <= left);
                let extent = layout.extents[place.member];
                prop_assert!(place.offset + place.len <= extent.offset + extent.len);
                prop_assert!(seen.insert(expected), "block {} is shared", b);
                let last = b + place.len / BLOCK - 1;
                prop_assert_eq!(plain(&layout, last), (expected.0, expected.1 + last - b));
            }
        }

        #[test]
        fn a_range_of_raid0_is_one_range_on_each_member(
            members in 1_usize..5, at in 0_u64..60, len in 1_u64..60,
        ) {
            let extents = vec![Extent { offset: BLOCK, len: 64 * BLOCK }; members];
            let layout = Layout::new(Level::Raid0, 4 * BLOCK, 512, extents).unwrap();
            let blocks = layout.size / BLOCK;
            let (at, len) = (at % blocks, len.min(blocks - at % blocks));
            for member in 0..members {
                let own: Vec<u64> = (at..at + len)
                    .map(|b| plain(&layout, b))
                    .filter(|(m, _)| *m == member)
                    .map(|(_, b)| b)
                    .collect();
                let place = layout.on_member(member, at * BLOCK, len * BLOCK);
                let got: Option<Vec<u64>> = place.map(|p| (p.offset / BLOCK..(p.offset + p.len) / BLOCK).collect());
                prop_assert_eq!(got.unwrap_or_default(), own);
            }
        }
    }

    #[test]
    fn members_without_a_strip_and_sizes_past_the_largest_offset_are_refused() {
        let of = |lens: &[u64]| {
            let extents = lens.iter().map(|len| Extent { offset: 0, len: *len }).collect();
            Layout::new(Level::Raid0, 4096, 512, extents).map(|layout| layout.size)
        };
        assert_eq!(of(&[8192, 4096]), Ok(8192));
        for bad in [&[8192, 4095][..], &[], &[u64::MAX, u64::MAX], &[i64::MAX as u64; 2]] {
            assert_eq!(of(bad), Err(TooSmall));
        }
    }
}
