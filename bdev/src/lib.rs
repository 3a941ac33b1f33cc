//! Block devices (bdevs), and wrappers around them.
//!
//! A [`Bdev`] is shared: it has a geometry, a [`Topology`], features, and [`Bdev::open`]. I/O goes
//! through a [`Channel`]. A channel has one owner at a time (the virtqueue that it was opened for)
//! and therefore needs no lock. Channels are opened and dropped on the control side and used on a
//! reactor. So the methods of `Bdev` may block and allocate, and the methods of `Channel` may not.
//!
//! An [`Io`] names a range of the device and [`Segment`]s of a guest's memory. Devices in memory
//! ([`Malloc`], [`Null`]) complete it inside [`Channel::submit`], except for a very long I/O, which
//! [`Malloc`] copies in steps. [`memory`] is the only place that accesses a guest's bytes. Devices
//! in files ([`FileDisk`]) queue it for the kernel, or for worker threads if it may block. They
//! submit the batch in [`Channel::kick`], and report its completions from [`Channel::poll`]. A
//! channel keeps the reason of each failed I/O ([`Channel::failure`]). The channel's owner adds it
//! to the bdev's counters ([`Stats`]), and the control side logs it. While rings use a disk in a
//! file, a [`Lease`] keeps other processes of this program from using it. Wrappers ([`Delay`],
//! [`ErrorDisk`], [`Passthru`]) are bdevs on another bdev: the I/O passes through them in both
//! directions, and they can delay it, fail it or corrupt its data.
//! Each kind of bdev is a module ([`BdevModule`], one folder below [`modules`]). Its RPC methods
//! create bdevs. The [`Registry`] lists them by name, with [`Claim`]s on their bases. [`life`]
//! creates and deletes them. The program that runs the modules is their [`Host`].
//!
//! Forbidden dependencies: an async runtime, DPDK, and a JSON-RPC server ([`method`] takes its
//! place).
//!
//! The crate `bdev-conformance` is one test suite that every device and wrapper passes;
//! `tests/conformance` runs it.

mod access;
mod bdev_channel;
mod contract;
mod error;
mod failure;
pub mod io;
pub mod memory;
pub mod stats;

mod geometry;
mod topology;

mod cuts;
mod grace;
mod wake_set;

mod available;

mod durability;
mod line;
mod outstanding;
mod pages;
mod queue_channel;
mod shortcut;
mod taken;

pub mod qos;
mod sync;

mod thread_channel;

pub mod control;

pub mod modules;
mod waker;
mod wrapper;

pub use access::Access;
pub use available::control_group_mounts;
pub use bdev_channel::BdevChannel;
pub use contract::{
    Bdev, Channel, Extent, Features, Granted, Lease, Storage, Wait, WakeFds, with_bases,
};
pub use control::module::BdevModule;
pub use control::{
    Aside, BdevEvent, BdevId, Claim, ClaimKind, Claimed, Errno, Host, Live, OpenFile, Registry,
    Reservation, Unanswered, account_name, life, method, module,
};
pub use cuts::Cuts;
pub use durability::Durability;
pub use error::Error;
pub use failure::{FAILURE_KINDS, Failure, FailureKind};
pub use geometry::{BLOCK_SIZE_MIN, checked_size, within};
pub use grace::{Begun, Grace, InFlight, Period};
pub use io::{Completion, Io, OPS, Op, Segment, Status, Submit, Tag};
pub use line::{Ended, Line};
pub use memory::Stores;
pub use modules::delay::{Delay, DelayOptions, Latency, LatencyKind};
pub use modules::error::{ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection};
pub use modules::file::{
    Alignment, Engine, FileDisk, FileOptions, Flavour, Holder, LeaseState, Service, WorkerCounts,
    check_alone, check_unopened, is_nvme_control, not_of_kind, open_file, show_lease,
};
pub use modules::malloc::{Malloc, MallocOptions};
pub use modules::null::{Null, NullOptions};
pub use modules::passthru::Passthru;
pub use modules::split::Part;
pub use outstanding::Outstanding;
pub use pages::Backing;
pub use qos::{Limiting, Qos, QosUser, RateLimits};
pub use queue_channel::{QueueChannel, SharedQueue};
pub use shortcut::Shortcut;
pub use stats::{Counters, HistogramOptions, Latencies, OpCounts, Stats, Sums, UserCounts};
pub use taken::{Taken, TryTaken};
pub use thread_channel::{Buffer, EndedRequest, Request, Rights, ThreadChannel};
pub use topology::Topology;
pub use wake_set::WakeSet;
pub use waker::Waker;
pub use wrapper::{Wrapped, Wrapper, derived_uuid};
