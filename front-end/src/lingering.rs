//! A socket whose close takes as long as its owner likes, to be sent to where it is closed.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::error::{Error, Result};

/// How long the kernel waits for the bytes to be delivered: longer than anybody else waits.
const LINGER: Duration = Duration::from_secs(60_000);

/// One end of a TCP connection with bytes that its other end does not read, and which lingers for
/// longer than anybody waits. The last close of [`Lingering::fd`] hangs until this is dropped.
#[derive(Debug)]
pub struct Lingering {
    /// Resets the connection when it is dropped, as it has unread bytes; before our own end is.
    _peer: TcpStream,
    fd: Option<TcpStream>,
}

impl Lingering {
    /// Makes one over the loopback interface.
    ///
    /// # Errors
    /// The system has no socket, or no loopback interface.
    pub fn new() -> Result<Self> {
        Self::make().map_err(Error::system("cannot make a lingering socket"))
    }

    fn make() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        // Less than the sender keeps: some bytes can never be delivered.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4096)?;
        let mut fd = TcpStream::connect(listener.local_addr()?)?;
        let (peer, _) = listener.accept()?;
        rustix::net::sockopt::set_socket_linger(&fd, Some(LINGER))?;
        fd.set_nonblocking(true)?;
        while fd.write(&[0; 1 << 16]).is_ok() {}
        Ok(Self { _peer: peer, fd: Some(fd) })
    }

    /// What to send.
    ///
    /// # Panics
    /// After [`Lingering::is_sent`].
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("not yet sent").as_fd()
    }

    /// Leaves the last reference to whoever it was sent to. It must not have been closed there: the
    /// close would hang here.
    pub fn is_sent(&mut self) {
        self.fd = None;
    }
}
