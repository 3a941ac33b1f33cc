//! The layout of requests, responses, task management functions and events (virtio 1.2, section
//! 5.6.6). Numbers are little-endian.

use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_S_ABORTED, VIRTIO_SCSI_S_BAD_TARGET, VIRTIO_SCSI_S_BUSY, VIRTIO_SCSI_S_FAILURE,
    VIRTIO_SCSI_S_FUNCTION_REJECTED, VIRTIO_SCSI_S_FUNCTION_SUCCEEDED, VIRTIO_SCSI_S_INCORRECT_LUN,
    VIRTIO_SCSI_S_OK, VIRTIO_SCSI_S_OVERRUN, VIRTIO_SCSI_S_RESET,
};

/// Bytes of a CDB in a request: the default of `cdb_size`. The back end never gets another value:
/// QEMU exits if a driver writes one.
pub(crate) const CDB_BYTES: usize = 32;
/// Bytes of a request's header, without the fields of T10_PI, which is not offered.
pub(crate) const HEADER_BYTES: usize = 19 + CDB_BYTES;
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

/// The header of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Header {
    pub(crate) lun: [u8; 8],
    /// Identifies the command to task management functions.
    pub(crate) tag: u64,
    pub(crate) cdb: [u8; CDB_BYTES],
}

impl Header {
    /// Decodes a header. The task attribute, the priority and the CRN are not used: commands are
    /// independent of one another.
    #[inline]
    pub(crate) fn of(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self { lun: take(bytes, 0), tag: u64::from_le_bytes(take(bytes, 8)), cdb: take(bytes, 19) }
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
