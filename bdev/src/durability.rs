//! How many of a disk's writes are durable at a server that may go away.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::io::Op;

/// How many of a disk's writes are durable at its server, over all its channels: a guest may flush
/// on another ring than it has written on.
///
/// If the server goes away before a flush has covered all writes, some may be lost. The next flush
/// of each channel then has to fail, so that the guest learns of it.
#[derive(Debug, Default)]
pub struct Durability {
    /// The number of requests that have changed the disk, and how many of them a flush has covered.
    written: AtomicU64,
    flushed: AtomicU64,
    /// How often a server went away before a flush had covered all of these requests.
    losses: AtomicU64,
    /// The value of `losses` that a failed flush has reported last.
    reported: AtomicU64,
}

// Relaxed suffices for all accesses: a flush covers the writes whose completion its channel's owner
// has seen before it submitted the flush.
impl Durability {
    /// Returns the number of requests that have changed the disk. A flush remembers it when it
    /// starts.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Counts a request that the server has done. `written` is [`Durability::written`] at its start.
    pub fn done(&self, op: Op, written: u64) {
        match op {
            Op::Read => {}
            Op::Flush => drop(self.flushed.fetch_max(written, Ordering::Relaxed)),
            Op::Write | Op::Unmap | Op::WriteZeroes => {
                self.written.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Records that the server is gone. Called while no request can be done.
    pub fn server_lost(&self) {
        let written = self.written();
        if self.flushed.swap(written, Ordering::Relaxed) != written {
            self.losses.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the losses that count as reported to a new channel.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.reported.load(Ordering::Relaxed)
    }

    /// Returns whether a flush of a channel must fail. `reported` holds the losses that were
    /// reported to the channel; from now on, all are.
    pub fn take_loss(&self, reported: &mut u64) -> bool {
        let losses = self.losses.load(Ordering::Relaxed);
        if *reported == losses {
            return false;
        }
        *reported = losses;
        self.reported.fetch_max(losses, Ordering::Relaxed);
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_channel_learns_once_of_writes_that_no_flush_has_covered() {
        let disk = Durability::default();
        let (mut one, mut other) = (disk.reported(), disk.reported());
        disk.server_lost();
        assert!(!disk.take_loss(&mut one), "nothing was written");
        disk.done(Op::Write, disk.written());
        disk.done(Op::Flush, disk.written());
        disk.server_lost();
        assert!(!disk.take_loss(&mut one), "all was flushed");
        let before = disk.written();
        disk.done(Op::Write, before);
        disk.done(Op::Flush, before);
        disk.server_lost();
        let mut later = disk.reported();
        assert!(disk.take_loss(&mut one) && !disk.take_loss(&mut one));
        assert!(disk.take_loss(&mut other) && disk.take_loss(&mut later));
        assert!(!disk.take_loss(&mut disk.reported()), "the guest of a later channel knows");
    }
}
