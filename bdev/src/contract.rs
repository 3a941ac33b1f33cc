//! The contract between a virtqueue and a block device.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use arrayvec::ArrayVec;
use uuid::Uuid;

use crate::error::Error;
use crate::failure::Failure;
use crate::io::{Completion, Io, Submit, Tag};
use crate::shortcut::Shortcut;
use crate::stats::Stats;
use crate::topology::Topology;

/// The fds that wake the owner of a [`Channel`].
pub type WakeFds<'a> = ArrayVec<BorrowedFd<'a>, 2>;

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
