//! Reads the table of a bdev, for a bounded time.

use std::any::Any;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tracing::error;

use super::table::{self, Disk, Invalid, Table, WINDOW};
use crate::contract::Bdev;
use crate::error::Error;
use crate::thread_channel::{Buffer, EndedRequest, Request, Rights, ThreadChannel};

/// The result of an examination.
pub(super) enum Found {
    /// No table, or the bdev cannot have one.
    Nothing,
    Table(Table),
    /// Both tables are invalid.
    Invalid([Invalid; 2]),
    /// The bdev has not answered in time. The reads are alive as long as this value.
    NoAnswer(Weak<dyn Any + Send + Sync>),
}

/// Reads the table of a bdev. Blocks for `limit` at most, besides the time to open a channel.
///
/// # Errors
/// As [`Bdev::open`]; the system's error if a read fails.
pub(super) fn read(bdev: &Arc<dyn Bdev>, limit: Duration) -> Result<Found, Error> {
    let block_size = usize::try_from(bdev.block_size()).unwrap_or(usize::MAX);
    let num_blocks = bdev.num_blocks();
    let len = (WINDOW / block_size) * block_size;
    let size = bdev.size_bytes();
    // Each window holds the boot record and a header at least.
    if len < 2 * block_size || size < len as u64 {
        return Ok(Found::Nothing);
    }
    let mut channel = ThreadChannel::open(bdev, 2, Rights::Read)?;
    let reads = [Request::read(0, len), Request::read(size - len as u64, len)];
    let Some(ended) = run_both(&mut channel, reads, Instant::now() + limit) else {
        return Ok(Found::NoAnswer(abandon(bdev.name(), channel)));
    };
    let [front, back] = ended.map_err(|errno| {
        Error::of_errno(format!("{}: cannot read the partition table", bdev.name()), errno)
    })?;
    let disk = Disk { block_size, num_blocks, front: front.bytes(), back: back.bytes() };
    Ok(match table::parse(&disk) {
        Ok(Some(table)) => Found::Table(table),
        Ok(None) => Found::Nothing,
        Err(reasons) => Found::Invalid(reasons),
    })
}

/// Does two I/Os. `None` if they have not both ended in time.
fn run_both(
    channel: &mut ThreadChannel,
    requests: [Request; 2],
    deadline: Instant,
) -> Option<Result<[Buffer; 2], i32>> {
    let tags = requests.map(|request| channel.start(request));
    let mut ended = [None, None];
    loop {
        while let Some(EndedRequest { tag, request, result }) = channel.poll() {
            ended[usize::from(tag != tags[0])] = Some(result.map(|()| request.buffer));
        }
        ended = match ended {
            [Some(first), Some(second)] => {
                return Some(first.and_then(|first| Ok([first, second?])));
            }
            ended => ended,
        };
        if Instant::now() >= deadline || channel.sleep_until(&mut [], Some(deadline)).is_err() {
            return None;
        }
    }
}

/// Closes a channel, on a thread of its own, when its I/O has ended.
fn abandon(name: &str, mut channel: ThreadChannel) -> Weak<dyn Any + Send + Sync> {
    channel.abandon();
    let (held, name) = (Arc::new(()), name.to_owned());
    let reads = Arc::downgrade(&held);
    let close = move || {
        drop(channel);
        drop(held);
    };
    if let Err(e) = thread::Builder::new().name("vhost-gpt".into()).spawn(close) {
        error!("bdev {name}: cannot start a thread: {e}");
    }
    reads
}

#[cfg(test)]
mod tests;
