//! An independent model of a chain according to the specification (virtio 1.2, sections 2.7 and 2.8).

use virtqueue::chain::LONG_SEGMENTS_MAX;

use super::ADDRS;
use crate::guest::{Guest, Place};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const WRAP: u16 = 1 << 15;
/// The longest table, and the longest chain, that the device accepts.
const TABLE_MAX: u32 = 1026;
const CHAIN_MAX: u32 = 4096;
/// Bytes of the longest header of a request.
const HEADER_MAX: usize = 51;

/// A piece of memory in a chain, within one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub place: Place,
    pub len: usize,
    pub write: bool,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// Head or buffer id.
    pub id: u16,
    /// Descriptors of the ring that it occupies.
    pub span: u16,
    pub pieces: Vec<Piece>,
    /// Whether it is well-formed.
    pub whole: bool,
    /// The first readable bytes.
    pub header: Vec<u8>,
}

/// The state of an entry of the available ring.
#[derive(Debug)]
pub(super) enum Taken {
    Chain(Chain),
    /// Nothing is available.
    Nothing,
    /// The position of the next chain is unknown.
    Nonsense,
}

impl Chain {
    pub(super) fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    pub(super) fn writable_bytes(&self) -> usize {
        self.writable().map(|piece| piece.len).sum()
    }

    /// The writable pieces.
    pub(super) fn writable(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|piece| piece.write)
    }

    /// The place of the last writable byte, if the chain is well-formed.
    pub(super) fn last_byte(&self) -> Option<Place> {
        let last = self.pieces.last().filter(|piece| self.whole && piece.write)?;
        Some(Place { at: last.place.at + last.len - 1, ..last.place })
    }

    /// The places of the first `count` writable bytes, if the chain is well-formed and has so many.
    pub(super) fn first_bytes(&self, count: usize) -> Option<Vec<Place>> {
        let of = |piece: &Piece| {
            let Place { file, at } = piece.place;
            (at..at + piece.len).map(move |at| Place { file, at })
        };
        let places: Vec<_> = self.writable().flat_map(of).take(count).collect();
        (self.whole && places.len() == count).then_some(places)
    }

    fn push(&mut self, table: usize, desc: Desc) {
        let write = desc.flags & WRITE != 0;
        if self.pieces.last().is_some_and(|last| last.write && !write) {
            self.whole = false;
        }
        let (mut gpa, mut left) = (desc.addr, u64::from(desc.len));
        self.whole &= left > 0;
        while left > 0 {
            let Some((place, room)) = Guest::locate(table, gpa) else {
                self.whole = false;
                return;
            };
            let len = left.min(room);
            self.pieces.push(Piece { place, len: len as usize, write });
            left -= len;
            gpa = gpa.wrapping_add(len);
        }
    }

    fn finish(mut self, guest: &Guest) -> Self {
        self.whole &= self.pieces.len() <= LONG_SEGMENTS_MAX;
        for piece in self.pieces.iter().filter(|piece| !piece.write) {
            let len = piece.len.min(HEADER_MAX - self.header.len());
            self.header.extend(
                (0..len)
                    .map(|n| guest.remembered_at(Place { at: piece.place.at + n, ..piece.place })),
            );
        }
        self
    }
}

#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    tag: u16,
}

fn desc(guest: &Guest, table: usize, at: u64, packed: bool) -> Desc {
    let addr = u64::from_le_bytes(guest.remembered(table, at));
    let len = u32::from_le_bytes(guest.remembered(table, at + 8));
    let first = u16::from_le_bytes(guest.remembered(table, at + 12));
    let second = u16::from_le_bytes(guest.remembered(table, at + 14));
    let (flags, tag) = if packed { (second, first) } else { (first, second) };
    Desc { addr, len, flags, tag }
}

/// The place of an indirect table, and the number of its descriptors, if it is one.
fn open(table: usize, desc: Desc) -> Option<(u64, u32)> {
    let count = desc.len / 16;
    let sound =
        desc.flags & NEXT == 0 && desc.len.is_multiple_of(16) && (1..=TABLE_MAX).contains(&count);
    let (_, room) = Guest::locate(table, desc.addr)?;
    (sound && u64::from(desc.len) <= room).then_some((desc.addr, count))
}

/// The chain at a position of a split ring's available ring.
pub(super) fn split(guest: &Guest, table: usize, size: u16, position: u16) -> Chain {
    let entry = ADDRS.avail + 4 + 2 * u64::from(position % size);
    let head = u16::from_le_bytes(guest.remembered(table, entry));
    let mut chain = Chain { id: head, span: 1, whole: true, ..Chain::default() };
    let (mut at, mut count, mut index) = (ADDRS.desc, u32::from(size), u32::from(head));
    let mut left = count.min(CHAIN_MAX);
    loop {
        if index >= count || left == 0 {
            chain.whole = false;
            break;
        }
        let desc = desc(guest, table, at + 16 * u64::from(index), false);
        if desc.flags & INDIRECT != 0 {
            let opened = open(table, desc).filter(|_| at == ADDRS.desc);
            let Some((address, length)) = opened else {
                chain.whole = false;
                break;
            };
            (at, count, index, left) = (address, length, 0, length);
            // A table may be anywhere, even within the ring, which is not distinguished here.
            if at == ADDRS.desc {
                chain.whole = false;
                break;
            }
            continue;
        }
        chain.push(table, desc);
        if desc.flags & NEXT == 0 {
            break;
        }
        left -= 1;
        index = desc.tag.into();
    }
    chain.finish(guest)
}

/// The chain at a position of a packed ring, of which up to `room` descriptors may be available.
pub(super) fn packed(guest: &Guest, table: usize, size: u16, position: u16, room: u16) -> Taken {
    let flags_at = ADDRS.desc + 16 * u64::from(position & !WRAP) + 14;
    let flags = u16::from_le_bytes(guest.remembered(table, flags_at));
    let wrap = position & WRAP != 0;
    if (flags & AVAIL != 0) != wrap || (flags & USED != 0) == wrap {
        return Taken::Nothing;
    }
    let mut chain = Chain { whole: true, ..Chain::default() };
    let mut at = position;
    loop {
        if chain.span == room {
            return Taken::Nonsense;
        }
        let here = desc(guest, table, ADDRS.desc + 16 * u64::from(at & !WRAP), true);
        chain.span += 1;
        chain.id = here.tag;
        if here.flags & INDIRECT == 0 {
            chain.push(table, here);
        } else if let Some((address, count)) = open(table, here) {
            (0..count).for_each(|n| {
                chain.push(table, desc(guest, table, address + 16 * u64::from(n), true));
            });
        } else {
            chain.whole = false;
        }
        if here.flags & NEXT == 0 {
            break;
        }
        at = advance_packed(at, 1, size);
    }
    if chain.id >= size { Taken::Nonsense } else { Taken::Chain(chain.finish(guest)) }
}

/// The position `by` descriptors after another; `by` is at most `size`.
pub(super) fn advance_packed(position: u16, by: u16, size: u16) -> u16 {
    let (index, wrap) = ((position & !WRAP) + by, position & WRAP);
    if index < size { index | wrap } else { (index - size) | (wrap ^ WRAP) }
}
