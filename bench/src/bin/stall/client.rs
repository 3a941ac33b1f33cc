//! The neighbours: guests at depth 1, all in one thread, that note how long each request took.
//!
//! They share a core with whatever disturbs them, and with the server's own threads that are not
//! reactors. So the thread asks for a real-time priority, and sleeps a little between two rounds of
//! requests, so that the others get on: a wait that is seen is then the reactor's, or the host's.
//! The host's show as turns of the loop that took long, and are counted apart.

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

/// Bytes in a request.
const BLOCK: u32 = 4096;
/// A turn of the loop that takes longer than this was interrupted: by the host, or by the kernel.
const AWAY: Duration = Duration::from_micros(10);
/// The stretch number that ends the thread.
const END: u64 = u64::MAX;

/// What the neighbours saw in one stretch.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Of every request, in ns.
    pub(crate) latencies: Histogram<u64>,
    /// The longest of them.
    pub(crate) longest: Duration,
    /// How long the thread itself did not run during that one.
    pub(crate) longest_away: Duration,
    /// The longest time that the thread did not run while it waited for a request.
    pub(crate) away_max: Duration,
}

impl Seen {
    fn new() -> Self {
        let limit = 2 * LIMIT.as_nanos() as u64;
        Self {
            latencies: Histogram::new_with_bounds(1, limit, 3).expect("sound bounds"),
            longest: Duration::ZERO,
            longest_away: Duration::ZERO,
            away_max: Duration::ZERO,
        }
    }

    fn record(&mut self, latency: Duration, away: Duration) {
        self.latencies.saturating_record(latency.as_nanos() as u64);
        if latency > self.longest {
            (self.longest, self.longest_away) = (latency, away);
        }
    }
}

/// The neighbours, while they run.
#[derive(Debug)]
pub(crate) struct Clients {
    /// Their thread.
    pub(crate) tid: u32,
    /// Whether it has a real-time priority.
    pub(crate) real_time: bool,
    stretch: Arc<AtomicU64>,
    seen: Receiver<Seen>,
    thread: Option<JoinHandle<Result<()>>>,
    front_ends: Vec<FrontEnd>,
}

impl Clients {
    /// Connects one guest to each of `sockets`, and lets them read with `pause` between two rounds.
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
            let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
            say_tid.send(tid).map_err(|_| anyhow!("nobody waits for it"))?;
            run(guests, &current, &tell, pause)
        };
        let thread = std::thread::Builder::new().name("neighbours".into()).spawn(work)?;
        let tid = tid.recv().context("the neighbours' thread has ended")?;
        let real_time = ask_for_real_time(tid);
        Ok(Self { tid, real_time, stretch, seen, thread: Some(thread), front_ends })
    }

    /// What is seen while `during` runs.
    pub(crate) fn watch<T>(&mut self, during: impl FnOnce() -> Result<T>) -> Result<(Seen, T)> {
        // What was before is not wanted.
        self.next()?;
        let result = during()?;
        Ok((self.next()?, result))
    }

    /// Begins a new stretch, and returns what was seen in the one before.
    fn next(&mut self) -> Result<Seen> {
        self.stretch.fetch_add(1, Ordering::Relaxed);
        match self.seen.recv() {
            Ok(seen) => Ok(seen),
            Err(_) => {
                Err(self.join().err().unwrap_or_else(|| anyhow!("the neighbours have ended")))
            }
        }
    }

    /// Ends them in order.
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
        // An error on the way out was not the first one.
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
            // Nobody listens any more only when all of it ends.
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
                // The look at the clock comes after, so that no wait is taken for shorter than
                // it was.
                let latency = start.elapsed();
                let absent = away + absence(latency, last - start);
                seen.record(latency, absent);
            }
        }
        let now = Instant::now();
        let absent = absence(now - start, last - start);
        away += absent;
        seen.away_max = seen.away_max.max(absent);
        ensure!(now - start < LIMIT, "a neighbour's read does not come back");
        last = now;
    }
    Ok(())
}

/// How much of a turn of the loop, from `last` to `now`, this thread was elsewhere.
fn absence(now: Duration, last: Duration) -> Duration {
    let turn = now.saturating_sub(last);
    if turn > AWAY { turn } else { Duration::ZERO }
}

/// Whether thread `tid` now runs before all ordinary ones.
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
    fn the_longest_wait_keeps_its_own_absence() {
        let us = Duration::from_micros;
        let mut seen = Seen::new();
        seen.record(us(5), us(0));
        seen.record(us(90), us(80));
        seen.record(us(20), us(0));
        assert_eq!((seen.longest, seen.longest_away), (us(90), us(80)));
        assert_eq!(seen.latencies.len(), 3);
    }

    #[test]
    fn short_turns_are_no_absence() {
        assert_eq!(absence(AWAY, Duration::ZERO), Duration::ZERO);
        assert_eq!(absence(AWAY * 3, AWAY), AWAY * 2);
    }
}
