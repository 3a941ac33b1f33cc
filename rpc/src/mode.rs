//! The mode of all connections of a server.

use tokio::sync::watch;

/// The mode of all connections of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Requests run.
    Serving,
    /// Connections are accepted, but requests wait.
    Paused,
    /// Finished answers are sent, and then the connections are closed.
    Stopping,
}

/// Waits until the server stops or is dropped.
pub(crate) async fn stopping(mut modes: watch::Receiver<Mode>) {
    let _ = modes.wait_for(|mode| *mode == Mode::Stopping).await;
}
