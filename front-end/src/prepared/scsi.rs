//! The form of virtio-scsi's commands (virtio 1.2, section 5.6.6.1): READ(16) and WRITE(16).

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::form::{Form, Head, LINE, Place};
use crate::scsi::{Command, HEADER_BYTES, RESPONSE_BYTES, cdb, code};

/// Operation codes (SBC-3).
const READ_16: u8 = 0x88;
const WRITE_16: u8 = 0x8a;

/// Where Linux has header and response in `struct virtio_scsi_cmd`: behind two pointers, and behind
/// room for a header with T10_PI. They are beside one another, in three cache lines.
const HEADER_AT: usize = 16;
const RESPONSE_AT: usize = HEADER_AT + 59;
const PLACE_BYTES: usize = 192;
const _: () = assert!(PLACE_BYTES == 3 * LINE as usize);

/// The words of the place that hold the operation code and the first 3 bytes of the LBA, and the
/// last 5 bytes of the LBA.
const COMMAND_WORD: usize = 4;
const REST_WORD: usize = 5;
/// Where these fields begin in the words, in bits.
const OPCODE_AT: u32 = 24;
const LBA_AT: u32 = 40;
/// The bits of the LBA in the second word.
const REST_LBA: u64 = (1 << 40) - 1;
/// The opcode is byte 19 of the header, and the LBA is behind it and one more byte.
const _: () = assert!((HEADER_AT + 19) * 8 == COMMAND_WORD * 64 + OPCODE_AT as usize);
const _: () = assert!((HEADER_AT + 21) * 8 == COMMAND_WORD * 64 + LBA_AT as usize);

/// Where the fields of the response are.
const STATUS_AT: usize = RESPONSE_AT + 10;
const CODE_AT: usize = RESPONSE_AT + 11;
const SENSE_AT: usize = RESPONSE_AT + 12;

/// The form of virtio-scsi's commands: header, data-out, response, data-in.
#[derive(Clone, Copy, Debug)]
pub struct Scsi {
    /// The address of the logical unit: see [`crate::scsi::lun`].
    pub lun: [u8; 8],
    /// Bytes of a logical block: a power of two, at least 512.
    pub block_bytes: u32,
}

impl Form for Scsi {
    type Head<'a> = ScsiHead<'a>;

    const PLACE_BYTES: u32 = 3 * LINE;
    const HEADER_AT: usize = HEADER_AT;
    const HEADER_BYTES: u32 = HEADER_BYTES;
    const ANSWER_AT: usize = RESPONSE_AT;
    const ANSWER_BYTES: u32 = RESPONSE_BYTES;
    const ANSWER_FIRST: bool = true;

    fn head<'a>(&self, place: Place<'a>, slot: usize, len: u32) -> ScsiHead<'a> {
        let cdb = cdb::sixteen(READ_16, 0, 0, len / self.block_bytes);
        let header = Command::new(self.lun, slot as u64, cdb).header();
        for (byte, value) in place.bytes[HEADER_AT..].iter().zip(header) {
            byte.store(value, Ordering::Relaxed);
        }
        let whole = "a place has all of its bytes";
        let head = ScsiHead {
            words: place.words.first_chunk().expect(whole),
            bytes: place.bytes.first_chunk().expect(whole),
            shift: (self.block_bytes / 512).trailing_zeros(),
        };
        head.take_status();
        head
    }
}

/// A command's header and response.
#[derive(Clone, Copy, Debug)]
pub struct ScsiHead<'a> {
    words: &'a [AtomicU64; PLACE_BYTES / 8],
    /// The same memory.
    bytes: &'a [AtomicU8; PLACE_BYTES],
    /// A logical block has 2^`shift` sectors.
    shift: u32,
}

impl ScsiHead<'_> {
    /// Returns the sense key of sense data in fixed or descriptor format.
    fn sense_key(&self) -> u8 {
        let byte = |at: usize| self.bytes[SENSE_AT + at].load(Ordering::Relaxed);
        // 72h and 73h are the descriptor format (SPC-4).
        if byte(0) & 0x7e == 0x72 { byte(1) & 0xf } else { byte(2) & 0xf }
    }
}

/// How a command has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiStatus {
    /// One of [`crate::scsi::code`].
    pub response: u8,
    /// The status of SAM.
    pub status: u8,
}

/// CHECK CONDITION (SAM-5): there is sense data.
const CHECK_CONDITION: u8 = 2;
/// The sense key UNIT ATTENTION (SPC-4).
const UNIT_ATTENTION: u8 = 6;

impl ScsiStatus {
    fn has_sense(self) -> bool {
        (self.response, self.status) == (code::OK, CHECK_CONDITION)
    }
}

impl Head for ScsiHead<'_> {
    type Status = ScsiStatus;

    const OK: ScsiStatus = ScsiStatus { response: code::OK, status: 0 };
    const UNWRITTEN: ScsiStatus = ScsiStatus { response: code::UNWRITTEN, status: code::UNWRITTEN };

    #[inline]
    fn set_kind(&self, write: bool) {
        let opcode = if write { WRITE_16 } else { READ_16 };
        let word = &self.words[COMMAND_WORD];
        let others = word.load(Ordering::Relaxed) & !(0xff << OPCODE_AT);
        word.store(others | u64::from(opcode) << OPCODE_AT, Ordering::Relaxed);
    }

    /// The LBA is big-endian and not aligned: its bytes are in two words.
    #[inline]
    fn set_sector(&self, sector: u64) {
        let lba = (sector >> self.shift).swap_bytes();
        let (first, rest) = (&self.words[COMMAND_WORD], &self.words[REST_WORD]);
        let others = first.load(Ordering::Relaxed) & ((1 << LBA_AT) - 1);
        first.store(others | lba << LBA_AT, Ordering::Relaxed);
        let others = rest.load(Ordering::Relaxed) & !REST_LBA;
        rest.store(others | lba >> (64 - LBA_AT), Ordering::Relaxed);
    }

    fn sector(&self) -> u64 {
        let [first, rest] =
            [COMMAND_WORD, REST_WORD].map(|n| self.words[n].load(Ordering::Relaxed));
        let lba = first >> LBA_AT | (rest & REST_LBA) << (64 - LBA_AT);
        lba.swap_bytes() << self.shift
    }

    #[inline]
    fn take_status(&self) -> ScsiStatus {
        let (response, status) = (&self.bytes[CODE_AT], &self.bytes[STATUS_AT]);
        let taken = ScsiStatus {
            response: response.load(Ordering::Relaxed),
            status: status.load(Ordering::Relaxed),
        };
        response.store(code::UNWRITTEN, Ordering::Relaxed);
        status.store(code::UNWRITTEN, Ordering::Relaxed);
        taken
    }

    fn is_unit_attention(&self, status: ScsiStatus) -> bool {
        status.has_sense() && self.sense_key() == UNIT_ATTENTION
    }

    fn describe(&self, status: ScsiStatus) -> String {
        let has_sense = status.has_sense();
        let ScsiStatus { response, status } = status;
        let sense =
            if has_sense { format!(", sense key {}", self.sense_key()) } else { String::new() };
        format!("response {response}, status {status}{sense}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{NEXT, WRITE};
    use crate::guest::GuestRam;
    use crate::prepared::Slots;
    use crate::ring::RingLayout;
    use crate::scsi::lun;

    fn slots(ram: &std::sync::Arc<GuestRam>, block_bytes: u32, indirect: bool) -> Slots<Scsi> {
        let form = Scsi { lun: lun(3, 0), block_bytes };
        Slots::with(form, ram, 3, (8192, 4096), indirect).unwrap()
    }

    /// The header that the device reads.
    fn header(ram: &GuestRam, slots: &Slots<Scsi>, slot: usize) -> [u8; 51] {
        let mut bytes = [0; 51];
        ram.read(slots.descriptors(slot, true).next().unwrap().addr, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_header_is_that_of_the_command() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        for (block_bytes, blocks, shift) in [(512, 16, 0), (4096, 2, 3)] {
            let slots = slots(&ram, block_bytes, false);
            let heads: Vec<_> = slots.heads().collect();
            for (write, lba) in [(false, 0), (true, 0x0102_0304_0506), (false, u64::MAX >> 3)] {
                let head = heads[2];
                head.set_kind(write);
                head.set_sector(lba << shift);
                let opcode = if write { 0x8a } else { 0x88 };
                let cdb = cdb::sixteen(opcode, 0, lba, blocks);
                assert_eq!(header(&ram, &slots, 2), Command::new(lun(3, 0), 2, cdb).header());
                assert_eq!(head.sector(), lba << shift);
                let others = cdb::sixteen(0x88, 0, 0, blocks);
                assert_eq!(header(&ram, &slots, 1), Command::new(lun(3, 0), 1, others).header());
            }
        }
    }

    #[test]
    fn the_response_is_before_data_in_and_behind_data_out() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let slots = slots(&ram, 512, true);
        let described = |write| -> Vec<_> {
            slots.descriptors(1, write).map(|part| (part.len, part.flags)).collect()
        };
        let (out, both) = (NEXT, NEXT | WRITE);
        assert_eq!(described(false), [(51, out), (108, both), (4096, both), (4096, WRITE)]);
        assert_eq!(described(true), [(51, out), (4096, out), (4096, out), (108, WRITE)]);
        let parts: Vec<_> = slots.descriptors(1, false).collect();
        assert_eq!(parts[1].addr - parts[0].addr, 59, "as in Linux");
        assert_eq!(parts[0].addr % 64, 16);
        assert_eq!((parts[2].addr, parts[3].addr), {
            let buffer = slots.buffers()[1].gpa;
            (buffer, buffer + 4096)
        });
        for write in [true, false] {
            let table = slots.lay_table(1, RingLayout::Split, write).unwrap();
            for (i, part) in slots.descriptors(1, write).enumerate() {
                let mut bytes = [0; 16];
                ram.read(table.addr + 16 * i as u64, &mut bytes).unwrap();
                assert_eq!(bytes[..8], part.addr.to_le_bytes());
                assert_eq!(bytes[8..12], part.len.to_le_bytes());
                assert_eq!(bytes[12..14], part.flags.to_le_bytes());
            }
        }
    }

    #[test]
    fn a_status_is_taken_once_and_described() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let slots = slots(&ram, 512, false);
        let head = slots.heads().next().unwrap();
        assert_eq!(head.take_status(), ScsiHead::UNWRITTEN);
        let response = slots.descriptors(0, true).last().unwrap().addr;
        let answer = |bytes: &[u8]| {
            ram.write(response + 10, bytes).unwrap();
            head.describe(head.take_status())
        };
        ram.write(response + 10, &[0, 0]).unwrap();
        assert_eq!(head.take_status(), ScsiHead::OK);
        assert_eq!(head.take_status(), ScsiHead::UNWRITTEN);
        assert_eq!(answer(&[0, 3]), "response 3, status 0");
        assert_eq!(answer(&[2, 0, 0xf0, 0, 0x26]), "response 0, status 2, sense key 6");
        assert_eq!(answer(&[2, 0, 0x72, 0x03, 9]), "response 0, status 2, sense key 3");
        assert_eq!(answer(&[8, 0, 0x72]), "response 0, status 8");
        for (answer, is) in [([2, 0, 0xf0, 0, 6], true), ([2, 0, 0xf0, 0, 5], false)] {
            ram.write(response + 10, &answer).unwrap();
            assert_eq!(head.is_unit_attention(head.take_status()), is);
        }
    }
}
