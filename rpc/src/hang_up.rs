//! Tells when a client has closed both directions of its socket.
//!
//! End of file does not: a client that only shut down its sending side still reads answers.
//! The kernel does, as EPOLLHUP, but tokio reports that with "writable", which a socket is
//! nearly always. So this watches a second handle of the socket and throws "writable" away
//! there, which would make the first handle refuse to write.

use std::io;

use closer::ForeignFd;
use tokio::io::unix::AsyncFd;

use crate::stream::Stream;

/// The second handle.
pub(crate) struct HangUp(AsyncFd<ForeignFd>);

impl HangUp {
    /// Fails when the process is out of file descriptors.
    pub(crate) fn new(stream: &Stream) -> io::Result<Self> {
        stream.second_handle().map(Self)
    }

    /// Waits until the client has closed.
    pub(crate) async fn wait(&self) {
        loop {
            match self.0.writable().await {
                Ok(guard) if guard.ready().is_write_closed() => return,
                // Readiness is remembered until it is cleared; then wait for the next change.
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return,
            }
        }
    }
}
