//! A socket whose close blocks until its owner permits it, to be sent to the process under test.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::error::{Error, Result};

/// How long the kernel waits for the delivery of the bytes: longer than any test.
const LINGER: Duration = Duration::from_secs(60_000);

/// One end of a TCP connection that holds undelivered bytes and lingers for longer than any test.
/// The last close of [`Lingering::fd`] blocks until this is dropped.
#[derive(Debug)]
pub struct Lingering {
    /// Has unread bytes, so dropping it resets the connection. Dropped before this end of the
    /// connection.
    _peer: TcpStream,
    fd: Option<TcpStream>,
}

impl Lingering {
    /// Makes one over the loopback interface.
    ///
    /// # Errors
    /// No socket, or no loopback interface, is available.
    pub fn new() -> Result<Self> {
        Self::make().map_err(Error::system("cannot make a lingering socket"))
    }

    fn make() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        // Smaller than the sender's buffer, so that some bytes can never be delivered.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4096)?;
        let mut fd = TcpStream::connect(listener.local_addr()?)?;
        let (peer, _) = listener.accept()?;
        rustix::net::sockopt::set_socket_linger(&fd, Some(LINGER))?;
        fd.set_nonblocking(true)?;
        while fd.write(&[0; 1 << 16]).is_ok() {}
        Ok(Self { _peer: peer, fd: Some(fd) })
    }

    /// Returns the fd to send.
    ///
    /// # Panics
    /// After [`Lingering::is_sent`].
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("`fd` is not called after `is_sent`").as_fd()
    }

    /// Drops this process's reference, so that the receiver has the last one. The receiver must not
    /// have closed its fd yet: otherwise the close blocks here.
    pub fn is_sent(&mut self) {
        self.fd = None;
    }
}
