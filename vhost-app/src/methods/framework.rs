//! `framework_*` and `spdk_*`: version, startup, subsystems, signals.

use std::rc::Rc;

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

use super::{Answer, App, Methods, bdev, vhost, vhost_blk, vhost_scsi};
use crate::cli::{SPDK_VERSION, VERSION};
use crate::core_locks::CoreLocks;
use crate::process;

/// The state of startup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Startup {
    /// Waits for `framework_start_init`, or for the first pass over the configuration.
    Waiting,
    /// A client has called `framework_start_init`.
    Requested,
    /// Runtime methods may be called.
    Running,
    /// An entry of the configuration failed, and the process exits.
    Failed,
}

/// SPDK's subsystems in the order of their initialisation, each with the subsystems that it depends
/// on. Subsystems that this program does not have show an empty configuration.
pub(crate) const SUBSYSTEMS: [(&str, &[&str]); 12] = [
    ("scheduler", &[]),
    ("sock", &[]),
    ("iobuf", &[]),
    ("keyring", &[]),
    ("vmd", &[]),
    ("fsdev", &[]),
    ("accel", &["iobuf"]),
    ("bdev", &["accel", "vmd", "sock", "iobuf", "keyring"]),
    ("vhost_blk", &["bdev"]),
    ("scsi", &["bdev"]),
    ("nbd", &["bdev"]),
    ("vhost_scsi", &["scsi"]),
];

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("spdk_get_version", Phases::Both, |_, params| {
        params.none("spdk_get_version method requires no parameters")?;
        Ok(version())
    });
    methods.add_plain("spdk_kill_instance", Phases::Runtime, kill_instance);
    methods.add("framework_start_init", Phases::Startup, start_init);
    methods.add("framework_wait_init", Phases::Both, wait_init);
    methods.add_plain("framework_get_subsystems", Phases::Runtime, |_, params| {
        params.none("'framework_get_subsystems' requires no arguments")?;
        let show =
            |(name, needs): &(&str, &[&str])| json!({"subsystem": name, "depends_on": needs});
        Ok(SUBSYSTEMS.iter().map(show).collect())
    });
    methods.add_plain("framework_enable_cpumask_locks", Phases::Both, enable_locks);
    methods.add_plain("framework_disable_cpumask_locks", Phases::Both, |app, params| {
        params.none("framework_disable_cpumask_locksrequires no arguments")?;
        drop(app.core_locks.take());
        Ok(true.into())
    });
    methods.add("framework_get_config", Phases::Runtime, get_config);
}

fn version() -> Value {
    let numbers = SPDK_VERSION.trim_start_matches('v');
    let (numbers, suffix) = numbers.split_once('-').unwrap_or((numbers, ""));
    let mut numbers = numbers.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let suffix = if suffix.is_empty() { String::new() } else { format!("-{suffix}") };
    let mut next = || numbers.next().unwrap_or(0);
    json!({
        "version": VERSION,
        "fields": {
            "major": next(),
            "minor": next(),
            "patch": next(),
            "suffix": suffix,
        }
    })
}

fn kill_instance(_: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Kill {
        sig_name: Signal,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "UPPERCASE")]
    enum Signal {
        SigInt,
        SigTerm,
        SigQuit,
        SigHup,
        SigKill,
        SigUsr1,
    }
    let kill: Kill = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    process::raise(match kill.sig_name {
        Signal::SigInt => libc::SIGINT,
        Signal::SigTerm => libc::SIGTERM,
        Signal::SigQuit => libc::SIGQUIT,
        Signal::SigHup => libc::SIGHUP,
        Signal::SigKill => libc::SIGKILL,
        Signal::SigUsr1 => libc::SIGUSR1,
    });
    Ok(true.into())
}

async fn start_init(app: Rc<App>, params: Params) -> Answer {
    params.none("framework_start_init requires no parameters")?;
    app.startup.send_if_modified(|startup| {
        let first = *startup == Startup::Waiting;
        if first {
            *startup = Startup::Requested;
        }
        first
    });
    params.let_next_start();
    until_running(&app).await
}

async fn wait_init(app: Rc<App>, params: Params) -> Answer {
    params.let_next_start();
    until_running(&app).await
}

async fn until_running(app: &App) -> Answer {
    let mut startup = app.startup.subscribe();
    let ended = startup.wait_for(|s| matches!(s, Startup::Running | Startup::Failed)).await;
    match ended.map(|startup| *startup) {
        Ok(Startup::Running) => Ok(true.into()),
        _ => Err(RpcError::internal("framework_initialization failed")),
    }
}

/// Locks all cores; on an error, none. The texts are SPDK's.
fn enable_locks(app: &App, params: &Params) -> Answer {
    params.none("framework_enable_cpumask_locksrequires no arguments")?;
    if app.core_locks.borrow().is_empty() {
        let reactors = app.control.target().reactors();
        let cores: Vec<usize> = reactors.iter().map(|reactor| reactor.core.0).collect();
        let locks = CoreLocks::take(&cores).map_err(|e| {
            error!("framework_enable_cpumask_locks: {e}");
            RpcError::internal(format!("Failed to claim CPU core: {}", e.core()))
        })?;
        *app.core_locks.borrow_mut() = locks;
    }
    Ok(true.into())
}

async fn get_config(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "`with_batches` has no effect: a configuration has no batches")]
    struct Request {
        name: String,
        with_batches: Option<bool>,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_ARGUMENTS)?;
    let options = || app.options.borrow();
    let entries = match request.name.as_str() {
        "bdev" => bdev::config(&app, &mut params.pace()).await,
        "vhost_blk" => vhost::config(&app, &mut params.pace(), vhost_blk::config).await,
        "vhost_scsi" => vhost::config(&app, &mut params.pace(), vhost_scsi::config).await,
        "nbd" => app.exports.config(),
        "scheduler" => options().scheduler.config(),
        // In SPDK, this subsystem saves nothing, which is not the same as an empty list.
        "scsi" => return Ok(Value::Null),
        name if SUBSYSTEMS.iter().any(|(known, _)| *known == name) => options().kept.config(name),
        name => {
            return Err(RpcError::invalid_params(format!("Subsystem '{name}' not found")));
        }
    };
    Ok(entries.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_spdk_that_it_replaces() {
        let version = version();
        assert_eq!(version["fields"]["major"], 26);
        assert_eq!(version["fields"]["minor"], 9);
        assert_eq!(version["fields"]["patch"], 0);
        assert_eq!(version["fields"]["suffix"], "-pre");
    }

    #[test]
    fn subsystems_come_after_their_dependencies() {
        for (n, (name, needs)) in SUBSYSTEMS.iter().enumerate() {
            for need in *needs {
                assert!(SUBSYSTEMS[..n].iter().any(|(earlier, _)| earlier == need), "{name}");
            }
        }
    }
}
