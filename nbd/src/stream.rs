//! Connects to a server, and exchanges bytes with it until a deadline.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};

use crate::resolver::Target;

/// An idle TCP connection is probed after this time, ...
const IDLE: Duration = Duration::from_secs(10);
/// ... at this interval, ...
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// ... and is over after so many probes without an answer.
const PROBES: u32 = 4;

/// A connected socket whose calls fail after a deadline.
pub(crate) struct Stream {
    socket: OwnedFd,
    deadline: Instant,
}

impl Stream {
    /// Connects.
    ///
    /// # Errors
    /// The error of `connect`; EAGAIN if a Unix server's queue of connections is full; ETIMEDOUT.
    pub(crate) fn connect(target: &Target, deadline: Instant) -> io::Result<Self> {
        let socket = match target {
            Target::Unix(path) => connect_unix(path)?,
            Target::Tcp(addresses) => connect_tcp(addresses, deadline)?,
        };
        Ok(Self { socket, deadline })
    }

    /// Fills the buffer.
    ///
    /// # Errors
    /// ETIMEDOUT after the deadline; the socket's error; `UnexpectedEof`.
    pub(crate) fn read(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.wait(PollFlags::IN)?;
            match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(closed()),
                Ok((n, _)) => buffer = &mut buffer[n..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads an array.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub(crate) fn read_array<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes all bytes.
    ///
    /// # Errors
    /// ETIMEDOUT after the deadline; the socket's error.
    pub(crate) fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.wait(PollFlags::OUT)?;
            match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Returns the socket.
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        let left = remaining(self.deadline)?;
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        // After a signal, or at the deadline, the caller's next call sees it.
        let _ = poll(&mut [PollFd::new(&self.socket, flags)], Some(&left));
        Ok(())
    }
}

fn closed() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "the server has closed the connection")
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
    }
}

/// Does not wait for a server that does not accept connections.
fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    // An io_uring fails an operation that would wait if this flag is set.
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

fn connect_tcp(addresses: &[SocketAddr], deadline: Instant) -> io::Result<OwnedFd> {
    let mut last = io::Error::from_raw_os_error(libc::ENOENT);
    for address in addresses {
        match TcpStream::connect_timeout(address, remaining(deadline)?) {
            Ok(stream) => {
                set_options(stream.as_fd())?;
                return Ok(stream.into());
            }
            // std has no errno for a timeout.
            Err(e) if e.kind() == ErrorKind::TimedOut => {
                last = io::Error::from_raw_os_error(libc::ETIMEDOUT);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Does not set `TCP_USER_TIMEOUT`: it also ends the connection to a server that is alive but reads
/// nothing for that time. The requests in its buffers would be sent again on another connection, and
/// be done twice.
fn set_options(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_tcp_nodelay(socket, true)?;
    set_socket_keepalive(socket, true)?;
    set_tcp_keepidle(socket, IDLE)?;
    set_tcp_keepintvl(socket, PROBE_INTERVAL)?;
    set_tcp_keepcnt(socket, PROBES)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::sockopt;

    use super::*;

    impl Stream {
        /// A stream on one end of a socket pair.
        pub(crate) fn of(socket: OwnedFd, deadline: Instant) -> Self {
            Self { socket, deadline }
        }
    }

    #[test]
    fn an_idle_peer_is_probed_and_a_busy_one_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Target::Tcp(vec![listener.local_addr().unwrap()]);
        let deadline = Instant::now() + Duration::from_secs(60);
        let socket = Stream::connect(&address, deadline).unwrap().into_socket();
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 0);
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap(), IDLE);
        assert!(sockopt::tcp_nodelay(&socket).unwrap());
        let past = Stream::connect(&address, Instant::now());
        assert_eq!(past.err().unwrap().raw_os_error(), Some(libc::ETIMEDOUT));
    }

    #[test]
    fn a_unix_server_that_accepts_nothing_is_not_waited_for() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = Target::Unix(path);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut kept = vec![];
        let full = loop {
            match Stream::connect(&address, deadline) {
                Ok(stream) => kept.push(stream),
                Err(e) => break e,
            }
        };
        assert_eq!(full.raw_os_error(), Some(libc::EAGAIN));
    }
}
