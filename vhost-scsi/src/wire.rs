//! The layout of requests, responses, task management functions and events (virtio 1.2, section
//! 5.6.6). Numbers are little-endian.

use scsi::table::CDB_BYTES_MAX;
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_S_ABORTED, VIRTIO_SCSI_S_BAD_TARGET, VIRTIO_SCSI_S_BUSY, VIRTIO_SCSI_S_FAILURE,
    VIRTIO_SCSI_S_FUNCTION_REJECTED, VIRTIO_SCSI_S_FUNCTION_SUCCEEDED, VIRTIO_SCSI_S_INCORRECT_LUN,
    VIRTIO_SCSI_S_OK, VIRTIO_SCSI_S_OVERRUN, VIRTIO_SCSI_S_RESET,
};

/// Bytes of a CDB in a request: the default of `cdb_size`. The back end never gets another value:
/// QEMU exits if a driver writes one.
pub(crate) const CDB_BYTES: usize = 32;
/// Bytes of a request's header, without the fields of T10_PI, which is not offered.
pub(crate) const HEADER_BYTES: usize = CDB_AT + CDB_BYTES;
/// Bytes of the sense data in a response: the default of `sense_size`.
pub(crate) const SENSE_BYTES: usize = 96;
/// Bytes of a response before the sense data.
pub(crate) const RESPONSE_HEAD_BYTES: usize = 12;
/// Bytes of a response.
pub(crate) const RESPONSE_BYTES: usize = RESPONSE_HEAD_BYTES + SENSE_BYTES;

/// Bytes of `struct virtio_scsi_ctrl_tmf` before its response.
pub(crate) const TMF_BYTES: usize = 24;
/// Bytes of `struct virtio_scsi_ctrl_an` before its response.
pub(crate) const AN_BYTES: usize = 16;
/// Bytes of `struct virtio_scsi_event`.
pub(crate) const EVENT_BYTES: usize = 16;

/// The `response` field of requests and of task management functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(clippy::cast_possible_truncation, reason = "the constants are small")]
pub(crate) enum Response {
    /// Also FUNCTION COMPLETE.
    Ok = VIRTIO_SCSI_S_OK as u8,
    Overrun = VIRTIO_SCSI_S_OVERRUN as u8,
    Aborted = VIRTIO_SCSI_S_ABORTED as u8,
    BadTarget = VIRTIO_SCSI_S_BAD_TARGET as u8,
    Reset = VIRTIO_SCSI_S_RESET as u8,
    Busy = VIRTIO_SCSI_S_BUSY as u8,
    Failure = VIRTIO_SCSI_S_FAILURE as u8,
    FunctionSucceeded = VIRTIO_SCSI_S_FUNCTION_SUCCEEDED as u8,
    FunctionRejected = VIRTIO_SCSI_S_FUNCTION_REJECTED as u8,
    IncorrectLun = VIRTIO_SCSI_S_INCORRECT_LUN as u8,
}

/// The addressed logical unit (virtio 1.2, section 5.6.6.1: byte 0 is 1, byte 1 the target, and
/// then a single-level LUN, flat or peripheral).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// The number of the target.
    pub(crate) target: u8,
    /// The LUN.
    pub(crate) lun: u16,
}

impl Address {
    /// Returns the address in a `lun` field. `None` if it names no target, as that of the REPORT
    /// LUNS well-known logical unit.
    #[inline]
    pub(crate) fn of(field: [u8; 8]) -> Option<Self> {
        let [kind, target, high, low, ..] = field;
        let lun = u16::from_be_bytes([high, low]) & 0x3fff;
        (kind == 1).then_some(Self { target, lun })
    }
}

/// The 8-byte words of a header that are decoded: LUN, tag, and the bytes after them in which every
/// known CDB ends.
pub(crate) const HEADER_WORDS: usize = 5;
/// Where the CDB is in a header.
const CDB_AT: usize = 19;

/// The header of a request. The task attribute, the priority and the CRN are not used: commands are
/// independent of one another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Header {
    /// The address of the logical unit.
    pub(crate) lun: [u8; 8],
    /// Identifies the command to task management functions.
    pub(crate) tag: u64,
    /// The CDB. All known ones have at most 16 bytes.
    pub(crate) cdb: [u8; CDB_BYTES_MAX],
}

impl Header {
    /// Decodes a header from its first words.
    #[inline]
    pub(crate) fn of([lun, tag, a, b, c]: [u64; HEADER_WORDS]) -> Self {
        // The CDB begins in byte 3 of `a`.
        const SHIFT: usize = CDB_AT % 8 * 8;
        let cdb =
            u128::from(a) >> SHIFT | u128::from(b) << (64 - SHIFT) | u128::from(c) << (128 - SHIFT);
        Self { lun: lun.to_le_bytes(), tag, cdb: cdb.to_le_bytes() }
    }

    /// Decodes a header from its bytes.
    pub(crate) fn of_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self::of(std::array::from_fn(|n| u64::from_le_bytes(take(bytes, 8 * n))))
    }
}

/// The blocks that a command most likely reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) target: u8,
    pub(crate) lba: u64,
    pub(crate) blocks: u32,
}

/// Operation codes (SBC-3).
const READ_10: u8 = 0x28;
const READ_16: u8 = 0x88;

impl Header {
    /// Returns what a READ(10) or READ(16), the commands of common drivers, is about. Nothing is
    /// validated. Only for prefetching.
    #[inline]
    pub(crate) fn expected_read(&self) -> Option<Expected> {
        let Self { lun: [_, target, ..], cdb, .. } = self;
        let (lba, blocks) = match cdb[0] {
            READ_10 => {
                let blocks = u16::from_be_bytes(take(cdb, 7));
                (u32::from_be_bytes(take(cdb, 2)).into(), blocks.into())
            }
            READ_16 => (u64::from_be_bytes(take(cdb, 2)), u32::from_be_bytes(take(cdb, 10))),
            _ => return None,
        };
        Some(Expected { target: *target, lba, blocks })
    }
}

/// A task management function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tmf {
    pub(crate) subtype: u32,
    pub(crate) lun: [u8; 8],
    pub(crate) tag: u64,
}

impl Tmf {
    /// Decodes `struct virtio_scsi_ctrl_tmf`, without its `type`.
    pub(crate) fn of(bytes: &[u8; TMF_BYTES]) -> Self {
        Self {
            subtype: u32::from_le_bytes(take(bytes, 4)),
            lun: take(bytes, 8),
            tag: u64::from_le_bytes(take(bytes, 16)),
        }
    }
}

/// Returns `N` of the bytes, from byte `at` on.
#[inline]
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    taken.copy_from_slice(&bytes[at..at + N]);
    taken
}

/// Returns `struct virtio_scsi_event`. Byte 2 of its `lun` is 0, as with SPDK.
pub(crate) fn event(event: u32, target: Option<u8>, reason: u32) -> [u8; EVENT_BYTES] {
    let mut bytes = [0; EVENT_BYTES];
    bytes[..4].copy_from_slice(&event.to_le_bytes());
    if let Some(target) = target {
        bytes[4..6].copy_from_slice(&[1, target]);
    }
    bytes[12..].copy_from_slice(&reason.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_parts_in_their_places() {
        let byte = |n| u8::try_from(n).unwrap_or(0);
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(byte);
        let Header { lun, tag, cdb } = Header::of_bytes(&bytes);
        assert_eq!((lun, tag), ([0, 1, 2, 3, 4, 5, 6, 7], 0x0f0e_0d0c_0b0a_0908));
        assert_eq!(cdb, std::array::from_fn(|n| byte(CDB_AT + n)));
    }

    #[test]
    fn read_10_and_read_16_are_decoded_for_prefetching() {
        let expected = |cdb: &[u8]| {
            let mut bytes = [0; HEADER_BYTES];
            bytes[..2].copy_from_slice(&[1, 5]);
            bytes[CDB_AT..][..cdb.len()].copy_from_slice(cdb);
            let read = Header::of_bytes(&bytes).expected_read();
            read.map(|Expected { target, lba, blocks }| (target, lba, blocks))
        };
        assert_eq!(expected(&[0x28, 8, 1, 2, 3, 4, 0, 5, 6]), Some((5, 0x0102_0304, 0x0506)));
        let long = [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(expected(&long), Some((5, 0x0102_0304_0506_0708, 0x090a_0b0c)));
        assert_eq!(expected(&[0x2a, 0, 0, 0, 0, 1, 0, 0, 1]), None);
    }
}
