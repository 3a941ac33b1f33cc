//! The thread of each disk that keeps it connected to its server.
//!
//! When the server closes the connection or writes an invalid entry into a used ring, the thread
//! tries to connect again until it succeeds. I/O waits meanwhile. The requests in flight are sent
//! again to the new server.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
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

/// The interval at which the thread checks whether a ring is broken, and of attempts to connect.
const INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Keeps a disk connected until it is dropped.
#[derive(Debug)]
pub(crate) struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: String,
    socket: PathBuf,
    layout: Layout,
    queues: Arc<[Arc<Queue>]>,
    /// The properties of the disk when it was created. A server whose disk has others is refused.
    properties: Properties,
    durability: Arc<Durability>,
    connected: AtomicBool,
    /// The disk is deleted: all I/O fails.
    ending: AtomicBool,
    /// Rings of a deleted disk, for the thread to drop: unmapping takes time.
    garbage: Mutex<Vec<Ring>>,
    /// Wakes the thread.
    wake: OwnedFd,
}

impl Connection {
    /// Starts the rings of a connected server, and the thread. May block for some tens of seconds.
    pub(crate) fn start(
        name: &str,
        socket: PathBuf,
        session: Session,
        layout: Layout,
        queues: Arc<[Arc<Queue>]>,
        durability: Arc<Durability>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            socket,
            layout,
            queues,
            properties: session.properties,
            durability,
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
        let calls: Vec<_> = self.queues.iter().map(|queue| queue.call_fd()).collect();
        let rings = session.start(self.layout, &calls)?;
        self.durability.server_lost();
        self.connected.store(true, Ordering::Relaxed);
        for (queue, ring) in self.queues.iter().zip(rings) {
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
        self.queues.iter().filter_map(|queue| queue.disconnect(offline)).collect()
    }

    /// The thread's main function.
    fn keep_connected(&self, session: Session) {
        let mut session = Some(session);
        let mut reported = false;
        while !self.is_ending() {
            if let Some(present) = &session {
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
                    (session, reported) = (Some(again), false);
                }
                Err(e) => {
                    if !std::mem::replace(&mut reported, true) {
                        error!(
                            "bdev {}: cannot connect to the vhost-user server: {e}; trying again \
                             every second",
                            self.name
                        );
                    }
                    self.pause(&[]);
                }
            }
        }
        if let Some(session) = &session {
            let _ = session.socket.shutdown(Shutdown::Both);
        }
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Waits until the server goes away or the disk is deleted, for an interval at most. Returns
    /// why the connection is over, if it is.
    fn watch(&self, session: &Session) -> Option<&'static str> {
        let [gone] = self.pause(&[&session.socket])[..] else { return None };
        if gone {
            return Some("the server has closed the connection");
        }
        let broken = self.queues.iter().any(|queue| queue.is_broken());
        broken.then_some("the server has written an invalid index or id into a used ring")
    }

    /// Waits for an interval, for the end of the disk, or for these sockets. Returns which of the
    /// sockets have ended.
    fn pause(&self, sockets: &[&dyn AsFd]) -> Vec<bool> {
        let mut fds: Vec<_> = sockets
            .iter()
            .map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP))
            .collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        // After an error (a signal), the caller checks everything again.
        let _ = poll(&mut fds, Some(&INTERVAL));
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        fds[..sockets.len()].iter().map(|fd| fd.revents().intersects(ended)).collect()
    }

    fn reconnect(&self) -> Result<Session, Error> {
        let session = Session::connect(&self.socket)?;
        let enough = usize::from(session.queues) >= self.queues.len();
        if session.properties != self.properties || !enough {
            let (before, now) = (self.properties, session.properties);
            return Err(Error::Invalid(format!(
                "the server's disk or features have changed, or it has too few queues: expected \
                 {before:?}, found {now:?} and {} queues",
                session.queues
            )));
        }
        let what = self.socket.display().to_string();
        self.adopt(&session).map_err(|source| Error::System { what, source })?;
        Ok(session)
    }
}

/// The longest time that an RPC waits for a connection.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
