//! An export: a bdev on a Unix socket, or in `kernel` at the NBD driver.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::Bdev;
use closer::Account;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, shutdown, socket_with,
};
use tracing::{debug, warn};

use crate::connection::{Client, Problem};
use crate::held::Held;
use crate::negotiation::Chosen;
use crate::properties::Properties;

/// The maximum number of clients of an export.
const CLIENTS_MAX: usize = 16;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// The maximum number of clients whose file descriptors take long to close, before new clients are
/// refused.
const STUCK_MAX: usize = 4;
/// The shortest time between two log lines about clients that misbehave.
const WARN_AGAIN: Duration = Duration::from_secs(10);
/// The pause after a failed `accept`, such as for lack of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why an export could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// the socket exists, and another process listens on it, or the path is not a socket
    #[error("{0}: the path is in use")]
    InUse(PathBuf),
    /// a system call failed
    #[error("{what}: {source}")]
    System {
        /// What it was called for.
        what: String,
        /// The system's error.
        source: io::Error,
    },
}

impl StartError {
    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }

    /// The positive errno.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::InUse(_) => libc::EADDRINUSE,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A bdev that is exported. Dropping it stops it.
pub struct Export {
    shared: Arc<Shared>,
}

/// Serializes the starts of exports: between `bind` and `listen`, a socket looks like one that
/// nobody listens on.
static STARTING: Mutex<()> = Mutex::new(());

/// Called by the last thread of a stopped export when it has released the bdev.
pub(crate) type OnEnd = Box<dyn Fn() + Send + Sync>;

/// What the threads of an export share.
pub(crate) struct Shared {
    name: String,
    properties: Properties,
    account: Account,
    warned: Mutex<Option<Instant>>,
    state: Mutex<State>,
    stopping: AtomicBool,
    threads: AtomicUsize,
    on_end: OnEnd,
}

struct State {
    /// `None` once the export was stopped.
    bdev: Option<Arc<dyn Bdev>>,
    /// The listening socket, and the sockets of the clients by number. A second descriptor of each,
    /// with which [`Export::stop`] ends the thread that uses the socket.
    sockets: Vec<(usize, Held)>,
    next: usize,
}

impl Export {
    /// Creates a socket at `path`, and exports the bdev there. `on_bound` is called when the socket
    /// exists and nobody can connect yet. `on_end` is called when the export was stopped and holds
    /// the bdev no more.
    ///
    /// # Errors
    /// [`StartError::InUse`] if something else is at `path`. A socket that nobody listens on is
    /// replaced.
    pub fn start(
        bdev: Arc<dyn Bdev>,
        read_only: bool,
        path: &Path,
        on_bound: impl FnOnce(&Path) -> io::Result<()>,
        on_end: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let system = |source| StartError::system(path.display().to_string(), source);
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = bound(path)?;
        let file = SocketFile { path: path.to_owned(), identity: identity(path) };
        on_bound(path).map_err(system)?;
        listen(&listener, BACKLOG).map_err(|e| system(e.into()))?;
        let shared = Shared::new(bdev, read_only, Box::new(on_end));
        let listener = Held::new(listener, &shared.account);
        shared.run(listener, move |shared, listener, _| {
            shared.listen(listener);
            drop(file);
        })?;
        Ok(Self::of(shared))
    }

    pub(crate) fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Returns whether it exports this bdev.
    #[must_use]
    pub fn exports(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.shared.state().bdev.as_ref().is_some_and(|own| Arc::ptr_eq(own, bdev))
    }

    /// The number of clients that are connected to a socket.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.threads.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Closes the connections. The threads end when their I/O has ended; one of them removes a
    /// socket's file. Does not wait.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Returns whether it was stopped, and its threads have ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shared.stopping.load(Ordering::Acquire)
            && self.shared.threads.load(Ordering::Acquire) == 0
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes a socket at `path`.
fn bound(path: &Path) -> Result<OwnedFd, StartError> {
    let what = path.display().to_string();
    let system = |source: rustix::io::Errno| StartError::system(&what, source);
    let address = SocketAddrUnix::new(path).map_err(system)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(system)?;
    match bind(&socket, &address) {
        Err(rustix::io::Errno::ADDRINUSE) if is_abandoned(path) => {
            fs::remove_file(path).map_err(|source| StartError::system(&what, source))?;
            bind(&socket, &address).map_err(system)?;
        }
        Err(rustix::io::Errno::ADDRINUSE) => return Err(StartError::InUse(path.to_owned())),
        other => other.map_err(system)?,
    }
    Ok(socket)
}

/// Returns whether `path` is a socket that nobody listens on. Does not wait: a server that accepts
/// no connections is there.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connected = SocketAddrUnix::new(path).and_then(|address| {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)
    });
    is_socket && connected == Err(rustix::io::Errno::CONNREFUSED)
}

/// Returns the device and inode number of a path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// The file of a socket. Dropping it removes the file, unless it was replaced.
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == identity(&self.path) {
            // Fails if somebody else removes it at the same time.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Shared {
    pub(crate) fn new(bdev: Arc<dyn Bdev>, read_only: bool, on_end: OnEnd) -> Arc<Self> {
        Arc::new(Self {
            name: bdev.name().to_owned(),
            properties: Properties::of(&*bdev, read_only),
            account: Account::new(format!("NBD export of bdev {}", bdev.name())),
            warned: Mutex::default(),
            state: Mutex::new(State { bdev: Some(bdev), sockets: vec![], next: 0 }),
            stopping: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            on_end,
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that uses a socket.
    pub(crate) fn run(
        self: &Arc<Self>,
        socket: Held,
        work: impl FnOnce(&Arc<Self>, Held, Arc<dyn Bdev>) + Send + 'static,
    ) -> Result<(), StartError> {
        let system = |what| move |source| StartError::system(what, source);
        let duplicate = socket.as_fd().try_clone_to_owned();
        let duplicate = duplicate.map_err(system("cannot duplicate a socket"))?;
        let duplicate = Held::new(duplicate, socket.account());
        let mut state = self.state();
        // A stopped export takes no client any more.
        let Some(bdev) = state.bdev.clone() else { return Ok(()) };
        let number = state.next;
        state.next += 1;
        state.sockets.push((number, duplicate));
        self.threads.fetch_add(1, Ordering::Relaxed);
        drop(state);
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name("vhost-nbd".into()).spawn(move || {
            work(&shared, socket, bdev);
            shared.leave(number);
        });
        if thread.is_err() {
            self.leave(number);
        }
        thread.map(drop).map_err(system("cannot start a thread for an NBD export"))
    }

    /// Ends the part of a thread, which uses nothing of the export any more.
    fn leave(&self, number: usize) {
        self.state().sockets.retain(|(other, _)| *other != number);
        // Release: whoever sees that the last thread has left sees all that the threads have done.
        if self.threads.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.on_end)();
        }
    }

    /// Makes all threads end.
    pub(crate) fn stop(&self) {
        let mut state = self.state();
        self.stopping.store(true, Ordering::Release);
        state.bdev = None;
        for (_, socket) in &state.sockets {
            // Makes the calls of its thread return. Fails if the client is gone.
            let _ = shutdown(socket.as_fd(), Shutdown::Both);
        }
    }

    /// Logs what a client has done, but not too often: a client could do it in a loop.
    fn warn_of_client(&self, text: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|last| last.elapsed() >= WARN_AGAIN) {
            *warned = Some(Instant::now());
            warn!("NBD export of bdev {}: {text}", self.name);
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Accepts clients until the export is stopped.
    fn listen(self: &Arc<Self>, listener: Held) {
        while !self.is_stopping() {
            match accept_with(listener.as_fd(), SocketFlags::CLOEXEC) {
                Ok(socket) => self.accepted(socket),
                Err(_) if self.is_stopping() => {}
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => {
                    self.warn_of_client(&format!("cannot accept a client: {e}"));
                    thread::sleep(ACCEPT_AGAIN);
                }
            }
        }
    }

    fn accepted(self: &Arc<Self>, socket: OwnedFd) {
        let name = format!("NBD client of bdev {}", self.name);
        let socket = Held::new(socket, &Account::new(name.clone()));
        let clients = self.threads.load(Ordering::Relaxed).saturating_sub(1);
        if clients >= CLIENTS_MAX {
            return self.warn_of_client(&format!("refusing a client: {clients} are connected"));
        }
        if closer::stuck().iter().filter(|stuck| stuck.name == name).count() >= STUCK_MAX {
            let text = "refusing a client: file descriptors that clients sent take long to close";
            return self.warn_of_client(text);
        }
        let serve = |shared: &Arc<Self>, socket, bdev| shared.serve(socket, bdev);
        if let Err(e) = self.run(socket, serve) {
            self.warn_of_client(&format!("refusing a client: {e}"));
        }
    }

    /// Serves one client, from the handshake to the end.
    fn serve(&self, socket: Held, bdev: Arc<dyn Bdev>) {
        let mut client = Client::new(socket);
        match client.negotiate(&self.name, &self.properties) {
            Ok(Some(chosen)) => self.transmit(client, bdev, chosen),
            Ok(None) => {}
            Err(e) => debug!("NBD export of bdev {}: a handshake has ended: {e}", self.name),
        }
    }

    /// Serves the requests of a client, or of the kernel, which does no handshake.
    pub(crate) fn transmit(&self, mut client: Client, bdev: Arc<dyn Bdev>, chosen: Chosen) {
        match client.serve(bdev, self.properties, chosen, &self.stopping) {
            Ok(()) => {}
            Err(Problem::Socket(e)) => {
                debug!("NBD export of bdev {}: a connection has ended: {e}", self.name);
            }
            Err(problem) => self.warn_of_client(&format!("closing a connection: {problem}")),
        }
    }

    pub(crate) fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(crate) fn account(&self) -> &Account {
        &self.account
    }
}
