//! The log thread, which writes log lines. A thread that logs never waits for a terminal, a full
//! pipe, or syslog: it may hold a lock, or be the event thread, which serves all VMs.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Limit on lines that wait to be written. Further lines are counted and dropped.
const LINES_MAX: usize = 4096;

/// Limit on the wait of [`Writer::flush`].
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A message to the log thread.
pub(super) enum Entry {
    /// A line for stderr.
    Print(String),
    /// A line for syslog, with its priority.
    Syslog(libc::c_int, String),
    /// Asks for an answer after all earlier entries are written.
    Flushed(SyncSender<()>),
}

/// The queue to the log thread.
pub(super) struct Writer {
    entries: SyncSender<Entry>,
    /// Entries that did not fit into the queue since the last line that reports them.
    dropped: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread; `syslog` writes a line to syslog.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(syslog: fn(libc::c_int, &str)) -> io::Result<Self> {
        let (entries, receiver) = sync_channel(LINES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        thread::Builder::new()
            .name("vhost-log".into())
            .spawn(move || write(&receiver, &counter, syslog))?;
        Ok(Self { entries, dropped })
    }

    /// Queues an entry. If the queue is full, counts the entry as dropped.
    pub(super) fn send(&self, entry: Entry) {
        if self.entries.try_send(entry).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits, for a bounded time, until all earlier entries are written.
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

fn write(entries: &Receiver<Entry>, dropped: &AtomicU64, syslog: fn(libc::c_int, &str)) {
    for entry in entries {
        match entry {
            Entry::Print(line) => {
                // An error cannot be reported anywhere.
                let _ = io::stderr().write_all(line.as_bytes());
            }
            Entry::Syslog(priority, line) => syslog(priority, &line),
            Entry::Flushed(done) => {
                let _ = done.try_send(());
            }
        }
        let dropped = dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let _ = writeln!(
                io::stderr(),
                "{dropped} log lines were dropped, because stderr or syslog is too slow"
            );
        }
    }
}
