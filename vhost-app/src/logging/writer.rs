//! Writes log lines on a thread of its own: whoever logs never waits for a terminal, a pipe that
//! nobody reads, or syslog. Some log while they hold a lock, or on the thread that serves every VM.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Lines that wait to be written; what comes while there are so many is counted and lost.
const LINES_MAX: usize = 4096;

/// How long [`Writer::flush`] waits for a reader that does not read.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Something to be written.
pub(super) enum Entry {
    /// A line for stderr.
    Print(String),
    /// A line for syslog, with its priority.
    Syslog(libc::c_int, String),
    /// Everything before it has been written.
    Flushed(SyncSender<()>),
}

/// The way to the thread.
pub(super) struct Writer {
    entries: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread; `syslog` writes a line there.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub(super) fn start(syslog: fn(libc::c_int, &str)) -> io::Result<Self> {
        let (entries, receiver) = sync_channel(LINES_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let losses = Arc::clone(&lost);
        thread::Builder::new()
            .name("vhost-log".into())
            .spawn(move || write(&receiver, &losses, syslog))?;
        Ok(Self { entries, lost })
    }

    /// Hands an entry over, or counts it as lost.
    pub(super) fn send(&self, entry: Entry) {
        if self.entries.try_send(entry).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits, for a bounded time, until what was logged so far is written.
    pub(super) fn flush(&self) {
        let (done, flushed) = sync_channel(1);
        let deadline = Instant::now() + FLUSH_LIMIT;
        let mut entry = Entry::Flushed(done);
        while Instant::now() < deadline {
            match self.entries.try_send(entry) {
                Ok(()) => {
                    let _ = flushed.recv_timeout(deadline - Instant::now());
                    return;
                }
                Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(again)) => entry = again,
            }
            thread::yield_now();
        }
    }
}

fn write(entries: &Receiver<Entry>, lost: &AtomicU64, syslog: fn(libc::c_int, &str)) {
    for entry in entries {
        match entry {
            Entry::Print(line) => {
                // There is nobody to tell.
                let _ = io::stderr().write_all(line.as_bytes());
            }
            Entry::Syslog(priority, line) => syslog(priority, &line),
            Entry::Flushed(done) => {
                let _ = done.try_send(());
            }
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ =
                writeln!(io::stderr(), "{lost} log lines were lost: nobody reads this fast enough");
        }
    }
}
