//! How many of a disk's writes are durable at a server that may go away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::io::Op;

/// How many of a disk's writes are durable at its server, over all its channels: a guest may flush
/// on another ring than it has written on.
///
/// If the server goes away before a flush has covered all writes, some may be lost. The next flush
/// of each channel then has to fail, so that the guest learns of it. Several guests may have
/// channels, and a guest may close one and open another: so a loss counts as known to a new channel
/// only if it was reported before a time without any channel.
#[derive(Debug, Default)]
pub struct Durability {
    /// The number of requests that have changed the disk, and how many of them a flush has covered.
    written: AtomicU64,
    flushed: AtomicU64,
    /// How often a server went away before a flush had covered all of these requests.
    losses: AtomicU64,
    /// The value of `losses` that a failed flush has reported last.
    reported: AtomicU64,
    channels: Mutex<Channels>,
}

#[derive(Debug, Default)]
struct Channels {
    /// The number of open channels.
    open: usize,
    /// The losses that a new channel's guest knows of: `reported`, when the first one was opened.
    known: u64,
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

    /// Counts a new channel. Returns the losses that its guest knows of. May lock, as
    /// [`Durability::channel_closed`]: not for reactors.
    #[must_use]
    pub fn channel_opened(&self) -> u64 {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if channels.open == 0 {
            channels.known = self.reported.load(Ordering::Relaxed);
        }
        channels.open += 1;
        channels.known
    }

    /// Counts the end of a channel.
    pub fn channel_closed(&self) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        debug_assert!(channels.open > 0, "each channel is closed once");
        channels.open = channels.open.saturating_sub(1);
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
        let (mut one, mut other) = (disk.channel_opened(), disk.channel_opened());
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
        let mut later = disk.channel_opened();
        assert!(disk.take_loss(&mut one) && !disk.take_loss(&mut one));
        assert!(disk.take_loss(&mut other) && disk.take_loss(&mut later));
    }

    #[test]
    fn a_loss_that_was_reported_to_one_guest_is_new_to_the_channel_of_another() {
        let disk = Durability::default();
        let lose = || {
            disk.done(Op::Write, disk.written());
            disk.server_lost();
        };
        let (mut one, _other) = (disk.channel_opened(), disk.channel_opened());
        lose();
        assert!(disk.take_loss(&mut one));
        // The other guest closes its channel before it flushes, and opens another.
        disk.channel_closed();
        let mut again = disk.channel_opened();
        assert!(disk.take_loss(&mut again));
        disk.channel_closed();
        disk.channel_closed();
        let mut later = disk.channel_opened();
        assert!(!disk.take_loss(&mut later), "all guests are gone");
        disk.channel_closed();
        lose();
        let mut later = disk.channel_opened();
        assert!(disk.take_loss(&mut later), "no guest was there to learn of it");
    }
}
