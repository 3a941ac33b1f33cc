//! Whether stderr is the journal of systemd, to which lines of syslog go too.

use std::io;

use rustix::fs::fstat;

/// Whether stderr is the stream to the journal that the service manager names.
pub(super) fn is_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
