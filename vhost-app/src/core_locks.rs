//! Lock files for cores, so that no two targets poll on one core. They are SPDK's, so they exclude
//! SPDK's targets, too.
#![expect(unsafe_code, reason = "record locks exist in libc only")]

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The directory of SPDK's lock files.
pub(crate) const DIR: &str = "/var/tmp";

/// Why a core cannot be locked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoreLockError {
    /// The file cannot be created, locked or written.
    #[error("cannot create lock {} on core {core}: {source}", path.display())]
    File { path: PathBuf, core: usize, source: io::Error },
    /// Another process holds the lock. The text is SPDK's.
    #[error("Cannot create lock on core {core}, probably {holder} has claimed it.")]
    Claimed { core: usize, holder: Holder },
}

impl CoreLockError {
    /// The core.
    pub(crate) fn core(&self) -> usize {
        match self {
            Self::File { core, .. } | Self::Claimed { core, .. } => *core,
        }
    }
}

/// The process that holds a lock.
#[derive(Debug)]
pub(crate) enum Holder {
    Process(i32),
    /// The file contains no process id.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Unknown => f.write_str("another process"),
        }
    }
}

/// Locked cores. Dropping it removes the files; the end of the process releases the locks.
#[derive(Debug, Default)]
pub(crate) struct CoreLocks(Vec<(PathBuf, File)>);

impl CoreLocks {
    /// Whether no core is locked.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Locks all of `cores`; on an error, none.
    pub(crate) fn take(cores: &[usize]) -> Result<Self, CoreLockError> {
        Self::take_in(Path::new(DIR), cores)
    }

    fn take_in(dir: &Path, cores: &[usize]) -> Result<Self, CoreLockError> {
        let mut locks = Self::default();
        for core in cores {
            let path = dir.join(format!("spdk_cpu_lock_{core:03}"));
            let file = lock(&path, *core)?;
            locks.0.push((path, file));
        }
        Ok(locks)
    }
}

impl Drop for CoreLocks {
    fn drop(&mut self) {
        for (path, _) in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "libc's constants are 1 and 0")]
const WRITE_LOCK: libc::c_short = libc::F_WRLCK as libc::c_short;
#[expect(clippy::cast_possible_truncation, reason = "libc's constants are 1 and 0")]
const FROM_START: libc::c_short = libc::SEEK_SET as libc::c_short;

fn lock(path: &Path, core: usize) -> Result<File, CoreLockError> {
    let failed = |source| CoreLockError::File { path: path.into(), core, source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    // SAFETY: `flock` consists of integers, so zeroes are valid. They stand for the whole file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = WRITE_LOCK;
    range.l_whence = FROM_START;
    // SAFETY: the kernel reads one flock.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const range) };
    if result != 0 {
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(failed(error));
        }
        let mut pid = [0; 4];
        let holder = match file.read_exact(&mut pid) {
            Ok(()) => Holder::Process(i32::from_ne_bytes(pid)),
            Err(_) => Holder::Unknown,
        };
        return Err(CoreLockError::Claimed { core, holder });
    }
    file.set_len(4).map_err(failed)?;
    file.write_all(&std::process::id().to_ne_bytes()).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_the_process_id_and_are_removed_with_the_locks() {
        let dir = tempfile::tempdir().unwrap();
        let locks = CoreLocks::take_in(dir.path(), &[1, 12]).unwrap();
        let path = dir.path().join("spdk_cpu_lock_012");
        assert_eq!(fs::read(&path).unwrap(), std::process::id().to_ne_bytes());
        drop(locks);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // A stale file is reused.
        fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
        let locks = CoreLocks::take_in(dir.path(), &[12]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), std::process::id().to_ne_bytes());
        drop(locks);
    }

    #[test]
    fn an_error_names_the_file_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("spdk_cpu_lock_002")).unwrap();
        let error = CoreLocks::take_in(dir.path(), &[1, 2]).unwrap_err().to_string();
        assert!(error.contains("spdk_cpu_lock_002") && error.contains("core 2"), "{error}");
        assert!(!dir.path().join("spdk_cpu_lock_001").exists());
    }
}
