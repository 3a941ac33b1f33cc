//! An I/O, and how it ends.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

pub use guest_memory::Segment;

/// Names one I/O among those outstanding on a channel. The caller picks it, below the `depth`
/// that it opened the channel with, and does not reuse it until the I/O has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u16);

/// What an [`Io`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Device to memory.
    Read,
    /// Memory to device.
    Write,
    /// Makes completed writes durable. Has no range and no segments.
    Flush,
    /// Tells the device that a range is unused. What it reads afterwards is the device's choice.
    Unmap,
    /// Makes a range read as zeroes. Has no segments.
    WriteZeroes,
}

/// How many values [`Op`] has.
pub const OPS: usize = 5;

/// How an [`Io`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All of it was done.
    Ok,
    /// It failed, or was done in part.
    IoError,
    /// The device has no such operation.
    Unsupported,
}

/// One operation on a block device.
///
/// The range is in bytes, a multiple of the device's block size, and lies within the device as
/// its size was when the I/O was made. For reads and writes the segments add up to `len`.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// What to do.
    pub op: Op,
    /// Comes back with the completion.
    pub tag: Tag,
    /// Byte offset on the device.
    pub offset: u64,
    /// Length in bytes; 0 for a flush.
    pub len: u64,
    /// Of [`Op::WriteZeroes`]: the device may give up the space of the range.
    pub may_unmap: bool,
    segments: *const Segment,
    segment_count: u32,
}

// SAFETY: the pointer is only followed by a channel's owner, under the contract of
// `Channel::submit`; moving the value to another thread follows nothing.
unsafe impl Send for Io {}

impl Io {
    /// A read or write of the range `offset..offset + len` from or to `segments`.
    #[must_use]
    pub fn rw(op: Op, tag: Tag, offset: u64, len: u64, segments: &[Segment]) -> Self {
        debug_assert!(matches!(op, Op::Read | Op::Write));
        debug_assert_eq!(len, segments.iter().map(|s| s.len() as u64).sum::<u64>());
        let segment_count = segments.len() as u32;
        let (segments, may_unmap) = (segments.as_ptr(), false);
        Self { op, tag, offset, len, may_unmap, segments, segment_count }
    }

    /// An operation without data: flush, unmap or write-zeroes.
    #[must_use]
    pub fn plain(op: Op, tag: Tag, offset: u64, len: u64) -> Self {
        debug_assert!(!matches!(op, Op::Read | Op::Write));
        let (segments, segment_count) = (std::ptr::null(), 0);
        Self { op, tag, offset, len, may_unmap: false, segments, segment_count }
    }

    /// The same, with [`Io::may_unmap`] as given.
    #[must_use]
    pub fn unmapping(self, may_unmap: bool) -> Self {
        Self { may_unmap, ..self }
    }

    /// The segments, as an array for the kernel (`readv`, io_uring).
    #[must_use]
    pub fn iovecs(&self) -> (*const libc::iovec, u32) {
        (self.segments.cast(), self.segment_count)
    }

    /// The segments.
    ///
    /// # Safety
    /// The array that this I/O was made with is still alive: true from submit to completion.
    #[must_use]
    pub unsafe fn segments(&self) -> &[Segment] {
        if self.segment_count == 0 {
            return &[];
        }
        // SAFETY: the caller vouches for the array; pointer and count came from one slice.
        unsafe { std::slice::from_raw_parts(self.segments, self.segment_count as usize) }
    }
}

/// What [`Channel::submit`] did with an I/O.
#[derive(Debug)]
#[must_use]
pub enum Submit {
    /// It is done. [`Channel::poll`] will not report it again.
    Done(Status),
    /// It will come out of [`Channel::poll`].
    Queued,
    /// The channel is full and took nothing: try again after a completion.
    Full(Io),
}

/// An I/O that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The I/O's tag.
    pub tag: Tag,
    /// How it ended.
    pub status: Status,
}
