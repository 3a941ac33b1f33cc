//! The contract between a virtqueue and a block device: what is submitted and what comes back.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use arrayvec::ArrayVec;
use uuid::Uuid;

pub use guest_memory::Segment;

use crate::failure::{Failure, FailureKind};
use crate::shortcut::Shortcut;
use crate::stats::Stats;
use crate::topology::Topology;

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

    /// The [`Failure`] of this I/O, for the log and the counters.
    #[must_use]
    pub fn failed(&self, kind: FailureKind, errno: i32) -> Failure {
        Failure { kind, op: self.op, offset: Some(self.offset), len: self.len, errno }
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

/// The fds that wake the owner of a [`Channel`].
pub type WakeFds<'a> = ArrayVec<BorrowedFd<'a>, 2>;

/// An I/O that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The I/O's tag.
    pub tag: Tag,
    /// How it ended.
    pub status: Status,
}

/// What the owner of a channel with I/O outstanding may do until the next [`Channel::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing else: poll again at once.
    Poll,
    /// Sleep until one of [`Channel::wake_fds`] becomes readable.
    Event,
    /// Sleep until this time, or until the fd becomes readable.
    Until(Instant),
}

impl Wait {
    /// What has to be done to miss neither.
    #[must_use]
    pub fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Poll, _) | (_, Self::Poll) => Self::Poll,
            (Self::Until(one), Self::Until(other)) => Self::Until(one.min(other)),
            (Self::Event, other) | (other, Self::Event) => other,
        }
    }
}

/// The I/O path to one [`Bdev`], for one owner.
///
/// The implementer owes: no lock, no allocation, no wait, no address-space call in any method;
/// bounds that hold even if the device was resized meanwhile (an I/O past the end is
/// [`Status::IoError`]); a short transfer is [`Status::IoError`]; every queued I/O is reported
/// exactly once. It may rely on at most `depth` I/Os being outstanding with distinct tags below
/// `depth`, where `depth` is what [`Bdev::open`] was given.
///
/// Dropping a channel happens off the reactors, when nothing is outstanding on it.
pub trait Channel: Send {
    /// Starts `io`.
    ///
    /// # Safety
    /// If the answer is [`Submit::Queued`], the segment array and the memory that it names stay
    /// valid until `poll` has reported the I/O; otherwise, until this returns.
    unsafe fn submit(&mut self, io: Io) -> Submit;

    /// What the owner may do itself instead of calling `submit`, which stays the complete way.
    fn shortcut(&self) -> Shortcut {
        Shortcut::None
    }

    /// The fds that signal completions, for edge-triggered polling: one of them gets a new event
    /// whenever `poll` may have something to report. Empty if [`Channel::wait`] never answers
    /// [`Wait::Event`] while I/O is outstanding. The fds do not change while the channel lives.
    fn wake_fds(&self) -> WakeFds<'_> {
        WakeFds::new()
    }

    /// Sets whether the owner may sleep; if not, the channel may omit signals on its
    /// [`wake_fds`](Self::wake_fds). The initial value is true. Never called on a reactor.
    fn set_wakes(&mut self, _wakes: bool) {}

    /// What to do until the next `poll`, for an owner that would rather sleep. Only asked while
    /// I/O is outstanding, after a `poll` that found nothing.
    fn wait(&self) -> Wait {
        Wait::Poll
    }

    /// Why the I/O of `tag` failed, if known. The owner asks once for each I/O that did not end
    /// with [`Status::Ok`], before it uses the tag again.
    fn failure(&mut self, _tag: Tag) -> Option<Failure> {
        None
    }

    /// Tells the device about what was queued since the last call. Called once per visit, after
    /// the submits and before the poll, so that a batch costs one system call.
    fn kick(&mut self) {}

    /// Fills `done` from the front with I/Os that have ended and returns how many; the rest
    /// comes with the next call. Costs next to nothing when there is none.
    fn poll(&mut self, done: &mut [Completion]) -> usize;

    /// The data of outstanding I/Os is not wanted any more, and their memory may have another
    /// owner. From now on the channel itself begins no copy, and need not start what it has not
    /// started; what is under way, a copy of some KiB by another thread included, ends as the kernel's
    /// transfers do. It still reports every I/O, with any status. Nothing is submitted after this.
    fn abandon(&mut self) {}
}

/// What holds a device's bytes, as the kernel identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A regular file.
    File {
        /// The device of its file system.
        device: u64,
        /// Its inode there.
        inode: u64,
    },
    /// A block device, by its number.
    BlockDevice(u64),
}

/// Called, on any thread and with no lock held, when a [`Lease`] that was asked for may be held.
pub type Granted = Arc<dyn Fn() + Send + Sync>;

/// Keeps other processes from a device's storage while rings use it.
///
/// Whoever lets I/O start adds a user first, waits until the lease is held, and removes the user
/// when all of that I/O has ended. The implementer owes: no method waits, nor makes a system call
/// that can; `granted` is called after the lease has become held, unless its user was removed.
pub trait Lease: fmt::Debug + Send + Sync {
    /// Adds a user. Returns whether the lease is held; if not, calls `granted` when it is.
    fn add_user(&self, granted: &Granted) -> bool;
    /// Removes a user. The last one gives the storage back.
    fn remove_user(&self);
    /// Whether I/O may start.
    fn is_held(&self) -> bool;
}

impl Storage {
    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(self) -> bool {
        matches!(self, Self::BlockDevice(_))
    }
}

/// What a device can do, beyond reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Writes are refused.
    pub read_only: bool,
    /// [`Op::Flush`] works.
    pub flush: bool,
    /// [`Op::Unmap`] works.
    pub unmap: bool,
    /// [`Op::WriteZeroes`] works.
    pub write_zeroes: bool,
    /// SPDK's `supported_io_types.reset`; told to the operator and not used by us.
    pub reset: bool,
    /// Segments need no alignment for full speed (SPDK: buffer alignment 1). Otherwise requests
    /// with segments that are not aligned to the block size work too, but take a slower way.
    pub any_alignment: bool,
}

/// A block device.
///
/// Kept in an `Arc`; each channel holds one, so that the last user's drop frees the device.
pub trait Bdev: Send + Sync + 'static {
    /// The name that the operator gave.
    fn name(&self) -> &str;
    /// SPDK's name for this kind of device, such as "Malloc disk".
    fn product_name(&self) -> &'static str;
    /// Its identity.
    fn uuid(&self) -> Uuid;
    /// Bytes in a block: a power of two, 512 or more.
    fn block_size(&self) -> u32;
    /// Number of blocks. Changes when the device is resized.
    fn num_blocks(&self) -> u64;
    /// What it can do. Does not change.
    fn features(&self) -> Features;
    /// Which I/Os suit it. Does not change; a wrapper passes its base's on.
    fn topology(&self) -> Topology {
        Topology::default()
    }
    /// What stores its data, where other bdevs may use the same.
    fn storage(&self) -> Option<Storage> {
        None
    }
    /// The bdevs that this one is built on; none if it stores the data itself.
    fn bases(&self) -> &[Arc<dyn Bdev>] {
        &[]
    }
    /// What keeps other processes from its storage; `None` if nothing does, or if it has bases:
    /// then theirs count.
    fn lease(&self) -> Option<Arc<dyn Lease>> {
        None
    }
    /// Counters of this device, over all its channels, kept by the channels' owners.
    fn stats(&self) -> &Stats;

    /// Makes the I/O path for one owner who will have at most `depth` I/Os outstanding.
    ///
    /// # Errors
    /// The system's error: no memory, too many open files, …
    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error>;

    /// Size in bytes.
    fn size_bytes(&self) -> u64 {
        self.num_blocks().saturating_mul(u64::from(self.block_size()))
    }
}

/// Why a device could not be made, opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a parameter is out of range, with the reason
    #[error("{0}")]
    Invalid(String),
    /// not enough memory
    #[error("not enough memory: {0}")]
    NoMemory(String),
    /// the device or its base does not exist
    #[error("no such device: {0}")]
    NoDevice(String),
    /// in use
    #[error("busy: {0}")]
    Busy(String),
    /// the operation is not supported on this device
    #[error("not supported: {0}")]
    Unsupported(String),
    /// a system call failed, with what it was about
    #[error("{what}: {source}")]
    System {
        /// The thing, such as a file name.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// The errno that SPDK's RPC answers with, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid(_) => libc::EINVAL,
            Self::NoMemory(_) => libc::ENOMEM,
            Self::NoDevice(_) => libc::ENODEV,
            Self::Busy(_) => libc::EBUSY,
            Self::Unsupported(_) => libc::EOPNOTSUPP,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
