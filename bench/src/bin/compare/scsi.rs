//! Controllers of virtio-scsi, beside those of virtio-blk and another server's.

use std::path::Path;

use anyhow::{Context, Result};
use bench::publish::progress;
use bench::servers::{Disk, Interrupt, Kind, Spec};

use crate::Findings;
use crate::cells::{Cell, DiskKind};
use crate::measure::{self, Contender, Controller, Fleet, Means, Measured, Who};
use crate::options::Options;

/// The results.
#[derive(Debug, Default)]
pub(crate) struct Scsi {
    /// The contenders, in the order of the samples. The first one is compared with the others.
    pub(crate) contenders: Vec<Shown>,
    pub(crate) cells: Vec<Measured>,
}

/// A server's controllers of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) controller: Controller,
}

/// Returns the contenders: each server's virtio-scsi, and the virtio-blk of this project's, with the
/// indices of the servers.
fn shown(servers: &[Spec]) -> Vec<(usize, Shown)> {
    let of = |index: usize, controller: Controller| {
        let Spec { name, kind, .. } = &servers[index];
        let name = format!("{name} {}", controller.name());
        (index, Shown { name, kind: *kind, controller })
    };
    let with = |controller: Controller, has: fn(Kind) -> bool| {
        let indices = servers.iter().enumerate().filter(move |(_, spec)| has(spec.kind));
        indices.map(move |(index, _)| of(index, controller))
    };
    with(Controller::Scsi, |_| true)
        .chain(with(Controller::Blk, |kind| kind == Kind::Ours))
        .collect()
}

/// Measures `cells`, on disks in memory. Servers without virtio-scsi are omitted.
///
/// # Errors
/// A server does not start, or the run was interrupted. The failure of a server during the
/// measurement is a result.
pub(crate) fn measure(
    findings: &mut Findings,
    options: &Options,
    means: &Means<'_>,
    cells: &[Cell],
    interrupt: &Interrupt,
) -> Result<()> {
    let mut disks: Vec<DiskKind> = cells.iter().map(|cell| cell.disk).collect();
    disks.dedup();
    let served: Vec<Disk> = disks.iter().map(|disk| disk.disk(Path::new(""))).collect();
    let has_scsi = |spec: &&Spec| spec.kind != Kind::StorageDaemon;
    let servers: Vec<Spec> = findings.servers.iter().filter(has_scsi).cloned().collect();
    let mut fleet = Fleet::start(&servers, options.server_core, &served)?;
    let mut out = vec![false; servers.len()];
    for (index, spec) in servers.iter().enumerate() {
        let made = fleet.with(index, |server| {
            for disk in &disks {
                let name = Controller::Scsi.of(*disk);
                server.scsi_controller(&name, disk.name()).context("cannot make a controller")?;
            }
            Ok(())
        });
        out[index] = findings.failures.keep(spec, "virtio-scsi", made, interrupt)?.is_none();
    }
    let shown = shown(&servers);
    for (done, &cell) in cells.iter().enumerate() {
        progress(&format!("virtio-scsi {}/{}: {cell}", done + 1, cells.len()));
        let contenders = shown.iter().map(|(index, shown)| Contender {
            who: Who::Server(*index, shown.controller),
            name: shown.name.clone(),
            ours: shown.kind == Kind::Ours,
            out: out[*index] && shown.controller == Controller::Scsi,
        });
        let contenders = contenders.collect();
        let failures = &mut findings.failures;
        let measured = measure::measure(&mut fleet, means, cell, contenders, failures, interrupt)?;
        findings.scsi.cells.push(measured);
    }
    findings.scsi.contenders = shown.into_iter().map(|(_, shown)| shown).collect();
    progress("");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_scsi_comes_first_and_our_blk_last() {
        let spec = |name: &str, kind| Spec::new(name, kind, "vhost");
        let servers = [spec("new", Kind::Ours), spec("SPDK", Kind::Spdk)];
        let names: Vec<_> =
            shown(&servers).into_iter().map(|(index, shown)| (index, shown.name)).collect();
        let expected = [(0, "new scsi"), (1, "SPDK scsi"), (0, "new blk")];
        assert_eq!(names, expected.map(|(index, name)| (index, name.to_owned())));
    }
}
