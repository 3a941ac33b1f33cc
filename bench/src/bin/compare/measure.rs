//! Runs in alternation: one server at a time, the others stopped.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::servers::{Disk, Interrupt, MEMORY_DISK_BYTES, Server, Spec};
use bench::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK, Spread};

use crate::cells::{Cell, DiskKind};
use crate::counters::{Counters, Counts};
use crate::failures::Failures;
use crate::perf::{Figures, Perf};

/// Bytes that a disk is filled with at once.
const FILL_BYTES: u32 = 64 << 10;

/// Servers of which at most one runs.
#[derive(Debug)]
pub(crate) struct Fleet {
    servers: Vec<Server>,
}

impl Fleet {
    /// Starts `specs`, their polling threads all on `core`, and stops each once it serves `disks`.
    ///
    /// # Errors
    /// One of them does not start, or cannot be written to.
    pub(crate) fn start(specs: &[Spec], core: usize, disks: &[Disk]) -> Result<Self> {
        let mut servers = Vec::new();
        for spec in specs {
            let mut server = Server::start(spec, core, disks)?;
            if disks.contains(&Disk::Malloc) {
                // Memory that was never written is one page of zeroes, which is in every cache.
                fill(&server.socket(Disk::Malloc.name()))
                    .with_context(|| format!("cannot fill the malloc disk of {}", spec.name))?;
            }
            server.process.pause()?;
            servers.push(server);
        }
        Ok(Self { servers })
    }

    pub(crate) fn len(&self) -> usize {
        self.servers.len()
    }

    pub(crate) fn get(&self, index: usize) -> &Server {
        &self.servers[index]
    }

    /// Runs `turn` while only server `index` does.
    ///
    /// # Errors
    /// Those of `turn`, or the server is gone.
    pub(crate) fn with<T>(
        &mut self,
        index: usize,
        turn: impl FnOnce(&Server) -> Result<T>,
    ) -> Result<T> {
        let server = &mut self.servers[index];
        server.process.resume()?;
        let result = turn(server).with_context(|| server.spec.name.clone());
        // A server that has failed is not asked.
        let free = if result.is_ok() { server.let_go() } else { Ok(()) };
        server.process.pause()?;
        free?;
        result
    }
}

/// What one run of one server found.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) figures: Figures,
    /// CPU time of its polling thread, where it was looked at.
    pub(crate) cpu: Option<Duration>,
    /// Of that, what it counts as work.
    pub(crate) busy: Option<Duration>,
    pub(crate) counts: Option<Counts>,
    /// The share of the time in which its polling thread could have run, and others of this machine
    /// did.
    pub(crate) kept_waiting: f64,
}

/// One run of each server, right after the other.
#[derive(Clone, Debug)]
pub(crate) struct Alternation {
    pub(crate) round_trip_ns: f64,
    /// In the servers' order; `None` for a server that failed.
    pub(crate) samples: Vec<Option<Sample>>,
}

/// All runs of a cell.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) cell: Cell,
    pub(crate) alternations: Vec<Alternation>,
}

impl Measured {
    /// A figure of `server`, one from each alternation.
    pub(crate) fn of(&self, server: usize, figure: impl Fn(&Figures) -> f64) -> Option<Spread> {
        let of = |a: &Alternation| Some(figure(&a.samples[server].as_ref()?.figures));
        Spread::of(self.alternations.iter().filter_map(of))
    }

    /// Its median latency in round trips.
    pub(crate) fn trips(&self, server: usize) -> Option<Spread> {
        let pair =
            |a: &Alternation| Some((a.samples[server].as_ref()?.figures.p50_ns, a.round_trip_ns));
        Spread::of_ratios(self.alternations.iter().filter_map(pair))
    }

    /// A figure of server `of` divided by that of server `to`.
    pub(crate) fn ratio(
        &self,
        of: usize,
        to: usize,
        figure: impl Fn(&Figures) -> f64,
    ) -> Option<Spread> {
        let figure = |sample: &Option<Sample>| Some(figure(&sample.as_ref()?.figures));
        let pair = |a: &Alternation| Some((figure(&a.samples[of])?, figure(&a.samples[to])?));
        Spread::of_ratios(self.alternations.iter().filter_map(pair))
    }

    /// Something of `server` that a request cost, where it is known in every run.
    pub(crate) fn cost(
        &self,
        server: usize,
        cost: impl Fn(&Sample) -> Option<f64>,
    ) -> Option<Vec<f64>> {
        let per_request = |a: &Alternation| {
            let sample = a.samples[server].as_ref()?;
            Some(cost(sample)? / sample.figures.completed)
        };
        self.alternations.iter().map(per_request).collect()
    }
}

/// Measures `cell` on each server, as often as `options` say. A server that fails, or whose run finds errors, is left
/// out of the following runs.
///
/// # Errors
/// The round trip cannot be measured, or the run was interrupted.
pub(crate) fn measure(
    fleet: &mut Fleet,
    perf: &Perf,
    cell: Cell,
    options: &crate::options::Options,
    counters: Option<&Counters>,
    failures: &mut Failures,
    interrupt: &Interrupt,
) -> Result<Measured> {
    let mut failed = vec![false; fleet.len()];
    let mut alternations = Vec::with_capacity(options.runs());
    for run in 0..options.runs() {
        let round_trip_ns = perf.round_trip_ns(options.server_core)?;
        let mut samples = vec![None; fleet.len()];
        for turn in 0..fleet.len() {
            // Each server is the first one now and then.
            let index = (run + turn) % fleet.len();
            interrupt.check()?;
            if failed[index] {
                continue;
            }
            let sample = fleet.with(index, |server| sample(server, perf, &cell, counters));
            let spec = &fleet.get(index).spec;
            samples[index] = failures.keep(spec, cell, sample, interrupt)?;
            failed[index] = samples[index].is_none();
        }
        alternations.push(Alternation { round_trip_ns, samples });
    }
    Ok(Measured { cell, alternations })
}

fn sample(
    server: &Server,
    perf: &Perf,
    cell: &Cell,
    counters: Option<&Counters>,
) -> Result<Sample> {
    let socket = server.socket(cell.disk.name());
    // Read before and after the run, so that reading it disturbs nothing.
    let (start, before) = (Instant::now(), server.times()?);
    let (figures, busy, counts) = if cell.disk == DiskKind::File {
        // No ramp: what completes in it costs time, and is not counted.
        let perf = Perf { ramp_s: 0.0, ..perf.clone() };
        let counters = counters.map(|counters| (counters, &server.workers[..]));
        let busy = server.busy()?;
        let (figures, counts) = perf.run(&socket, cell, &[], counters)?;
        let busy = busy.zip(server.busy()?).map(|(before, after)| after.saturating_sub(before));
        (figures, busy, counts)
    } else {
        (perf.run(&socket, cell, &[], None)?.0, None, None)
    };
    let times = server.times()? - before;
    Ok(Sample {
        figures,
        cpu: (cell.disk == DiskKind::File).then_some(times.cpu),
        busy,
        counts,
        kept_waiting: times.waiting.as_secs_f64() / start.elapsed().as_secs_f64(),
    })
}

/// Writes all of the memory disk behind `socket`.
pub(crate) fn fill(socket: &Path) -> bench::Result<()> {
    let ram = GuestRam::new(&[4 << 20])?;
    let mut front_end = FrontEnd::connect(socket, ram.clone(), Options::default())?;
    let mut queues = front_end.start_new(1, QueueOptions::default())?;
    let buffer = ram.alloc(FILL_BYTES, 4096)?;
    let bytes: Vec<u8> = noise(1).take(FILL_BYTES as usize / 8).flatten().collect();
    ram.write(buffer.gpa, &bytes)?;
    for sector in (0..MEMORY_DISK_BYTES / 512).step_by(FILL_BYTES as usize / 512) {
        let done = queues[0].run(&Request::write(sector, &[buffer]))?;
        if done.status != STATUS_OK {
            return Err(bench::Error::LoadEnded(format!("a write has status {}", done.status)));
        }
    }
    front_end.disconnect().map(drop)
}

/// Makes a file of `mib` MiB in `dir` that is full of data and on the disk.
///
/// # Errors
/// There is no room, or it is no directory.
pub(crate) fn data_file(dir: &Path, mib: u64) -> Result<tempfile::NamedTempFile> {
    let doing = || format!("cannot make a file of {mib} MiB in {}", dir.display());
    let file = tempfile::Builder::new().prefix("bench").tempfile_in(dir).with_context(doing)?;
    let write = |mut file: &File| -> std::io::Result<()> {
        for seed in 0..mib {
            let bytes: Vec<u8> = noise(seed).take((1 << 20) / 8).flatten().collect();
            file.write_all(&bytes)?;
        }
        file.sync_all()
    };
    write(file.as_file()).with_context(doing)?;
    Ok(file)
}

/// Words that no disk compresses (xorshift64).
fn noise(seed: u64) -> impl Iterator<Item = [u8; 8]> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    })
}
