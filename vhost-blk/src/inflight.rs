//! In-flight tracking: which requests a queue has taken and not finished, in memory that outlives
//! this process ("Inflight I/O tracking" in the vhost-user specification).
#![expect(unsafe_code, reason = "the area is shared with the front end")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::foreign::ForeignFd;
use crate::reclaim::Unmapper;
use crate::ring::Desc;
use crate::shared_file::{self, SharedFile};

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD say of an area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AreaSpec {
    /// Its length in bytes.
    pub mmap_size: u64,
    /// Where it begins in its file.
    pub mmap_offset: u64,
    /// Queues that it has room for.
    pub num_queues: u16,
    /// Descriptors of each of them.
    pub queue_size: u16,
}

/// Why an area was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// no queue or no descriptor, or more than there can be
    #[error("an in-flight area for {0} queues of {1}")]
    Count(u16, u16),
    /// shorter than its queues need
    #[error("an in-flight area of {have} bytes, its queues need {want}")]
    Short {
        /// Its length.
        have: u64,
        /// What its queues need.
        want: u64,
    },
    /// the file does not do
    #[error("in-flight area: {0}")]
    File(#[from] shared_file::Error),
    /// the system has no memory to share
    #[error("in-flight area: {0}")]
    System(#[from] io::Error),
}

/// An in-flight area, mapped.
#[derive(Debug)]
pub struct Area {
    file: SharedFile,
    spec: AreaSpec,
    packed: bool,
}

impl Area {
    /// Makes an area for GET_INFLIGHT_FD: all zeroes but for what the specification has a back end
    /// set up (packed: free list and wrap counters). The fd is for the front end, which hands it
    /// back with SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// Counts out of range, or no memory.
    pub fn create(
        num_queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<(AreaSpec, OwnedFd), Error> {
        let _ = packed;
        Err(Error::Count(num_queues, queue_size))
    }

    /// Maps the area of SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// Counts out of range, or a file that does not do.
    pub fn map(
        spec: AreaSpec,
        packed: bool,
        fd: &ForeignFd,
        unmapper: &Unmapper,
    ) -> Result<Self, Error> {
        let file = SharedFile::map(fd, spec.mmap_offset, spec.mmap_size, unmapper)?;
        Ok(Self { file, spec, packed })
    }

    /// Whether it is for packed rings.
    #[must_use]
    pub fn packed(&self) -> bool {
        self.packed
    }

    /// Descriptors of each queue.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.spec.queue_size
    }

    /// Queues that it has room for.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        self.spec.num_queues
    }
}

/// Where a queue goes on, and what it has to do again first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Position of the used ring to go on at.
    pub used: u16,
    /// Position of the available ring to go on at: after what is to be done again.
    pub last_avail: u16,
    /// Entries to be done again, oldest first. Split: heads. Packed: entries of the area.
    pub again: Vec<u16>,
}

/// The tracking of one queue, kept by its owner.
#[derive(Debug)]
pub struct Tracker {
    area: Arc<Area>,
}

impl Tracker {
    /// Begins to track a split queue whose used index, in its ring, is `used_idx`.
    /// `None` if the area has no room for it.
    pub fn split(
        area: &Arc<Area>,
        queue: usize,
        size: u16,
        used_idx: u16,
    ) -> Option<(Self, Recovery)> {
        let _ = (queue, size);
        let recovery = Recovery { used: used_idx, last_avail: used_idx, again: vec![] };
        Some((Self { area: Arc::clone(area) }, recovery))
    }

    /// Begins to track a packed queue. `base` is the position that the front end gave, which counts
    /// if the area is fresh; `flags` reads the flags of the descriptor at a position's index.
    /// `None` if the area has no room for it.
    pub fn packed(
        area: &Arc<Area>,
        queue: usize,
        size: u16,
        base: u16,
        flags: impl Fn(u16) -> u16,
    ) -> Option<(Self, Recovery)> {
        let _ = (queue, size, flags);
        let recovery = Recovery { used: base, last_avail: base, again: vec![] };
        Some((Self { area: Arc::clone(area) }, recovery))
    }

    /// Split: the chain at `head` was taken from the available ring and is about to be submitted.
    pub fn fetched(&mut self, head: u16) {
        let _ = head;
    }

    /// Packed: the chain of `descs`, in the ring's order, was taken and is about to be submitted.
    /// Answers with its entry, `None` if the area's free list is broken or used up.
    pub fn fetched_packed(&mut self, descs: impl Iterator<Item = Desc>) -> Option<u16> {
        let _ = descs;
        None
    }

    /// The request of `entry` (split: head) was put into the used ring, not yet published.
    pub fn put(&mut self, entry: u16) {
        let _ = entry;
    }

    /// Everything put is about to be published; the next position will be `used`.
    pub fn publishing(&mut self, used: u16) {
        let _ = used;
    }

    /// Everything put has been published, and the next position is `used`.
    pub fn published(&mut self, used: u16) {
        let _ = used;
    }

    /// Packed: calls `visit` with the descriptors of an entry that is to be done again, in order.
    /// `false` if the entry is not in order.
    #[must_use]
    pub fn descs(&self, entry: u16, visit: impl FnMut(Desc)) -> bool {
        let _ = (entry, visit, &self.area);
        false
    }
}
