//! Time as a thread has it that needs nothing of the server.
//!
//! How long something takes says little on a machine that is slow or busy. So waits are counted in
//! beats: a beat is a nap of a millisecond, and a question to another thread and its answer, as a
//! request to the server is. A machine that keeps everybody waiting keeps the beat waiting too; a
//! server that does so alone is found out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

const NAP: Duration = Duration::from_millis(1);

/// The count, and what raises it.
#[derive(Debug)]
pub(crate) struct Beats {
    count: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Beats {
    /// Begins to count.
    pub(crate) fn start() -> std::io::Result<Self> {
        let beats = Self { count: Arc::default(), held: Arc::default(), ended: Arc::default() };
        let (ask, asked) = sync_channel(0);
        let (answer, answered) = sync_channel(0);
        thread::Builder::new().name("echo".into()).spawn(move || echo(&asked, &answer))?;
        let (count, held) = (beats.count.clone(), beats.held.clone());
        let ended = beats.ended.clone();
        let beat = move || {
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(NAP);
                if ask.send(()).is_err() || answered.recv().is_err() {
                    return;
                }
                if !held.load(Ordering::Relaxed) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        thread::Builder::new().name("beats".into()).spawn(beat)?;
        Ok(beats)
    }

    /// The count so far.
    pub(crate) fn now(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The count, for others to look at.
    pub(crate) fn count(&self) -> Arc<AtomicU64> {
        self.count.clone()
    }

    /// Does not count while `during` runs, in which the server is stopped.
    pub(crate) fn without<T>(&self, during: impl FnOnce() -> T) -> T {
        self.held.store(true, Ordering::Relaxed);
        let result = during();
        self.held.store(false, Ordering::Relaxed);
        result
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn echo(asked: &Receiver<()>, answer: &SyncSender<()>) {
    while asked.recv().is_ok() && answer.send(()).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_counted_but_while_they_are_held() {
        let beats = Beats::start().unwrap();
        while beats.now() < 3 {
            thread::yield_now();
        }
        let ended = beats.ended.clone();
        drop(beats);
        assert!(ended.load(Ordering::Relaxed));
    }
}
