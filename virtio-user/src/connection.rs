//! The thread of each disk that keeps it connected to its server.
//!
//! When the server closes the connection or writes an invalid entry into a used ring, the thread
//! tries to connect again until it succeeds. I/O waits meanwhile. The requests in flight are sent
//! again to the new server.

use std::cmp;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bdev::{Durability, Error, SharedQueue};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tracing::{error, info, warn};

use crate::memory::Layout;
use crate::queue::{Offline, Queue};
use crate::ring::Ring;
use crate::session::{Properties, Session};
use crate::size::Size;

/// The interval at which the thread checks whether a ring is broken, of attempts to connect, and
/// between messages of a server.
const INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Keeps a disk connected until it is dropped.
#[derive(Debug)]
pub(crate) struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: String,
    socket: PathBuf,
    layout: Layout,
    disk: Served,
    /// The properties of the disk when it was created. A server whose disk has others is refused,
    /// unless its disk has only grown.
    properties: Properties,
    connected: AtomicBool,
    /// The disk is deleted: all I/O fails.
    ending: AtomicBool,
    /// Rings of a deleted disk, for the thread to drop: unmapping takes time.
    garbage: Mutex<Vec<Ring>>,
    /// Wakes the thread.
    wake: OwnedFd,
}

/// What a connection serves.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) size: Arc<Size>,
    pub(crate) queues: Arc<[Arc<Queue>]>,
    pub(crate) durability: Arc<Durability>,
}

impl Connection {
    /// Starts the rings of a connected server, and the thread. May block for some tens of seconds.
    pub(crate) fn start(
        name: &str,
        socket: PathBuf,
        session: Session,
        layout: Layout,
        disk: Served,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            socket,
            layout,
            disk,
            properties: session.properties,
            garbage: Mutex::default(),
            connected: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        shared.adopt(&session)?;
        let connection = Self(Arc::clone(&shared));
        thread::Builder::new()
            .name("vhost-virtio".into())
            .spawn(move || shared.keep_connected(session))?;
        Ok(connection)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.0.socket
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.0.connected.load(Ordering::Relaxed)
    }

    /// Ends the connection, and fails all I/O.
    pub(crate) fn end(&self) {
        self.0.ending.store(true, Ordering::Release);
        let rings = self.0.disconnect(Offline::Fail);
        self.0.garbage.lock().unwrap_or_else(PoisonError::into_inner).extend(rings);
        self.0.disk.size.end();
        // Fails only if the counter is full, after 2^64 calls.
        let _ = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Starts the rings of a server, and lets the queues use them.
    fn adopt(&self, session: &Session) -> io::Result<()> {
        let calls: Vec<_> = self.disk.queues.iter().map(|queue| queue.call_fd()).collect();
        let rings = session.start(self.layout, &calls)?;
        self.disk.durability.server_lost();
        self.connected.store(true, Ordering::Relaxed);
        for (queue, ring) in self.disk.queues.iter().zip(rings) {
            queue.connect(ring, session.properties.limits);
        }
        // A deletion during this call has disconnected the queues too early.
        if self.is_ending() {
            drop(self.disconnect(Offline::Fail));
        }
        Ok(())
    }

    /// Stops using the rings, and returns them.
    fn disconnect(&self, offline: Offline) -> Vec<Ring> {
        self.connected.store(false, Ordering::Relaxed);
        self.disk.queues.iter().filter_map(|queue| queue.disconnect(offline)).collect()
    }

    /// The thread's main function.
    fn keep_connected(&self, session: Session) {
        let mut session = Some(session);
        // Why the server could not be reached, as logged last.
        let mut reported = String::new();
        while !self.is_ending() {
            if let Some(present) = &mut session {
                if let Some(reason) = self.watch(present) {
                    warn!("bdev {}: {reason}; connecting again, I/O waits", self.name);
                    // The server must not use the memory any more.
                    let _ = present.socket.shutdown(Shutdown::Both);
                    session = None;
                    drop(self.disconnect(Offline::Wait));
                    // A deletion during this call must not be undone: I/O must fail, not wait.
                    if self.is_ending() {
                        drop(self.disconnect(Offline::Fail));
                    }
                }
                continue;
            }
            match self.reconnect() {
                Ok(again) => {
                    info!("bdev {}: connected to {} again", self.name, self.socket.display());
                    (session, reported) = (Some(again), String::new());
                }
                Err(e) => {
                    let text = e.to_string();
                    if text != reported {
                        error!(
                            "bdev {}: cannot connect to the vhost-user server: {text}; trying \
                             again every second",
                            self.name
                        );
                        reported = text;
                    }
                    self.pause(&[], INTERVAL);
                }
            }
        }
        if let Some(session) = &session {
            let _ = session.socket.shutdown(Shutdown::Both);
        }
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Waits until the server goes away or sends a message, or the disk is deleted, for an interval
    /// at most. Returns why the connection is over, if it is.
    fn watch(&self, session: &mut Session) -> Option<String> {
        let mut fds = vec![(session.socket.as_fd(), PollFlags::RDHUP)];
        if let Some(channel) = session.messages.as_ref() {
            fds.push((channel.as_fd(), PollFlags::IN));
        }
        let events = self.pause(&fds, INTERVAL);
        if events[0].intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Some("the server has closed the connection".into());
        }
        if self.disk.queues.iter().any(|queue| queue.is_broken()) {
            return Some("the server has written an invalid index or id into a used ring".into());
        }
        if events.get(1).is_some_and(|events| !events.is_empty()) {
            session.take_messages();
            if let Err(e) = session.refresh().and_then(|()| self.accept(session)) {
                return Some(e.to_string());
            }
            // A server that sends messages all the time keeps no processor busy.
            self.pause(&[], INTERVAL);
        }
        None
    }

    /// Waits for events of these fds, for the end of the disk, or for `time`. Returns the events.
    fn pause(&self, fds: &[(BorrowedFd<'_>, PollFlags)], time: Timespec) -> Vec<PollFlags> {
        let mut fds: Vec<_> =
            fds.iter().map(|(fd, events)| PollFd::from_borrowed_fd(*fd, *events)).collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        // After an error (a signal), the caller checks everything again.
        let _ = poll(&mut fds, Some(&time));
        fds[..fds.len() - 1].iter().map(PollFd::revents).collect()
    }

    /// Checks that the server's disk is still the same, and adopts its size if it has grown.
    fn accept(&self, session: &Session) -> Result<(), Error> {
        let (before, now) = (self.properties, session.properties);
        if (Properties { size: before.size, ..now }) != before {
            return Err(Error::Invalid(format!(
                "the server's disk or features have changed: expected {before:?}, found {now:?}"
            )));
        }
        bdev::checked_size(&self.name, now.size / u64::from(now.block_size), now.block_size)?;
        match self.disk.size.adopt(now.size) {
            cmp::Ordering::Greater => {
                info!("bdev {}: the server's disk has grown to {} bytes", self.name, now.size);
            }
            cmp::Ordering::Equal => {}
            cmp::Ordering::Less => error!(
                "bdev {}: the server's disk shrank to {} bytes; the bdev keeps its size, and I/O \
                 beyond the disk's end fails",
                self.name, now.size
            ),
        }
        Ok(())
    }

    fn reconnect(&self) -> Result<Session, Error> {
        let session = Session::connect(&self.socket)?;
        let (queues, size) = (self.disk.queues.len(), self.disk.size.bytes());
        if usize::from(session.queues) < queues || session.properties.size < size {
            return Err(Error::Invalid(format!(
                "expected {queues} queues and a disk of at least {size} bytes, found {} and {}",
                session.queues, session.properties.size
            )));
        }
        self.accept(&session)?;
        let what = self.socket.display().to_string();
        self.adopt(&session).map_err(|source| Error::System { what, source })?;
        Ok(session)
    }
}

/// The longest time that an RPC waits for a connection.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
