//! Checks after a visit that the chains that were taken and returned, and the bytes that were written, obey the
//! invariants of [`super`].

use std::ops::Range;
use std::os::unix::fs::FileExt;

use vhost_target::queue::QueueState;

use super::device::Device;
use super::model::{self, Chain, Taken};
use super::{ADDRS, LOG_BYTES, PAGE, STATUSES, Scene, trace};
use crate::guest::{FILE_BYTES, Place, within};

/// The limits of a visit, as the queue engine has them.
const VISIT_REQUESTS_MAX: usize = 32;
const VISIT_BYTES_MAX: usize = 512 << 10;
const VISIT_PIECES_MAX: usize = 1024;

impl<D: Device> Scene<'_, D> {
    /// Checks what was taken, against the ring before the visit.
    pub(super) fn look_at_fetched(&mut self) {
        let (guest, table) = (&self.stage.guest, self.shown.table);
        let to = self.queue.control().last_avail();
        let (mut count, mut bytes, mut pieces) = (0, 0, 0);
        while self.last_avail != to {
            assert!(count < VISIT_REQUESTS_MAX, "more requests than a visit may take");
            assert!(bytes <= VISIT_BYTES_MAX, "more bytes than a visit may take: {bytes}");
            assert!(pieces <= VISIT_PIECES_MAX, "more pieces than a visit may take: {pieces}");
            let at = self.last_avail;
            let taken = if self.layout.packed {
                model::packed(guest, table, self.size, at, self.room(at))
            } else {
                Taken::Chain(model::split(guest, table, self.size, at))
            };
            let Taken::Chain(chain) = taken else {
                panic!("took a chain at {at:#x} that is none: {taken:?}");
            };
            count += 1;
            if chain.whole {
                bytes += chain.bytes();
                pieces += chain.pieces.len();
            }
            let by = if self.layout.packed { chain.span } else { 1 };
            self.last_avail = self.advance(at, by);
            let hits = |piece: &model::Piece| {
                piece.write && piece.place.file == 0 && piece.place.at < STATUSES as usize
            };
            self.exact &= !chain.pieces.iter().any(hits);
            trace(&|| format!("took at {at:#x}: {chain:?}"));
            self.outstanding.push(chain);
        }
        // A guest that offers more chains than its ring has entries gets its used elements overwritten.
        self.exact &= self.layout.packed || self.last_avail.wrapping_sub(self.used) <= self.size;
    }

    /// Descriptors of a packed ring that the driver has made available from `at` on.
    fn room(&self, at: u16) -> u16 {
        let mut room = self.size;
        let mut position = self.published;
        while position != at && room > 0 {
            position = model::advance_packed(position, 1, self.size);
            room -= 1;
        }
        room
    }

    fn advance(&self, position: u16, by: u16) -> u16 {
        if self.layout.packed {
            model::advance_packed(position, by, self.size)
        } else {
            position.wrapping_add(by)
        }
    }

    /// Checks what was returned, and what was written in the visit.
    pub(super) fn look_at_used_and_writes(&mut self) {
        let done = self.queue.control().requests().0;
        let mut writes = Writes::default();
        let came_back = done - self.done;
        self.done = done;
        for _ in 0..came_back {
            let (id, len) = self.used_element(&mut writes);
            trace(&|| format!("back at {:#x}: {id}, {len}", self.used));
            let found = self.outstanding.iter().position(|chain| chain.id == id);
            let found = found.unwrap_or_else(|| panic!("{id} came back and was not taken"));
            let chain = self.outstanding.remove(found);
            let twin = |other: &Chain| other.id == id && *other != chain;
            if self.outstanding.iter().any(twin) {
                // A guest may give one id to two chains: which of them is returned is unknown.
                self.exact = false;
                return;
            }
            let most = chain.writable_bytes();
            assert!(len as usize <= most.max(1), "says to have written {len} of {most}");
            let by = if self.layout.packed { chain.span } else { 1 };
            self.used = self.advance(self.used, by);
            match D::answer(&chain) {
                Some(places) => {
                    places.iter().for_each(|place| writes.byte(*place));
                    writes.answers.push(places);
                }
                None => D::refused(&chain).into_iter().for_each(|place| writes.byte(place)),
            }
            writes.data(D::data(&chain));
        }
        if !self.layout.packed && came_back > 0 {
            let index = self.stage.guest.u16_now(ADDRS.used as usize + 2);
            assert_eq!(index, self.used, "the used index");
        }
        self.outstanding.iter().for_each(|chain| writes.data(D::data(chain)));
        self.allow_events(&mut writes);
        self.compare(&writes);
    }

    /// The next used element: id and length.
    fn used_element(&self, writes: &mut Writes) -> (u16, u32) {
        let guest = &self.stage.guest;
        let index = usize::from(self.used & 0x7fff) % usize::from(self.size);
        let (at, len) = if self.layout.packed {
            (16 * index + 8, 8)
        } else {
            let index = usize::from(self.used) % usize::from(self.size);
            (ADDRS.used as usize + 4 + 8 * index, 8)
        };
        writes.ranges.push((0, at..at + len));
        let half = |n: usize| guest.u16_now(at + 2 * n);
        let word = |n: usize| u32::from(half(n)) | u32::from(half(n + 1)) << 16;
        if self.layout.packed {
            let (flags, wrap) = (half(3), self.used & 0x8000 != 0);
            let state = if wrap { 0x8080 } else { 0 };
            assert_eq!(flags & 0x8080, state, "a used descriptor's flags");
            (half(2), word(0))
        } else {
            assert!(word(0) <= u32::from(u16::MAX));
            (half(0), word(2))
        }
    }

    fn allow_events(&self, writes: &mut Writes) {
        let used = ADDRS.used as usize;
        let size = usize::from(self.size);
        writes.ranges.push((0, used..used + 4));
        if !self.layout.packed {
            let event = used + 4 + 8 * size;
            writes.ranges.push((0, event..event + 2));
        }
    }

    fn compare(&self, writes: &Writes) {
        let guest = &self.stage.guest;
        let mut marked = [0; LOG_BYTES];
        let logged = self.shown.log && self.is_model;
        if logged {
            self.stage.log.1.read_exact_at(&mut marked, 0).expect("a memfd");
        }
        guest.changed(|place, now| {
            let allowed = writes.ranges.iter().any(|(file, range)| within(place, *file, range));
            assert!(allowed, "a write to {place:x?}, now {now:#x}");
            // For a page of the other table's second file, the page number is ambiguous.
            if logged && (place.file == 0 || place.file == 1 + self.shown.table) {
                let gpa = if place.file == 0 { place.at } else { FILE_BYTES + place.at };
                let page = gpa / PAGE;
                assert!(marked[page / 8] >> (page % 8) & 1 != 0, "page {page} is not marked");
            }
        });
        let is_alone = |place: &Place| {
            let others = writes.ranges.iter().filter(|(file, range)| within(*place, *file, range));
            others.count() == 1
        };
        for places in writes.answers.iter().filter(|places| places.iter().all(is_alone)) {
            let bytes: Vec<_> = places.iter().map(|place| guest.byte_now(*place)).collect();
            D::check(&bytes);
        }
    }

    pub(super) fn look_at_state(&mut self) {
        assert!(self.queue.control().inflight() <= 256);
        let broken = self.queue.control().state() == QueueState::Broken;
        if broken && !self.broken && self.exact {
            let (guest, table) = (&self.stage.guest, self.shown.table);
            let at = self.last_avail;
            let sense = if self.layout.packed {
                let room = self.room(at);
                !matches!(model::packed(guest, table, self.size, at, room), Taken::Nonsense)
            } else {
                let index = u16::from_le_bytes(guest.remembered(0, ADDRS.avail + 2));
                index.wrapping_sub(at) <= self.size
            };
            assert!(!sense, "broken for no reason");
        }
        self.broken |= broken;
    }
}

/// The places that a visit may write.
#[derive(Default)]
struct Writes {
    ranges: Vec<(usize, Range<usize>)>,
    /// The places where answers must be.
    answers: Vec<Vec<Place>>,
}

impl Writes {
    fn byte(&mut self, Place { file, at }: Place) {
        self.ranges.push((file, at..at + 1));
    }

    fn data<'p>(&mut self, pieces: impl IntoIterator<Item = &'p model::Piece>) {
        for piece in pieces {
            self.ranges.push((piece.place.file, piece.place.at..piece.place.at + piece.len));
        }
    }
}
