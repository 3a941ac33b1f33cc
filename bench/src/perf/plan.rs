//! What a run is to do.

use std::path::PathBuf;
use std::time::Duration;

use front_end::{Backing, RingLayout};

use crate::load::Idle;

/// In which order blocks are visited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Each block as likely as any other.
    #[default]
    Random,
    /// One after another, and from the first again after the last.
    Sequential,
}

/// One run of a load.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's socket.
    pub socket: PathBuf,
    /// The order of blocks.
    pub order: Order,
    /// How many of a hundred requests are reads.
    pub reads: u8,
    /// Bytes in a request: a multiple of 512.
    pub block_bytes: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues. Each works on a part of the range of its own.
    pub queues: usize,
    /// Threads, which share the queues out among themselves.
    pub threads: usize,
    /// The cores that the threads run on, one after another; any with none named.
    pub cores: Vec<usize>,
    /// How long to measure.
    pub runtime: Duration,
    /// How long to run before that.
    pub ramp: Duration,
    /// Write a pattern that names block and version, and compare what is read with it.
    pub verify: bool,
    /// Requests a second on each queue, at even distance, whatever became of the ones before.
    pub rate: Option<f64>,
    /// The first byte of the disk to use.
    pub offset: u64,
    /// How many bytes to use; up to the disk's end without it.
    pub size: Option<u64>,
    /// The kind of rings.
    pub rings: RingLayout,
    /// Descriptors in each ring; without it 256, or more if depth and block size need it.
    pub ring_size: Option<u16>,
    /// Put each request's descriptors in a table of its own.
    pub indirect: bool,
    /// Agree on VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// What guest memory is made of.
    pub backing: Backing,
    /// Bytes of guest memory; what is needed without it.
    pub ram_bytes: Option<u64>,
    /// What to do when nothing has completed.
    pub idle: Idle,
    /// How long to wait for the server's answers, and for requests in flight at the end.
    pub limit: Duration,
    /// Chooses blocks and kinds, and is part of the pattern: the same seed makes the same sequence.
    pub seed: u64,
}

impl Plan {
    /// Random reads of 4 KiB, one at a time on one queue, for 10 seconds.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
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
