//! Startup steps that must precede the second thread: files that the sandbox forbids to create, and
//! the sandbox itself, which applies to threads that start later.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rte_vhost::eal::housekeeping_cpus;
use rte_vhost::transport;
use sandbox::{Needs, Network, Sandbox, SocketAccess};
use tempfile::TempDir;
use tracing::{info, warn};

use crate::cli::{Options, SandboxMode};
use crate::control;
use crate::core_locks::{self, CoreLockError, CoreLocks};
use crate::metrics::{BindError, Bound};
use crate::socket_access::{self, NameError};
use crate::{engines, process, reactor_cores};

/// Why a step before the second thread failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    /// The file for the process id cannot be written.
    #[error("cannot write the process id to {0}: {1}")]
    PidFile(PathBuf, #[source] io::Error),
    /// Other threads may run on the reactors' CPUs.
    #[error("cannot keep other threads off the reactors' CPUs (affinity {cpus}): {source}")]
    Affinity {
        /// A list of numbers.
        cpus: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A user or a group does not exist.
    #[error("{0}")]
    Name(#[from] NameError),
    /// No part of the sandbox is in effect, and the options require it.
    #[error("cannot enter the sandbox: {0}")]
    NoSandbox(#[source] sandbox::Error),
    /// A part of the sandbox is not in effect, and `--sandbox` requires it.
    #[error("incomplete sandbox: {0}; without --sandbox, vhost starts with the other parts")]
    IncompleteSandbox(String),
}

/// The results, which are reported when the log is available.
pub(crate) struct Prepared {
    pub(crate) pid_file: Result<(), PrepareError>,
    pub(crate) locks: Result<CoreLocks, CoreLockError>,
    pub(crate) pinned: Result<(), PrepareError>,
    /// The mode and owner of the sockets.
    pub(crate) socket_access: Result<SocketAccess, PrepareError>,
    /// The socket for metrics.
    pub(crate) metrics: Result<Option<Bound>, BindError>,
    /// The transport's directory for its private socket.
    pub(crate) private_dir: io::Result<TempDir>,
    pub(crate) sandbox: Result<Sandbox, sandbox::Error>,
    /// Whether the process may connect to storage clusters.
    pub(crate) network: Network,
}

impl Prepared {
    /// Runs all steps. The process must have one thread.
    pub(crate) fn new(options: &Options) -> Self {
        let locked = if options.cpumask_locks { &options.cores[..] } else { &[] };
        // The first step: threads, and the process that opens disks, inherit the affinity.
        let pinned = keep_away(&reactor_cores(options));
        let private_dir = transport::private_dir();
        let socket_access = socket_access::resolve(options);
        let access = socket_access.as_ref().copied().unwrap_or_default();
        socket_access::join_group(&access);
        let network = engines::network(options);
        Self {
            pinned,
            socket_access: socket_access.map_err(PrepareError::from),
            metrics: options.metrics.as_ref().map(Bound::bind).transpose(),
            pid_file: options.pid_file.as_deref().map_or(Ok(()), write_pid),
            locks: CoreLocks::take(locked),
            sandbox: match options.sandbox {
                SandboxMode::Off => Ok(Sandbox::none()),
                SandboxMode::Available | SandboxMode::Required => {
                    sandbox::enter(&needs(options, private_dir.as_ref().ok(), access, network))
                }
            },
            private_dir,
            network,
        }
    }
}

/// Keeps this thread and its descendants off the CPUs of reactors.
fn keep_away(reactor_cores: &[usize]) -> Result<(), PrepareError> {
    let Ok(cpus) = housekeeping_cpus(reactor_cores) else { return Ok(()) };
    process::pin_to(&cpus)
        .map_err(|source| PrepareError::Affinity { cpus: process::list(&cpus), source })
}

fn write_pid(path: &Path) -> Result<(), PrepareError> {
    fs::write(path, std::process::id().to_string())
        .map_err(|e| PrepareError::PidFile(path.into(), e))
}

fn needs(
    options: &Options,
    private_dir: Option<&TempDir>,
    socket_access: SocketAccess,
    network: Network,
) -> Needs {
    let socket_dir = control::socket_dir(options.socket_dir.as_deref());
    let here = socket_dir.as_os_str().is_empty();
    // Usually beneath /sys.
    let groups = bdev::control_group_mounts();
    Needs {
        socket_dir: if here { ".".into() } else { socket_dir },
        rpc_socket: options.rpc_socket.clone(),
        private_dir: private_dir.map(|dir| dir.path().to_owned()),
        config: options.config.clone(),
        // The lock files of cores and of clients of storage clusters are in the same directory.
        locks_in: (options.cpumask_locks || network == Network::Allowed)
            .then(|| core_locks::DIR.into()),
        reads_in: groups.into_iter().chain(engines::reads_in(options, network)).collect(),
        network,
        disk_dirs: options.disk_dirs.clone(),
        socket_access,
    }
}

/// Logs which parts of the sandbox are in effect.
///
/// # Errors
/// The options require a part that is not in effect.
pub(crate) fn report(
    entered: Result<Sandbox, sandbox::Error>,
    options: &Options,
) -> Result<Sandbox, PrepareError> {
    let required = options.sandbox == SandboxMode::Required;
    let sandbox = match entered {
        Ok(sandbox) => sandbox,
        Err(e) if required || !options.disk_dirs.is_empty() => {
            return Err(PrepareError::NoSandbox(e));
        }
        Err(e) => {
            warn!("cannot enter the sandbox: {e}; continuing without it");
            Sandbox::none()
        }
    };
    for reason in sandbox.missing() {
        if required {
            return Err(PrepareError::IncompleteSandbox(reason.clone()));
        }
        warn!("incomplete sandbox: {reason}");
    }
    for path in sandbox.absent() {
        warn!(
            "{} does not exist; if it is created later, restart vhost or use --no-sandbox",
            path.display()
        );
    }
    match sandbox.in_effect() {
        text if text.is_empty() => info!("sandbox: none"),
        text => info!("sandbox: {text}"),
    }
    Ok(sandbox)
}
