//! The server: accepts clients on a Unix socket.

use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet, spawn_local};

use crate::connection;
use crate::idle::Connections;
use crate::mode::{Mode, stopping};
use crate::registry::Registry;
use crate::socket::{BindError, SocketFile};
use crate::stream::{Listener, Slots, Stream};

/// Limit on clients, as in SPDK. Further clients wait in the kernel's backlog.
pub const CONNECTIONS_MAX: usize = 64;

/// The wait after a failed `accept`. The usual reason is that the process is out of file
/// descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Interval of checks, while all slots are taken, whether a client waits.
const WAITING_CHECK: Duration = Duration::from_secs(5);

/// A server on a Unix socket. Dropping it closes all connections and removes the socket.
pub struct Server {
    mode: watch::Sender<Mode>,
    accept: JoinHandle<()>,
    socket: SocketFile,
}

impl Server {
    /// Listens on `path`, and serves `registry` when the runtime next runs its tasks.
    ///
    /// Must be called inside a `tokio::task::LocalSet`.
    ///
    /// # Errors
    /// See [`BindError`], in particular [`BindError::InUse`].
    pub fn bind(path: impl AsRef<Path>, registry: Rc<Registry>) -> Result<Self, BindError> {
        Self::bind_with(path, registry, |_| Ok(()))
    }

    /// As [`Server::bind`]. Calls `on_bound` with the path when the socket's file exists and no
    /// client can connect yet, for example to change the file's mode. An error removes the file.
    ///
    /// # Errors
    /// As [`Server::bind`], and [`BindError::File`] with the error of `on_bound`.
    pub fn bind_with(
        path: impl AsRef<Path>,
        registry: Rc<Registry>,
        on_bound: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Self, BindError> {
        let (socket, listener) = SocketFile::listen(path.as_ref(), on_bound)?;
        let (mode, modes) = watch::channel(Mode::Serving);
        let accept = spawn_local(accept(listener, registry, modes));
        Ok(Self { mode, accept, socket })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Makes further requests wait. Running requests continue, and connections are still accepted.
    pub fn pause(&self) {
        self.mode.send_replace(Mode::Paused);
    }

    /// Runs requests again.
    pub fn resume(&self) {
        self.mode.send_replace(Mode::Serving);
    }

    /// Stops accepting, sends finished answers (as much as the sockets take without blocking),
    /// closes the connections, and removes the socket and its lock file. Running calls see that
    /// their client is gone ([`crate::Client::gone`]).
    pub async fn shutdown(mut self) {
        self.mode.send_replace(Mode::Stopping);
        if let Err(error) = (&mut self.accept).await {
            tracing::error!("the RPC server's task failed: {error}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

async fn accept(listener: Listener, registry: Rc<Registry>, modes: watch::Receiver<Mode>) {
    let slots = Slots::new(CONNECTIONS_MAX);
    let connections = Connections::default();
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            () = stopping(modes.clone()) => break,
            Some(ended) = clients.join_next() => {
                if let Err(error) = ended {
                    tracing::error!("the task of an RPC connection failed: {error}");
                }
            }
            stream = next_client(&listener, &slots, &connections) => {
                let (registry, modes) = (Rc::clone(&registry), modes.clone());
                clients.spawn_local(connection::serve(stream, registry, modes, connections.add()));
            }
        }
    }
    drop(listener);
    while clients.join_next().await.is_some() {}
}

/// Accepts the next client. It acquires a slot first, so that a client without a slot stays in the
/// backlog.
async fn next_client(listener: &Listener, slots: &Slots, connections: &Connections) -> Stream {
    let mut failed = false;
    loop {
        let slot = tokio::select! {
            biased;
            slot = slots.acquire() => slot,
            () = tokio::time::sleep(WAITING_CHECK) => {
                if listener.has_waiting() {
                    connections.close_idlest();
                }
                continue;
            }
        };
        let accepted = match listener.readable().await {
            Ok(()) => listener.accept(slot),
            Err(error) => Err(error),
        };
        match accepted {
            Ok(Some(stream)) => return stream,
            Ok(None) => {}
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!("cannot accept an RPC connection: {error}; retrying");
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
