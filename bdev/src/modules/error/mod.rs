//! A wrapper that makes a disk fail on demand: errors, I/O without a completion, and corrupted
//! data.

mod channel;
pub(crate) mod module;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use uuid::Uuid;

use crate::bdev_channel::BdevChannel;
use crate::contract::{Bdev, Channel};
use crate::error::Error;
use crate::io::Op;
use crate::wrapper::{PARTS, Wrapped, Wrapper, derived_uuid};

use channel::ErrorChannel;

/// The I/Os that an injection applies to. As in SPDK, write-zeroes are never included, not even in
/// `All`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedOp {
    /// Removes all injections. Pending I/Os stay pending.
    Clear,
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Unmaps.
    Unmap,
    /// Flushes.
    Flush,
    /// All four.
    All,
}

/// The effect on an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedError {
    /// The I/O fails at once and has no effect. SPDK's `nvme_failure` is the same here, as virtio
    /// has one error for both.
    Failure,
    /// The I/O is not started and stays outstanding until [`ErrorDisk::resume_pending`] or
    /// [`ErrorDisk::abort_pending`].
    Pending,
    /// The I/O starts one poll later, as after a temporary lack of memory.
    NoMemory,
    /// One byte is changed between disk and memory: the byte at `offset` in the I/O's data is XORed
    /// with `value`. Flushes and unmaps are not changed, but count.
    CorruptData {
        /// An offset in bytes into the data of the I/O. Past its end, no byte is changed.
        offset: u64,
        /// Not 0.
        value: u8,
    },
}

/// The parameters of [`ErrorDisk::inject`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The I/Os that it applies to.
    pub op: InjectedOp,
    /// The effect on them.
    pub error: InjectedError,
    /// The number of I/Os of each kind, over all channels. 0 removes an injection.
    pub count: u32,
    /// It applies only while at least this many I/Os of the same channel are at the base.
    pub queue_depth: u64,
}

impl Injection {
    /// Checks that it has an effect. `name` is the bdev's name.
    fn check(&self, name: &str) -> Result<(), Error> {
        if let InjectedError::CorruptData { value: 0, .. } = self.error {
            return Err(Error::Invalid(format!(
                "{name}: invalid corrupt_value: 0 changes no data"
            )));
        }
        Ok(())
    }
}

/// A disk that fails on demand.
///
/// Channels read the injections without a lock. An I/O that runs while an injection is changed may
/// get the old or the new one.
pub struct ErrorDisk {
    wrapped: Wrapped,
    /// The rule for the operation with this [`rule_index`].
    rules: [Rule; 4],
    /// The numbers of times that pending I/Os were resumed, and aborted.
    resumes: AtomicU64,
    aborts: AtomicU64,
}

/// The options of [`ErrorDisk::create`].
#[derive(Clone)]
pub struct ErrorOptions {
    /// The name of the device; SPDK's is `EE_` followed by the base's name.
    pub name: String,
    /// The base disk.
    pub base: Arc<dyn Bdev>,
    /// The UUID; random if absent.
    pub uuid: Option<Uuid>,
}

/// The injection for one kind of I/O.
#[derive(Debug, Default)]
struct Rule {
    /// The number of I/Os that are still to be affected.
    count: AtomicU32,
    error: AtomicU8,
    queue_depth: AtomicU64,
    offset: AtomicU64,
    value: AtomicU8,
}

const FAILURE: u8 = 0;
const PENDING: u8 = 1;
const NO_MEMORY: u8 = 2;
const CORRUPT_DATA: u8 = 3;

/// Returns the index of the rule for an operation.
fn rule_index(op: Op) -> Option<usize> {
    match op {
        Op::Read => Some(0),
        Op::Write => Some(1),
        Op::Unmap => Some(2),
        Op::Flush => Some(3),
        Op::WriteZeroes => None,
    }
}

/// Returns SPDK's UUID of a part of a base, here one that covers all of it.
fn uuid_on(base: &dyn Bdev) -> Uuid {
    let range = [0, base.num_blocks()].map(u64::to_le_bytes).concat();
    derived_uuid(PARTS, base, &range)
}

impl ErrorDisk {
    /// Wraps a disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is empty.
    pub fn create(options: ErrorOptions) -> Result<Arc<Self>, Error> {
        let ErrorOptions { name, base, uuid } = options;
        let uuid = uuid.unwrap_or_else(|| uuid_on(&*base));
        Ok(Arc::new(Self {
            wrapped: Wrapped::new(name, base, Some(uuid))?,
            rules: Default::default(),
            resumes: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }))
    }

    /// Makes I/Os fail from now on. Replaces an injection for the same kind of I/O.
    ///
    /// # Errors
    /// [`Error::Invalid`] if data is to be corrupted with 0, which changes nothing.
    pub fn inject(&self, injection: Injection) -> Result<(), Error> {
        injection.check(self.name())?;
        let Injection { op, error, count, queue_depth } = injection;
        let rules = match op {
            InjectedOp::Clear => {
                self.rules.iter().for_each(|rule| rule.count.store(0, Ordering::Relaxed));
                return Ok(());
            }
            InjectedOp::All => &self.rules[..],
            InjectedOp::Read => &self.rules[0..1],
            InjectedOp::Write => &self.rules[1..2],
            InjectedOp::Unmap => &self.rules[2..3],
            InjectedOp::Flush => &self.rules[3..4],
        };
        rules.iter().for_each(|rule| rule.set(error, count, queue_depth));
        Ok(())
    }

    /// Restarts all pending I/Os; injections may affect them again.
    pub fn resume_pending(&self) {
        // Release: a channel that sees the number also sees the injections that were cleared
        // before.
        self.resumes.fetch_add(1, Ordering::Release);
    }

    /// Fails all pending I/Os, for a reset or before the disk is deleted.
    pub fn abort_pending(&self) {
        self.aborts.fetch_add(1, Ordering::Release);
    }

    /// Returns how often pending I/Os were released.
    #[inline]
    fn releases(&self) -> Releases {
        // Acquire: pairs with the Release in `resume_pending` and `abort_pending`.
        let load = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        Releases { resumes: load(&self.resumes), aborts: load(&self.aborts) }
    }

    /// The base disk.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Bdev> {
        self.wrapped.base()
    }
}

impl Rule {
    fn set(&self, error: InjectedError, count: u32, queue_depth: u64) {
        // No I/O sees a partly written rule, unless it has loaded the count before this store.
        self.count.store(0, Ordering::Relaxed);
        let kind = match error {
            InjectedError::Failure => FAILURE,
            InjectedError::Pending => PENDING,
            InjectedError::NoMemory => NO_MEMORY,
            InjectedError::CorruptData { offset, value } => {
                self.offset.store(offset, Ordering::Relaxed);
                self.value.store(value, Ordering::Relaxed);
                CORRUPT_DATA
            }
        };
        self.error.store(kind, Ordering::Relaxed);
        self.queue_depth.store(queue_depth, Ordering::Relaxed);
        // Release: a thread that loads this count with Acquire sees the rest of the rule.
        self.count.store(count, Ordering::Release);
    }

    /// Returns the injection for the next I/O, and counts the I/O.
    #[inline]
    fn take(&self, with_base: u64) -> Option<InjectedError> {
        // Acquire: pairs with the Release in `set`.
        if self.count.load(Ordering::Acquire) == 0
            || with_base < self.queue_depth.load(Ordering::Relaxed)
        {
            return None;
        }
        self.count
            .fetch_update(Ordering::Acquire, Ordering::Acquire, |count| count.checked_sub(1))
            .ok()?;
        Some(match self.error.load(Ordering::Relaxed) {
            PENDING => InjectedError::Pending,
            NO_MEMORY => InjectedError::NoMemory,
            CORRUPT_DATA => InjectedError::CorruptData {
                offset: self.offset.load(Ordering::Relaxed),
                value: self.value.load(Ordering::Relaxed),
            },
            _ => InjectedError::Failure,
        })
    }

    /// Takes the count of an I/O back that the base did not accept. If the operator changes the
    /// rule at the same time, one I/O more may get the new injection.
    #[cold]
    fn put_back(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Wrapper for ErrorDisk {
    fn wrapped(&self) -> &Wrapped {
        &self.wrapped
    }

    fn product(&self) -> &'static str {
        "Error Injection Disk"
    }

    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(self.base(), depth)?;
        Ok(Box::new(ErrorChannel::new(self, base, depth)))
    }
}

/// How often the operator has released pending I/Os.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Releases {
    resumes: u64,
    aborts: u64,
}
