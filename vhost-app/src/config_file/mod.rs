//! The configuration file of `-c`: SPDK's JSON, whose entries are RPC calls, made in two passes.
//!
//! The file is an object with `subsystems`, a list of `{"subsystem": …, "config": […]}`, whose
//! entries are calls `{"method": …, "params": …}` or lists of those. C comments are allowed. The
//! first pass makes the calls that are allowed before the subsystems are initialised, the second
//! pass makes the other calls. Both keep the file's order and make one call at a time.
//!
//! Each unknown method of one of SPDK's subsystems is an error, because a guest would miss a device.
//! Options of components that this program does not have are known methods, which keep them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rpc::{Phase, Phases, Registry, RpcError};
use serde_json::Value;
use tracing::{error, info, warn};

use crate::methods::SUBSYSTEMS;

mod syntax;

use syntax::{SyntaxError, parse};

/// Interval of log lines about a call that has not returned.
const SLOW: Duration = Duration::from_secs(10);

/// Why the configuration was not loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// The file is not a configuration.
    #[error("invalid configuration {0}: {1}")]
    Syntax(PathBuf, #[source] SyntaxError),
    /// A call failed.
    #[error("configuration: {0} failed: {1}")]
    Call(Place, #[source] RpcError),
    /// No method has this name.
    #[error(
        "configuration: {0}: no such method; remove the entry or use --json-ignore-init-errors"
    )]
    Unknown(Place),
}

impl Error {
    /// SPDK's exit code for it.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Read(..) => 1,
            Self::Syntax(..) | Self::Call(..) => errno_exit_code(libc::EINVAL),
            Self::Unknown(_) => errno_exit_code(libc::ENOENT),
        }
    }
}

/// The exit code of an SPDK application that ends with `-errno`.
pub(crate) fn errno_exit_code(errno: i32) -> u8 {
    // The kernel keeps the low byte of a status.
    let [low, ..] = errno.wrapping_neg().to_le_bytes();
    low
}

/// A call's place in the file, for log lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) subsystem: String,
    /// The first entry is 1.
    pub(crate) entry: usize,
    pub(crate) method: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subsystem, entry, method } = self;
        write!(f, "{method} (subsystem {subsystem}, entry {entry})")
    }
}

/// A call of the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) place: Place,
    pub(crate) params: Option<Value>,
}

/// A parsed configuration.
#[derive(Debug, PartialEq)]
pub(crate) struct ConfigFile {
    pub(crate) calls: Vec<Call>,
    /// Continue after calls that fail or are unknown.
    ignore_errors: bool,
}

impl ConfigFile {
    /// Reads a file. Blocks without a limit if the file is a pipe whose writer does not close it.
    ///
    /// # Errors
    /// [`Error::Read`] or [`Error::Syntax`].
    pub(crate) fn read(path: &Path, ignore_errors: bool) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(|e| Error::Read(path.into(), e))?;
        let text = String::from_utf8(bytes).map_err(SyntaxError::from);
        let calls = text.and_then(|text| parse(&text));
        Ok(Self { calls: calls.map_err(|e| Error::Syntax(path.into(), e))?, ignore_errors })
    }

    /// Makes the calls of one phase: in [`Phase::Startup`] those that are allowed before
    /// initialisation, in [`Phase::Runtime`] those that are allowed only after it.
    ///
    /// # Errors
    /// [`Error::Call`] or [`Error::Unknown`] for the first call that fails, unless errors are
    /// ignored. The effects of earlier calls remain.
    pub(crate) async fn replay(&self, registry: &Rc<Registry>, phase: Phase) -> Result<(), Error> {
        let first = phase == Phase::Startup;
        for call in &self.calls {
            let result = match registry.phases(&call.place.method) {
                Some(Phases::Startup | Phases::Both) if first => run(registry, call, phase).await,
                Some(Phases::Runtime) if !first => run(registry, call, phase).await,
                None if first => unknown(&call.place),
                _ => Ok(()),
            };
            match result {
                Err(e) if self.ignore_errors => warn!("{e}; continuing"),
                result => result?,
            }
            // Other tasks of the thread (front ends, signals) run between two calls.
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}

async fn run(registry: &Rc<Registry>, call: &Call, phase: Phase) -> Result<(), Error> {
    let answer = registry.call(&call.place.method, call.params.clone(), phase);
    tokio::pin!(answer);
    loop {
        tokio::select! {
            result = &mut answer => {
                return result.map(drop).map_err(|e| Error::Call(call.place.clone(), e));
            }
            () = tokio::time::sleep(SLOW) => {
                warn!("configuration: still waiting for {} to complete", call.place);
            }
        }
    }
}

fn unknown(place: &Place) -> Result<(), Error> {
    if SUBSYSTEMS.iter().any(|(name, _)| *name == place.subsystem) {
        return Err(Error::Unknown(place.clone()));
    }
    info!("configuration: ignoring {place}, because there is no such subsystem");
    Ok(())
}

/// Logs why the configuration was not loaded and returns the exit code.
pub(crate) fn report(e: &Error) -> u8 {
    error!("{e}");
    e.exit_code()
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn exit_codes_are_spdks() {
        let place = Place { subsystem: "b".into(), entry: 1, method: "m".into() };
        assert_eq!(Error::Call(place.clone(), RpcError::errno(17)).exit_code(), 234);
        assert_eq!(Error::Unknown(place).exit_code(), 254);
        let syntax = Error::Syntax("f".into(), SyntaxError::NoObject);
        assert_eq!(syntax.exit_code(), 234);
        assert_eq!(Error::Read("f".into(), io::ErrorKind::NotFound.into()).exit_code(), 1);
    }

    #[test]
    fn unknown_methods_of_known_subsystems_are_errors() {
        let place = |subsystem: &str, method: &str| Place {
            subsystem: subsystem.into(),
            entry: 1,
            method: method.into(),
        };
        assert!(unknown(&place("bdev", "bdev_nvme_start_discovery")).is_err());
        assert!(unknown(&place("vhost_scsi", "vhost_scsi_controller_add_lun")).is_err());
        assert!(unknown(&place("nvmf", "nvmf_create_subsystem")).is_ok());
    }
}
