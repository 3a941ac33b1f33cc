//! The neighbours: guests at depth 1, in one thread, which measures the latency of each request.
//!
//! They share a core with the disturbance and with the server's threads that are not reactors. So
//! the thread asks for a real-time priority, and sleeps between two rounds of requests so that the
//! other threads run. A long latency is then caused by the reactor or by the host. The thread
//! counts long iterations of its loop, which the host causes, separately.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bench::pin::pin;
use front_end::{
    FrontEnd, GuestRam, LIMIT, Options, Queue, QueueOptions, Request, STATUS_OK, Segment,
};
use hdrhistogram::Histogram;

/// Bytes of a request.
const BLOCK: u32 = 4096;
/// An iteration of the loop that takes longer was interrupted by the host or the kernel.
const AWAY: Duration = Duration::from_micros(10);
/// The stretch number that ends the thread.
const END: u64 = u64::MAX;

/// The neighbours' measurements in one stretch.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The latencies of all requests, in ns.
    pub(crate) latencies: Histogram<u64>,
    /// The longest latency.
    pub(crate) longest: Duration,
    /// How long the thread did not run during that request.
    pub(crate) longest_away: Duration,
    /// The longest time that the thread did not run while it waited for a request.
    pub(crate) away_max: Duration,
}

impl Seen {
    fn new() -> Self {
        Self {
            latencies: Histogram::new_with_bounds(1, ns(2 * LIMIT), 3).expect("valid bounds"),
            longest: Duration::ZERO,
            longest_away: Duration::ZERO,
            away_max: Duration::ZERO,
        }
    }

    fn record(&mut self, latency: Duration, away: Duration) {
        self.latencies.saturating_record(ns(latency));
        if latency > self.longest {
            (self.longest, self.longest_away) = (latency, away);
        }
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The running neighbours.
#[derive(Debug)]
pub(crate) struct Clients {
    /// The id of their thread.
    pub(crate) tid: u32,
    /// Whether the thread has a real-time priority.
    pub(crate) real_time: bool,
    stretch: Arc<AtomicU64>,
    seen: Receiver<Seen>,
    thread: Option<JoinHandle<Result<()>>>,
    front_ends: Vec<FrontEnd>,
}

impl Clients {
    /// Connects one guest to each of `sockets`. The guests read, with `pause` between two rounds.
    pub(crate) fn start(sockets: &[&Path], core: usize, pause: Duration) -> Result<Self> {
        let (mut guests, mut front_ends) = (Vec::new(), Vec::new());
        for socket in sockets {
            let ram = GuestRam::new(&[4 << 20])?;
            let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default())?;
            let blocks = front_end.config()?.capacity * 512 / u64::from(BLOCK);
            let queue = front_end.start_new(1, QueueOptions::default())?.remove(0);
            let buffer = ram.alloc(BLOCK, u64::from(BLOCK))?;
            guests.push(Guest { queue, buffer, blocks, waiting: false });
            front_ends.push(front_end);
        }
        let stretch = Arc::new(AtomicU64::new(0));
        let (tell, seen) = channel();
        let (say_tid, tid) = channel();
        let current = stretch.clone();
        let work = move || -> Result<()> {
            pin(core)?;
            let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
            say_tid.send(tid).map_err(|_| anyhow!("the starting thread has ended"))?;
            run(guests, &current, &tell, pause)
        };
        let thread = std::thread::Builder::new().name("neighbours".into()).spawn(work)?;
        let tid = tid.recv().context("the neighbours' thread has ended")?;
        let real_time = ask_for_real_time(tid);
        Ok(Self { tid, real_time, stretch, seen, thread: Some(thread), front_ends })
    }

    /// Runs `during`, and returns the measurements meanwhile.
    pub(crate) fn watch<T>(&mut self, during: impl FnOnce() -> Result<T>) -> Result<(Seen, T)> {
        // Discards earlier measurements.
        self.next()?;
        let result = during()?;
        Ok((self.next()?, result))
    }

    /// Begins a new stretch, and returns the measurements of the one before.
    fn next(&mut self) -> Result<Seen> {
        self.stretch.fetch_add(1, Ordering::Relaxed);
        match self.seen.recv() {
            Ok(seen) => Ok(seen),
            Err(_) => {
                Err(self.join().err().unwrap_or_else(|| anyhow!("the neighbours have ended")))
            }
        }
    }

    /// Stops and disconnects them.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.join()?;
        for front_end in std::mem::take(&mut self.front_ends) {
            front_end.disconnect()?;
        }
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        self.stretch.store(END, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the neighbours' thread has panicked"))?
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // An earlier error has been reported.
        drop(self.join());
    }
}

struct Guest {
    queue: Queue,
    buffer: Segment,
    blocks: u64,
    waiting: bool,
}

fn run(
    mut guests: Vec<Guest>,
    stretch: &AtomicU64,
    tell: &Sender<Seen>,
    pause: Duration,
) -> Result<()> {
    let (mut seen, mut current, mut random) = (Seen::new(), 0, 1_u64);
    loop {
        round(&mut guests, &mut seen, &mut random)?;
        let now = stretch.load(Ordering::Relaxed);
        if now == END {
            return Ok(());
        }
        if now != current {
            current = now;
            // An error means that the program ends.
            drop(tell.send(std::mem::replace(&mut seen, Seen::new())));
        }
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

/// One request of each guest.
fn round(guests: &mut [Guest], seen: &mut Seen, random: &mut u64) -> Result<()> {
    let start = Instant::now();
    for guest in guests.iter_mut() {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let sector = (*random >> 33) % guest.blocks * u64::from(BLOCK / 512);
        guest.queue.submit(&Request::read(sector, &[guest.buffer]))?;
        guest.queue.kick()?;
        guest.waiting = true;
    }
    let (mut pending, mut last, mut away) = (guests.len(), start, Duration::ZERO);
    while pending > 0 {
        for guest in guests.iter_mut().filter(|guest| guest.waiting) {
            if let Some(done) = guest.queue.poll()? {
                ensure!(done.status == STATUS_OK, "a neighbour's read has status {}", done.status);
                guest.waiting = false;
                pending -= 1;
                // Reads the clock after the completion, so that no latency is too short.
                let latency = start.elapsed();
                let absent = away + absence(latency, last - start);
                seen.record(latency, absent);
            }
        }
        let now = Instant::now();
        let absent = absence(now - start, last - start);
        away += absent;
        seen.away_max = seen.away_max.max(absent);
        ensure!(now - start < LIMIT, "a neighbour's read has not completed within {LIMIT:?}");
        last = now;
    }
    Ok(())
}

/// How long this thread did not run in the iteration from `last` to `now`.
fn absence(now: Duration, last: Duration) -> Duration {
    let iteration = now.saturating_sub(last);
    if iteration > AWAY { iteration } else { Duration::ZERO }
}

/// Gives thread `tid` a real-time priority. Returns whether that succeeded.
fn ask_for_real_time(tid: u32) -> bool {
    let mut command = Command::new("chrt");
    command.args(["--fifo", "--pid", "1", &tid.to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_latency_keeps_its_absence() {
        let us = Duration::from_micros;
        let mut seen = Seen::new();
        seen.record(us(5), us(0));
        seen.record(us(90), us(80));
        seen.record(us(20), us(0));
        assert_eq!((seen.longest, seen.longest_away), (us(90), us(80)));
        assert_eq!(seen.latencies.len(), 3);
    }

    #[test]
    fn short_iterations_are_no_absence() {
        assert_eq!(absence(AWAY, Duration::ZERO), Duration::ZERO);
        assert_eq!(absence(AWAY * 3, AWAY), AWAY * 2);
    }
}
