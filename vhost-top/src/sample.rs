//! What a server has answered at one time.

use std::collections::HashMap;
use std::time::Instant;

use serde::Deserialize;

use crate::histogram::Histogram;

/// The answers of one round of calls.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// When the counters were answered.
    pub(crate) at: Instant,
    /// The server's version.
    pub(crate) version: String,
    /// `framework_get_reactors`.
    pub(crate) reactors: Reactors,
    /// `vhost_get_reactor_turns`, if the server has it.
    pub(crate) iterations: Vec<Iterations>,
    /// The controllers, in the server's order.
    pub(crate) controllers: Vec<Controller>,
    /// By bdev, those that are enabled.
    pub(crate) histograms: HashMap<String, Histogram>,
    /// Methods that the server does not have.
    pub(crate) missing: Vec<&'static str>,
}

/// The answer of `framework_get_reactors`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Reactors {
    pub(crate) tick_rate: u64,
    pub(crate) pid: Option<u64>,
    pub(crate) reactors: Vec<Reactor>,
    pub(crate) stuck_closes: Vec<StuckClose>,
}

/// One reactor's times, in ticks.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Reactor {
    pub(crate) lcore: u64,
    pub(crate) busy: u64,
    pub(crate) idle: u64,
}

/// An account of file descriptors of which one takes long to close.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StuckClose {
    pub(crate) name: String,
}

/// One reactor of `vhost_get_reactor_turns`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Iterations {
    pub(crate) lcore: u64,
    #[serde(rename = "turns")]
    pub(crate) iterations: u64,
    pub(crate) sleeps: u64,
    #[serde(rename = "longest_turn_us")]
    pub(crate) longest_us: f64,
    pub(crate) causes: Vec<String>,
}

/// One controller of `vhost_get_controller_stats`, or of SPDK's `vhost_get_controllers`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Controller {
    #[serde(rename = "ctrlr")]
    pub(crate) name: String,
    pub(crate) sessions: Vec<Session>,
    pub(crate) backend_specific: Backend,
    /// Of SPDK's server: the counters of its bdevs.
    pub(crate) io: Io,
}

/// What a controller serves.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Backend {
    pub(crate) block: Block,
    pub(crate) scsi: Vec<Target>,
}

/// The disk of a virtio-blk controller.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Block {
    pub(crate) bdev: Option<String>,
}

/// A target of a virtio-scsi controller.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Target {
    pub(crate) luns: Vec<Lun>,
}

/// A logical unit of a target.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Lun {
    pub(crate) bdev_name: String,
}

/// The connection of one front end.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) started: bool,
    #[serde(rename = "inflight_task_cnt")]
    pub(crate) inflight: u64,
    pub(crate) state: Option<String>,
    pub(crate) quarantined_bytes: u64,
    pub(crate) errors: u64,
    pub(crate) queues: Vec<Queue>,
}

/// A ring that is served.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Queue {
    pub(crate) core: u64,
}

/// Counters of I/O; the names are those of `bdev_get_iostat` too.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub(crate) struct Io {
    #[serde(rename = "num_read_ops")]
    pub(crate) reads: u64,
    pub(crate) bytes_read: u64,
    pub(crate) read_latency_ticks: u64,
    #[serde(rename = "num_write_ops")]
    pub(crate) writes: u64,
    pub(crate) bytes_written: u64,
    pub(crate) write_latency_ticks: u64,
    #[serde(rename = "num_unmap_ops")]
    pub(crate) unmaps: u64,
    #[serde(rename = "num_write_zeroes_ops")]
    pub(crate) write_zeroes: u64,
    #[serde(rename = "num_flush_ops")]
    pub(crate) flushes: u64,
    pub(crate) failed: u64,
    pub(crate) throttled: u64,
}

impl Sample {
    /// The method that SPDK's server does not have.
    pub(crate) const STATS: &str = "vhost_get_controller_stats";

    /// Whether controllers have their own counters, and states and queues.
    pub(crate) fn has_stats(&self) -> bool {
        !self.missing.contains(&Self::STATS)
    }
}

impl Controller {
    /// The names of its disks, each once.
    pub(crate) fn bdevs(&self) -> Vec<&str> {
        let luns = self.backend_specific.scsi.iter().flat_map(|target| &target.luns);
        let names = luns.map(|lun| lun.bdev_name.as_str());
        let mut names: Vec<&str> =
            self.backend_specific.block.bdev.as_deref().into_iter().chain(names).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The name of its disk, if it has one only.
    pub(crate) fn bdev(&self) -> Option<&str> {
        let bdevs = self.bdevs();
        bdevs.first().copied().filter(|_| bdevs.len() == 1)
    }
}

impl Io {
    /// What was done since `before`. If a counter has fallen, all of them began anew after it: the
    /// controller or the server is new, or the counters were reset.
    pub(crate) fn since(&self, before: &Self) -> Self {
        self.checked_sub(before).unwrap_or(*self)
    }

    /// Adds the counters of another disk.
    pub(crate) fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.bytes_read += other.bytes_read;
        self.read_latency_ticks += other.read_latency_ticks;
        self.writes += other.writes;
        self.bytes_written += other.bytes_written;
        self.write_latency_ticks += other.write_latency_ticks;
        self.unmaps += other.unmaps;
        self.write_zeroes += other.write_zeroes;
        self.flushes += other.flushes;
        self.failed += other.failed;
        self.throttled += other.throttled;
    }

    fn checked_sub(&self, before: &Self) -> Option<Self> {
        let less = |of: fn(&Self) -> u64| of(self).checked_sub(of(before));
        Some(Self {
            reads: less(|io| io.reads)?,
            bytes_read: less(|io| io.bytes_read)?,
            read_latency_ticks: less(|io| io.read_latency_ticks)?,
            writes: less(|io| io.writes)?,
            bytes_written: less(|io| io.bytes_written)?,
            write_latency_ticks: less(|io| io.write_latency_ticks)?,
            unmaps: less(|io| io.unmaps)?,
            write_zeroes: less(|io| io.write_zeroes)?,
            flushes: less(|io| io.flushes)?,
            failed: less(|io| io.failed)?,
            throttled: less(|io| io.throttled)?,
        })
    }
}
