//! Which clients of a cluster were processes of this host that have ended.
//!
//! A client that was killed keeps the exclusive lock of an image: another client gets it only after
//! 30 s, unless it breaks the lock, which is safe only if the owner is known to be dead. So each
//! connected client of this program keeps a file whose name has the client's address, and a lock on
//! the file, which the kernel releases when the process ends.

use std::fs::{self, DirEntry, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, OFlags, flock};
use tracing::warn;

/// The directory of the files, which survive a restart of the program.
pub const DIR: &str = "/var/tmp";

const PREFIX: &str = "vhost_rbd_";

/// The suffix of a file's name after its process was found dead.
const DEAD: &str = ".dead";

/// How long the file of a dead client is kept. The cluster takes the lock from it after 30 s.
const KEPT: Duration = Duration::from_secs(3600);

/// The file of a client of this process. Dropping it removes the file.
#[derive(Debug)]
pub(crate) struct Own {
    path: PathBuf,
    locked: File,
}

impl Own {
    /// Makes the file. `None` if that fails: a restart after a crash then takes longer.
    pub(crate) fn announce(fsid: &str, address: &str) -> Option<Self> {
        Self::announce_in(Path::new(DIR), fsid, address)
    }

    fn announce_in(dir: &Path, fsid: &str, address: &str) -> Option<Self> {
        sweep(dir);
        let name = name_of(fsid, address);
        let path = dir.join(&name);
        // Locked before it has its name, so that nobody finds it unlocked.
        let new = dir.join(format!(".new_{name}"));
        let made = options().create_new(true).mode(0o600).open(&new).and_then(|file| {
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            fs::rename(&new, &path)?;
            Ok(file)
        });
        match made {
            Ok(locked) => Some(Self { path, locked }),
            Err(e) => {
                let _ = fs::remove_file(&new);
                warn!(
                    "cannot create {}: {e}; after a crash, the next process will wait for 30 s for \
                     the locks of Ceph images",
                    path.display()
                );
                None
            }
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // The sandbox forbids some threads to remove files. The sweep removes a file with this
        // text.
        if fs::remove_file(&self.path).is_err() {
            let _ = rustix::io::write(&self.locked, ENDED);
        }
    }
}

/// The contents of the file of a client that has ended in an orderly way.
const ENDED: &[u8] = b"ended";

/// Returns whether the client with this address was a process of this program, and of this user, on
/// this host, and has ended.
pub(crate) fn is_dead(fsid: &str, address: &str) -> bool {
    is_dead_in(Path::new(DIR), fsid, address)
}

fn is_dead_in(dir: &Path, fsid: &str, address: &str) -> bool {
    let name = name_of(fsid, address);
    // Another process may rename it between two of these checks.
    let (marked, plain) = (dir.join(format!("{name}{DEAD}")), dir.join(name));
    is_free(&marked) || is_free(&plain) || is_free(&marked)
}

/// Returns whether a file exists, belongs to this user, and is locked by no process.
fn is_free(path: &Path) -> bool {
    let Ok(file) = options().open(path) else { return false };
    // Other users may create files here. They must not make this process break the lock of a client
    // that is alive.
    let ours = file
        .metadata()
        .is_ok_and(|found| found.is_file() && found.uid() == rustix::process::geteuid().as_raw());
    ours && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).custom_flags(flags.bits().cast_signed());
    options
}

/// Marks the files of dead clients. Removes those that were marked long ago, and the files of
/// clients that have ended in an orderly way.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    entries.flatten().for_each(|entry| sweep_one(&entry));
}

fn sweep_one(entry: &DirEntry) {
    let (name, path) = (entry.file_name(), entry.path());
    let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { return };
    if !is_free(&path) {
        return;
    }
    // Failures are ignored: the next client of this host tries again.
    let has_ended = fs::metadata(&path).is_ok_and(|found| found.len() > 0);
    if !name.ends_with(DEAD) && !has_ended {
        let _ = fs::rename(&path, path.with_file_name(format!("{name}{DEAD}")));
    } else if has_ended || age(&path).is_some_and(|age| age > KEPT) {
        let _ = fs::remove_file(&path);
    }
}

/// The time since the file was renamed.
fn age(path: &Path) -> Option<Duration> {
    let changed = u64::try_from(fs::metadata(path).ok()?.ctime()).ok()?;
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(changed)).ok()
}

/// The name of a client's file. All but letters, digits, dots and hyphens become underscores.
fn name_of(fsid: &str, address: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    let address: String = address.chars().map(plain).collect();
    let fsid: String = fsid.chars().map(plain).collect();
    format!("{PREFIX}{fsid}_{address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_dead_when_its_process_has_ended() {
        let dir = tempfile::TempDir::new().unwrap();
        let dead = |address| is_dead_in(dir.path(), "f", address);
        let address = "127.0.0.1:0/29155389";
        assert!(!dead(address), "of another host");
        let own = Own::announce_in(dir.path(), "f", address).unwrap();
        assert!(!dead(address));
        // The end of a process closes the file and leaves it.
        let path = own.path.clone();
        let kept = std::mem::ManuallyDrop::new(own);
        flock(&kept.locked, FlockOperation::Unlock).unwrap();
        assert!(dead(address));
        assert!(!is_dead_in(dir.path(), "other", address));
        // The next process marks it, and still knows it.
        let next = Own::announce_in(dir.path(), "f", "127.0.0.1:0/1").unwrap();
        assert!(!path.exists());
        assert!(dead(address) && !dead("127.0.0.1:0/1"));
        drop(next);
        assert!(!dead("127.0.0.1:0/1"), "its disks were closed");
    }

    #[test]
    fn an_orderly_end_leaves_nothing_behind_for_long() {
        let dir = tempfile::TempDir::new().unwrap();
        let files = || fs::read_dir(dir.path()).unwrap().count();
        drop(Own::announce_in(dir.path(), "f", "a").unwrap());
        assert_eq!(files(), 0);
        let mut own = Own::announce_in(dir.path(), "f", "a").unwrap();
        // As if the file could not be removed.
        let path = std::mem::replace(&mut own.path, dir.path().join("other"));
        drop(own);
        assert!(path.exists());
        sweep(dir.path());
        assert_eq!(files(), 0);
    }

    #[test]
    fn a_file_that_is_no_regular_file_says_nothing() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join(name_of("f", "a"));
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(!is_dead_in(dir.path(), "f", "a"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(!is_dead_in(dir.path(), "f", "a"));
    }
}
