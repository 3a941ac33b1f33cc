//! Disks in a file or on a block device: SPDK's `aio` and `uring`.
//!
//! A channel's submissions never wait. I/O that the kernel can start without waiting goes through
//! an [`Engine`], all other I/O to the disk's own worker threads.

mod admin;
mod aio;
mod backing;
mod blocking;
mod channel;
mod engine;
mod lease;
pub(crate) mod module;
mod uring;
mod workers;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use closer::Account;
use uuid::Uuid;

use crate::access::Access;
use crate::contract::{Bdev, Channel, Extent, Features, Lease, Storage};
use crate::error::Error;
use crate::geometry::{check_block_size, check_name, checked_size};
use crate::qos::Qos;
use crate::stats::Stats;
use crate::topology::Topology;

pub use backing::{Alignment, check_unopened, is_nvme_control, not_of_kind, open_file};
pub use engine::Engine;
pub use lease::{Holder, LeaseState};
pub use module::{check_alone, show_lease};
pub use workers::WorkerCounts;
use workers::Workers;

/// The SPDK module that a file disk replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// `bdev_aio`: prefers [`Engine::Aio`] for block devices and read-only files, and
    /// [`Engine::IoUring`] for writable regular files. Offers unmap only with `fallocate`.
    Aio,
    /// `bdev_uring`: prefers [`Engine::IoUring`]. Offers flush, and unmap if the file supports it;
    /// SPDK's module offers neither.
    Uring,
    /// `bdev_nvme`: a namespace of the kernel's NVMe driver, on its block device.
    Nvme,
}

impl Flavour {
    /// Returns what a disk of this flavour supports. `fallocate`: the operator wants unmap.
    fn features(self, opened: &backing::Opened, read_only: bool, fallocate: bool) -> Features {
        let unmap = match self {
            Self::Aio => fallocate,
            Self::Uring | Self::Nvme => opened.punches_holes(),
        };
        Features {
            read_only,
            flush: true,
            unmap: unmap && !read_only,
            write_zeroes: !read_only,
            reset: self != Self::Uring,
            any_alignment: opened.direct.is_none(),
        }
    }
}

/// The longest time that the deletion of a namespace's bdev waits, as in SPDK. The kernel may
/// repeat I/O to a target that is away for longer.
const NVME_DELETION: Duration = Duration::from_secs(10);

/// A disk in a regular file or on a block device.
///
/// The file is opened once: with `O_DIRECT` if every block of this disk can be accessed that way,
/// otherwise through the page cache. Never both, since the kernel guarantees nothing for a file
/// that is written both ways ("possible data corruption due to collision with buffered I/O"). A
/// request whose segments do not have the alignment that direct I/O needs goes piece by piece
/// through a bounce buffer of a worker thread. All others transfer directly to and from the guest's
/// memory.
#[derive(Debug)]
pub struct FileDisk {
    name: String,
    filename: PathBuf,
    flavour: Flavour,
    uuid: Uuid,
    block_size: u32,
    block_size_override: bool,
    readonly: bool,
    fallocate: bool,
    features: Features,
    num_blocks: AtomicU64,
    storage: Storage,
    /// Taken when `self` is dropped.
    file: Option<Arc<File>>,
    /// The account that closes the file.
    closer: Account,
    /// Keeps other processes from the file; `None` if the disk is read-only.
    lease: Option<lease::FileLease>,
    /// The alignment that direct I/O needs; `None` if the file uses the page cache.
    direct: Option<Alignment>,
    topology: Topology,
    engine: Engine,
    workers: Workers,
    stats: Stats,
    qos: Qos,
}

/// The way in which a file disk does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The engine for reads and writes.
    pub engine: Engine,
    /// Reads and writes bypass the page cache.
    pub direct: bool,
    /// Reads and writes are tried without waiting (`RWF_NOWAIT`).
    pub nowait: bool,
    /// The threads for I/O that may wait.
    pub workers: WorkerCounts,
}

/// The options of [`FileDisk::create`].
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The name of the device; not empty.
    pub name: String,
    /// The file or block device. It must exist.
    pub filename: PathBuf,
    /// The block size in bytes: a power of two, at least 512 and at least the device's own.
    /// Required for a file; a block device has its own.
    pub block_size: Option<u32>,
    /// Open it read-only, and refuse writes.
    pub readonly: bool,
    /// For [`Flavour::Aio`]: offer unmap.
    pub fallocate: bool,
    /// The UUID; random if absent.
    pub uuid: Option<Uuid>,
    /// The SPDK module that it replaces.
    pub flavour: Flavour,
    /// Use this engine instead of the flavour's own, or the other one if it does not work.
    pub engine: Option<Engine>,
}

impl FileOptions {
    /// Returns what the file is opened for.
    #[must_use]
    pub fn access(&self) -> Access {
        if self.readonly { Access::ReadOnly } else { Access::ReadWrite }
    }

    /// Checks what does not depend on the file.
    fn check(&self) -> Result<(), Error> {
        check_name(&self.name)?;
        let what = self.filename.display();
        self.block_size.map_or(Ok(()), |size| check_block_size(&what.to_string(), size))
    }
}

impl FileDisk {
    /// Opens a file or block device as a disk.
    ///
    /// # Errors
    /// [`Error::System`] with the file's name if it cannot be opened; [`Error::Invalid`] if it is
    /// neither a file nor a block device, or the block size is incompatible with it.
    pub fn create(options: FileOptions) -> Result<Arc<Self>, Error> {
        let file = open_file(&options.filename, options.access())?;
        Self::on(file, options)
    }

    /// Makes a disk of a file that [`open_file`] has opened under the name in `options`.
    ///
    /// # Errors
    /// As [`FileDisk::create`].
    pub fn on(file: File, options: FileOptions) -> Result<Arc<Self>, Error> {
        let FileOptions { name, filename, block_size, readonly, fallocate, uuid, flavour, engine } =
            options;
        let opened = backing::check(file, &filename, block_size)?;
        let num_blocks = opened.size / u64::from(opened.block_size);
        checked_size(&name, num_blocks, opened.block_size)?;
        let system = |what| move |source| Error::System { what, source };
        let workers = Workers::start(opened.file.as_raw_fd(), opened.direct)
            .map_err(system(format!("{}: cannot start a worker thread", filename.display())))?;
        let closer = Account::new(crate::account_name(&name));
        let preferred = match flavour {
            Flavour::Aio if readonly || opened.storage.is_block_device() => Engine::Aio,
            // `io_submit` blocks in a write to a regular file on a frozen file system.
            Flavour::Aio | Flavour::Uring | Flavour::Nvme => Engine::IoUring,
        };
        let engines = engine.as_ref().map_or(preferred.and_other(), std::slice::from_ref);
        let engine = match opened.direct {
            Some(_) => channel::first_that_works(&opened, &closer, engines),
            // A read through the page cache may wait for the disk even with RWF_NOWAIT.
            None => Engine::Threads,
        };
        let features = flavour.features(&opened, readonly, fallocate);
        let file = Arc::new(opened.file);
        let lease = (!readonly).then(|| lease::FileLease::new(&name, &filename, &file));
        Ok(Arc::new(Self {
            lease: lease.transpose()?,
            filename,
            flavour,
            uuid: uuid.unwrap_or_else(Uuid::new_v4),
            block_size: opened.block_size,
            block_size_override: block_size.is_some(),
            readonly,
            fallocate,
            features,
            num_blocks: AtomicU64::new(num_blocks),
            storage: opened.storage,
            closer,
            file: Some(file),
            name,
            direct: opened.direct,
            topology: opened.topology,
            engine,
            workers,
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }

    /// Checks the size of the file, and adopts a larger one. Returns the number of blocks; a
    /// partial block at the end is ignored.
    ///
    /// # Errors
    /// [`Error::Busy`] if the file has become smaller: the disk keeps its size, and I/O past the
    /// end of the file fails.
    pub fn rescan(&self) -> Result<u64, Error> {
        let size = backing::size(self.file()).map_err(|source| self.system(source))?;
        let now = size / u64::from(self.block_size);
        // Relaxed suffices: no other data is published with the number.
        let before = self.num_blocks.fetch_max(now, Ordering::Relaxed);
        if now < before {
            return Err(Error::Busy(format!(
                "{}: the file shrank from {before} to {now} blocks; the bdev keeps its size",
                self.filename.display()
            )));
        }
        Ok(now)
    }

    /// Returns the path of the file or block device.
    #[must_use]
    pub fn filename(&self) -> &Path {
        &self.filename
    }

    /// Returns the SPDK module that it replaces.
    #[must_use]
    pub fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Returns whether the operator gave a block size.
    #[must_use]
    pub fn block_size_override(&self) -> bool {
        self.block_size_override
    }

    /// Returns whether it was opened read-only.
    #[must_use]
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Returns whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.storage.is_block_device()
    }

    /// Returns whether unmap was requested ([`Flavour::Aio`]).
    #[must_use]
    pub fn fallocate(&self) -> bool {
        self.fallocate
    }

    /// Returns the alignment that direct I/O needs; `None` if the file uses the page cache.
    #[must_use]
    pub fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// Returns the way in which it does its I/O, and the present work of its worker threads.
    #[must_use]
    pub fn service(&self) -> Service {
        Service {
            engine: self.engine,
            direct: self.direct.is_some(),
            nowait: self.engine != Engine::Threads,
            workers: self.workers.counts(),
        }
    }

    fn file(&self) -> &File {
        self.file.as_ref().expect("the file is taken only in drop")
    }

    fn system(&self, source: std::io::Error) -> Error {
        Error::System { what: self.filename.display().to_string(), source }
    }
}

impl Drop for FileDisk {
    fn drop(&mut self) {
        // Closing a file on FUSE or NFS writes back dirty data, which can take arbitrarily long.
        self.closer.drop_later((self.file.take(), self.lease.take().map(lease::FileLease::end)));
    }
}

impl Bdev for FileDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        match self.flavour {
            Flavour::Aio => "AIO disk",
            Flavour::Uring => "URING bdev",
            Flavour::Nvme => "NVMe disk",
        }
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
        self.features
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn storage(&self) -> Option<Storage> {
        Some(self.storage)
    }

    fn lease(&self) -> Option<Arc<dyn Lease>> {
        self.lease.as_ref()?.shown()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        if self.storage.is_block_device() {
            // `lseek` finds no holes there.
            return Ok(Extent { len, allocated: true });
        }
        backing::extent(self.file(), offset, len).map_err(|source| self.system(source))
    }

    fn deletion_limit(&self) -> Option<Duration> {
        (self.flavour == Flavour::Nvme).then_some(NVME_DELETION)
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let what = format!("cannot open an I/O path to {}", self.filename.display());
        channel::open(self, depth).map_err(|source| Error::System { what, source })
    }
}
