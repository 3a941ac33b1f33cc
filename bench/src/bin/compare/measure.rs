//! Measures cells in alternation: one server at a time, while the others are stopped, then fio.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::Spread;
use bench::servers::{Disk, Interrupt, Kind, MEMORY_DISK_BYTES, Server, Spec};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};

use crate::backing::Backing;
use crate::cells::{Cell, DiskKind};
use crate::counters::Counters;
use crate::failures::Failures;
use crate::fio::{Engine, Fio};
use crate::perf::{Figures, Perf};
use crate::syscalls::Tracer;

/// Bytes of a write when a disk is filled.
const FILL_BYTES: u32 = 64 << 10;

/// Servers, of which at most one runs at a time.
#[derive(Debug)]
pub(crate) struct Fleet {
    servers: Vec<Server>,
}

impl Fleet {
    /// Starts `specs` with their polling threads on `core`, and stops each when it serves `disks`.
    ///
    /// # Errors
    /// A server does not start, or its disk cannot be written.
    pub(crate) fn start(specs: &[Spec], core: usize, disks: &[Disk]) -> Result<Self> {
        let mut servers = Vec::new();
        for spec in specs {
            let mut server = Server::start(spec, core, disks)?;
            if disks.contains(&Disk::Malloc) {
                // Memory that was never written maps the zero page, which is always cached.
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

    /// Runs `during` while only server `index` runs.
    ///
    /// # Errors
    /// Those of `during`, or the server has ended.
    pub(crate) fn with<T>(
        &mut self,
        index: usize,
        during: impl FnOnce(&Server) -> Result<T>,
    ) -> Result<T> {
        let server = &mut self.servers[index];
        server.process.resume()?;
        let result = during(server).with_context(|| server.spec.name.clone());
        // A server that has failed may not answer.
        let free = if result.is_ok() { server.let_go() } else { Ok(()) };
        server.process.pause()?;
        free?;
        result
    }
}

/// The results of one run of one contender.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) figures: Figures,
    /// CPU time of the polling thread, if measured.
    pub(crate) cpu: Option<Duration>,
    /// The part of it that the server counts as work.
    pub(crate) busy: Option<Duration>,
    /// CPU time of the server's other threads.
    pub(crate) others: Option<Duration>,
    /// Events of the polling thread, in the order of [`crate::counters::WORK`].
    pub(crate) counts: Option<Vec<f64>>,
    /// The share of the time in which the polling thread was runnable but did not run.
    pub(crate) kept_waiting: f64,
}

impl Sample {
    /// A sample with only these figures.
    pub(crate) fn of(figures: Figures) -> Self {
        Self { figures, cpu: None, busy: None, others: None, counts: None, kept_waiting: 0.0 }
    }
}

/// One run of each contender, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Alternation {
    pub(crate) round_trip_ns: f64,
    /// The samples in the contenders' order. `None` for a contender that failed or has no such
    /// disk.
    pub(crate) samples: Vec<Option<Sample>>,
}

/// All runs of a cell.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) cell: Cell,
    pub(crate) alternations: Vec<Alternation>,
    /// System calls per I/O of each contender's polling thread, if counted.
    pub(crate) syscalls: Vec<Option<f64>>,
}

impl Measured {
    /// A figure of a contender over all alternations.
    pub(crate) fn of(&self, index: usize, figure: impl Fn(&Figures) -> f64) -> Option<Spread> {
        let of = |a: &Alternation| Some(figure(&a.samples.get(index)?.as_ref()?.figures));
        Spread::of(self.alternations.iter().filter_map(of))
    }

    /// The median latency of a server in round trips.
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
        let pair =
            |a: &Alternation| Some((figure(a.samples.get(of)?)?, figure(a.samples.get(to)?)?));
        Spread::of_ratios(self.alternations.iter().filter_map(pair))
    }

    /// A cost per request of a contender, if it was measured in every run.
    pub(crate) fn cost(
        &self,
        index: usize,
        cost: impl Fn(&Sample) -> Option<f64>,
    ) -> Option<Vec<f64>> {
        let per_request = |a: &Alternation| {
            let sample = a.samples.get(index)?.as_ref()?;
            Some(cost(sample)? / sample.figures.completed)
        };
        self.alternations.iter().map(per_request).collect()
    }
}

/// The tools and parameters of a measurement.
#[derive(Debug)]
pub(crate) struct Means<'a> {
    pub(crate) perf: &'a Perf,
    pub(crate) counters: Option<Counters>,
    pub(crate) tracer: Option<Tracer>,
    pub(crate) fio: Option<Fio>,
    pub(crate) backing: &'a Backing,
    pub(crate) runs: usize,
    pub(crate) server_core: usize,
}

/// Measures `cell` with each of the contenders, in `means.runs` alternations. A contender that fails
/// is omitted from later runs.
///
/// # Errors
/// The round trip cannot be measured, or the run was interrupted.
pub(crate) fn measure(
    fleet: &mut Fleet,
    means: &Means<'_>,
    cell: Cell,
    mut contenders: Vec<Contender<'_>>,
    failures: &mut Failures,
    interrupt: &Interrupt,
) -> Result<Measured> {
    let mut alternations = Vec::with_capacity(means.runs);
    for run in 0..means.runs {
        let round_trip_ns = means.perf.round_trip_ns(means.server_core)?;
        let mut samples = vec![None; contenders.len()];
        for place in 0..contenders.len() {
            // The order rotates, so that each contender is the first one in some runs.
            let index = (run + place) % contenders.len();
            let contender = &mut contenders[index];
            interrupt.check()?;
            let sample = match contender.who {
                _ if contender.out => continue,
                Who::Server(index, controller) => {
                    fleet.with(index, |server| sample(server, means, &cell, controller))
                }
                Who::Fio(fio, engine, path) => fio.run(engine, &cell, path),
            };
            let who = (contender.name.as_str(), contender.ours);
            samples[index] = failures.keep_of(who, cell, sample, interrupt)?;
            contender.out = samples[index].is_none();
        }
        alternations.push(Alternation { round_trip_ns, samples });
    }
    let mut syscalls = vec![None; contenders.len()];
    if let Some(tracer) = means.tracer.as_ref().filter(|_| cell.disk.is_stored()) {
        for (contender, calls) in contenders.iter().zip(&mut syscalls) {
            interrupt.check()?;
            let counted = match contender.who {
                _ if contender.out => continue,
                Who::Server(index, controller) => fleet.with(index, |server| {
                    let threads = (server.process.pid(), &server.workers[..]);
                    let socket = server.socket(&controller.of(cell.disk));
                    tracer.calls_per_io(threads, means.perf, &socket, &cell)
                }),
                Who::Fio(fio, engine, path) => fio.calls_per_io(engine, &cell, path, tracer),
            };
            let who = (contender.name.as_str(), contender.ours);
            *calls = failures.keep_of(who, format!("{cell}, system calls"), counted, interrupt)?;
        }
    }
    Ok(Measured { cell, alternations, syscalls })
}

/// The kind of a server's controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Controller {
    Blk,
    Scsi,
}

impl Controller {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Scsi => "scsi",
        }
    }

    /// The name of the controller that shows a disk, and of its socket.
    pub(crate) fn of(self, disk: DiskKind) -> String {
        match self {
            Self::Blk => disk.name().into(),
            Self::Scsi => format!("{}.scsi", disk.name()),
        }
    }

    /// What `vhost-perf` is told of it.
    fn args(self) -> &'static [&'static str] {
        match self {
            Self::Blk => &[],
            Self::Scsi => &["--device", "scsi"],
        }
    }
}

/// What a contender is.
#[derive(Clone, Copy)]
pub(crate) enum Who<'a> {
    /// The controllers of one kind of the server with this index in the fleet.
    Server(usize, Controller),
    Fio(&'a Fio, Engine, &'a Path),
}

/// A contender.
pub(crate) struct Contender<'a> {
    pub(crate) who: Who<'a>,
    pub(crate) name: String,
    pub(crate) ours: bool,
    /// It has failed.
    pub(crate) out: bool,
}

/// The contenders that have a disk of the cell's kind: servers, and then fio's engines.
pub(crate) fn contenders<'a>(
    fleet: &Fleet,
    means: &'a Means<'_>,
    cell: Cell,
) -> Vec<Contender<'a>> {
    let server = |(index, server): (usize, &Server)| Contender {
        who: Who::Server(index, Controller::Blk),
        name: server.spec.name.clone(),
        ours: server.spec.kind == Kind::Ours,
        out: false,
    };
    let mut contenders: Vec<_> = fleet.servers.iter().enumerate().map(server).collect();
    if let (Some(fio), Some(path)) = (&means.fio, means.backing.path(cell.disk)) {
        contenders.extend(Engine::ALL.map(|engine| Contender {
            who: Who::Fio(fio, engine, path),
            name: engine.title().into(),
            ours: false,
            out: false,
        }));
    }
    contenders
}

fn sample(
    server: &Server,
    means: &Means<'_>,
    cell: &Cell,
    controller: Controller,
) -> Result<Sample> {
    let socket = server.socket(&controller.of(cell.disk));
    let args = controller.args();
    // The times are read before and after the run, not during it.
    let (start, before) = (Instant::now(), server.times()?);
    let (figures, costs) = if cell.disk.is_stored() {
        // No ramp: requests in it would cost time without being counted.
        let perf = Perf { ramp_s: 0.0, ..means.perf.clone() };
        let counters = means.counters.as_ref().map(|counters| (counters, &server.workers[..]));
        let (busy, others) = (server.busy()?, server.cpu_of_others()?);
        let (figures, counts) = perf.run(&socket, cell, args, counters)?;
        let others = server.cpu_of_others()?.saturating_sub(others);
        let busy = busy.zip(server.busy()?).map(|(before, after)| after.saturating_sub(before));
        (figures, Some((busy, others, counts)))
    } else {
        (means.perf.run(&socket, cell, args, None)?.0, None)
    };
    let times = server.times()? - before;
    let kept_waiting = times.waiting.as_secs_f64() / start.elapsed().as_secs_f64();
    let Some((busy, others, counts)) = costs else {
        return Ok(Sample { kept_waiting, ..Sample::of(figures) });
    };
    let (cpu, others) = (Some(times.cpu), Some(others));
    Ok(Sample { figures, cpu, busy, others, counts, kept_waiting })
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
            let text = format!("a write completed with status {}", done.status);
            return Err(bench::Error::LoadEnded(text));
        }
    }
    front_end.disconnect()?;
    Ok(())
}

/// Incompressible words (xorshift64).
pub(crate) fn noise(seed: u64) -> impl Iterator<Item = [u8; 8]> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    })
}
