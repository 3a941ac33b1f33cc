//! The contract between a virtqueue and a block device.
#![expect(unsafe_code, reason = "an I/O carries addresses in a guest's memory")]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use uuid::Uuid;

use crate::error::Error;
use crate::failure::Failure;
use crate::io::{Completion, Io, Submit, Tag};
use crate::qos::{Limiting, Qos};
use crate::shortcut::Shortcut;
use crate::stats::Stats;
use crate::topology::Topology;

/// The fds that wake the owner of a [`Channel`].
pub type WakeFds<'a> = ArrayVec<BorrowedFd<'a>, 2>;

/// The ways in which the owner of a channel with outstanding I/O may wait until the next
/// [`Channel::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// No wait: poll again at once.
    Poll,
    /// Sleep until one of [`Channel::wake_fds`] becomes readable.
    Event,
    /// Sleep until this time, or until the fd becomes readable.
    Until(Instant),
}

impl Wait {
    /// Returns the wait that misses neither event.
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
/// Obligations of the implementer. No method takes a lock, allocates, waits, or makes an
/// address-space call. The checks of bounds hold even if the device was resized meanwhile: an I/O
/// past the end is [`Status::IoError`]. A short transfer is [`Status::IoError`]. Every queued I/O
/// is reported exactly once. The implementer may rely on at most `depth` outstanding I/Os, with
/// distinct tags below `depth`, the value that [`Bdev::open`] was given.
///
/// A channel is dropped outside of the reactors, with no I/O outstanding.
///
/// [`Status::IoError`]: crate::Status::IoError
pub trait Channel: Send {
    /// Starts `io`.
    ///
    /// # Safety
    /// If the result is [`Submit::Queued`], the segment array and the memory that it names stay
    /// valid until `poll` has reported the I/O; otherwise, until this returns.
    unsafe fn submit(&mut self, io: Io) -> Submit;

    /// Returns the I/O that the owner may do itself. `submit` accepts that I/O as well.
    fn shortcut(&self) -> Shortcut {
        Shortcut::None
    }

    /// The fds that signal completions, for edge-triggered polling: one of them gets a new event
    /// whenever `poll` may have a completion to report. Empty if [`Channel::wait`] never returns
    /// [`Wait::Event`] while I/O is outstanding. The fds do not change while the channel exists.
    fn wake_fds(&self) -> WakeFds<'_> {
        WakeFds::new()
    }

    /// Sets whether the owner may sleep; if not, the channel may omit signals on its
    /// [`wake_fds`](Self::wake_fds). The initial value is true. Never called on a reactor.
    fn set_wakes(&mut self, _wakes: bool) {}

    /// Returns the way in which an owner that wants to sleep may wait for the next `poll`. Called
    /// only while I/O is outstanding, after a `poll` that found no completion.
    fn wait(&self) -> Wait {
        Wait::Poll
    }

    /// Sets how the rate limits of this channel's bdev and of its bases treat its I/O. Called again
    /// when limits are set or removed. A module with bases forwards the call to the
    /// [`BdevChannel`](crate::BdevChannel) of each; other modules keep the default. The call
    /// invalidates shortcuts that were returned before.
    fn set_limiting(&mut self, _limiting: Limiting) {}

    /// Returns the reason for which the I/O of `tag` failed, if known. The owner calls this once
    /// for each I/O that did not end with [`Status::Ok`], before it reuses the tag.
    ///
    /// [`Status::Ok`]: crate::Status::Ok
    fn failure(&mut self, _tag: Tag) -> Option<Failure> {
        None
    }

    /// Submits the I/Os that were queued since the last call to the device. Called once per visit,
    /// after the submits and before the poll, so that a batch costs one system call.
    fn kick(&mut self) {}

    /// Fills `done` from the front with I/Os that have ended, and returns their number. The next
    /// call returns the rest. Costs almost nothing when no I/O has ended.
    fn poll(&mut self, done: &mut [Completion]) -> usize;

    /// Abandons the outstanding I/Os: their data is not needed any more, and their memory may get
    /// another owner. From now on, the channel itself begins no copy, and need not start the I/Os
    /// that it has not started. I/O under way, including a copy of some KiB by another thread, ends
    /// like the kernel's transfers. The channel still reports every I/O, with any status. The owner
    /// submits no I/O after this call.
    fn abandon(&mut self) {}
}

/// The storage of a device's data, as the kernel identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A regular file.
    File {
        /// The device number of its file system.
        device: u64,
        /// Its inode number.
        inode: u64,
    },
    /// A block device, by its device number.
    BlockDevice(u64),
}

/// What is known about the data at the beginning of a range, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The number of bytes that this holds for: at least 1, at most the length of the range.
    pub len: u64,
    /// Whether they take space. If not, they read as zeroes.
    pub allocated: bool,
}

/// Called when a [`Lease`] that a user waits for may be held, on any thread and with no lock held.
pub type Granted = Arc<dyn Fn() + Send + Sync>;

/// Keeps other processes from a device's storage while rings use it.
///
/// A user that lets I/O start calls `add_user` first, waits until the lease is held, and calls
/// `remove_user` when all of that I/O has ended. Obligations of the implementer: no method waits or
/// makes a system call that can wait; `granted` is called after the lease has become held, unless
/// its user was removed.
pub trait Lease: fmt::Debug + Send + Sync {
    /// Adds a user. Returns whether the lease is held. If not, calls `granted` when it is.
    fn add_user(&self, granted: &Granted) -> bool;
    /// Removes a user. Removing the last user releases the lease.
    fn remove_user(&self);
    /// Returns whether I/O may start.
    fn is_held(&self) -> bool;
}

impl Storage {
    /// Returns whether it is a block device.
    #[must_use]
    pub fn is_block_device(self) -> bool {
        matches!(self, Self::BlockDevice(_))
    }
}

/// The operations that a device supports besides reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Writes are refused.
    pub read_only: bool,
    /// [`Op::Flush`] is supported.
    ///
    /// [`Op::Flush`]: crate::Op::Flush
    pub flush: bool,
    /// [`Op::Unmap`] is supported.
    ///
    /// [`Op::Unmap`]: crate::Op::Unmap
    pub unmap: bool,
    /// [`Op::WriteZeroes`] is supported.
    ///
    /// [`Op::WriteZeroes`]: crate::Op::WriteZeroes
    pub write_zeroes: bool,
    /// SPDK's `supported_io_types.reset`. It is shown to the operator and has no other effect.
    pub reset: bool,
    /// Segments need no alignment for full speed (SPDK: buffer alignment 1). Otherwise, requests
    /// with segments that are not aligned to the block size also work, but are slower.
    pub any_alignment: bool,
}

/// A block device.
///
/// Kept in an `Arc`. Each channel holds a reference, so that dropping the last one frees the
/// device.
pub trait Bdev: Send + Sync + 'static {
    /// The name that the operator gave.
    fn name(&self) -> &str;
    /// SPDK's name for this kind of device, such as "Malloc disk".
    fn product_name(&self) -> &'static str;
    /// The bdev's UUID.
    fn uuid(&self) -> Uuid;
    /// The number of bytes in a block: a power of two, 512 or more.
    fn block_size(&self) -> u32;
    /// The number of blocks. It changes when the device is resized.
    fn num_blocks(&self) -> u64;
    /// The supported operations. They do not change.
    fn features(&self) -> Features;
    /// The preferred I/O sizes. They do not change; a wrapper returns those of its base.
    fn topology(&self) -> Topology {
        Topology::default()
    }
    /// The storage of its data, if other bdevs could use the same storage.
    fn storage(&self) -> Option<Storage> {
        None
    }
    /// The bdevs that this one is built on. Empty if it stores the data itself. Never called on a
    /// reactor.
    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        vec![]
    }
    /// The position in its only base, in bytes, of its first byte, if its bytes follow one another
    /// there. `None`: an access may go anywhere on the bases.
    fn base_offset(&self) -> Option<u64> {
        None
    }
    /// The lease that keeps other processes from its storage. `None` if there is no such lease, or
    /// if the bdev has bases, whose leases then apply.
    fn lease(&self) -> Option<Arc<dyn Lease>> {
        None
    }
    /// The longest time that the deletion of the bdev waits for I/O under way. `None`: it waits
    /// until that I/O has ended. After this time, the deletion is reported as done, and the bdev is
    /// freed when its I/O has ended.
    fn deletion_limit(&self) -> Option<Duration> {
        self.bases().iter().filter_map(|base| base.deletion_limit()).max()
    }
    /// Returns what is known about the first bytes of a range, which is not empty and within the
    /// device. May block. By default, everything is allocated.
    ///
    /// # Errors
    /// The system's error.
    fn extent(&self, _offset: u64, len: u64) -> Result<Extent, Error> {
        Ok(Extent { len, allocated: true })
    }
    /// The counters of this device over all its channels. The channels' owners update them.
    fn stats(&self) -> &Stats;
    /// The rate limits of this device. [`BdevChannel`](crate::BdevChannel) applies them.
    fn qos(&self) -> &Qos;

    /// Opens the module's channel for one owner, which will have at most `depth` I/Os outstanding.
    /// The users of a bdev call [`BdevChannel::open`] instead, which also applies the rate limits.
    ///
    /// # Errors
    /// The system's error: no memory, too many open files, …
    ///
    /// [`BdevChannel::open`]: crate::BdevChannel::open
    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error>;

    /// The size in bytes.
    fn size_bytes(&self) -> u64 {
        self.num_blocks().saturating_mul(u64::from(self.block_size()))
    }
}

/// Returns a bdev and all bdevs that it is built on.
#[must_use]
pub fn with_bases(bdev: &Arc<dyn Bdev>) -> Vec<Arc<dyn Bdev>> {
    let (mut all, mut left) = (vec![], vec![Arc::clone(bdev)]);
    while let Some(bdev) = left.pop() {
        left.extend(bdev.bases());
        all.push(bdev);
    }
    all
}
