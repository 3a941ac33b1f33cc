//! A clock whose unit is the time of a thread that does not depend on the server.
//!
//! On a slow or busy machine, real time says little. So waits are counted in heartbeats: a
//! heartbeat is a sleep of a millisecond and a round trip to another thread, like a request to the
//! server. A busy machine delays the heartbeats as it delays the server, so only delays by the
//! server count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

const NAP: Duration = Duration::from_millis(1);

/// The heartbeat counter and its threads.
#[derive(Debug)]
pub(crate) struct Heartbeats {
    count: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Heartbeats {
    /// Starts to count.
    pub(crate) fn start() -> std::io::Result<Self> {
        let heartbeats =
            Self { count: Arc::default(), held: Arc::default(), ended: Arc::default() };
        let (ask, asked) = sync_channel(0);
        let (answer, answered) = sync_channel(0);
        thread::Builder::new().name("echo".into()).spawn(move || echo(&asked, &answer))?;
        let (count, held) = (heartbeats.count.clone(), heartbeats.held.clone());
        let ended = heartbeats.ended.clone();
        let heartbeat = move || {
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
        thread::Builder::new().name("heartbeats".into()).spawn(heartbeat)?;
        Ok(heartbeats)
    }

    /// The current count.
    pub(crate) fn now(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// A handle to the counter.
    pub(crate) fn count(&self) -> Arc<AtomicU64> {
        self.count.clone()
    }

    /// Suspends the counter while `during` runs, which stops the server.
    pub(crate) fn without<T>(&self, during: impl FnOnce() -> T) -> T {
        self.held.store(true, Ordering::Relaxed);
        let result = during();
        self.held.store(false, Ordering::Relaxed);
        result
    }
}

impl Drop for Heartbeats {
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
    fn heartbeats_are_counted_until_they_are_dropped() {
        let heartbeats = Heartbeats::start().unwrap();
        while heartbeats.now() < 3 {
            thread::yield_now();
        }
        let ended = heartbeats.ended.clone();
        drop(heartbeats);
        assert!(ended.load(Ordering::Relaxed));
    }
}
