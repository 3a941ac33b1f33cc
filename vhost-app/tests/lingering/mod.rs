//! A socket whose close takes as long as its owner likes, to be sent to where it is closed.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// One end of a TCP connection with bytes that its other end does not read, and which lingers for
/// longer than anybody waits. The last close of [`Lingering::fd`] hangs until this is dropped.
pub(crate) struct Lingering {
    /// Resets the connection when it is dropped, as it has unread bytes; before our own end is.
    _peer: TcpStream,
    fd: Option<TcpStream>,
}

impl Lingering {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Less than the sender keeps: some bytes can never be delivered.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4096).unwrap();
        let mut fd = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let linger = Some(Duration::from_secs(60_000));
        rustix::net::sockopt::set_socket_linger(&fd, linger).unwrap();
        fd.set_nonblocking(true).unwrap();
        while fd.write(&[0; 1 << 16]).is_ok() {}
        Self { _peer: peer, fd: Some(fd) }
    }

    /// What to send.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().unwrap().as_fd()
    }

    /// Leaves the last reference to whoever it was sent to.
    pub(crate) fn is_sent(&mut self) {
        self.fd = None;
    }
}
