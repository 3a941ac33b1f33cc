//! Sockets of clients, and the listening socket.
//!
//! A client may send fds whose close blocks for as long as it likes (see the crate `closer`). Such
//! fds may also be in unread messages of its socket, or in the backlog of the listening socket. So
//! this module reads with [`closer::receive`], and other threads close these sockets.
#![expect(unsafe_code, reason = "tokio requires that a registered fd stays open")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use closer::{Account, ForeignFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind,
    listen, send, shutdown, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Backlog of connections that wait while all slots are taken, as in SPDK.
const BACKLOG: i32 = 512;

/// Limit on the fds that a client sends. No request needs an fd, so they are closed.
const FDS_MAX: usize = 16;

/// Limit on clients with fds that are not closed, including clients that have disconnected: the
/// close of an fd that a client has sent may block, and each such client occupies a thread.
const UNCLOSED_MAX: usize = 512;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Limits the number of clients.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    served: Arc<Semaphore>,
    unclosed: Arc<Semaphore>,
}

/// The right to accept one client.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Released when the client disconnects.
    served: OwnedSemaphorePermit,
    /// Released when all fds of the client are closed.
    unclosed: OwnedSemaphorePermit,
}

impl Slots {
    /// Slots for at most `served` clients at a time.
    pub(crate) fn new(served: usize) -> Self {
        let [served, unclosed] = [served, UNCLOSED_MAX].map(|n| Arc::new(Semaphore::new(n)));
        Self { served, unclosed }
    }

    /// Waits for a free slot.
    pub(crate) async fn acquire(&self) -> Slot {
        let of = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).acquire_owned();
        let (served, unclosed) = (of(&self.served).await, of(&self.unclosed).await);
        let expected = "the semaphore is never closed";
        Slot { served: served.expect(expected), unclosed: unclosed.expect(expected) }
    }
}

/// The socket of one client.
#[derive(Debug)]
pub(crate) struct Stream {
    fd: AsyncFd<ForeignFd>,
    account: Account,
    /// Number of fds that the client has sent.
    fds: usize,
    _served: OwnedSemaphorePermit,
}

impl Stream {
    fn new(fd: OwnedFd, slot: Slot) -> io::Result<Self> {
        let account = Account::operator("an RPC client", slot.unclosed);
        let fd = watched(ForeignFd::new(fd, &account), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { fd, account, fds: 0, _served: slot.served })
    }

    /// A connected pair.
    #[cfg(test)]
    pub(crate) fn pair() -> (Self, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let permit = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let slot = Slot { served: permit(), unclosed: permit() };
        (Self::new(ours.into(), slot).unwrap(), theirs)
    }

    #[cfg(test)]
    pub(crate) fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Waits until the socket is ready for `interest`.
    pub(crate) async fn ready(&self, interest: Interest) {
        // Reading or writing reports an error of the socket.
        let _ = self.fd.ready(interest).await;
    }

    /// Reads available bytes. Fds in their messages are closed.
    ///
    /// # Errors
    /// `WouldBlock` if no bytes are available. After any other error, such as too many fds, the
    /// connection must be closed.
    pub(crate) fn try_read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read =
            |fd: &ForeignFd| closer::receive(fd.as_fd(), bytes, libc::MSG_DONTWAIT, &self.account);
        let (count, fds) = self.fd.try_io(Interest::READABLE, read)?;
        if fds.is_empty() {
            return Ok(count);
        }
        if self.fds == 0 {
            tracing::warn!("closing file descriptors that an RPC client has sent");
        }
        self.fds += fds.len();
        if self.fds > FDS_MAX {
            return Err(io::Error::other("too many file descriptors"));
        }
        Ok(count)
    }

    /// Writes as many bytes as the socket takes.
    ///
    /// # Errors
    /// `WouldBlock` if the socket is full. Any other error means that the client has disconnected.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.fd.try_io(Interest::WRITABLE, |fd| Ok(send(fd, bytes, flags)?))
    }

    /// Shuts down the direction towards the client.
    pub(crate) fn shut_down_write(&self) {
        // An error means that the client has disconnected.
        let _ = shutdown(self.fd.get_ref(), Shutdown::Write);
    }

    /// A second handle, whose readiness tokio tracks separately.
    pub(crate) fn second_handle(&self) -> io::Result<AsyncFd<ForeignFd>> {
        watched(self.fd.get_ref().try_clone()?, Interest::WRITABLE)
    }
}

fn watched(fd: ForeignFd, interest: Interest) -> io::Result<AsyncFd<ForeignFd>> {
    // SAFETY: a `ForeignFd` refers to the same open fd until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// The listening socket.
#[derive(Debug)]
pub(crate) struct Listener(AsyncFd<ForeignFd>);

impl Listener {
    /// Creates the socket's file. Clients cannot connect yet.
    pub(crate) fn bind(path: &Path) -> io::Result<OwnedFd> {
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(fd)
    }

    /// Listens on a socket of [`Listener::bind`].
    pub(crate) fn listen(fd: OwnedFd) -> io::Result<Self> {
        listen(&fd, BACKLOG)?;
        let account = Account::operator("the RPC socket", ());
        watched(ForeignFd::new(fd, &account), Interest::READABLE).map(Self)
    }

    /// Waits until a client may wait to be accepted.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// Accepts a client. Returns `None` and releases `slot` if no client waits.
    pub(crate) fn accept(&self, slot: Slot) -> io::Result<Option<Stream>> {
        match self.0.try_io(Interest::READABLE, |fd| Ok(accept_with(fd, FLAGS)?)) {
            Ok(fd) => Stream::new(fd, slot).map(Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a client waits to be accepted.
    pub(crate) fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
