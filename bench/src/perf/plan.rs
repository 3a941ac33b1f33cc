//! The parameters of a run.

use std::path::PathBuf;
use std::time::Duration;

use front_end::{Backing, RingLayout, features, scsi};

use crate::load::Idle;

/// The order of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Random, with a uniform distribution.
    #[default]
    Random,
    /// Ascending, and again from the first block after the last.
    Sequential,
}

/// The kind of virtio device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// virtio-blk.
    #[default]
    Blk,
    /// virtio-scsi: the logical unit 0 of a target.
    Scsi {
        /// The number of the target.
        target: u8,
    },
}

impl Device {
    /// The index of the first queue of requests.
    pub(crate) fn first_queue(self) -> usize {
        match self {
            Self::Blk => 0,
            Self::Scsi { .. } => scsi::FIRST_COMMAND_QUEUE,
        }
    }

    /// The features that a common driver accepts.
    pub(crate) fn driver_features(self) -> u64 {
        match self {
            Self::Blk => features::DRIVER_FEATURES,
            Self::Scsi { .. } => scsi::DRIVER_FEATURES,
        }
    }
}

/// One run of a load.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's socket.
    pub socket: PathBuf,
    /// The kind of its device.
    pub device: Device,
    /// The order of blocks.
    pub order: Order,
    /// Percentage of reads.
    pub reads: u8,
    /// Bytes of a request, a multiple of 512.
    pub block_bytes: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Number of queues. Each uses a separate part of the range.
    pub queues: usize,
    /// Number of threads, among which the queues are distributed.
    pub threads: usize,
    /// The cores of the threads, in their order. If empty, threads run on any core.
    pub cores: Vec<usize>,
    /// Duration of the measurement.
    pub runtime: Duration,
    /// Time to run before the measurement.
    pub ramp: Duration,
    /// Write a pattern with the block's number and version, and compare it when reading.
    pub verify: bool,
    /// Requests per second on each queue, at a constant interval, independent of completions.
    pub rate: Option<f64>,
    /// The first byte of the disk to use.
    pub offset: u64,
    /// The number of bytes to use. `None` uses the disk up to its end.
    pub size: Option<u64>,
    /// The layout of the rings.
    pub rings: RingLayout,
    /// Descriptors of each ring. `None` is 256, or more if depth and block size need it.
    pub ring_size: Option<u16>,
    /// Put each request's descriptors into an indirect table.
    pub indirect: bool,
    /// Negotiate VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// The kind of guest memory.
    pub backing: Backing,
    /// Bytes of guest memory. `None` allocates as much as the load needs.
    pub ram_bytes: Option<u64>,
    /// What a thread does without completions.
    pub idle: Idle,
    /// Limit on the wait for an answer of the server, and for requests in flight at the end.
    pub limit: Duration,
    /// Seed of the sequence of requests, and of the pattern.
    pub seed: u64,
}

impl Plan {
    /// Random reads of 4 KiB, one at a time on one queue, for 10 seconds.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            device: Device::Blk,
            order: Order::Random,
            reads: 100,
            block_bytes: 4096,
            depth: 1,
            queues: 1,
            threads: 1,
            cores: Vec::new(),
            runtime: Duration::from_secs(10),
            ramp: Duration::ZERO,
            verify: false,
            rate: None,
            offset: 0,
            size: None,
            rings: RingLayout::Split,
            ring_size: None,
            indirect: false,
            event_idx: false,
            backing: Backing::Pages,
            ram_bytes: None,
            idle: Idle::Spin,
            limit: Duration::from_secs(30),
            seed: 1,
        }
    }
}
