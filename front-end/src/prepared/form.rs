//! What differs between the prepared requests of the kinds of devices.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64};

/// The form of the requests of one kind of device. A request has a header, data, and an answer, each
/// in descriptors of its own. Header and answer of a request are in one place, so that they share
/// cache lines as with common drivers.
pub trait Form: fmt::Debug + Sized {
    /// The header and the answer of a request.
    type Head<'a>: Head;

    /// Bytes of a request's place: a multiple of a cache line (64).
    const PLACE_BYTES: u32;
    /// Where the header is in the place.
    const HEADER_AT: usize;
    /// Bytes of the header.
    const HEADER_BYTES: u32;
    /// Where the answer is in the place.
    const ANSWER_AT: usize;
    /// Bytes of the answer.
    const ANSWER_BYTES: u32;
    /// The answer is before the data that the device writes, not behind it.
    const ANSWER_FIRST: bool;

    /// Writes the header of a read of `len` bytes into `place`, and marks the answer as not written.
    fn head<'a>(&self, place: Place<'a>, slot: usize, len: u32) -> Self::Head<'a>;
}

/// Bytes of a cache line. The places of requests begin at a multiple of it.
pub(super) const LINE: u32 = 64;

/// The place of a request's header and answer, as words and as bytes.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The memory as words. The first byte is the lowest of the first word.
    pub words: &'a [AtomicU64],
    /// The same memory as bytes.
    pub bytes: &'a [AtomicU8],
}

/// A request's header and answer, for a loop that measures.
pub trait Head: Copy + fmt::Debug {
    /// How a request has completed.
    type Status: Copy + PartialEq + fmt::Debug;

    /// Success.
    const OK: Self::Status;
    /// The device has not written an answer.
    const UNWRITTEN: Self::Status;

    /// Makes the request a read or a write. [`super::Virtqueue::set_kind`] does the same in the
    /// descriptors.
    fn set_kind(&self, write: bool);

    /// Sets the sector of 512 bytes at which the request begins on the disk.
    fn set_sector(&self, sector: u64);

    /// Returns the sector of 512 bytes at which the request begins on the disk.
    fn sector(&self) -> u64;

    /// Returns the status that the device has written, and resets it to the unwritten value.
    fn take_status(&self) -> Self::Status;

    /// Returns whether `status`, the last one taken, is a unit attention: the request was not
    /// executed, and is to be sent again.
    fn is_unit_attention(&self, _status: Self::Status) -> bool {
        false
    }

    /// Returns `status`, the last one taken, as a text: "completed with …".
    fn describe(&self, status: Self::Status) -> String;
}
