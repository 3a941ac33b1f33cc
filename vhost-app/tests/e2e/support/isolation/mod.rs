//! What the cases of isolation are about: a `vhost`, a neighbour whose disk has to go on, and a VM
//! whose disk hangs, each in two forms.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bench::{Load, LoadOptions};
use front_end::features::{DRIVER_FEATURES, RING_PACKED};
use front_end::{AnyQueue, FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::disks;
use crate::support::harness::{self, Launch, Vhost, wait_until};

/// What each queue of a neighbour has to complete to count as undisturbed.
const UNDISTURBED: u64 = 500;
/// A VM's memory.
pub(crate) const RAM_BYTES: u64 = 64 << 20;

/// What a case is tried on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// One split ring for each VM, on one reactor that polls.
    Small,
    /// Four packed rings for each VM, with an in-flight area, over two reactors that sleep: they
    /// have the cores that the VMs' threads run on.
    Full,
}

impl Form {
    pub(crate) fn launch(self) -> Launch {
        match self {
            Self::Small => Launch::new(),
            Self::Full => Launch::new().mask(harness::two_cores()).args(&["--interrupt-mode"]),
        }
    }

    pub(crate) fn start(self) -> Host {
        self.start_as(self.launch())
    }

    pub(crate) fn start_as(self, launch: Launch) -> Host {
        Host { process: launch.start(), form: self }
    }

    pub(crate) fn queues(self) -> usize {
        if self == Self::Small { 1 } else { 4 }
    }

    fn cores(self) -> usize {
        if self == Self::Small { 1 } else { 2 }
    }

    /// A VM's I/O in flight when its disk answers none.
    pub(crate) fn held(self) -> usize {
        self.queues() * LoadOptions::default().depth
    }

    pub(crate) fn connect(self, socket: &Path, ram: &Arc<GuestRam>) -> FrontEnd {
        let full = self == Self::Full;
        let features = DRIVER_FEATURES | if full { RING_PACKED } else { 0 };
        let options = Options { features, inflight: full, ..Options::default() };
        let front_end = FrontEnd::connect(socket, ram.clone(), options).unwrap();
        assert_eq!(front_end.features() & RING_PACKED != 0, full);
        front_end
    }
}

/// A `vhost` whose controllers and VMs are of one form.
pub(crate) struct Host {
    pub(crate) process: Vhost,
    form: Form,
}

impl Deref for Host {
    type Target = Vhost;

    fn deref(&self) -> &Vhost {
        &self.process
    }
}

impl Host {
    pub(crate) fn malloc_controller(&self, controller: &str, bdev: &str) -> PathBuf {
        self.ok(
            "bdev_malloc_create",
            json!({"name": bdev, "num_blocks": 16384, "block_size": 512}),
        );
        self.controller_on(controller, bdev)
    }

    pub(crate) fn controller_on(&self, controller: &str, bdev: &str) -> PathBuf {
        let packed = self.form == Form::Full;
        let params = json!({"ctrlr": controller, "dev_name": bdev, "packed_ring": packed});
        self.ok("vhost_create_blk_controller", params);
        self.socket(controller)
    }

    /// Connects and starts a verifying load on each queue.
    pub(crate) fn vm(&self, socket: &Path) -> Vm {
        let ram = GuestRam::new(&[RAM_BYTES]).unwrap();
        let mut front_end = self.form.connect(socket, &ram);
        let queues = front_end.start_any(self.form.queues(), QueueOptions::default()).unwrap();
        let blocks = LoadOptions::default().blocks.end / queues.len() as u64;
        let load = |(n, queue): (u64, AnyQueue)| {
            let blocks = n * blocks..(n + 1) * blocks;
            Load::start(vec![queue], LoadOptions { blocks, ..LoadOptions::default() }).unwrap()
        };
        let loads = (0..).zip(queues).map(load).collect();
        Vm { ram, front_end, loads }
    }

    /// A VM on controller "a", which has a queue on each reactor.
    pub(crate) fn neighbour(&self) -> Vm {
        let vm = self.vm(&self.malloc_controller("a", "MA"));
        vm.goes_on();
        let session = &self.sessions("a")[0];
        let cores = session["queues"].as_array().unwrap().iter().map(|queue| &queue["core"]);
        let cores: BTreeSet<_> = cores.map(|core| core.as_u64().unwrap()).collect();
        assert_eq!(cores.len(), self.form.cores());
        vm
    }

    /// A VM comes, works and goes.
    pub(crate) fn passes_by(&self) {
        let c = self.vm(&self.malloc_controller("c", "MC"));
        c.goes_on();
        c.end();
    }

    pub(crate) fn sessions(&self, controller: &str) -> Vec<Value> {
        let answer = self.ok("vhost_get_controller_stats", json!({"name": controller}));
        answer[0]["sessions"].as_array().unwrap().clone()
    }

    /// A VM on controller "b" whose disk never answers, with all its I/O in flight.
    pub(crate) fn hung_vm(&self) -> Vm {
        let malloc = json!({"name": "MB", "num_blocks": 16384, "block_size": 512});
        self.ok("bdev_malloc_create", malloc);
        self.ok("bdev_error_create", json!({"base_name": "MB"}));
        let vm = self.vm(&self.controller_on("b", "EE_MB"));
        vm.goes_on();
        disks::hold(self, "EE_MB", 1000);
        wait_until("all of B's I/O is held", || {
            self.sessions("b")[0]["inflight_task_cnt"] == self.form.held()
        });
        vm
    }

    /// The disk of [`Host::hung_vm`] holds no further I/O.
    pub(crate) fn heal(&self) {
        disks::heal(self, "EE_MB");
    }

    /// Nor does it keep what it has held.
    pub(crate) fn answer(&self) {
        disks::answer(self, "EE_MB");
    }

    /// SIGTERM, and its exit code.
    pub(crate) fn stop(self) -> i32 {
        self.process.stop()
    }
}

/// A VM in small: a front end, and a load on each queue.
pub(crate) struct Vm {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) front_end: FrontEnd,
    pub(crate) loads: Vec<Load>,
}

impl Vm {
    pub(crate) fn goes_on(&self) {
        self.loads.iter().for_each(|load| load.wait_for(UNDISTURBED).unwrap());
    }

    /// Ends the loads, which must have seen nothing wrong, and then the VM.
    pub(crate) fn end(mut self) {
        self.stop_loads();
        self.front_end.disconnect().unwrap();
    }

    pub(crate) fn stop_loads(&mut self) {
        for load in self.loads.drain(..) {
            let (summary, _) = load.stop().unwrap();
            assert_eq!(summary.first_problem, None);
            assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
        }
    }

    /// Ends as a VM that is killed does.
    pub(crate) fn kill(self) {
        self.front_end.killer().unwrap().kill();
        for load in self.loads {
            load.abandon().unwrap();
        }
        self.front_end.kill();
    }
}

/// Waits until a front end is turned away.
pub(crate) fn refuses_connections(socket: &Path) {
    let ram = GuestRam::new(&[1 << 20]).unwrap();
    wait_until("new connections are refused", || {
        FrontEnd::connect(socket, ram.clone(), Options::default()).is_err()
    });
}
