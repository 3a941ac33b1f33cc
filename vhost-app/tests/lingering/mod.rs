//! A socket whose close takes as long as its owner likes, to be sent to the process that then
//! closes it.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// One end of a TCP connection with bytes that its other end does not read, and with a linger time
/// that no test waits for. The last close of [`Lingering::fd`] blocks until this is dropped.
pub(crate) struct Lingering {
    /// Dropped before our own end; resets the connection, as it has unread bytes.
    _peer: TcpStream,
    fd: Option<TcpStream>,
}

impl Lingering {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Less than the sender's buffer: some bytes can never be delivered.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4096).unwrap();
        let mut fd = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let linger = Some(Duration::from_secs(60_000));
        rustix::net::sockopt::set_socket_linger(&fd, linger).unwrap();
        fd.set_nonblocking(true).unwrap();
        while fd.write(&[0; 1 << 16]).is_ok() {}
        Self { _peer: peer, fd: Some(fd) }
    }

    /// The fd to send.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().unwrap().as_fd()
    }

    /// Leaves the last reference to the receiver.
    pub(crate) fn is_sent(&mut self) {
        self.fd = None;
    }
}
