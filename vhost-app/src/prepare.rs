//! What has to be done before the second thread starts: files that cannot be made later, and the
//! sandbox.

use std::fs;
use std::io;
use std::path::Path;

use rte_vhost::eal::housekeeping_cpus;
use rte_vhost::transport;
use sandbox::{Needs, Sandbox};
use tempfile::TempDir;
use tracing::{info, warn};

use crate::cli::{Options, SandboxMode};
use crate::control;
use crate::core_locks::{self, CoreLocks};
use crate::{process, reactor_cores};

/// The results, which are reported once there is a log.
pub(crate) struct Prepared {
    pub(crate) pid_file: Result<(), String>,
    pub(crate) locks: Result<CoreLocks, String>,
    pub(crate) pinned: Result<(), String>,
    /// For the transport.
    pub(crate) private_dir: io::Result<TempDir>,
    pub(crate) sandbox: Result<Sandbox, sandbox::Error>,
}

impl Prepared {
    /// Does it all. To be called while the process has one thread.
    pub(crate) fn new(options: &Options) -> Self {
        let locked = if options.cpumask_locks { &options.cores[..] } else { &[] };
        // First, so that all threads, and the process that opens disks, start on CPUs without
        // reactors.
        let pinned = keep_away(&reactor_cores(options));
        let private_dir = transport::private_dir();
        Self {
            pinned,
            pid_file: options.pid_file.as_deref().map_or(Ok(()), write_pid),
            locks: CoreLocks::take(locked),
            sandbox: match options.sandbox {
                SandboxMode::Off => Ok(Sandbox::none()),
                SandboxMode::Available | SandboxMode::Required => {
                    sandbox::enter(&needs(options, private_dir.as_ref().ok()))
                }
            },
            private_dir,
        }
    }
}

fn keep_away(reactor_cores: &[usize]) -> Result<(), String> {
    let Ok(cpus) = housekeeping_cpus(reactor_cores) else { return Ok(()) };
    process::pin_to(&cpus).map_err(|e| format!("cannot set the CPU affinity to {cpus:?}: {e}"))
}

fn write_pid(path: &Path) -> Result<(), String> {
    fs::write(path, std::process::id().to_string())
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn needs(options: &Options, private_dir: Option<&TempDir>) -> Needs {
    let socket_dir = control::socket_dir(options.socket_dir.as_deref());
    let here = socket_dir.as_os_str().is_empty();
    Needs {
        socket_dir: if here { ".".into() } else { socket_dir },
        rpc_socket: options.rpc_socket.clone(),
        private_dir: private_dir.map(|dir| dir.path().to_owned()),
        config: options.config.clone(),
        removes_in: options.cpumask_locks.then(|| core_locks::DIR.into()),
        // Usually beneath /sys.
        reads_in: bdev::control_group_mounts(),
        disk_dirs: options.disk_dirs.clone(),
    }
}

/// Logs which parts of the sandbox are in effect.
///
/// # Errors
/// A part is not, and the operator requires it.
pub(crate) fn report(
    entered: Result<Sandbox, sandbox::Error>,
    options: &Options,
) -> Result<Sandbox, String> {
    let required = options.sandbox == SandboxMode::Required;
    let sandbox = match entered {
        Ok(sandbox) => sandbox,
        Err(e) if required || !options.disk_dirs.is_empty() => {
            return Err(format!("no sandbox: {e}"));
        }
        Err(e) => {
            warn!("no sandbox: {e}");
            Sandbox::none()
        }
    };
    for reason in sandbox.missing() {
        if required {
            return Err(format!("incomplete sandbox: {reason}"));
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
        text if text.is_empty() => info!("no sandbox"),
        text => info!("sandbox: {text}"),
    }
    Ok(sandbox)
}
