//! Servers of vhost-user-blk and vhost-user-scsi disks to measure: started, given disks, stopped and continued, ended.
//!
//! Three kinds are known: our `vhost`, SPDK's (which has the same command line and RPC), and
//! `qemu-storage-daemon`. Each serves the same [`Disk`]s from one polling thread on one core. A
//! server that is not being measured is paused with SIGSTOP, so that two never poll on the same
//! core at once.
//!
//! Where the kinds have no disk of one sort in common, the one that is to the other server's
//! advantage is taken: for a malloc disk, `qemu-storage-daemon` has `null-co` with
//! `read-zeroes=on`, which fills the guest's buffer without reading anything from anywhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

mod interrupt;
mod machine;
mod process;
mod rpc;
mod storage_daemon;
mod vhost;

pub use interrupt::Interrupt;
pub use machine::{date, machine};
pub use process::{Process, ThreadTimes, core_steal, setpriv, thread_times};
pub use rpc::{Refusal, Rpc};

/// Bytes of a null or malloc disk: more than any cache holds.
pub const MEMORY_DISK_BYTES: u64 = 64 << 20;
/// Queues that `qemu-storage-daemon` is started with, as its disks have no more than were asked
/// for.
pub const QUEUES_MAX: usize = 4;

/// The result of most of what this module does.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it ended before it served
    #[error("{name} ended at its start ({status}):\n{log}")]
    Ended {
        /// Name of the server.
        name: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        log: String,
    },
    /// it does not answer
    #[error("{name}: no {what} within {limit:?}")]
    Silent {
        /// Name of the server.
        name: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// an RPC was refused
    #[error("{method}: {refusal}")]
    Refused {
        /// The method.
        method: String,
        /// The answer.
        refusal: Refusal,
    },
    /// an answer without what it should have
    #[error("{method} answers nonsense: {answer}")]
    Nonsense {
        /// The method.
        method: String,
        /// The answer.
        answer: String,
    },
    /// the system refused
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// it does not go on with what another server has begun
    #[error("it does not take over: {source}; the end of its log:\n{log}")]
    TakeOver {
        /// What it refused.
        source: crate::Error,
        /// The end of what it printed.
        log: String,
    },
    /// somebody pressed Ctrl-C
    #[error("interrupted")]
    Interrupted,
    /// the front end failed
    #[error(transparent)]
    FrontEnd(#[from] crate::Error),
}

impl From<front_end::Error> for Error {
    fn from(error: front_end::Error) -> Self {
        Self::FrontEnd(error.into())
    }
}

impl Error {
    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<std::io::Error>>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing: doing.into(), source: source.into() }
    }
}

/// What kind of server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our `vhost`.
    Ours,
    /// SPDK's `vhost`.
    Spdk,
    /// `qemu-storage-daemon`.
    StorageDaemon,
}

/// Which server to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name in tables.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The binary.
    pub program: PathBuf,
    /// Arguments after those that every server of its kind gets.
    pub args: Vec<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
}

impl Spec {
    /// A server without further arguments.
    #[must_use]
    pub fn new(name: impl Into<String>, kind: Kind, program: impl Into<PathBuf>) -> Self {
        let (name, program) = (name.into(), program.into());
        Self { name, kind, program, args: Vec::new(), env: Vec::new() }
    }

    /// The same server with more arguments.
    #[must_use]
    pub fn with_args(&self, args: &[&str]) -> Self {
        let mut spec = self.clone();
        spec.args.extend(args.iter().map(|&arg| arg.to_owned()));
        spec
    }
}

/// A disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// One that does nothing.
    Null,
    /// One in the server's memory.
    Malloc,
    /// A file with `O_DIRECT`: `bdev_aio_create`, or qemu's `aio=native`.
    Aio(PathBuf),
    /// A file with `O_DIRECT`: `bdev_uring_create` where the server has it, or qemu's `aio=io_uring`.
    Uring(PathBuf),
    /// A block device, as [`Disk::Uring`].
    Block(PathBuf),
}

impl Disk {
    /// Its name, which is that of its controller too.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Malloc => "malloc",
            Self::Aio(_) => "aio",
            Self::Uring(_) => "uring",
            Self::Block(_) => "block",
        }
    }

    /// The file or device behind it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Null | Self::Malloc => None,
            Self::Aio(path) | Self::Uring(path) | Self::Block(path) => Some(path),
        }
    }
}

/// A server that runs. It is killed when this is dropped, and by the kernel when this process ends
/// otherwise.
#[derive(Debug)]
pub struct Server {
    /// What was started.
    pub spec: Spec,
    /// The process.
    pub process: Process,
    /// Threads that do I/O: reactors, or all that `qemu-storage-daemon` has.
    pub workers: Vec<u32>,
    /// What disks on files and devices are served through, by the disk's name.
    pub drivers: Vec<(&'static str, String)>,
    dir: TempDir,
}

impl Server {
    /// Starts `spec` with its polling thread on `core`, serving `disks`.
    ///
    /// # Errors
    /// [`Error::Ended`], also if it does not know an option; what is refused; no such program.
    pub fn start(spec: &Spec, core: usize, disks: &[Disk]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench")
            .tempdir()
            .map_err(Error::system("cannot make a directory"))?;
        match spec.kind {
            Kind::Ours | Kind::Spdk => vhost::start(spec, core, disks, dir),
            Kind::StorageDaemon => storage_daemon::start(spec, core, disks, dir),
        }
    }

    /// The directory of its sockets and its log.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The socket of the controller or export `name`.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The RPC socket; `qemu-storage-daemon` has none.
    #[must_use]
    pub fn rpc_socket(&self) -> PathBuf {
        self.dir.path().join("rpc.sock")
    }

    /// Calls an RPC on a connection of its own. `Value::Null` means no parameters.
    ///
    /// # Errors
    /// [`Error::Refused`], or it does not answer.
    pub fn call(&self, method: &str, params: Value) -> Result<Value> {
        Rpc::connect(&self.rpc_socket())?.call(method, params)
    }

    /// Makes a controller on `bdev` and returns its socket.
    ///
    /// # Errors
    /// As [`Server::call`].
    pub fn controller(&self, name: &str, bdev: &str) -> Result<PathBuf> {
        let params = json!({"ctrlr": name, "dev_name": bdev});
        self.call("vhost_create_blk_controller", params)?;
        Ok(self.socket(name))
    }

    /// Makes a virtio-scsi controller whose target 0 shows `bdev`, and returns its socket.
    ///
    /// # Errors
    /// As [`Server::call`].
    pub fn scsi_controller(&self, name: &str, bdev: &str) -> Result<PathBuf> {
        self.call("vhost_create_scsi_controller", json!({"ctrlr": name}))?;
        let target = json!({"ctrlr": name, "scsi_target_num": 0, "bdev_name": bdev});
        self.call("vhost_scsi_controller_add_target", target)?;
        Ok(self.socket(name))
    }

    /// Makes a null or malloc bdev of [`MEMORY_DISK_BYTES`].
    ///
    /// # Errors
    /// As [`Server::call`].
    pub fn bdev(&self, kind: &str, name: &str) -> Result<()> {
        let params = json!({
            "name": name, "num_blocks": MEMORY_DISK_BYTES / 512, "block_size": 512
        });
        self.call(&format!("bdev_{kind}_create"), params).map(drop)
    }

    /// Waits until other servers may use its files: ours lets go of them a moment after its front ends
    /// have stopped, and not while it is paused.
    ///
    /// # Errors
    /// As [`Server::call`], or a front end has not stopped.
    pub fn let_go(&mut self) -> Result<()> {
        if self.spec.kind != Kind::Ours {
            return Ok(());
        }
        let rpc = self.rpc_socket();
        let mut shown = Ok(());
        self.process.wait_until("end of its use of files", || {
            let bdevs =
                Rpc::connect(&rpc).and_then(|mut rpc| rpc.call("bdev_get_bdevs", Value::Null));
            match bdevs {
                Ok(bdevs) => !bdevs.as_array().is_some_and(|bdevs| bdevs.iter().any(is_leased)),
                Err(e) => {
                    shown = Err(e);
                    true
                }
            }
        })?;
        shown
    }

    /// How long its workers have been busy by their own account, if they keep one.
    ///
    /// # Errors
    /// As [`Server::call`].
    pub fn busy(&self) -> Result<Option<Duration>> {
        if self.spec.kind == Kind::StorageDaemon {
            return Ok(None);
        }
        let method = "framework_get_reactors";
        let answer = self.call(method, Value::Null)?;
        let busy = answer["reactors"].as_array().and_then(|reactors| {
            let ticks: Option<u64> = reactors.iter().map(|r| r["busy"].as_u64()).sum();
            Some(ticks? as f64 / answer["tick_rate"].as_f64()?)
        });
        let nonsense = || Error::Nonsense { method: method.into(), answer: answer.to_string() };
        busy.map(Duration::from_secs_f64).map(Some).ok_or_else(nonsense)
    }

    /// CPU time of its threads that are not workers: those that serve a disk's slow requests, and
    /// the kernel's for io_uring. Of threads that have ended nothing is known.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_of_others(&self) -> Result<Duration> {
        let tids = self.process.threads()?.into_iter().filter(|tid| !self.workers.contains(tid));
        let times = tids.filter_map(|tid| thread_times(self.process.pid(), tid).ok());
        Ok(times.map(|times| times.cpu).sum())
    }

    /// What the kernel has accounted to its workers.
    ///
    /// # Errors
    /// They are gone.
    pub fn times(&self) -> Result<ThreadTimes> {
        let mut sum = ThreadTimes::default();
        for &tid in &self.workers {
            sum += thread_times(self.process.pid(), tid)?;
        }
        Ok(sum)
    }
}

/// Whether a bdev keeps other processes from its file, or wants to.
fn is_leased(bdev: &Value) -> bool {
    let modules = bdev["driver_specific"].as_object();
    let lease = |module: &Value| module["lease"].as_str().is_some_and(|lease| lease != "none");
    modules.is_some_and(|modules| modules.values().any(lease))
}
