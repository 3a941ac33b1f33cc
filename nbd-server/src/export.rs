//! An export: a bdev on a Unix socket.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bdev::Bdev;
use closer::Account;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};
use tracing::{debug, warn};

use crate::connection::Client;
use crate::properties::Properties;

/// The maximum number of clients of an export.
const CLIENTS_MAX: usize = 16;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
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

/// A bdev that is exported on a Unix socket. Dropping it stops it.
pub struct Export {
    shared: Arc<Shared>,
    path: PathBuf,
}

/// Called by the last thread of a stopped export when it has released the bdev.
pub(crate) type OnEnd = Box<dyn Fn() + Send + Sync>;

/// What the threads of an export share.
pub(crate) struct Shared {
    name: String,
    properties: Properties,
    account: Account,
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
    sockets: Vec<(usize, OwnedFd)>,
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
        let what = || path.display().to_string();
        let listener = bound(path)?;
        let started = (|| {
            on_bound(path).map_err(|source| StartError::system(what(), source))?;
            listen(&listener, BACKLOG).map_err(|source| StartError::system(what(), source))?;
            let shared = Shared::new(bdev, read_only, Box::new(on_end));
            let duplicate = listener.try_clone();
            let duplicate = duplicate.map_err(|source| StartError::system(what(), source))?;
            shared.run(duplicate, move |shared, _| shared.listen(listener))?;
            Ok(shared)
        })();
        match started {
            Ok(shared) => Ok(Self { shared, path: path.to_owned() }),
            Err(e) => {
                let _ = fs::remove_file(path);
                Err(e)
            }
        }
    }

    /// Returns whether it exports this bdev.
    #[must_use]
    pub fn exports(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.shared.state().bdev.as_ref().is_some_and(|own| Arc::ptr_eq(own, bdev))
    }

    /// The number of connected clients.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.threads.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Closes the connections and removes the socket. The threads end when their I/O has ended.
    pub fn stop(&self) {
        if self.shared.stop() {
            // Its lack would mean that somebody else has removed it.
            let _ = fs::remove_file(&self.path);
        }
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

/// Returns whether `path` is a socket that nobody listens on.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let refused = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).as_ref().is_err_and(refused)
}

impl Shared {
    pub(crate) fn new(bdev: Arc<dyn Bdev>, read_only: bool, on_end: OnEnd) -> Arc<Self> {
        Arc::new(Self {
            name: bdev.name().to_owned(),
            properties: Properties::of(&*bdev, read_only),
            account: Account::new(format!("NBD export of bdev {}", bdev.name())),
            state: Mutex::new(State { bdev: Some(bdev), sockets: vec![], next: 0 }),
            stopping: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            on_end,
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that uses a socket, of which `duplicate` is a second descriptor.
    pub(crate) fn run(
        self: &Arc<Self>,
        duplicate: OwnedFd,
        work: impl FnOnce(&Arc<Self>, Arc<dyn Bdev>) + Send + 'static,
    ) -> Result<(), StartError> {
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
            work(&shared, bdev);
            shared.leave(number);
        });
        if let Err(source) = thread {
            self.leave(number);
            return Err(StartError::system("cannot start a thread for an NBD export", source));
        }
        Ok(())
    }

    /// Ends the part of a thread, which uses nothing of the export any more.
    fn leave(&self, number: usize) {
        let mut state = self.state();
        if let Some(at) = state.sockets.iter().position(|(other, _)| *other == number) {
            self.account.drop_later(state.sockets.swap_remove(at));
        }
        drop(state);
        // Release: whoever sees that the last thread has left sees all that the threads have done.
        if self.threads.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.on_end)();
        }
    }

    /// Ends all threads. Returns false if it was called before.
    pub(crate) fn stop(&self) -> bool {
        let mut state = self.state();
        let first = !self.stopping.swap(true, Ordering::AcqRel);
        state.bdev = None;
        for (_, socket) in &state.sockets {
            // Makes the calls of its thread return. Fails if the client is gone.
            let _ = shutdown(socket, Shutdown::Both);
        }
        first
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Accepts clients until the export is stopped.
    fn listen(self: &Arc<Self>, listener: OwnedFd) {
        while !self.is_stopping() {
            match accept_with(listener.as_fd(), SocketFlags::CLOEXEC) {
                Ok(socket) => self.accepted(socket),
                Err(_) if self.is_stopping() => {}
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => {
                    warn!("NBD export of bdev {}: cannot accept a client: {e}", self.name);
                    thread::sleep(ACCEPT_AGAIN);
                }
            }
        }
        // Clients that wait to be accepted may have sent file descriptors.
        self.account.drop_later(listener);
    }

    fn accepted(self: &Arc<Self>, socket: OwnedFd) {
        let clients = self.threads.load(Ordering::Relaxed).saturating_sub(1);
        if clients >= CLIENTS_MAX || self.account.is_stuck() {
            warn!("NBD export of bdev {}: refusing a client: {clients} are connected", self.name);
            self.account.drop_later(socket);
            return;
        }
        let started = match socket.try_clone() {
            Ok(duplicate) => self.run(duplicate, move |shared, bdev| shared.serve(socket, bdev)),
            Err(source) => Err(StartError::system("cannot duplicate a socket", source)),
        };
        if let Err(e) = started {
            warn!("NBD export of bdev {}: refusing a client: {e}", self.name);
        }
    }

    /// Serves one client, from the handshake to the end.
    fn serve(&self, socket: OwnedFd, bdev: Arc<dyn Bdev>) {
        let mut client = Client::new(socket, &self.account);
        let served = match client.negotiate(&self.name, &self.properties) {
            Ok(Some(chosen)) => client.serve(bdev, self.properties, chosen),
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = served {
            debug!("NBD export of bdev {}: a connection has ended: {e}", self.name);
        }
        self.account.drop_later(client.into_socket());
    }

    /// Serves the kernel, which does no handshake.
    pub(crate) fn serve_kernel(&self, socket: OwnedFd, bdev: Arc<dyn Bdev>) {
        let mut client = Client::new(socket, &self.account);
        if let Err(e) = client.serve(bdev, self.properties, Default::default()) {
            debug!("NBD export of bdev {}: the kernel's connection has ended: {e}", self.name);
        }
        self.account.drop_later(client.into_socket());
    }

    pub(crate) fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(crate) fn has_threads(&self) -> bool {
        self.threads.load(Ordering::Acquire) > 0
    }

    pub(crate) fn holds(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.state().bdev.as_ref().is_some_and(|own| Arc::ptr_eq(own, bdev))
    }
}
