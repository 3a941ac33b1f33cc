//! A disk without storage: it accepts writes and discards them. For measuring everything else.

pub(crate) mod module;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use crate::contract::{Bdev, Channel, Features};
use crate::error::Error;
use crate::geometry::{checked_size, within};
use crate::io::{Completion, Io, Op, Status, Submit};
use crate::qos::Qos;
use crate::shortcut::Shortcut;
use crate::stats::Stats;
use crate::topology::Topology;

/// A disk without data.
///
/// As with SPDK's null bdev, a read succeeds and leaves the memory unchanged: the guest finds its
/// own earlier data there, never data of this process. Flush and unmap are not supported;
/// write-zeroes succeeds.
#[derive(Debug)]
pub struct Null {
    name: String,
    uuid: Uuid,
    block_size: u32,
    num_blocks: AtomicU64,
    topology: Topology,
    stats: Stats,
    qos: Qos,
}

/// The options of [`Null::create`].
#[derive(Clone, Debug)]
pub struct NullOptions {
    /// The name of the device; not empty.
    pub name: String,
    /// The number of blocks; not 0.
    pub num_blocks: u64,
    /// The block size in bytes: a power of two, 512 or more.
    pub block_size: u32,
    /// The UUID; random if absent.
    pub uuid: Option<Uuid>,
}

impl Null {
    /// Creates a null disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an option is out of range.
    pub fn create(options: NullOptions) -> Result<Arc<Self>, Error> {
        Self::with_topology(options, Topology::default())
    }

    /// As [`Null::create`], with the operator's preferred I/O sizes.
    ///
    /// # Errors
    /// As [`Null::create`]; also [`Error::Invalid`] if the physical block size is not a multiple of
    /// 512.
    pub fn with_topology(options: NullOptions, topology: Topology) -> Result<Arc<Self>, Error> {
        let NullOptions { name, num_blocks, block_size, uuid } = options;
        checked_size(&name, num_blocks, block_size)?;
        topology.check(&name)?;
        Ok(Arc::new(Self {
            name,
            uuid: uuid.unwrap_or_else(Uuid::new_v4),
            block_size,
            num_blocks: AtomicU64::new(num_blocks),
            topology,
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }

    /// Makes the disk larger, while in use. The present size is accepted and has no effect.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the size would shrink or exceed the largest offset.
    pub fn resize(&self, num_blocks: u64) -> Result<(), Error> {
        checked_size(&self.name, num_blocks, self.block_size)?;
        // Relaxed suffices: no other data is published with the number.
        let before = self.num_blocks.fetch_max(num_blocks, Ordering::Relaxed);
        if num_blocks < before {
            return Err(Error::Invalid(format!(
                "{}: cannot shrink from {before} to {num_blocks} blocks",
                self.name
            )));
        }
        Ok(())
    }
}

impl Bdev for Null {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "Null disk"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.num_blocks.load(Ordering::Relaxed)
    }

    fn features(&self) -> Features {
        Features {
            read_only: false,
            flush: false,
            unmap: false,
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

    fn open(self: Arc<Self>, _depth: u16) -> Result<Box<dyn Channel>, Error> {
        Ok(Box::new(NullChannel { disk: self }))
    }
}

struct NullChannel {
    disk: Arc<Null>,
}

#[expect(unsafe_code, reason = "the contract's method is unsafe; nothing here is")]
impl Channel for NullChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        Submit::Done(match io.op {
            Op::Flush | Op::Unmap => Status::Unsupported,
            _ if !within(&io, self.disk.size_bytes()) => Status::IoError,
            Op::Read | Op::Write | Op::WriteZeroes => Status::Ok,
        })
    }

    fn shortcut(&self) -> Shortcut {
        Shortcut::Nothing
    }

    #[inline]
    fn poll(&mut self, _done: &mut [Completion]) -> usize {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_never_shrinks() {
        let options = NullOptions { name: "n".into(), num_blocks: 10, block_size: 512, uuid: None };
        let disk = Null::create(options.clone()).unwrap();
        disk.resize(20).unwrap();
        disk.resize(20).unwrap();
        assert!(matches!(disk.resize(19), Err(Error::Invalid(_))));
        assert!(matches!(disk.resize(u64::MAX), Err(Error::Invalid(_))));
        assert_eq!(disk.num_blocks(), 20);
        for wrong in [
            NullOptions { num_blocks: 0, ..options.clone() },
            NullOptions { block_size: 0, ..options.clone() },
            NullOptions { block_size: 520, ..options.clone() },
            NullOptions { block_size: 256, ..options.clone() },
            NullOptions { name: String::new(), ..options },
        ] {
            assert_eq!(Null::create(wrong).map(|_| ()).unwrap_err().errno(), libc::EINVAL);
        }
    }

    #[test]
    fn it_has_the_topology_that_it_was_given() {
        let options = NullOptions { name: "n".into(), num_blocks: 10, block_size: 512, uuid: None };
        let topology =
            Topology { physical_block_size: 4096, min_io_blocks: 16, optimal_io_blocks: 64 };
        let disk = Null::with_topology(options.clone(), topology).unwrap();
        disk.resize(20).unwrap();
        assert_eq!(disk.topology(), topology);
        let wrong = Topology { physical_block_size: 1000, ..topology };
        let e = Null::with_topology(options, wrong).map(|_| ()).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL);
    }
}
