//! I/O of an array's threads at a member, which may outlast the time that its caller waits.
//!
//! What is given up goes on. So all of it is listed, by the address of its bdev: a member is not let
//! go of, and not taken again, before it has ended.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Bdev, Buffer, Error, Request, Rights, ThreadChannel};

/// The pause while a superblock waits for the last one.
const PAUSE: Duration = Duration::from_millis(1);

static UNDER_WAY: Mutex<Vec<UnderWay>> = Mutex::new(Vec::new());

/// A channel or a write of a superblock, whose I/O goes on if its caller gives it up.
struct UnderWay {
    bdev: usize,
    kind: Kind,
    given_up: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Superblock,
}

fn under_way() -> MutexGuard<'static, Vec<UnderWay>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The identity of a bdev, as long as it exists.
pub(crate) fn address(bdev: &Arc<dyn Bdev>) -> usize {
    Arc::as_ptr(bdev).cast::<()>().addr()
}

/// Whether a thread of an array has a channel to this bdev, or writes its superblock. Its caller may
/// have given up the I/O.
pub(crate) fn is_busy(bdev: &Arc<dyn Bdev>) -> bool {
    let bdev = address(bdev);
    under_way().iter().any(|io| io.bdev == bdev)
}

/// Notes that the caller waits no longer for the superblock of this bdev.
pub(crate) fn give_up_superblock(bdev: usize) {
    let mut under_way = under_way();
    let of = |io: &&mut UnderWay| io.bdev == bdev && io.kind == Kind::Superblock;
    under_way.iter_mut().filter(of).for_each(|io| io.given_up = true);
}

/// Keeps I/O in the list until it is dropped.
pub(crate) struct Listed {
    bdev: usize,
    kind: Kind,
}

impl Listed {
    fn data(bdev: usize) -> Self {
        under_way().push(UnderWay { bdev, kind: Kind::Data, given_up: false });
        Self { bdev, kind: Kind::Data }
    }

    /// Lists the write of a superblock once no other one is under way at the bdev: the older one
    /// could land last. Blocks. `None`: another one was given up, or goes on at `deadline`.
    pub(crate) fn superblock(bdev: &Arc<dyn Bdev>, deadline: Instant) -> Option<Self> {
        let (bdev, kind) = (address(bdev), Kind::Superblock);
        loop {
            let mut under_way = under_way();
            let other = under_way.iter().find(|io| io.bdev == bdev && io.kind == kind);
            // Checked with the lock: after `deadline`, nobody notes that this one is given up.
            if other.is_some_and(|io| io.given_up) || Instant::now() >= deadline {
                return None;
            }
            if other.is_none() {
                under_way.push(UnderWay { bdev, kind, given_up: false });
                return Some(Self { bdev, kind });
            }
            drop(under_way);
            thread::sleep(PAUSE);
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut under_way = under_way();
        let is_it = |io: &UnderWay| io.bdev == self.bdev && io.kind == self.kind;
        if let Some(at) = under_way.iter().position(is_it) {
            under_way.swap_remove(at);
        }
    }
}

/// A channel to a member for one I/O at a time.
pub(crate) struct MemberChannel {
    /// `None` after an I/O was given up. The channel is closed before it leaves the list.
    open: Option<(ThreadChannel, Listed)>,
}

impl MemberChannel {
    /// As [`ThreadChannel::open`].
    ///
    /// # Errors
    /// As [`ThreadChannel::open`].
    pub(crate) fn open(bdev: &Arc<dyn Bdev>, rights: Rights) -> Result<Self, Error> {
        let listed = Listed::data(address(bdev));
        Ok(Self { open: Some((ThreadChannel::open(bdev, 1, rights)?, listed)) })
    }

    /// Does one I/O, until `deadline` at the latest. If it has not ended then, it is given up, and
    /// the channel is closed by a thread of its own.
    ///
    /// # Errors
    /// The positive errno; ETIMEDOUT after `deadline`, and for all later I/O.
    pub(crate) fn run(&mut self, request: Request, deadline: Instant) -> Result<Buffer, i32> {
        let (channel, _) = self.open.as_mut().ok_or(libc::ETIMEDOUT)?;
        channel.start(request);
        loop {
            if let Some(ended) = channel.poll() {
                return ended.result.map(|()| ended.request.buffer);
            }
            let slept = channel.sleep_until(&mut [], Some(deadline));
            if slept.is_err() || Instant::now() >= deadline {
                break;
            }
        }
        if let Some(open) = self.open.take() {
            // Dropping it waits for its I/O. If there is no thread, it is dropped here.
            let close = move || drop(open);
            let _ = thread::Builder::new().name("vhost-raid-close".into()).spawn(close);
        }
        Err(libc::ETIMEDOUT)
    }
}
