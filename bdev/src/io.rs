//! An I/O and its result.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

pub use guest_memory::Segment;

/// Identifies one outstanding I/O of a channel. The caller chooses it, below the `depth` that the
/// channel was opened with, and does not reuse it before the I/O has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u16);

/// The kind of an [`Io`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads from the device to memory.
    Read,
    /// Writes from memory to the device.
    Write,
    /// Makes completed writes durable. Has no range and no segments.
    Flush,
    /// Tells the device that a range is unused. Later reads of the range return data of the
    /// device's choice.
    Unmap,
    /// Makes a range read as zeroes. Has no segments.
    WriteZeroes,
}

/// How many values [`Op`] has.
pub const OPS: usize = 5;

/// The result of an [`Io`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It completed in full.
    Ok,
    /// It failed, or was done in part.
    IoError,
    /// The device does not support the operation.
    Unsupported,
}

/// One operation on a block device.
///
/// The range is in bytes, a multiple of the device's block size. It lies within the device's size
/// at the time when the I/O was made. For reads and writes, the segments' lengths add up to `len`.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// The operation.
    pub op: Op,
    /// The completion has the same tag.
    pub tag: Tag,
    /// Byte offset on the device.
    pub offset: u64,
    /// Length in bytes; 0 for a flush.
    pub len: u64,
    /// For [`Op::WriteZeroes`]: the device may release the space of the range.
    pub may_unmap: bool,
    segments: *const Segment,
    segment_count: u32,
}

// SAFETY: only a channel's owner follows the pointer, under the contract of `Channel::submit`;
// moving the value to another thread follows no pointer.
unsafe impl Send for Io {}

impl Io {
    /// Makes a read or write of the range `offset..offset + len` to or from `segments`.
    #[must_use]
    pub fn rw(op: Op, tag: Tag, offset: u64, len: u64, segments: &[Segment]) -> Self {
        debug_assert!(matches!(op, Op::Read | Op::Write));
        debug_assert_eq!(len, segments.iter().map(|s| s.len() as u64).sum::<u64>());
        #[expect(
            clippy::cast_possible_truncation,
            reason = "`virtqueue` limits a chain to some 1,000 segments"
        )]
        let segment_count = segments.len() as u32;
        let (segments, may_unmap) = (segments.as_ptr(), false);
        Self { op, tag, offset, len, may_unmap, segments, segment_count }
    }

    /// Makes an operation without data: flush, unmap or write-zeroes.
    #[must_use]
    pub fn plain(op: Op, tag: Tag, offset: u64, len: u64) -> Self {
        debug_assert!(!matches!(op, Op::Read | Op::Write));
        let (segments, segment_count) = (std::ptr::null(), 0);
        Self { op, tag, offset, len, may_unmap: false, segments, segment_count }
    }

    /// Sets [`Io::may_unmap`].
    #[must_use]
    pub fn unmapping(self, may_unmap: bool) -> Self {
        Self { may_unmap, ..self }
    }

    /// Returns the segments as an array for the kernel (`readv`, io_uring).
    #[must_use]
    pub fn iovecs(&self) -> (*const libc::iovec, u32) {
        (self.segments.cast(), self.segment_count)
    }

    /// Returns the segments.
    ///
    /// # Safety
    /// The array that this I/O was made with is still valid, as it is from submit to completion.
    #[must_use]
    pub unsafe fn segments(&self) -> &[Segment] {
        if self.segment_count == 0 {
            return &[];
        }
        // SAFETY: the caller guarantees that the array is valid; pointer and count come from one
        // slice.
        unsafe { std::slice::from_raw_parts(self.segments, self.segment_count as usize) }
    }
}

/// The result of [`Channel::submit`].
///
/// [`Channel::submit`]: crate::Channel::submit
#[derive(Debug)]
#[must_use]
pub enum Submit {
    /// The I/O has ended. [`Channel::poll`] does not report it.
    ///
    /// [`Channel::poll`]: crate::Channel::poll
    Done(Status),
    /// [`Channel::poll`] will report the I/O.
    ///
    /// [`Channel::poll`]: crate::Channel::poll
    Queued,
    /// The channel is full and did not take the I/O. Submit it again after a completion.
    Full(Io),
    /// A rate limit refused the I/O. Submit it again at the next poll, or after a millisecond if
    /// the owner sleeps. A channel returns this only after [`Channel::set_limiting`] with
    /// [`Limiting::Apply`], and not after [`Limiting::ChargeOnly`].
    ///
    /// [`Channel::set_limiting`]: crate::Channel::set_limiting
    /// [`Limiting::Apply`]: crate::Limiting::Apply
    /// [`Limiting::ChargeOnly`]: crate::Limiting::ChargeOnly
    Throttled(Io),
}

/// An I/O that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The I/O's tag.
    pub tag: Tag,
    /// The result.
    pub status: Status,
}
