//! The listening socket and its clients.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet, spawn_local};

use crate::connection;
use crate::idle::Connections;
use crate::registry::Registry;
use crate::socket::{BindError, SocketFile};
use crate::stream::{Listener, Slots, Stream};

/// Clients served at once; further ones wait in the kernel's backlog. SPDK's number.
pub const CONNECTIONS_MAX: usize = 64;

/// How long to wait after a failed accept, which mostly means that the process is out of
/// file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How often the server checks, while all slots are taken, whether a client waits for one.
const WAITING_CHECK: Duration = Duration::from_secs(5);

/// What the server asks of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Requests are served.
    Serving,
    /// Connections are accepted, requests wait.
    Paused,
    /// Finished answers are sent, then connections close.
    Stopping,
}

/// A server on a Unix socket. Dropping it closes all connections at once and removes the socket.
pub struct Server {
    mode: watch::Sender<Mode>,
    accept: JoinHandle<()>,
    socket: SocketFile,
}

impl Server {
    /// Listens on `path` and serves `registry` from the next turn of the runtime on.
    ///
    /// Must be called inside a `tokio::task::LocalSet`.
    ///
    /// # Errors
    /// See [`BindError`]; in particular if another process serves this path.
    pub fn bind(path: impl AsRef<Path>, registry: Rc<Registry>) -> Result<Self, BindError> {
        let (socket, listener) = SocketFile::listen(path.as_ref())?;
        let (mode, modes) = watch::channel(Mode::Serving);
        let accept = spawn_local(accept(listener, registry, modes));
        Ok(Self { mode, accept, socket })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Lets further requests wait; connections are still accepted, and what runs goes on.
    pub fn pause(&self) {
        self.mode.send_replace(Mode::Paused);
    }

    /// Serves requests again.
    pub fn resume(&self) {
        self.mode.send_replace(Mode::Serving);
    }

    /// Stops accepting, sends what is answered (as far as the sockets take it at once), closes
    /// the connections, and removes the socket and its lock. Calls that still run are told that
    /// their client is gone.
    pub async fn shutdown(mut self) {
        self.mode.send_replace(Mode::Stopping);
        if let Err(error) = (&mut self.accept).await {
            tracing::error!("RPC server: {error}");
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
                    tracing::error!("RPC connection: {error}");
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

/// Waits until the server stops, or is dropped.
pub(crate) async fn stopping(mut modes: watch::Receiver<Mode>) {
    let _ = modes.wait_for(|mode| *mode == Mode::Stopping).await;
}

/// Takes a slot before it accepts, so that a client without a slot stays in the backlog.
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
                    tracing::warn!("cannot accept an RPC connection: {error}; will retry");
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
