//! A volume, as its channels and the store's threads share it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bdev::Op;
use blobstore::{BlobId, Place};

use crate::table::{Entry, Table};

/// What a volume's channels need to know of it. The holder of the store's lock changes it.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) id: BlobId,
    /// Bytes of a cluster.
    pub(crate) cluster_size: u64,
    pub(crate) table: Table,
    /// Its size in clusters. I/O beyond is refused.
    pub(crate) clusters: AtomicU64,
    pub(crate) read_only: AtomicBool,
    /// Whether unmapped clusters are given back to the store.
    pub(crate) frees: AtomicBool,
    /// Clusters of its own.
    pub(crate) allocated: AtomicU64,
    /// Open channels.
    pub(crate) channels: AtomicUsize,
}

/// Where a part of an I/O goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// To the base, at this offset.
    Base(u64),
    /// To the external snapshot, at the same offset.
    External,
    /// It reads as zeroes.
    Zeroes,
    /// There is nothing to do.
    Nothing,
    /// The store's thread must do this first.
    Thread(Job),
}

/// What the store's thread does for an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Allocate the clusters of the range. Then the I/O is tried again.
    Allocate,
    /// Give back the clusters of the range, which the guest does not need any more.
    Release,
    /// The same, and they must read as zeroes. Then the I/O is tried again.
    Zero,
}

/// The largest number of clusters in a job.
pub(crate) const JOB_CLUSTERS: u64 = 4096;

/// What a volume's channels may do with its base.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) unmap: bool,
}

impl Volume {
    pub(crate) fn new(id: BlobId, cluster_size: u64) -> Arc<Self> {
        Arc::new(Self {
            id,
            cluster_size,
            table: Table::default(),
            clusters: AtomicU64::new(0),
            read_only: AtomicBool::new(false),
            frees: AtomicBool::new(false),
            allocated: AtomicU64::new(0),
            channels: AtomicUsize::new(0),
        })
    }

    /// Its size in bytes.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        // Acquire: the table has the entries of all these clusters.
        self.clusters.load(Ordering::Acquire).saturating_mul(self.cluster_size)
    }

    /// Returns where the beginning of a range, which is not empty, goes, and how many bytes of the
    /// range go there together.
    #[inline]
    pub(crate) fn target(
        &self,
        op: Op,
        may_unmap: bool,
        offset: u64,
        len: u64,
        base: Abilities,
    ) -> (Target, u64) {
        let size = self.cluster_size;
        let (first, within) = (offset / size, offset % size);
        let entry = self.table.get(first);
        let target = self.target_of(op, may_unmap, entry, within, len, base);
        let mut covered = size - within;
        if covered >= len {
            return (target, len);
        }
        // Further clusters that go to the same place.
        let mut index = first;
        while covered < len {
            index += 1;
            let next = self.table.get(index);
            let left = len - covered;
            let same = match (target, self.target_of(op, may_unmap, next, 0, left, base)) {
                (Target::Base(from), Target::Base(at)) => from.checked_add(covered) == Some(at),
                (Target::Thread(_), other) => other == target && index - first < JOB_CLUSTERS,
                (_, other) => other == target,
            };
            if !same {
                break;
            }
            covered = covered.saturating_add(size);
        }
        (target, covered.min(len))
    }

    /// Returns where the part of a range in one cluster goes: `len` bytes, of which some may lie in
    /// the clusters after it, from `within` on.
    #[inline]
    fn target_of(
        &self,
        op: Op,
        may_unmap: bool,
        entry: Entry,
        within: u64,
        len: u64,
        base: Abilities,
    ) -> Target {
        let at = |cluster: u64| Target::Base(cluster.saturating_mul(self.cluster_size) + within);
        let whole = || within == 0 && len >= self.cluster_size;
        let frees = || whole() && self.frees.load(Ordering::Relaxed);
        let place = match entry {
            Entry::At(place) => place,
            Entry::Leaving => {
                return match op {
                    Op::Read => Target::Zeroes,
                    Op::Unmap | Op::Flush => Target::Nothing,
                    // The store's thread does this after it has given the cluster back.
                    Op::Write | Op::WriteZeroes => Target::Thread(Job::Allocate),
                };
            }
        };
        match (op, place) {
            (Op::Read, Place::Own(cluster) | Place::Inherited(cluster)) => at(cluster),
            (Op::Read, Place::External) => Target::External,
            (Op::Read, Place::Zeroes) => Target::Zeroes,
            (Op::Unmap, Place::Own(_)) if frees() => Target::Thread(Job::Release),
            (Op::Unmap, Place::Own(cluster)) if base.unmap => at(cluster),
            (Op::Unmap, _) | (Op::WriteZeroes, Place::Zeroes) | (Op::Flush, _) => Target::Nothing,
            (Op::WriteZeroes, Place::Own(_)) if may_unmap && frees() => Target::Thread(Job::Zero),
            (_, Place::Own(cluster)) => at(cluster),
            _ => Target::Thread(Job::Allocate),
        }
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blob {:#x}", self.id.0)
    }
}
