//! Detects that a client has closed both directions of its socket.
//!
//! End of file is not sufficient: a client that has only shut down its sending direction still
//! reads answers. The kernel reports the hang-up as EPOLLHUP, which tokio reports together with
//! "writable", and a socket is nearly always writable. So this module watches a second handle of
//! the socket and clears "writable" there. On the first handle, clearing it would make writes fail.

use std::io;

use closer::ForeignFd;
use tokio::io::unix::AsyncFd;

use crate::stream::Stream;

/// The second handle of a client's socket.
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
                // tokio keeps readiness until it is cleared. The next call waits for a change.
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return,
            }
        }
    }
}
