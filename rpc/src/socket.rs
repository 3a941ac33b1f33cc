//! The socket's file and the lock file beside it: who may listen, and who cleans up.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::stream::Listener;

/// Bytes that fit into `sun_path` before its terminating NUL.
const PATH_MAX: usize = 107;

/// Why a server could not listen.
#[derive(Debug, Error)]
pub enum BindError {
    /// The path does not fit into a socket address.
    #[error("RPC socket path {path} is {length} bytes long; at most {PATH_MAX} fit")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Another process holds the lock.
    #[error("RPC socket path {0} is in use by another process; specify another")]
    InUse(PathBuf),
    /// The lock file could not be opened or locked.
    #[error("cannot lock {0}: {1}")]
    Lock(PathBuf, #[source] io::Error),
    /// The socket could not be created.
    #[error("cannot listen on {0}: {1}")]
    Listen(PathBuf, #[source] io::Error),
}

/// A socket this process listens on; dropping it removes the socket and its lock file.
pub(crate) struct SocketFile {
    path: PathBuf,
    _lock: Lock,
}

impl SocketFile {
    /// Locks `<path>.lock`, removes what an earlier process left at `path`, and listens.
    pub(crate) fn listen(path: &Path) -> Result<(Self, Listener), BindError> {
        let length = path.as_os_str().len();
        if length > PATH_MAX {
            return Err(BindError::PathTooLong { path: path.into(), length });
        }
        let lock = Lock::take(path)?;
        // Whoever made it is gone, since we hold the lock. What cannot be removed fails in bind.
        let _ = fs::remove_file(path);
        let listener =
            Listener::bind(path).map_err(|error| BindError::Listen(path.into(), error))?;
        Ok((Self { path: path.into(), _lock: lock }, listener))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The lock's own drop removes its file after this, so nobody can bind in between.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// An exclusive lock on a file of its own, which is removed when the lock is dropped.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, BindError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |error| BindError::Lock(path.clone(), error);
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(BindError::InUse(socket.into())),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // The holder before us may have removed the file after we opened it; then our lock
            // is on a file that nobody else will find.
            let ours = file.metadata().map_err(failed)?;
            match fs::metadata(&path) {
                Ok(now) if (now.dev(), now.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Self { path, _file: file });
                }
                _ => continue,
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still locked: the file closes, and so unlocks, after this.
        let _ = fs::remove_file(&self.path);
    }
}
