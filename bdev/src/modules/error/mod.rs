//! A wrapper that makes a disk fail, on demand: errors, silence, and spoiled data.

mod channel;
pub(crate) mod module;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use uuid::Uuid;

use crate::contract::{Bdev, Channel};
use crate::error::Error;
use crate::io::Op;
use crate::wrapper::{Wrapped, Wrapper};

use channel::ErrorChannel;

/// Which I/Os an injection is for. As in SPDK there is none for write-zeroes, nor does `All`
/// include it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedOp {
    /// Takes all injections back. I/Os that are pending stay so.
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

/// What happens to an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedError {
    /// It fails at once and does nothing. SPDK's `nvme_failure` is the same here, as virtio has
    /// one error for both.
    Failure,
    /// It does nothing and stays outstanding until [`ErrorDisk::resume_pending`] or
    /// [`ErrorDisk::abort_pending`].
    Pending,
    /// It is begun one poll later, as after a moment without memory.
    NoMemory,
    /// One byte is changed on its way between disk and memory: that at `offset` in the I/O's data
    /// is combined with `value` by exclusive or. Flushes and unmaps are left alone, but count.
    CorruptData {
        /// In bytes, into the data of the I/O. Past its end nothing is changed.
        offset: u64,
        /// Not 0.
        value: u8,
    },
}

/// What [`ErrorDisk::inject`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// To which I/Os.
    pub op: InjectedOp,
    /// What happens to them.
    pub error: InjectedError,
    /// To how many of each kind, over all channels. 0 takes an injection back.
    pub count: u32,
    /// Only while at least so many I/Os of the same channel are with the base.
    pub queue_depth: u64,
}

/// A disk that fails when told to.
///
/// Channels look at the injections without a lock. While one is being changed, an I/O
/// that runs at the same time may get the old or the new one.
pub struct ErrorDisk {
    wrapped: Wrapped,
    /// For the operation with this [`rule_index`].
    rules: [Rule; 4],
    /// How often pending I/Os were resumed, and aborted.
    resumes: AtomicU64,
    aborts: AtomicU64,
}

/// What [`ErrorDisk::create`] makes.
#[derive(Clone)]
pub struct ErrorOptions {
    /// Name of the device; SPDK's is `EE_` and the base's.
    pub name: String,
    /// The disk with the bytes.
    pub base: Arc<dyn Bdev>,
    /// Identity; random if absent.
    pub uuid: Option<Uuid>,
}

/// The injection for one kind of I/O.
#[derive(Debug, Default)]
struct Rule {
    /// How many I/Os are still to be hit.
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

/// Index of the rule for an operation.
fn rule_index(op: Op) -> Option<usize> {
    match op {
        Op::Read => Some(0),
        Op::Write => Some(1),
        Op::Unmap => Some(2),
        Op::Flush => Some(3),
        Op::WriteZeroes => None,
    }
}

impl ErrorDisk {
    /// Wraps a disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is empty.
    pub fn create(options: ErrorOptions) -> Result<Arc<Self>, Error> {
        let ErrorOptions { name, base, uuid } = options;
        Ok(Arc::new(Self {
            wrapped: Wrapped::new(name, base, uuid)?,
            rules: Default::default(),
            resumes: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }))
    }

    /// Makes I/Os fail from now on. Replaces what was injected for the same kind of I/O.
    ///
    /// # Errors
    /// [`Error::Invalid`] if data is to be corrupted with 0, which would not.
    pub fn inject(&self, injection: Injection) -> Result<(), Error> {
        let Injection { op, error, count, queue_depth } = injection;
        if let InjectedError::CorruptData { value: 0, .. } = error {
            return Err(Error::Invalid(format!("{}: corrupt_value is 0", self.name())));
        }
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

    /// Begins all pending I/Os anew; injections may hit them again.
    pub fn resume_pending(&self) {
        // Release: a channel that sees the number sees the injections that were cleared before it.
        self.resumes.fetch_add(1, Ordering::Release);
    }

    /// Fails all pending I/Os, for a reset or before the disk is deleted.
    pub fn abort_pending(&self) {
        self.aborts.fetch_add(1, Ordering::Release);
    }

    /// How often pending I/Os were released.
    #[inline]
    fn releases(&self) -> Releases {
        // Acquire: pairs with the Release in `resume_pending` and `abort_pending`.
        let load = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        Releases { resumes: load(&self.resumes), aborts: load(&self.aborts) }
    }

    /// The disk with the bytes.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Bdev> {
        self.wrapped.base()
    }
}

impl Rule {
    fn set(&self, error: InjectedError, count: u32, queue_depth: u64) {
        // Nobody is hit by a half-written rule, unless it loaded a count before this store.
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
        // Release: who loads this count with Acquire sees the rest of the rule.
        self.count.store(count, Ordering::Release);
    }

    /// What hits the next I/O, which counts as one.
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
}

impl Wrapper for ErrorDisk {
    fn wrapped(&self) -> &Wrapped {
        &self.wrapped
    }

    fn product(&self) -> &'static str {
        "Error Injection Disk"
    }

    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = Arc::clone(self.base()).open(depth)?;
        Ok(Box::new(ErrorChannel::new(self, base, depth)))
    }
}

/// How often the operator has released pending I/Os.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Releases {
    resumes: u64,
    aborts: u64,
}
