//! The socket's file, and the lock file that makes its owner exclusive.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::stream::Listener;

/// Limit on the bytes of a path: the size of `sun_path` without the terminating NUL.
const PATH_MAX: usize = 107;

/// Why a server cannot listen.
#[derive(Debug, Error)]
pub enum BindError {
    /// The path does not fit into a socket address.
    #[error("RPC socket path {path} is {length} bytes long; the limit is {PATH_MAX}")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Another process holds the lock.
    #[error("RPC socket path {0} is in use by another process; specify another path with -r")]
    InUse(PathBuf),
    /// The lock file cannot be opened or locked.
    #[error("cannot lock {0} for the RPC socket: {1}")]
    Lock(PathBuf, #[source] io::Error),
    /// The socket cannot be created.
    #[error("cannot listen on RPC socket {0}: {1}")]
    Listen(PathBuf, #[source] io::Error),
    /// The caller refused the file. The socket is removed.
    #[error("RPC socket {0}: {1}")]
    File(PathBuf, #[source] io::Error),
}

/// The file of a listening socket. Dropping it removes the socket and its lock file. A file that
/// another process has put at the socket's path stays.
pub(crate) struct SocketFile {
    path: PathBuf,
    /// `None` if there was none after `bind`.
    file: Option<FileId>,
    _lock: Lock,
}

/// A file's device and inode. The inode is not used again while the socket is open.
type FileId = (u64, u64);

impl SocketFile {
    /// Locks `<path>.lock`, removes the socket of an earlier process at `path`, binds a new one,
    /// calls `on_bound`, and listens.
    pub(crate) fn listen(
        path: &Path,
        on_bound: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<(Self, Listener), BindError> {
        let length = path.as_os_str().len();
        if length > PATH_MAX {
            return Err(BindError::PathTooLong { path: path.into(), length });
        }
        let lock = Lock::take(path)?;
        // This process holds the lock, so the owner of an existing socket has exited. If the file
        // cannot be removed, `bind` reports an error.
        let _ = fs::remove_file(path);
        let failed = |error| BindError::Listen(path.into(), error);
        let bound = Listener::bind(path).map_err(failed)?;
        // Removes the file on an error.
        let file = Self { path: path.into(), file: file_id(path), _lock: lock };
        on_bound(path).map_err(|error| BindError::File(path.into(), error))?;
        Ok((file, Listener::listen(bound).map_err(failed)?))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The lock keeps other servers from the path, but not other programs. Linux has no call
        // that removes a name only if it belongs to a given file. So a file that another program
        // puts here between this check and the removal, or between `bind` and the first `file_id`,
        // is removed.
        if self.file.is_none() || file_id(&self.path) != self.file {
            tracing::debug!(
                "{} is not the socket of this process; not removed",
                self.path.display()
            );
        } else if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The file at `path`. A link is not followed.
fn file_id(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// An exclusive lock on a lock file. Dropping it removes the file.
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
            // The previous owner may have removed the file after this process opened it. Then the
            // lock excludes nobody, because other processes create a new file.
            let locked = file.metadata().map_err(failed)?;
            match fs::metadata(&path) {
                Ok(now) if (now.dev(), now.ino()) == (locked.dev(), locked.ino()) => {
                    return Ok(Self { path, _file: file });
                }
                _ => continue,
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The file is removed while it is locked; closing it afterwards releases the lock.
        let _ = fs::remove_file(&self.path);
    }
}
