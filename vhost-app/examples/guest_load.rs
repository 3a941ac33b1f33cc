//! The test guest's load: writes blocks that name themselves and verifies them, several at a time.
//!
//! `guest_load DISK AT_MIB MIB` keeps [`DEPTH`] requests in flight past the page cache, each in a
//! share of the disk of its own. A request writes 1 to [`RUN`] blocks, or reads some and compares
//! them with what was last acknowledged. All meet after a *pass* of [`PASS`] requests each, so that
//! one request that is lost ends the passes. For each it prints `GUEST: pass N DISK AT_MIB`; what
//! is wrong, an I/O error included, it prints as `GUEST: io DISK AT_MIB failed: …`, and ends with
//! status 1. When the file `/tmp/stop.DISK` comes, it reads all of its blocks once more, prints
//! `GUEST: io DISK AT_MIB done` and ends with status 0.
//!
//! `ci/guest-image` builds it with `rustc` alone, so it needs nothing but std.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::exit;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::UNIX_EPOCH;

/// Requests in flight.
const DEPTH: usize = 8;
/// Most blocks in a request.
const RUN: usize = 16;
/// Requests in a pass, per request in flight.
const PASS: usize = 32;

const BLOCK_BYTES: usize = 4096;
const SECTOR_WORDS: usize = 64;
const MIB: usize = 1 << 20;
const O_DIRECT: i32 = 0o40000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A part of the disk with one request in flight, and what must be there.
struct Share {
    file: File,
    /// Tells this run of the program from all others.
    run: u64,
    /// The disk's block that is the share's first.
    first: usize,
    /// Per block, the number of its last write that was acknowledged.
    written: Vec<u64>,
    writes: u64,
    random: u64,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, disk, at_mib, mib] = &args[..] else {
        eprintln!("usage: guest_load DISK AT_MIB MIB");
        exit(2);
    };
    let shares = shares(disk, at_mib, mib).unwrap_or_else(|e| fail(disk, at_mib, &*e));
    let stop_file = format!("/tmp/stop.{disk}");
    let (meeting, stop) = (Barrier::new(DEPTH), AtomicBool::new(false));
    thread::scope(|scope| {
        for (n, mut share) in shares.into_iter().enumerate() {
            let (meeting, stop, stop_file) = (&meeting, &stop, Path::new(&stop_file));
            scope.spawn(move || {
                share.fill().unwrap_or_else(|e| fail(disk, at_mib, &*e));
                for pass in 1_u64.. {
                    share.pass().unwrap_or_else(|e| fail(disk, at_mib, &*e));
                    if n == 0 {
                        share.file.sync_data().unwrap_or_else(|e| fail(disk, at_mib, &e));
                        stop.store(stop_file.exists(), Ordering::Relaxed);
                    }
                    if meeting.wait().is_leader() {
                        println!("GUEST: pass {pass} {disk} {at_mib}");
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    // Nobody may change the word before all have read it.
                    meeting.wait();
                }
                share.verify_all().unwrap_or_else(|e| fail(disk, at_mib, &*e));
            });
        }
    });
    println!("GUEST: io {disk} {at_mib} done");
}

fn fail(disk: &str, at_mib: &str, e: &dyn Error) -> ! {
    println!("GUEST: io {disk} {at_mib} failed: {e}");
    exit(1);
}

fn shares(disk: &str, at_mib: &str, mib: &str) -> Outcome<Vec<Share>> {
    let (at_mib, mib): (usize, usize) = (at_mib.parse()?, mib.parse()?);
    let run = u64::try_from(UNIX_EPOCH.elapsed()?.as_nanos())?;
    let blocks = mib * MIB / BLOCK_BYTES / DEPTH;
    (0..DEPTH)
        .map(|n| {
            let path = format!("/dev/{disk}");
            let mut options = OpenOptions::new();
            Ok(Share {
                file: options.read(true).write(true).custom_flags(O_DIRECT).open(path)?,
                run,
                first: at_mib * MIB / BLOCK_BYTES + n * blocks,
                written: vec![0; blocks],
                writes: 0,
                random: run | 1 << n,
            })
        })
        .collect()
}

impl Share {
    /// Writes every block once.
    fn fill(&mut self) -> Outcome<()> {
        let mut buffer = vec![0; (RUN + 1) * BLOCK_BYTES];
        for at in (0..self.written.len()).step_by(RUN) {
            self.write(&mut buffer, at..self.written.len().min(at + RUN))?;
        }
        Ok(())
    }

    fn pass(&mut self) -> Outcome<()> {
        // New memory for each pass, which may have been plugged in since the last.
        let mut buffer = vec![0; (RUN + 1) * BLOCK_BYTES];
        for _ in 0..PASS {
            let len = 1 + self.random(RUN.min(self.written.len()));
            let at = self.random(self.written.len() - len + 1);
            if self.random(2) == 0 {
                self.write(&mut buffer, at..at + len)?;
            } else {
                self.verify(&mut buffer, at..at + len)?;
            }
        }
        Ok(())
    }

    fn verify_all(&self) -> Outcome<()> {
        let mut buffer = vec![0; (RUN + 1) * BLOCK_BYTES];
        (0..self.written.len())
            .step_by(RUN)
            .try_for_each(|at| self.verify(&mut buffer, at..self.written.len().min(at + RUN)))
    }

    fn write(&mut self, buffer: &mut [u8], blocks: Range<usize>) -> Outcome<()> {
        self.writes += 1;
        let bytes = aligned(buffer, blocks.len());
        for (word, index) in bytes.chunks_exact_mut(8).zip(0..) {
            word.copy_from_slice(&self.word(&blocks, index, self.writes).to_le_bytes());
        }
        let at = self.offset(&blocks);
        self.file.write_all_at(bytes, at).map_err(|e| format!("writing at byte {at}: {e}"))?;
        self.written[blocks].fill(self.writes);
        Ok(())
    }

    fn verify(&self, buffer: &mut [u8], blocks: Range<usize>) -> Outcome<()> {
        let bytes = aligned(buffer, blocks.len());
        let at = self.offset(&blocks);
        self.file.read_exact_at(bytes, at).map_err(|e| format!("reading at byte {at}: {e}"))?;
        for (word, index) in bytes.as_chunks().0.iter().zip(0..) {
            let is = u64::from_le_bytes(*word);
            let write = self.written[blocks.start + index / (BLOCK_BYTES / 8)];
            let expected = self.word(&blocks, index, write);
            if is != expected {
                let at = at + index as u64 * 8;
                let what = ["run", "offset", "write", "filling"][(index % SECTOR_WORDS).min(3)];
                return Err(format!("at byte {at} {what} is {is}, expected {expected}").into());
            }
        }
        Ok(())
    }

    /// What a word has to be: each sector begins with run, offset and write, and the rest follows
    /// from these.
    fn word(&self, blocks: &Range<usize>, index: usize, write: u64) -> u64 {
        let offset = self.offset(blocks) + (index / SECTOR_WORDS * SECTOR_WORDS * 8) as u64;
        match index % SECTOR_WORDS {
            0 => self.run,
            1 => offset,
            2 => write,
            n => {
                let name = self.run ^ offset.rotate_left(32) ^ write.rotate_left(48);
                (name + n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            }
        }
    }

    fn offset(&self, blocks: &Range<usize>) -> u64 {
        ((self.first + blocks.start) * BLOCK_BYTES) as u64
    }

    /// A number below `end`, by xorshift.
    fn random(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % end as u64).expect("less than `end`")
    }
}

/// The part of a buffer that O_DIRECT takes: one block longer than what is wanted of it.
fn aligned(buffer: &mut [u8], blocks: usize) -> &mut [u8] {
    let at = buffer.as_ptr().align_offset(BLOCK_BYTES);
    &mut buffer[at..at + blocks * BLOCK_BYTES]
}
