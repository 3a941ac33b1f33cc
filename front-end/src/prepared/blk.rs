//! The form of virtio-blk's requests (virtio 1.2, section 5.2.6).

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::form::{Form, Head, Place};
use crate::request::{HEAD_BYTES, HEADER_BYTES, STATUS_AT, STATUS_OK, STATUS_UNWRITTEN};

/// The form of virtio-blk's requests: header, data, status byte.
#[derive(Clone, Copy, Debug)]
pub struct Blk;

impl Form for Blk {
    type Head<'a> = BlkHead<'a>;

    const PLACE_BYTES: u32 = HEAD_BYTES;
    const HEADER_AT: usize = 0;
    const HEADER_BYTES: u32 = HEADER_BYTES;
    const ANSWER_AT: usize = STATUS_AT;
    const ANSWER_BYTES: u32 = 1;
    const ANSWER_FIRST: bool = false;

    fn head<'a>(&self, place: Place<'a>, _: usize, _: u32) -> BlkHead<'a> {
        let Place { words, bytes } = place;
        let head = BlkHead { kind: &words[0], sector: &words[1], status: &bytes[STATUS_AT] };
        head.set_kind(false);
        head.status.store(STATUS_UNWRITTEN, Ordering::Relaxed);
        head
    }
}

/// A request's header and status byte.
#[derive(Clone, Copy, Debug)]
pub struct BlkHead<'a> {
    kind: &'a AtomicU64,
    sector: &'a AtomicU64,
    status: &'a AtomicU8,
}

impl Head for BlkHead<'_> {
    type Status = u8;

    const OK: u8 = STATUS_OK;
    const UNWRITTEN: u8 = STATUS_UNWRITTEN;

    #[inline]
    fn set_kind(&self, write: bool) {
        self.kind.store(u64::from(write), Ordering::Relaxed);
    }

    #[inline]
    fn set_sector(&self, sector: u64) {
        self.sector.store(sector, Ordering::Relaxed);
    }

    fn sector(&self) -> u64 {
        self.sector.load(Ordering::Relaxed)
    }

    #[inline]
    fn take_status(&self) -> u8 {
        let written = self.status.load(Ordering::Relaxed);
        self.status.store(STATUS_UNWRITTEN, Ordering::Relaxed);
        written
    }

    fn describe(&self, status: u8) -> String {
        format!("status {status}")
    }
}

#[cfg(test)]
mod tests {
    use crate::guest::GuestRam;
    use crate::prepared::Slots;

    use super::*;

    #[test]
    fn the_device_reads_the_head_and_its_status_is_taken_once() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let slots = Slots::new(&ram, 2, 512, 512, false).unwrap();
        let head = slots.heads().nth(1).unwrap();
        head.set_kind(true);
        head.set_sector(0x0102);
        let header = slots.descriptors(1, true).next().unwrap().addr;
        let mut bytes = [0; 17];
        ram.read(header, &mut bytes).unwrap();
        let mut expected = [0; 17];
        (expected[0], expected[8], expected[9], expected[16]) = (1, 2, 1, STATUS_UNWRITTEN);
        assert_eq!(bytes, expected);
        ram.write(header + 16, &[0]).unwrap();
        assert_eq!((head.take_status(), head.take_status()), (0, STATUS_UNWRITTEN));
    }
}
