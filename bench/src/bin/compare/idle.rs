//! CPU time of an idle reactor, and the latency of a request after an idle time.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::Spread;
use bench::publish::progress;
use bench::servers::{Disk, Error, Interrupt, Kind, Server, Spec};
use front_end::{FrontEnd, GuestRam, Options as Agreed, QueueOptions, Request};

use crate::Findings;
use crate::cells::{Cell, DiskKind, Size, Workload};
use crate::measure::Fleet;
use crate::options::{Case, Options};
use crate::perf::Perf;

/// The duration in which CPU time is counted.
const IDLE: Duration = Duration::from_secs(3);
/// Requests per second: a pause of 1 ms before each.
const RATE: &str = "1000";

/// A mode of reactors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Poll,
    Interrupt,
    Adaptive,
    /// The only mode of the server.
    Own,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
            Self::Adaptive => "adaptive",
            Self::Own => "default",
        }
    }

    fn args(self) -> &'static [&'static str] {
        match self {
            Self::Poll | Self::Own => &[],
            Self::Interrupt => &["--interrupt-mode"],
            Self::Adaptive => &["--reactor-idle-us", "50"],
        }
    }

    fn of(kind: Kind) -> &'static [Self] {
        match kind {
            Kind::Ours | Kind::Spdk => &[Self::Poll, Self::Interrupt, Self::Adaptive],
            Kind::StorageDaemon => &[Self::Own],
        }
    }
}

/// The results of a server in one mode.
#[derive(Clone, Debug)]
pub(crate) struct Modes {
    pub(crate) server: Spec,
    pub(crate) mode: Mode,
    /// Why the server does not start in this mode.
    pub(crate) unsupported: Option<String>,
    /// The results of each disk.
    pub(crate) disks: Vec<Idleness>,
}

/// The results of one disk.
#[derive(Clone, Debug)]
pub(crate) struct Idleness {
    pub(crate) disk: DiskKind,
    /// The reactor's share of a CPU with one connected idle front end.
    pub(crate) cpu: Option<f64>,
    /// The median latency of a request after a pause, for each alternation; the guest polls.
    pub(crate) polling_ns: Vec<f64>,
    /// The same latency if the guest sleeps until it gets a call.
    pub(crate) sleeping_ns: Vec<f64>,
}

impl Modes {
    /// The difference of the latency to that of `other` in the same alternations, in ns.
    pub(crate) fn later_than(&self, other: &Self, disk: DiskKind) -> Option<Spread> {
        let of = |modes: &Self| Some(modes.disks.iter().find(|d| d.disk == disk)?.clone());
        let (ours, theirs) = (of(self)?.polling_ns, of(other)?.polling_ns);
        Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs))
    }
}

/// Measures every mode of every server.
///
/// # Errors
/// A server does not start, for a reason other than an unsupported option, or the run was
/// interrupted.
pub(crate) fn measure(
    findings: &mut Findings,
    options: &Options,
    perf: &Perf,
    disks: &[Disk],
    interrupt: &Interrupt,
) -> Result<()> {
    let kinds: Vec<DiskKind> =
        DiskKind::ALL.into_iter().filter(|k| disks.iter().any(|d| d.name() == k.name())).collect();
    let (mut modes, mut specs) = (Vec::new(), Vec::new());
    for spec in &findings.servers {
        for &mode in Mode::of(spec.kind) {
            let with_args = spec.with_args(mode.args());
            let unsupported = refusal(&with_args, options.server_core)?;
            let new = |&disk: &DiskKind| Idleness {
                disk,
                cpu: None,
                polling_ns: Vec::new(),
                sleeping_ns: Vec::new(),
            };
            let disks = kinds.iter().map(new).collect();
            if unsupported.is_none() {
                specs.push(with_args);
            }
            modes.push(Modes { server: spec.clone(), mode, unsupported, disks });
        }
    }
    let mut fleet = Fleet::start(&specs, options.server_core, disks)?;
    let mut found: Vec<&mut Modes> =
        modes.iter_mut().filter(|modes| modes.unsupported.is_none()).collect();
    if options.wants(Case::IdleCpu) {
        for (index, modes) in found.iter_mut().enumerate() {
            for disk in &mut modes.disks {
                progress(&format!("idle CPU of {}, {}", modes.server.name, disk.disk.name()));
                interrupt.check()?;
                let name = disk.disk.name();
                let share = fleet.with(index, |server| idle_share(server, name, interrupt));
                let case = format!("idle CPU, {}, {name}", modes.mode.name());
                disk.cpu = findings.failures.keep(&modes.server, case, share, interrupt)?;
            }
        }
    }
    if options.wants(Case::IdleLatency) {
        for run in 0..options.runs() {
            progress(&format!("latency after idle, run {}", run + 1));
            for (index, modes) in found.iter_mut().enumerate() {
                let result = fleet
                    .with(index, |server| latencies(server, perf, &mut modes.disks, interrupt));
                let case = format!("latency after idle, {}", modes.mode.name());
                findings.failures.keep(&modes.server, case, result, interrupt)?;
            }
        }
    }
    progress("");
    findings.modes = modes;
    Ok(())
}

/// Why `spec` does not start, if it exits with a message.
fn refusal(spec: &Spec, core: usize) -> Result<Option<String>> {
    match Server::start(spec, core, &[]) {
        Ok(_) => Ok(None),
        Err(Error::Ended { log, .. }) => {
            Ok(Some(log.lines().next().unwrap_or_default().to_owned()))
        }
        Err(error) => Err(error).context(spec.name.clone()),
    }
}

/// The CPU share of the server's workers with one connected idle front end.
fn idle_share(server: &Server, disk: &str, interrupt: &Interrupt) -> Result<f64> {
    let ram = GuestRam::new(&[2 << 20])?;
    let mut front_end = connect(&server.socket(disk), &ram)?;
    let mut queues = front_end.start_new(1, QueueOptions::default())?;
    queues[0].run(&Request::read(0, &[ram.alloc(4096, 4096)?]))?;
    let (start, before) = (Instant::now(), server.times()?.cpu);
    while start.elapsed() < IDLE {
        std::thread::sleep(Duration::from_millis(100));
        interrupt.check()?;
    }
    let cpu = server.times()?.cpu.saturating_sub(before);
    let share = cpu.as_secs_f64() / start.elapsed().as_secs_f64();
    front_end.disconnect()?;
    Ok(share)
}

fn connect(socket: &Path, ram: &std::sync::Arc<GuestRam>) -> front_end::Result<FrontEnd> {
    FrontEnd::connect(socket, ram.clone(), Agreed::default())
}

/// Measures the latency after a pause on each disk, and adds it to the results.
fn latencies(
    server: &Server,
    perf: &Perf,
    disks: &mut [Idleness],
    interrupt: &Interrupt,
) -> Result<()> {
    for disk in disks {
        let (rw, bs) = (Workload::Randread, Size::K4);
        let cell = Cell { disk: disk.disk, rw, bs, depth: 1, queues: 1 };
        let socket = server.socket(disk.disk.name());
        let paced = ["--rate_iops", RATE];
        let sleeping = ["--rate_iops", RATE, "--interrupts"];
        interrupt.check()?;
        disk.polling_ns.push(perf.run(&socket, &cell, &paced, None)?.0.p50_ns);
        interrupt.check()?;
        disk.sleeping_ns.push(perf.run(&socket, &cell, &sleeping, None)?.0.p50_ns);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_subtracted_run_by_run() {
        let modes = |mode, polling_ns| Modes {
            server: Spec::new("vhost", Kind::Ours, "vhost"),
            mode,
            unsupported: None,
            disks: vec![Idleness {
                disk: DiskKind::Null,
                cpu: None,
                polling_ns,
                sleeping_ns: vec![],
            }],
        };
        let adaptive = modes(Mode::Adaptive, vec![11.0, 110.0, 12.0]);
        let sleeping = modes(Mode::Interrupt, vec![10.0, 100.0, 10.0]);
        let later = adaptive.later_than(&sleeping, DiskKind::Null).unwrap();
        assert_eq!((later.median, later.min, later.max), (2.0, 1.0, 10.0));
        assert_eq!(adaptive.later_than(&sleeping, DiskKind::Uring), None);
    }
}
