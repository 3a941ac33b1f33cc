//! I/O of the members' superblocks. Each member has a thread of its own, so that one that hangs
//! holds up its array for a bounded time only.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Bdev, Buffer, Error, Op, Request, Rights, ThreadChannel};

use crate::level::MEMBERS_MAX;
use crate::member_channel::{Listed, address, give_up_superblock};
use crate::superblock::{HEADER, Parsed, Superblock};

/// The time in which a member must take a superblock. Guests' writes may wait meanwhile.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// Writes `bytes` at the beginning of each member, and makes them durable. Blocks for `limit` at
/// most. Returns the slots that have failed, with the reasons. A write that has not ended in time
/// goes on, and the next ones to its member fail until it has ended: it could land last.
pub(crate) fn write_all(
    members: Vec<(usize, Arc<dyn Bdev>)>,
    bytes: &[u8],
    limit: Duration,
) -> Vec<(usize, Error)> {
    let deadline = Instant::now() + limit;
    let (sender, results) = mpsc::channel();
    let mut left = vec![];
    let mut failed = vec![];
    for (slot, bdev) in members {
        let name = bdev.name().to_owned();
        let (sender, mut buffer) = (sender.clone(), Buffer::new(bytes.len()));
        buffer.bytes_mut().copy_from_slice(bytes);
        let address = address(&bdev);
        let work = move || {
            let result = match Listed::superblock(&bdev, deadline) {
                Some(_listed) => write(&bdev, buffer),
                None => Err(system(
                    bdev.name(),
                    "an earlier write of its superblock has not ended",
                    libc::EBUSY,
                )),
            };
            // First: the caller may wait until the bdev has no user.
            drop(bdev);
            let _ = sender.send((slot, result));
        };
        match thread::Builder::new().name("vhost-raid-sb".into()).spawn(work) {
            Ok(_) => left.push((slot, name, address)),
            Err(source) => failed.push((slot, Error::System { what: name, source })),
        }
    }
    while !left.is_empty() {
        let time = deadline.saturating_duration_since(Instant::now());
        let Ok((slot, result)) = results.recv_timeout(time) else { break };
        left.retain(|(other, ..)| *other != slot);
        failed.extend(result.err().map(|e| (slot, e)));
    }
    for (slot, name, bdev) in left {
        give_up_superblock(bdev);
        failed.push((slot, system(&name, "timed out writing the superblock", libc::ETIMEDOUT)));
    }
    failed
}

fn system(name: &str, text: &str, errno: i32) -> Error {
    Error::of_errno(format!("{name}: {text}"), errno)
}

/// Writes a superblock, and makes it durable.
fn write(bdev: &Arc<dyn Bdev>, buffer: Buffer) -> Result<(), Error> {
    let failed = |errno| system(bdev.name(), "cannot write the superblock", errno);
    let mut channel = ThreadChannel::open(bdev, 1, Rights::Write)?;
    channel.run(Request::write(0, buffer)).map_err(failed)?;
    if bdev.features().flush {
        channel.run(Request::plain(Op::Flush, 0, 0)).map_err(failed)?;
    }
    Ok(())
}

/// Bytes that a superblock has at most, in whole blocks.
pub(crate) fn read_len(block_size: u32) -> usize {
    let block = usize::try_from(block_size).unwrap_or(usize::MAX).max(1);
    Superblock::len(MEMBERS_MAX).max(HEADER).next_multiple_of(block)
}

/// Reads the superblock of a bdev. Blocks.
///
/// # Errors
/// As [`Bdev::open`]; the system's error if the read fails.
pub(crate) fn read(bdev: &Arc<dyn Bdev>) -> Result<Parsed, Error> {
    let block_size = bdev.block_size();
    let len = read_len(block_size);
    if bdev.size_bytes() < len as u64 {
        return Ok(Parsed::None);
    }
    let mut channel = ThreadChannel::open(bdev, 1, Rights::Read)?;
    let failed = |errno| system(bdev.name(), "cannot read the superblock", errno);
    let buffer = channel.run(Request::read(0, len)).map_err(failed)?;
    Ok(Superblock::parse(buffer.bytes(), block_size))
}
