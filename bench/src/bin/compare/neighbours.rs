//! The cost of connected idle controllers for a busy controller on the same reactor.

use std::path::Path;

use anyhow::{Context, Result};
use bench::Spread;
use bench::publish::progress;
use bench::servers::{Disk, Interrupt, Kind, Server, Spec};
use front_end::{FrontEnd, GuestRam, Options as Agreed, Queue, QueueOptions, Request};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::Findings;
use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::measure::Fleet;
use crate::options::Options;
use crate::perf::Perf;

/// Memory of each idle guest.
const RAM_BYTES: u64 = 2 << 20;
/// The bdev of the idle controllers.
const IDLE_BDEV: &str = "idle";

/// The results of a busy controller, with idle controllers and alone.
#[derive(Clone, Debug)]
pub(crate) struct Neighbours {
    pub(crate) server: Spec,
    pub(crate) disk: DiskKind,
    pub(crate) count: usize,
    /// IOPS at depth 64, with idle controllers and alone.
    pub(crate) iops: Vec<(f64, f64)>,
    /// Median latency at depth 1, with idle controllers and alone.
    pub(crate) p50_ns: Vec<(f64, f64)>,
}

impl Neighbours {
    /// The ratio of the throughput with idle controllers to that alone.
    pub(crate) fn iops_ratio(&self) -> Option<Spread> {
        Spread::of_ratios(self.iops.iter().copied())
    }

    /// The ratio of the latency with idle controllers to that alone.
    pub(crate) fn p50_ratio(&self) -> Option<Spread> {
        Spread::of_ratios(self.p50_ns.iter().copied())
    }
}

/// Measures each server whose controllers are created by RPC.
///
/// # Errors
/// A server does not start, or the run was interrupted. The failure of a server during the
/// measurement is a result.
pub(crate) fn measure(
    findings: &mut Findings,
    options: &Options,
    perf: &Perf,
    interrupt: &Interrupt,
) -> Result<()> {
    raise_fd_limit().context("cannot raise the limit on open files")?;
    let kinds = options.disks_or(&[DiskKind::Null, DiskKind::Malloc]);
    let kinds: Vec<_> = kinds.into_iter().filter(|kind| !kind.is_stored()).collect();
    let disks: Vec<Disk> = kinds.iter().map(|kind| kind.disk(Path::new(""))).collect();
    for spec in findings.servers.clone() {
        if spec.kind == Kind::StorageDaemon {
            continue;
        }
        let mut fleet = Fleet::start(std::slice::from_ref(&spec), options.server_core, &disks)?;
        let new = |&disk: &DiskKind| Neighbours {
            server: spec.clone(),
            disk,
            count: options.neighbours,
            iops: Vec::new(),
            p50_ns: Vec::new(),
        };
        let mut found: Vec<Neighbours> = kinds.iter().map(new).collect();
        let result = fleet.with(0, |server| {
            server.bdev("null", IDLE_BDEV)?;
            for n in 0..options.neighbours {
                server.controller(&name(n), IDLE_BDEV)?;
            }
            for run in 0..options.runs() {
                progress(&format!("idle neighbours of {}, run {}", spec.name, run + 1));
                let alone = busy(server, perf, &kinds, interrupt)?;
                let idle = Idle::connect(server, options.neighbours)?;
                let beside = busy(server, perf, &kinds, interrupt)?;
                idle.disconnect()?;
                for ((found, alone), beside) in found.iter_mut().zip(alone).zip(beside) {
                    found.p50_ns.push((beside.0, alone.0));
                    found.iops.push((beside.1, alone.1));
                }
            }
            Ok(())
        });
        let case = format!("{} idle neighbours", options.neighbours);
        findings.failures.keep(&spec, case, result, interrupt)?;
        findings.neighbours.extend(found);
    }
    progress("");
    Ok(())
}

/// Median latency at depth 1 and IOPS at depth 64 of each disk.
fn busy(
    server: &Server,
    perf: &Perf,
    disks: &[DiskKind],
    interrupt: &Interrupt,
) -> Result<Vec<(f64, f64)>> {
    let figures = |disk: &DiskKind| {
        let cell =
            |depth| Cell { disk: *disk, rw: Workload::Randread, bs: Size::K4, depth, queues: 1 };
        let socket = server.socket(disk.name());
        interrupt.check()?;
        let (one, _) = perf.run(&socket, &cell(1), &[], None)?;
        interrupt.check()?;
        let (many, _) = perf.run(&socket, &cell(64), &[], None)?;
        Ok((one.p50_ns, many.iops))
    };
    disks.iter().map(figures).collect()
}

/// Idle guests.
struct Idle {
    guests: Vec<(FrontEnd, Vec<Queue>)>,
}

impl Idle {
    /// Connects the guests. Each reads once, which proves that its queue is served.
    fn connect(server: &Server, count: usize) -> Result<Self> {
        let guest = |n: usize| -> bench::Result<_> {
            let ram = GuestRam::new(&[RAM_BYTES])?;
            let socket = server.socket(&name(n));
            let mut front_end = FrontEnd::connect(&socket, ram.clone(), Agreed::default())?;
            let mut queues = front_end.start_new(1, QueueOptions::default())?;
            queues[0].run(&Request::read(0, &[ram.alloc(4096, 4096)?]))?;
            Ok((front_end, queues))
        };
        let said = |n: usize| {
            guest(n).with_context(|| format!("cannot connect idle guest {} of {count}", n + 1))
        };
        Ok(Self { guests: (0..count).map(said).collect::<Result<_>>()? })
    }

    fn disconnect(self) -> Result<()> {
        for (front_end, _) in self.guests {
            front_end.disconnect()?;
        }
        Ok(())
    }
}

fn name(n: usize) -> String {
    format!("idle.{n}")
}

/// Raises the limit on open files. Each guest needs several fds in this process, and in the server,
/// which inherits the limit.
fn raise_fd_limit() -> rustix::io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
}
