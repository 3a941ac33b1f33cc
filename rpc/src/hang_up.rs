//! Tells when a client has closed both directions of its socket.
//!
//! End of file does not: a client that only shut down its sending side still reads answers.
//! The kernel does, as EPOLLHUP, but tokio reports that with "writable", which a socket is
//! nearly always. So this watches a second handle of the socket and throws "writable" away
//! there, which would make the first handle refuse to write.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use tokio::io::Interest;
use tokio::net::UnixStream;

/// The second handle.
pub(crate) struct HangUp(UnixStream);

impl HangUp {
    /// Fails when the process is out of file descriptors.
    pub(crate) fn new(stream: &UnixStream) -> io::Result<Self> {
        let handle = StdUnixStream::from(stream.as_fd().try_clone_to_owned()?);
        UnixStream::from_std(handle).map(Self)
    }

    /// Waits until the client has closed.
    pub(crate) async fn wait(&self) {
        loop {
            match self.0.ready(Interest::WRITABLE).await {
                Ok(ready) if ready.is_write_closed() => return,
                Ok(_) => {
                    // Readiness is remembered until an operation would block; then the next
                    // change is waited for.
                    let forget = || Err::<(), _>(ErrorKind::WouldBlock.into());
                    let _ = self.0.try_io(Interest::WRITABLE, forget);
                }
                Err(_) => return,
            }
        }
    }
}
