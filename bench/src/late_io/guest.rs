//! The guest of the slow disk, and its neighbour.

use std::collections::HashSet;
use std::path::Path;

use front_end::features::{DRIVER_FEATURES, EVENT_IDX, RING_PACKED};
use front_end::packed::FIRST_BASE;
use front_end::{
    AnyQueue, Error, FrontEnd, GuestRam, Options, Queue, QueueOptions, Request, RingLayout,
    STATUS_OK, Segment, Tag,
};

use super::{Toll, wait_until};
use crate::error::Result;
use crate::servers;

const BLOCK_BYTES: u32 = 4096;
const BLOCK_SECTORS: u64 = 8;
/// Blocks that are written, and as many behind them that are read.
const BLOCKS: usize = 16;
/// What a guest puts into the memory of a completed read.
const REUSED: u8 = 0xd5;

/// How far the guest has come in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The first writes and reads are in flight.
    First,
    /// It was told that they are done, and writes newer data.
    Newer,
    Flush,
    Done,
}

/// A guest whose memory, ring and in-flight area outlive servers.
pub(super) struct Guest {
    ram: std::sync::Arc<GuestRam>,
    queue: AnyQueue,
    front_end: FrontEnd,
    /// The kernel reads a buffer when the disk does the write, so each version has its own.
    older: Vec<Segment>,
    newer: Vec<Segment>,
    reads: Vec<Segment>,
    checked: Vec<Segment>,
    flying: HashSet<Tag>,
    answered: u64,
    stage: Stage,
    /// Of the data, counted up with each write of all blocks.
    version: u64,
}

impl Guest {
    pub(super) fn connect(socket: &Path, rings: RingLayout) -> Result<Self> {
        let packed = rings == RingLayout::Packed;
        let ram = GuestRam::new(&[4 << 20])?;
        let features = DRIVER_FEATURES | if packed { RING_PACKED } else { 0 };
        let options = Options { features, inflight: true, ..Options::default() };
        let mut front_end = FrontEnd::connect(socket, ram.clone(), options)?;
        if packed && front_end.offered() & RING_PACKED == 0 {
            return Err(Error::NotOffered("packed rings").into());
        }
        let event_idx = front_end.features() & EVENT_IDX != 0;
        let queue = AnyQueue::new(&ram, 0, QueueOptions::default(), event_idx, packed)?;
        let base = if packed { FIRST_BASE } else { 0 };
        front_end.start(vec![(queue.ring().clone(), base)])?;
        let buffers = || -> front_end::Result<Vec<Segment>> {
            (0..BLOCKS).map(|_| ram.alloc(BLOCK_BYTES, BLOCK_BYTES.into())).collect()
        };
        let [older, newer, reads, checked] = [buffers()?, buffers()?, buffers()?, buffers()?];
        Ok(Self {
            ram,
            queue,
            front_end,
            older,
            newer,
            reads,
            checked,
            flying: HashSet::new(),
            answered: 0,
            stage: Stage::Done,
            version: 0,
        })
    }

    /// Connects to the server that has taken over.
    pub(super) fn reconnect(&mut self) -> Result<()> {
        self.front_end.reconnect()?;
        // As QEMU does: nobody knows which kicks the server before has seen.
        Ok(self.queue.ring().kick()?)
    }

    /// Submits writes and reads.
    pub(super) fn begin(&mut self) -> Result<()> {
        (self.stage, self.answered) = (Stage::First, 0);
        self.version += 1;
        for block in 0..BLOCKS {
            self.fill(self.older[block], block)?;
            self.submit(&Request::write(sector(block), &[self.older[block]]))?;
            self.submit(&Request::read(sector(BLOCKS + block), &[self.reads[block]]))?;
        }
        self.queue.kick()?;
        Ok(())
    }

    /// Requests that have not come back.
    pub(super) fn in_flight(&self) -> u64 {
        self.flying.len() as u64
    }

    /// Whether a request of this round has come back.
    pub(super) fn has_been_answered(&self) -> bool {
        self.answered > 0
    }

    /// Takes what has come back, and submits what comes next. Returns whether everything is done.
    pub(super) fn go_on(&mut self, toll: &mut Toll) -> Result<bool> {
        while let Some(done) = self.queue.poll()? {
            if !self.flying.remove(&done.tag) {
                toll.note(|| format!("{:?} came back and was not in flight", done.tag));
            }
            self.answered += 1;
            if done.status != STATUS_OK {
                toll.errors += 1;
                toll.note(|| format!("a request came back with status {}", done.status));
            }
        }
        if !self.flying.is_empty() {
            return Ok(false);
        }
        self.stage = match self.stage {
            Stage::First => {
                self.version += 1;
                for block in 0..BLOCKS {
                    self.ram.write(self.reads[block].gpa, &[REUSED; BLOCK_BYTES as usize])?;
                    self.fill(self.newer[block], block)?;
                    self.submit(&Request::write(sector(block), &[self.newer[block]]))?;
                }
                Stage::Newer
            }
            Stage::Newer => {
                self.submit(&Request::flush())?;
                Stage::Flush
            }
            Stage::Flush | Stage::Done => Stage::Done,
        };
        self.queue.kick()?;
        Ok(self.stage == Stage::Done)
    }

    /// Looks at the disk and at the memory of the reads.
    pub(super) fn check(&mut self, toll: &mut Toll) -> servers::Result<()> {
        for block in 0..BLOCKS {
            self.submit(&Request::read(sector(block), &[self.checked[block]]))?;
        }
        self.queue.kick()?;
        wait_until("reads", || Ok(self.go_on(toll)?))?;
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for block in 0..BLOCKS {
            self.ram.read(self.checked[block].gpa, &mut bytes)?;
            if bytes != data(self.version, block) {
                toll.stale += 1;
                toll.note(|| format!("block {block} has not what was written and flushed last"));
            }
            self.ram.read(self.reads[block].gpa, &mut bytes)?;
            if bytes.iter().any(|byte| *byte != REUSED) {
                toll.corrupted += 1;
                toll.note(|| format!("the buffer of read {block} changed after its completion"));
            }
        }
        Ok(())
    }

    fn fill(&self, buffer: Segment, block: usize) -> Result<()> {
        Ok(self.ram.write(buffer.gpa, &data(self.version, block))?)
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<()> {
        let tag = self.queue.submit(request)?;
        self.flying.insert(tag);
        Ok(())
    }
}

fn sector(block: usize) -> u64 {
    block as u64 * BLOCK_SECTORS
}

/// A block's bytes in a version.
fn data(version: u64, block: usize) -> Vec<u8> {
    let word = (version << 8 | block as u64).to_le_bytes();
    word.repeat(BLOCK_BYTES as usize / word.len())
}

/// A guest on another disk of the same server.
pub(super) struct Neighbour {
    queue: Queue,
    buffer: Segment,
    _front_end: FrontEnd,
}

impl Neighbour {
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let ram = GuestRam::new(&[2 << 20])?;
        let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default())?;
        let queue = front_end.start_new(1, QueueOptions::default())?.remove(0);
        let buffer = ram.alloc(BLOCK_BYTES, BLOCK_BYTES.into())?;
        Ok(Self { queue, buffer, _front_end: front_end })
    }

    /// Does so many writes, one after the other.
    pub(super) fn work(&mut self, requests: u64) -> Result<()> {
        for n in 0..requests {
            let sector = n % BLOCKS as u64 * BLOCK_SECTORS;
            let done = self.queue.run(&Request::write(sector, &[self.buffer]))?;
            if done.status != STATUS_OK {
                return Err(Error::Nonsense("a neighbour's request fails").into());
            }
        }
        Ok(())
    }
}
