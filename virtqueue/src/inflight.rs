//! In-flight tracking: records the requests that a queue has taken and not completed, in memory
//! that outlives this process ("Inflight I/O tracking" in the vhost-user specification).
//!
//! An [`Area`] belongs to a front end, which passes it to every process that serves it: this one,
//! the next one, and SPDK's. A [`Tracker`] writes one queue's part of it. The modules `split` and
//! `packed` have the format of that part, and the order of the stores. The order matters, because
//! the process may be killed between any two stores. Nothing read from an area is trusted.
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
use guest_memory::{FileError, SharedFile, Unmapper, usize_of};

use crate::desc::{Desc, RING_SIZE_MAX};

use region::Region;

/// Maximum number of virtqueues of a device: rte_vhost's reply to GET_QUEUE_NUM.
pub const QUEUES_MAX: u16 = 128;

/// Maximum size of an area: 128 queues of 4,096 packed descriptors of 32 bytes, or 16 queues of
/// 32,768, and the header of each queue's part. The thread that serves every VM initialises the
/// area, which takes some milliseconds for this size.
const AREA_BYTES_MAX: u64 = (16 << 20) + QUEUES_MAX as u64 * REGION_ALIGN_BYTES;
/// Alignment of a queue's part, as in rte_vhost and libvhost-user.
const REGION_ALIGN_BYTES: u64 = 64;
/// The only version of the format.
const VERSION: u16 = 1;

/// The description of an area in GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AreaSpec {
    /// Length of the area in bytes.
    pub mmap_size: u64,
    /// Offset of the area in its file.
    pub mmap_offset: u64,
    /// Number of queues that the area has room for.
    pub num_queues: u16,
    /// Number of descriptors of each queue.
    pub queue_size: u16,
}

/// Why an area was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the number of queues or descriptors is zero or too large
    #[error("invalid in-flight area: {0} queues of {1} descriptors")]
    Count(u16, u16),
    /// the offset in the file is not aligned
    #[error("invalid in-flight area: offset {0:#x} is not a multiple of {REGION_ALIGN_BYTES}")]
    Alignment(u64),
    /// the area is shorter than its queues need
    #[error("in-flight area is too short: {have} bytes, its queues need {want}")]
    Short {
        /// Length of the area.
        have: u64,
        /// Length that the queues need.
        want: u64,
    },
    /// the file is invalid or could not be mapped
    #[error("in-flight area: {0}")]
    File(#[from] FileError),
    /// the area's file could not be created
    #[error("in-flight area: {0}")]
    System(#[from] io::Error),
}

/// A mapped in-flight area.
#[derive(Debug)]
pub struct Area {
    file: SharedFile,
    spec: AreaSpec,
    used: AtomicBool,
}

impl Area {
    /// Creates an area for GET_INFLIGHT_FD. The fd is for the front end, which sends it back with
    /// SET_INFLIGHT_FD. The area is all zeroes, "uninitialized" in the specification, and uses no
    /// memory before a queue initialises its part. A front end may therefore request any number of
    /// areas.
    ///
    /// # Errors
    /// A count is out of range, or a system call failed.
    pub fn create(
        num_queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<(AreaSpec, OwnedFd), Error> {
        let mmap_size = area_bytes(num_queues, queue_size, packed)?;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a system call with a constant name.
        let fd = unsafe { libc::memfd_create(c"vhost-inflight".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the fd is new, and this is its only owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(mmap_size)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the fd is open. An unsealed file works too, so an error is ignored.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        Ok((AreaSpec { mmap_size, mmap_offset: 0, num_queues, queue_size }, file.into()))
    }

    /// Maps the area of SET_INFLIGHT_FD. The message may come before the features that determine
    /// the layout of the rings. The room for that layout is therefore checked when a ring starts.
    ///
    /// # Errors
    /// A count is out of range, or the file is invalid.
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

    /// Returns whether a queue has used the area. From then on, the area is only for rings of that
    /// queue's layout.
    #[must_use]
    pub fn was_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Number of descriptors of each queue.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.spec.queue_size
    }

    /// Number of queues that the area has room for.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        self.spec.num_queues
    }

    /// The part of a queue of `size` descriptors, if the area has room for it.
    fn region(self: &Arc<Self>, queue: usize, size: u16, packed: bool) -> Option<Region> {
        let AreaSpec { num_queues, queue_size, .. } = self.spec;
        let fits = queue < num_queues.into() && (1..=queue_size).contains(&size);
        let want = area_bytes(num_queues, queue_size, packed).ok()?;
        if !fits || want > self.file.size_bytes() {
            return None;
        }
        self.used.store(true, Ordering::Relaxed);
        let bytes = usize_of(region_bytes(queue_size, packed));
        // SAFETY: the area has room for the queue's part, and `map` checked its alignment to 64
        // bytes.
        Some(unsafe { Region::new(Arc::clone(self), queue * bytes, bytes) })
    }
}

/// Size of a queue's part in bytes.
fn region_bytes(queue_size: u16, packed: bool) -> u64 {
    let bytes = if packed { packed::bytes(queue_size) } else { split::bytes(queue_size) };
    (bytes as u64).next_multiple_of(REGION_ALIGN_BYTES)
}

/// Size of an area in bytes.
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

/// Where a queue continues after a restart, and which requests it has to resubmit first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Position of the used ring to continue at.
    pub used: u16,
    /// Position of the available ring to continue at, after the chains of the
    /// resubmissions.
    pub last_avail: u16,
    /// Entries of the requests to resubmit, oldest first. Split: heads. Packed: entries of the area.
    /// They are tracked already: call [`Tracker::put`] when they complete, and do not call
    /// `fetched` again.
    pub resubmissions: Vec<u16>,
    /// The damage that was found in the area, if any. Requests may then be done twice or not at
    /// all.
    pub damage: Option<Damage>,
}

/// Damage in an area's contents. Only the front end and its back ends write there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// the version is unknown; the part was initialised again
    #[error("in-flight area: unknown version {0}, initialised again")]
    Version(u16),
    /// split: the last batch is inconsistent, and was ignored. rte_vhost leaves it in this state
    /// when it initialises an area for a ring that was in use
    #[error("in-flight area: the last batch of {0} requests is inconsistent, ignored")]
    LastBatch(u16),
    /// a request's descriptor is outside of the ring; the request was dropped
    #[error("in-flight area: request {0} is outside of the ring, dropped")]
    Outside(u16),
    /// packed: a position is outside of the ring; the part was initialised again
    #[error("in-flight area: position {0:#x} is outside of the ring, initialised again")]
    Position(u16),
    /// packed: a request's descriptors are not a chain, or are more than the ring has; the part was
    /// initialised again
    #[error("in-flight area: request {0} is not a valid chain, initialised again")]
    Chain(u16),
}

/// The tracker of one queue, which the queue's owner uses.
///
/// The owner must report every chain that it takes with a `fetched` call, in the order of the ring,
/// before it submits or puts the chain. This includes chains that complete immediately, because the
/// position of the available ring is computed from these calls. Between [`Tracker::publishing`] and
/// [`Tracker::published`], no chain is fetched or put.
#[derive(Debug)]
pub struct Tracker(Format);

#[derive(Debug)]
enum Format {
    Split(split::Split),
    Packed(packed::Packed),
}

impl Tracker {
    /// Begins to track a split queue. `used_idx` is the used index in its ring. Returns `None` if
    /// the area has no room for the queue.
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

    /// Begins to track a packed queue. `base` is the front end's position, which is used if the
    /// area is uninitialised. `flags` reads the flags of the descriptor at a position. Returns
    /// `None` if the area has no room for the queue, or if `base` is outside of the ring.
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

    /// Split: the chain at `head` was taken from the available ring and will be submitted next.
    #[inline]
    pub fn fetched(&mut self, head: u16) {
        if let Format::Split(split) = &mut self.0 {
            split.fetched(head);
        }
    }

    /// Packed: a chain of the descriptors `descs`, in the order of the ring, was taken and will be
    /// submitted next. Returns its entry, or `None` if the area's free list is corrupt or
    /// exhausted.
    #[inline]
    pub fn fetched_packed(&mut self, descs: impl Iterator<Item = Desc>) -> Option<u16> {
        match &mut self.0 {
            Format::Split(_) => None,
            Format::Packed(packed) => packed.fetched(descs),
        }
    }

    /// The request of `entry` (split: head) was put into the used ring, but not published.
    #[inline]
    pub fn put(&mut self, entry: u16) {
        match &mut self.0 {
            Format::Split(split) => split.put(entry),
            Format::Packed(packed) => packed.put(entry),
        }
    }

    /// All requests that were put will be published next. The next position is then `used`.
    #[inline]
    pub fn publishing(&mut self, used: u16) {
        match &mut self.0 {
            Format::Split(split) => split.publishing(),
            Format::Packed(packed) => packed.publishing(used),
        }
    }

    /// All requests that were put have been published, and the next position is `used`.
    #[inline]
    pub fn published(&mut self, used: u16) {
        match &mut self.0 {
            Format::Split(split) => split.published(used),
            Format::Packed(packed) => packed.published(used),
        }
    }

    /// Packed: calls `visit` with the descriptors of an entry to resubmit, in order. Returns
    /// false if the entry is inconsistent.
    #[must_use]
    pub fn descs(&self, entry: u16, visit: impl FnMut(Desc)) -> bool {
        match &self.0 {
            Format::Split(_) => false,
            Format::Packed(packed) => packed.descs(entry, visit),
        }
    }
}

/// The entries that were put since the last publication. The entries of a consistent queue are
/// distinct, so that there is room for all. If a guest or a front end causes duplicates, some are
/// not recorded, which harms only that guest.
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

/// Sorts the requests to resubmit. Returns their entries, and the next counter.
fn sort_by_counter(mut requests: Vec<(u64, u16)>) -> (Vec<u16>, u64) {
    requests.sort_unstable();
    let next = requests.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
    (requests.into_iter().map(|(_, entry)| entry).collect(), next)
}
