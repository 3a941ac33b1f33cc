//! A `vhost` that ends while its disk is slow, and a guest that goes on with the next one.
//!
//! The kernel does not wait for io_uring's direct I/O when a process ends: what a killed `vhost` had
//! in flight may reach the disk, or the guest's memory, when the next one has already done the same
//! requests again. So the disk here holds back all I/O of one process, and lets it go when the next
//! process has had its chance to overtake it ([`SlowDisk`]). The guest does what a guest may do with
//! what it was told: it writes newer data to the same blocks and flushes them, and uses the memory of
//! completed reads for something else. Both must still be there at the end. Meanwhile a neighbour on
//! another disk of the next process is served.

mod disk;
mod guest;

use std::fmt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use front_end::{LIMIT, RingLayout};
use serde_json::{Value, json};

use crate::restarted::Server;
use crate::servers::{Error, Result};
pub use disk::SlowDisk;
use guest::{Guest, Neighbour};

/// Names of the disks and their controllers.
const SLOW: &str = "slow";
const NEIGHBOUR: &str = "neighbour";
/// Requests of the neighbour while the slow disk's guest waits.
const NEIGHBOUR_REQUESTS: u64 = 64;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// SIGKILL.
    Kill,
    /// SIGTERM, which waits for I/O for two seconds.
    Terminate,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The binary.
    pub vhost: PathBuf,
    /// Arguments after those that it gets anyway.
    pub args: Vec<String>,
    /// The core of its reactor.
    pub core: usize,
    /// The kind of rings.
    pub rings: RingLayout,
    /// How it ends.
    pub end: End,
    /// How often.
    pub rounds: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Toll {
    /// How often the server ended with I/O in flight.
    pub rounds: u64,
    /// Requests that were in flight then.
    pub in_flight: u64,
    /// Ends after which the next server answered requests before the I/O of the one before had ended.
    pub overtaken: u64,
    /// Blocks that have something else than what was written and flushed last.
    pub stale: u64,
    /// Buffers that changed after their reads had completed.
    pub corrupted: u64,
    /// Requests that came back with an error.
    pub errors: u64,
    /// The first of these.
    pub first_problem: Option<String>,
    /// From when the old I/O could go on until all requests were answered, in all and at most.
    pub delay: Duration,
    /// The longest of these.
    pub delay_max: Duration,
}

impl Toll {
    /// Whether nothing went wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.first_problem.is_none()
    }

    fn note(&mut self, problem: impl FnOnce() -> String) {
        self.first_problem.get_or_insert_with(problem);
    }
}

impl fmt::Display for Toll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, in_flight, overtaken, stale, corrupted, errors, .. } = self;
        let delay = self.delay / u32::try_from(*rounds).unwrap_or(u32::MAX).max(1);
        write!(
            f,
            "{rounds} ends with {in_flight} requests in flight: {overtaken} overtaken, {stale} \
             blocks stale, {corrupted} buffers corrupted, {errors} errors; answered {} ms after \
             the old I/O could continue, at most {} ms",
            delay.as_millis(),
            self.delay_max.as_millis()
        )?;
        match &self.first_problem {
            Some(problem) => write!(f, "; first: {problem}"),
            None => Ok(()),
        }
    }
}

/// Does what `plan` says on `disk`, up to the first problem.
///
/// # Errors
/// The server does not start, or does not take over; not what is in the [`Toll`].
pub fn run(plan: &Plan, disk: &SlowDisk) -> Result<Toll> {
    let mut server = make_server(plan, disk)?;
    let mut toll = Toll::default();
    server.start()?;
    let mut guest = None;
    server.until_it_listens(SLOW, |socket| {
        guest = Some(Guest::connect(&socket, plan.rings)?);
        Ok(())
    })?;
    let mut guest = guest.expect("it has connected");
    while toll.rounds < plan.rounds && toll.is_good() {
        disk.enter(server.process().pid())?;
        disk.hold()?;
        guest.begin()?;
        wait_until("I/O in flight", || Ok(in_flight(&server)? == guest.in_flight()))?;
        toll.rounds += 1;
        toll.in_flight += guest.in_flight();
        match plan.end {
            End::Kill => server.kill(),
            End::Terminate => server.terminate()?,
        }
        server.start()?;
        server.until_it_listens(SLOW, |_| guest.reconnect())?;
        let mut neighbour = None;
        server.until_it_listens(NEIGHBOUR, |socket| {
            neighbour = Some(Neighbour::connect(&socket)?);
            Ok(())
        })?;
        neighbour.expect("it has connected").work(NEIGHBOUR_REQUESTS)?;
        // Either it waits, or it is wrong and the guest has gone on.
        wait_until("the next server's decision", || {
            Ok(guest.go_on(&mut toll)? || is_waiting(&server)?)
        })?;
        if guest.has_been_answered() {
            toll.overtaken += 1;
            toll.note(|| {
                "requests were answered before the previous process's I/O had ended".into()
            });
        }
        disk.release()?;
        let released = Instant::now();
        wait_until("the guest's requests", || Ok(guest.go_on(&mut toll)?))?;
        let delay = released.elapsed();
        toll.delay += delay;
        toll.delay_max = toll.delay_max.max(delay);
        disk.settle()?;
        guest.check(&mut toll)?;
    }
    Ok(toll)
}

fn make_server(plan: &Plan, disk: &SlowDisk) -> Result<Server> {
    let dir = tempfile::Builder::new().prefix("late").tempdir();
    let dir = dir.map_err(Error::system("cannot make a directory"))?;
    let bdevs = [
        ("bdev_uring_create", json!({"name": SLOW, "filename": disk.device(), "block_size": 512})),
        ("bdev_malloc_create", json!({"name": NEIGHBOUR, "num_blocks": 2048, "block_size": 512})),
    ];
    let packed = plan.rings == RingLayout::Packed;
    let controllers = [SLOW, NEIGHBOUR]
        .map(|name| json!({"ctrlr": name, "dev_name": name, "packed_ring": packed}))
        .map(|params| ("vhost_create_blk_controller", params));
    Server::new(&plan.vhost, &plan.args, plan.core, dir, &bdevs, &controllers)
}

fn in_flight(server: &Server) -> Result<u64> {
    let shown = server.call("vhost_get_controllers", json!({"name": SLOW}))?;
    let sessions = shown[0]["sessions"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(sessions.iter().filter_map(|session| session["inflight_task_cnt"].as_u64()).sum())
}

/// Whether the rings of the slow disk wait for an earlier process.
fn is_waiting(server: &Server) -> Result<bool> {
    let shown: Value = server.call("bdev_get_bdevs", json!({"name": SLOW}))?;
    let file = &shown[0]["driver_specific"]["uring"];
    Ok(file["lease"] == "waiting" && file["waits_for"].is_string())
}

fn wait_until(what: &'static str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > LIMIT {
            return Err(Error::Silent { name: "vhost".into(), what, limit: LIMIT });
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}
