//! What a load needs to know of the disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use front_end::features::EVENT_IDX;
use front_end::features::RING_PACKED;
use front_end::prepared::{Blk, Scsi};
use front_end::scsi::cdb::{self, Cdb};
use front_end::scsi::{Command, CommandQueue, FIRST_COMMAND_QUEUE, Layout, Response, code, lun};
use front_end::{FrontEnd, GuestRam, QueueOptions, Segment};

use crate::error::{Error, Result};
use crate::perf::plan::Plan;
use crate::perf::work::SECTOR;

/// VIRTIO_BLK_F_SIZE_MAX: there is a limit on the bytes of a segment.
const SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX: there is a limit on the segments of a request.
const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO: the disk is read-only.
const READ_ONLY: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE: the disk reports its block size.
const BLK_SIZE: u64 = 1 << 6;

/// A disk, as its device reports it.
#[derive(Debug)]
pub(crate) struct Disk<F> {
    /// The form of its requests.
    pub(crate) form: F,
    pub(crate) bytes: u64,
    /// Bytes of a logical block, a multiple of 512.
    pub(crate) block_bytes: u32,
    /// Limit on the bytes of a data segment.
    pub(crate) segment_bytes: u32,
    /// Limit on the data segments of a request.
    pub(crate) segments: u32,
    pub(crate) read_only: bool,
}

impl Disk<Blk> {
    /// Reads the configuration space.
    ///
    /// # Errors
    /// There is none, or the back end refuses.
    pub(crate) fn of_blk(front_end: &mut FrontEnd) -> Result<Self> {
        let config = front_end.config()?;
        let offered = front_end.offered();
        // A limit of 0, as qemu-storage-daemon's size_max, means no limit.
        let limit = |bit, max| if offered & bit != 0 && max > 0 { max } else { u32::MAX };
        Ok(Self {
            form: Blk,
            bytes: config.capacity.saturating_mul(SECTOR.into()),
            block_bytes: if offered & BLK_SIZE != 0 { config.blk_size.max(SECTOR) } else { SECTOR },
            segment_bytes: limit(SIZE_MAX, config.size_max),
            segments: limit(SEG_MAX, config.seg_max),
            read_only: offered & READ_ONLY != 0,
        })
    }
}

/// Most guest memory that [`Disk::of_scsi`] takes: a small ring, and a page for each of its commands
/// at most.
pub(crate) const ASKING_BYTES: u64 = 64 << 10;
/// Descriptors of the ring with which the disk is asked.
const RING_SIZE: u16 = 8;
/// Unit attentions in a row, at most: each condition is reported once (SAM-5).
const ATTENTIONS_MAX: usize = 32;
/// UNIT ATTENTION.
const UNIT_ATTENTION: u8 = 6;
/// Bytes of the answers to READ CAPACITY(16) and MODE SENSE(6), as far as they are used.
const ANSWER_BYTES: u32 = 32;

impl Disk<Scsi> {
    /// Starts the first queue of commands, asks the logical unit 0 of a target, and stops the queue
    /// again. Afterwards the rings are to be started one by one, without another negotiation, after
    /// which there would be another unit attention.
    ///
    /// # Errors
    /// The controller has no such target, the disk is not ready or its block size is not usable, or
    /// the back end refuses.
    pub(crate) fn of_scsi(
        front_end: &mut FrontEnd,
        ram: &Arc<GuestRam>,
        plan: &Plan,
        target: u8,
    ) -> Result<Self> {
        let options = QueueOptions { size: RING_SIZE, ..QueueOptions::default() };
        let negotiated = |bit| front_end.features() & bit != 0;
        let layout = (negotiated(EVENT_IDX), negotiated(RING_PACKED));
        let queue = CommandQueue::new(ram, FIRST_COMMAND_QUEUE, options, layout, 0)?;
        front_end.start(vec![(Arc::clone(queue.ring()), queue.base())])?;
        let answer = ram.alloc(ANSWER_BYTES, 64)?;
        let mut asking = Asking { queue, ram, answer, target, limit: plan.limit };
        let disk = asking.ask()?;
        front_end.stop_ring(FIRST_COMMAND_QUEUE)?;
        Ok(disk)
    }
}

/// Asks a logical unit with commands, one at a time.
struct Asking<'r> {
    queue: CommandQueue,
    ram: &'r GuestRam,
    answer: Segment,
    target: u8,
    limit: Duration,
}

impl Asking<'_> {
    fn ask(&mut self) -> Result<Disk<Scsi>> {
        let ready = self.until_attentions_are_gone()?;
        self.check("TEST UNIT READY", &ready)?;
        let capacity = self.run("READ CAPACITY(16)", cdb::read_capacity(ANSWER_BYTES))?;
        let [a, b, c, d, e, f, g, h, rest @ ..] = capacity;
        let last = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let [a, b, c, d, ..] = rest;
        let block_bytes = u32::from_be_bytes([a, b, c, d]);
        if !block_bytes.is_power_of_two() || block_bytes < SECTOR {
            return Err(Error::TooLittle(format!(
                "target {} has blocks of {block_bytes} bytes: expected a power of two from {SECTOR} on",
                self.target
            )));
        }
        // SPC-4, MODE SENSE(6): all pages, without block descriptors. WP is in the header.
        let modes = self.run("MODE SENSE(6)", cdb::of(&[0x1a, 0x08, 0x3f, 0, 4]))?;
        Ok(Disk {
            form: Scsi { lun: lun(self.target, 0), block_bytes },
            bytes: last.saturating_add(1).saturating_mul(block_bytes.into()),
            block_bytes,
            // The limits are in the configuration space, which belongs to the front end.
            segment_bytes: u32::MAX,
            segments: u32::MAX,
            read_only: modes[2] & 0x80 != 0,
        })
    }

    /// Sends TEST UNIT READY until no unit attention is pending, and returns the last response.
    fn until_attentions_are_gone(&mut self) -> Result<Response> {
        let mut response = self.response(cdb::test_unit_ready(), &[])?;
        for _ in 0..ATTENTIONS_MAX {
            if response.sense().is_none_or(|(key, ..)| key != UNIT_ATTENTION) {
                break;
            }
            response = self.response(cdb::test_unit_ready(), &[])?;
        }
        Ok(response)
    }

    /// Runs a command that has to succeed, and returns its data.
    fn run(&mut self, name: &str, cdb: Cdb) -> Result<[u8; ANSWER_BYTES as usize]> {
        let answer = [self.answer];
        let response = self.response(cdb, &answer)?;
        self.check(name, &response)?;
        let mut bytes = [0; ANSWER_BYTES as usize];
        self.ram.read(self.answer.gpa, &mut bytes)?;
        Ok(bytes)
    }

    fn check(&self, name: &str, response: &Response) -> Result<()> {
        let Response { response: answered, status, .. } = *response;
        let target = self.target;
        let why = match answered {
            _ if response.is_good() => return Ok(()),
            code::BAD_TARGET => format!("the controller has no target {target}"),
            code::UNWRITTEN => {
                format!("{name} completed without a response: is this a virtio-scsi controller?")
            }
            _ => {
                let sense = response.sense().map(|(key, code, qualifier)| {
                    format!(", sense {key:x}/{code:02x}/{qualifier:02x}")
                });
                let sense = sense.unwrap_or_default();
                format!(
                    "target {target}: {name} completed with response {answered}, status \
                     {status}{sense}"
                )
            }
        };
        Err(Error::TooLittle(why))
    }

    /// Runs a command, and returns its response.
    fn response(&mut self, cdb: Cdb, data_in: &[Segment]) -> Result<Response> {
        let command = Command::new(lun(self.target, 0), 0, cdb).with_data_in(data_in);
        self.queue.submit(&command, Layout::Separate)?;
        let begin = Instant::now();
        loop {
            // Always: a back end that has just started the queue may not have seen a kick.
            self.queue.kick()?;
            if let Some(done) = self.queue.poll()? {
                return Ok(done.response);
            }
            if begin.elapsed() > self.limit {
                let limit = self.limit;
                let why = format!("no answer to command {:#04x} within {limit:?}", cdb[0]);
                return Err(Error::TooLittle(why));
            }
            std::thread::yield_now();
        }
    }
}
