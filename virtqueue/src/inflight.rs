//! In-flight tracking: which requests a queue has taken and not finished, in memory that outlives
//! this process ("Inflight I/O tracking" in the vhost-user specification).
//!
//! An [`Area`] belongs to a front end, which hands it to every process that serves it: to this one,
//! to the next, and to SPDK's. A [`Tracker`] keeps one queue's part of it, of which `split` and
//! `packed` have the format and the steps. The process may be killed between any two stores, so
//! the order of stores is what matters there; nothing read from an area is trusted.
#![expect(unsafe_code, reason = "the area is shared with the front end")]

#[cfg(test)]
mod crash;
mod packed;
mod region;
mod split;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use closer::ForeignFd;
use guest_memory::{FileError, SharedFile, Unmapper};

use crate::desc::{Desc, RING_SIZE_MAX};

use region::Region;

/// Virtqueues that a device may have: what rte_vhost answers to GET_QUEUE_NUM.
pub const QUEUES_MAX: u16 = 128;

/// The most that an area may need: 128 queues of 4,096 packed descriptors of 32 bytes, or 16 of
/// 32,768, and what each queue's part begins with. The thread that serves every VM begins it, which
/// is some milliseconds for so much.
const AREA_BYTES_MAX: u64 = (16 << 20) + QUEUES_MAX as u64 * REGION_ALIGN_BYTES;
/// Queues' parts begin at multiples of it, as rte_vhost and libvhost-user have it.
const REGION_ALIGN_BYTES: u64 = 64;
/// The one version of the format that there is.
const VERSION: u16 = 1;

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
    #[error("invalid in-flight area: {0} queues of {1} descriptors")]
    Count(u16, u16),
    /// it begins at an odd place in its file
    #[error("invalid in-flight area: offset {0:#x} is not a multiple of {REGION_ALIGN_BYTES}")]
    Alignment(u64),
    /// shorter than its queues need
    #[error("in-flight area is too short: {have} bytes, its queues need {want}")]
    Short {
        /// Its length.
        have: u64,
        /// What its queues need.
        want: u64,
    },
    /// the file does not do
    #[error("in-flight area: {0}")]
    File(#[from] FileError),
    /// the system has no memory to share
    #[error("in-flight area: {0}")]
    System(#[from] io::Error),
}

/// An in-flight area, mapped.
#[derive(Debug)]
pub struct Area {
    file: SharedFile,
    spec: AreaSpec,
    used: AtomicBool,
}

impl Area {
    /// Makes an area for GET_INFLIGHT_FD. The fd is for the front end, which hands it back with
    /// SET_INFLIGHT_FD. It may ask for any number of them: so an area is all zeroes, which is
    /// "uninitialized" in the specification, and takes no memory before a queue begins with it.
    ///
    /// # Errors
    /// Counts out of range, or no memory.
    pub fn create(
        num_queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<(AreaSpec, OwnedFd), Error> {
        let mmap_size = area_bytes(num_queues, queue_size, packed)?;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a plain system call with a constant name.
        let fd = unsafe { libc::memfd_create(c"vhost-inflight".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the fd was just made and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(mmap_size)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the fd is open. A file that cannot be sealed does as well.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        Ok((AreaSpec { mmap_size, mmap_offset: 0, num_queues, queue_size }, file.into()))
    }

    /// Maps the area of SET_INFLIGHT_FD. It may come before the features that say whether rings are
    /// packed: how it is read, and whether that has room, is seen when one starts.
    ///
    /// # Errors
    /// Counts out of range, or a file that does not do.
    pub fn map(spec: AreaSpec, fd: &ForeignFd, unmapper: &Unmapper) -> Result<Self, Error> {
        let want = area_bytes(spec.num_queues, spec.queue_size, false)?;
        if spec.mmap_size < want {
            return Err(Error::Short { have: spec.mmap_size, want });
        }
        if !spec.mmap_offset.is_multiple_of(REGION_ALIGN_BYTES) {
            return Err(Error::Alignment(spec.mmap_offset));
        }
        let most = area_bytes(spec.num_queues, spec.queue_size, true).unwrap_or(want);
        let file = SharedFile::map(fd, spec.mmap_offset, spec.mmap_size.min(most), unmapper)?;
        Ok(Self { file, spec, used: AtomicBool::new(false) })
    }

    /// Whether a queue has begun with it: then it is for rings of that one's layout.
    #[must_use]
    pub fn was_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
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

    /// The part of a queue of `size`, if there is one.
    fn region(self: &Arc<Self>, queue: usize, size: u16, packed: bool) -> Option<Region> {
        let AreaSpec { num_queues, queue_size, .. } = self.spec;
        let fits = queue < num_queues.into() && (1..=queue_size).contains(&size);
        let want = area_bytes(num_queues, queue_size, packed).ok()?;
        if !fits || want > self.file.size_bytes() {
            return None;
        }
        self.used.store(true, Ordering::Relaxed);
        let bytes = region_bytes(queue_size, packed) as usize;
        // SAFETY: there is room for so many queues, and `map` has found an alignment of 64 bytes.
        Some(unsafe { Region::new(Arc::clone(self), queue * bytes, bytes) })
    }
}

/// Bytes of a queue's part.
fn region_bytes(queue_size: u16, packed: bool) -> u64 {
    let bytes = if packed { packed::bytes(queue_size) } else { split::bytes(queue_size) };
    (bytes as u64).next_multiple_of(REGION_ALIGN_BYTES)
}

/// Bytes that so many queues need.
fn area_bytes(num_queues: u16, queue_size: u16, packed: bool) -> Result<u64, Error> {
    let bytes = u64::from(num_queues) * region_bytes(queue_size, packed);
    let counts =
        (1..=QUEUES_MAX).contains(&num_queues) && (1..=RING_SIZE_MAX).contains(&queue_size);
    if counts && bytes <= AREA_BYTES_MAX {
        Ok(bytes)
    } else {
        Err(Error::Count(num_queues, queue_size))
    }
}

/// Where a queue goes on, and what it has to do again first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Position of the used ring to go on at.
    pub used: u16,
    /// Position of the available ring to go on at: after what is to be done again.
    pub last_avail: u16,
    /// Entries to be done again, oldest first. Split: heads. Packed: entries of the area. They are
    /// tracked already: they are put when they are done, and not fetched again.
    pub again: Vec<u16>,
    /// What was wrong with the area, if anything was: then requests may be done twice or not at all.
    pub damage: Option<Damage>,
}

/// What is wrong with an area's contents. Nobody but the front end and its back ends writes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// of a version that is not known; it was begun anew
    #[error("in-flight area of version {0}: begun anew")]
    Version(u16),
    /// split: the last batch is none. rte_vhost leaves it so when it begins an area on a ring that
    /// was in use; it was passed over
    #[error("in-flight area: its last batch is of {0} requests and cannot be told; passed over")]
    LastBatch(u16),
    /// a request at a descriptor that the ring does not have was dropped
    #[error("in-flight area: request {0} is outside of the ring; dropped")]
    Outside(u16),
    /// packed: a position outside of the ring; it was begun anew
    #[error("in-flight area: position {0:#x} is outside of the ring; begun anew")]
    Position(u16),
    /// packed: a request's descriptors are no chain, or more than the ring has; it was begun anew
    #[error("in-flight area: request {0} is no chain; begun anew")]
    Chain(u16),
}

/// The tracking of one queue, kept by its owner.
///
/// Every chain that is taken is fetched here, in the order of the ring, before it is submitted or
/// put, also one that is answered on the spot: where the ring goes on is counted from them. Nothing
/// is fetched or put between [`Tracker::publishing`] and [`Tracker::published`].
#[derive(Debug)]
pub struct Tracker(Format);

#[derive(Debug)]
enum Format {
    Split(split::Split),
    Packed(packed::Packed),
}

impl Tracker {
    /// Begins to track a split queue whose used index, in its ring, is `used_idx`.
    /// `None` if the area has no room for it.
    #[must_use]
    pub fn split(
        area: &Arc<Area>,
        queue: usize,
        size: u16,
        used_idx: u16,
    ) -> Option<(Self, Recovery)> {
        let region = area.region(queue, size, false)?;
        let (split, recovery) = split::Split::begin(region, size, used_idx);
        Some((Self(Format::Split(split)), recovery))
    }

    /// Begins to track a packed queue. `base` is the position that the front end gave, which counts
    /// if the area is fresh; `flags` reads the flags of the descriptor at a position's index.
    /// `None` if the area has no room for it, or if `base` is outside of the ring.
    #[must_use]
    pub fn packed(
        area: &Arc<Area>,
        queue: usize,
        size: u16,
        base: u16,
        flags: impl Fn(u16) -> u16,
    ) -> Option<(Self, Recovery)> {
        let region = area.region(queue, size, true)?;
        let (packed, recovery) = packed::Packed::begin(region, size, base, flags)?;
        Some((Self(Format::Packed(packed)), recovery))
    }

    /// Split: the chain at `head` was taken from the available ring and is about to be submitted.
    #[inline]
    pub fn fetched(&mut self, head: u16) {
        if let Format::Split(split) = &mut self.0 {
            split.fetched(head);
        }
    }

    /// Packed: the chain of `descs`, in the ring's order, was taken and is about to be submitted.
    /// Answers with its entry, `None` if the area's free list is broken or used up.
    #[inline]
    pub fn fetched_packed(&mut self, descs: impl Iterator<Item = Desc>) -> Option<u16> {
        match &mut self.0 {
            Format::Split(_) => None,
            Format::Packed(packed) => packed.fetched(descs),
        }
    }

    /// The request of `entry` (split: head) was put into the used ring, not yet published.
    #[inline]
    pub fn put(&mut self, entry: u16) {
        match &mut self.0 {
            Format::Split(split) => split.put(entry),
            Format::Packed(packed) => packed.put(entry),
        }
    }

    /// Everything put is about to be published; the next position will be `used`.
    #[inline]
    pub fn publishing(&mut self, used: u16) {
        match &mut self.0 {
            Format::Split(split) => split.publishing(),
            Format::Packed(packed) => packed.publishing(used),
        }
    }

    /// Everything put has been published, and the next position is `used`.
    #[inline]
    pub fn published(&mut self, used: u16) {
        match &mut self.0 {
            Format::Split(split) => split.published(used),
            Format::Packed(packed) => packed.published(used),
        }
    }

    /// Packed: calls `visit` with the descriptors of an entry that is to be done again, in order.
    /// `false` if the entry is not in order.
    #[must_use]
    pub fn descs(&self, entry: u16, visit: impl FnMut(Desc)) -> bool {
        match &self.0 {
            Format::Split(_) => false,
            Format::Packed(packed) => packed.descs(entry, visit),
        }
    }
}

/// The entries that were put since the last publication. Entries of a queue in order differ from one
/// another, so that there is room for all; what a guest or a front end has there twice is its own loss.
#[derive(Debug)]
struct Batch(Vec<u16>);

impl Batch {
    fn new(entries: u16) -> Self {
        Self(Vec::with_capacity(entries.into()))
    }

    #[inline]
    fn push(&mut self, entry: u16) {
        if self.0.len() < self.0.capacity() {
            self.0.push(entry);
        }
    }
}

/// Sorts what is to be done again, and says which counter comes next.
fn in_order(mut again: Vec<(u64, u16)>) -> (Vec<u16>, u64) {
    again.sort_unstable();
    let next = again.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
    (again.into_iter().map(|(_, entry)| entry).collect(), next)
}
