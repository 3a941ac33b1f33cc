//! A disk in this process's memory.
#![expect(unsafe_code, reason = "copies between the disk's memory and the guest's")]

pub(crate) mod module;

use std::collections::VecDeque;
use std::sync::Arc;

use guest_memory::usize_of;
use uuid::Uuid;

use crate::contract::{Bdev, Channel, Features, Wait};
use crate::error::Error;
use crate::geometry::{checked_size, within};
use crate::io::{Completion, Io, Op, Status, Submit};
use crate::memory::{self, Stores};
use crate::pages::{Backing, Pages};
use crate::qos::Qos;
use crate::shortcut::{AT_ONCE, Shortcut, copy};
use crate::stats::Stats;
use crate::topology::Topology;

/// A disk in memory. All of its memory is allocated when it is created, and reads as zeroes.
///
/// Channels copy without a lock. Overlapping requests that are outstanding together have no order,
/// as on any disk, and may leave a mixture of both in the blocks that they share; other requests
/// see whole writes. [`crate::memory`] explains why the copies are sound.
#[derive(Debug)]
pub struct Malloc {
    name: String,
    uuid: Uuid,
    block_size: u32,
    num_blocks: u64,
    topology: Topology,
    pages: Pages,
    stats: Stats,
    qos: Qos,
}

/// The options of [`Malloc::create`].
#[derive(Clone, Debug)]
pub struct MallocOptions {
    /// The name of the device; not empty.
    pub name: String,
    /// The number of blocks; not 0.
    pub num_blocks: u64,
    /// The block size in bytes: a power of two, 512 or more.
    pub block_size: u32,
    /// The UUID; random if absent.
    pub uuid: Option<Uuid>,
}

impl Malloc {
    /// Creates a disk and allocates its memory, which takes about a second per few gigabytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an option is out of range; [`Error::NoMemory`] if the system does not
    /// have enough free memory.
    pub fn create(options: MallocOptions) -> Result<Arc<Self>, Error> {
        Self::with_topology(options, Topology::default())
    }

    /// As [`Malloc::create`], with the operator's preferred I/O sizes.
    ///
    /// # Errors
    /// As [`Malloc::create`]; also [`Error::Invalid`] if the physical block size is not a multiple
    /// of 512.
    pub fn with_topology(options: MallocOptions, topology: Topology) -> Result<Arc<Self>, Error> {
        let MallocOptions { name, num_blocks, block_size, uuid } = options;
        let size = checked_size(&name, num_blocks, block_size)?;
        topology.check(&name)?;
        let pages = Pages::allocate(size).map_err(|e| match e {
            Error::NoMemory(why) => Error::NoMemory(format!("{name}: {why}")),
            other => other,
        })?;
        let uuid = uuid.unwrap_or_else(Uuid::new_v4);
        let (stats, qos) = (Stats::default(), Qos::default());
        Ok(Arc::new(Self { name, uuid, block_size, num_blocks, topology, pages, stats, qos }))
    }

    /// Returns the kind of its pages.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.pages.backing()
    }
}

impl Bdev for Malloc {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "Malloc disk"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    fn features(&self) -> Features {
        Features {
            read_only: false,
            flush: true,
            unmap: true,
            write_zeroes: true,
            reset: true,
            any_alignment: true,
        }
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let size = self.size_bytes();
        let stores = Stores::for_target_of(size);
        let long = VecDeque::with_capacity(depth.into());
        Ok(Box::new(MallocChannel { disk: self, size, stores, long }))
    }
}

struct MallocChannel {
    disk: Arc<Malloc>,
    size: u64,
    stores: Stores,
    /// I/Os longer than [`AT_ONCE`], with the number of bytes done. Each poll does one step of the
    /// front one.
    long: VecDeque<(Io, u64)>,
}

impl Channel for MallocChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if !within(&io, self.size) {
            return Submit::Done(Status::IoError);
        }
        if io.len > AT_ONCE {
            self.long.push_back((io, 0));
            return Submit::Queued;
        }
        // SAFETY: the range was checked, and the caller guarantees that the segments are valid.
        Submit::Done(unsafe { self.transfer(&io, 0, usize_of(io.len)) })
    }

    fn wait(&self) -> Wait {
        if self.long.is_empty() { Wait::Event } else { Wait::Poll }
    }

    fn shortcut(&self) -> Shortcut {
        let base = self.disk.pages.base();
        Shortcut::Memory { base, size: self.size, stores: self.stores }
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let Some(slot) = done.first_mut() else { return 0 };
        let Some((io, at)) = self.long.pop_front() else { return 0 };
        let n = (io.len - at).min(AT_ONCE);
        // SAFETY: as in `submit`; the memory is valid until the completion has been reported.
        let status = unsafe { self.transfer(&io, at, n as usize) };
        if status == Status::Ok && at + n < io.len {
            self.long.push_front((io, at + n));
            return 0;
        }
        *slot = Completion { tag: io.tag, status };
        1
    }
}

impl MallocChannel {
    /// Does `len` bytes of `io`, from `at` bytes into it.
    ///
    /// # Safety
    /// The range of `io` lies within the disk, `at + len` is within its length, and its segments
    /// are valid.
    #[inline]
    unsafe fn transfer(&self, io: &Io, at: u64, len: usize) -> Status {
        let device = self.disk.pages.base().wrapping_add(usize_of(io.offset + at));
        let whole = match io.op {
            // SAFETY: `device..device + len` lies within the mapping.
            Op::Read | Op::Write => unsafe { copy(io, at, device, len, self.stores) },
            // Unmap keeps the pages: releasing them would be an address-space call.
            Op::Unmap | Op::WriteZeroes => {
                // SAFETY: the range lies within the mapping.
                unsafe { memory::zero(device, len) };
                true
            }
            Op::Flush => true,
        };
        if whole { Status::Ok } else { Status::IoError }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Tag;

    fn options(num_blocks: u64, block_size: u32) -> MallocOptions {
        MallocOptions { name: "m".into(), num_blocks, block_size, uuid: None }
    }

    #[test]
    fn options_out_of_range_are_refused_with_the_errno_of_spdk() {
        for (blocks, block_size, errno) in [
            (0, 512, libc::EINVAL),
            (8, 0, libc::EINVAL),
            (8, 513, libc::EINVAL),
            (8, 1536, libc::EINVAL),
            (u64::MAX, 4096, libc::EINVAL),
            (1 << 50, 4096, libc::ENOMEM),
            (1 << 38, 4096, libc::ENOMEM),
        ] {
            let e = Malloc::create(options(blocks, block_size)).map(|_| ()).unwrap_err();
            assert_eq!(e.errno(), errno, "{blocks} x {block_size}: {e}");
        }
    }

    #[test]
    fn it_has_the_topology_that_it_was_given() {
        let topology =
            Topology { physical_block_size: 4096, min_io_blocks: 0, optimal_io_blocks: 64 };
        let disk = Malloc::with_topology(options(8, 512), topology).unwrap();
        assert_eq!(disk.topology(), topology);
        // Rejected before the memory is allocated.
        let wrong = Topology { physical_block_size: 100, ..topology };
        let e = Malloc::with_topology(options(1 << 38, 4096), wrong).map(|_| ()).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL);
    }

    #[test]
    fn a_long_request_is_done_in_steps() {
        let disk = Malloc::create(options(3 * 2048 + 1, 512)).unwrap();
        let size = disk.size_bytes();
        let mut channel = disk.open(4).unwrap();
        let mut done = [Completion { tag: Tag(9), status: Status::IoError }];
        let zeroes = Io::plain(Op::WriteZeroes, Tag(3), 0, size);
        // SAFETY: the I/O has no segments.
        let submit = unsafe { channel.submit(zeroes) };
        assert!(matches!(submit, Submit::Queued));
        assert_eq!(
            std::iter::repeat_with(|| channel.poll(&mut done)).position(|n| n == 1),
            Some(3)
        );
        assert_eq!(done[0], Completion { tag: Tag(3), status: Status::Ok });
        assert_eq!(channel.poll(&mut done), 0);
    }
}
