//! Locks on cores, so that two targets do not poll on one: SPDK's files, which SPDK honours too.
#![expect(unsafe_code, reason = "record locks exist in libc only")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where SPDK keeps them.
pub(crate) const DIR: &str = "/var/tmp";

/// Locked cores. Dropping it removes the files; the end of the process releases the locks.
#[derive(Debug, Default)]
pub(crate) struct CoreLocks(Vec<(PathBuf, File)>);

impl CoreLocks {
    /// Locks `cores`, all or none.
    ///
    /// # Errors
    /// The text names the core, and who holds it.
    pub(crate) fn take(cores: &[usize]) -> Result<Self, String> {
        Self::take_in(Path::new(DIR), cores)
    }

    fn take_in(dir: &Path, cores: &[usize]) -> Result<Self, String> {
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

fn lock(path: &Path, core: usize) -> Result<File, String> {
    let failed =
        |e: io::Error| format!("cannot create lock {} on core {core}: {e}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    // SAFETY: all zeroes is a lock of the whole file from its start.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the kernel reads one flock.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const range) };
    if result != 0 {
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(failed(error));
        }
        let mut pid = [0; 4];
        let holder = match file.read_exact(&mut pid) {
            Ok(()) => format!("process {}", i32::from_ne_bytes(pid)),
            Err(_) => "another process".into(),
        };
        return Err(format!(
            "Cannot create lock on core {core}, probably {holder} has claimed it."
        ));
    }
    file.set_len(4).map_err(failed)?;
    file.write_all(&std::process::id().to_ne_bytes()).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_the_process_id_and_go_with_the_locks() {
        let dir = tempfile::tempdir().unwrap();
        let locks = CoreLocks::take_in(dir.path(), &[1, 12]).unwrap();
        let path = dir.path().join("spdk_cpu_lock_012");
        assert_eq!(fs::read(&path).unwrap(), std::process::id().to_ne_bytes());
        drop(locks);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // A stale one is taken over.
        fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
        let locks = CoreLocks::take_in(dir.path(), &[12]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), std::process::id().to_ne_bytes());
        drop(locks);
    }

    #[test]
    fn an_error_names_the_file_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("spdk_cpu_lock_002")).unwrap();
        let error = CoreLocks::take_in(dir.path(), &[1, 2]).unwrap_err();
        assert!(error.contains("spdk_cpu_lock_002") && error.contains("core 2"), "{error}");
        assert!(!dir.path().join("spdk_cpu_lock_001").exists());
    }
}
