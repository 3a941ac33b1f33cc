//! Queues for any requests. Each request is laid out when it is submitted.

mod any;
mod packed;
mod split;

use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use self::any::AnyQueue;
pub use self::packed::PackedQueue;
pub use self::split::Queue;
use crate::error::{Error, LIMIT, Result};
use crate::event;
use crate::request::Completion;
use crate::ring::Ring;

/// A queue whose completions can be waited for.
trait Calls {
    fn ring(&self) -> &Arc<Ring>;

    fn in_flight(&self) -> usize;

    fn poll(&mut self) -> Result<Option<Completion>>;

    /// Asks the device for a call at the next completion. The device does not call for one that has
    /// come meanwhile, so check again afterwards.
    fn ask_for_call(&self);

    /// Tells the device that it need not call.
    fn refuse_calls(&self);

    fn has_completion(&self) -> bool;
}

/// Waits for the next completion, at most for [`LIMIT`].
fn wait(queue: &mut impl Calls) -> Result<Completion> {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(done) = queue.poll()? {
            return Ok(done);
        }
        if Instant::now() >= end {
            return Err(Error::Stalled(queue.in_flight()));
        }
        wait_any(slice::from_ref(queue), Duration::from_secs(1))?;
    }
}

/// Sleeps until the device calls for one of `queues`, at most for `limit`; not at all if one has
/// completions already. Returns whether one has.
///
/// # Errors
/// The system call fails.
fn wait_any<Q: Calls>(queues: &[Q], limit: Duration) -> Result<bool> {
    queues.iter().for_each(Q::ask_for_call);
    let ready = || queues.iter().any(Q::has_completion);
    if !ready() {
        let fds: Vec<_> = queues.iter().map(|queue| queue.ring().call_fd()).collect();
        let mut waits: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(event::as_fd(fd), PollFlags::IN))
            .collect();
        let limit =
            Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        match poll(&mut waits, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::system("cannot wait for a call")(e)),
        }
        // Empty eventfds are expected: most were not called.
        fds.iter().for_each(|fd| drop(fd.read()));
    }
    queues.iter().for_each(Q::refuse_calls);
    Ok(ready())
}
