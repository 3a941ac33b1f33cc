//! A `vhost` that is killed again and again under load, and a guest that goes on with the next one.
//!
//! The guest does what QEMU's does with `reconnect=`: its memory, its rings and the in-flight area
//! outlive each server. It writes blocks that say which they are and how often they were written,
//! and no block is in flight twice. So it sees whether a request came back exactly once, and
//! whether each read has what was written last: a write that is done once more after a newer one
//! would show.

mod guest;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use front_end::prepared::{Blk, Form, Scsi};
use front_end::scsi::lun;
use front_end::{LIMIT, RingLayout};
use serde_json::{Value, json};

pub use crate::perf::Device;
use crate::restarted::Server;
use crate::servers::{Error, Result};
use guest::Guest;

/// Requests between two kills are at most 2 to the power of this, and as often below any lower one:
/// a server that has just taken over is to be killed too.
const LIFE_BITS_MAX: u64 = 13;
/// The disk's name, and its controller's.
const DISK: &str = "disk";
/// Bytes of a logical block.
const DISK_BLOCK_BYTES: u32 = 512;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The binary.
    pub vhost: PathBuf,
    /// Arguments after those that it gets anyway.
    pub args: Vec<String>,
    /// The core of its reactor.
    pub core: usize,
    /// The kind of its controller.
    pub device: Device,
    /// The kind of rings.
    pub rings: RingLayout,
    /// Queues: the odd ones' requests are in indirect tables.
    pub queues: usize,
    /// Requests in flight on each.
    pub depth: u16,
    /// How often it is killed.
    pub kills: u64,
    /// Chooses blocks, kinds, and when to kill.
    pub seed: u64,
    /// The method that creates the disk's bdev, and its parameters without the name. `None`: an aio bdev
    /// on a file.
    pub bdev: Option<(&'static str, Value)>,
}

impl Plan {
    /// 200 kills at 64 requests in flight on two split queues, on core 1.
    #[must_use]
    pub fn new(vhost: PathBuf) -> Self {
        Self {
            vhost,
            args: vec![],
            core: 1,
            device: Device::Blk,
            rings: RingLayout::Split,
            queues: 2,
            depth: 32,
            kills: 200,
            seed: 1,
            bdev: None,
        }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        guest::disk_bytes(self)
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Toll {
    /// How often the server was killed.
    pub kills: u64,
    /// Requests that came back.
    pub completed: u64,
    /// Requests that were in flight when a server was started again.
    pub survived: u64,
    /// Requests that never came back.
    pub lost: u64,
    /// Requests that came back without being in flight, or without having been done.
    pub duplicated: u64,
    /// Reads that have not what was written last.
    pub stale: u64,
    /// Requests that came back with an error.
    pub errors: u64,
    /// Requests that came back with a unit attention and were submitted again: the nexus is new in
    /// each virtio-scsi server. This is no problem.
    pub attentions: u64,
    /// The first loss, duplicate, stale read or error.
    pub first_problem: Option<String>,
    /// From the start of a server until it had taken over, in all.
    pub restarting: Duration,
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
        let Self { kills, completed, survived, lost, duplicated, stale, .. } = self;
        let Self { errors, attentions, .. } = self;
        let each = self.restarting / u32::try_from(*kills).unwrap_or(u32::MAX).max(1);
        write!(
            f,
            "{kills} kills, {completed} requests, {survived} of them in flight over a kill: {lost} lost, \
             {duplicated} duplicated, {stale} stale, {errors} errors; a restart takes {} ms",
            each.as_millis()
        )?;
        if *attentions > 0 {
            write!(f, "; {attentions} unit attentions")?;
        }
        match &self.first_problem {
            Some(problem) => write!(f, "; first: {problem}"),
            None => Ok(()),
        }
    }
}

/// Does what `plan` says, up to the first problem that a guest would have. At the end the guest
/// lets everything come back, and reads all of its blocks.
///
/// # Errors
/// The server does not start, or does not take over; not what is in the [`Toll`].
pub fn run(plan: &Plan) -> Result<Toll> {
    match plan.device {
        Device::Blk => run_with(plan, Blk),
        Device::Scsi { target } => {
            run_with(plan, Scsi { lun: lun(target, 0), block_bytes: DISK_BLOCK_BYTES })
        }
    }
}

fn run_with<F: Form + Copy>(plan: &Plan, form: F) -> Result<Toll> {
    let mut server = make_server(plan)?;
    let mut random = Random(plan.seed);
    let mut toll = Toll::default();
    let mut guest = Guest::new(plan, form)?;
    server.start()?;
    server.until_it_listens(DISK, |socket| guest.connect(socket))?;
    guest.serve(|lanes, connection| {
        for _ in 0..plan.kills {
            let bits = random.below(LIFE_BITS_MAX + 1);
            let target = toll.completed + random.below(1 << bits);
            while toll.completed < target && toll.is_good() {
                lanes.work(&mut toll)?;
            }
            if !toll.is_good() {
                return Ok(());
            }
            server.kill();
            toll.kills += 1;
            // A guest sees what is done, and gives more, whether or not anybody serves it.
            for _ in 0..random.below(3) {
                lanes.work(&mut toll)?;
            }
            toll.survived += lanes.in_flight();
            let start = Instant::now();
            server.start()?;
            server.until_it_listens(DISK, |_| lanes.reconnect(connection))?;
            toll.restarting += start.elapsed();
        }
        lanes.finish(&mut toll)
    })?;
    Ok(toll)
}

fn make_server(plan: &Plan) -> Result<Server> {
    let doing = || "cannot make a disk";
    let dir = tempfile::Builder::new().prefix("crash").tempdir();
    let dir = dir.map_err(Error::system(doing()))?;
    let disk = dir.path().join("file");
    let file = File::create(&disk).map_err(Error::system(doing()))?;
    file.set_len(plan.disk_bytes()).map_err(Error::system(doing()))?;
    let aio = || ("bdev_aio_create", json!({"filename": disk, "block_size": DISK_BLOCK_BYTES}));
    let (method, mut params) = plan.bdev.clone().unwrap_or_else(aio);
    params["name"] = DISK.into();
    let packed = plan.rings == RingLayout::Packed;
    let controller = |mut params: Value| {
        params["ctrlr"] = DISK.into();
        params
    };
    let controllers = match plan.device {
        Device::Blk => {
            let params = json!({"dev_name": DISK, "packed_ring": packed});
            vec![("vhost_create_blk_controller", controller(params))]
        }
        Device::Scsi { target } => {
            let of_target = json!({"scsi_target_num": target, "bdev_name": DISK});
            vec![
                ("vhost_create_scsi_controller", controller(json!({"packed_ring": packed}))),
                ("vhost_scsi_controller_add_target", controller(of_target)),
            ]
        }
    };
    Server::new(&plan.vhost, &plan.args, plan.core, dir, &[(method, params)], &controllers)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % end
    }
}
