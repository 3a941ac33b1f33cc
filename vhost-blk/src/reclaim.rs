//! The two threads that free what reactors may still be using, and unmap what guests leave.
//!
//! *Reclaim* holds values until their grace period has passed and their I/O has ended, and drops
//! them. The *unmapper* unmaps guest memory in pieces. They are two because an unmap can take
//! seconds, and a block device's deletion waits for reclaim to drop its last channel.
#![expect(unsafe_code, reason = "munmap")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::sigbus;

/// Bytes unmapped in one system call: another thread's mmap waits for one such call, not for the
/// whole (design.md: 0.2 s for 4 GiB at once, nothing that shows in pieces of this size).
const UNMAP_PIECE_BYTES: usize = 2 << 20;

/// Pieces of one mapping before it is another mapping's turn.
const UNMAP_TURN_PIECES: usize = 64;

/// How long reclaim waits before it looks again, first and at the most.
const BACKOFF: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// Something that will be dropped once it says that nobody uses it.
pub trait Garbage: Send {
    /// Frees it if nobody uses it any more; otherwise gives it back. Never blocks.
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>>;
}

impl<T: Send + Sync + 'static> Garbage for qsbr::Retired<T> {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        self.try_into_inner().err().map(|early| Box::new(early) as Box<dyn Garbage>)
    }
}

/// A handle on the reclaim thread, which ends when the last handle is dropped and all is freed.
#[derive(Clone, Debug)]
pub struct Reclaim(Sender<Box<dyn Garbage>>);

impl Reclaim {
    /// Starts the thread. `freed` is called on it after something was freed.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(freed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("vhost-reclaim".into())
            .spawn(move || reclaim(&receiver, &freed))?;
        Ok(Self(sender))
    }

    /// Frees `garbage` when its time has come.
    pub fn free(&self, garbage: impl Garbage + 'static) {
        // The thread outlives every sender, so it always takes it.
        let _ = self.0.send(Box::new(garbage));
    }
}

fn reclaim(receiver: &Receiver<Box<dyn Garbage>>, freed: &dyn Fn()) {
    let mut waiting: Vec<Box<dyn Garbage>> = Vec::new();
    let mut backoff = BACKOFF.0;
    loop {
        let next = if waiting.is_empty() {
            receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            receiver.recv_timeout(backoff)
        };
        match next {
            Ok(garbage) => {
                waiting.push(garbage);
                waiting.extend(receiver.try_iter());
                backoff = BACKOFF.0;
            }
            Err(RecvTimeoutError::Timeout) => backoff = (backoff * 2).min(BACKOFF.1),
            Err(RecvTimeoutError::Disconnected) if waiting.is_empty() => return,
            // The garbage is still in use: dropping it now would leak it, or free it under its I/O.
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(backoff);
                backoff = (backoff * 2).min(BACKOFF.1);
            }
        }
        let before = waiting.len();
        waiting = waiting.into_iter().filter_map(Garbage::try_free).collect();
        if waiting.len() < before {
            freed();
        }
    }
}

/// A mapping to take down.
#[derive(Debug)]
struct Range {
    base: *mut u8,
    len: usize,
    slot: sigbus::Slot,
    _counted: Option<Counted>,
}

// SAFETY: an address and a length, owned by whoever unmaps it.
unsafe impl Send for Range {}

/// A mapping that is counted until it has been taken down.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A handle on the thread that unmaps guest memory, which also counts what there is to unmap.
#[derive(Clone, Debug)]
pub struct Unmapper {
    ranges: Sender<Range>,
    mapped: Arc<AtomicUsize>,
    most: usize,
}

impl Unmapper {
    /// Starts the thread, which ends when the last handle is dropped.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new().name("vhost-unmap".into()).spawn(move || unmap(&receiver))?;
        Ok(Self { ranges: sender, mapped: Arc::default(), most: usize::MAX })
    }

    /// A handle on the same thread, with which there can be `most` mappings at a time: those count
    /// too that are only kept by I/O in flight, or have still to be taken down.
    #[must_use]
    pub fn limited(&self, most: usize) -> Self {
        Self { ranges: self.ranges.clone(), mapped: Arc::default(), most }
    }

    /// Counts a mapping more.
    ///
    /// # Errors
    /// There are as many as there can be.
    pub(crate) fn count(&self) -> Result<Counted, usize> {
        let add = |mapped| (mapped < self.most).then_some(mapped + 1);
        self.mapped.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)?;
        Ok(Counted(Arc::clone(&self.mapped)))
    }

    /// Unmaps `len` bytes at `base`, which nobody uses any more, in the background.
    pub(crate) fn unmap(
        &self,
        base: *mut u8,
        len: usize,
        slot: sigbus::Slot,
        counted: Option<Counted>,
    ) {
        let _ = self.ranges.send(Range { base, len, slot, _counted: counted });
    }
}

/// Takes turns, so that a small guest's memory does not wait for a huge one's.
fn unmap(receiver: &Receiver<Range>) {
    let mut waiting = VecDeque::new();
    loop {
        let next = match waiting.pop_front() {
            Some(range) => range,
            None => match receiver.recv() {
                Ok(range) => begin(range),
                Err(_) => return,
            },
        };
        waiting.extend(receiver.try_iter().map(begin));
        waiting.extend(next.unmap_some());
    }
}

/// Ends the guard first, so that the address cannot be somebody else's while it still stands.
fn begin(range: Range) -> Range {
    sigbus::unregister(range.slot);
    range
}

impl Range {
    /// Unmaps up to [`UNMAP_TURN_PIECES`] pieces; answers with what is left.
    fn unmap_some(mut self) -> Option<Self> {
        for _ in 0..UNMAP_TURN_PIECES {
            let piece = UNMAP_PIECE_BYTES.min(self.len);
            // SAFETY: part of a mapping whose owner is gone.
            if unsafe { libc::munmap(self.base.cast(), piece) } != 0 {
                // Huge pages of 1 GiB come off only as a whole.
                // SAFETY: as above.
                unsafe { libc::munmap(self.base.cast(), self.len) };
                return None;
            }
            self.base = self.base.wrapping_add(piece);
            self.len -= piece;
            if self.len == 0 {
                return None;
            }
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Tried,
        /// Whether it was allowed to be freed.
        Dropped(bool),
    }

    struct Used {
        free: Arc<AtomicBool>,
        seen: Sender<Seen>,
    }

    impl Garbage for Used {
        fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
            let _ = self.seen.send(Seen::Tried);
            if self.free.load(Ordering::Relaxed) { None } else { Some(self) }
        }
    }

    impl Drop for Used {
        fn drop(&mut self) {
            let _ = self.seen.send(Seen::Dropped(self.free.load(Ordering::Relaxed)));
        }
    }

    #[test]
    fn what_is_in_use_outlives_the_last_handle() {
        let (seen_in, seen) = channel();
        let free = Arc::new(AtomicBool::new(false));
        let reclaim = Reclaim::start(|| {}).unwrap();
        reclaim.free(Used { free: Arc::clone(&free), seen: seen_in });
        drop(reclaim);
        // The first attempt may have been before the handle was dropped, with the thread asleep
        // then.
        for _ in 0..3 {
            assert_eq!(seen.recv(), Ok(Seen::Tried));
        }
        free.store(true, Ordering::Relaxed);
        assert_eq!(seen.iter().find(|s| *s != Seen::Tried), Some(Seen::Dropped(true)));
        assert!(seen.recv().is_err());
    }
}
